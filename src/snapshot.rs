//! Snapshots and transaction states: which rows a statement sees, and what may run in which transaction.
//!
//! In READ COMMITTED a statement that began before a wait keeps the snapshot from before the wait. Everything in this
//! extension that reads after waiting for a lock therefore reads [`At::Latest`], never with the caller's snapshot.

use pgrx::pg_sys;

use crate::error::Error;

/// Which snapshot a reading statement uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// One taken now: after the locks that the caller holds and the waits that it has behind it.
    Latest,
    /// The one of the calling statement.
    Statement,
    /// In REPEATABLE READ and SERIALIZABLE the transaction's, and what the transaction itself has written up to now.
    Transaction,
}

impl At {
    /// The snapshot itself, valid until the next one is taken; SPI copies what it pushes.
    pub(crate) fn take(self) -> pg_sys::Snapshot {
        // SAFETY: functions run inside a statement, so a transaction and an active snapshot exist.
        unsafe {
            match self {
                At::Latest => pg_sys::GetLatestSnapshot(),
                At::Statement => pg_sys::GetActiveSnapshot(),
                At::Transaction => pg_sys::GetTransactionSnapshot(),
            }
        }
    }
}

/// REPEATABLE READ or SERIALIZABLE: later statements of the transaction see its first snapshot.
pub fn is_transaction_snapshot() -> bool {
    // SAFETY: a plain backend-local variable.
    unsafe { pg_sys::XactIsoLevel >= pg_sys::XACT_REPEATABLE_READ as i32 }
}

pub fn is_serializable() -> bool {
    // SAFETY: a plain backend-local variable.
    unsafe { pg_sys::XactIsoLevel == pg_sys::XACT_SERIALIZABLE as i32 }
}

pub fn require_read_committed(function: &'static str) -> Result<(), Error> {
    if is_transaction_snapshot() {
        return Err(Error::NeedsReadCommitted(function));
    }
    Ok(())
}

pub fn in_recovery() -> bool {
    // SAFETY: reads shared memory, no argument.
    unsafe { pg_sys::RecoveryInProgress() }
}

/// For what locks but does not write: a standby has no writer locks to look at.
pub fn require_primary(function: &'static str) -> Result<(), Error> {
    if in_recovery() {
        return Err(Error::ReadOnly {
            function,
            recovery: true,
        });
    }
    Ok(())
}

/// For what writes.
pub fn require_read_write(function: &'static str) -> Result<(), Error> {
    require_primary(function)?;
    // SAFETY: a plain backend-local variable.
    if unsafe { pg_sys::XactReadOnly } {
        return Err(Error::ReadOnly {
            function,
            recovery: false,
        });
    }
    Ok(())
}

/// Whether this transaction has written anything yet; what has not written has not pushed.
pub fn has_transaction_id() -> bool {
    // SAFETY: reads backend-local state.
    unsafe { pg_sys::GetTopTransactionIdIfAny() != pg_sys::InvalidTransactionId }
}

/// Makes this transaction's COMMIT wait for its WAL to reach the disk, whatever synchronous_commit says.
pub fn force_synchronous_commit() {
    // SAFETY: sets a backend-local flag of the running transaction.
    unsafe { pg_sys::ForceSyncCommit() }
}

/// The running subtransaction.
pub fn current_level() -> pg_sys::SubTransactionId {
    // SAFETY: reads backend-local state.
    unsafe { pg_sys::GetCurrentSubTransactionId() }
}
