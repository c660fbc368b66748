//! Projections: a name, an optional filter, and a cursor per tenant that one transaction at a time advances.
//!
//! Invariant: a committed cursor is a settled position, and every event at or below it that passes the filter was in exactly one
//! claimed batch whose transaction committed an advance past it.
//!
//! A claim's steps, and what each prevents:
//! 1. PROJECTION_ALL shared: `projection_alter` and `projection_drop` do not cut into a claim;
//! 2. PROJECTION exclusive, until the transaction ends: two workers do not apply the same events;
//! 3. the cursor, read with a snapshot taken after the lock: a snapshot from before would show the cursor of before the last
//!    worker's commit, and its events would be applied twice;
//! 4. the barrier or the horizon, then a fresh snapshot (`event_log/settle.rs`): no event is passed.

mod claim;
mod cursor;
mod definition;
mod due;
mod failure;
mod held;
mod run;

use pgrx::datum::Interval;
use pgrx::prelude::*;
use std::time::Duration;

use crate::argument;
use crate::error::{Error, OrRaise};
use crate::event_log::Filter;
use crate::event_log::settle;
use crate::position::Position;
use crate::rights::{Procedure, Role};
use crate::snapshot;
use crate::spi::Events;
use crate::subtransaction::Failure;
use crate::wakeup::{self, Event};
use failure::Verdict;
use run::Runner;

pub use due::{count_for_workers, for_workers, next_retries};
pub use run::{Report, Status};

/// A worker's batch, as the current user, who must own the projection. `careful`: one event, and what it defers is checked.
pub fn run_for_worker(
    projection: &str,
    tenant: &str,
    max_duration: Duration,
    careful: bool,
) -> Result<Report, Error> {
    let request = claim::Request {
        projection,
        tenant,
        max_events: careful.then_some(1),
        max_position: None,
        barrier: false,
        wait: false,
    };
    let runner = if careful {
        Runner::CarefulWorker
    } else {
        Runner::Worker
    };
    run::run(&request, Some(max_duration), runner)
}

/// Creates a projection, owned by the caller; true if it did, false if it was there and `if_not_exists` is true.
///
/// `aggregate_types` and `event_types` (NULL or empty: all) are ANDed. `start_after` NULL: after what each tenant has settled
/// now, without waiting; tenants that appear later start at 0. `handler` takes one argument, `lockstep.events` or
/// `lockstep.events[]`. Raises 42710 if it exists, 22023 for bad values.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::too_many_arguments)]
fn projection_create(
    name: Option<&str>,
    aggregate_types: default!(Option<Vec<Option<String>>>, "NULL"),
    event_types: default!(Option<Vec<Option<String>>>, "NULL"),
    handler: default!(Option<Procedure>, "NULL"),
    batch_size: default!(Option<i32>, 200),
    max_failures: default!(Option<i32>, 5),
    retry_after: default!(Option<Interval>, "'1 second'"),
    start_after: default!(Option<AnyNumeric>, 0),
    if_not_exists: default!(Option<bool>, false),
) -> bool {
    let run = || {
        let filter = Filter {
            aggregate_types: argument::filter("aggregate_types", aggregate_types)?,
            event_types: argument::filter("event_types", event_types)?,
        };
        let new = definition::NewProjection {
            name: argument::name("name", name)?,
            filter,
            handler: definition::handler_name(handler)?,
            batch_size: argument::positive(
                "batch_size",
                argument::required("batch_size", batch_size)?,
            )?,
            max_failures: argument::positive(
                "max_failures",
                argument::required("max_failures", max_failures)?,
            )?,
            retry_after: argument::not_negative(
                "retry_after",
                argument::required("retry_after", retry_after)?,
            )?,
            start_after: argument::optional_position("start_after", start_after)?,
        };
        let if_not_exists = argument::required("if_not_exists", if_not_exists)?;
        definition::create(&new, if_not_exists)
    };
    run().or_raise()
}

