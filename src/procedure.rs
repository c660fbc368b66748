//! Procedures that commit: each look in a transaction of its own, and a wait between two looks that holds no snapshot.
//!
//! PostgreSQL lets a procedure commit when it is called outside of a transaction block, and it, and what called it, is neither
//! SECURITY DEFINER nor has a SET clause. After the commit a new transaction has begun, which has neither an id nor a snapshot
//! until something needs one: a session that waits there holds back no vacuum and no replication slot.

use pgrx::callconv::{BoxRet, FcInfo};
use pgrx::datum::Datum;
use pgrx::pg_sys;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, Returns, ReturnsError, SqlMapping, SqlTranslatable,
};

use crate::error::Error;

/// 2D000 where the procedure cannot commit: in a transaction block, or called from a function.
pub fn require_own_transaction(
    procedure: &'static str,
    call: pg_sys::FunctionCallInfo,
) -> Result<(), Error> {
    // SAFETY: the call that PostgreSQL made; a procedure's context, if there is one, is a CallContext.
    let atomic = unsafe {
        let context = (*call).context;
        context.is_null()
            || (*context).type_ != pg_sys::NodeTag::T_CallContext
            || (*context.cast::<pg_sys::CallContext>()).atomic
            || pg_sys::IsSubTransaction()
    };
    if atomic {
        return Err(Error::NeedsOwnTransaction(procedure));
    }
    Ok(())
}

/// Runs `body` in the current transaction and commits it; for use after `require_own_transaction`.
pub fn committed<T>(body: impl FnOnce() -> T) -> T {
    committed_if(|| (body(), true))
}

/// Runs `body` in the current transaction and commits it, or rolls it back if `body` says so; for use after
/// `require_own_transaction`.
pub fn committed_if<T>(body: impl FnOnce() -> (T, bool)) -> T {
    // SAFETY: connections nest as Rust scopes do. While an error unwinds, PostgreSQL's own abort closes the connection.
    unsafe {
        pg_sys::SPI_connect_ext(pg_sys::SPI_OPT_NONATOMIC as i32);
        let (result, stays) = body();
        if stays {
            pg_sys::SPI_commit();
        } else {
            pg_sys::SPI_rollback();
        }
        pg_sys::SPI_finish();
        result
    }
}

/// The values of a procedure's INOUT parameters, in their order and of their types.
pub struct Outcome(pub Vec<Option<pg_sys::Datum>>);

// SAFETY: returns a record of the procedure's INOUT parameters, as PostgreSQL asks of a procedure that has any.
unsafe impl BoxRet for Outcome {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
        let mut values: Vec<pg_sys::Datum> = self
            .0
            .iter()
            .map(|value| value.unwrap_or(pg_sys::Datum::null()))
            .collect();
        let mut nulls: Vec<bool> = self.0.iter().map(Option::is_none).collect();
        // SAFETY: fcinfo is that of a procedure with as many INOUT parameters as there are values.
        unsafe {
            let mut descriptor: pg_sys::TupleDesc = std::ptr::null_mut();
            pg_sys::get_call_result_type(
                fcinfo.as_mut_ptr(),
                std::ptr::null_mut(),
                &mut descriptor,
            );
            let descriptor = pg_sys::BlessTupleDesc(descriptor);
            let tuple =
                pg_sys::heap_form_tuple(descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
            fcinfo.return_raw_datum(pg_sys::HeapTupleHeaderGetDatum((*tuple).t_data))
        }
    }
}

// SAFETY: the SQL type of what box_into returns; the procedure's own SQL spells its parameters out.
unsafe impl SqlTranslatable for Outcome {
    fn argument_sql() -> Result<SqlMapping, ArgumentError> {
        Err(ArgumentError::NotValidAsArgument("Outcome"))
    }

    fn return_sql() -> Result<Returns, ReturnsError> {
        Ok(Returns::One(SqlMapping::literal("record")))
    }
}
