//! Running a projection in the server: claim, apply with the handler, advance, all in the caller's transaction.
//!
//! The handler runs with the caller's rights and search_path; only the SQL of this extension runs as its owner. A batch is one
//! subtransaction. If event i fails, that subtransaction is gone; the events before i are applied again in another one, which
//! is kept, and i is recorded. So each event is applied at most once in what commits, and a failure costs no more than its own
//! batch's work. More than 64 subtransactions that write would slow every snapshot in the server, so a run ends before that.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::claim::{self, Request};
use super::cursor::{self, Projection};
use super::failure::{self, Verdict};
use super::held::{self, Claim, Outcome};
use crate::call::Call;
use crate::error::Error;
use crate::event_log::settle;
use crate::position::Position;
use crate::rights::{self, Procedure};
use crate::spi::{EventTypes, Events, Spi};
use crate::subtransaction::{self, Failure};

/// How many subtransactions one run keeps at the most.
const MAX_KEPT: usize = 60;

/// How a run went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok,
    Busy,
    Paused,
    Backoff,
    /// An event failed and is to be retried.
    Failed,
    HandlerGone,
    /// The projection is another role's.
    NotOwner,
}

impl Status {
    /// The word that projection_run returns.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Busy => "busy",
            Status::Paused => "paused",
            Status::Backoff => "backoff",
            Status::Failed | Status::HandlerGone | Status::NotOwner => "failed",
        }
    }
}

pub struct Report {
    pub status: Status,
    pub processed: i64,
    pub skipped: i64,
    pub position: Position,
    pub more: bool,
    /// When the failed event may be retried.
    pub retry_in: Option<Duration>,
    /// Of the last event that failed.
    pub error: Option<String>,
}

/// Who runs it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Runner {
    /// A session whose user may call the function.
    Session,
    /// A worker, which acts for the projection's owner and for no other.
    Worker,
    /// A worker whose batch failed at its COMMIT: it runs one event, and what that defers is checked before the event counts as
    /// applied. Nothing else is in the transaction, so no constraint of another's is checked too early.
    CarefulWorker,
}

pub fn run(
    request: &Request,
    max_duration: Option<Duration>,
    runner: Runner,
) -> Result<Report, Error> {
    let deadline = max_duration.and_then(|duration| Instant::now().checked_add(duration));
    let (projection, tenant) = (request.projection, request.tenant);
    let nested = held::is_running(projection, tenant);
    let events = rights::as_extension_owner(|| claim::claim(request))?;
    let definition = rights::as_extension_owner(|| cursor::read(projection, tenant))?;
    let nothing = |status, more| Report {
        status,
        processed: 0,
        skipped: 0,
        position: definition.cursor,
        more,
        retry_in: definition.retry_in,
        error: None,
    };
    // Under the claim's lock: the handler is the owner's of now.
    if runner != Runner::Session
        && rights::role_name(rights::caller()).as_ref() != Some(&definition.owner)
    {
        return Ok(nothing(Status::NotOwner, false));
    }
    if definition.handler.is_none() {
        return Err(Error::NoHandler(projection.to_owned()));
    }
    let (more, scanned) = match held::last_claim(projection, tenant) {
        _ if nested => return Ok(nothing(Status::Busy, false)),
        Some(Claim {
            outcome: Outcome::Claimed { scanned, .. },
            more,
        }) => (more, scanned),
        Some(claim) if matches!(claim.outcome, Outcome::None { .. }) => {
            return Ok(nothing(Status::Ok, claim.more));
        }
        Some(claim) if claim.outcome == Outcome::Paused => {
            return Ok(nothing(Status::Paused, false));
        }
        Some(claim) if claim.outcome == Outcome::Backoff => {
            return Ok(nothing(Status::Backoff, false));
        }
        _ => return Ok(nothing(Status::Busy, false)),
    };
    let Some(handler) = Handler::of(projection, &definition)? else {
        return Ok(nothing(Status::HandlerGone, true));
    };
    let run = Run {
        request,
        handler: &handler,
        events: &events,
        deadline,
        // A worker comes again only if something happens: it leaves the pair with nothing to look through.
        scanned: (runner != Runner::Session).then_some(scanned),
        checks_constraints: runner == Runner::CarefulWorker,
        kept: 0,
        skipped: 0,
        error: None,
    };
    held::while_running(projection, tenant, || run.all(more))
}

/// A handler, resolved for this call.
pub struct Handler {
    function: Procedure,
    takes_array: bool,
}

impl Handler {
    /// None if the function is gone. That the caller may not call it is no event's fault, so it is an error here.
    pub fn of(projection: &str, definition: &Projection) -> Result<Option<Self>, Error> {
        let name = definition.handler.as_deref();
        let name = name.ok_or_else(|| Error::NoHandler(projection.to_owned()))?;
        let function = Procedure::from_qualified_name(name);
        let Some(function) = function.filter(|function| function.is_plain_function()) else {
            pgrx::warning!("handler {name} of projection \"{projection}\" does not exist");
            return Ok(None);
        };
        if !function.is_executable() {
            return Err(Error::HandlerDenied(name.to_owned()));
        }
        Ok(Some(Handler {
            takes_array: function.argument_type() == Some(EventTypes::look_up().array),
            function,
        }))
    }

