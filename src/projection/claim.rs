//! Claiming a batch and advancing past it.
//!
//! What a transaction has claimed is kept in the backend's memory and follows its savepoints exactly as the locks do: rolling
//! back past a claim forgets the claim and releases its lock. The steps of a claim are in `projection.rs`.

use pgrx::{
    PgSubXactCallbackEvent, PgXactCallbackEvent, pg_sys, register_subxact_callback,
    register_xact_callback,
};
use std::cell::{Cell, RefCell};

use crate::error::Error;
use crate::event_log::settle;
use crate::event_log::{Filter, Range, last_position, position_of_nth, scan};
use crate::guc;
use crate::lock::{Mode, Tag};
use crate::position::Position;
use crate::snapshot::{self, At};
use crate::spi::{Arg, Events, Plan, Spi};

pub struct Request<'a> {
    pub projection: &'a str,
    pub tenant: &'a str,
    pub max_events: Option<i32>,
    pub max_position: Option<Position>,
    pub barrier: bool,
    pub wait: bool,
}

/// How a claim went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// A batch, up to and with the event at `last`.
    Claimed { after: Position, last: Position },
    /// The lock, but no event; the cursor is at `position`.
    None { position: Position },
    /// Another transaction has the lock.
    Busy,
    /// The definition was changed or dropped after the claim.
    Forgotten,
}

struct Claim {
    projection: String,
    tenant: String,
    outcome: Outcome,
    more: bool,
    /// The subtransaction that made it.
    level: pg_sys::SubTransactionId,
}

thread_local! {
    /// The running transaction's claims, oldest first.
    static CLAIMS: RefCell<Vec<Claim>> = const { RefCell::new(Vec::new()) };
    /// Whether the running transaction's end and savepoints are followed already.
    static FOLLOWING: Cell<bool> = const { Cell::new(false) };
}

pub fn claim(request: &Request) -> Result<Events, Error> {
    snapshot::require_read_write("projection_claim")?;
    snapshot::require_read_committed("projection_claim")?;
    if request.wait {
        settle::refuse_after_push("projection_claim(wait => true)")?;
    }
    if !lock(request) {
        remember(request.projection, request.tenant, Outcome::Busy, false);
        return Ok(Events::none());
    }
    let projection = read_projection(request.projection, request.tenant)?;
    let settled = settle::settle(request.tenant, request.barrier);
    let range = Range {
        after: projection.cursor,
        up_to: request
            .max_position
            .map_or(settled, |most| most.min(settled)),
    };
    let max_events = request.max_events.unwrap_or(projection.batch_size);
    Ok(claim_range(request, range, &projection.filter, max_events))
}

fn lock(request: &Request) -> bool {
    let all = Tag::projection_all(request.projection);
    let one = Tag::projection(request.projection, request.tenant);
    if request.wait {
        all.acquire(Mode::Shared);
        one.acquire(Mode::Exclusive);
        return true;
    }
    // Neither waits, so the order does not matter, and a busy claim leaves nothing locked.
    one.try_acquire(Mode::Exclusive) && all.try_acquire(Mode::Shared)
}

struct Projection {
    filter: Filter,
    batch_size: i32,
    cursor: Position,
}

fn read_projection(name: &str, tenant: &str) -> Result<Projection, Error> {
    static READ: Plan = Plan::new(
        "SELECT p.aggregate_types, p.event_types, p.batch_size,
                COALESCE((SELECT c.position FROM lockstep.projection_cursors AS c
                          WHERE c.projection = p.name AND c.tenant = $2), p.start_after)
         FROM lockstep.projections AS p WHERE p.name = $1",
    );
    let spi = Spi::connect();
    let rows = spi.read(&READ, At::Latest, &[Arg::from(name), Arg::from(tenant)]);
    if rows.count() == 0 {
        return Err(Error::UndefinedProjection(name.to_owned()));
    }
    Ok(Projection {
        filter: Filter {
            aggregate_types: rows.get(0, 1),
            event_types: rows.get(0, 2),
        },
        batch_size: rows.get(0, 3).unwrap_or(1),
        cursor: rows.get(0, 4).unwrap_or(Position::ZERO),
    })
}

