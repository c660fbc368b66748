//! The writer's side of the protocol. The order of the steps is the guarantee:
//!
//! 1. validate everything: an error found here has locked nothing;
//! 2. AGGREGATE and UNIQUE_KEY locks, in one sorted order: two pushes that need the same ones cannot deadlock;
//! 3. read the aggregates' sequences with a snapshot taken after the locks: one from before would not show what the locks'
//!    last holder committed, and the push would take a sequence that is taken;
//! 4. event ids, expected sequences, unique keys;
//! 5. WRITER_START and WRITER: whatever can wait for another transaction is done, so a push never waits while readers may be
//!    waiting for it;
//! 6. the ticket, drawn under WRITER, so that no reader's cut can be at or above it without the reader seeing the writer;
//! 7. insert.
//!
//! Event ids come before expected sequences, so that a push repeated because the answer to its COMMIT was lost is told 23505
//! and not LS001, whatever it expects.
//!
//! A ticket must also be above the log, or the events would land among those that projections have passed. Pushes alone keep
//! it so, but what else writes the log (a logical replication, a partial restore) leaves the sequence behind: each push looks.

use pgrx::Uuid;
use pgrx::datum::{IntoDatum, TimestampWithTimeZone};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ffi::CStr;

use super::input::NewEvent;
use super::unique;
use crate::error::Error;
use crate::guc;
use crate::lock::{self, Mode, Tag};
use crate::lookup::{Key, Lookup};
use crate::position::Position;
use crate::sequence;
use crate::snapshot::{self, At};
use crate::spi::{Arg, Plan, Spi};
use crate::wakeup;
use crate::write::Writer;

/// The table, and the columns of it that are looked up without SQL.
const EVENTS: &CStr = c"events";
const POSITION: i16 = 2;
const SEQUENCE: i16 = 5;

pub struct Pushed {
    pub position: Position,
    pub sequence: i64,
    pub created_at: TimestampWithTimeZone,
}

/// The aggregates of a push, each once, and which of them each event belongs to.
struct Aggregates<'a> {
    names: Vec<(&'a str, &'a str)>,
    of_event: Vec<usize>,
}

/// Pushes the events and returns where each went, in order.
pub fn push(
    function: &'static str,
    tenant: &str,
    events: &[NewEvent],
) -> Result<impl Iterator<Item = Pushed> + use<>, Error> {
    snapshot::require_read_write(function)?;
    let aggregates = Aggregates::of(events);
    lock::acquire_sorted(tags(tenant, events, &aggregates)?);

    let log = Lookup::to_write(EVENTS, At::Latest);
    let last = read_sequences(&log, tenant, &aggregates)?;
    refuse_known_event_ids(tenant, events)?;
    let sequences = assign_sequences(events, &aggregates, last)?;
    let unique_keys = unique::plan(tenant, events)?;

    let start = lock_writer(tenant);
    refuse_log_above(log, tenant, start)?;
    let ticket = sequence::TICKET.next();
    if ticket <= start {
        // Not with CACHE 1, unless someone set the sequence back just now.
        return Err(Error::TicketNotAbove {
            ticket,
            value: start,
        });
    }
    let created_at = pgrx::datum::clock_timestamp();
    unique_keys.apply(tenant, |event| Position::new(ticket, event))?;
    insert(tenant, ticket, created_at, events, &sequences);

    Ok(sequences
        .into_iter()
        .enumerate()
        .map(move |(index, sequence)| Pushed {
            position: Position::new(ticket, index),
            sequence,
            created_at,
        }))
}

