//! Jobs: work that is enqueued with a transaction, claimed by one worker at a time, and acknowledged with the claim's token.
//!
//! Invariants: at most one job of a key is in progress (an index enforces it); whoever does not hold a job's last token changes
//! nothing of it; what was enqueued is done after its enqueueing committed, at least once.
//!
//! # The steps, and which interleaving each prevents
//! Enqueueing: the row is inserted, or its ready twin *updated*. A twin that was only read could be claimed and completed
//! between the look and the enqueuer's COMMIT, and what the enqueuer wrote in its transaction would never be worked on; the
//! update keeps claims away from the row until that transaction has ended.
//!
//! A claim, for each job that it takes:
//! 1. JOB_KEY, exclusive, if that needs no wait: two claims that each see a key without a job in progress would meet in the
//!    index that allows only one, and one of them would wait for the other's transaction, or fail;
//! 2. with a snapshot taken after that lock: nothing of the key is in progress, or only what has expired. The snapshot of the
//!    search would not show the claim whose transaction has just ended;
//! 3. the row, if that needs no wait and it is as the snapshot shows it: somebody may be enqueueing onto it, or have it already;
//! 4. the token and the clock, drawn after that lock.
//!
//! A claim waits for nothing, and touches no job but those that it returns, those that expired or failed of the same keys, and
//! expired ones without attempts left: while its transaction is open, all others can be claimed.
//!
//! The end of an attempt ([`attempt`]) looks for the token in the statement that locks the row: a claim that took the job over
//! meanwhile has changed it, and the answer is `lost`. Completing deletes the row and nothing else: a twin that is ready then
//! was enqueued after the claim.
//!
//! What failed becomes ready again under a name of its own in the index of twins (`retry_id`): its twin may be inserted by a
//! transaction that is still open, and the index would have to wait for that one, or fail. The two are merged as soon as both can
//! be locked: at the failure, or when the job that failed is claimed again.
//!
//! # The order of claims
//! The highest priority first, then by age. Jobs of a busy key stay in that order in the index, so a claim that meets many of
//! them stops reading there and goes from key to key ([`search`]): one key's backlog costs the others nothing.

mod attempt;
mod claim;
mod dead;
mod enqueue;
mod queue;
mod row;
mod search;
mod statistics;
mod turn;
mod wait;

use pgrx::datum::Interval;
use pgrx::prelude::*;
use std::time::Duration;

use crate::argument;
use crate::error::{Error, OrRaise};
use crate::jsonb::Jsonb;
use crate::procedure::{self, Outcome};
use crate::snapshot;
use crate::spi::{Columns, Jobs, Table};

pub use attempt::raise_tokens;

/// The longest queue, key and kind in bytes: with a tenant they fit into one entry of a B-tree index (2704 bytes).
const MAX_NAME_BYTES: usize = 600;

fn short_name<'a>(argument: &'static str, value: Option<&'a str>) -> Result<&'a str, Error> {
    argument::short_name(argument, value, MAX_NAME_BYTES)
}

