//! `lockstep`: an event log, projections, leases, generations and jobs whose locking PostgreSQL enforces.
//! This file lists the modules and the order of the SQL; it holds no logic.

use pgrx::prelude::*;

pgrx::pg_module_magic!();

mod argument;
mod error;
mod event_log;
mod guc;
mod jsonb;
mod lock;
mod position;
mod projection;
mod rights;
mod sequence;
mod snapshot;
mod spi;

extension_sql_file!("../sql/event_log.sql", name = "event_log", bootstrap);
extension_sql_file!(
    "../sql/projection.sql",
    name = "projection",
    requires = ["event_log"]
);
extension_sql_file!("../sql/privileges.sql", name = "privileges", finalize);

#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    guc::register();
}
