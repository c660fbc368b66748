//! Events that cannot be applied: counted, retried with backoff, at last skipped and kept as dead letters.
//!
//! Invariant: an event that failed is before the cursor only if its row in failed_events says when it was skipped.

use pgrx::datum::Interval;

use super::claim;
use super::cursor;
use super::held::{self, Outcome};
use super::run::Handler;
use crate::error::Error;
use crate::event_log::settle;
use crate::event_log::{event_at, position_before};
use crate::lock::{Mode, Tag};
use crate::position::Position;
use crate::rights;
use crate::snapshot::{self, At};
use crate::spi::{Arg, Plan, Spi};
use crate::subtransaction::Failure;

/// What becomes of the failed event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The cursor is just before it; claims wait.
    Retry,
    /// The cursor is past it; the batch goes on.
    Skip,
}

impl Verdict {
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Retry => "retry",
            Verdict::Skip => "skip",
        }
    }
}

pub fn fail(
    projection: &str,
    tenant: &str,
    position: Position,
    failure: &Failure,
) -> Result<Verdict, Error> {
    snapshot::require_read_write("projection_fail")?;
    claim::require_in_batch(projection, tenant, "event_position", position)?;
    let before = cursor::read(projection, tenant)?.cursor;
    if position <= before {
        return Err(Error::invalid(
            format!(
                "event_position {position} is behind the cursor of projection \"{projection}\""
            ),
            position,
            format!("above {before}"),
            "What the cursor has passed is applied: name an event after it.",
        ));
    }
    let counted = count(projection, tenant, position, failure)?;
    let is_last = counted.failures >= counted.max_failures;
    if counted.failures == 1 || is_last {
        let what = if is_last {
            "is skipped"
        } else {
            "is to be retried"
        };
        pgrx::log!(
            "projection \"{projection}\", tenant \"{tenant}\": event at position {position} failed {} of {} times and {what}: {}",
            counted.failures,
            counted.max_failures,
            failure.message
        );
    }
    if is_last {
        skip(projection, tenant, position);
        cursor::advance(projection, tenant, position);
        return Ok(Verdict::Skip);
    }
    cursor::back_off(
        projection,
        tenant,
        position_before(tenant, position).max(before),
        counted.retry_after,
        counted.failures,
    );
    held::remember(projection, tenant, Outcome::Failed, false);
    Ok(Verdict::Retry)
}

struct Counted {
    failures: i32,
    max_failures: i32,
    retry_after: Interval,
}

/// One failure more. An event that was skipped before and is applied anew, after a reset, begins again at 1.
fn count(
    projection: &str,
    tenant: &str,
    position: Position,
    failure: &Failure,
) -> Result<Counted, Error> {
    static UPSERT: Plan = Plan::new(
        "INSERT INTO lockstep.failed_events AS f (projection, tenant, position, failures, error, sqlstate, context,
                                                  first_failed_at, last_failed_at)
         SELECT p.name, $2, $3, 1, $4, $5, $6, t.now, t.now
         FROM lockstep.projections AS p, (SELECT pg_catalog.clock_timestamp() OFFSET 0) AS t (now)
         WHERE p.name = $1
         ON CONFLICT (projection, tenant, position) DO UPDATE
         SET failures = CASE WHEN f.skipped_at IS NULL THEN f.failures ELSE 0 END + 1,
             first_failed_at = CASE WHEN f.skipped_at IS NULL THEN f.first_failed_at ELSE EXCLUDED.first_failed_at END,
             error = EXCLUDED.error, sqlstate = EXCLUDED.sqlstate, context = EXCLUDED.context,
             last_failed_at = EXCLUDED.last_failed_at, skipped_at = NULL
         RETURNING f.failures, (SELECT p.max_failures FROM lockstep.projections AS p WHERE p.name = $1),
                   (SELECT p.retry_after FROM lockstep.projections AS p WHERE p.name = $1)",
    );
    let args = [
        Arg::from(projection),
        Arg::from(tenant),
        Arg::from(position),
        Arg::from(failure.message.as_str()),
        Arg::from(failure.sqlstate.as_deref()),
        Arg::from(failure.context.as_deref()),
    ];
    let spi = Spi::connect();
    let rows = spi.write(&UPSERT, &args);
    match (rows.get(0, 1), rows.get(0, 2), rows.get(0, 3)) {
        (Some(failures), Some(max_failures), Some(retry_after)) => Ok(Counted {
            failures,
            max_failures,
            retry_after,
        }),
        _ => Err(Error::UndefinedProjection(projection.to_owned())),
    }
}

