//! Rows by an index, without a statement: a walk along one index of one of the extension's tables, which can lock where it stands.
//!
//! A statement starts an executor, with its nodes, expressions and memory. For a row or two that costs several times the look
//! itself, so what the hot paths only look at they look up here (and insert by [`crate::write`]). What joins or computes stays SQL.
//!
//! The locks are those of a statement: on the table and on the index, until the transaction's end. Nobody's rights are looked at:
//! the callers run as the extension's owner.

use pgrx::datum::{FromDatum, IntoDatum};
use pgrx::pg_sys;
use std::ffi::CStr;
use std::marker::PhantomData;

use crate::catalog;
use crate::position::Position;
use crate::snapshot::At;

/// A table and a snapshot, for any number of walks. Closed before the SPI connection that it was opened in.
pub struct Lookup {
    table: pg_sys::Relation,
    snapshot: pg_sys::Snapshot,
    index_lock: u32,
}

/// What a column of the index is compared with.
pub struct Key<'a> {
    column: i16,
    strategy: u32,
    collation: pg_sys::Oid,
    function: u32,
    value: pg_sys::Datum,
    _value: PhantomData<&'a ()>,
}

/// A type that keys have.
pub trait Value: IntoDatum {
    const EQUAL: u32;
    const ABOVE: u32;
    const BELOW: u32;
    const AT_MOST: u32;
    const COLLATION: pg_sys::Oid = pg_sys::InvalidOid;
}

impl Value for &str {
    const EQUAL: u32 = pg_sys::F_TEXTEQ;
    const ABOVE: u32 = pg_sys::F_TEXT_GT;
    const BELOW: u32 = pg_sys::F_TEXT_LT;
    const AT_MOST: u32 = pg_sys::F_TEXT_LE;
    const COLLATION: pg_sys::Oid = pg_sys::DEFAULT_COLLATION_OID;
}

impl Value for i64 {
    const EQUAL: u32 = pg_sys::F_INT8EQ;
    const ABOVE: u32 = pg_sys::F_INT8GT;
    const BELOW: u32 = pg_sys::F_INT8LT;
    const AT_MOST: u32 = pg_sys::F_INT8LE;
}

impl Value for bool {
    const EQUAL: u32 = pg_sys::F_BOOLEQ;
    const ABOVE: u32 = pg_sys::F_BOOLGT;
    const BELOW: u32 = pg_sys::F_BOOLLT;
    const AT_MOST: u32 = pg_sys::F_BOOLLE;
}

impl Value for pgrx::datum::TimestampWithTimeZone {
    const EQUAL: u32 = pg_sys::F_TIMESTAMPTZ_EQ;
    const ABOVE: u32 = pg_sys::F_TIMESTAMPTZ_GT;
    const BELOW: u32 = pg_sys::F_TIMESTAMPTZ_LT;
    const AT_MOST: u32 = pg_sys::F_TIMESTAMPTZ_LE;
}

impl Value for Position {
    const EQUAL: u32 = pg_sys::F_NUMERIC_EQ;
    const ABOVE: u32 = pg_sys::F_NUMERIC_GT;
    const BELOW: u32 = pg_sys::F_NUMERIC_LT;
    const AT_MOST: u32 = pg_sys::F_NUMERIC_LE;
}

impl<'a> Key<'a> {
    /// `column`: of the index, from 1.
    pub fn equal<T: Value + 'a>(column: i16, value: T) -> Self {
        Key::new(column, pg_sys::BTEqualStrategyNumber, T::EQUAL, value)
    }

    pub fn above<T: Value + 'a>(column: i16, value: T) -> Self {
        Key::new(column, pg_sys::BTGreaterStrategyNumber, T::ABOVE, value)
    }

    pub fn below<T: Value + 'a>(column: i16, value: T) -> Self {
        Key::new(column, pg_sys::BTLessStrategyNumber, T::BELOW, value)
    }

    pub fn at_most<T: Value + 'a>(column: i16, value: T) -> Self {
        Key::new(column, pg_sys::BTLessEqualStrategyNumber, T::AT_MOST, value)
    }

    fn new<T: Value + 'a>(column: i16, strategy: u32, function: u32, value: T) -> Self {
        Key {
            column,
            strategy,
            collation: T::COLLATION,
            function,
            // A text is copied into the current memory context, which outlives the walk.
            value: value.into_datum().unwrap_or(pg_sys::Datum::null()),
            _value: PhantomData,
        }
    }
}

impl Lookup {
    pub fn of(table: &'static CStr, at: At) -> Self {
        Lookup::open(table, at, pg_sys::AccessShareLock, pg_sys::AccessShareLock)
    }

    /// For walks that lock rows.
    pub fn to_lock(table: &'static CStr) -> Self {
        Lookup::open(
            table,
            At::Latest,
            pg_sys::RowShareLock,
            pg_sys::AccessShareLock,
        )
    }

