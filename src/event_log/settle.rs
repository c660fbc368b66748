//! The reader's side of the protocol: up to which position every event that will ever be committed is visible to a snapshot
//! taken after this returns. See `lock.rs` for what each step prevents.

use std::cell::Cell;

use crate::error::Error;
use crate::lock;
use crate::lock::table::{self, Holder, Locks};
use crate::position::Position;
use crate::sequence;
use crate::snapshot;

/// Cut, then wait. The caller reads with a snapshot taken after this.
pub fn barrier(tenant: &str) -> Position {
    let cut = sequence::TICKET.value();
    lock::wait_for_writers(tenant);
    Position::last_of(cut)
}

/// Cut, then the least start of a push in flight. The caller reads with a snapshot taken after this.
pub fn horizon(tenant: &str) -> Position {
    let cut = sequence::TICKET.value();
    let starts = table::writer_starts(tenant);
    if starts.is_empty() {
        return Position::last_of(cut);
    }
    bound(cut, table::least_start(&starts, sequence::TICKET.value()))
}

fn bound(cut: i64, least_start: Option<i64>) -> Position {
    Position::last_of(least_start.map_or(cut, |start| start.clamp(0, cut)))
}

/// The horizon of any number of tenants, with one look.
pub struct Horizons {
    cut: i64,
    locks: Locks,
    ceiling: i64,
}

impl Horizons {
    pub fn now() -> Self {
        let cut = sequence::TICKET.value();
        let locks = Locks::now();
        let ceiling = sequence::TICKET.value();
        Horizons {
            cut,
            locks,
            ceiling,
        }
    }

    pub fn of(&self, tenant: &str) -> Position {
        bound(
            self.cut,
            self.locks.least_writer_start(tenant, self.ceiling),
        )
    }

    /// The pushes in flight: the key of the tenant, the least position that the push can have, and whose it is.
    pub fn writers(&self) -> impl Iterator<Item = (u32, Position, Holder)> {
        self.locks
            .writers(self.ceiling)
            .map(|(tenant, start, holder)| (tenant, Position::new(start.max(0) + 1, 0), holder))
    }

    pub fn locks(&self) -> &Locks {
        &self.locks
    }
}

thread_local! {
    static WITHOUT_WAITING: Cell<bool> = const { Cell::new(false) };
}

/// While `body` runs, readers take the horizon, whatever they are asked for: a handler holds its projection's claim, and what
/// it waits for would hold that up.
pub fn without_waiting<T>(body: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            WITHOUT_WAITING.set(self.0);
        }
    }
    let _restore = Restore(WITHOUT_WAITING.replace(true));
    body()
}

/// The barrier where it is asked for and possible, else the horizon.
pub fn settle(tenant: &str, wait: bool) -> Position {
    if wait && !WITHOUT_WAITING.get() && !this_transaction_pushed() {
        barrier(tenant)
    } else {
        horizon(tenant)
    }
}

/// Two transactions that hold WRITER and wait for writers would wait for each other.
pub fn refuse_after_push(what: &'static str) -> Result<(), Error> {
    if this_transaction_pushed() {
        return Err(Error::WaitsAfterPush(what));
    }
    Ok(())
}

fn this_transaction_pushed() -> bool {
    snapshot::has_transaction_id() && table::this_transaction_pushed()
}
