//! Running something that may fail in a subtransaction of its own, and learning all that PostgreSQL knows of the failure.

use pgrx::pg_sys;
use pgrx::pg_sys::panic::CaughtError;
use std::ffi::CStr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// What an error said.
#[derive(Debug)]
pub struct Failure {
    pub sqlstate: Option<String>,
    pub message: String,
    pub context: Option<String>,
}

/// Runs `body` in a subtransaction. Its error rolls the subtransaction back and is returned; cancel, statement_timeout and
/// what ends the session are not caught.
pub fn run<T>(body: impl FnOnce() -> T) -> Result<T, Failure> {
    // SAFETY: as PL/pgSQL's exception blocks do it: the memory context and the resource owner of before are put back after
    // the subtransaction's end, and the error is copied out of the error stack before that is flushed.
    unsafe {
        let context = pg_sys::CurrentMemoryContext;
        let owner = pg_sys::CurrentResourceOwner;
        pg_sys::BeginInternalSubTransaction(std::ptr::null());
        pg_sys::MemoryContextSwitchTo(context);
        match catch_unwind(AssertUnwindSafe(body)) {
            Ok(value) => {
                pg_sys::ReleaseCurrentSubTransaction();
                pg_sys::MemoryContextSwitchTo(context);
                pg_sys::CurrentResourceOwner = owner;
                Ok(value)
            }
            Err(panic) => {
                if !matches!(panic.downcast_ref(), Some(CaughtError::PostgresError(_))) {
                    resume_unwind(panic);
                }
                pg_sys::MemoryContextSwitchTo(context);
                let error = pg_sys::CopyErrorData();
                if is_final((*error).sqlerrcode) {
                    pg_sys::FreeErrorData(error);
                    resume_unwind(panic);
                }
                let failure = Failure {
                    sqlstate: Some(unpack((*error).sqlerrcode)),
                    message: text((*error).message).unwrap_or_default(),
                    context: text((*error).context),
                };
                pg_sys::FreeErrorData(error);
                pg_sys::FlushErrorState();
                pg_sys::RollbackAndReleaseCurrentSubTransaction();
                pg_sys::MemoryContextSwitchTo(context);
                pg_sys::CurrentResourceOwner = owner;
                Err(failure)
            }
        }
    }
}

/// What PL/pgSQL's OTHERS does not catch either: query_canceled and assert_failure; and class 57P, which ends the session.
fn is_final(code: i32) -> bool {
    let sqlstate = unpack(code);
    sqlstate == "57014" || sqlstate == "P0004" || sqlstate.starts_with("57P")
}

fn unpack(code: i32) -> String {
    (0..5)
        .map(|place| char::from((((code >> (6 * place)) & 0x3F) as u8) + b'0'))
        .collect()
}

unsafe fn text(pointer: *const std::ffi::c_char) -> Option<String> {
    // SAFETY: null, or a NUL-terminated string of the error's copy.
    unsafe { (!pointer.is_null()).then(|| CStr::from_ptr(pointer).to_string_lossy().into_owned()) }
}
