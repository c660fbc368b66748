//! A transaction of a background process, which has no client to end it.

use pgrx::pg_sys;
use pgrx::pg_sys::panic::CaughtError;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::subtransaction::Failure;

/// Runs `body` and commits; what it refuses with an Err is rolled back. An error of PostgreSQL's, in COMMIT too, is written to
/// the server's log, rolls the transaction back and is returned.
pub fn run<T, E>(body: impl FnOnce() -> Result<T, E>) -> Result<Result<T, E>, Failure> {
    let transaction = || {
        // SAFETY: begins and ends a transaction outside any other; the snapshot is the one that SPI needs.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
            let result = body();
            if result.is_ok() {
                pg_sys::PopActiveSnapshot();
                pg_sys::CommitTransactionCommand();
            } else {
                pg_sys::AbortCurrentTransaction();
            }
            result
        }
    };
    let panic = match catch_unwind(AssertUnwindSafe(transaction)) {
        Ok(result) => return Ok(result),
        Err(panic) => panic,
    };
    let is_error = matches!(panic.downcast_ref(), Some(CaughtError::PostgresError(_)));
    // SAFETY: the error is on PostgreSQL's error stack; the copy lives in the context of the process.
    unsafe {
        pg_sys::MemoryContextSwitchTo(pg_sys::TopMemoryContext);
        let failure = is_error.then(|| {
            let failure = Failure::of_current_error();
            pg_sys::EmitErrorReport();
            failure
        });
        pg_sys::FlushErrorState();
        pg_sys::AbortCurrentTransaction();
        match failure {
            Some(failure) => Err(failure),
            None => resume_unwind(panic),
        }
    }
}
