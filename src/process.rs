//! What a background process of the extension needs of PostgreSQL: signals, its database, its latch, and how it shows itself
//! in `pg_stat_activity`. With `wakeup.rs` the only unsafe code about processes.

use pgrx::pg_sys;
use std::ffi::{CStr, CString};
use std::time::Duration;

/// Where a process sleeps, as `pg_stat_activity.wait_event` names it from PostgreSQL 17 on; before that it is `Extension`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct WaitEvent(pub &'static CStr);

impl WaitEvent {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    fn number(self) -> u32 {
        pg_sys::PG_WAIT_EXTENSION
    }

    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    fn number(self) -> u32 {
        thread_local! {
            static KNOWN: std::cell::RefCell<Vec<(WaitEvent, u32)>> = const { std::cell::RefCell::new(Vec::new()) };
        }
        let known =
            KNOWN.with_borrow(|known| known.iter().find(|(name, _)| *name == self).copied());
        if let Some((_, number)) = known {
            return number;
        }
        // SAFETY: registers the name, or finds it registered.
        let number = unsafe { pg_sys::WaitEventExtensionNew(self.0.as_ptr()) };
        KNOWN.with_borrow_mut(|known| known.push((self, number)));
        number
    }
}

/// Sleeps until the process's latch is set or the time is over (None: for ever), and then handles interrupts. A postmaster that
/// dies ends the process.
pub fn sleep(time: Option<Duration>, event: WaitEvent) {
    wait(time, event);
    pgrx::check_for_interrupts!();
}

/// As [`sleep`], in a background process that has nothing to do: there is nothing to cancel.
pub fn idle(time: Option<Duration>, event: WaitEvent) {
    wait(time, event);
    ignore_cancel();
    pgrx::check_for_interrupts!();
}

/// Forgets a cancel that came when there was nothing to cancel, as other backends do between statements.
pub fn ignore_cancel() {
    // SAFETY: a flag that the signal handler sets.
    unsafe { (&raw mut pg_sys::QueryCancelPending).write_volatile(0) };
}

