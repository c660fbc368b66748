//! SQL from Rust: plans that a backend keeps, run inside an SPI connection that closes itself, reading and writing told apart.
//!
//! A plan is prepared at its first use and kept for the backend's life; PostgreSQL replans it when what it depends on changes.
//! It is always generic, and planned with sequential scans, bitmap scans, sorts and all joins but nested loops off: each statement
//! here walks an index in the index's own order and looks up few rows by few others. A plan made while the table was small must not
//! still scan it when it is large. Where a statement joins whole tables, [`Plan::joining`] leaves the choice to the planner.

use once_cell::sync::OnceCell;
use pgrx::callconv::{BoxRet, FcInfo};
use pgrx::datum::{Datum, DatumWithOid, FromDatum};
use pgrx::pg_sys;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, Returns, ReturnsError, SqlMapping, SqlTranslatable,
};
use std::collections::HashMap;
use std::ffi::{CString, c_char};
use std::marker::PhantomData;
use std::ptr::NonNull;

use crate::error::{Error, OrRaise};
use crate::guc::Settings;
use crate::position::Position;
use crate::schema;
use crate::snapshot::At;

/// An argument of a statement, with its type.
pub type Arg<'a> = DatumWithOid<'a>;

/// An open SPI connection.
pub struct Spi(());

impl Spi {
    /// Raises 55000 where the SQL objects are not those that the statements of this library are for.
    pub fn connect() -> Self {
        schema::check().or_raise();
        // SAFETY: called inside a transaction; paired with SPI_finish in drop.
        unsafe { pg_sys::SPI_connect() };
        Spi(())
    }

    /// Runs a SELECT. Assigns no transaction id.
    pub fn read(&self, plan: &Plan, at: At, args: &[Arg]) -> Rows<'_> {
        self.execute(plan.get(args), Some(at), true, args)
    }

    /// Runs a statement that writes; in READ COMMITTED with a snapshot taken now.
    pub fn write(&self, plan: &Plan, args: &[Arg]) -> Rows<'_> {
        self.execute(plan.get(args), None, false, args)
    }

    /// Runs a statement that writes or locks rows, with a snapshot taken now, in REPEATABLE READ and SERIALIZABLE too: for rows
    /// of which only the newest version means anything.
    pub fn write_latest(&self, plan: &Plan, args: &[Arg]) -> Rows<'_> {
        self.execute(plan.get(args), Some(At::Latest), false, args)
    }

    /// Checks now what deferred constraints and triggers would check at COMMIT, as the current user.
    pub fn check_constraints(&self) {
        // SAFETY: a command without parameters, inside a connection.
        let status =
            unsafe { pg_sys::SPI_execute(c"SET CONSTRAINTS ALL IMMEDIATE".as_ptr(), false, 0) };
        if status < 0 {
            Error::Spi("SPI_execute").raise();
        }
    }

    /// `at`: the snapshot; None for the transaction's.
    fn execute(&self, plan: Prepared, at: Option<At>, read_only: bool, args: &[Arg]) -> Rows<'_> {
        let mut values: Vec<pg_sys::Datum> = args
            .iter()
            .map(|arg| {
                arg.datum()
                    .map_or(pg_sys::Datum::null(), Datum::sans_lifetime)
            })
            .collect();
        let nulls: Vec<c_char> = args
            .iter()
            .map(|arg| if arg.datum().is_none() { b'n' } else { b' ' } as c_char)
            .collect();
        // SAFETY: values and nulls have one entry a parameter of the plan and outlive the call; SPI leaves the result in
        // SPI_tuptable until SPI_finish, which the lifetime of Rows ends before.
        unsafe {
            let status = pg_sys::SPI_execute_snapshot(
                plan.0.as_ptr(),
                values.as_mut_ptr(),
                nulls.as_ptr(),
                at.map_or(std::ptr::null_mut(), At::take),
                std::ptr::null_mut(),
                read_only,
                true,
                0,
            );
            if status < 0 {
                Error::Spi("SPI_execute_snapshot").raise();
            }
            Rows {
                table: NonNull::new(pg_sys::SPI_tuptable),
                processed: pg_sys::SPI_processed as usize,
                _connection: self,
            }
        }
    }
}

