//! The event log: appending events and reading what is settled.
//!
//! Invariant: a reader that has read up to a position has read every event below it that will ever be committed.
//! The interleavings that would break it, and the step that prevents each, are in `lock.rs`; the steps themselves are in
//! `push.rs` (the writer) and `settle.rs` (the reader).

mod input;
mod push;
mod read;
pub mod settle;
mod unique;

use input::NewEvent;
use pgrx::prelude::*;
use push::Pushed;
use std::collections::HashMap;

use crate::argument;
use crate::error::{Error, OrRaise};
use crate::jsonb::Jsonb;
use crate::lock;
use crate::lock::table::Holder;
use crate::position::Position;
use crate::sequence;
use crate::snapshot;
use crate::spi::{Columns, Events, Spi, Table};

pub use read::{
    Filter, Range, event_at, last_position, position_before, position_of_nth, scan, tenants,
};

/// Appends the events of the array `events` atomically, in order, and returns a row for each, in the order given.
///
/// Waits for other pushes to the same aggregates and unique keys, never for readers. Raises LS001 when an aggregate is not at an
/// `expected_sequence`; 23505 when a unique key or an `event_id` is taken; 22023 naming element and key for bad input; 54000 above
/// 1,000,000 events or `lockstep.max_aggregates_per_push` aggregates and keys; 40001 in REPEATABLE READ or SERIALIZABLE when an
/// aggregate moved; 55000 when the ticket sequence is behind the log. Optimistic concurrency by expected version is that of
/// event stores since Greg Young's; the order of the locks is this extension's own.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn push_events<'a>(
    events: Option<Jsonb<'a>>,
    tenant: default!(Option<&'a str>, "''"),
) -> Table<PushedEvents> {
    let run = || {
        let tenant = argument::tenant(tenant)?;
        let events = input::parse(argument::required("events", events)?)?;
        let pushed = push::push("push_events", tenant, &events)?;
        let row = |(pushed, event): (Pushed, &NewEvent)| {
            vec![
                pushed.position.into_datum(),
                event.aggregate_type.into_datum(),
                event.aggregate_id.into_datum(),
                pushed.sequence.into_datum(),
                pushed.created_at.into_datum(),
            ]
        };
        Ok::<_, Error>(Table::new(pushed.zip(&events).map(row).collect()))
    };
    run().or_raise()
}

struct PushedEvents;

impl Columns for PushedEvents {
    const SQL: &'static str = "TABLE (\"position\" numeric, aggregate_type text, aggregate_id text, sequence bigint, created_at timestamptz)";
}

/// Appends one event. As `push_events` with one element: what it waits for and raises.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
#[allow(clippy::too_many_arguments)]
fn push_event<'a>(
    aggregate_type: Option<&'a str>,
    aggregate_id: Option<&'a str>,
    event_type: Option<&'a str>,
    payload: default!(Option<Jsonb<'a>>, "NULL"),
    expected_sequence: default!(Option<i64>, "NULL"),
    metadata: default!(Option<Jsonb<'a>>, "NULL"),
    tenant: default!(Option<&'a str>, "''"),
) -> Table<PushedEvent> {
    let run = || {
        let tenant = argument::tenant(tenant)?;
        let event = NewEvent {
            aggregate_type: argument::name("aggregate_type", aggregate_type)?,
            aggregate_id: argument::name("aggregate_id", aggregate_id)?,
            event_type: argument::name("event_type", event_type)?,
            payload,
            metadata,
            expected_sequence: expected_sequence
                .map(|expected| input::not_below_zero("expected_sequence", expected))
                .transpose()?,
            event_id: None,
            unique: Vec::new(),
        };
        let pushed = push::push("push_event", tenant, std::slice::from_ref(&event))?;
        let row = |pushed: Pushed| {
            vec![
                pushed.position.into_datum(),
                pushed.sequence.into_datum(),
                pushed.created_at.into_datum(),
            ]
        };
        Ok::<_, Error>(Table::new(pushed.map(row).collect()))
    };
    run().or_raise()
}

struct PushedEvent;

impl Columns for PushedEvent {
    const SQL: &'static str =
        "TABLE (\"position\" numeric, sequence bigint, created_at timestamptz)";
}

/// Waits until every transaction that is pushing events to the tenant now has ended, and returns the position of the last
/// visible event (0 if there is none): every event at or below it is settled. Stalls nobody while it waits.
///
/// For a *later* statement: rows read in the same statement come from its older snapshot. Obeys lock_timeout for each writer
/// waited for. Raises 25000 in REPEATABLE READ and SERIALIZABLE and in a transaction that has itself pushed, 25006 on a standby.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn barrier(tenant: default!(Option<&str>, "''")) -> Position {
    let run = || {
        let tenant = argument::tenant(tenant)?;
        snapshot::require_primary("barrier")?;
        snapshot::require_read_committed("barrier")?;
        settle::refuse_after_push("barrier()")?;
        Ok::<_, Error>(read::last_position(tenant, settle::barrier(tenant)))
    };
    run().or_raise()
}

/// Returns the position of the last visible event below every push in flight (0 if there is none), without waiting: every event
/// at or below it is settled. It may lag behind a slow writer, never pass it.
///
/// For a *later* statement, as `barrier`. Raises 25000 in REPEATABLE READ and SERIALIZABLE, 25006 on a standby.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn horizon(tenant: default!(Option<&str>, "''")) -> Position {
    let run = || {
        let tenant = argument::tenant(tenant)?;
        snapshot::require_primary("horizon")?;
        snapshot::require_read_committed("horizon")?;
        Ok::<_, Error>(read::last_position(tenant, settle::horizon(tenant)))
    };
    run().or_raise()
}

