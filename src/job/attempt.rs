//! The end of an attempt, and what keeps it from ending: renewing, guarding.
//!
//! Each asks for the token and locks the row in one, so it either meets the attempt or finds it lost. Nothing here takes a lock
//! but that of the row; what touches several rows skips those that are locked ([`crate::lookup::Walk::lock`]), so no two of these
//! can deadlock.

use pgrx::datum::{Interval, TimestampWithTimeZone, clock_timestamp};

use super::{dead, queue, row, statistics};
use crate::error::Error;
use crate::lookup::{Lookup, Row, Strength};
use crate::snapshot::At;
use crate::spi::{Arg, Plan, Spi};
use crate::write;

/// What became of the attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Completed,
    /// The job is ready again, or merged into its twin.
    Retry,
    Dead,
    /// The attempt had ended before.
    Lost,
}

impl End {
    pub fn as_str(self) -> &'static str {
        match self {
            End::Completed => "completed",
            End::Retry => "retry",
            End::Dead => "dead",
            End::Lost => "lost",
        }
    }
}

pub fn complete(job_id: i64, token: i64) -> End {
    let completed = delete_if_free(job_id, token).unwrap_or_else(|| delete(job_id, token));
    let Some(Completed {
        queue,
        tenant,
        waited,
        ran,
    }) = completed
    else {
        return End::Lost;
    };
    statistics::completed(&queue, &tenant, waited, ran);
    queue::announce(&queue, &tenant);
    End::Completed
}

/// A job that was done: where it was, and for how many seconds it waited and ran.
struct Completed {
    queue: String,
    tenant: String,
    waited: f64,
    ran: f64,
}

/// Deletes a job that is claimed with the token. None: somebody has locked it, a guard or a renewal; Some(None): it is not claimed so.
fn delete_if_free(job_id: i64, token: i64) -> Option<Option<Completed>> {
    let jobs = Lookup::to_write(row::TABLE, At::Latest);
    let mut walk = jobs.walk(row::by_id::INDEX, &[row::id(job_id)]);
    let completed = walk.step().and_then(|job| {
        let (run_at, claimed_at) = (time(&job, row::RUN_AT)?, time(&job, row::CLAIMED_AT)?);
        (job.get(row::TOKEN) == Some(token)).then_some(Completed {
            queue: job.get(row::QUEUE)?,
            tenant: job.get(row::TENANT)?,
            waited: seconds(run_at, claimed_at),
            ran: seconds(claimed_at, clock_timestamp()),
        })
    });
    if completed.is_none() {
        return Some(None);
    }
    (walk.lock(Strength::Update) && write::delete(&walk)).then_some(completed)
}

fn time(job: &Row, column: i16) -> Option<TimestampWithTimeZone> {
    job.get(column)
}

fn seconds(from: TimestampWithTimeZone, to: TimestampWithTimeZone) -> f64 {
    let microseconds = |time| i64::from(time) as f64;
    (microseconds(to) - microseconds(from)) / 1e6
}

/// The same, waiting for who has locked it.
fn delete(job_id: i64, token: i64) -> Option<Completed> {
    static DELETE: Plan = Plan::new(
        "DELETE FROM lockstep.jobs WHERE job_id = $1 AND token = $2
         RETURNING queue, tenant, EXTRACT(epoch FROM claimed_at - run_at)::float8,
                   EXTRACT(epoch FROM pg_catalog.clock_timestamp() - claimed_at)::float8",
    );
    let spi = Spi::connect();
    let rows = spi.write_latest(&DELETE, &[Arg::from(job_id), Arg::from(token)]);
    Some(Completed {
        queue: rows.get(0, 1)?,
        tenant: rows.get(0, 2)?,
        waited: rows.get(0, 3).unwrap_or_default(),
        ran: rows.get(0, 4).unwrap_or_default(),
    })
}

pub fn fail(job_id: i64, token: i64, error: &str, retry_after: Option<Interval>) -> End {
    static LOCK: Plan = Plan::new(
        "SELECT COALESCE(attempts_left = 0, false), queue, tenant FROM lockstep.jobs
         WHERE job_id = $1 AND token = $2
         FOR UPDATE",
    );
    let spi = Spi::connect();
    let rows = spi.write_latest(&LOCK, &[Arg::from(job_id), Arg::from(token)]);
    let (Some(spent), Some(queue), Some(tenant)) = (
        rows.get(0, 1),
        rows.get::<String>(0, 2),
        rows.get::<String>(0, 3),
    ) else {
        return End::Lost;
    };
    if spent {
        dead::bury(&spi, job_id, error);
        return End::Dead;
    }
    if merge(&spi, job_id, Some(error)).is_none() {
        let settings = queue::settings(&queue, &tenant);
        let lane = queue::lane(&queue, &tenant);
        make_ready(&spi, lane, job_id, error, Delay::of(retry_after, &settings));
    }
    queue::announce(&queue, &tenant);
    End::Retry
}

