//! Calling a function that is not known when this is compiled, many times, as `SELECT function(argument)` would: with the rights of
//! the current user, a snapshot taken now, and its effects seen by the next call; but without a statement around each call.

use pgrx::{PgMemoryContexts, pg_sys};

use crate::rights::Procedure;

/// A function of one argument.
pub struct Call {
    function: pg_sys::FmgrInfo,
    /// What a call leaves is gone with the next one.
    memory: PgMemoryContexts,
}

impl Call {
    /// The caller has looked whether the current user may call it. It lives as long as the current memory context.
    pub fn of(function: Procedure) -> Self {
        let mut info = pg_sys::FmgrInfo::default();
        // SAFETY: raises for a function that is not there; what it keeps is allocated in the current memory context.
        unsafe { pg_sys::fmgr_info(function.0, &mut info) };
        Call {
            function: info,
            memory: PgMemoryContexts::new("lockstep call"),
        }
    }

    /// `argument` is made in memory that lasts as long as the call; what the function returns is dropped.
    pub fn call(&mut self, argument: impl FnOnce() -> pg_sys::Datum) {
        let function = &mut self.function;
        let call = || {
            let argument = argument();
            // SAFETY: one argument for a function of one; the snapshot is popped after it, on an error by PostgreSQL's abort.
            unsafe {
                pg_sys::CommandCounterIncrement();
                pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
                invoke(function, argument);
                pg_sys::PopActiveSnapshot();
            }
        };
        // SAFETY: nothing that is allocated in it is used after the call.
        unsafe {
            self.memory.switch_to(|_| call());
            self.memory.reset();
        }
        pgrx::check_for_interrupts!();
    }
}

/// # Safety
/// The argument is of the type that the function takes.
unsafe fn invoke(function: &mut pg_sys::FmgrInfo, argument: pg_sys::Datum) {
    #[repr(C)]
    struct OneArgument {
        call: pg_sys::FunctionCallInfoBaseData,
        argument: pg_sys::NullableDatum,
    }
    let mut call = OneArgument {
        call: pg_sys::FunctionCallInfoBaseData {
            flinfo: function,
            nargs: 1,
            ..Default::default()
        },
        argument: pg_sys::NullableDatum {
            value: argument,
            isnull: false,
        },
    };
    let mut usage = pg_sys::PgStat_FunctionCallUsage::default();
    // SAFETY: as InitFunctionCallInfoData lays it out, the arguments after the rest; track_functions counts the call as the executor
    // would.
    unsafe {
        let Some(address) = function.fn_addr else {
            return;
        };
        let call = (&raw mut call).cast::<pg_sys::FunctionCallInfoBaseData>();
        pg_sys::pgstat_init_function_usage(call, &mut usage);
        pg_sys::ffi::pg_guard_ffi_boundary(|| address(call));
        pg_sys::pgstat_end_function_usage(&mut usage, true);
    }
}
