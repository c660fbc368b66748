//! Workers: background processes that run every projection that has a handler, so that nothing else needs to run.
//!
//! Invariant: a handler runs only in a process that is connected as the projection's owner, in a batch that began while that role
//! owned it.
//!
//! With the library preloaded the postmaster starts one *supervisor*. It keeps a *launcher* running in each database of
//! `lockstep.databases`. A launcher knows which (projection, tenant) pairs are due ([`queue`]) and hands them, one at a time, to
//! at most `lockstep.workers` *workers*, which it starts as it needs them, each connected as one owner. The three know of each
//! other through a [`table`] in shared memory. Only workers write, and only when there are events: an idle server's processes
//! sleep, but for a look of the launcher every second.
//!
//! What each step prevents:
//! - One process decides whose turn it is. Workers that each chose for themselves would have to agree on who has had a batch,
//!   and a tenant with a million events behind would win as often as one with a single event.
//! - Workers claim with `barrier => false`: no tenant's slow writer holds a worker. Events above the horizon are not due, and
//!   the end of the writer's transaction is announced ([`crate::wakeup`]).
//! - The worker compares the projection's owner with its own role under the claim's lock: the projection may have been given
//!   away after it came into the queue, and the new owner's handler would run with the old owner's rights.
//! - A tenant that is pushed to while its pair is running is looked at again when the batch is done: the batch's horizon may be
//!   older than the push. The worker does that itself, and goes on with its pair, for as long as the launcher has told it of no
//!   pair that waits; or one backlog after another would keep the only worker.
//! - What is due is looked up unless all pairs of the tenant are known: those that wait, run or rest, and those that had nothing
//!   left, which a push makes due. Any change of a projection makes them unknown.
//! - While the last look at everything has found no projection that workers run, pushes wake nobody. Such a projection may be
//!   committed after that look's snapshot: its mail, not the launcher, makes pushes heeded again, and then everything is looked at.
//! - A batch whose transaction fails as a whole (a deferred constraint, an error outside any event) is applied again event by
//!   event, each checked before its COMMIT, so that the one that is to blame is counted, retried and at last skipped.

mod batch;
mod crew;
mod launcher;
pub mod queue;
mod supervisor;
mod table;

use pgrx::datum::TimestampWithTimeZone;
use pgrx::prelude::*;

use crate::rights;
use crate::spi::{Columns, Table};
use crate::wakeup::mailbox;

pub use table::MOST;

/// Called by the postmaster: shared memory, and the one process that it starts itself.
pub fn preload() {
    table::preload();
    supervisor::register();
}

/// Lists this database's workers, from shared memory; none without the library preloaded. What `lockstep.worker_status` is made
/// of.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn workers() -> Table<WorkerRow> {
    let row = |worker: table::Shown| {
        let is_running = worker.state == "running";
        let time = |time: Option<i64>| TimestampWithTimeZone::try_from(time?).ok();
        let error = worker.counts.last_error.read();
        vec![
            worker.number.into_datum(),
            worker.pid.into_datum(),
            rights::role_name(worker.owner).into_datum(),
            worker.state.into_datum(),
            is_running.then(|| worker.projection.clone()).into_datum(),
            is_running.then(|| worker.tenant.clone()).into_datum(),
            time(worker.counts.batch_started_at.filter(|_| is_running)).into_datum(),
            worker.counts.batches.into_datum(),
            worker.counts.events.into_datum(),
            worker.counts.events_per_second().into_datum(),
            worker.counts.errors.into_datum(),
            Some(error).filter(|error| !error.is_empty()).into_datum(),
            time(worker.counts.last_error_at).into_datum(),
            worker.counts.restarts.into_datum(),
            time(worker.started_at).into_datum(),
        ]
    };
    Table::new(table::show().into_iter().map(row).collect())
}

struct WorkerRow;

impl Columns for WorkerRow {
    const SQL: &'static str = "TABLE (worker int, pid int, owner text, state text, projection text, tenant text, batch_started_at timestamptz, batches bigint, events bigint, events_per_second double precision, errors bigint, last_error text, last_error_at timestamptz, restarts bigint, started_at timestamptz)";
}

/// Whether this database's workers are on: the library is preloaded, and the database is in `lockstep.databases`.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn workers_are_on() -> bool {
    mailbox::is_open()
}