impl Drop for Spi {
    fn drop(&mut self) {
        // While an error unwinds, PostgreSQL's own abort closes the connection.
        if !std::thread::panicking() {
            // SAFETY: closes the connection that `connect` opened; connections nest as Rust scopes do.
            unsafe { pg_sys::SPI_finish() };
        }
    }
}

/// The result of one statement.
pub struct Rows<'spi> {
    table: Option<NonNull<pg_sys::SPITupleTable>>,
    processed: usize,
    _connection: &'spi Spi,
}

impl Rows<'_> {
    /// The number of rows returned, or changed.
    pub fn count(&self) -> usize {
        self.processed
    }

    /// Column `column` (from 1) of row `row` (from 0), copied; None for NULL and for a row that is not there.
    pub fn get<T: FromDatum>(&self, row: usize, column: usize) -> Option<T> {
        let (tuple, descriptor) = self.tuple(row)?;
        let mut is_null = false;
        // SAFETY: the tuple and its descriptor belong to the connection; T's datums are copied by FromDatum or by the
        // caller before the connection ends.
        unsafe {
            let datum = pg_sys::SPI_getbinval(tuple, descriptor, column as i32, &mut is_null);
            T::from_polymorphic_datum(datum, is_null, pg_sys::InvalidOid)
        }
    }

    /// A column that is a whole row, in memory that lives until the connection ends.
    fn composite(&self, row: usize, column: usize) -> Option<pg_sys::HeapTupleHeader> {
        let (tuple, descriptor) = self.tuple(row)?;
        let mut is_null = false;
        // SAFETY: the tuple and its descriptor belong to the connection; a composite datum is a varlena, detoasted a tuple's header.
        unsafe {
            let datum = pg_sys::SPI_getbinval(tuple, descriptor, column as i32, &mut is_null);
            (!is_null).then(|| pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast())
        }
    }

    fn tuple(&self, row: usize) -> Option<(pg_sys::HeapTuple, pg_sys::TupleDesc)> {
        let table = self.table.filter(|_| row < self.processed)?;
        // SAFETY: the table holds `processed` tuples.
        unsafe { Some((*(*table.as_ptr()).vals.add(row), (*table.as_ptr()).tupdesc)) }
    }
}

/// A statement with its text, prepared at first use.
pub struct Plan {
    sql: &'static str,
    by_index: bool,
    kept: OnceCell<Prepared>,
}

#[derive(Clone, Copy)]
struct Prepared(NonNull<pg_sys::_SPI_plan>);

// SAFETY: a backend has one thread that runs PostgreSQL code.
unsafe impl Send for Prepared {}
// SAFETY: as above.
unsafe impl Sync for Prepared {}

impl Plan {
    pub const fn new(sql: &'static str) -> Self {
        Plan {
            sql,
            by_index: true,
            kept: OnceCell::new(),
        }
    }

    /// For a statement over whole tables: planned for the arguments of each call, without constraints.
    pub const fn joining(sql: &'static str) -> Self {
        Plan {
            sql,
            by_index: false,
            kept: OnceCell::new(),
        }
    }

    /// The kept plan, ready to run; its parameters have the types of the arguments of the first call.
    fn get(&self, args: &[Arg]) -> Prepared {
        let plan = *self.kept.get_or_init(|| {
            let mut types: Vec<pg_sys::Oid> = args.iter().map(DatumWithOid::oid).collect();
            let options = if self.by_index {
                pg_sys::CURSOR_OPT_GENERIC_PLAN
            } else {
                pg_sys::CURSOR_OPT_CUSTOM_PLAN
            };
            let plan = prepare(self.sql, &mut types, options);
            // SAFETY: moves the plan to memory that lives as long as the backend.
            unsafe { pg_sys::SPI_keepplan(plan.0.as_ptr()) };
            plan
        });
        if self.by_index {
            plan.plan_by_index();
        }
        plan
    }
}