    /// For walks before a write of the same table, with the locks of that: they need not be taken again then.
    pub fn to_write(table: &'static CStr, at: At) -> Self {
        Lookup::open(
            table,
            at,
            pg_sys::RowExclusiveLock,
            pg_sys::RowExclusiveLock,
        )
    }

    fn open(table: &'static CStr, at: At, lock: u32, index_lock: u32) -> Self {
        // SAFETY: a table of the extension; both are given back in drop, on an error by the resource owner.
        unsafe {
            Lookup {
                table: pg_sys::table_open(catalog::relation(table), lock as pg_sys::LOCKMODE),
                snapshot: pg_sys::RegisterSnapshot(at.take()),
                index_lock,
            }
        }
    }

    /// Another table, as the same snapshot shows it.
    pub fn with_table(&self, table: &'static CStr) -> Self {
        let lock = pg_sys::AccessShareLock;
        // SAFETY: as in `open`; a registered snapshot may be registered again.
        unsafe {
            Lookup {
                table: pg_sys::table_open(catalog::relation(table), lock as pg_sys::LOCKMODE),
                snapshot: pg_sys::RegisterSnapshot(self.snapshot),
                index_lock: lock,
            }
        }
    }

    /// The open table, unless it has triggers.
    pub fn table_without_triggers(&self) -> Option<pg_sys::Relation> {
        // SAFETY: an open table.
        let triggers = unsafe { (*self.table).trigdesc };
        triggers.is_null().then_some(self.table)
    }

    /// The rows that all keys let pass, in the order of the index.
    pub fn walk(&self, index: &'static CStr, keys: &[Key]) -> Walk<'_> {
        let mut walk = self.walk_to_seek(index, keys.len());
        walk.seek(keys);
        walk
    }

    /// A walk that begins when it is told where, with so many keys.
    pub fn walk_to_seek(&self, index: &'static CStr, keys: usize) -> Walk<'_> {
        // SAFETY: an index of the table, with keys of its columns' types; all is given back in drop, on an error by the resource
        // owner and the memory context.
        unsafe {
            let index = pg_sys::index_open(
                catalog::relation(index),
                self.index_lock as pg_sys::LOCKMODE,
            );
            Walk {
                lookup: self,
                index,
                scan: begin_scan(self.table, index, self.snapshot, keys as i32),
                slot: pg_sys::table_slot_create(self.table, std::ptr::null_mut()),
            }
        }
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: what `of` took; the table's lock is kept.
            unsafe {
                pg_sys::UnregisterSnapshot(self.snapshot);
                pg_sys::table_close(self.table, pg_sys::NoLock as pg_sys::LOCKMODE);
            }
        }
    }
}

/// # Safety
/// An open table, an index of it, a registered snapshot.
unsafe fn begin_scan(
    table: pg_sys::Relation,
    index: pg_sys::Relation,
    snapshot: pg_sys::Snapshot,
    keys: i32,
) -> pg_sys::IndexScanDesc {
    // SAFETY: as the caller promises; the fourth argument came with version 18.
    #[cfg(not(feature = "pg18"))]
    unsafe {
        pg_sys::index_beginscan(table, index, snapshot, keys, 0)
    }
    // SAFETY: as above.
    #[cfg(feature = "pg18")]
    unsafe {
        pg_sys::index_beginscan(table, index, snapshot, std::ptr::null_mut(), keys, 0)
    }
}

/// How a row is locked: as FOR UPDATE, FOR NO KEY UPDATE and FOR SHARE do.
#[derive(Clone, Copy)]
pub enum Strength {
    Update,
    NoKeyUpdate,
    Share,
}

impl Strength {
    fn as_pg(self) -> pg_sys::LockTupleMode::Type {
        match self {
            Strength::Update => pg_sys::LockTupleMode::LockTupleExclusive,
            Strength::NoKeyUpdate => pg_sys::LockTupleMode::LockTupleNoKeyExclusive,
            Strength::Share => pg_sys::LockTupleMode::LockTupleShare,
        }
    }
}

/// A walk along an index.
pub struct Walk<'lookup> {
    lookup: &'lookup Lookup,
    index: pg_sys::Relation,
    scan: pg_sys::IndexScanDesc,
    slot: *mut pg_sys::TupleTableSlot,
}

