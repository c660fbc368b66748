//! Acquiring a lease, and taking it from its holder.

use pgrx::datum::Interval;
use pgrx::prelude::*;

use super::hold::{self, Held, Wait};
use super::state::{self, Lease, column};
use crate::error::Error;
use crate::jsonb::Jsonb;
use crate::lock::table::Locks;
use crate::lock::{Mode, Tag};
use crate::lookup::{Lookup, Walk};
use crate::sequence;
use crate::snapshot::{self, At};
use crate::spi::{Arg, Plan, Rows, Spi};
use crate::wakeup::{self, Event};
use crate::write::Updater;

pub struct Request<'a> {
    pub name: &'a str,
    pub holder: &'a str,
    pub ttl: Interval,
    pub metadata: Option<Jsonb<'a>>,
    pub min_hold: Interval,
    pub lock_delay: Interval,
    /// For the holder's own renewals and releases that are in flight.
    pub wait: Wait,
}

#[derive(Default)]
pub struct Answer {
    pub acquired: bool,
    pub token: Option<i64>,
    /// Who holds it; None where it is only closed, or its acquisition is not committed yet.
    pub held_by: Option<String>,
    /// Where it is refused: when the holder's time ends or the closed lease opens, if that is known.
    pub expires_at: Option<TimestampWithTimeZone>,
    pub renew_before: Option<TimestampWithTimeZone>,
}

impl Answer {
    fn refused(seen: Option<Lease>) -> Self {
        let (held_by, expires_at) = match seen {
            Some(lease) if lease.live => (lease.holder, Some(lease.expires_at)),
            Some(lease) if !lease.open => (None, lease.opens_at),
            _ => (None, None),
        };
        Answer {
            held_by,
            expires_at,
            ..Answer::default()
        }
    }

    /// Of a statement that returns the token, the holder, the expiry and the time to renew before.
    fn acquired(rows: &Rows) -> Self {
        Answer {
            acquired: true,
            token: rows.get(0, 1),
            held_by: rows.get(0, 2),
            expires_at: rows.get(0, 3),
            renew_before: rows.get(0, 4),
        }
    }
}

/// How one look went.
enum Attempt {
    Acquired(Answer),
    Refused,
    /// The lease is no longer as it was seen; look again.
    Moved,
}

/// Waits for nobody but, where it is asked to, for renewals and releases of the same holder. A refusal leaves nothing locked.
pub fn acquire(request: &Request) -> Result<Answer, Error> {
    let spi = Spi::connect();
    loop {
        // Without a lock: who is refused must not hold up the holder's renewals until its own transaction ends.
        let seen = state::read(request.name);
        let attempt = match &seen {
            Some(lease) if lease.live && lease.holder.as_deref() == Some(request.holder) => {
                renew_own(&spi, request, lease.token)
            }
            Some(lease) if lease.live || !lease.open => Attempt::Refused,
            _ => take_over(&spi, request)?,
        };
        match attempt {
            Attempt::Acquired(answer) => return Ok(answer),
            Attempt::Refused => return Ok(Answer::refused(seen)),
            Attempt::Moved => {}
        }
    }
}

/// The holder itself: it keeps its token. Refused while another transaction is taking the lease from it.
fn renew_own(spi: &Spi, request: &Request, token: i64) -> Attempt {
    static RENEW: Plan = Plan::new(
        "UPDATE lockstep.leases AS l
         SET renewed_at = $2, expires_at = $2 + $3, ttl = $3, metadata = COALESCE($4, l.metadata),
             min_hold_until = GREATEST(l.min_hold_until, CASE WHEN $5 > interval '0' THEN l.acquired_at + $5 END),
             lock_delay = CASE WHEN $6 > interval '0' THEN $6 ELSE l.lock_delay END
         WHERE l.name = $1
         RETURNING l.token, l.holder, l.expires_at, $2 + $3 / 2",
    );
    if !Tag::lease(request.name).try_acquire(Mode::RowShare) {
        return Attempt::Refused;
    }
    let renew = |held: Held| {
        let args = [
            Arg::from(request.name),
            Arg::from(held.now),
            Arg::from(request.ttl),
            Arg::from(request.metadata),
            Arg::from(request.min_hold),
            Arg::from(request.lock_delay),
        ];
        Answer::acquired(&spi.write_latest(&RENEW, &args))
    };
    match hold::with_held(request.name, token, request.wait, renew) {
        Some(answer) => Attempt::Acquired(answer),
        None if request.wait == Wait::ForRow => Attempt::Moved,
        None => Attempt::Refused,
    }
}

/// Takes a lease that nobody holds, if no other transaction guards it, is renewing it or is taking it.
fn take_over(spi: &Spi, request: &Request) -> Result<Attempt, Error> {
    let tag = Tag::lease(request.name);
    if !tag.try_acquire(Mode::Exclusive) {
        return Ok(Attempt::Refused);
    }
    // Skips a row that is being deleted, or that somebody locked by hand.
    let leases = Lookup::to_write(state::TABLE, At::Latest);
    let mut row = state::walk(&leases, request.name);
    let previous = state::lock_next(&mut row, |lease| lease.open);
    if previous.is_none()
        && let Some(lease) = state::read(request.name)
    {
        tag.release(Mode::Exclusive);
        return Ok(if lease.open {
            Attempt::Refused
        } else {
            Attempt::Moved
        });
    }
    let previous_token = previous.as_ref().map(|lease| lease.token);
    let grant = Grant::new(request, previous_token, None)?;
    let is_written = previous.is_some_and(|lease| grant.write_over(&leases, &row, &lease));
    if !is_written {
        grant.write(spi);
    }
    Ok(Attempt::Acquired(grant.done()))
}