/// Changes a projection. NULL keeps what is there; `'{}'` clears a filter, `'-'` the handler.
///
/// Waits for running claims, obeying lock_timeout. Raises 42704 if there is none, 42501 unless the caller is a member of the
/// owner, 25000 in a transaction that has pushed.
#[pg_extern(volatile, parallel_unsafe)]
fn projection_alter(
    name: Option<&str>,
    aggregate_types: default!(Option<Vec<Option<String>>>, "NULL"),
    event_types: default!(Option<Vec<Option<String>>>, "NULL"),
    handler: default!(Option<Procedure>, "NULL"),
    batch_size: default!(Option<i32>, "NULL"),
    max_failures: default!(Option<i32>, "NULL"),
    retry_after: default!(Option<Interval>, "NULL"),
) {
    let run = || {
        let name = argument::name("name", name)?;
        let changes = definition::Changes {
            aggregate_types: definition::filter_change("aggregate_types", aggregate_types)?,
            event_types: definition::filter_change("event_types", event_types)?,
            handler: match handler {
                None => None,
                given => Some(definition::handler_name(given)?),
            },
            batch_size: argument::optional_positive("batch_size", batch_size)?,
            max_failures: argument::optional_positive("max_failures", max_failures)?,
            retry_after: retry_after
                .map(|value| argument::not_negative("retry_after", value))
                .transpose()?,
        };
        definition::alter(name, changes)
    };
    run().or_raise()
}

/// Removes a projection and its cursors. Waits for running claims, obeying lock_timeout. Raises 42704 if there is none, 42501
/// unless the caller is a member of the owner, 25000 in a transaction that has pushed.
#[pg_extern(volatile, parallel_unsafe)]
fn projection_drop(name: Option<&str>) {
    let run = || definition::drop(argument::name("name", name)?);
    run().or_raise()
}

/// Gives a projection to another role. The caller must be a member of both, else 42501. Raises 42704 if there is none.
#[pg_extern(volatile, parallel_unsafe)]
fn projection_owner(name: Option<&str>, owner: Option<Role>) {
    let run = || {
        let name = argument::name("name", name)?;
        definition::set_owner(name, argument::required("owner", owner)?)
    };
    run().or_raise()
}

/// Takes the projection for this transaction and returns the next events after its cursor, at most `max_events` (NULL: the
/// projection's batch_size), none above `max_position`. Apply them in later statements of the same transaction and call
/// `projection_advance`; without that, or after a rollback, the same events come again.
///
/// `wait => false`: no rows if another transaction has it; `true`: waits for that one, obeying lock_timeout. `barrier => true`
/// waits for the pushes in flight, `false` reads below them. `projection_claim_state` tells why there are no rows. Raises 42704
/// if there is none, 25000 in REPEATABLE READ and SERIALIZABLE, and with `wait => true` in a transaction that has pushed.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn projection_claim(
    name: Option<&str>,
    max_events: default!(Option<i32>, "NULL"),
    max_position: default!(Option<AnyNumeric>, "NULL"),
    barrier: default!(Option<bool>, true),
    wait: default!(Option<bool>, false),
    tenant: default!(Option<&str>, "''"),
) -> Events {
    let run = || {
        let request = claim::Request {
            projection: argument::name("name", name)?,
            max_events: argument::optional_positive("max_events", max_events)?,
            max_position: argument::optional_position("max_position", max_position)?,
            barrier: argument::required("barrier", barrier)?,
            wait: argument::required("wait", wait)?,
            tenant: argument::tenant(tenant)?,
        };
        claim::claim(&request)
    };
    run().or_raise()
}

/// Tells how this transaction's last claim of the projection went: `claimed`; `busy` (another transaction has it, or all places
/// of `lockstep.max_parallel_claims` are taken); `paused`; `backoff` (an event failed a short time ago); or `none` (nothing to
/// apply, or not claimed at all). `more`: events were left within the claim's bounds.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn projection_claim_state(
    name: Option<&str>,
    tenant: default!(Option<&str>, "''"),
) -> TableIterator<'static, (name!(status, &'static str), name!(more, bool))> {
    let run = || {
        let name = argument::name("name", name)?;
        claim::state(name, argument::tenant(tenant)?)
    };
    TableIterator::once(run().or_raise())
}

/// Moves the cursor to `up_to`, an event of the claimed batch (NULL: the whole batch), and returns where it is. Takes effect
/// with the transaction. Raises LS002 unless this transaction holds the claim, 22023 if `up_to` is not an event of the batch.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn projection_advance(
    name: Option<&str>,
    up_to: default!(Option<AnyNumeric>, "NULL"),
    tenant: default!(Option<&str>, "''"),
) -> Position {
    let run = || {
        let name = argument::name("name", name)?;
        let up_to = argument::optional_position("up_to", up_to)?;
        claim::advance(name, argument::tenant(tenant)?, up_to)
    };
    run().or_raise()
}

