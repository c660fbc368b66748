//! Rows inserted without a statement, as a subscription's apply process inserts them: by the executor's own function for one row,
//! which checks constraints, maintains indexes and writes WAL as any INSERT does, without its plan, nodes and expressions.
//!
//! For rows that a hot path inserts as they are; what joins or computes stays SQL. Nobody's rights are looked at: the callers run as
//! the extension's owner.

use pgrx::pg_sys;
use std::ffi::CStr;

use crate::catalog;

/// A table open for inserts. What comes after its drop in the transaction sees the rows.
pub struct Writer<const COLUMNS: usize> {
    table: pg_sys::Relation,
    state: *mut pg_sys::EState,
    target: *mut pg_sys::ResultRelInfo,
    slot: *mut pg_sys::TupleTableSlot,
}

impl<const COLUMNS: usize> Writer<COLUMNS> {
    /// None if the table is not as this extension made it: with triggers, which only a statement fires all of, or with other columns,
    /// which a statement fills.
    pub fn of(table: &'static CStr) -> Option<Self> {
        // SAFETY: a table of the extension, locked as by INSERT; what is made here is given back in drop, on an error by the
        // resource owner and the memory context.
        unsafe {
            let lock = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
            let table = pg_sys::table_open(catalog::relation(table), lock);
            let columns = (*table).rd_att;
            if !(*table).trigdesc.is_null() || (*columns).natts as usize != COLUMNS {
                pg_sys::table_close(table, pg_sys::NoLock as pg_sys::LOCKMODE);
                return None;
            }
            let state = pg_sys::CreateExecutorState();
            let target = pg_sys::MemoryContextAllocZero(
                (*state).es_query_cxt,
                size_of::<pg_sys::ResultRelInfo>(),
            );
            let target = target.cast::<pg_sys::ResultRelInfo>();
            (*target).type_ = pg_sys::NodeTag::T_ResultRelInfo;
            pg_sys::InitResultRelInfo(target, table, 0, std::ptr::null_mut(), 0);
            pg_sys::ExecOpenIndices(target, false);
            Some(Writer {
                table,
                state,
                target,
                slot: pg_sys::MakeSingleTupleTableSlot(columns, &pg_sys::TTSOpsVirtual),
            })
        }
    }

    /// A row, its values in the order of the table's columns and of their types.
    pub fn insert(&mut self, values: [Option<pg_sys::Datum>; COLUMNS]) {
        // SAFETY: the slot has a place for each column. What the executor made for the row before is freed.
        unsafe {
            let row = (*self.state).es_per_tuple_exprcontext;
            if !row.is_null() {
                pg_sys::MemoryContextReset((*row).ecxt_per_tuple_memory);
            }
            pg_sys::ExecStoreAllNullTuple(self.slot);
            for (index, value) in values.into_iter().enumerate() {
                if let Some(value) = value {
                    *(*self.slot).tts_values.add(index) = value;
                    *(*self.slot).tts_isnull.add(index) = false;
                }
            }
            pg_sys::ExecSimpleRelationInsert(self.target, self.state, self.slot);
        }
    }
}

impl<const COLUMNS: usize> Drop for Writer<COLUMNS> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: what `of` made; the table's lock is kept.
            unsafe {
                pg_sys::ExecDropSingleTupleTableSlot(self.slot);
                pg_sys::ExecCloseIndices(self.target);
                pg_sys::FreeExecutorState(self.state);
                pg_sys::table_close(self.table, pg_sys::NoLock as pg_sys::LOCKMODE);
                pg_sys::CommandCounterIncrement();
            }
        }
    }
}