/// A prepared statement; it lives as long as the SPI connection.
fn prepare(sql: &str, types: &mut [pg_sys::Oid], options: u32) -> Prepared {
    let sql = CString::new(sql).unwrap_or_default();
    // SAFETY: an SPI connection is open; SPI_prepare raises what is wrong with the text.
    let plan = unsafe {
        pg_sys::SPI_prepare_cursor(
            sql.as_ptr(),
            types.len() as i32,
            types.as_mut_ptr(),
            options as i32,
        )
    };
    NonNull::new(plan).map_or_else(|| Error::Spi("SPI_prepare").raise(), Prepared)
}

impl Prepared {
    /// Makes the generic plan if there is none or it is out of date, with the settings that this module's head gives. They are
    /// not in force when it runs, so what triggers and functions plan then is planned as ever.
    fn plan_by_index(self) {
        // SAFETY: a kept plan has one source, whose generic plan, once made, lives until it is replaced. What other sessions
        // changed is learnt first, or the execution would learn it and plan by itself.
        unsafe {
            pg_sys::AcceptInvalidationMessages();
            let sources = pg_sys::SPI_plan_get_plan_sources(self.0.as_ptr());
            let source = (*(*sources).elements)
                .ptr_value
                .cast::<pg_sys::CachedPlanSource>();
            let plan = (*source).gplan;
            if (*source).is_valid && !plan.is_null() && (*plan).is_valid {
                return;
            }
            let _settings = Settings::set(&[
                (c"enable_seqscan", c"off"),
                (c"enable_bitmapscan", c"off"),
                (c"enable_sort", c"off"),
                (c"enable_hashjoin", c"off"),
                (c"enable_mergejoin", c"off"),
                (c"enable_material", c"off"),
                // What is off counts as so expensive that a statement of microseconds would be compiled for a second.
                (c"jit", c"off"),
            ]);
            let planned = pg_sys::SPI_plan_get_cached_plan(self.0.as_ptr());
            if !planned.is_null() {
                pg_sys::ReleaseCachedPlan(planned, pg_sys::CurrentResourceOwner);
            }
        }
    }
}

/// What a function that returns `SETOF lockstep.events` hands back: rows of a statement that selects the table's columns in
/// their order, moved into a tuplestore without being taken apart.
pub struct Events {
    table: Option<NonNull<pg_sys::SPITupleTable>>,
    count: usize,
    connection: Spi,
}

impl Events {
    pub fn none() -> Self {
        Events {
            table: None,
            count: 0,
            connection: Spi::connect(),
        }
    }

    /// The rows that the statement returns.
    pub fn read(connection: Spi, plan: &Plan, at: At, args: &[Arg]) -> Self {
        let rows = connection.read(plan, at, args);
        let (table, count) = (rows.table, rows.processed);
        Events {
            table,
            count,
            connection,
        }
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// Keeps the first `count` rows.
    pub fn truncate(&mut self, count: usize) {
        self.count = self.count.min(count);
    }

    /// The last event's position.
    pub fn last_position(&self) -> Option<Position> {
        self.position(self.count.checked_sub(1)?)
    }

    pub fn position(&self, row: usize) -> Option<Position> {
        self.rows().get(row, Self::POSITION)
    }

    /// One event as a `lockstep.events`, in the current memory context.
    pub fn event(&self, row: usize, types: &EventTypes) -> pg_sys::Datum {
        let tuple = self
            .rows()
            .tuple(row)
            .map_or(std::ptr::null_mut(), |(tuple, _)| tuple);
        assert!(!tuple.is_null(), "no row {row}");
        // SAFETY: the statement selected the columns of lockstep.events in their order, so its tuples are of the row type.
        unsafe { pg_sys::heap_copy_tuple_as_datum(tuple, types.descriptor) }
    }

    /// Some of the events as a `lockstep.events[]`, in the current memory context.
    pub fn array(&self, rows: std::ops::Range<usize>, types: &EventTypes) -> pg_sys::Datum {
        let mut events: Vec<pg_sys::Datum> = rows.map(|row| self.event(row, types)).collect();
        // SAFETY: composite datums of the element type; all composite types have this length, passing and alignment.
        unsafe {
            let array = pg_sys::construct_array(
                events.as_mut_ptr(),
                events.len() as i32,
                types.row,
                -1,
                false,
                pg_sys::TYPALIGN_DOUBLE as c_char,
            );
            pg_sys::Datum::from(array)
        }
    }

    /// The column `position` of lockstep.events.
    const POSITION: usize = 2;

    fn rows(&self) -> Rows<'_> {
        Rows {
            table: self.table,
            processed: self.count,
            _connection: &self.connection,
        }
    }
}

