//! The heavyweight locks of the extension, and the barrier; the horizon's look at them is in `lock/table.rs`. All unsafe lock code is in
//! these two files.
//!
//! All locks are PostgreSQL's own, in the advisory lock space, transaction-scoped. `locktag_field4` carries a private kind in
//! its top four bits; `pg_advisory_lock` uses the values 1 and 2 there, so no key of an application can meet one of ours.
//!
//! # The order of locks
//! A push takes AGGREGATE and UNIQUE_KEY locks in one sorted order, then WRITER_START, then WRITER, and waits for nobody after
//! that. A claim takes PROJECTION_ALL shared, then PROJECTION, then runs the barrier, then takes SLOT. Whatever locks a lease's
//! row takes LEASE first; see `lease.rs`.
//! A job's claim takes JOB_SLOT and JOB_KEY, and its job's row after them, each only if it needs no wait.
//!
//! # Which interleaving each step of the writer and of the reader prevents
//! A writer: (1) reads the ticket sequence, (2) takes WRITER_START with that value, (3) takes WRITER, (4) draws its ticket,
//! (5) inserts; COMMIT makes the rows visible *before* it releases the locks.
//! A reader: (a) reads the ticket sequence: the cut, (b) waits for the transactions that hold WRITER, or takes the least
//! WRITER_START among them, (c) takes a snapshot, (d) reads up to the cut.
//!
//! - Ticket before WRITER (4 before 3): a writer with ticket 7 that has not locked yet is unseen by a reader with cut 8, which
//!   passes 7 and loses it.
//! - Cut after the barrier (a after b): a writer that begins after the wait gets ticket 9, a faster one commits 10; the reader
//!   cuts at 10 and passes the uncommitted 9.
//! - Snapshot before the wait (c before b): the writer that was waited for has committed, but the snapshot does not show it.
//! - WRITER_START after the ticket, or with its value: between the two the horizon knows of no writer and passes it.
//! - A lock request of the reader's own instead of (b): it queues, and every later writer queues behind it, for as long as the
//!   slowest writer lives. [`wait_for_writers`] asks who holds the lock and waits for the ends of those transactions instead,
//!   as CREATE INDEX CONCURRENTLY does.
//!
//! # Keys
//! 64 bits, PostgreSQL's `hash_bytes_extended` over length-prefixed parts. Prepared transactions keep locks across restarts, so
//! neither the hash nor the numbers of the kinds may ever change. Two keys that collide make one wait for the other, no more.

use pgrx::datum::IntoDatum;
use pgrx::pg_sys;

pub mod table;

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum Kind {
    Writer = 1,
    WriterStart = 2,
    Aggregate = 3,
    UniqueKey = 4,
    Projection = 5,
    ProjectionAll = 6,
    Slot = 7,
    Lease = 8,
    LeaseWaiter = 9,
    JobKey = 10,
    JobSlot = 11,
    JobStatistics = 12,
}

/// How many bits of field 4 are left beside the kind.
const KIND_SHIFT: u32 = 12;
/// The bits of a ticket that a WRITER_START lock can carry: field 3 and the rest of field 4.
const START_BITS: u32 = 32 + KIND_SHIFT;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Conflicts with Exclusive alone, as Shared does; tells apart who holds a lock shared for another purpose.
    RowShare,
    Shared,
    Exclusive,
}

impl Mode {
    fn as_pg(self) -> pg_sys::LOCKMODE {
        (match self {
            Mode::RowShare => pg_sys::RowShareLock,
            Mode::Shared => pg_sys::ShareLock,
            Mode::Exclusive => pg_sys::ExclusiveLock,
        }) as pg_sys::LOCKMODE
    }
}

/// One lock. The order of the tags is the order in which several of them are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag {
    field4: u16,
    field2: u32,
    field3: u32,
}

impl Tag {
    fn keyed(kind: Kind, parts: &[&[u8]]) -> Self {
        let key = hash(parts);
        Tag {
            field4: (kind as u16) << KIND_SHIFT,
            field2: (key >> 32) as u32,
            field3: key as u32,
        }
    }