/// Enqueues a job, unless one of the same queue, key and kind is ready: then that one's id is returned, `enqueued` is false, and
/// it is not claimed before this transaction ends. `on_twin` `replace` gives it the new payload, time and priority; `keep` leaves
/// them. `key` NULL: no twins, and any number in progress. `max_attempts` NULL: it is retried for ever.
///
/// Waits for another transaction that is enqueueing the same, or claiming its twin. Raises 22023, 22004.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
#[allow(clippy::too_many_arguments)]
fn job_enqueue<'a>(
    queue: Option<&'a str>,
    key: Option<&'a str>,
    kind: Option<&'a str>,
    payload: default!(Option<Jsonb<'a>>, "'{}'"),
    max_attempts: default!(Option<i32>, 3),
    delay: default!(Option<Interval>, "'0'"),
    priority: default!(Option<i32>, 0),
    on_twin: default!(Option<&'a str>, "'keep'"),
    tenant: default!(Option<&'a str>, "''"),
) -> Table<Enqueued> {
    let run = || {
        let job = enqueue::NewJob {
            queue: short_name("queue", queue)?,
            key: key.map(|key| short_name("key", Some(key))).transpose()?,
            kind: short_name("kind", kind)?,
            payload: argument::required("payload", payload)?,
            max_attempts: argument::optional_positive("max_attempts", max_attempts)?,
            delay: argument::span("delay", delay)?,
            priority: argument::required("priority", priority)?,
            replace: enqueue::replaces(argument::required("on_twin", on_twin)?)?,
            tenant: argument::tenant(tenant)?,
        };
        snapshot::require_read_write("job_enqueue")?;
        let (job_id, enqueued) = enqueue::enqueue(&job);
        Ok::<_, Error>(Table::new(vec![vec![
            job_id.into_datum(),
            enqueued.into_datum(),
        ]]))
    };
    run().or_raise()
}

struct Enqueued;

impl Columns for Enqueued {
    const SQL: &'static str = "TABLE (job_id bigint, enqueued boolean)";
}

/// Claims up to `max_jobs` jobs for `ttl` and returns them, the highest priority first, then the oldest; at most one of a key is
/// in progress. Claims that have expired are taken over. `tenant` NULL: of any tenant, in turns. Commit before the work begins,
/// and give the token with every acknowledgement.
///
/// Waits for nobody. Raises 22023, 22004.
#[pg_extern(security_definer, volatile, parallel_unsafe, requires = ["job"])]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn job_claim(
    queue: Option<&str>,
    holder: Option<&str>,
    max_jobs: default!(Option<i32>, 1),
    ttl: default!(Option<Interval>, "'1 minute'"),
    tenant: default!(Option<&str>, "''"),
) -> Jobs {
    let run = || {
        let max_jobs = argument::positive("max_jobs", argument::required("max_jobs", max_jobs)?)?;
        let request = claim::Request {
            queue: short_name("queue", queue)?,
            holder: argument::name("holder", holder)?,
            max_jobs: max_jobs as usize,
            ttl: argument::positive_span("ttl", ttl)?,
            tenant: argument::any_tenant(tenant)?,
        };
        snapshot::require_read_write("job_claim")?;
        Ok::<_, Error>(claim::claim(&request))
    };
    run().or_raise()
}

/// Makes the claims last for `ttl` from now and returns the ids of the jobs that are still claimed with these tokens. Waits for
/// nobody: a job that its worker is just completing or failing in another transaction, or that another renewal has, is returned
/// and left as it is. Raises 22023, 22004.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn job_renew(
    job_ids: Option<Vec<Option<i64>>>,
    tokens: Option<Vec<Option<i64>>>,
    ttl: default!(Option<Interval>, "'1 minute'"),
) -> SetOfIterator<'static, i64> {
    let run = || {
        let job_ids = argument::numbers("job_ids", job_ids)?;
        let tokens = argument::numbers("tokens", tokens)?;
        let ttl = argument::positive_span("ttl", ttl)?;
        if job_ids.len() != tokens.len() {
            let (ids, tokens) = (job_ids.len(), tokens.len());
            return Err(Error::invalid(
                format!("job_ids and tokens must be of one length, not {ids} and {tokens}"),
                format!("{tokens} tokens"),
                ids,
                "Give each job's token at the place of its id.",
            ));
        }
        snapshot::require_read_write("job_renew")?;
        Ok(attempt::renew(job_ids, tokens, ttl))
    };
    SetOfIterator::new(run().or_raise())
}

/// Removes a job that is done: `completed`; or `lost`, when it is not claimed with this token. After `lost`, roll back what was
/// written for it. Waits for a claim that is taking the job over. Raises 22004.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn job_complete(job_id: Option<i64>, token: Option<i64>) -> &'static str {
    let run = || {
        let job_id = argument::required("job_id", job_id)?;
        let token = argument::required("token", token)?;
        snapshot::require_read_write("job_complete")?;
        Ok::<_, Error>(attempt::complete(job_id, token).as_str())
    };
    run().or_raise()
}

