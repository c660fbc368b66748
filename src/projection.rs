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
mod definition;
mod due;

use pgrx::datum::Interval;
use pgrx::prelude::*;

use crate::argument;
use crate::error::OrRaise;
use crate::event_log::Filter;
use crate::position::Position;
use crate::rights::{Procedure, Role};
use crate::spi::Events;

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
            start_after: start_after
                .map(|start| Position::from_argument("start_after", &start))
                .transpose()?,
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
            batch_size: batch_size
                .map(|value| argument::positive("batch_size", value))
                .transpose()?,
            max_failures: max_failures
                .map(|value| argument::positive("max_failures", value))
                .transpose()?,
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
            max_events: max_events
                .map(|value| argument::positive("max_events", value))
                .transpose()?,
            max_position: max_position
                .map(|value| Position::from_argument("max_position", &value))
                .transpose()?,
            barrier: argument::required("barrier", barrier)?,
            wait: argument::required("wait", wait)?,
            tenant: argument::tenant(tenant)?,
        };
        claim::claim(&request)
    };
    run().or_raise()
}

/// Tells how this transaction's last claim of the projection went: `claimed`, `busy`, or `none` (nothing to apply, or not claimed
/// at all); `more`: events were left within the claim's bounds.
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
        let up_to = up_to
            .map(|position| Position::from_argument("up_to", &position))
            .transpose()?;
        claim::advance(name, argument::tenant(tenant)?, up_to)
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