/// Counts a failure of an event of the claimed batch and puts the cursor just before it (`retry`: commit; claims give no rows
/// until `retry_after` has passed, doubled for each failure more, at most 5 minutes) or, at `max_failures`, past it (`skip`: go
/// on). The events before it are kept: they must have been applied. Call it after rolling back to the savepoint in which the
/// event was applied. Raises LS002 unless this transaction holds the claim, and after a `retry`; 22023 if `event_position` is
/// not an event of the batch.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn projection_fail(
    name: Option<&str>,
    event_position: Option<AnyNumeric>,
    error: Option<&str>,
    tenant: default!(Option<&str>, "''"),
) -> &'static str {
    let run = || {
        let name = argument::name("name", name)?;
        let position = argument::position("event_position", event_position)?;
        let failure = Failure {
            sqlstate: None,
            message: argument::required("error", error)?.to_owned(),
            context: None,
        };
        let tenant = argument::tenant(tenant)?;
        held::refuse_in_handler(name, tenant)?;
        failure::fail(name, tenant, position, &failure).map(Verdict::as_str)
    };
    run().or_raise()
}

/// Claims the projection's next events, applies them with its handler and advances, with the caller's rights.
///
/// `status`: `ok`; `failed` (an event failed and will be retried, or the handler is gone); `busy`, `paused`, `backoff` as
/// `projection_claim_state`. `processed` and `skipped` count events; `position` is the cursor; `more`: events were left.
/// A handler of one event stops after the one that passes `max_duration`. An event's error is kept in
/// `lockstep.failed_events`; cancel and statement_timeout are not caught. Raises 55000 without a handler, 42501
/// where the caller may not call it, else as `projection_claim`. What a handler defers to COMMIT (deferred constraints and
/// triggers) fails the COMMIT, not the event.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity)]
fn projection_run(
    name: Option<&str>,
    max_events: default!(Option<i32>, "NULL"),
    barrier: default!(Option<bool>, true),
    max_duration: default!(Option<Interval>, "NULL"),
    tenant: default!(Option<&str>, "''"),
) -> TableIterator<
    'static,
    (
        name!(status, &'static str),
        name!(processed, i64),
        name!(skipped, i64),
        name!(position, Position),
        name!(more, bool),
    ),
> {
    let run = || {
        let request = claim::Request {
            projection: argument::name("name", name)?,
            max_events: argument::optional_positive("max_events", max_events)?,
            max_position: None,
            barrier: argument::required("barrier", barrier)?,
            wait: false,
            tenant: argument::tenant(tenant)?,
        };
        let max_duration = max_duration
            .map(|value| argument::duration("max_duration", value))
            .transpose()?;
        // Before the claim refuses the same under its own name.
        snapshot::require_read_write("projection_run")?;
        snapshot::require_read_committed("projection_run")?;
        let report = run::run(&request, max_duration, Runner::Session)?;
        Ok::<_, Error>((
            report.status.as_str(),
            report.processed,
            report.skipped,
            report.position,
            report.more,
        ))
    };
    TableIterator::once(run().or_raise())
}

/// Waits until the projection's cursor is at or above `up_to`: true; false when `timeout` is over before. It looks when the
/// cursor has moved; without the library preloaded, every `lockstep.poll_interval`. Raises 42704 if there is no such projection, 25000 in REPEATABLE READ and SERIALIZABLE and in a
/// transaction that has pushed.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn projection_wait(
    name: Option<&str>,
    up_to: Option<AnyNumeric>,
    timeout: default!(Option<Interval>, "'5 seconds'"),
    tenant: default!(Option<&str>, "''"),
) -> bool {
    let run = || {
        let name = argument::name("name", name)?;
        let up_to = argument::position("up_to", up_to)?;
        let timeout = argument::duration("timeout", argument::required("timeout", timeout)?)?;
        let tenant = argument::tenant(tenant)?;
        snapshot::require_primary("projection_wait")?;
        snapshot::require_read_committed("projection_wait")?;
        settle::refuse_after_push("projection_wait()")?;
        let advanced = Event::Advanced {
            projection: name,
            tenant,
        };
        wakeup::wait_until(&advanced, timeout, || {
            Ok(cursor::read(name, tenant)?.cursor >= up_to)
        })
    };
    run().or_raise()
}