/// Reads one event more than it hands out, to know whether there is more.
fn claim_range(request: &Request, range: Range, filter: &Filter, max_events: i32) -> Events {
    let scan_limit = i64::from(guc::CLAIM_SCAN_LIMIT.get());
    let wanted = max_events as usize;
    let mut events = scan(
        request.tenant,
        range,
        filter,
        max_events.saturating_add(1),
        (!filter.passes_all()).then_some(scan_limit),
    );
    let more = events.count() > wanted;
    events.truncate(wanted);
    // Fewer than wanted under a filter: the scan ended at its limit, or at the range's end.
    let limit = (!more && !filter.passes_all())
        .then(|| position_of_nth(request.tenant, range, scan_limit))
        .flatten();
    let beyond_limit =
        limit.is_some_and(|limit| last_position(request.tenant, range.up_to) > limit);
    match events.last_position() {
        Some(last) => {
            let after = range.after;
            remember(
                request.projection,
                request.tenant,
                Outcome::Claimed { after, last },
                more || beyond_limit,
            );
        }
        None => {
            let scanned = if filter.passes_all() {
                range.after
            } else {
                limit.unwrap_or_else(|| last_position(request.tenant, range.up_to))
            };
            let position = scanned.max(range.after);
            if position > range.after {
                move_cursor(request.projection, request.tenant, position);
            }
            remember(
                request.projection,
                request.tenant,
                Outcome::None { position },
                beyond_limit,
            );
        }
    }
    events
}

pub fn state(projection: &str, tenant: &str) -> Result<(&'static str, bool), Error> {
    snapshot::require_primary("projection_claim_state")?;
    Ok(
        last_claim(projection, tenant).map_or(("none", false), |(outcome, more)| {
            let status = match outcome {
                Outcome::Claimed { .. } => "claimed",
                Outcome::None { .. } | Outcome::Forgotten => "none",
                Outcome::Busy => "busy",
            };
            (status, more)
        }),
    )
}

pub fn advance(projection: &str, tenant: &str, up_to: Option<Position>) -> Result<Position, Error> {
    snapshot::require_read_write("projection_advance")?;
    let not_held = |detail| Error::ClaimNotHeld {
        projection: projection.to_owned(),
        tenant: tenant.to_owned(),
        detail,
    };
    let (after, last) = match last_claim(projection, tenant) {
        Some((Outcome::Claimed { after, last }, _)) => (after, last),
        Some((Outcome::None { position }, _)) => (position, position),
        Some((Outcome::Busy, _)) => {
            return Err(not_held("Its last claim found the projection busy."));
        }
        Some((Outcome::Forgotten, _)) => {
            return Err(not_held(
                "The projection was altered or dropped after the claim.",
            ));
        }
        None => {
            return Err(not_held("It made none, or rolled back past it."));
        }
    };
    let not_in_batch = |position| Error::InvalidParameter {
        message: format!(
            "up_to {position} is not the position of an event that this transaction claimed for projection \"{projection}\""
        ),
        detail: Some(format!("The claimed batch is after {after}, up to {last}.")),
        hint: Some(
            "Pass the position exactly as projection_claim returned it: as a decimal or as text, not as a float.",
        ),
    };
    let position = match up_to {
        None if last == after => return Ok(last),
        None => last,
        Some(position) if position == last && last > after => last,
        Some(position)
            if position > after && position < last && is_in_batch(projection, tenant, position) =>
        {
            position
        }
        Some(position) => return Err(not_in_batch(position)),
    };
    if !move_cursor(projection, tenant, position) {
        return Err(Error::invalid(format!(
            "up_to {position} is behind the cursor of projection \"{projection}\""
        )));
    }
    Ok(position)
}

