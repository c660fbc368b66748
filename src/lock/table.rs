//! What the server's lock table tells of others: who pushes, who claims, who has leases.
//!
//! # Two ways to look
//! [`Locks::now`] copies the table, with all its partitions locked, so that the picture is of one moment. That costs by the size of
//! the table, not by what is in it: 16 partitions and some ten thousand buckets at `max_connections` = 300, while no other session can
//! take or give back any lock. It serves what asks about all tenants.
//!
//! [`writer_starts`] is what each claim asks: which transactions hold WRITER of one tenant, under one partition's lock; then their
//! WRITER_STARTs, from the list of locks that each of their processes has; then whether the processes still are in these transactions.
//! The three are not of one moment. Between them
//! - a push may end: its rows are visible before its locks go, and the reader's snapshot is taken later;
//! - a transaction may be prepared, and its locks move to an entry without a process, one partition after the other: the process
//!   has WRITER, and its start no longer;
//! - its process may then, or long since, have begun another push, whose start says nothing of the prepared one.
//!
//! Who took a process without a start for one that has ended, or the other push's start for the one that was asked for, would lose
//! the events of the prepared transaction. A prepared transaction even keeps the number of the process that prepared it. So a start counts
//! only if its process was in the listed transaction before and after it was found, and if one is missing, the whole table is copied.
//!
//! Under one partition's lock all the entries that a process has in that partition are there, and none is freed.

use pgrx::pg_sys;
use std::collections::{HashMap, HashSet};

use super::{Kind, Mode, Tag, tenant_key};

/// Where the pushes of other transactions to the tenant began that are in flight at a moment of this call, prepared ones too.
pub fn writer_starts(tenant: &str) -> Vec<Tag> {
    starts_of_holders(tenant).unwrap_or_else(|| {
        let mut locks = Locks::now();
        locks.starts.remove(&tenant_key(tenant)).unwrap_or_default()
    })
}

/// The least ticket after which one of these pushes may have begun. `ceiling` is the ticket sequence's value, read after the locks.
pub fn least_start(starts: &[Tag], ceiling: i64) -> Option<i64> {
    starts.iter().map(|tag| tag.start_at_most(ceiling)).min()
}

/// Whether this transaction holds WRITER for any tenant: it has pushed, and has not rolled the push back.
pub fn this_transaction_pushed() -> bool {
    // SAFETY: a plain backend-local variable.
    let own = unsafe { pg_sys::MyProc };
    held_by(&[own]).map_or_else(
        || Locks::now().this_transaction_pushed,
        |held| held.iter().any(|(_, tag)| tag.is(Kind::Writer)),
    )
}

/// None: only the whole table tells.
fn starts_of_holders(tenant: &str) -> Option<Vec<Tag>> {
    let holders = holders_of(Tag::writer(tenant));
    if holders.is_empty() {
        return Some(Vec::new());
    }
    let processes: Option<Vec<_>> = holders.iter().map(process_of).collect();
    let (processes, key) = (processes?, tenant_key(tenant));
    let mut starts = held_by(&processes)?;
    starts.retain(|(_, tag)| tag.is(Kind::WriterStart) && tag.field2 == key);
    let mut is_sure = vec![false; holders.len()];
    for (index, _) in &starts {
        is_sure[*index] = is_still_in(processes[*index], &holders[*index]);
    }
    let all_sure = is_sure.into_iter().all(|is_sure| is_sure);
    all_sure.then(|| starts.into_iter().map(|(_, tag)| tag).collect())
}

/// The other transactions that hold the lock. A prepared one has the number that it had in its process, or none after a restart.
fn holders_of(tag: Tag) -> Vec<pg_sys::VirtualTransactionId> {
    let mut count = 0;
    // SAFETY: a filled tag; on a primary the result is a palloc'd array of `count`.
    unsafe {
        let mode = Mode::Exclusive.as_pg(); // which conflicts with every other one
        let transactions = pg_sys::GetLockConflicts(&tag.as_pg(), mode, &mut count);
        let holders = std::slice::from_raw_parts(transactions, count as usize).to_vec();
        pg_sys::pfree(transactions.cast());
        holders
    }
}

/// The process that the number names. A prepared transaction is not in it any more.
fn process_of(transaction: &pg_sys::VirtualTransactionId) -> Option<*mut pg_sys::PGPROC> {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    // SAFETY: looks into shared memory, for any number.
    let process = unsafe { BackendIdGetProc(transaction.backendId) };
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    // SAFETY: as above.
    let process = unsafe { pg_sys::ProcNumberGetProc(transaction.procNumber) };
    (!process.is_null()).then_some(process)
}

/// Whether the process has been in this transaction up to now.
fn is_still_in(process: *mut pg_sys::PGPROC, transaction: &pg_sys::VirtualTransactionId) -> bool {
    // SAFETY: processes have their place in shared memory for the server's life; read once, as PostgreSQL itself does.
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    return unsafe {
        (&raw const (*process).backendId).read_volatile() == transaction.backendId
            && (&raw const (*process).lxid).read_volatile() == transaction.localTransactionId
    };
    // SAFETY: as above; here the number of the process never changes.
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    return unsafe {
        (&raw const (*process).vxid.lxid).read_volatile() == transaction.localTransactionId
    };
}