impl<'a> Aggregates<'a> {
    fn of(events: &[NewEvent<'a>]) -> Self {
        let mut names = Vec::new();
        let mut known = HashMap::new();
        let of_event = events
            .iter()
            .map(|event| {
                let name = (event.aggregate_type, event.aggregate_id);
                *known.entry(name).or_insert_with(|| {
                    names.push(name);
                    names.len() - 1
                })
            })
            .collect();
        Aggregates { names, of_event }
    }
}

/// The locks of the push, each once.
fn tags(tenant: &str, events: &[NewEvent], aggregates: &Aggregates) -> Result<Vec<Tag>, Error> {
    let names = aggregates.names.iter();
    let mut tags: Vec<Tag> = names
        .map(|(aggregate_type, aggregate_id)| Tag::aggregate(tenant, aggregate_type, aggregate_id))
        .collect();
    for event in events {
        let operations = event.unique.iter();
        tags.extend(operations.flat_map(|operation| operation.tags(tenant)));
        let event_id = event.event_id;
        tags.extend(event_id.map(|id| Tag::event_id(tenant, id.as_bytes())));
    }
    tags.sort_unstable(); // only to count each once; lock.rs decides the order
    tags.dedup();
    let limit = guc::MAX_AGGREGATES_PER_PUSH.get() as usize;
    if tags.len() > limit {
        return Err(Error::TooManyKeys {
            given: tags.len(),
            limit,
        });
    }
    Ok(tags)
}

/// The last sequence of each aggregate; 0 for a new one. Under a transaction snapshot the push must not build on what that
/// snapshot does not show: it compares the two.
fn read_sequences(log: &Lookup, tenant: &str, aggregates: &Aggregates) -> Result<Vec<i64>, Error> {
    let latest = sequences_in(log, tenant, aggregates);
    if snapshot::is_transaction_snapshot() {
        let seen = Lookup::to_write(EVENTS, At::Transaction);
        let seen = sequences_in(&seen, tenant, aggregates);
        if let Some(index) = (0..latest.len()).find(|&index| seen[index] != latest[index]) {
            let (aggregate_type, aggregate_id) = aggregates.names[index];
            return Err(Error::SerializationFailure(format!(
                "Aggregate \"{aggregate_type}/{aggregate_id}\" is at sequence {}, in the transaction's snapshot at {}.",
                latest[index], seen[index]
            )));
        }
    }
    Ok(latest)
}

fn sequences_in(log: &Lookup, tenant: &str, aggregates: &Aggregates) -> Vec<i64> {
    let mut walk = log.walk_to_seek(c"events_pkey", 3);
    let mut last = |(aggregate_type, aggregate_id): &(&str, &str)| {
        walk.seek(&[
            Key::equal(1, tenant),
            Key::equal(2, *aggregate_type),
            Key::equal(3, *aggregate_id),
        ]);
        walk.step_back().and_then(|row| row.get(SEQUENCE))
    };
    let names = aggregates.names.iter();
    names.map(|name| last(name).unwrap_or(0)).collect()
}

/// The events' ids are locked, so one that is not in the log now will not be there before this transaction ends.
fn refuse_known_event_ids(tenant: &str, events: &[NewEvent]) -> Result<(), Error> {
    static KNOWN: Plan = Plan::new(
        "SELECT e.event_id FROM lockstep.events AS e
         WHERE e.tenant = $1 AND e.event_id = ANY ($2) AND e.event_id IS NOT NULL LIMIT 1",
    );
    let ids: Vec<Uuid> = events.iter().filter_map(|event| event.event_id).collect();
    if ids.is_empty() {
        return Ok(());
    }
    let mut seen = HashSet::new();
    let repeated = ids.iter().copied().find(|id| !seen.insert(*id.as_bytes()));
    let known = repeated.or_else(|| {
        Spi::connect()
            .read(&KNOWN, At::Latest, &[Arg::from(tenant), Arg::from(ids)])
            .get(0, 1)
    });
    known.map_or(Ok(()), |id| {
        Err(Error::UniqueViolation {
            constraint: "events_tenant_event_id_key",
            key: format!("(tenant, event_id)=({tenant}, {id})"),
        })
    })
}

/// Gives each event the next sequence of its aggregate.
fn assign_sequences(
    events: &[NewEvent],
    aggregates: &Aggregates,
    mut last: Vec<i64>,
) -> Result<Vec<i64>, Error> {
    events
        .iter()
        .zip(&aggregates.of_event)
        .map(|(event, &aggregate)| {
            let actual = last[aggregate];
            if let Some(expected) = event.expected_sequence
                && expected != actual
            {
                return Err(Error::SequenceConflict {
                    aggregate_type: event.aggregate_type.to_owned(),
                    aggregate_id: event.aggregate_id.to_owned(),
                    actual,
                    expected,
                });
            }
            last[aggregate] += 1;
            Ok(last[aggregate])
        })
        .collect()
}

/// `value`: the sequence's value. An event above it is no sign of a sequence that was left behind if it comes from a push that
/// was faster than this one: then the sequence's value, read after the event was seen, is not below it.
///
/// In SERIALIZABLE a backend looks only at its first push to a tenant and when the sequence went back: the look takes a
/// predicate lock on the end of the log, where every other push of the tenant inserts, and would conflict with them all.
fn refuse_log_above(log: Lookup, tenant: &str, value: i64) -> Result<(), Error> {
    thread_local! {
        /// By tenant: the sequence's value at this backend's last push in SERIALIZABLE.
        static LOOKED: RefCell<HashMap<String, i64>> = RefCell::default();
    }
    let serializable = snapshot::is_serializable();
    let looked = || LOOKED.with_borrow(|looked| looked.get(tenant).is_some_and(|&at| at <= value));
    if !(serializable && looked()) {
        let keys = [
            Key::equal(1, tenant),
            Key::above(2, Position::last_of(value)),
        ];
        let mut walk = log.walk(c"events_tenant_position_key", &keys);
        let last: Option<Position> = walk.step_back().and_then(|row| row.get(POSITION));
        let above = last.map(Position::ticket);
        if let Some(head) = above
            && head > sequence::TICKET.value()
        {
            return Err(Error::TicketBehindLog {
                value,
                head,
                tenant: tenant.to_owned(),
            });
        }
    }
    if serializable {
        LOOKED.with_borrow_mut(|looked| looked.insert(tenant.to_owned(), value));
    }
    Ok(())
}

/// Once per transaction and tenant: a second push is covered by the start of the first. Returns the sequence's value just
/// before.
fn lock_writer(tenant: &str) -> i64 {
    let start = sequence::TICKET.value();
    let writer = Tag::writer(tenant);
    if !writer.is_held(Mode::Shared) {
        Tag::writer_start(tenant, start).acquire(Mode::Shared);
        writer.acquire(Mode::Shared);
        wakeup::announce_push(tenant);
    }
    start
}

/// The columns of the log in their order.
const COLUMNS: usize = 10;

fn insert(
    tenant: &str,
    ticket: i64,
    created_at: TimestampWithTimeZone,
    events: &[NewEvent],
    sequences: &[i64],
) {
    static INSERT: Plan = Plan::new(
        "INSERT INTO lockstep.events (tenant, created_at, position, aggregate_type, aggregate_id, sequence,
                                      event_type, event_id, payload, metadata)
         SELECT $1, $2, e.* FROM unnest($3::numeric[], $4::text[], $5::text[], $6::bigint[],
                                        $7::text[], $8::uuid[], $9::jsonb[], $10::jsonb[]) AS e",
    );
    let positions = (0..events.len()).map(|index| Position::new(ticket, index));
    if let Some(mut log) = Writer::<COLUMNS>::of(EVENTS) {
        let (tenant, created_at) = (tenant.into_datum(), created_at.into_datum());
        for ((event, position), sequence) in events.iter().zip(positions).zip(sequences) {
            log.insert([
                tenant,
                position.into_datum(),
                event.aggregate_type.into_datum(),
                event.aggregate_id.into_datum(),
                sequence.into_datum(),
                event.event_type.into_datum(),
                event.event_id.into_datum(),
                event.payload.into_datum(),
                event.metadata.into_datum(),
                created_at,
            ]);
        }
        return;
    }
    let events = events.iter();
    let args = [
        Arg::from(tenant),
        Arg::from(created_at),
        Arg::from(positions.collect::<Vec<_>>()),
        Arg::from(events.clone().map(|e| e.aggregate_type).collect::<Vec<_>>()),
        Arg::from(events.clone().map(|e| e.aggregate_id).collect::<Vec<_>>()),
        Arg::from(sequences.to_vec()),
        Arg::from(events.clone().map(|e| e.event_type).collect::<Vec<_>>()),
        Arg::from(events.clone().map(|e| e.event_id).collect::<Vec<_>>()),
        Arg::from(events.clone().map(|e| e.payload).collect::<Vec<_>>()),
        Arg::from(events.map(|e| e.metadata).collect::<Vec<_>>()),
    ];
    Spi::connect().write(&INSERT, &args);
}
