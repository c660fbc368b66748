//! The cursor of a projection in a tenant. Its row is written only under the PROJECTION lock, so never by two at a time.

use pgrx::datum::Interval;
use std::time::Duration;

use crate::error::Error;
use crate::event_log::Filter;
use crate::position::Position;
use crate::snapshot::At;
use crate::spi::{Arg, Plan, Spi};
use crate::wakeup::{self, Event};

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

/// Reads it with a snapshot taken now.
pub fn read(projection: &str, tenant: &str) -> Result<Projection, Error> {
    static READ: Plan = Plan::new(
        "SELECT p.aggregate_types, p.event_types, p.batch_size, p.handler,
                COALESCE(c.position, p.start_after),
                COALESCE((SELECT t.paused FROM lockstep.projection_pauses AS t
                          WHERE t.projection = p.name AND t.tenant = $2), p.paused),
                GREATEST(EXTRACT(epoch FROM c.retry_at - pg_catalog.clock_timestamp()), 0)::float8,
                p.owner
         FROM lockstep.projections AS p
         LEFT JOIN LATERAL (SELECT * FROM lockstep.projection_cursors AS c
                            WHERE c.projection = p.name AND c.tenant = $2 OFFSET 0) AS c ON true
         WHERE p.name = $1",
    );
    let spi = Spi::connect();
    let rows = spi.read(
        &READ,
        At::Latest,
        &[Arg::from(projection), Arg::from(tenant)],
    );
    if rows.count() == 0 {
        return Err(Error::UndefinedProjection(projection.to_owned()));
    }
    Ok(Projection {
        filter: Filter {
            aggregate_types: rows.get(0, 1),
            event_types: rows.get(0, 2),
        },
        batch_size: rows.get(0, 3).unwrap_or(1),
        handler: rows.get(0, 4),
        cursor: rows.get(0, 5).unwrap_or(Position::ZERO),
        paused: rows.get(0, 6).unwrap_or(false),
        retry_in: rows
            .get(0, 7)
            .filter(|seconds| *seconds > 0.0)
            .map(Duration::from_secs_f64),
        owner: rows.get(0, 8).unwrap_or_default(),
    })
}

/// Moves the cursor forward and ends a backoff; the events up to there that failed before have succeeded. False if the cursor
/// is already further, or there is no such projection.
pub fn advance(projection: &str, tenant: &str, position: Position) -> bool {
    static UPSERT: Plan = Plan::new(
        "INSERT INTO lockstep.projection_cursors AS c (projection, tenant, position, advanced_at)
         SELECT p.name, $2, $3, pg_catalog.clock_timestamp() FROM lockstep.projections AS p WHERE p.name = $1
         ON CONFLICT (projection, tenant) DO UPDATE
         SET position = EXCLUDED.position, advanced_at = EXCLUDED.advanced_at, retry_at = NULL,
             failing = false
         WHERE c.position <= EXCLUDED.position
         -- As the statement's snapshot shows it: before the update.
         RETURNING (SELECT o.failing FROM lockstep.projection_cursors AS o
                    WHERE o.projection = $1 AND o.tenant = $2)",
    );
    static SUCCEEDED: Plan = Plan::new(
        "DELETE FROM lockstep.failed_events AS f
         WHERE f.projection = $1 AND f.tenant = $2 AND f.position <= $3 AND f.skipped_at IS NULL",
    );
    let spi = Spi::connect();
    let args = || {
        [
            Arg::from(projection),
            Arg::from(tenant),
            Arg::from(position),
        ]
    };
    let rows = spi.write(&UPSERT, &args());
    if rows.count() == 0 {
        return false;
    }
    if rows.get(0, 1).unwrap_or(false) {
        spi.write(&SUCCEEDED, &args());
    }
    wakeup::announce(&Event::Advanced { projection, tenant });
    true
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
