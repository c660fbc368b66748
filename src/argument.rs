//! What every function checks of its arguments before it locks anything.

use pgrx::AnyNumeric;
use pgrx::datum::Interval;
use std::time::Duration;

use crate::error::Error;
use crate::position::Position;

/// The longest name in bytes: three of them and a number fit into one entry of a B-tree index (2704 bytes).
pub const MAX_NAME_BYTES: usize = 800;

const DAY: i128 = 24 * 60 * 60 * 1_000_000;

/// The value of an argument for which NULL has no meaning.
pub fn required<T>(argument: &'static str, value: Option<T>) -> Result<T, Error> {
    value.ok_or(Error::NullArgument(argument))
}

/// A tenant; the empty one is that of those who need none.
pub fn tenant(value: Option<&str>) -> Result<&str, Error> {
    let value = required("tenant", value)?;
    within_limit("tenant", value)?;
    Ok(value)
}

/// A name that must be there and not be empty.
pub fn name<'a>(argument: &'static str, value: Option<&'a str>) -> Result<&'a str, Error> {
    let value = required(argument, value)?;
    not_empty(argument, value)?;
    Ok(value)
}

/// `what` names the value in the message: an argument, or a key of an event.
pub fn not_empty(what: &str, value: &str) -> Result<(), Error> {
    if value.is_empty() {
        return Err(empty(what));
    }
    within_limit(what, value)
}

fn empty(what: &str) -> Error {
    Error::invalid(
        format!("{what} must not be empty"),
        "''",
        "at least one character",
        "Give a name.",
    )
}

pub fn within_limit(what: &str, value: &str) -> Result<(), Error> {
    within(what, value, MAX_NAME_BYTES)
}

fn within(what: &str, value: &str, most_bytes: usize) -> Result<(), Error> {
    if value.len() > most_bytes {
        return Err(Error::InvalidParameter {
            message: format!("{what} is too long"),
            detail: format!(
                "It has {} bytes, at most {most_bytes} are allowed.",
                value.len()
            ),
            hint: "Give a shorter one, or a hash of it.",
        });
    }
    Ok(())
}

/// As [`name`], with a limit of its own: the longest that a table's indexes leave room for.
pub fn short_name<'a>(
    argument: &'static str,
    value: Option<&'a str>,
    most_bytes: usize,
) -> Result<&'a str, Error> {
    let value = required(argument, value)?;
    if value.is_empty() {
        return Err(empty(argument));
    }
    within(argument, value, most_bytes)?;
    Ok(value)
}

/// A tenant, or every one where it is NULL.
pub fn any_tenant(value: Option<&str>) -> Result<Option<&str>, Error> {
    value.map(|value| tenant(Some(value))).transpose()
}

pub fn position(argument: &'static str, value: Option<AnyNumeric>) -> Result<Position, Error> {
    Position::from_argument(argument, &required(argument, value)?)
}

/// A position, or none where it is NULL.
pub fn optional_position(
    argument: &'static str,
    value: Option<AnyNumeric>,
) -> Result<Option<Position>, Error> {
    value
        .map(|value| Position::from_argument(argument, &value))
        .transpose()
}

/// A count that must be at least 1, or none where it is NULL.
pub fn optional_positive(argument: &'static str, value: Option<i32>) -> Result<Option<i32>, Error> {
    value.map(|value| positive(argument, value)).transpose()
}

/// A count that must be at least 1.
pub fn positive(argument: &'static str, value: i32) -> Result<i32, Error> {
    if value < 1 {
        return Err(Error::invalid(
            format!("{argument} must be at least 1, not {value}"),
            value,
            "at least 1",
            "Leave it out for the default.",
        ));
    }
    Ok(value)
}

/// An interval that is finite and not negative.
pub fn not_negative(argument: &'static str, value: Interval) -> Result<Interval, Error> {
    let infinite = value.months() == i32::MAX && value.days() == i32::MAX;
    let actual = match microseconds(&value) {
        _ if infinite => "infinity",
        ..0 => "less than 0",
        _ => return Ok(value),
    };
    Err(Error::invalid(
        format!("{argument} must be finite and not negative"),
        actual,
        "a finite interval from 0",
        A_SPAN,
    ))
}

/// An interval that is finite and above 0.
pub fn duration(argument: &'static str, value: Interval) -> Result<Duration, Error> {
    let value = not_negative(argument, value)?;
    match microseconds(&value) {
        // Half a million years are as good as any more.
        1.. => Ok(Duration::from_micros(
            u64::try_from(microseconds(&value)).unwrap_or(u64::MAX),
        )),
        _ => Err(not_above_0(argument)),
    }
}

/// The longest span of time: sums with it stay within what a timestamptz holds.
const MAX_SPAN_DAYS: i128 = 1000 * 12 * 30;

/// A finite interval that is not negative, as elapsed time: a day is 24 hours and a month 30 days, in whatever time zone.
pub fn span(argument: &'static str, value: Option<Interval>) -> Result<Interval, Error> {
    let value = not_negative(argument, required(argument, value)?)?;
    i64::try_from(microseconds(&value))
        .ok()
        .filter(|microseconds| i128::from(*microseconds) <= MAX_SPAN_DAYS * DAY)
        .map(Interval::from_micros)
        .ok_or_else(|| {
            Error::invalid(
                format!("{argument} must not be longer than 1000 years"),
                format!("{} days", microseconds(&value) / DAY),
                format!("at most {MAX_SPAN_DAYS}"),
                A_SPAN,
            )
        })
}

const A_SPAN: &str = "Give an interval such as '30 seconds' or '2 hours'.";

fn not_above_0(argument: &str) -> Error {
    Error::invalid(
        format!("{argument} must be above 0"),
        "0",
        "an interval above 0",
        A_SPAN,
    )
}

/// A span above 0.
pub fn positive_span(argument: &'static str, value: Option<Interval>) -> Result<Interval, Error> {
    let value = span(argument, value)?;
    if value.micros() == 0 {
        return Err(not_above_0(argument));
    }
    Ok(value)
}

/// The length of an interval as PostgreSQL compares it: months of 30 days of 24 hours.
fn microseconds(value: &Interval) -> i128 {
    (i128::from(value.months()) * 30 + i128::from(value.days())) * DAY + i128::from(value.micros())
}

/// An array in which no element is NULL.
pub fn numbers(argument: &'static str, value: Option<Vec<Option<i64>>>) -> Result<Vec<i64>, Error> {
    required(argument, value)?
        .into_iter()
        .map(|number| number.ok_or(Error::NullElement(argument)))
        .collect()
}

/// A filter of names: NULL and the empty one let everything pass.
pub fn filter(
    argument: &'static str,
    value: Option<Vec<Option<String>>>,
) -> Result<Option<Vec<String>>, Error> {
    let names = value
        .unwrap_or_default()
        .into_iter()
        .map(|name| {
            let name = name.ok_or(Error::NullElement(argument))?;
            not_empty(argument, &name)?;
            Ok(name)
        })
        .collect::<Result<Vec<_>, Error>>()?;
    Ok(Some(names).filter(|names| !names.is_empty()))
}
