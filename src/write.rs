//! Rows inserted, changed and deleted without a statement, as a subscription's apply process does it: by the executor's own functions
//! for one row, which check constraints, maintain indexes and write WAL as any statement does, without its plan, nodes and expressions.
//!
//! For rows that a hot path writes as they are; what joins or computes stays SQL. Nobody's rights are looked at: the callers run as
//! the extension's owner. A table with triggers is written by statements, which alone fire all of them.

use pgrx::pg_sys;
use std::ffi::CStr;
use std::marker::PhantomData;

use crate::catalog;
use crate::lookup::{Lookup, Walk};

/// What the executor needs to write rows of an open table.
struct Target {
    state: *mut pg_sys::EState,
    target: *mut pg_sys::ResultRelInfo,
    slot: *mut pg_sys::TupleTableSlot,
}

impl Target {
    /// # Safety
    /// The table is open and locked for writing until this is dropped.
    unsafe fn of(table: pg_sys::Relation) -> Self {
        // SAFETY: as the caller promises; they are closed in drop, on an error by the resource owner.
        unsafe {
            let target = Target::without_indexes(table);
            pg_sys::ExecOpenIndices(target.target, false);
            target
        }
    }

    /// # Safety
    /// As `of`.
    unsafe fn without_indexes(table: pg_sys::Relation) -> Self {
        // SAFETY: what is made here is given back in drop, on an error by the resource owner and the memory context.
        unsafe {
            let state = pg_sys::CreateExecutorState();
            let target = pg_sys::MemoryContextAllocZero(
                (*state).es_query_cxt,
                size_of::<pg_sys::ResultRelInfo>(),
            );
            let target = target.cast::<pg_sys::ResultRelInfo>();
            (*target).type_ = pg_sys::NodeTag::T_ResultRelInfo;
            pg_sys::InitResultRelInfo(target, table, 0, std::ptr::null_mut(), 0);
            Target {
                state,
                target,
                slot: pg_sys::MakeSingleTupleTableSlot((*table).rd_att, &pg_sys::TTSOpsVirtual),
            }
        }
    }

    /// Frees what the executor made for the row before.
    fn forget_row(&mut self) {
        // SAFETY: null, or a context of the state's.
        unsafe {
            let row = (*self.state).es_per_tuple_exprcontext;
            if !row.is_null() {
                pg_sys::MemoryContextReset((*row).ecxt_per_tuple_memory);
            }
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: what `of` made. What comes after in the transaction sees the rows.
            unsafe {
                pg_sys::ExecDropSingleTupleTableSlot(self.slot);
                pg_sys::ExecCloseIndices(self.target);
                pg_sys::FreeExecutorState(self.state);
                pg_sys::CommandCounterIncrement();
            }
        }
    }
}

/// A table open for inserts.
pub struct Writer<const COLUMNS: usize> {
    target: Target,
    _table: Table,
}

struct Table(pg_sys::Relation);

impl Drop for Table {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: what `of` opened; the table's lock is kept.
            unsafe { pg_sys::table_close(self.0, pg_sys::NoLock as pg_sys::LOCKMODE) };
        }
    }
}

impl<const COLUMNS: usize> Writer<COLUMNS> {
    /// None if the table is not as this extension made it: with triggers, or with other columns, which a statement fills.
    pub fn of(table: &'static CStr) -> Option<Self> {
        // SAFETY: a table of the extension, locked as by INSERT.
        unsafe {
            let lock = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
            let table = Table(pg_sys::table_open(catalog::relation(table), lock));
            let has_our_columns = (*(*table.0).rd_att).natts as usize == COLUMNS;
            (has_our_columns && (*table.0).trigdesc.is_null()).then(|| Writer {
                target: Target::of(table.0),
                _table: table,
            })
        }
    }

    /// A row, its values in the order of the table's columns and of their types.
    pub fn insert(&mut self, values: [Option<pg_sys::Datum>; COLUMNS]) {
        self.target.forget_row();
        let slot = self.target.slot;
        // SAFETY: the slot has a place for each column.
        unsafe {
            pg_sys::ExecStoreAllNullTuple(slot);
            for (index, value) in values.into_iter().enumerate() {
                if let Some(value) = value {
                    *(*slot).tts_values.add(index) = value;
                    *(*slot).tts_isnull.add(index) = false;
                }
            }
            pg_sys::ExecSimpleRelationInsert(self.target.target, self.target.state, slot);
        }
    }
}

/// A column of a table (from 1) and its new value, of the column's type; None for NULL.
pub type Change = (i16, Option<pg_sys::Datum>);

/// A table, open in a look-up to write, whose rows are changed.
pub struct Updater<'lookup> {
    target: Target,
    _table: PhantomData<&'lookup Lookup>,
}

impl<'lookup> Updater<'lookup> {
    /// None if the table has triggers.
    pub fn of(table: &'lookup Lookup) -> Option<Self> {
        // SAFETY: the look-up keeps the table open, and has locked it for writing.
        unsafe {
            let table = table.table_without_triggers()?;
            Some(Updater {
                target: Target::of(table),
                _table: PhantomData,
            })
        }
    }

    /// Changes the row on which the walk stands, and which it has locked: so nobody has changed it since it was seen.
    pub fn change(&mut self, walk: &Walk, changes: &[Change]) {
        self.target.forget_row();
        let (old, new) = (walk.slot(), self.target.slot);
        // SAFETY: both slots have a place for each column of the table. The values that the new row shares with the old one stay while
        // the walk is borrowed, and are copied when the row is written.
        unsafe {
            let columns = (*(*new).tts_tupleDescriptor).natts as usize;
            if ((*old).tts_nvalid as usize) < columns {
                pg_sys::slot_getsomeattrs_int(old, columns as i32);
            }
            pg_sys::ExecStoreAllNullTuple(new);
            let (values, nulls) = ((*new).tts_values, (*new).tts_isnull);
            std::ptr::copy_nonoverlapping((*old).tts_values, values, columns);
            std::ptr::copy_nonoverlapping((*old).tts_isnull, nulls, columns);
            for (column, value) in changes {
                let index = *column as usize - 1;
                *values.add(index) = value.unwrap_or(pg_sys::Datum::null());
                *nulls.add(index) = value.is_none();
            }
            // What only BEFORE triggers use.
            let mut no_recheck = pg_sys::EPQState::default();
            let Target { state, target, .. } = self.target;
            pg_sys::ExecSimpleRelationUpdate(target, state, &mut no_recheck, old, new);
        }
    }

    /// As `change`; the row as it is then, in the current memory context.
    pub fn change_returning(&mut self, walk: &Walk, changes: &[Change]) -> pg_sys::HeapTupleHeader {
        self.change(walk, changes);
        // SAFETY: the slot has the row that was written; a composite datum points to a tuple's header.
        unsafe { pg_sys::ExecFetchSlotHeapTupleDatum(self.target.slot).cast_mut_ptr() }
    }
}

/// Deletes the row on which the walk, of a look-up to write, stands, and which it has locked. False: the table has triggers, and a
/// statement must do it.
#[must_use]
pub fn delete(walk: &Walk) -> bool {
    // SAFETY: as for `Updater`; a row's entries in indexes are left to VACUUM.
    unsafe {
        let Some(table) = walk.lookup().table_without_triggers() else {
            return false;
        };
        let of_table = Target::without_indexes(table);
        let mut no_recheck = pg_sys::EPQState::default();
        let Target { state, target, .. } = of_table;
        pg_sys::ExecSimpleRelationDelete(target, state, &mut no_recheck, walk.slot());
    }
    true
}