    /// Applies the events in a subtransaction, all or none.
    pub fn apply(&self, events: &Events, rows: Range<usize>) -> Result<(), Failure> {
        self.apply_until(events, rows, None, false)
            .map(|_| ())
            .map_err(|failed| failed.failure)
    }

    /// Applies the events in a subtransaction; a handler that takes one at a time stops after the one that passes the
    /// deadline. Returns where it stopped.
    fn apply_until(
        &self,
        events: &Events,
        rows: Range<usize>,
        deadline: Option<Instant>,
        checks_constraints: bool,
    ) -> Result<usize, Failed> {
        let reached = std::cell::Cell::new(rows.start);
        let applied = subtransaction::run(|| {
            settle::without_waiting(|| {
                let types = EventTypes::look_up();
                let mut call = Call::of(self.function);
                let mut end = rows.end;
                if self.takes_array {
                    call.call(|| events.array(rows.clone(), &types));
                } else {
                    for row in rows.clone() {
                        reached.set(row);
                        call.call(|| events.event(row, &types));
                        if is_over(deadline) {
                            end = row + 1;
                            break;
                        }
                    }
                }
                if checks_constraints {
                    Spi::connect().check_constraints();
                }
                end
            })
        });
        applied.map_err(|failure| Failed {
            at: reached.get(),
            failure,
        })
    }
}

/// A failure, and the event that was being applied; for an array the first of it.
struct Failed {
    at: usize,
    failure: Failure,
}

fn is_over(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| Instant::now() >= deadline)
}

struct Run<'a> {
    request: &'a Request<'a>,
    handler: &'a Handler,
    events: &'a Events,
    deadline: Option<Instant>,
    /// Where the cursor goes when the whole batch is applied, if not to its last event.
    scanned: Option<Position>,
    checks_constraints: bool,
    kept: usize,
    skipped: usize,
    error: Option<String>,
}

/// Where an attempt ended.
enum Step {
    /// Everything before this event is applied; less than asked for if the time or the subtransactions ran out.
    Reached(usize),
    /// Everything before this event is applied, and it failed, alone.
    Failed(usize, Failure),
}

impl Run<'_> {
    fn all(mut self, more: bool) -> Result<Report, Error> {
        let count = self.events.count();
        let (mut next, mut status) = (0, Status::Ok);
        while next < count && !self.must_stop() {
            match self.apply(next..count) {
                Step::Reached(reached) => {
                    next = reached;
                }
                Step::Failed(at, failure) => {
                    next = at;
                    let verdict = self.record(at, &failure)?;
                    self.error = Some(failure.message);
                    if verdict == Verdict::Retry {
                        status = Status::Failed;
                        break;
                    }
                    self.skipped += 1;
                    next += 1;
                }
            }
        }
        let (projection, tenant) = (self.request.projection, self.request.tenant);
        let reached = next
            .checked_sub(1)
            .and_then(|row| self.events.position(row))
            .max(self.scanned.filter(|_| next == count));
        let (position, retry_in) = rights::as_extension_owner(|| match reached {
            Some(position) if status == Status::Ok => {
                cursor::advance(projection, tenant, position);
                Ok((position, None))
            }
            _ => {
                let projection = cursor::read(projection, tenant)?;
                Ok((projection.cursor, projection.retry_in))
            }
        })?;
        Ok(Report {
            status,
            processed: (next - self.skipped) as i64,
            skipped: self.skipped as i64,
            position,
            more: more || next < count,
            retry_in,
            error: self.error,
        })
    }

    fn must_stop(&self) -> bool {
        self.kept >= MAX_KEPT || (self.kept > 0 && is_over(self.deadline))
    }

    /// Applies the events, or as many as come before one that fails.
    fn apply(&mut self, rows: Range<usize>) -> Step {
        if self.must_stop() {
            return Step::Reached(rows.start);
        }
        let applied = self.handler.apply_until(
            self.events,
            rows.clone(),
            self.deadline,
            self.checks_constraints,
        );
        let failed = match applied {
            Ok(reached) => {
                self.kept += 1;
                return Step::Reached(reached);
            }
            Err(failed) => failed,
        };
        if rows.len() == 1 {
            return Step::Failed(rows.start, failed.failure);
        }
        // An array does not tell which of its events failed: by halves.
        let middle = if self.handler.takes_array {
            rows.start + rows.len() / 2
        } else {
            failed.at
        };
        if middle > rows.start {
            match self.apply(rows.start..middle) {
                Step::Reached(reached) if reached == middle => {}
                short => return short,
            }
        }
        if self.handler.takes_array {
            self.apply(middle..rows.end)
        } else {
            Step::Failed(middle, failed.failure)
        }
    }

    fn record(&self, at: usize, failure: &Failure) -> Result<Verdict, Error> {
        let (projection, tenant) = (self.request.projection, self.request.tenant);
        let Some(position) = self.events.position(at) else {
            return Ok(Verdict::Retry);
        };
        rights::as_extension_owner(|| failure::fail(projection, tenant, position, failure))
    }
}
