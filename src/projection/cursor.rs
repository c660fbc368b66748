//! The cursor of a projection in a tenant. Its row is written only under the PROJECTION lock, so never by two at a time.
//!
//! Each advance leaves a dead version of the row, which stays as long as any transaction in the database may still want it. Versions
//! are found by the index in the order of their places, so the newest is looked for from the end: from the beginning, a claim beside a
//! transaction that stays open would read all of them. What is left to read is about a page of the table, as a chain of HOT updates is
//! followed from its first version.

use pgrx::datum::{Interval, IntoDatum, TimestampWithTimeZone, clock_timestamp};
use std::ffi::CStr;
use std::time::Duration;

use crate::error::Error;
use crate::event_log::Filter;
use crate::lookup::{Key, Lookup, Row, Strength, Walk};
use crate::position::Position;
use crate::snapshot::At;
use crate::spi::{Arg, Plan, Spi};
use crate::wakeup::{self, Event};
use crate::write::Updater;

/// A projection as a claim needs it, with its cursor in one tenant.
pub struct Projection {
    pub owner: String,
    pub filter: Filter,
    pub batch_size: i32,
    pub handler: Option<String>,
    pub cursor: Position,
    pub paused: bool,
    /// An event failed, and this is left of the time until it may be retried.
    pub retry_in: Option<Duration>,
}

const TABLE: &CStr = c"projection_cursors";

/// Where the columns of the tables are.
mod column {
    pub mod definition {
        pub const OWNER: i16 = 2;
        pub const AGGREGATE_TYPES: i16 = 3;
        pub const EVENT_TYPES: i16 = 4;
        pub const HANDLER: i16 = 5;
        pub const BATCH_SIZE: i16 = 6;
        pub const START_AFTER: i16 = 9;
        pub const PAUSED: i16 = 10;
    }

    pub mod pause {
        pub const PAUSED: i16 = 3;
    }

    pub mod cursor {
        pub const POSITION: i16 = 3;
        pub const ADVANCED_AT: i16 = 4;
        pub const FAILING: i16 = 5;
        pub const RETRY_AT: i16 = 6;
    }
}

/// Of the primary keys of the cursors and of the pauses.
fn keys<'a>(projection: &'a str, tenant: &'a str) -> [Key<'a>; 2] {
    [Key::equal(1, projection), Key::equal(2, tenant)]
}

/// The walk whose first step back is the cursor's row.
fn walk<'cursors>(cursors: &'cursors Lookup, projection: &str, tenant: &str) -> Walk<'cursors> {
    cursors.walk(c"projection_cursors_pkey", &keys(projection, tenant))
}

/// Reads it with a snapshot taken now.
pub fn read(projection: &str, tenant: &str) -> Result<Projection, Error> {
    let definitions = Lookup::of(c"projections", At::Latest);
    let mut definition = definitions.walk(c"projections_pkey", &[Key::equal(1, projection)]);
    let Some(definition) = definition.step() else {
        return Err(Error::UndefinedProjection(projection.to_owned()));
    };
    let pauses = definitions.with_table(c"projection_pauses");
    let mut pause = pauses.walk(c"projection_pauses_pkey", &keys(projection, tenant));
    let paused_here = pause
        .step()
        .and_then(|pause| pause.get(column::pause::PAUSED));
    let cursors = definitions.with_table(TABLE);
    let mut cursor = walk(&cursors, projection, tenant);
    let cursor = cursor.step_back();
    let cursor_or_start = match &cursor {
        Some(cursor) => cursor.get(column::cursor::POSITION),
        None => definition.get(column::definition::START_AFTER),
    };
    Ok(Projection {
        owner: definition
            .get(column::definition::OWNER)
            .unwrap_or_default(),
        filter: Filter {
            aggregate_types: definition.get(column::definition::AGGREGATE_TYPES),
            event_types: definition.get(column::definition::EVENT_TYPES),
        },
        batch_size: definition.get(column::definition::BATCH_SIZE).unwrap_or(1),
        handler: definition.get(column::definition::HANDLER),
        cursor: cursor_or_start.unwrap_or(Position::ZERO),
        paused: paused_here
            .or_else(|| definition.get(column::definition::PAUSED))
            .unwrap_or(false),
        retry_in: cursor.and_then(|cursor| retry_in(&cursor)),
    })
}

fn retry_in(cursor: &Row) -> Option<Duration> {
    let retry_at: TimestampWithTimeZone = cursor.get(column::cursor::RETRY_AT)?;
    let microseconds = |time: TimestampWithTimeZone| -> i64 { time.into() };
    let left = microseconds(retry_at).checked_sub(microseconds(clock_timestamp()))?;
    u64::try_from(left)
        .ok()
        .filter(|left| *left > 0)
        .map(Duration::from_micros)
}

