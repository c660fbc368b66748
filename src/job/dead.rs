//! Dead letters: jobs whose attempts are used up.

use pgrx::datum::Interval;

use super::enqueue::{self, NewJob};
use super::queue;
use crate::spi::{Arg, Plan, Spi};

/// Moves a job, whose row the caller has locked, to the dead letters.
pub fn bury(spi: &Spi, job_id: i64, error: &str) {
    static BURY: Plan = Plan::new(
        "WITH gone AS (DELETE FROM lockstep.jobs WHERE job_id = $1 RETURNING *)
         INSERT INTO lockstep.dead_jobs (job_id, tenant, queue, key, kind, payload, priority, max_attempts, attempts, error,
                                         last_holder, run_at, created_at, claimed_at, died_at)
         SELECT job_id, tenant, queue, key, kind, payload, priority, max_attempts, attempts, $2, holder, run_at, created_at,
                claimed_at, pg_catalog.clock_timestamp()
         FROM gone
         RETURNING queue, tenant",
    );
    let rows = spi.write_latest(&BURY, &[Arg::from(job_id), Arg::from(error)]);
    if let (Some(queue), Some(tenant)) = (rows.get::<String>(0, 1), rows.get::<String>(0, 2)) {
        queue::announce(&queue, &tenant);
    }
}

pub fn requeue(job_id: i64) -> bool {
    static TAKE: Plan = Plan::new(
        "DELETE FROM lockstep.dead_jobs WHERE job_id = $1
         RETURNING queue, tenant, key, kind, payload, priority, max_attempts, created_at",
    );
    let spi = Spi::connect();
    let rows = spi.write_latest(&TAKE, &[Arg::from(job_id)]);
    let (Some(queue), Some(tenant), Some(kind), Some(payload), Some(priority), Some(created_at)) = (
        rows.get::<String>(0, 1),
        rows.get::<String>(0, 2),
        rows.get::<String>(0, 4),
        rows.get(0, 5),
        rows.get(0, 6),
        rows.get(0, 8),
    ) else {
        return false;
    };
    let key: Option<String> = rows.get(0, 3);
    let job = NewJob {
        queue: &queue,
        tenant: &tenant,
        key: key.as_deref(),
        kind: &kind,
        payload,
        max_attempts: rows.get(0, 7),
        delay: Interval::from_micros(0),
        priority,
        replace: false,
    };
    enqueue::enqueue_again(&job, job_id, created_at);
    true
}

pub fn discard(job_id: i64) -> bool {
    static DELETE: Plan = Plan::new("DELETE FROM lockstep.dead_jobs WHERE job_id = $1");
    Spi::connect()
        .write_latest(&DELETE, &[Arg::from(job_id)])
        .count()
        > 0
}

pub fn purge(older_than: Interval, tenant: Option<&str>) -> i64 {
    static DELETE: Plan = Plan::joining(
        "DELETE FROM lockstep.dead_jobs
         WHERE died_at <= (SELECT pg_catalog.clock_timestamp()) - $1 AND ($2 IS NULL OR tenant = $2)",
    );
    let args = [Arg::from(older_than), Arg::from(tenant)];
    Spi::connect().write_latest(&DELETE, &args).count() as i64
}
