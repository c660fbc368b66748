//! Positions in the log: the integer part is the push's ticket, the fraction the event's index within the push in steps of
//! 0.000001. One number orders the whole log, is the whole cursor and groups an atomic push.
//!
//! Invariant: a `Position` is at least 0, has at most six decimals and no trailing zeros, so equal positions print alike.

use pgrx::callconv::{BoxRet, FcInfo};
use pgrx::datum::{Datum, FromDatum, IntoDatum};
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, Returns, ReturnsError, SqlMapping, SqlTranslatable,
};
use pgrx::{AnyNumeric, pg_sys};
use rust_decimal::Decimal;
use std::fmt;

use crate::error::Error;

/// Decimals of a position, and so the number of events that one ticket can hold.
const SCALE: u32 = 6;
pub const MAX_EVENTS_PER_PUSH: usize = 1_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(Decimal);

impl Position {
    pub const ZERO: Position = Position(Decimal::ZERO);

    /// The position of the event with this index (from 0) in the push that drew the ticket.
    pub fn new(ticket: i64, index: usize) -> Self {
        debug_assert!(index < MAX_EVENTS_PER_PUSH);
        Position((Decimal::from(ticket) + Decimal::new(index as i64, SCALE)).normalize())
    }

    /// The greatest position that a push with this ticket can have.
    pub fn last_of(ticket: i64) -> Self {
        Position::new(ticket, MAX_EVENTS_PER_PUSH - 1)
    }

    /// The ticket of the push that it is of.
    pub fn ticket(self) -> i64 {
        i64::try_from(self.0.trunc().mantissa()).unwrap_or(i64::MAX)
    }

    /// The position in an argument. What no event could have is an error, never rounded.
    pub fn from_argument(name: &'static str, value: &AnyNumeric) -> Result<Self, Error> {
        let text = value.to_string();
        Decimal::from_str_exact(&text)
            .ok()
            .map(|decimal| decimal.normalize())
            .filter(|decimal| {
                *decimal >= Decimal::ZERO
                    && decimal.scale() <= SCALE
                    && decimal.trunc() <= Decimal::from(i64::MAX)
            })
            .map(Position)
            .ok_or_else(|| Error::InvalidParameter {
                message: format!("{name} {text} is not a position"),
                detail:
                    "A position is a number from 0 to 9223372036854775807.999999 with at most six decimals.".into(),
                hint: "Pass positions as decimals or as text, not as floats.",
            })
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromDatum for Position {
    unsafe fn from_polymorphic_datum(
        datum: pg_sys::Datum,
        is_null: bool,
        typoid: pg_sys::Oid,
    ) -> Option<Self> {
        // SAFETY: the caller vouches that the datum is a numeric.
        let value = unsafe { AnyNumeric::from_polymorphic_datum(datum, is_null, typoid) }?;
        let position = Position::from_argument("position", &value);
        Some(position.unwrap_or_else(|error| error.raise()))
    }
}

impl IntoDatum for Position {
    fn into_datum(self) -> Option<pg_sys::Datum> {
        match i64::try_from(self.0.mantissa()) {
            // SAFETY: PostgreSQL's own division by a power of ten; the result's display scale is that power, so a position
            // without trailing zeros stays so.
            Ok(mantissa) => Some(unsafe {
                pg_sys::Datum::from(pg_sys::int64_div_fast_to_numeric(
                    mantissa,
                    self.0.scale() as i32,
                ))
            }),
            Err(_) => AnyNumeric::try_from(self.0.to_string().as_str())
                .ok()?
                .into_datum(),
        }
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::NUMERICOID
    }
}

// SAFETY: returns the datum that into_datum made.
unsafe impl BoxRet for Position {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
        match self.into_datum() {
            // SAFETY: as above.
            Some(datum) => unsafe { fcinfo.return_raw_datum(datum) },
            None => fcinfo.return_null(),
        }
    }
}

// SAFETY: the SQL type of that datum.
unsafe impl SqlTranslatable for Position {
    fn argument_sql() -> Result<SqlMapping, ArgumentError> {
        Ok(SqlMapping::literal("numeric"))
    }

    fn return_sql() -> Result<Returns, ReturnsError> {
        Ok(Returns::One(SqlMapping::literal("numeric")))
    }
}