/// Whether there is an event at the position that passes the projection's filter.
fn is_in_batch(projection: &str, tenant: &str, position: Position) -> bool {
    static EVENT: Plan = Plan::new(
        "SELECT FROM lockstep.events AS e, lockstep.projections AS p
         WHERE p.name = $1 AND e.tenant = $2 AND e.position = $3
           AND (p.aggregate_types IS NULL OR e.aggregate_type = ANY (p.aggregate_types))
           AND (p.event_types IS NULL OR e.event_type = ANY (p.event_types))",
    );
    let args = [
        Arg::from(projection),
        Arg::from(tenant),
        Arg::from(position),
    ];
    Spi::connect().read(&EVENT, At::Latest, &args).count() == 1
}

/// False if the cursor is already further.
fn move_cursor(projection: &str, tenant: &str, position: Position) -> bool {
    static UPSERT: Plan = Plan::new(
        "INSERT INTO lockstep.projection_cursors AS c (projection, tenant, position, advanced_at)
         SELECT p.name, $2, $3, pg_catalog.clock_timestamp() FROM lockstep.projections AS p WHERE p.name = $1
         ON CONFLICT (projection, tenant) DO UPDATE
         SET position = EXCLUDED.position, advanced_at = EXCLUDED.advanced_at
         WHERE c.position <= EXCLUDED.position",
    );
    let args = [
        Arg::from(projection),
        Arg::from(tenant),
        Arg::from(position),
    ];
    Spi::connect().write(&UPSERT, &args).count() == 1
}

fn last_claim(projection: &str, tenant: &str) -> Option<(Outcome, bool)> {
    CLAIMS.with_borrow(|claims| {
        claims
            .iter()
            .rev()
            .find(|claim| claim.projection == projection && claim.tenant == tenant)
            .map(|claim| (claim.outcome, claim.more))
    })
}

/// After this the transaction holds no claim on the projection, in any tenant.
pub fn forget(projection: &str) {
    let tenants: Vec<String> = CLAIMS.with_borrow(|claims| {
        let of_projection = claims.iter().filter(|claim| claim.projection == projection);
        of_projection.map(|claim| claim.tenant.clone()).collect()
    });
    for tenant in tenants {
        remember(projection, &tenant, Outcome::Forgotten, false);
    }
}

/// Replaces what the same subtransaction knew of the projection and tenant.
fn remember(projection: &str, tenant: &str, outcome: Outcome, more: bool) {
    let level = snapshot::current_level();
    CLAIMS.with_borrow_mut(|claims| {
        claims.retain(|claim| {
            claim.level != level || claim.projection != projection || claim.tenant != tenant
        });
        claims.push(Claim {
            projection: projection.to_owned(),
            tenant: tenant.to_owned(),
            outcome,
            more,
            level,
        });
    });
    if !FOLLOWING.replace(true) {
        follow_transaction();
    }
}

/// The claims live and die with the transaction and its savepoints, as the locks do.
fn follow_transaction() {
    for end in [
        PgXactCallbackEvent::Commit,
        PgXactCallbackEvent::Abort,
        PgXactCallbackEvent::Prepare,
    ] {
        register_xact_callback(end, || {
            CLAIMS.with_borrow_mut(Vec::clear);
            FOLLOWING.set(false);
        });
    }
    register_subxact_callback(PgSubXactCallbackEvent::AbortSub, |level, _| {
        CLAIMS.with_borrow_mut(|claims| claims.retain(|claim| claim.level != level));
    });
    register_subxact_callback(PgSubXactCallbackEvent::CommitSub, |level, parent| {
        CLAIMS.with_borrow_mut(|claims| {
            for claim in claims.iter_mut().filter(|claim| claim.level == level) {
                claim.level = parent;
            }
        });
    });
}
