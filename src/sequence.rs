//! The extension's sequences, read and drawn from without SQL: a push draws a ticket for the price of a function call.

use pgrx::datum::IntoDatum;
use pgrx::pg_sys;
use std::ffi::CStr;

use crate::catalog;
use crate::error::Error;
use crate::lock;
use crate::snapshot::At;
use crate::spi::{Plan, Spi};

pub struct Sequence {
    name: &'static CStr,
    last_value: Plan,
}

/// Tickets of pushes. Its CACHE is 1: a backend that had cached values would push with a ticket from before a reader's cut.
pub static TICKET: Sequence = Sequence {
    name: c"ticket",
    last_value: Plan::new(
        "SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM lockstep.ticket",
    ),
};

/// Tokens of leases, syncs and jobs, and incarnations. Each is drawn under the lock of its object, so those of one object grow
/// in the order in which they are handed out; that needs CACHE 1 as well.
pub static TOKEN: Sequence = Sequence {
    name: c"token",
    last_value: Plan::new(
        "SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM lockstep.token",
    ),
};

/// Ids of jobs: among jobs of one priority the least is claimed first.
pub static JOB_ID: Sequence = Sequence {
    name: c"job_id",
    last_value: Plan::new(
        "SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM lockstep.job_id",
    ),
};

/// Tokens and incarnations of one object grow. 55000 where they do not: the sequence was left behind, as a logical replication leaves
/// it, or was given a cache.
pub fn require_above(token: i64, previous: i64) -> Result<(), Error> {
    if token > previous {
        return Ok(());
    }
    Err(Error::TokenNotAbove { token, previous })
}

impl Sequence {
    /// Draws the next number.
    pub fn next(&self) -> i64 {
        // SAFETY: nextval_oid(regclass) never returns NULL; it checks the privileges of the current user.
        let value: Option<i64> =
            unsafe { pgrx::direct_function_call(pg_sys::nextval_oid, &[self.oid().into_datum()]) };
        value.unwrap_or_default()
    }

    /// The last number drawn by anyone, whether its transaction has ended or not.
    pub fn value(&self) -> i64 {
        // SAFETY: pg_sequence_last_value(regclass) returns NULL if nothing was drawn since the last reset.
        let value: Option<i64> = unsafe {
            pgrx::direct_function_call(pg_sys::pg_sequence_last_value, &[self.oid().into_datum()])
        };
        value.unwrap_or_else(|| {
            Spi::connect()
                .read(&self.last_value, At::Latest, &[])
                .get(0, 1)
                .unwrap_or_default()
        })
    }

    /// Sets the sequence to what `raised` makes of its value, if that is more. Waits, obeying lock_timeout, until no open
    /// transaction has drawn from it; none can until this transaction ends. The new value is on disk before COMMIT returns.
    pub fn raise(&self, raised: impl FnOnce(i64) -> i64) -> i64 {
        lock::lock_sequence(self.oid());
        self.raise_unlocked(raised)
    }

    /// The same without waiting: numbers drawn meanwhile by others may lie on either side.
    pub fn raise_unlocked(&self, raised: impl FnOnce(i64) -> i64) -> i64 {
        let value = self.value();
        let raised = raised(value);
        if raised > value {
            // SAFETY: setval_oid(regclass, bigint) never returns NULL.
            let _: Option<i64> = unsafe {
                pgrx::direct_function_call(
                    pg_sys::setval_oid,
                    &[self.oid().into_datum(), raised.into_datum()],
                )
            };
            crate::snapshot::force_synchronous_commit();
        }
        raised.max(value)
    }

    /// Looked up at each use: the extension may be dropped and created again within a session.
    fn oid(&self) -> pg_sys::Oid {
        catalog::relation(self.name)
    }
}