/// How long a job waits that failed.
struct Delay {
    given: Option<Interval>,
    backoff: Interval,
    max_backoff: Interval,
}

impl Delay {
    fn of(given: Option<Interval>, settings: &queue::Settings) -> Self {
        Delay {
            given,
            backoff: settings.backoff,
            max_backoff: settings.max_backoff,
        }
    }

    fn none() -> Self {
        Delay {
            given: Some(Interval::from_micros(0)),
            backoff: Interval::from_micros(0),
            max_backoff: Interval::from_micros(0),
        }
    }
}

/// Ends the attempt of a job whose row the caller has locked. Seconds as floats: an interval doubled 60 times overflows.
fn make_ready(spi: &Spi, lane: i64, job_id: i64, error: &str, delay: Delay) {
    static UPDATE: Plan = Plan::new(
        "UPDATE lockstep.jobs AS j
         SET state = 'ready', retry_id = CASE WHEN j.key IS NULL THEN 0 ELSE j.job_id END,
             token = NULL, holder = NULL, claimed_until = NULL, claimed_at = NULL, slot = NULL,
             previous_holder = j.holder, last_error = $2, last_failed_at = t.now,
             run_at = t.now + d.delay, delayed_until = CASE WHEN d.delay > '0' THEN t.now + d.delay ELSE 'epoch' END,
             lane = $6 + CASE WHEN j.key IS NULL THEN 1 ELSE 0 END + CASE WHEN d.delay > '0' THEN 2 ELSE 0 END
         FROM (SELECT pg_catalog.clock_timestamp() OFFSET 0) AS t (now),
              (SELECT job_id,
                      COALESCE($3, pg_catalog.make_interval(secs =>
                          LEAST(EXTRACT(epoch FROM $5)::float8,
                                EXTRACT(epoch FROM $4)::float8 * pg_catalog.power(2::float8, LEAST(GREATEST(attempts - 1, 0), 60)))
                          * (0.5 + pg_catalog.random() / 2)))
               FROM lockstep.jobs WHERE job_id = $1 OFFSET 0) AS d (job_id, delay)
         WHERE j.job_id = d.job_id",
    );
    let args = [
        Arg::from(job_id),
        Arg::from(error),
        Arg::from(delay.given),
        Arg::from(delay.backoff),
        Arg::from(delay.max_backoff),
        Arg::from(lane),
    ];
    spi.write_latest(&UPDATE, &args);
}

/// Merges a job, whose row the caller has locked, into its ready twin, if there is one that nobody else has locked; the twin's id.
/// A locked one is being enqueued onto or claimed: the two are merged when this job is claimed the next time.
pub fn merge(spi: &Spi, job_id: i64, error: Option<&str>) -> Option<i64> {
    static MERGE: Plan = Plan::new(
        "WITH gone AS (
             DELETE FROM lockstep.jobs WHERE job_id = $1
             RETURNING attempts, attempts_left, last_error, last_failed_at, holder, previous_holder
         )
         UPDATE lockstep.jobs AS t
         SET attempts = t.attempts + g.attempts, attempts_left = LEAST(t.attempts_left, g.attempts_left),
             last_error = COALESCE($3, g.last_error),
             last_failed_at = CASE WHEN $3 IS NULL THEN g.last_failed_at ELSE pg_catalog.clock_timestamp() END,
             previous_holder = COALESCE(g.holder, g.previous_holder)
         FROM gone AS g
         WHERE t.job_id = $2",
    );
    let twin = row::lock_twin(&Lookup::to_lock(row::TABLE), job_id)?;
    spi.write_latest(
        &MERGE,
        &[Arg::from(job_id), Arg::from(twin), Arg::from(error)],
    );
    Some(twin)
}

/// An expired claim whose row this transaction has locked.
pub struct Expired {
    pub job_id: i64,
    /// No attempt is left.
    pub spent: bool,
    pub error: String,
}

/// Locks an expired claim, unless somebody has: its worker, which renews or acknowledges it, a guard, another claim.
pub fn lock_expired(job_id: i64) -> Option<Expired> {
    let expired = |row: &Row| {
        (row.get::<TimestampWithTimeZone>(row::CLAIMED_UNTIL)? <= clock_timestamp())
            .then_some(())?;
        Some(Expired {
            job_id,
            spent: row.get(row::ATTEMPTS_LEFT) == Some(0),
            error: expired_error(&row.get::<String>(row::HOLDER)?),
        })
    };
    row::lock(
        &Lookup::to_lock(row::TABLE),
        job_id,
        Strength::Update,
        expired,
    )
}

fn expired_error(holder: &str) -> String {
    format!("the claim of \"{holder}\" expired")
}

impl Expired {
    /// Ends the attempt: dead, merged into the twin, or ready again.
    pub fn settle(&self, spi: &Spi, lane: i64) {
        if self.spent {
            dead::bury(spi, self.job_id, &self.error);
        } else if merge(spi, self.job_id, Some(&self.error)).is_none() {
            make_ready(spi, lane, self.job_id, &self.error, Delay::none());
        }
    }
}