#[cfg(any(feature = "pg15", feature = "pg16"))]
unsafe extern "C-unwind" {
    /// Of sinvaladt.h, for which pgrx has no bindings. Raises nothing.
    fn BackendIdGetProc(backend: std::ffi::c_int) -> *mut pg_sys::PGPROC;
}

/// The extension's locks in this database that the processes hold, each with the index of its process. Partition by partition. None
/// where the server has its partitions' locks elsewhere than in the headers that this was built with.
fn held_by(processes: &[*mut pg_sys::PGPROC]) -> Option<Vec<(usize, Tag)>> {
    const LOCKS_OF_A_PUSH: usize = 4;
    let mut held = Vec::with_capacity(processes.len() * LOCKS_OF_A_PUSH);
    for partition in 0..pg_sys::NUM_LOCK_PARTITIONS as usize {
        // SAFETY: processes have their place in shared memory for the server's life; the partition's lock keeps the entries of their
        // lists in place. Between taking and giving back, nothing raises.
        unsafe {
            let number = pg_sys::LOCK_MANAGER_LWLOCK_OFFSET as usize + partition;
            let lock = &raw mut (*pg_sys::MainLWLockArray.add(number)).lock;
            let tranche = pg_sys::BuiltinTrancheIds::LWTRANCHE_LOCK_MANAGER;
            if u32::from((*lock).tranche) != tranche {
                return None;
            }
            pg_sys::LWLockAcquire(lock, pg_sys::LWLockMode::LW_SHARED);
            for (index, process) in processes.iter().enumerate() {
                let entries = Entries::of(*process, partition);
                held.extend(entries.filter_map(|entry| Some((index, own_tag(entry)?))));
            }
            pg_sys::LWLockRelease(lock);
        }
    }
    Some(held)
}

/// # Safety
/// The lock of the entry's partition is held.
unsafe fn own_tag(entry: *const pg_sys::PROCLOCK) -> Option<Tag> {
    // SAFETY: as the caller promises; an entry's lock lives as long as it.
    unsafe { ((*entry).holdMask != 0).then(|| Tag::of_pg(&(*(*entry).tag.myLock).tag))? }
}

#[cfg(feature = "pg15")]
type Link = pg_sys::SHM_QUEUE;
#[cfg(not(feature = "pg15"))]
type Link = pg_sys::dlist_node;

/// The entries of a process in a partition: a ring, which its head closes.
struct Entries {
    head: *const Link,
    next: *const Link,
}

impl Entries {
    /// # Safety
    /// The partition's lock is held while this lives.
    unsafe fn of(process: *const pg_sys::PGPROC, partition: usize) -> Self {
        // SAFETY: the server has made the heads of all processes at its start.
        unsafe {
            let list = &(*process).myProcLocks[partition];
            #[cfg(feature = "pg15")]
            let head: *const Link = list;
            #[cfg(not(feature = "pg15"))]
            let head: *const Link = &list.head;
            Entries {
                head,
                next: (*head).next,
            }
        }
    }
}

impl Iterator for Entries {
    type Item = *const pg_sys::PROCLOCK;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next == self.head {
            return None;
        }
        let entry = self.next;
        // SAFETY: a link of the ring is a field of its entry.
        unsafe {
            self.next = (*entry).next;
            Some(
                entry
                    .byte_sub(std::mem::offset_of!(pg_sys::PROCLOCK, procLink))
                    .cast(),
            )
        }
    }
}

/// Who holds a lock: a backend, or a prepared transaction, which has no process and the pid 0.
#[derive(Clone, Copy)]
pub struct Holder {
    pub pid: i32,
    /// Of a prepared transaction.
    pub transaction_id: Option<u32>,
}

/// Tells apart the holders without a process.
fn virtual_transaction(lock: &pg_sys::LockInstanceData) -> (i32, u32) {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    return (lock.backend, lock.lxid);
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    return (lock.vxid.procNumber, lock.vxid.localTransactionId);
}

/// The extension's locks in this database as they stood at one moment.
#[derive(Default)]
pub struct Locks {
    /// By tenant key: the WRITER_START locks of other transactions, prepared ones too.
    starts: HashMap<u32, Vec<Tag>>,
    /// Every WRITER_START and every PROJECTION lock, with who holds it.
    held: Vec<(Tag, Holder)>,
    /// Every LEASE and LEASE_WAITER lock: with Shared or in another mode, and who holds it.
    leases: Vec<(Tag, bool, Holder)>,
    /// What other transactions hold exclusively.
    exclusive_elsewhere: HashSet<Tag>,
    this_transaction_pushed: bool,
}

