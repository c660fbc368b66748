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
        // Whoever enqueues draws the id first.
        JOB_ID.raise(|value| value.saturating_add(GAP));
        // Whoever draws a token locks one of these tables first, and writes its row after the draw: with the tables locked,
        // nobody has drawn a token whose row is not there to be raised. The resources before their replicas, as everywhere.
        for table in [c"resources", c"replicas", c"leases", c"jobs"] {
            lock::lock_table(catalog::relation(table));
        }
        lease::raise_tokens(GAP);
        generation::raise_tokens(GAP);
        job::raise_tokens(GAP);
        TICKET.raise(|value| value.saturating_add(GAP));
        // Where the sequence stood below the tokens (a logical replication leaves it behind), both have been raised by as much.
        let greatest = greatest_token();
        TOKEN.raise(|value| value.saturating_add(GAP).max(greatest));
        Ok::<_, Error>(())
    };
    run().or_raise()
}

/// The greatest token or incarnation that is on record; 0 if there is none.
fn greatest_token() -> i64 {
    static GREATEST: Plan = Plan::joining(
        "SELECT GREATEST((SELECT max(l.token) FROM lockstep.leases AS l),
                         (SELECT max(p.sync_token) FROM lockstep.replicas AS p),
                         (SELECT max(r.incarnation) FROM lockstep.resources AS r),
                         (SELECT max(j.token) FROM lockstep.jobs AS j))",
    );
    let spi = Spi::connect();
    spi.read(&GREATEST, At::Latest, &[]).get(0, 1).unwrap_or(0)
}
