//! Enqueueing: a row of its own, or an update of the twin that is ready.

use pgrx::datum::{Interval, TimestampWithTimeZone};

use super::queue;
use crate::error::Error;
use crate::jsonb::Jsonb;
use crate::sequence;
use crate::snapshot::At;
use crate::spi::{Arg, Plan, Spi};

pub struct NewJob<'a> {
    pub queue: &'a str,
    pub tenant: &'a str,
    pub key: Option<&'a str>,
    pub kind: &'a str,
    pub payload: Jsonb<'a>,
    pub max_attempts: Option<i32>,
    pub delay: Interval,
    pub priority: i32,
    pub replace: bool,
}

pub fn replaces(on_twin: &str) -> Result<bool, Error> {
    match on_twin {
        "keep" => Ok(false),
        "replace" => Ok(true),
        other => Err(Error::invalid(format!(
            "on_twin must be keep or replace, not \"{other}\""
        ))),
    }
}

/// The id of the job or of its twin, and whether it is a new one.
pub fn enqueue(job: &NewJob) -> (i64, bool) {
    let (job_id, enqueued) = match twin_that_failed(job) {
        Some(twin) => (twin, false),
        None => insert(job, sequence::JOB_ID.next(), None),
    };
    queue::announce(job.queue, job.tenant);
    (job_id, enqueued)
}

/// A job that was there before: with its id and its age.
pub fn enqueue_again(job: &NewJob, job_id: i64, created_at: TimestampWithTimeZone) {
    if twin_that_failed(job).is_none() {
        insert(job, job_id, Some(created_at));
    }
    queue::announce(job.queue, job.tenant);
}

/// What failed is in the index of twins under a name of its own, so the insertion would not meet it.
fn twin_that_failed(job: &NewJob) -> Option<i64> {
    static FIND: Plan = Plan::new(
        "SELECT job_id FROM lockstep.jobs
         WHERE queue = $1 AND tenant = $2 AND key = $3 AND kind = $4 AND state = 'ready' AND retry_id > 0
         ORDER BY retry_id LIMIT 1",
    );
    // Waits for who claims it, and then finds it in progress: no twin any more.
    static KEEP: Plan = Plan::new(
        "UPDATE lockstep.jobs SET enqueued = enqueued + 1 WHERE job_id = $1 AND COALESCE(token, 0) = 0",
    );
    static REPLACE: Plan = Plan::new(
        "UPDATE lockstep.jobs AS j
         SET enqueued = j.enqueued + 1, payload = $2, priority = $3, run_at = t.now + $4,
             delayed_until = CASE WHEN $4 > '0' THEN t.now + $4 ELSE 'epoch' END, lane = $5 + CASE WHEN $4 > '0' THEN 2 ELSE 0 END
         FROM (SELECT pg_catalog.clock_timestamp() OFFSET 0) AS t (now)
         WHERE j.job_id = $1 AND COALESCE(j.token, 0) = 0",
    );
    let spi = Spi::connect();
    let names = [
        Arg::from(job.queue),
        Arg::from(job.tenant),
        Arg::from(job.key?),
        Arg::from(job.kind),
    ];
    let twin: i64 = spi.read(&FIND, At::Latest, &names).get(0, 1)?;
    let found = if job.replace {
        let args = [
            Arg::from(twin),
            Arg::from(job.payload),
            Arg::from(job.priority),
            Arg::from(job.delay),
            Arg::from(queue::lane(job.queue, job.tenant)),
        ];
        spi.write_latest(&REPLACE, &args).count()
    } else {
        spi.write_latest(&KEEP, &[Arg::from(twin)]).count()
    };
    (found > 0).then_some(twin)
}

macro_rules! insert {
    ($on_twin:literal) => {
        concat!(
            "INSERT INTO lockstep.jobs AS j (job_id, queue, tenant, key, kind, payload, priority, state, attempts_left,
                                             max_attempts, run_at, delayed_until, lane, created_at)
             SELECT $1, $2, $3, $4, $5, $6, $7, 'ready', $8, $8, t.now + $9, CASE WHEN $9 > '0' THEN t.now + $9 ELSE 'epoch' END,
                    $11 + CASE WHEN $4 IS NULL THEN 1 ELSE 0 END + CASE WHEN $9 > '0' THEN 2 ELSE 0 END, COALESCE($10, t.now)
             FROM (SELECT pg_catalog.clock_timestamp() OFFSET 0) AS t (now)
             ON CONFLICT (queue, tenant, key, kind, retry_id) WHERE state = 'ready' AND key IS NOT NULL
             DO UPDATE SET enqueued = j.enqueued + 1",
            $on_twin,
            " RETURNING j.job_id"
        )
    };
}

fn insert(job: &NewJob, job_id: i64, created_at: Option<TimestampWithTimeZone>) -> (i64, bool) {
    static KEEP: Plan = Plan::new(insert!(""));
    static REPLACE: Plan = Plan::new(insert!(
        ", payload = EXCLUDED.payload, priority = EXCLUDED.priority, run_at = EXCLUDED.run_at,
           delayed_until = EXCLUDED.delayed_until, lane = EXCLUDED.lane"
    ));
    let args = [
        Arg::from(job_id),
        Arg::from(job.queue),
        Arg::from(job.tenant),
        Arg::from(job.key),
        Arg::from(job.kind),
        Arg::from(job.payload),
        Arg::from(job.priority),
        Arg::from(job.max_attempts),
        Arg::from(job.delay),
        Arg::from(created_at),
        Arg::from(queue::lane(job.queue, job.tenant)),
    ];
    let plan = if job.replace { &REPLACE } else { &KEEP };
    let is: i64 = Spi::connect()
        .write_latest(plan, &args)
        .get(0, 1)
        .unwrap_or(job_id);
    (is, is == job_id)
}
