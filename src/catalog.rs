//! Look-ups in PostgreSQL's catalogs without SQL, inside a transaction.

use pgrx::pg_sys;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::CStr;

use crate::error::OrRaise;
use crate::schema;

thread_local! {
    /// By its name, each relation that was asked for, until PostgreSQL says that one of them has changed.
    static KNOWN: RefCell<HashMap<&'static CStr, pg_sys::Oid>> = RefCell::default();
    /// How often PostgreSQL has said that any relation has changed; None: it was not asked to yet.
    static CHANGES: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Whether this database has the extension, which then stays until the transaction ends. DROP EXTENSION takes this lock before
/// those of the tables: who took theirs without it would deadlock with the drop.
pub fn has_extension() -> bool {
    let extension = || {
        // SAFETY: a look-up in a catalog.
        unsafe { pg_sys::get_extension_oid(c"lockstep".as_ptr(), true) }
    };
    let found = extension();
    if found == pg_sys::InvalidOid {
        return false;
    }
    let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
    // SAFETY: an ordinary object lock until the transaction's end.
    unsafe { pg_sys::LockDatabaseObject(pg_sys::ExtensionRelationId, found, 0, lock) };
    extension() == found
}

/// A table, index or sequence of the extension. Raises if its schema is gone, and 55000 where the SQL objects are not those of this
/// library.
pub fn relation(name: &'static CStr) -> pg_sys::Oid {
    // It takes notice of what other sessions changed, so that what is known is true until the transaction locks the relation.
    schema::check().or_raise();
    if let Some(known) = KNOWN.with_borrow(|known| known.get(name).copied()) {
        return known;
    }
    follow_changes();
    let changes = CHANGES.get();
    // SAFETY: two look-ups in the system caches.
    let found = unsafe {
        let schema = pg_sys::get_namespace_oid(c"lockstep".as_ptr(), false);
        pg_sys::get_relname_relid(name.as_ptr(), schema)
    };
    if found != pg_sys::InvalidOid && changes == CHANGES.get() {
        KNOWN.with_borrow_mut(|known| known.insert(name, found));
    }
    found
}

fn follow_changes() {
    if CHANGES.get().is_none() {
        CHANGES.set(Some(0));
        // SAFETY: the callback lives as long as the backend, and is registered once.
        unsafe {
            pg_sys::CacheRegisterRelcacheCallback(Some(on_change), pg_sys::Datum::from(0));
        }
    }
}

/// PostgreSQL calls it for each relation that was changed or dropped, by this session or another; with InvalidOid for all of them.
unsafe extern "C-unwind" fn on_change(_: pg_sys::Datum, relation: pg_sys::Oid) {
    CHANGES.set(CHANGES.get().map(|changes| changes + 1));
    KNOWN.with_borrow_mut(|known| {
        if relation == pg_sys::InvalidOid || known.values().any(|oid| *oid == relation) {
            known.clear();
        }
    });
}

/// The names of the databases that can be connected to. A scan without an index: a process that is connected to no database may have none to use.
pub fn databases() -> Vec<String> {
    let mut names = Vec::new();
    // SAFETY: opens and closes the relation and the scan; GETSTRUCT of a pg_database tuple is a FormData_pg_database.
    unsafe {
        let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        let relation = pg_sys::table_open(pg_sys::DatabaseRelationId, lock);
        let null = std::ptr::null_mut;
        let scan = pg_sys::systable_beginscan(
            relation,
            pg_sys::InvalidOid,
            false,
            null(),
            0,
            std::ptr::null_mut(),
        );
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let database = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>();
            // An interrupted DROP DATABASE leaves the limit -2.
            if (*database).datallowconn && (*database).datconnlimit != -2 {
                let name = CStr::from_ptr((*database).datname.data.as_ptr());
                names.push(name.to_string_lossy().into_owned());
            }
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(relation, lock);
    }
    names
}
