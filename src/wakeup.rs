//! Waking sessions that wait for what another session commits.
//!
//! A transaction [`announce`]s what it is going to make true. When it has ended, who waits for that is woken, and looks. The
//! moment matters: at a commit callback the rows are visible but the locks are still held, so a reader woken there would find
//! its horizon below the new events, and sleep again for good. Announcements are therefore sent from the resource owner's
//! callback *after* the locks are released. An aborted transaction sends them too: it may have been what held others up. What is
//! announced is never the news itself, so a wake-up too many does no harm; one too few is made good by the poll.
//!
//! Nothing of this writes: NOTIFY takes a lock that serialises all commits of the server. All of it needs shared memory, so the
//! library preloaded. Without, announcements do nothing and who waits looks every `lockstep.poll_interval`.
//!
//! [`seat`]: sessions that each wait for one thing. [`mailbox`]: what the launcher of a database's workers has to look at.

pub mod mailbox;
mod seat;

use pgrx::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::guc;
use crate::lock;
use crate::process::{self, WaitEvent};
use mailbox::Mail;
use seat::Seat;

/// What a session can wait for.
pub enum Event<'a> {
    /// The cursor of the projection in the tenant has moved.
    Advanced {
        projection: &'a str,
        tenant: &'a str,
    },
    /// The lease was released, or a transaction that was acquiring it has ended.
    Lease { name: &'a str },
    /// A job of the queue may have become claimable in the tenant, or, for who waits for any, in some tenant.
    Queue {
        queue: &'a str,
        tenant: Option<&'a str>,
    },
}

/// What a look at the awaited state found.
pub enum Look {
    There,
    /// Not yet; where time alone can bring it about, how long that takes.
    NotYet(Option<Duration>),
}

impl From<bool> for Look {
    fn from(there: bool) -> Self {
        if there {
            Look::There
        } else {
            Look::NotYet(None)
        }
    }
}

impl Event<'_> {
    /// What the seats are told apart by. Two events that collide wake each other's waiters for nothing.
    fn key(&self) -> u64 {
        let database = process::database().to_u32().to_le_bytes();
        match self {
            Event::Advanced { projection, tenant } => lock::hash(&[
                b"advanced",
                &database,
                projection.as_bytes(),
                tenant.as_bytes(),
            ]),
            Event::Lease { name } => lock::hash(&[b"lease", &database, name.as_bytes()]),
            Event::Queue {
                queue,
                tenant: Some(tenant),
            } => lock::hash(&[b"queue", &database, queue.as_bytes(), tenant.as_bytes()]),
            Event::Queue {
                queue,
                tenant: None,
            } => lock::hash(&[b"queue", &database, queue.as_bytes()]),
        }
    }
}

/// Who is to be told.
#[derive(PartialEq, Eq, Hash)]
enum Address {
    Launcher(Mail),
    Seats(u64),
}

thread_local! {
    /// What the running transaction has announced, and whether only for its rollback.
    static ANNOUNCED: RefCell<HashSet<(Address, bool)>> = RefCell::new(HashSet::new());
    /// Whether the ends of this backend's transactions are followed already.
    static FOLLOWING: Cell<bool> = const { Cell::new(false) };
}

/// Called by the postmaster, which all processes come from.
pub fn preload() {
    seat::preload();
    mailbox::preload();
}

/// Wakes who waits for the event, when this transaction has ended and released its locks.
pub fn announce(event: &Event) {
    announce_to(|| Address::Seats(event.key()), false);
}

/// Wakes who waits for the event if this transaction, which holds back what they wait for, is rolled back, or a part of it.
pub fn announce_if_rolled_back(event: &Event) {
    announce_to(|| Address::Seats(event.key()), true);
}

/// Has the workers look at the tenant, when this transaction, which pushes to it, has ended.
pub fn announce_push(tenant: &str) {
    announce_to(|| Address::Launcher(Mail::Tenant(tenant.to_owned())), false);
}

/// Has the workers look at everything, when this transaction has ended: a projection was created, changed, resumed, reset, or
/// given to another role.
pub fn announce_projection_change() {
    announce_to(|| Address::Launcher(Mail::ProjectionChanged), false);
}

fn announce_to(address: impl FnOnce() -> Address, if_rolled_back: bool) {
    if !mailbox::is_there() {
        return;
    }
    if !FOLLOWING.replace(true) {
        // SAFETY: the callback stays for the backend's life.
        unsafe {
            pg_sys::RegisterResourceReleaseCallback(Some(after_release), std::ptr::null_mut());
        }
    }
    let address = address();
    ANNOUNCED.with_borrow_mut(|announced| announced.insert((address, if_rolled_back)));
}

#[pg_guard]
unsafe extern "C-unwind" fn after_release(
    phase: pg_sys::ResourceReleasePhase::Type,
    is_commit: bool,
    is_top_level: bool,
    _argument: *mut std::ffi::c_void,
) {
    if phase != pg_sys::ResourceReleasePhase::RESOURCE_RELEASE_AFTER_LOCKS {
        return;
    }
    if is_top_level {
        for (address, if_rolled_back) in ANNOUNCED.take() {
            if !(if_rolled_back && is_commit) {
                send(&address);
            }
        }
    } else if !is_commit {
        // To a savepoint: what it held back may be free already. At the transaction's end they are woken once more.
        ANNOUNCED.with_borrow(|announced| {
            let for_rollback = announced
                .iter()
                .filter(|(_, if_rolled_back)| *if_rolled_back);
            for_rollback.for_each(|(address, _)| send(address));
        });
    }
}

fn send(address: &Address) {
    match address {
        Address::Launcher(mail) => mailbox::post(mail),
        Address::Seats(key) => seat::wake(*key),
    }
}

/// How much less often somebody looks who will be woken.
const POLLS_SAVED: u32 = 10;

/// Waits until `state` is there or the time is over; whether it is there. It looks whenever the event is announced, when a look
/// said that time may have brought it about, and every lockstep.poll_interval (ten times that with the library preloaded). Obeys
/// cancel and statement_timeout. Shows as a wait for `LockstepWait`, before PostgreSQL 17 for `Extension`.
pub fn wait_until<L: Into<Look>, E>(
    event: &Event,
    timeout: Duration,
    mut state: impl FnMut() -> Result<L, E>,
) -> Result<bool, E> {
    let begun = Instant::now();
    // Taken before the first look, so that nothing announced after a look is missed.
    let seat = Seat::take(event.key());
    let interval = poll_interval() * if seat.is_some() { POLLS_SAVED } else { 1 };
    loop {
        let again = match state()?.into() {
            Look::There => return Ok(true),
            Look::NotYet(again) => again.map_or(interval, |again| again.min(interval)),
        };
        let left = timeout.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Ok(false);
        }
        if !seat.as_ref().is_some_and(Seat::was_called) {
            process::sleep(Some(left.min(again)), WaitEvent(c"LockstepWait"));
        }
    }
}

pub fn poll_interval() -> Duration {
    Duration::from_millis(guc::POLL_INTERVAL.get() as u64)
}