/// Takes the lease from whoever holds it. Waits, obeying lock_timeout, for its guards.
pub fn steal(request: &Request, reason: &str) -> Result<Answer, Error> {
    static LOCK: Plan = Plan::new(
        "SELECT l.token, CASE WHEN l.expires_at > pg_catalog.clock_timestamp() THEN l.holder END
         FROM lockstep.leases AS l WHERE l.name = $1 FOR NO KEY UPDATE",
    );
    wait_for_guards(request.name)?;
    let spi = Spi::connect();
    let rows = spi.write_latest(&LOCK, &[Arg::from(request.name)]);
    let theft = Theft {
        from: rows.get(0, 2),
        reason,
    };
    let grant = Grant::new(request, rows.get(0, 1), Some(theft))?;
    grant.write(&spi);
    Ok(grant.done())
}

/// Takes the lock alone. Not by standing in its queue, at first: the holder's renewals would queue behind.
fn wait_for_guards(name: &str) -> Result<(), Error> {
    PgTryBuilder::new(|| {
        Tag::lease(name).acquire_after_holders();
        Ok(())
    })
    .catch_when(PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE, |_| {
        Err(Error::LeaseGuarded {
            name: name.to_owned(),
            pids: Locks::now().lease_holders_elsewhere(name),
        })
    })
    .execute()
}

struct Theft<'a> {
    from: Option<String>,
    reason: &'a str,
}

/// The lease, handed out to a new holder with a new token. Who writes it has the lease's lock alone and, where there is one, the
/// row's.
struct Grant<'a> {
    request: &'a Request<'a>,
    token: i64,
    now: TimestampWithTimeZone,
    expires_at: TimestampWithTimeZone,
    min_hold_until: Option<TimestampWithTimeZone>,
    theft: Option<Theft<'a>>,
}

impl<'a> Grant<'a> {
    fn new(
        request: &'a Request<'a>,
        previous_token: Option<i64>,
        theft: Option<Theft<'a>>,
    ) -> Result<Self, Error> {
        let token = sequence::TOKEN.next();
        sequence::require_above(token, previous_token.unwrap_or(0))?;
        let now = clock_timestamp();
        let has_min_hold = request.min_hold > Interval::from_micros(0);
        Ok(Grant {
            request,
            token,
            now,
            expires_at: now + request.ttl,
            min_hold_until: has_min_hold.then(|| now + request.min_hold),
            theft,
        })
    }

    fn stolen_from(&self) -> Option<&str> {
        self.theft.as_ref()?.from.as_deref()
    }

    fn steal_reason(&self) -> Option<&str> {
        self.theft.as_ref().map(|theft| theft.reason)
    }

    /// Over the row that this transaction has locked. False: a statement must do it.
    fn write_over(&self, leases: &Lookup, row: &Walk, previous: &Lease) -> bool {
        let Some(mut updater) = Updater::of(leases) else {
            return false;
        };
        let now = self.now.into_datum();
        updater.change(
            row,
            &[
                (column::HOLDER, self.request.holder.into_datum()),
                (column::TOKEN, self.token.into_datum()),
                (column::ACQUIRED_AT, now),
                (column::RENEWED_AT, now),
                (column::EXPIRES_AT, self.expires_at.into_datum()),
                (column::TTL, self.request.ttl.into_datum()),
                (column::TRANSITIONS, (previous.transitions + 1).into_datum()),
                (column::METADATA, self.request.metadata.into_datum()),
                (column::MIN_HOLD_UNTIL, self.min_hold_until.into_datum()),
                (column::LOCK_DELAY, self.request.lock_delay.into_datum()),
                (column::STOLEN_FROM, self.stolen_from().into_datum()),
                (column::STEAL_REASON, self.steal_reason().into_datum()),
            ],
        );
        true
    }

    fn write(&self, spi: &Spi) {
        static UPSERT: Plan = Plan::new(
            "INSERT INTO lockstep.leases AS l
                 (name, holder, token, acquired_at, renewed_at, expires_at, ttl, transitions, metadata, min_hold_until, lock_delay,
                  stolen_from, steal_reason)
             VALUES ($1, $2, $3, $4, $4, $5, $6, 0, $7, $8, $9, $10, $11)
             ON CONFLICT (name) DO UPDATE
             SET holder = EXCLUDED.holder, token = EXCLUDED.token, acquired_at = EXCLUDED.acquired_at,
                 renewed_at = EXCLUDED.renewed_at, expires_at = EXCLUDED.expires_at, ttl = EXCLUDED.ttl,
                 transitions = l.transitions + 1, metadata = EXCLUDED.metadata, min_hold_until = EXCLUDED.min_hold_until,
                 lock_delay = EXCLUDED.lock_delay, stolen_from = EXCLUDED.stolen_from, steal_reason = EXCLUDED.steal_reason",
        );
        let args = [
            Arg::from(self.request.name),
            Arg::from(self.request.holder),
            Arg::from(self.token),
            Arg::from(self.now),
            Arg::from(self.expires_at),
            Arg::from(self.request.ttl),
            Arg::from(self.request.metadata),
            Arg::from(self.min_hold_until),
            Arg::from(self.request.lock_delay),
            Arg::from(self.stolen_from()),
            Arg::from(self.steal_reason()),
        ];
        spi.write_latest(&UPSERT, &args);
    }

    fn done(self) -> Answer {
        // Else a crash could lose the sequence's value with the commit, and hand the token out again.
        snapshot::force_synchronous_commit();
        // If it is rolled back, the lease is open again.
        wakeup::announce(&Event::Lease {
            name: self.request.name,
        });
        Answer {
            acquired: true,
            token: Some(self.token),
            held_by: Some(self.request.holder.to_owned()),
            expires_at: Some(self.expires_at),
            renew_before: Some(self.now + self.request.ttl / 2.0),
        }
    }
}
