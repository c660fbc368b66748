//! `lockstep`: an event log, projections, leases, generations and jobs whose locking PostgreSQL enforces.
//! This file lists the modules and the order of the SQL; it holds no logic.

use pgrx::prelude::*;

pgrx::pg_module_magic!();

mod argument;
mod call;
mod catalog;
mod error;
mod event_log;
mod generation;
mod guc;
mod job;
mod jsonb;
mod lease;
mod lock;
mod lookup;
mod memory;
mod position;
mod procedure;
mod process;
mod projection;
mod recovery;
mod rights;
mod schema;
mod sequence;
mod snapshot;
mod spi;
mod subtransaction;
mod transaction;
mod wakeup;
mod worker;
mod write;

extension_sql_file!("../sql/event_log.sql", name = "event_log", bootstrap);
extension_sql_file!(
    "../sql/schema.sql",
    name = "schema",
    requires = ["event_log"]
);
extension_sql_file!("../sql/token.sql", name = "token", requires = ["event_log"]);
extension_sql_file!(
    "../sql/projection.sql",
    name = "projection",
    requires = ["event_log"]
);
extension_sql_file!("../sql/lease.sql", name = "lease", requires = ["token"]);
extension_sql_file!(
    "../sql/generation.sql",
    name = "generation",
    requires = ["token"]
);
extension_sql_file!("../sql/job.sql", name = "job", requires = ["token"]);
extension_sql_file!(
    "../sql/status.sql",
    name = "status",
    requires = [
        "projection",
        "lease",
        "job",
        event_log::writer_locks,
        projection::projection_locks,
        worker::workers,
        worker::workers_are_on,
        lease::lease_locks,
    ]
);
extension_sql_file!(
    "../sql/comments.sql",
    name = "comments",
    requires = [
        "schema",
        "status",
        event_log::push_events,
        event_log::push_event,
        event_log::barrier,
        event_log::horizon,
        event_log::read_events,
        event_log::aggregate_events,
        event_log::ticket_resync,
        recovery::after_data_loss,
        projection::projection_create,
        projection::projection_alter,
        projection::projection_drop,
        projection::projection_owner,
        projection::projection_claim,
        projection::projection_claim_state,
        projection::projection_advance,
        projection::projection_due,
        projection::projection_fail,
        projection::projection_run,
        projection::projection_wait,
        projection::projection_reset,
        projection::projection_pause,
        projection::projection_resume,
        projection::failed_event_retry,
        projection::failed_event_discard,
        lease::lease_acquire,
        lease::lease_renew,
        lease::lease_release,
        lease::lease_guard,
        lease::lease_guard_at_commit,
        lease::lease_guard_trigger,
        lease::lease_steal,
        lease::lease_take,
        lease::lease_delete_expired,
        "generation",
        generation::resource_create,
        generation::resource_delete,
        generation::resource_purge,
        generation::generation_increment,
        generation::generation_set,
        generation::generation_replicated,
        generation::generation_current,
        generation::replica_make_authoritative,
        generation::replica_delete,
        generation::replica_invalidate,
        generation::replica_sync_begin,
        generation::replica_sync_renew,
        generation::replica_sync_finish,
        generation::replicas_due,
        generation::replica_sync_claim,
        generation::registry_follow,
        job::job_enqueue,
        job::job_claim,
        job::job_renew,
        job::job_complete,
        job::job_fail,
        job::job_guard,
        job::job_cancel,
        job::job_requeue,
        job::job_discard,
        job::job_purge,
        job::job_reap,
        job::job_wait,
        job::queue_configure,
        job::queue_pause,
        job::queue_resume,
    ]
);
extension_sql_file!("../sql/privileges.sql", name = "privileges", finalize);

#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    guc::register();
    if process::is_preloading() {
        wakeup::preload();
        worker::preload();
    }
}

#[cfg(any(test, feature = "pg_test"))]
#[path = "../pgrx-tests/catalog.rs"]
mod catalog_tests;
#[cfg(any(test, feature = "pg_test"))]
#[path = "../pgrx-tests/event_log.rs"]
mod event_log_tests;
#[cfg(any(test, feature = "pg_test"))]
#[path = "../pgrx-tests/failure.rs"]
mod failure_tests;
#[cfg(any(test, feature = "pg_test"))]
#[path = "../pgrx-tests/generation.rs"]
mod generation_tests;
#[cfg(any(test, feature = "pg_test"))]
#[path = "../pgrx-tests/job.rs"]
mod job_tests;
#[cfg(any(test, feature = "pg_test"))]
#[path = "../pgrx-tests/lease.rs"]
mod lease_tests;
#[cfg(any(test, feature = "pg_test"))]
#[path = "../pgrx-tests/lock.rs"]
mod lock_tests;
#[cfg(any(test, feature = "pg_test"))]
#[path = "../pgrx-tests/projection.rs"]
mod projection_tests;
#[cfg(any(test, feature = "pg_test"))]
#[path = "../pgrx-tests/support.rs"]
mod support;
#[cfg(test)]
#[path = "../pgrx-tests/worker.rs"]
mod worker_tests;

/// What `cargo pgrx test` calls.
#[cfg(test)]
pub mod pg_test {
    pub fn setup(_options: Vec<&str>) {}

    #[must_use]
    pub fn postgresql_conf_options() -> Vec<&'static str> {
        vec![]
    }
}