    pub fn writer(tenant: &str) -> Self {
        Tag::keyed(Kind::Writer, &[tenant.as_bytes()])
    }

    /// `before`: the ticket sequence's value just before the writer took its lock.
    pub fn writer_start(tenant: &str, before: i64) -> Self {
        Tag {
            field4: ((Kind::WriterStart as u16) << KIND_SHIFT)
                | ((before >> 32) as u16 & ((1 << KIND_SHIFT) - 1)),
            field2: tenant_key(tenant),
            field3: before as u32,
        }
    }

    pub fn aggregate(tenant: &str, aggregate_type: &str, aggregate_id: &str) -> Self {
        Tag::keyed(
            Kind::Aggregate,
            &[
                tenant.as_bytes(),
                aggregate_type.as_bytes(),
                aggregate_id.as_bytes(),
            ],
        )
    }

    pub fn unique_key(tenant: &str, scope: &str, value: &str) -> Self {
        Tag::keyed(
            Kind::UniqueKey,
            &[
                b"tenant",
                tenant.as_bytes(),
                scope.as_bytes(),
                value.as_bytes(),
            ],
        )
    }

    pub fn global_unique_key(scope: &str, value: &str) -> Self {
        Tag::keyed(
            Kind::UniqueKey,
            &[b"global", scope.as_bytes(), value.as_bytes()],
        )
    }

    pub fn event_id(tenant: &str, event_id: &[u8; 16]) -> Self {
        Tag::keyed(
            Kind::UniqueKey,
            &[b"event", tenant.as_bytes(), event_id.as_slice()],
        )
    }

    pub fn projection(name: &str, tenant: &str) -> Self {
        Tag::keyed(Kind::Projection, &[name.as_bytes(), tenant.as_bytes()])
    }

    /// The projection in all tenants: shared by its claims, exclusive to what changes or removes its definition.
    pub fn projection_all(name: &str) -> Self {
        Tag::keyed(Kind::ProjectionAll, &[name.as_bytes()])
    }

    /// One of the places that lockstep.max_parallel_claims counts.
    pub fn slot(number: u32) -> Self {
        Tag {
            field4: (Kind::Slot as u16) << KIND_SHIFT,
            field2: 0,
            field3: number,
        }
    }

    pub fn lease(name: &str) -> Self {
        Tag::keyed(Kind::Lease, &[name.as_bytes()])
    }

    /// Held, while it sleeps, by a session that waits in lease_take: nobody waits for this lock, it only tells who is there.
    pub fn lease_waiter(name: &str) -> Self {
        Tag::keyed(Kind::LeaseWaiter, &[name.as_bytes()])
    }

    /// A key of a queue: exclusive to the transaction that claims a job with it.
    pub fn job_key(queue: &str, tenant: &str, key: &str) -> Self {
        Tag::keyed(
            Kind::JobKey,
            &[tenant.as_bytes(), queue.as_bytes(), key.as_bytes()],
        )
    }

    /// One of the places of a queue with a limit: exclusive to the transaction that claims a job for it.
    pub fn job_slot(queue: &str, tenant: &str, number: i32) -> Self {
        Tag::keyed(
            Kind::JobSlot,
            &[tenant.as_bytes(), queue.as_bytes(), &number.to_le_bytes()],
        )
    }

    /// A row of a queue's statistics: exclusive to the transaction that adds to it.
    pub fn job_statistics(queue: &str, tenant: &str, part: i32) -> Self {
        Tag::keyed(
            Kind::JobStatistics,
            &[tenant.as_bytes(), queue.as_bytes(), &part.to_le_bytes()],
        )
    }

    /// Waits, obeying lock_timeout, until the lock is this transaction's.
    pub fn acquire(self, mode: Mode) {
        self.lock(mode, false);
    }

    /// Takes the lock if that needs no wait.
    #[must_use]
    pub fn try_acquire(self, mode: Mode) -> bool {
        self.lock(mode, true)
    }

