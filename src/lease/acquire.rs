//! Acquiring a lease, and taking it from its holder.

use pgrx::datum::Interval;
use pgrx::prelude::*;

use super::hold::{self, Held, Wait};
use super::state::{self, Lease};
use crate::error::Error;
use crate::jsonb::Jsonb;
use crate::lock::{Locks, Mode, Tag};
use crate::sequence;
use crate::snapshot;
use crate::spi::{Arg, Plan, Rows, Spi};
use crate::wakeup::{self, Event};

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
    let previous = state::lock_if_free(request.name, |lease| lease.open).map(|lease| lease.token);
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
    hand_out(spi, request, previous, None).map(Attempt::Acquired)
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
    hand_out(&spi, request, rows.get(0, 1), Some(theft))
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

/// Writes the new holder with a new token. The caller has the lease's lock alone and, where there is one, the row's.
fn hand_out(
    spi: &Spi,
    request: &Request,
    previous: Option<i64>,
    theft: Option<Theft>,
) -> Result<Answer, Error> {
    static UPSERT: Plan = Plan::new(
        "INSERT INTO lockstep.leases AS l
             (name, holder, token, acquired_at, renewed_at, expires_at, ttl, transitions, metadata, min_hold_until, lock_delay,
              stolen_from, steal_reason)
         VALUES ($1, $2, $3, $4, $4, $4 + $5, $5, 0, $6, CASE WHEN $7 > interval '0' THEN $4 + $7 END, $8, $9, $10)
         ON CONFLICT (name) DO UPDATE
         SET holder = EXCLUDED.holder, token = EXCLUDED.token, acquired_at = EXCLUDED.acquired_at,
             renewed_at = EXCLUDED.renewed_at, expires_at = EXCLUDED.expires_at, ttl = EXCLUDED.ttl,
             transitions = l.transitions + 1, metadata = EXCLUDED.metadata, min_hold_until = EXCLUDED.min_hold_until,
             lock_delay = EXCLUDED.lock_delay, stolen_from = EXCLUDED.stolen_from, steal_reason = EXCLUDED.steal_reason
         RETURNING l.token, l.holder, l.expires_at, l.renewed_at + l.ttl / 2",
    );
    let token = sequence::TOKEN.next();
    sequence::require_above(token, previous.unwrap_or(0))?;
    let (from, reason) = theft.map_or((None, None), |theft| (theft.from, Some(theft.reason)));
    let args = [
        Arg::from(request.name),
        Arg::from(request.holder),
        Arg::from(token),
        Arg::from(clock_timestamp()),
        Arg::from(request.ttl),
        Arg::from(request.metadata),
        Arg::from(request.min_hold),
        Arg::from(request.lock_delay),
        Arg::from(from),
        Arg::from(reason),
    ];
    let answer = Answer::acquired(&spi.write_latest(&UPSERT, &args));
    // Else a crash could lose the sequence's value with the commit, and hand the token out again.
    snapshot::force_synchronous_commit();
    // If it is rolled back, the lease is open again.
    wakeup::announce(&Event::Lease { name: request.name });
    Ok(answer)
}