/// Puts the cursor of one tenant at `up_to`: 0, or a settled event. The events after it will be applied again. Waits for a
/// running claim, obeying lock_timeout. Raises 42704, 42501 unless the caller is a member of the owner, 22023, and 25000 in
/// REPEATABLE READ and SERIALIZABLE and in a transaction that has pushed.
#[pg_extern(volatile, parallel_unsafe)]
fn projection_reset(
    name: Option<&str>,
    up_to: default!(Option<AnyNumeric>, 0),
    tenant: default!(Option<&str>, "''"),
) {
    let run = || {
        let name = argument::name("name", name)?;
        let up_to = argument::position("up_to", up_to)?;
        definition::reset(name, argument::tenant(tenant)?, up_to)
    };
    run().or_raise()
}

/// Makes later claims of the projection in the tenant (NULL: in every tenant) give no rows, until `projection_resume`. Does not
/// wait for a running claim. Raises 42704, and 42501 unless the caller is a member of the owner.
#[pg_extern(volatile, parallel_unsafe)]
fn projection_pause(name: Option<&str>, tenant: default!(Option<&str>, "NULL")) {
    let run = || {
        let name = argument::name("name", name)?;
        let tenant = argument::any_tenant(tenant)?;
        definition::set_paused("projection_pause", name, tenant, true)
    };
    run().or_raise()
}

/// Undoes `projection_pause` in the tenant (NULL: in every tenant). Raises 42704, and 42501 unless the caller is a member of the
/// owner.
#[pg_extern(volatile, parallel_unsafe)]
fn projection_resume(name: Option<&str>, tenant: default!(Option<&str>, "NULL")) {
    let run = || {
        let name = argument::name("name", name)?;
        let tenant = argument::any_tenant(tenant)?;
        definition::set_paused("projection_resume", name, tenant, false)
    };
    run().or_raise()
}

/// Applies one skipped event again, with the projection's handler and the caller's rights, under the projection's lock: true
/// if it succeeded (its row in `lockstep.failed_events` is gone), false if it failed again (the row says how). Waits for a
/// running claim, obeying lock_timeout. Raises 42704; 22023 if the event has not failed; 55000 if it has not been skipped or
/// there is no handler; 25000 in REPEATABLE READ and SERIALIZABLE and in a transaction that has pushed.
#[pg_extern(volatile, parallel_unsafe)]
fn failed_event_retry(
    name: Option<&str>,
    event_position: Option<AnyNumeric>,
    tenant: default!(Option<&str>, "''"),
) -> bool {
    let run = || {
        let name = argument::name("name", name)?;
        let position = argument::position("event_position", event_position)?;
        failure::retry(name, argument::tenant(tenant)?, position)
    };
    run().or_raise()
}

/// Removes a skipped event from `lockstep.failed_events`. Waits for a running claim, obeying lock_timeout. Raises 42704; 22023 if
/// the event has not failed; 55000 if it has not been skipped; 25000 in REPEATABLE READ and SERIALIZABLE and in a transaction
/// that has pushed.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn failed_event_discard(
    name: Option<&str>,
    event_position: Option<AnyNumeric>,
    tenant: default!(Option<&str>, "''"),
) {
    let run = || {
        let name = argument::name("name", name)?;
        let position = argument::position("event_position", event_position)?;
        failure::discard(name, argument::tenant(tenant)?, position)
    };
    run().or_raise()
}

/// Lists the (projection, tenant) pairs that have settled events after their cursor and are not claimed by another transaction,
/// the one with the oldest such event first, at most `max_rows`. `names` NULL: all projections; 42704 for an unknown one.
/// Waits for nobody.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn projection_due(
    names: default!(Option<Vec<Option<String>>>, "NULL"),
    max_rows: default!(Option<i32>, 100),
) -> TableIterator<'static, (name!(name, String), name!(tenant, String))> {
    let run = || {
        let names = match names {
            None => None,
            given => Some(argument::filter("names", given)?.unwrap_or_default()),
        };
        let max_rows = argument::positive("max_rows", argument::required("max_rows", max_rows)?)?;
        due::due(names, max_rows as usize)
    };
    TableIterator::new(run().or_raise())
}

/// Lists the claims held: projection, tenant, and the backend's pid, NULL for a prepared transaction. A claim in a tenant without
/// events and cursor is not listed. What `lockstep.projection_status` is made of.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn projection_locks() -> TableIterator<
    'static,
    (
        name!(projection, String),
        name!(tenant, String),
        name!(pid, Option<i32>),
    ),
> {
    let row = |held: due::Held| {
        let pid = Some(held.holder.pid).filter(|pid| *pid != 0);
        (held.projection, held.tenant, pid)
    };
    TableIterator::new(
        due::claims()
            .or_raise()
            .into_iter()
            .map(row)
            .collect::<Vec<_>>(),
    )
}