    /// Gives back what one `acquire` or `try_acquire` of this subtransaction took.
    pub fn release(self, mode: Mode) {
        let tag = self.as_pg();
        let _owner = LockOwner::subtransaction();
        // SAFETY: a filled tag of a lock that this subtransaction has taken.
        unsafe { pg_sys::LockRelease(&tag, mode.as_pg(), false) };
    }

    fn lock(self, mode: Mode, dont_wait: bool) -> bool {
        let tag = self.as_pg();
        let _owner = LockOwner::subtransaction();
        // SAFETY: a filled tag of the advisory space, transaction scope, inside a transaction.
        let result = unsafe { pg_sys::LockAcquire(&tag, mode.as_pg(), false, dont_wait) };
        result != pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL
    }

    /// Waits, obeying lock_timeout, until the lock is this transaction's alone, at first without standing in the lock's queue:
    /// whoever asks for it shared meanwhile need not wait for the holders that this waits for.
    pub fn acquire_after_holders(self) {
        const ROUNDS: usize = 10;
        for _ in 0..ROUNDS {
            if self.try_acquire(Mode::Exclusive) {
                return;
            }
            wait_for_holders(self);
        }
        self.acquire(Mode::Exclusive);
    }

    pub fn is_held(self, mode: Mode) -> bool {
        let tag = self.as_pg();
        // SAFETY: looks into this backend's own lock table.
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        unsafe {
            pg_sys::LockHeldByMe(&tag, mode.as_pg())
        }
        // SAFETY: as above; the third argument came with version 17.
        #[cfg(not(any(feature = "pg15", feature = "pg16")))]
        unsafe {
            pg_sys::LockHeldByMe(&tag, mode.as_pg(), false)
        }
    }

    fn is(self, kind: Kind) -> bool {
        self.field4 >> KIND_SHIFT == kind as u16
    }

    /// The whole ticket of a WRITER_START lock from the 44 bits that it carries: the greatest such number not above the
    /// ceiling, which was read later than the start.
    fn start_at_most(self, ceiling: i64) -> i64 {
        let mask = (1_i64 << START_BITS) - 1;
        let low = (i64::from(self.field4 & ((1 << KIND_SHIFT) - 1)) << 32) | i64::from(self.field3);
        ceiling - (ceiling.wrapping_sub(low) & mask)
    }

    /// None: not one of the extension's locks in this database.
    fn of_pg(tag: &pg_sys::LOCKTAG) -> Option<Self> {
        // SAFETY: a plain backend-local variable.
        let database = unsafe { pg_sys::MyDatabaseId }.to_u32();
        let is_ours = tag.locktag_type == pg_sys::LockTagType::LOCKTAG_ADVISORY as u8
            && tag.locktag_field1 == database
            && tag.locktag_field4 >> KIND_SHIFT != 0;
        is_ours.then_some(Tag {
            field4: tag.locktag_field4,
            field2: tag.locktag_field2,
            field3: tag.locktag_field3,
        })
    }

    fn as_pg(self) -> pg_sys::LOCKTAG {
        pg_sys::LOCKTAG {
            // SAFETY: a plain backend-local variable.
            locktag_field1: unsafe { pg_sys::MyDatabaseId }.to_u32(),
            locktag_field2: self.field2,
            locktag_field3: self.field3,
            locktag_field4: self.field4,
            locktag_type: pg_sys::LockTagType::LOCKTAG_ADVISORY as u8,
            locktag_lockmethodid: pg_sys::USER_LOCKMETHOD as u8,
        }
    }
}

/// Takes the locks, each once, in their one order, so that two pushes that need the same ones cannot deadlock.
pub fn acquire_sorted(mut tags: Vec<Tag>) {
    tags.sort_unstable();
    tags.dedup();
    for tag in tags {
        tag.acquire(Mode::Exclusive);
    }
}