impl Locks {
    /// Reads the lock table once. All its partitions are held together, so the picture is of one moment.
    pub fn now() -> Self {
        let mut locks = Locks::default();
        // SAFETY: returns a palloc'd array of `nelements` copies.
        unsafe {
            let data = pg_sys::GetLockStatusData();
            let all: &[pg_sys::LockInstanceData] = match (*data).nelements {
                n if n > 0 => std::slice::from_raw_parts((*data).locks, n as usize),
                _ => &[],
            };
            // Every transaction that has an id holds a lock on it, a prepared one too.
            let prepared: HashMap<(i32, u32), u32> = all
                .iter()
                .filter(|lock| {
                    lock.pid == 0
                        && lock.holdMask != 0
                        && lock.locktag.locktag_type
                            == pg_sys::LockTagType::LOCKTAG_TRANSACTION as u8
                })
                .map(|lock| (virtual_transaction(lock), lock.locktag.locktag_field1))
                .collect();
            for lock in all.iter().filter(|lock| lock.holdMask != 0) {
                let Some(tag) = Tag::of_pg(&lock.locktag) else {
                    continue;
                };
                let holds = |mode: Mode| lock.holdMask & (1 << mode.as_pg()) != 0;
                let holder = Holder {
                    pid: lock.pid,
                    transaction_id: prepared.get(&virtual_transaction(lock)).copied(),
                };
                if tag.is(Kind::Lease) || tag.is(Kind::LeaseWaiter) {
                    locks.leases.push((tag, holds(Mode::Shared), holder));
                    continue;
                }
                let own = lock.pid == pg_sys::MyProcPid;
                locks.add(tag, holds(Mode::Exclusive), own, holder);
            }
            if !(*data).locks.is_null() {
                pg_sys::pfree((*data).locks.cast());
            }
            pg_sys::pfree(data.cast());
        }
        locks
    }

    fn add(&mut self, tag: Tag, exclusive: bool, own: bool, holder: Holder) {
        if tag.is(Kind::WriterStart) || tag.is(Kind::Projection) {
            self.held.push((tag, holder));
        }
        if own {
            self.this_transaction_pushed |= tag.is(Kind::Writer);
        } else if tag.is(Kind::WriterStart) {
            self.starts.entry(tag.field2).or_default().push(tag);
        } else if exclusive {
            self.exclusive_elsewhere.insert(tag);
        }
    }

    /// The least ticket after which a push of another transaction to the tenant may have begun, if one is in flight.
    /// `ceiling` is the ticket sequence's value, read after these locks.
    pub fn least_writer_start(&self, tenant: &str, ceiling: i64) -> Option<i64> {
        least_start(self.starts.get(&tenant_key(tenant))?, ceiling)
    }

    /// The pushes in flight, this transaction's too: the key of the tenant, the ticket that the push's one is above, and whose
    /// it is. `ceiling` as in `least_writer_start`.
    pub fn writers(&self, ceiling: i64) -> impl Iterator<Item = (u32, i64, Holder)> {
        self.held
            .iter()
            .filter(|(tag, _)| tag.is(Kind::WriterStart))
            .map(move |(tag, holder)| (tag.field2, tag.start_at_most(ceiling), *holder))
    }

    /// The claims held, this transaction's too.
    pub fn claims(&self) -> HashMap<Tag, Holder> {
        let claims = self.held.iter().filter(|(tag, _)| tag.is(Kind::Projection));
        claims.copied().collect()
    }

    /// Whether any session guards a lease or waits for one.
    pub fn has_leases(&self) -> bool {
        !self.leases.is_empty()
    }

    /// The transactions that guard the lease.
    pub fn guards(&self, lease: &str) -> impl Iterator<Item = Holder> {
        let tag = Tag::lease(lease);
        self.leases
            .iter()
            .filter(move |(held, shared, _)| *held == tag && *shared)
            .map(|(_, _, holder)| *holder)
    }

    /// Who sleeps in lease_take for the lease.
    pub fn lease_waiters(&self, lease: &str) -> impl Iterator<Item = Holder> {
        let tag = Tag::lease_waiter(lease);
        self.leases
            .iter()
            .filter(move |(held, _, _)| *held == tag)
            .map(|(_, _, holder)| *holder)
    }

    /// The backends other than this one that hold the lease's lock in any mode; 0 is a prepared transaction.
    pub fn lease_holders_elsewhere(&self, lease: &str) -> Vec<i32> {
        let tag = Tag::lease(lease);
        // SAFETY: a plain backend-local variable.
        let own = unsafe { pg_sys::MyProcPid };
        self.leases
            .iter()
            .filter(|(held, _, holder)| *held == tag && holder.pid != own)
            .map(|(_, _, holder)| holder.pid)
            .collect()
    }

    /// Whether another transaction has claimed the projection for the tenant, or is changing its definition.
    pub fn is_claimed_elsewhere(&self, name: &str, tenant: &str) -> bool {
        !self.exclusive_elsewhere.is_empty()
            && (self
                .exclusive_elsewhere
                .contains(&Tag::projection(name, tenant))
                || self
                    .exclusive_elsewhere
                    .contains(&Tag::projection_all(name)))
    }
}
