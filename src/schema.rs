//! Which SQL objects this library works with.
//!
//! The library is a file of the server's; the SQL objects are in each database, and change when somebody runs ALTER EXTENSION
//! UPDATE there. Between the two steps of an upgrade a session has a library and objects that were not made for each other.
//!
//! Invariant: no statement of this library runs on objects whose version it does not know ([`WORKS_WITH`]); it is refused with
//! 55000 and what to do. [`crate::spi::Spi::connect`] and [`crate::catalog::relation`] ask, one of which everything does that reads,
//! writes or locks a table.
//!
//! The objects' version is the number in the body of `lockstep.schema_version()`. It is looked up in the system caches without
//! being run, and then taken as known until PostgreSQL says that this function has changed: an upgrade that another session
//! commits is seen by the next call, in the same transaction too, and a call pays for a look at two flags.

use pgrx::pg_sys;
use std::ffi::CStr;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use crate::error::Error;

/// The versions of the SQL objects on which every statement here does what it promises. The last is that of `sql/schema.sql`.
const WORKS_WITH: RangeInclusive<i32> = 1..=1;

/// The function was seen, and has a version that is known. A refusal is not kept.
static IS_KNOWN: AtomicBool = AtomicBool::new(false);
/// By which PostgreSQL names the function when it changes.
static HASH: AtomicU32 = AtomicU32::new(0);
static IS_REGISTERED: AtomicBool = AtomicBool::new(false);

/// Whether this library works with the SQL objects in this database.
pub fn check() -> Result<(), Error> {
    // SAFETY: inside a transaction. In one that is open for long nothing else may have taken notice of what others committed.
    unsafe { pg_sys::AcceptInvalidationMessages() };
    if IS_KNOWN.load(Relaxed) {
        return Ok(());
    }
    // Where there is no such function there is no extension: the statement itself will say what it misses.
    let Some((function, version)) = look_up() else {
        return Ok(());
    };
    if !WORKS_WITH.contains(&version) {
        return Err(Error::SchemaVersion {
            actual: version,
            expected: WORKS_WITH,
        });
    }
    follow(function);
    Ok(())
}

/// The function and the number in its body; 0 for one that is no number.
fn look_up() -> Option<(pg_sys::Oid, i32)> {
    // SAFETY: look-ups in the system caches, inside a transaction. GETSTRUCT of a pg_proc tuple is a FormData_pg_proc; prosrc is
    // never null, and its copy is of the current memory context.
    unsafe {
        let schema = pg_sys::get_namespace_oid(c"lockstep".as_ptr(), true);
        let no_arguments = pg_sys::buildoidvector(std::ptr::null(), 0);
        let cache = pg_sys::SysCacheIdentifier::PROCNAMEARGSNSP as i32;
        let tuple = pg_sys::SearchSysCache3(
            cache,
            pg_sys::Datum::from(c"schema_version".as_ptr()),
            pg_sys::Datum::from(no_arguments),
            pg_sys::Datum::from(schema),
        );
        if tuple.is_null() {
            return None;
        }
        let function = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_proc>()).oid;
        let mut is_null = false;
        let attribute = pg_sys::Anum_pg_proc_prosrc as pg_sys::AttrNumber;
        let body = pg_sys::SysCacheGetAttr(cache, tuple, attribute, &mut is_null);
        let body = pg_sys::text_to_cstring(body.cast_mut_ptr());
        pg_sys::ReleaseSysCache(tuple);
        let body = CStr::from_ptr(body).to_string_lossy();
        let number = body.trim().strip_prefix("SELECT ");
        let version = number.and_then(|number| number.parse().ok());
        Some((function, version.unwrap_or_default()))
    }
}

/// Takes the function's version as known until it changes.
fn follow(function: pg_sys::Oid) {
    let cache = pg_sys::SysCacheIdentifier::PROCOID as i32;
    let none = pg_sys::Datum::from(0);
    // SAFETY: the callback lives as long as the backend, and is registered once.
    unsafe {
        if !IS_REGISTERED.swap(true, Relaxed) {
            pg_sys::CacheRegisterSyscacheCallback(cache, Some(on_change), none);
        }
        let key = pg_sys::Datum::from(function);
        let hash = pg_sys::GetSysCacheHashValue(cache, key, none, none, none);
        HASH.store(hash, Relaxed);
    }
    IS_KNOWN.store(true, Relaxed);
}

/// PostgreSQL calls it for every function that was changed or dropped, by this session or another; with 0 for all of them.
unsafe extern "C-unwind" fn on_change(_: pg_sys::Datum, _cache: i32, hash: u32) {
    if hash == 0 || hash == HASH.load(Relaxed) {
        IS_KNOWN.store(false, Relaxed);
    }
}