/// Moves the cursor forward and ends a backoff; the events up to there that failed before have succeeded. False if the cursor
/// is already further, or there is no such projection.
pub fn advance(projection: &str, tenant: &str, position: Position) -> bool {
    static SUCCEEDED: Plan = Plan::new(
        "DELETE FROM lockstep.failed_events AS f
         WHERE f.projection = $1 AND f.tenant = $2 AND f.position <= $3 AND f.skipped_at IS NULL",
    );
    let Some(was_failing) = move_forward(projection, tenant, position)
        .unwrap_or_else(|| move_by_statement(projection, tenant, position))
    else {
        return false;
    };
    if was_failing {
        let args = [
            Arg::from(projection),
            Arg::from(tenant),
            Arg::from(position),
        ];
        Spi::connect().write(&SUCCEEDED, &args);
    }
    wakeup::announce(&Event::Advanced { projection, tenant });
    true
}

/// Whether the event after the cursor had failed; Some(None): the cursor is already further. None: a statement must do it, as there is
/// no row yet, or it is not only ours: with triggers, or in the hands of somebody who did not take the lock.
fn move_forward(projection: &str, tenant: &str, position: Position) -> Option<Option<bool>> {
    let cursors = Lookup::to_write(TABLE, At::Latest);
    let mut cursor = walk(&cursors, projection, tenant);
    let row = cursor.step_back()?;
    let is_further = |at: Position| at > position;
    if row.get(column::cursor::POSITION).is_some_and(is_further) {
        return Some(None);
    }
    let was_failing = row.get(column::cursor::FAILING).unwrap_or(false);
    let mut updater = Updater::of(&cursors)?;
    if !cursor.lock(Strength::NoKeyUpdate) {
        return None;
    }
    let changes = [
        (column::cursor::POSITION, position.into_datum()),
        (column::cursor::ADVANCED_AT, clock_timestamp().into_datum()),
        (column::cursor::FAILING, false.into_datum()),
        (column::cursor::RETRY_AT, None),
    ];
    updater.change(&cursor, &changes);
    Some(Some(was_failing))
}

/// As `move_forward`; None: the cursor is already further, or there is no such projection.
fn move_by_statement(projection: &str, tenant: &str, position: Position) -> Option<bool> {
    static UPSERT: Plan = Plan::new(
        "INSERT INTO lockstep.projection_cursors AS c (projection, tenant, position, advanced_at)
         SELECT p.name, $2, $3, pg_catalog.clock_timestamp() FROM lockstep.projections AS p WHERE p.name = $1
         ON CONFLICT (projection, tenant) DO UPDATE
         SET position = EXCLUDED.position, advanced_at = EXCLUDED.advanced_at, retry_at = NULL,
             failing = false
         WHERE c.position <= EXCLUDED.position
         -- As the statement's snapshot shows it: before the update.
         RETURNING COALESCE((SELECT o.failing FROM lockstep.projection_cursors AS o
                             WHERE o.projection = $1 AND o.tenant = $2), false)",
    );
    let args = [
        Arg::from(projection),
        Arg::from(tenant),
        Arg::from(position),
    ];
    Spi::connect().write(&UPSERT, &args).get(0, 1)
}

/// Puts the cursor just before a failed event and lets claims wait: `retry_after` doubled for each failure but the first, at
/// most 5 minutes.
pub fn back_off(
    projection: &str,
    tenant: &str,
    position: Position,
    retry_after: Interval,
    failures: i32,
) {
    static UPSERT: Plan = Plan::new(
        "INSERT INTO lockstep.projection_cursors AS c (projection, tenant, position, advanced_at, failing, retry_at)
         VALUES ($1, $2, $3, NULL, true,
                 pg_catalog.clock_timestamp()
                 + LEAST(LEAST($4, interval '5 minutes') * pg_catalog.power(2, LEAST($5 - 1, 30)), interval '5 minutes'))
         ON CONFLICT (projection, tenant) DO UPDATE
         SET advanced_at = CASE WHEN c.position < EXCLUDED.position THEN pg_catalog.clock_timestamp() ELSE c.advanced_at END,
             position = EXCLUDED.position, failing = true, retry_at = EXCLUDED.retry_at",
    );
    let args = [
        Arg::from(projection),
        Arg::from(tenant),
        Arg::from(position),
        Arg::from(retry_after),
        Arg::from(failures),
    ];
    Spi::connect().write(&UPSERT, &args);
}

/// Puts the cursor anywhere. What failed after it is forgotten: it will be applied again.
pub fn reset(projection: &str, tenant: &str, position: Position) {
    static UPSERT: Plan = Plan::new(
        "INSERT INTO lockstep.projection_cursors AS c (projection, tenant, position, advanced_at)
         VALUES ($1, $2, $3, NULL)
         ON CONFLICT (projection, tenant) DO UPDATE
         SET position = EXCLUDED.position, retry_at = NULL, failing = false",
    );
    static FAILED: Plan = Plan::new(
        "DELETE FROM lockstep.failed_events AS f
         WHERE f.projection = $1 AND f.tenant = $2 AND (f.position > $3 OR f.skipped_at IS NULL)",
    );
    let spi = Spi::connect();
    let args = || {
        [
            Arg::from(projection),
            Arg::from(tenant),
            Arg::from(position),
        ]
    };
    spi.write(&UPSERT, &args());
    spi.write(&FAILED, &args());
}
