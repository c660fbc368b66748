//! The settings. Those of the extension begin with `lockstep.`; each can be set without the library being preloaded.

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, pg_sys};
use std::ffi::{CStr, CString};

pub static MAX_AGGREGATES_PER_PUSH: GucSetting<i32> = GucSetting::<i32>::new(1000);
pub static CLAIM_SCAN_LIMIT: GucSetting<i32> = GucSetting::<i32>::new(100_000);

pub static MAX_PARALLEL_CLAIMS: GucSetting<i32> = GucSetting::<i32>::new(0);
pub static POLL_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(100);
pub static MAX_JOBS_IN_PROGRESS: GucSetting<i32> = GucSetting::<i32>::new(0);

static DATABASES: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
pub static WORKERS: GucSetting<i32> = GucSetting::<i32>::new(2);

/// The names in lockstep.databases, each once.
pub fn databases() -> Vec<String> {
    let list = DATABASES.get();
    let list = list.as_deref().unwrap_or(c"");
    let mut names: Vec<String> = Vec::new();
    // SAFETY: SplitGUCList cuts up a copy of the string; the list's cells point into that.
    unsafe {
        let mut parsed: *mut pg_sys::List = std::ptr::null_mut();
        let copy = pg_sys::pstrdup(list.as_ptr());
        if !pg_sys::SplitGUCList(copy, b',' as std::ffi::c_char, &mut parsed) {
            pgrx::warning!(
                "lockstep.databases is not a list of names: {}",
                list.to_string_lossy()
            );
        }
        let length = parsed.as_ref().map_or(0, |list| list.length as usize);
        for cell in 0..length {
            let name = CStr::from_ptr((*(*parsed).elements.add(cell)).ptr_value.cast());
            let name = name.to_string_lossy().into_owned();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        pg_sys::list_free(parsed);
        pg_sys::pfree(copy.cast());
    }
    names
}

pub fn register() {
    // A superuser's setting: each of them is a place in the lock table, which all sessions share.
    GucRegistry::define_int_guc(
        c"lockstep.max_aggregates_per_push",
        c"Limits the aggregates, unique keys and event ids in one push.",
        c"Each of them is a lock until the transaction ends; see max_locks_per_transaction.",
        &MAX_AGGREGATES_PER_PUSH,
        1,
        1_000_000,
        GucContext::Suset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"lockstep.claim_scan_limit",
        c"Limits the events that one projection_claim reads to find those that match the projection's filter.",
        c"A claim that reaches it moves the cursor and says that there is more.",
        &CLAIM_SCAN_LIMIT,
        1,
        i32::MAX,
        GucContext::Userset,
        GucFlags::default(),
    );
    // A superuser's setting: sessions that disagree about it would not count alike.
    GucRegistry::define_int_guc(
        c"lockstep.max_parallel_claims",
        c"Limits the transactions in the database that hold a claim.",
        c"0 means no limit.",
        &MAX_PARALLEL_CLAIMS,
        0,
        1000,
        GucContext::Suset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"lockstep.poll_interval",
        c"Sets the time between two looks of what waits for a state and is not woken.",
        c"",
        &POLL_INTERVAL,
        1,
        60_000,
        GucContext::Userset,
        GucFlags::UNIT_MS,
    );
    // A superuser's setting: as lockstep.max_parallel_claims.
    GucRegistry::define_int_guc(
        c"lockstep.max_jobs_in_progress",
        c"Limits the jobs in progress in each queue and tenant for which queue_configure has not said otherwise.",
        c"0 means no limit.",
        &MAX_JOBS_IN_PROGRESS,
        0,
        10_000,
        GucContext::Suset,
        GucFlags::default(),
    );
    GucRegistry::define_string_guc(
        c"lockstep.databases",
        c"Lists the databases in which workers run the projections that have a handler.",
        c"Names separated by commas. Takes effect only with lockstep in shared_preload_libraries.",
        &DATABASES,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"lockstep.workers",
        c"Limits the workers in each database of lockstep.databases.",
        c"Each of them, one launcher a database and one supervisor count toward max_worker_processes. 0 means none.",
        &WORKERS,
        0,
        crate::worker::MOST as i32,
        GucContext::Sighup,
        GucFlags::default(),
    );
}

/// As SET LOCAL.
pub fn set_local(name: &CStr, value: &CStr) {
    set(name, value, pg_sys::GucAction::GUC_ACTION_LOCAL);
}

fn set(name: &CStr, value: &CStr, action: pg_sys::GucAction::Type) {
    // SAFETY: inside a transaction; names and values are PostgreSQL's own.
    unsafe {
        pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            action,
            true,
            0,
            false,
        );
    }
}

/// The value of any setting, as current_setting(name, true) gives it to the current user.
pub fn custom(name: &str) -> Option<String> {
    let name = CString::new(name).ok()?;
    // SAFETY: returns null where there is no such setting, else a string that lives until the setting changes.
    unsafe {
        let value = pg_sys::GetConfigOptionByName(name.as_ptr(), std::ptr::null_mut(), true);
        (!value.is_null()).then(|| CStr::from_ptr(value).to_string_lossy().into_owned())
    }
}

/// Settings in force until dropped, as by a function's SET clause.
pub struct Settings(i32);

impl Settings {
    pub fn set(settings: &[(&CStr, &CStr)]) -> Self {
        // SAFETY: a nest level of settings, which drop ends.
        let level = unsafe { pg_sys::NewGUCNestLevel() };
        for (name, value) in settings {
            set(name, value, pg_sys::GucAction::GUC_ACTION_SAVE);
        }
        Settings(level)
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        // While an error unwinds, the transaction's or subtransaction's abort restores the settings.
        if !std::thread::panicking() {
            // SAFETY: ends the nest level that `set` began.
            unsafe { pg_sys::AtEOXact_GUC(true, self.0) };
        }
    }
}
