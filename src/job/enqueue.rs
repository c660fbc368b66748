//! Enqueueing: a row of its own, or an update of the twin that is ready.

use pgrx::datum::{Interval, TimestampWithTimeZone};

use super::queue;
use super::row;
use crate::error::Error;
use crate::jsonb::Jsonb;
use crate::lookup::Lookup;
use crate::process;
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
        other => Err(Error::invalid(
            format!("on_twin must be keep or replace, not \"{other}\""),
            other,
            "keep or replace",
            "'keep' leaves the job that waits under this key as it is, 'replace' gives it this call's payload.",
        )),
    }
}

/// The id of the job or of its twin, and whether it is a new one.
pub fn enqueue(job: &NewJob) -> (i64, bool) {
    enqueue_as(job, None)
}

/// A job that was there before: with its id and its age.
pub fn enqueue_again(job: &NewJob, job_id: i64, created_at: TimestampWithTimeZone) {
    enqueue_as(job, Some((job_id, created_at)));
}

fn enqueue_as(job: &NewJob, before: Option<(i64, TimestampWithTimeZone)>) -> (i64, bool) {
    let spi = Spi::connect();
    let mut job_id = before.map(|(job_id, _)| job_id);
    let answer = loop {
        if let Some(twin) = twin(job).filter(|twin| update(&spi, job, *twin)) {
            break (twin, false);
        }
        // Not there: unless another transaction has inserted it meanwhile.
        let job_id = *job_id.get_or_insert_with(|| sequence::JOB_ID.next());
        if insert(&spi, job, job_id, before.map(|(_, created_at)| created_at)) {
            break (job_id, true);
        }
    };
    queue::announce(job.queue, job.tenant);
    answer
}

/// The job of the key and kind that is ready. Where one has failed beside it, the one that has not: the two are merged when they are
/// claimed, and its payload stays.
fn twin(job: &NewJob) -> Option<i64> {
    let jobs = Lookup::of(row::TABLE, At::Latest);
    let keys = row::twin_keys(job.queue, job.tenant, job.key?, job.kind);
    jobs.walk(row::by_twin::INDEX, &keys)
        .step()?
        .get(row::JOB_ID)
}

/// Enqueues onto the twin. Waits for who claims it, and then finds it in progress: no twin any more, and false.
fn update(spi: &Spi, job: &NewJob, twin: i64) -> bool {
    static KEEP: Plan = Plan::new(
        "UPDATE lockstep.jobs SET enqueued = enqueued + 1 WHERE job_id = $1 AND COALESCE(token, 0) = 0",
    );
    static REPLACE: Plan = Plan::new(
        "UPDATE lockstep.jobs AS j
         SET enqueued = j.enqueued + 1, payload = $2, priority = $3, run_at = $4, delayed_until = $5, lane = $6
         WHERE j.job_id = $1 AND COALESCE(j.token, 0) = 0",
    );
    let rows = if job.replace {
        let times = Times::of(job);
        let args = [
            Arg::from(twin),
            Arg::from(job.payload),
            Arg::from(job.priority),
            Arg::from(times.run_at),
            Arg::from(times.delayed_until),
            Arg::from(times.lane),
        ];
        spi.write_latest(&REPLACE, &args)
    } else {
        spi.write_latest(&KEEP, &[Arg::from(twin)])
    };
    rows.count() > 0
}

/// When a job may be claimed, and the lane in which it is found then.
struct Times {
    now: TimestampWithTimeZone,
    run_at: TimestampWithTimeZone,
    delayed_until: TimestampWithTimeZone,
    lane: i64,
}

impl Times {
    fn of(job: &NewJob) -> Self {
        let time = |microseconds: i64| {
            TimestampWithTimeZone::try_from(microseconds)
                .unwrap_or_else(|_| TimestampWithTimeZone::positive_infinity())
        };
        let now = process::now();
        // A span is microseconds alone, and no longer than a timestamp has room for.
        let delay = job.delay.micros();
        let run_at = time(now + delay);
        let keyless = i64::from(job.key.is_none());
        let (delayed_until, delayed) = match delay {
            0 => (row::not_delayed(), 0),
            _ => (run_at, 2),
        };
        Times {
            now: time(now),
            run_at,
            delayed_until,
            lane: queue::lane(job.queue, job.tenant) + keyless + delayed,
        }
    }
}

/// False: a twin is there. Waits for who is inserting it.
fn insert(spi: &Spi, job: &NewJob, job_id: i64, created_at: Option<TimestampWithTimeZone>) -> bool {
    static INSERT: Plan = Plan::new(
        "INSERT INTO lockstep.jobs (job_id, queue, tenant, key, kind, payload, priority, state, attempts_left,
                                    max_attempts, run_at, delayed_until, lane, created_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, 'ready', $8, $8, $9, $10, $11, $12)
         ON CONFLICT (queue, tenant, key, kind, retry_id) WHERE state = 'ready' AND key IS NOT NULL DO NOTHING",
    );
    let times = Times::of(job);
    let args = [
        Arg::from(job_id),
        Arg::from(job.queue),
        Arg::from(job.tenant),
        Arg::from(job.key),
        Arg::from(job.kind),
        Arg::from(job.payload),
        Arg::from(job.priority),
        Arg::from(job.max_attempts),
        Arg::from(times.run_at),
        Arg::from(times.delayed_until),
        Arg::from(times.lane),
        Arg::from(created_at.unwrap_or(times.now)),
    ];
    spi.write_latest(&INSERT, &args).count() > 0
}