/// Returns settled events after the position `after`, in order, at most `max_events`.
///
/// `barrier => true` waits for the pushes in flight, `false` reads below them; in a transaction that has itself pushed it never
/// waits. Raises 25000 in REPEATABLE READ and SERIALIZABLE. On a standby it returns what lies at or below the greatest cursor
/// of the tenant's projections.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn read_events(
    after: default!(Option<AnyNumeric>, 0),
    max_events: default!(Option<i32>, 1000),
    aggregate_types: default!(Option<Vec<Option<String>>>, "NULL"),
    event_types: default!(Option<Vec<Option<String>>>, "NULL"),
    barrier: default!(Option<bool>, true),
    tenant: default!(Option<&str>, "''"),
) -> Events {
    let run = || {
        let after = argument::position("after", after)?;
        let max_events =
            argument::positive("max_events", argument::required("max_events", max_events)?)?;
        let filter = Filter {
            aggregate_types: argument::filter("aggregate_types", aggregate_types)?,
            event_types: argument::filter("event_types", event_types)?,
        };
        let barrier = argument::required("barrier", barrier)?;
        let tenant = argument::tenant(tenant)?;
        if snapshot::in_recovery() {
            return Ok(read::on_standby(tenant, after, &filter, max_events));
        }
        snapshot::require_read_committed("read_events")?;
        let up_to = settle::settle(tenant, barrier);
        let range = read::Range { after, up_to };
        Ok::<_, Error>(scan(tenant, range, &filter, max_events, None))
    };
    run().or_raise()
}

/// Returns the events of one aggregate after `after_sequence`, in order, at most `max_events` (NULL: all), as the calling
/// statement's snapshot shows them. Waits for nobody.
#[pg_extern(security_definer, stable, parallel_restricted)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn aggregate_events(
    aggregate_type: Option<&str>,
    aggregate_id: Option<&str>,
    after_sequence: default!(Option<i64>, 0),
    max_events: default!(Option<i32>, "NULL"),
    tenant: default!(Option<&str>, "''"),
) -> Events {
    let run = || {
        let aggregate_type = argument::name("aggregate_type", aggregate_type)?;
        let aggregate_id = argument::name("aggregate_id", aggregate_id)?;
        let after = input::not_below_zero(
            "after_sequence",
            argument::required("after_sequence", after_sequence)?,
        )?;
        let max_events = argument::optional_positive("max_events", max_events)?;
        let tenant = argument::tenant(tenant)?;
        Ok::<_, Error>(read::aggregate(
            tenant,
            aggregate_type,
            aggregate_id,
            after,
            max_events,
        ))
    };
    run().or_raise()
}

/// Sets the ticket sequence above the log, where a logical replication or a partial restore left it behind, and returns its
/// value. Waits, obeying lock_timeout, for the pushes in flight; pushes wait for it until its transaction ends.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn ticket_resync() -> i64 {
    let run = || {
        snapshot::require_read_write("ticket_resync")?;
        Ok::<_, Error>(sequence::TICKET.raise(|_| read::last_ticket()))
    };
    run().or_raise()
}

/// Lists the pushes in flight (on a standby there are none): the tenant (NULL if none of its events is visible yet), the backend's pid, or the transaction id
/// if it is a prepared transaction, and the least position that its events can have. What `lockstep.writers` is made of.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
#[allow(clippy::type_complexity)]
fn writer_locks() -> TableIterator<
    'static,
    (
        name!(tenant, Option<String>),
        name!(pid, Option<i32>),
        name!(prepared_transaction, Option<i64>),
        name!(least_position, Position),
    ),
> {
    let run = || {
        if snapshot::in_recovery() {
            return Ok(Vec::new());
        }
        let by_key: HashMap<u32, String> = read::tenants(&Spi::connect())
            .into_iter()
            .map(|tenant| (lock::tenant_key(&tenant), tenant))
            .collect();
        let writer = |(key, position, holder): (u32, Position, Holder)| {
            (
                by_key.get(&key).cloned(),
                Some(holder.pid).filter(|pid| *pid != 0),
                holder.transaction_id.map(i64::from),
                position,
            )
        };
        Ok::<_, Error>(
            settle::Horizons::now()
                .writers()
                .map(writer)
                .collect::<Vec<_>>(),
        )
    };
    TableIterator::new(run().or_raise())
}