fn wait(time: Option<Duration>, event: WaitEvent) {
    let timeout = time.map(|_| pg_sys::WL_TIMEOUT).unwrap_or_default();
    let milliseconds = time.map_or(-1, |time| time.as_millis().max(1) as i64);
    // SAFETY: the process's own latch.
    unsafe {
        pg_sys::WaitLatch(
            pg_sys::MyLatch,
            (pg_sys::WL_LATCH_SET | pg_sys::WL_EXIT_ON_PM_DEATH | timeout) as i32,
            milliseconds,
            event.number(),
        );
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
}

/// The process's place in PostgreSQL's table of them; another process can have it after this one has ended.
pub fn number() -> usize {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    // SAFETY: set in every process with access to shared memory.
    return unsafe { (*pg_sys::MyProc).pgprocno as usize };
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    // SAFETY: as above.
    return unsafe { pg_sys::MyProcNumber as usize };
}

pub fn pid() -> i32 {
    // SAFETY: a plain process-local variable.
    unsafe { pg_sys::MyProcPid }
}

/// The clock of `clock_timestamp()`, in PostgreSQL's microseconds.
pub fn now() -> i64 {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

pub fn database() -> pg_sys::Oid {
    // SAFETY: a plain process-local variable.
    unsafe { pg_sys::MyDatabaseId }
}

/// Sets the latch of the process that has the number now. For one that ended meanwhile it wakes another for nothing.
pub fn wake(number: usize) {
    // SAFETY: the table lives as long as shared memory; numbers come from `number`.
    unsafe {
        let process = (*pg_sys::ProcGlobal).allProcs.add(number);
        pg_sys::SetLatch(&raw mut (*process).procLatch);
    }
}

unsafe extern "C-unwind" {
    // As they are: pgrx's bindings wrap what they call, which a signal handler must not be.
    fn SignalHandlerForConfigReload(signal: i32);
    fn die(signal: i32);
}

/// Takes the signals as other backends do: SIGTERM ends the process at its next interrupt check, SIGHUP reloads the settings.
pub fn begin() {
    // SAFETY: called first in a background process; the handlers are PostgreSQL's own.
    unsafe {
        on_signal(pg_sys::SIGHUP as i32, SignalHandlerForConfigReload);
        on_signal(pg_sys::SIGTERM as i32, die);
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

unsafe fn on_signal(signal: i32, handler: unsafe extern "C-unwind" fn(i32)) {
    // SAFETY: the caller's handler is safe in a signal.
    #[cfg(feature = "pg18")]
    unsafe {
        pg_sys::pqsignal_be(signal, Some(handler));
    }
    // SAFETY: as above.
    #[cfg(not(feature = "pg18"))]
    unsafe {
        pg_sys::pqsignal(signal, Some(handler));
    }
}

/// Reads the configuration files again after pg_reload_conf().
pub fn follow_settings() {
    // SAFETY: the flag that the signal handler sets, and what every backend does about it.
    unsafe {
        if (&raw const pg_sys::ConfigReloadPending).read_volatile() != 0 {
            (&raw mut pg_sys::ConfigReloadPending).write_volatile(0);
            pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        }
    }
}

/// Connects to no database: only the catalogs that all share can be read.
pub fn connect_to_none() {
    // SAFETY: once in a process's life, after `begin`.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0);
    }
}

/// Connects as the superuser that initdb made. FATAL if there is no such database.
pub fn connect_as_superuser(database: &str) {
    let Ok(database) = CString::new(database) else {
        return;
    };
    // SAFETY: once in a process's life, after `begin`.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnection(database.as_ptr(), std::ptr::null(), 0);
    }
}

/// Connects as the role, who need not be allowed to log in where PostgreSQL can be told so (from 17 on). FATAL if the role may
/// not connect to the database.
pub fn connect_as(database: pg_sys::Oid, role: pg_sys::Oid) {
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    let flags = 0;
    #[cfg(not(any(feature = "pg15", feature = "pg16")))]
    let flags = pg_sys::BGWORKER_BYPASS_ROLELOGINCHECK;
    // SAFETY: once in a process's life, after `begin`.
    unsafe { pg_sys::BackgroundWorkerInitializeConnectionByOid(database, role, flags) };
}

/// Whether [`connect_as`] can be any role, or only one that may log in.
pub const CONNECTS_AS_ANY_ROLE: bool = cfg!(not(any(feature = "pg15", feature = "pg16")));

/// Puts a setting in force for this process, above what its role and database say.
pub fn set(name: &CStr, value: &CStr) {
    // SAFETY: PostgreSQL's own settings and values.
    unsafe {
        pg_sys::SetConfigOption(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_OVERRIDE,
        );
    }
}

pub fn set_application_name(name: &str) {
    if let Ok(name) = CString::new(name) {
        set(c"application_name", &name);
    }
}

/// Shows what the process does, or, with None, that it does nothing.
pub fn report(activity: Option<&str>) {
    let text = activity.and_then(|activity| CString::new(activity).ok());
    let state = match text {
        Some(_) => pg_sys::BackendState::STATE_RUNNING,
        None => pg_sys::BackendState::STATE_IDLE,
    };
    // SAFETY: copies the text.
    unsafe {
        pg_sys::pgstat_report_activity(
            state,
            text.as_ref().map_or(std::ptr::null(), |t| t.as_ptr()),
        );
    }
}

/// Hands the counts of rows read and written to the statistics that autovacuum goes by: at once, or as often as other
/// backends do.
pub fn report_statistics(at_once: bool) {
    // SAFETY: outside a transaction.
    unsafe { pg_sys::pgstat_report_stat(at_once) };
}

/// Undoes what a handler may have left in the session: settings, a role, advisory locks. Outside a transaction; temporary tables
/// are [`drop_temporary_tables`]'s.
pub fn reset_session() {
    // SAFETY: what DISCARD ALL does of this. "none" and the session's own user need no look-up.
    unsafe {
        pg_sys::SetConfigOption(
            c"role".as_ptr(),
            c"none".as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
        );
        pg_sys::ResetAllOptions();
        pg_sys::LockReleaseAll(pg_sys::USER_LOCKMETHOD as pg_sys::LOCKMETHODID, true);
    }
}

/// Drops the temporary tables that this transaction has made or used: another projection's handler must not find them.
pub fn drop_temporary_tables() {
    // SAFETY: inside a transaction. It is what DISCARD TEMP does.
    unsafe {
        if pg_sys::MyXactFlags & pg_sys::XACT_FLAGS_ACCESSEDTEMPNAMESPACE as i32 != 0 {
            pg_sys::ResetTempTableNamespace();
        }
    }
}

type AtExit = unsafe extern "C-unwind" fn(i32, pg_sys::Datum);

/// Has `callback` called with `argument` when the process ends in any way but a crash.
pub fn at_exit(callback: AtExit, argument: usize) {
    // SAFETY: the callback stays for the process's life.
    unsafe { pg_sys::before_shmem_exit(Some(callback), pg_sys::Datum::from(argument)) };
}

/// Whether pg_upgrade has started the server: nothing of ours must run then.
pub fn is_in_upgrade() -> bool {
    // SAFETY: a plain process-local variable.
    unsafe { pg_sys::IsBinaryUpgrade }
}

/// Whether the postmaster is loading the library: only then can there be shared memory.
pub fn is_preloading() -> bool {
    // SAFETY: a plain process-local variable.
    unsafe { pg_sys::process_shared_preload_libraries_in_progress }
}