fn skip(projection: &str, tenant: &str, position: Position) {
    static UPDATE: Plan = Plan::new(
        "UPDATE lockstep.failed_events SET skipped_at = pg_catalog.clock_timestamp()
         WHERE projection = $1 AND tenant = $2 AND position = $3",
    );
    Spi::connect().write(
        &UPDATE,
        &[
            Arg::from(projection),
            Arg::from(tenant),
            Arg::from(position),
        ],
    );
}

/// Applies one skipped event with the handler, with the caller's rights. True: it succeeded and its row is gone; false: it
/// failed again, and its row says how.
pub fn retry(projection: &str, tenant: &str, position: Position) -> Result<bool, Error> {
    lock("failed_event_retry", projection, tenant)?;
    let (definition, event) = rights::as_extension_owner(|| {
        require_skipped(projection, tenant, position)?;
        Ok::<_, Error>((
            cursor::read(projection, tenant)?,
            event_at(tenant, position),
        ))
    })?;
    if event.count() == 0 {
        return Err(not_failed(projection, position));
    }
    let Some(handler) = Handler::of(projection, &definition)? else {
        return Err(Error::NoHandler(projection.to_owned()));
    };
    match held::while_running(projection, tenant, || handler.apply(&event, 0..1)) {
        Ok(()) => {
            rights::as_extension_owner(|| delete(projection, tenant, position));
            Ok(true)
        }
        Err(failure) => rights::as_extension_owner(|| {
            count_again(projection, tenant, position, &failure);
            Ok(false)
        }),
    }
}

/// Takes the projection as a claim does, so that a failed event is not applied, retried and discarded at once.
fn lock(function: &'static str, projection: &str, tenant: &str) -> Result<(), Error> {
    snapshot::require_read_write(function)?;
    snapshot::require_read_committed(function)?;
    settle::refuse_after_push(function)?;
    held::refuse_in_handler(projection, tenant)?;
    Tag::projection_all(projection).acquire(Mode::Shared);
    Tag::projection(projection, tenant).acquire(Mode::Exclusive);
    Ok(())
}

/// Forgets a skipped event.
pub fn discard(projection: &str, tenant: &str, position: Position) -> Result<(), Error> {
    lock("failed_event_discard", projection, tenant)?;
    require_skipped(projection, tenant, position)?;
    delete(projection, tenant, position);
    Ok(())
}

fn require_skipped(projection: &str, tenant: &str, position: Position) -> Result<(), Error> {
    static SKIPPED: Plan = Plan::new(
        "SELECT skipped_at IS NOT NULL FROM lockstep.failed_events
         WHERE projection = $1 AND tenant = $2 AND position = $3",
    );
    let args = [
        Arg::from(projection),
        Arg::from(tenant),
        Arg::from(position),
    ];
    cursor::read(projection, tenant)?;
    match Spi::connect().read(&SKIPPED, At::Latest, &args).get(0, 1) {
        Some(true) => Ok(()),
        Some(false) => Err(Error::NotSkipped {
            projection: projection.to_owned(),
            position: position.to_string(),
        }),
        None => Err(not_failed(projection, position)),
    }
}

fn not_failed(projection: &str, position: Position) -> Error {
    Error::invalid(
        format!(
            "event_position {position} is not that of a failed event of projection \"{projection}\""
        ),
        "no failure there",
        "a failed event",
        "lockstep.failed_events has those that there are.",
    )
}

fn delete(projection: &str, tenant: &str, position: Position) {
    static DELETE: Plan = Plan::new(
        "DELETE FROM lockstep.failed_events
         WHERE projection = $1 AND tenant = $2 AND position = $3 AND skipped_at IS NOT NULL",
    );
    Spi::connect().write(
        &DELETE,
        &[
            Arg::from(projection),
            Arg::from(tenant),
            Arg::from(position),
        ],
    );
}

/// A dead letter that failed once more stays one.
fn count_again(projection: &str, tenant: &str, position: Position, failure: &Failure) {
    static UPDATE: Plan = Plan::new(
        "UPDATE lockstep.failed_events
         SET failures = failures + 1, error = $4, sqlstate = $5, context = $6,
             last_failed_at = pg_catalog.clock_timestamp()
         WHERE projection = $1 AND tenant = $2 AND position = $3",
    );
    let args = [
        Arg::from(projection),
        Arg::from(tenant),
        Arg::from(position),
        Arg::from(failure.message.as_str()),
        Arg::from(failure.sqlstate.as_deref()),
        Arg::from(failure.context.as_deref()),
    ];
    Spi::connect().write(&UPDATE, &args);
}
