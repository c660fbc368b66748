//! What an operator does after a failover or a point-in-time recovery that lost commits. It concerns every topic.

use pgrx::prelude::*;

use crate::error::{Error, OrRaise};
use crate::job;
use crate::sequence::{TICKET, TOKEN};
use crate::snapshot;

/// More than any server can have handed out without its standby or archive knowing of it.
const GAP: i64 = 1 << 32;

/// Raises the ticket and every token by 2^32, so that no position or token that a lost commit had is given again, and no token that
/// was handed out before counts any more: each holder has to acquire again. For use once after a failover or a point-in-time recovery
/// that lost commits. Waits, obeying lock_timeout, for the pushes, acquisitions and renewals in flight; they wait for it until its
/// transaction ends.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn after_data_loss() {
    let run = || {
        snapshot::require_read_write("after_data_loss")?;
        TICKET.raise(|value| value.saturating_add(GAP));
        TOKEN.raise(|value| value.saturating_add(GAP));
        job::raise_tokens(GAP);
        Ok::<_, Error>(())
    };
    run().or_raise()
}
