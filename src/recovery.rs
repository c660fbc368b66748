//! What an operator does after a failover or a point-in-time recovery that lost commits. It concerns every topic.

use pgrx::prelude::*;

use crate::catalog;
use crate::error::{Error, OrRaise};
use crate::generation;
use crate::job;
use crate::lease;
use crate::lock;
use crate::sequence::{JOB_ID, TICKET, TOKEN};
use crate::snapshot::{self, At};
use crate::spi::{Plan, Spi};

/// More than any server can have handed out without its standby or archive knowing of it.
const GAP: i64 = 1 << 32;

/// Raises the ticket, the ids of jobs and every token by 2^32, so that no position, id or token that a lost commit had is given again,
/// and no token that was handed out before counts any more: each holder has to acquire again. For use once after a failover or a point-in-time recovery
/// that lost commits. Waits, obeying lock_timeout, for the pushes, acquisitions, renewals, syncs and claims in flight; they wait for it until its
/// transaction ends. Transactions that do several of these can meet it in a deadlock (40P01): repeat it.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn after_data_loss() {
    let run = || {
        snapshot::require_read_write("after_data_loss")?;
        // Whoever draws a token locks one of these tables first, and writes its row after the draw: with the tables locked,
        // nobody has drawn a token whose row is not there to be raised. The resources before their replicas, as everywhere.
        for table in [c"resources", c"replicas", c"leases", c"jobs"] {
            lock::lock_table(catalog::relation(table));
        }
        let (token, job_id) = greatest();
        lease::raise_tokens(GAP);
        generation::raise_tokens(GAP);
        job::raise_tokens(GAP);
        TICKET.raise(|value| value.saturating_add(GAP));
        TOKEN.raise(|value| value.max(token).saturating_add(GAP));
        // Without its lock: who enqueues draws an id before it locks the table, and would wait for that in a circle. The order
        // of ids drawn meanwhile means nothing.
        JOB_ID.raise_unlocked(|value| value.max(job_id).saturating_add(GAP));
        Ok::<_, Error>(())
    };
    run().or_raise()
}

/// The greatest token and job id in the tables. A logical replication carries these and leaves the sequences behind.
fn greatest() -> (i64, i64) {
    static GREATEST: Plan = Plan::joining(
        "SELECT GREATEST((SELECT pg_catalog.max(l.token) FROM lockstep.leases AS l),
                         (SELECT pg_catalog.max(r.incarnation) FROM lockstep.resources AS r),
                         (SELECT pg_catalog.max(p.sync_token) FROM lockstep.replicas AS p),
                         (SELECT pg_catalog.max(j.token) FROM lockstep.jobs AS j)),
                GREATEST((SELECT pg_catalog.max(j.job_id) FROM lockstep.jobs AS j),
                         (SELECT pg_catalog.max(d.job_id) FROM lockstep.dead_jobs AS d))",
    );
    let spi = Spi::connect();
    let rows = spi.read(&GREATEST, At::Latest, &[]);
    let column = |ordinal| rows.get(0, ordinal).unwrap_or_default();
    (column(1), column(2))
}