// SAFETY: fills the tuplestore of a materialize-mode set-returning function and returns NULL, as InitMaterializedSRF asks.
unsafe impl BoxRet for Events {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
        // SAFETY: fcinfo is that of a set-returning function; InitMaterializedSRF raises where the caller cannot take a set.
        unsafe {
            let raw = fcinfo.as_mut_ptr();
            pg_sys::InitMaterializedSRF(raw, pg_sys::MAT_SRF_USE_EXPECTED_DESC);
            let result = (*raw).resultinfo.cast::<pg_sys::ReturnSetInfo>();
            let rows = self.rows();
            for row in 0..self.count {
                if let Some((tuple, _)) = rows.tuple(row) {
                    pg_sys::tuplestore_puttuple((*result).setResult, tuple);
                }
            }
        }
        fcinfo.return_null()
    }
}

// SAFETY: the SQL type of what box_into returns.
unsafe impl SqlTranslatable for Events {
    fn argument_sql() -> Result<SqlMapping, ArgumentError> {
        Err(ArgumentError::NotValidAsArgument("Events"))
    }

    fn return_sql() -> Result<Returns, ReturnsError> {
        // pgrx takes only its own iterators for sets; the text is all it needs of this one.
        Ok(Returns::One(SqlMapping::literal("SETOF lockstep.events")))
    }
}

/// What a function that returns `SETOF lockstep.jobs` hands back: rows that statements have returned as they stand in the table,
/// moved into a tuplestore without being taken apart.
pub struct Jobs {
    /// With the id of each.
    jobs: Vec<(i64, pg_sys::HeapTupleHeader)>,
    connection: Spi,
}

impl Jobs {
    pub fn none() -> Self {
        Jobs {
            jobs: Vec::new(),
            connection: Spi::connect(),
        }
    }

    pub fn spi(&self) -> &Spi {
        &self.connection
    }

    pub fn count(&self) -> usize {
        self.jobs.len()
    }

    /// Adds a row, which lives until the connection ends.
    pub fn add(&mut self, job_id: i64, row: pg_sys::HeapTupleHeader) {
        self.jobs.push((job_id, row));
    }

    /// Puts them into the order of their ids in the list.
    pub fn sort_by_ids(&mut self, ids: &[i64]) {
        let place: HashMap<i64, usize> = ids.iter().copied().zip(0..).collect();
        self.jobs.sort_by_key(|(id, _)| place.get(id).copied());
    }

    /// Runs a statement that writes and returns, of rows of lockstep.jobs, the id and the whole row, and keeps those; their ids. A
    /// whole row is one column to the executor, and its columns many.
    pub fn write(&mut self, plan: &Plan, args: &[Arg]) -> Vec<i64> {
        let rows = self.connection.write_latest(plan, args);
        // They live until the connection ends.
        let jobs: Vec<(i64, pg_sys::HeapTupleHeader)> = (0..rows.count())
            .filter_map(|row| Some((rows.get(row, 1)?, rows.composite(row, 2)?)))
            .collect();
        let ids = jobs.iter().map(|(id, _)| *id).collect();
        self.jobs.extend(jobs);
        ids
    }
}

// SAFETY: fills the tuplestore of a materialize-mode set-returning function and returns NULL, as InitMaterializedSRF asks.
unsafe impl BoxRet for Jobs {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
        // SAFETY: fcinfo is that of a set-returning function; the rows are of its type and live until self is dropped.
        unsafe {
            let raw = fcinfo.as_mut_ptr();
            pg_sys::InitMaterializedSRF(raw, pg_sys::MAT_SRF_USE_EXPECTED_DESC);
            let result = (*raw).resultinfo.cast::<pg_sys::ReturnSetInfo>();
            for (_, job) in &self.jobs {
                let mut tuple = pg_sys::HeapTupleData {
                    t_len: pgrx::varsize(job.cast()) as u32,
                    t_data: *job,
                    ..Default::default()
                };
                pg_sys::tuplestore_puttuple((*result).setResult, &mut tuple);
            }
        }
        fcinfo.return_null()
    }
}