pub fn reap(tenant: Option<&str>) -> i64 {
    static FIND: Plan = Plan::joining(
        "SELECT job_id, queue, tenant FROM lockstep.jobs
         WHERE claimed_until <= (SELECT pg_catalog.clock_timestamp()) AND ($1 IS NULL OR tenant = $1)",
    );
    let spi = Spi::connect();
    let rows = spi.read(&FIND, At::Latest, &[Arg::from(tenant)]);
    let mut reaped = 0;
    for row in 0..rows.count() {
        if let (Some(job_id), Some(queue), Some(tenant)) = (
            rows.get(row, 1),
            rows.get::<String>(row, 2),
            rows.get::<String>(row, 3),
        ) && let Some(expired) = lock_expired(job_id)
        {
            expired.settle(&spi, queue::lane(&queue, &tenant));
            queue::announce(&queue, &tenant);
            reaped += 1;
        }
    }
    reaped
}

/// The ids of the jobs that are still claimed with their tokens. Rows are skipped that others have locked: to wait for them in any
/// order could deadlock with a transaction that completes several jobs. A claim that has not expired can be locked so by its own
/// worker, by another renewal or by a cancel that has not committed, so it is still that worker's; of one that has, nobody can tell.
pub fn renew(job_ids: Vec<i64>, tokens: Vec<i64>, ttl: Interval) -> Vec<i64> {
    static RENEW: Plan = Plan::new(
        "UPDATE lockstep.jobs SET claimed_until = pg_catalog.clock_timestamp() + $2 WHERE job_id = ANY ($1)",
    );
    static CLAIMED: Plan = Plan::new(
        "SELECT r.job_id
         FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) AS g (job_id, token)
         JOIN lockstep.jobs AS r ON r.job_id = g.job_id AND r.token = g.token
         WHERE r.claimed_until > pg_catalog.clock_timestamp()",
    );
    let spi = Spi::connect();
    let jobs = Lookup::to_lock(row::TABLE);
    let lock = |(job_id, token): &(i64, i64)| {
        let if_claimed = |row: &Row| (row.get(row::TOKEN) == Some(*token)).then_some(());
        row::lock(&jobs, *job_id, Strength::NoKeyUpdate, if_claimed).is_some()
    };
    let (locked, skipped): (Vec<_>, Vec<_>) = job_ids.into_iter().zip(tokens).partition(lock);
    drop(jobs);
    let mut owned: Vec<i64> = locked.into_iter().map(|(job_id, _)| job_id).collect();
    spi.write_latest(&RENEW, &[Arg::from(owned.clone()), Arg::from(ttl)]);
    if !skipped.is_empty() {
        let (job_ids, tokens): (Vec<i64>, Vec<i64>) = skipped.into_iter().unzip();
        let rows = spi.read(
            &CLAIMED,
            At::Latest,
            &[Arg::from(job_ids), Arg::from(tokens)],
        );
        owned.extend((0..rows.count()).filter_map(|row| rows.get::<i64>(row, 1)));
    }
    owned.sort_unstable();
    owned.dedup();
    owned
}

/// FOR KEY SHARE: renewals go on beside it, whatever removes the job or gives it away waits, and a claim skips it.
pub fn guard(job_id: i64, token: i64) -> Result<(), Error> {
    static LOCK: Plan =
        Plan::new("SELECT FROM lockstep.jobs WHERE job_id = $1 AND token = $2 FOR KEY SHARE");
    static STATE: Plan = Plan::new("SELECT state FROM lockstep.jobs WHERE job_id = $1");
    let spi = Spi::connect();
    if spi
        .write_latest(&LOCK, &[Arg::from(job_id), Arg::from(token)])
        .count()
        > 0
    {
        return Ok(());
    }
    let state: Option<String> = spi.read(&STATE, At::Latest, &[Arg::from(job_id)]).get(0, 1);
    let actual = match state.as_deref() {
        None => "no such job",
        Some("ready") => "ready",
        Some(_) => "in progress with another token",
    };
    Err(Error::JobLost {
        job_id,
        token,
        actual: actual.to_owned(),
    })
}

pub fn cancel(job_id: i64) -> bool {
    static DELETE: Plan =
        Plan::new("DELETE FROM lockstep.jobs WHERE job_id = $1 RETURNING queue, tenant");
    let spi = Spi::connect();
    let rows = spi.write_latest(&DELETE, &[Arg::from(job_id)]);
    if let (Some(queue), Some(tenant)) = (rows.get::<String>(0, 1), rows.get::<String>(0, 2)) {
        queue::announce(&queue, &tenant);
    }
    rows.count() > 0
}

/// Makes every token that was handed out count no more.
pub fn raise_tokens(by: i64) {
    static UPDATE: Plan =
        Plan::joining("UPDATE lockstep.jobs SET token = token + $1 WHERE token IS NOT NULL");
    Spi::connect().write_latest(&UPDATE, &[Arg::from(by)]);
}