/// Ends an attempt that failed. `retry`: the job is ready again after `retry_after` (NULL: the queue's backoff, doubled for each
/// attempt, with jitter), or was merged into its ready twin; `dead`: no attempt was left, and it is in `lockstep.dead_jobs`;
/// `lost`: it is not claimed with this token. Waits for a claim that is taking the job over. Raises 22023, 22004.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn job_fail(
    job_id: Option<i64>,
    token: Option<i64>,
    error: Option<&str>,
    retry_after: default!(Option<Interval>, "NULL"),
) -> &'static str {
    let run = || {
        let job_id = argument::required("job_id", job_id)?;
        let token = argument::required("token", token)?;
        let error = argument::required("error", error)?;
        let retry_after = retry_after
            .map(|value| argument::span("retry_after", Some(value)))
            .transpose()?;
        snapshot::require_read_write("job_fail")?;
        Ok::<_, Error>(attempt::fail(job_id, token, error, retry_after).as_str())
    };
    run().or_raise()
}

/// Raises LS007 unless the job is claimed with this token; it is not taken over until this transaction ends, expired or not. For the
/// transaction that writes what the job is about. Waits for a claim that is taking the job over. Raises 22004.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn job_guard(job_id: Option<i64>, token: Option<i64>) {
    let run = || {
        let job_id = argument::required("job_id", job_id)?;
        let token = argument::required("token", token)?;
        snapshot::require_read_write("job_guard")?;
        attempt::guard(job_id, token)
    };
    run().or_raise()
}

/// Removes a job that is ready or in progress; true if it was there. Whoever works on it is told `lost`. Waits for transactions that
/// are enqueueing onto the job, claiming, guarding or acknowledging it. Raises 22004.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn job_cancel(job_id: Option<i64>) -> bool {
    let run = || {
        let job_id = argument::required("job_id", job_id)?;
        snapshot::require_read_write("job_cancel")?;
        Ok::<_, Error>(attempt::cancel(job_id))
    };
    run().or_raise()
}

/// Makes a dead job ready again, with all its attempts and its id; where a twin is ready, that one stands for it. True if it was there.
/// Waits as `job_enqueue`. Raises 22004.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn job_requeue(job_id: Option<i64>) -> bool {
    let run = || {
        let job_id = argument::required("job_id", job_id)?;
        snapshot::require_read_write("job_requeue")?;
        Ok::<_, Error>(dead::requeue(job_id))
    };
    run().or_raise()
}

/// Deletes a dead job; true if it was there. Raises 22004.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn job_discard(job_id: Option<i64>) -> bool {
    let run = || {
        let job_id = argument::required("job_id", job_id)?;
        snapshot::require_read_write("job_discard")?;
        Ok::<_, Error>(dead::discard(job_id))
    };
    run().or_raise()
}

/// Deletes the jobs that have been dead for at least `older_than`, of one tenant or (NULL) of every one, and returns how many. Raises
/// 22023, 22004.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn job_purge(older_than: Option<Interval>, tenant: default!(Option<&str>, "NULL")) -> i64 {
    let run = || {
        let older_than = argument::span("older_than", older_than)?;
        let tenant = argument::any_tenant(tenant)?;
        snapshot::require_read_write("job_purge")?;
        Ok::<_, Error>(dead::purge(older_than, tenant))
    };
    run().or_raise()
}

/// Ends the claims that have expired, in one tenant or (NULL) in every one: ready again, merged into a ready twin, or dead; returns how
/// many. Claims take them over anyway; this is for queues from which nobody claims. Waits for nobody. Raises 22023.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn job_reap(tenant: default!(Option<&str>, "NULL")) -> i64 {
    let run = || {
        let tenant = argument::any_tenant(tenant)?;
        snapshot::require_read_write("job_reap")?;
        Ok::<_, Error>(attempt::reap(tenant))
    };
    run().or_raise()
}