// SAFETY: the SQL type of what box_into returns.
unsafe impl SqlTranslatable for Jobs {
    fn argument_sql() -> Result<SqlMapping, ArgumentError> {
        Err(ArgumentError::NotValidAsArgument("Jobs"))
    }

    fn return_sql() -> Result<Returns, ReturnsError> {
        Ok(Returns::One(SqlMapping::literal("SETOF lockstep.jobs")))
    }
}

/// The types `lockstep.events` and `lockstep.events[]`.
pub struct EventTypes {
    pub row: pg_sys::Oid,
    pub array: pg_sys::Oid,
    descriptor: pg_sys::TupleDesc,
}

impl EventTypes {
    pub fn look_up() -> Self {
        // SAFETY: look-ups in the system and type caches; the descriptor is given back in drop.
        unsafe {
            let schema = pg_sys::get_namespace_oid(c"lockstep".as_ptr(), false);
            let table = pg_sys::get_relname_relid(c"events".as_ptr(), schema);
            let row = pg_sys::get_rel_type_id(table);
            EventTypes {
                row,
                array: pg_sys::get_array_type(row),
                descriptor: pg_sys::lookup_rowtype_tupdesc(row, -1),
            }
        }
    }
}

impl Drop for EventTypes {
    fn drop(&mut self) {
        // While an error unwinds, the resource owner gives it back.
        if !std::thread::panicking() {
            // SAFETY: the reference that lookup_rowtype_tupdesc took; a row type's descriptor is always counted.
            unsafe { pg_sys::DecrTupleDescRefCount(self.descriptor) };
        }
    }
}

/// The columns of a function that returns a TABLE.
pub trait Columns {
    /// As in RETURNS.
    const SQL: &'static str;
}

/// What such a function hands back, all rows at once: pgrx's own TableIterator is called once a row, and each call of a
/// SECURITY DEFINER function sets user and search_path again.
pub struct Table<C> {
    rows: Vec<Vec<Option<pg_sys::Datum>>>,
    columns: PhantomData<C>,
}

impl<C: Columns> Table<C> {
    /// The values of each row in the order of the columns, of their types.
    pub fn new(rows: Vec<Vec<Option<pg_sys::Datum>>>) -> Self {
        Table {
            rows,
            columns: PhantomData,
        }
    }
}

// SAFETY: fills the tuplestore of a materialize-mode set-returning function and returns NULL, as InitMaterializedSRF asks.
unsafe impl<C: Columns> BoxRet for Table<C> {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
        // SAFETY: fcinfo is that of a set-returning function; the rows have a value for each of its columns.
        unsafe {
            let raw = fcinfo.as_mut_ptr();
            pg_sys::InitMaterializedSRF(raw, pg_sys::MAT_SRF_USE_EXPECTED_DESC);
            let result = (*raw).resultinfo.cast::<pg_sys::ReturnSetInfo>();
            for row in self.rows {
                let mut values: Vec<pg_sys::Datum> = row
                    .iter()
                    .map(|value| value.unwrap_or(pg_sys::Datum::null()))
                    .collect();
                let mut nulls: Vec<bool> = row.iter().map(Option::is_none).collect();
                pg_sys::tuplestore_putvalues(
                    (*result).setResult,
                    (*result).setDesc,
                    values.as_mut_ptr(),
                    nulls.as_mut_ptr(),
                );
            }
        }
        fcinfo.return_null()
    }
}

// SAFETY: the SQL type of what box_into returns.
unsafe impl<C: Columns> SqlTranslatable for Table<C> {
    fn argument_sql() -> Result<SqlMapping, ArgumentError> {
        Err(ArgumentError::NotValidAsArgument("Table"))
    }

    fn return_sql() -> Result<Returns, ReturnsError> {
        Ok(Returns::One(SqlMapping::literal(C::SQL)))
    }
}