impl<'lookup> Walk<'lookup> {
    pub fn lookup(&self) -> &'lookup Lookup {
        self.lookup
    }

    /// Begins anew, with as many keys as before.
    pub fn seek(&mut self, keys: &[Key]) {
        let mut scan_keys = vec![pg_sys::ScanKeyData::default(); keys.len()];
        // SAFETY: keys of the types of the index's columns, which the scan copies; their values outlive it.
        unsafe {
            for (scan_key, key) in scan_keys.iter_mut().zip(keys) {
                pg_sys::ScanKeyEntryInitialize(
                    scan_key,
                    0,
                    key.column,
                    key.strategy as pg_sys::StrategyNumber,
                    pg_sys::InvalidOid,
                    key.collation,
                    pg_sys::Oid::from(key.function),
                    key.value,
                );
            }
            let count = keys.len() as i32;
            let none = std::ptr::null_mut();
            pg_sys::index_rescan(self.scan, scan_keys.as_mut_ptr(), count, none, 0);
        }
    }

    /// The next row.
    pub fn step(&mut self) -> Option<Row<'_>> {
        self.step_to(pg_sys::ScanDirection::ForwardScanDirection)
    }

    /// At the beginning the last row, then the one before.
    pub fn step_back(&mut self) -> Option<Row<'_>> {
        self.step_to(pg_sys::ScanDirection::BackwardScanDirection)
    }

    /// For who writes the row without a statement ([`crate::write`]).
    pub fn slot(&self) -> *mut pg_sys::TupleTableSlot {
        self.slot
    }

    fn step_to(&mut self, direction: pg_sys::ScanDirection::Type) -> Option<Row<'_>> {
        // SAFETY: an open scan and a slot for the table's rows.
        let found = unsafe { pg_sys::index_getnext_slot(self.scan, direction, self.slot) };
        found.then_some(Row {
            slot: self.slot,
            _walk: PhantomData,
        })
    }

    /// Locks the row of the last step, which there was. False: somebody else has it, or has changed it since the snapshot was taken.
    ///
    /// Never waits, as SKIP LOCKED does now and then: when the transaction that has the row ends just then, and another has its new
    /// version already, the executor waits for that one (heap_lock_updated_tuple knows no policy), and two sessions that skip each
    /// other's rows deadlock. So this follows no row to a newer version, and locks none that is not as it was seen.
    pub fn lock(&mut self, strength: Strength) -> bool {
        // SAFETY: the slot holds a row of the table. A call through the table's access method, like the executor's.
        unsafe {
            let mut tid = (*self.slot).tts_tid;
            let mut failure = pg_sys::TM_FailureData::default();
            let Some(tuple_lock) = (*(*self.lookup.table).rd_tableam).tuple_lock else {
                return false;
            };
            let command = pg_sys::GetCurrentCommandId(true);
            let result = pg_sys::ffi::pg_guard_ffi_boundary(|| {
                tuple_lock(
                    self.lookup.table,
                    &mut tid,
                    self.lookup.snapshot,
                    self.slot,
                    command,
                    strength.as_pg(),
                    pg_sys::LockWaitPolicy::LockWaitSkip,
                    0,
                    &mut failure,
                )
            });
            result == pg_sys::TM_Result::TM_Ok
        }
    }

    /// Locks the next row, if `read` gives something for it; that.
    pub fn lock_next<T>(
        &mut self,
        strength: Strength,
        read: impl FnOnce(&Row) -> Option<T>,
    ) -> Option<T> {
        let value = read(&self.step()?)?;
        self.lock(strength).then_some(value)
    }
}

impl Drop for Walk<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: what `walk` took; the index's lock is kept.
            unsafe {
                pg_sys::ExecDropSingleTupleTableSlot(self.slot);
                pg_sys::index_endscan(self.scan);
                pg_sys::index_close(self.index, pg_sys::NoLock as pg_sys::LOCKMODE);
            }
        }
    }
}

/// The row on which a walk stands.
pub struct Row<'walk> {
    slot: *mut pg_sys::TupleTableSlot,
    _walk: PhantomData<&'walk ()>,
}

impl Row<'_> {
    /// A column of the table (from 1), copied; None for NULL.
    pub fn get<T: FromDatum>(&self, column: i16) -> Option<T> {
        let (value, is_null) = self.datum(column);
        // SAFETY: the datum is of the slot's row, which FromDatum copies.
        unsafe { T::from_polymorphic_datum(value, is_null, pg_sys::InvalidOid) }
    }

    /// Whether a text column has this value.
    pub fn has(&self, column: i16, text: &str) -> bool {
        let (value, is_null) = self.datum(column);
        // SAFETY: borrowed from the slot's row for the comparison.
        let is: Option<&str> = unsafe { FromDatum::from_datum(value, is_null) };
        is == Some(text)
    }

    fn datum(&self, column: i16) -> (pg_sys::Datum, bool) {
        // SAFETY: the slot has a row; its arrays have an entry for each column once that was taken out of the row, which raises
        // for a column that the table does not have.
        unsafe {
            if (*self.slot).tts_nvalid < column {
                pg_sys::slot_getsomeattrs_int(self.slot, column.into());
            }
            let index = column as usize - 1;
            (
                *(*self.slot).tts_values.add(index),
                *(*self.slot).tts_isnull.add(index),
            )
        }
    }
}