/// Says how a queue is worked on, in one tenant, or (NULL) in every one of which nothing else was said. NULL leaves a setting as it is.
/// `max_in_progress`: how many of its jobs may be in progress; 0: any number, -1: as `lockstep.max_jobs_in_progress` says. `backoff`:
/// how long a job waits after its first failure, doubled for each failure more up to `max_backoff`, less up to half at random. Raises
/// 22023, 22004.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn queue_configure(
    queue: Option<&str>,
    max_in_progress: default!(Option<i32>, "NULL"),
    backoff: default!(Option<Interval>, "NULL"),
    max_backoff: default!(Option<Interval>, "NULL"),
    tenant: default!(Option<&str>, "''"),
) {
    let run = || {
        let optional_span = |name, value: Option<Interval>| {
            value
                .map(|value| argument::span(name, Some(value)))
                .transpose()
        };
        let changes = queue::Changes {
            paused: None,
            max_in_progress: max_in_progress.map(queue::limit).transpose()?,
            backoff: optional_span("backoff", backoff)?,
            max_backoff: optional_span("max_backoff", max_backoff)?,
        };
        let queue = short_name("queue", queue)?;
        let tenant = argument::any_tenant(tenant)?;
        snapshot::require_read_write("queue_configure")?;
        queue::change(queue, tenant, &changes);
        Ok::<_, Error>(())
    };
    run().or_raise()
}

/// Makes later claims of the queue in the tenant (NULL: in every tenant) give no jobs, until `queue_resume`. What is in progress goes on,
/// and can be renewed and acknowledged. Raises 22023, 22004.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn queue_pause(queue: Option<&str>, tenant: default!(Option<&str>, "''")) {
    let run = || {
        let queue = short_name("queue", queue)?;
        let tenant = argument::any_tenant(tenant)?;
        snapshot::require_read_write("queue_pause")?;
        queue::set_paused(queue, tenant, true);
        Ok::<_, Error>(())
    };
    run().or_raise()
}

/// Undoes `queue_pause` in the tenant (NULL: in every tenant). Raises 22023, 22004.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn queue_resume(queue: Option<&str>, tenant: default!(Option<&str>, "''")) {
    let run = || {
        let queue = short_name("queue", queue)?;
        let tenant = argument::any_tenant(tenant)?;
        snapshot::require_read_write("queue_resume")?;
        queue::set_paused(queue, tenant, false);
        Ok::<_, Error>(())
    };
    run().or_raise()
}

/// Waits until a claim would give a job, or `timeout` is over; `ready` tells which. It looks in transactions of its own, and between two
/// looks holds neither a transaction id nor a snapshot. `tenant` NULL: any.
///
/// Woken by what is enqueued or ends where the library is preloaded, else it looks every `lockstep.poll_interval`. Raises 2D000 in a
/// transaction block. Not SECURITY DEFINER and without a SET clause, or it could not commit: it looks with the rights of the
/// extension's owner.
#[pg_extern(sql = r#"
CREATE PROCEDURE lockstep.job_wait(
    queue text, timeout interval, INOUT ready boolean DEFAULT NULL, tenant text DEFAULT '')
    LANGUAGE c AS '@MODULE_PATHNAME@', '@FUNCTION_NAME@';
"#)]
fn job_wait(
    queue: Option<&str>,
    timeout: Option<Interval>,
    _ready: Option<bool>,
    tenant: Option<&str>,
    call: pg_sys::FunctionCallInfo,
) -> Outcome {
    let run = || {
        let queue = short_name("queue", queue)?;
        let timeout: Duration =
            argument::duration("timeout", argument::required("timeout", timeout)?)?;
        let tenant = argument::any_tenant(tenant)?;
        procedure::require_own_transaction("job_wait", call)?;
        snapshot::require_read_write("job_wait")?;
        let ready = wait::wait(queue, tenant, timeout)?;
        Ok::<_, Error>(Outcome(vec![ready.into_datum()]))
    };
    run().or_raise()
}
