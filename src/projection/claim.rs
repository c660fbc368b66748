//! Claiming a batch and advancing past it. The steps of a claim are in `projection.rs`.

use super::cursor;
use super::held::{self, Outcome};
use crate::error::Error;
use crate::event_log::settle;
use crate::event_log::{Filter, Range, last_position, position_of_nth, scan};
use crate::guc;
use crate::lock::{self, Mode, Tag};
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

impl Request<'_> {
    fn remember(&self, outcome: Outcome, more: bool) {
        held::remember(self.projection, self.tenant, outcome, more);
    }

    /// A claim that gives no events for this reason.
    fn refused(&self, outcome: Outcome) -> Events {
        self.remember(outcome, false);
        Events::none()
    }
}

pub fn claim(request: &Request) -> Result<Events, Error> {
    snapshot::require_read_write("projection_claim")?;
    snapshot::require_read_committed("projection_claim")?;
    if request.wait {
        settle::refuse_after_push("projection_claim(wait => true)")?;
    }
    if held::is_running(request.projection, request.tenant) {
        // Nothing is remembered: the run's own claim is still to be advanced or failed.
        return Ok(Events::none());
    }
    if !lock(request) {
        return Ok(request.refused(Outcome::Busy));
    }
    let projection = cursor::read(request.projection, request.tenant)?;
    if projection.paused || projection.retry_in.is_some() {
        unlock(request);
        return Ok(request.refused(if projection.paused {
            Outcome::Paused
        } else {
            Outcome::Backoff
        }));
    }
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
    // Neither waits, so the order does not matter.
    if !one.try_acquire(Mode::Exclusive) {
        return false;
    }
    if !all.try_acquire(Mode::Shared) {
        one.release(Mode::Exclusive);
        return false;
    }
    true
}

/// A claim that is refused leaves nothing locked.
fn unlock(request: &Request) {
    Tag::projection(request.projection, request.tenant).release(Mode::Exclusive);
    Tag::projection_all(request.projection).release(Mode::Shared);
}

/// A claim with events takes one of the places that all claims share. It does so after its barrier: while it waits for a slow
/// writer it takes no other claim's place.
fn take_place(request: &Request) -> bool {
    let places = guc::MAX_PARALLEL_CLAIMS.get() as u32;
    places == 0 || lock::acquire_slot(places, request.wait)
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
        Some(_) if !take_place(request) => {
            unlock(request);
            return request.refused(Outcome::Busy);
        }
        Some(last) => {
            let is_rest_scanned = !more && !filter.passes_all() && !beyond_limit;
            let batch = Outcome::Claimed {
                after: range.after,
                last,
                scanned: if is_rest_scanned {
                    last_position(request.tenant, range.up_to)
                } else {
                    last
                },
            };
            request.remember(batch, more || beyond_limit);
        }
        None => {
            let scanned = if filter.passes_all() {
                range.after
            } else {
                limit.unwrap_or_else(|| last_position(request.tenant, range.up_to))
            };
            let position = scanned.max(range.after);
            if position > range.after {
                cursor::advance(request.projection, request.tenant, position);
            }
            request.remember(Outcome::None { position }, beyond_limit);
        }
    }
    events
}

/// Status word and whether events were left.
pub fn state(projection: &str, tenant: &str) -> Result<(&'static str, bool), Error> {
    snapshot::require_primary("projection_claim_state")?;
    Ok(
        held::last_claim(projection, tenant).map_or(("none", false), |claim| {
            (claim.outcome.status(), claim.more)
        }),
    )
}

pub fn advance(projection: &str, tenant: &str, up_to: Option<Position>) -> Result<Position, Error> {
    snapshot::require_read_write("projection_advance")?;
    held::refuse_in_handler(projection, tenant)?;
    let batch = held::batch(projection, tenant)?;
    let position = match up_to {
        None if batch.last == batch.after => return Ok(batch.last),
        None => batch.last,
        Some(position) => {
            require_in_batch(projection, tenant, "up_to", position)?;
            position
        }
    };
    if cursor::advance(projection, tenant, position) {
        return Ok(position);
    }
    Err(Error::invalid(
        format!("up_to {position} is behind the cursor of projection \"{projection}\""),
        position,
        "at least the cursor's position",
        "The cursor goes forward only; projection_reset puts it back.",
    ))
}

/// The position must be that of an event of the batch that this transaction holds, exactly.
pub fn require_in_batch(
    projection: &str,
    tenant: &str,
    argument: &str,
    position: Position,
) -> Result<(), Error> {
    static EVENT: Plan = Plan::new(
        "SELECT FROM lockstep.events AS e, lockstep.projections AS p
         WHERE p.name = $1 AND e.tenant = $2 AND e.position = $3
           AND (p.aggregate_types IS NULL OR e.aggregate_type = ANY (p.aggregate_types))
           AND (p.event_types IS NULL OR e.event_type = ANY (p.event_types))",
    );
    let batch = held::batch(projection, tenant)?;
    let in_bounds = position > batch.after && position <= batch.last;
    let args = || {
        [
            Arg::from(projection),
            Arg::from(tenant),
            Arg::from(position),
        ]
    };
    if in_bounds
        && (position == batch.last || Spi::connect().read(&EVENT, At::Latest, &args()).count() == 1)
    {
        return Ok(());
    }
    Err(Error::InvalidParameter {
        message: format!(
            "{argument} {position} is not the position of an event that this transaction claimed for projection \"{projection}\""
        ),
        detail: format!(
            "The claimed batch is after {}, up to {}.",
            batch.after, batch.last
        ),
        hint: "Pass the position exactly as projection_claim returned it: as a decimal or as text, not as a float.",
    })
}
