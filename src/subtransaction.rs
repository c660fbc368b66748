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

/// Runs `body` in a subtransaction. Its error rolls the subtransaction back and is returned. A cancel, which is also how
/// statement_timeout ends, and a Rust panic roll it back too, and go on.
pub fn run<T>(body: impl FnOnce() -> T) -> Result<T, Failure> {
    let outer = Outer::begin();
    let panic = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(value) => {
            outer.release();
            return Ok(value);
        }
        Err(panic) => panic,
    };
    if !matches!(panic.downcast_ref(), Some(CaughtError::PostgresError(_))) {
        outer.roll_back();
        resume_unwind(panic);
    }
    // SAFETY: the error is on PostgreSQL's error stack. It is copied into the outer memory context before the stack is
    // flushed and the subtransaction rolled back, as PL/pgSQL's exception blocks do it.
    unsafe {
        pg_sys::MemoryContextSwitchTo(outer.context);
        let error = pg_sys::CopyErrorData();
        pg_sys::FlushErrorState();
        outer.roll_back();
        let failure = Failure::of(error);
        if failure.is_cancel() {
            pg_sys::ReThrowError(error);
        }
        pg_sys::FreeErrorData(error);
        Err(failure)
    }
}

impl Failure {
    /// # Safety
    /// `error` is a copy of an error's data.
    unsafe fn of(error: *const pg_sys::ErrorData) -> Self {
        // SAFETY: its texts are null or NUL-terminated.
        unsafe {
            Failure {
                sqlstate: Some(unpack((*error).sqlerrcode)),
                message: text((*error).message).unwrap_or_default(),
                context: text((*error).context),
            }
        }
    }

    /// # Safety
    /// An error is on PostgreSQL's error stack, and the current memory context is not its own.
    pub unsafe fn of_current_error() -> Self {
        // SAFETY: the copy is freed after the texts are copied once more.
        unsafe {
            let error = pg_sys::CopyErrorData();
            let failure = Failure::of(error);
            pg_sys::FreeErrorData(error);
            failure
        }
    }

    /// A cancel is not the event's fault, and not to be held up.
    pub fn is_cancel(&self) -> bool {
        self.sqlstate.as_deref() == Some("57014")
    }
}

/// What was current outside the subtransaction, and is again after it.
#[derive(Clone, Copy)]
struct Outer {
    context: pg_sys::MemoryContext,
    owner: pg_sys::ResourceOwner,
}

impl Outer {
    fn begin() -> Self {
        // SAFETY: BeginInternalSubTransaction switches both, and each end of it is followed by `restore`.
        unsafe {
            let outer = Outer {
                context: pg_sys::CurrentMemoryContext,
                owner: pg_sys::CurrentResourceOwner,
            };
            pg_sys::BeginInternalSubTransaction(std::ptr::null());
            pg_sys::MemoryContextSwitchTo(outer.context);
            outer
        }
    }

    fn release(self) {
        // SAFETY: the subtransaction that `begin` began is the current one.
        unsafe { pg_sys::ReleaseCurrentSubTransaction() };
        self.restore();
    }

    fn roll_back(self) {
        // SAFETY: what `body` began inside was ended by its error's way here; the current subtransaction is `begin`'s.
        unsafe { pg_sys::RollbackAndReleaseCurrentSubTransaction() };
        self.restore();
    }

    fn restore(self) {
        // SAFETY: both outlive the subtransaction.
        unsafe {
            pg_sys::MemoryContextSwitchTo(self.context);
            pg_sys::CurrentResourceOwner = self.owner;
        }
    }
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