/// One of the `places` that claims of the whole database share: true if this transaction has one now. One is enough for all of
/// a transaction's claims. It begins to look at a place of its own, so that sessions do not all try the same ones.
pub fn acquire_slot(places: u32, wait: bool) -> bool {
    // SAFETY: a plain backend-local variable.
    let first = unsafe { pg_sys::MyProcPid } as u32;
    let slots = || (0..places).map(|n| Tag::slot(first.wrapping_add(n) % places));
    if slots().any(|slot| slot.is_held(Mode::Exclusive))
        || slots().any(|slot| slot.try_acquire(Mode::Exclusive))
    {
        return true;
    }
    if wait {
        Tag::slot(first % places).acquire(Mode::Exclusive);
    }
    wait
}

/// The barrier: waits for the end of every transaction that holds WRITER for the tenant now, prepared ones too, without a lock
/// request of its own. Obeys lock_timeout (for each of them), statement_timeout and cancel. Shows as a wait for `virtualxid`.
pub fn wait_for_writers(tenant: &str) {
    wait_for_holders(Tag::writer(tenant));
}

fn wait_for_holders(tag: Tag) {
    // SAFETY: a filled tag; the exclusive mode conflicts with every other one. Own locks are not waited for.
    unsafe { pg_sys::WaitForLockers(tag.as_pg(), Mode::Exclusive.as_pg(), false) }
}

/// Makes the subtransaction own the locks taken while this lives, not the portal. A portal that fails in a savepoint and is
/// closed gives back what it owns, though rows that it wrote before the savepoint are still going to be committed.
struct LockOwner(pg_sys::ResourceOwner);

impl LockOwner {
    fn subtransaction() -> Self {
        // SAFETY: plain backend-local variables; the second is set inside every transaction.
        unsafe {
            let saved = pg_sys::CurrentResourceOwner;
            pg_sys::CurrentResourceOwner = pg_sys::CurTransactionResourceOwner;
            LockOwner(saved)
        }
    }
}

impl Drop for LockOwner {
    fn drop(&mut self) {
        // SAFETY: puts back what was there.
        unsafe { pg_sys::CurrentResourceOwner = self.0 };
    }
}

/// Waits, obeying lock_timeout, until no open transaction has drawn from the sequence; none can until this one ends.
pub fn lock_sequence(sequence: pg_sys::Oid) {
    let _owner = LockOwner::subtransaction();
    // SAFETY: an ordinary relation lock until the transaction's end. nextval() and the readers of the value hold
    // RowExclusiveLock on the sequence, which conflicts.
    unsafe { pg_sys::LockRelationOid(sequence, pg_sys::ShareRowExclusiveLock as pg_sys::LOCKMODE) }
}

/// Waits, obeying lock_timeout, until no open transaction has written the table or locked a row of it; none can until this one
/// ends. Readers go on.
pub fn lock_table(table: pg_sys::Oid) {
    let _owner = LockOwner::subtransaction();
    // SAFETY: an ordinary relation lock until the transaction's end.
    unsafe { pg_sys::LockRelationOid(table, pg_sys::ExclusiveLock as pg_sys::LOCKMODE) }
}

/// What a WRITER_START lock tells of its tenant.
pub fn tenant_key(tenant: &str) -> u32 {
    hash(&[tenant.as_bytes()]) as u32
}

/// PostgreSQL's `hash_bytes_extended` with seed 0, reached through its SQL function over `bytea`.
pub fn hash(parts: &[&[u8]]) -> u64 {
    let mut bytes = Vec::with_capacity(parts.iter().map(|part| part.len() + 4).sum());
    for part in parts {
        bytes.extend_from_slice(&(part.len() as u32).to_le_bytes());
        bytes.extend_from_slice(part);
    }
    // SAFETY: hashvarlenaextended(bytea, int8) takes two non-null datums and never returns NULL.
    let hash: Option<i64> = unsafe {
        pgrx::direct_function_call(
            pg_sys::hashvarlenaextended,
            &[bytes.as_slice().into_datum(), 0_i64.into_datum()],
        )
    };
    hash.unwrap_or_default() as u64
}
