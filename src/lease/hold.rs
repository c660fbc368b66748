//! What the holder does with its lease: renew it, give it back.

use pgrx::datum::Interval;
use pgrx::prelude::*;

use super::state::{self, Lease};
use crate::error::Error;
use crate::lock::{Mode, Tag};
use crate::spi::{Arg, Plan, Spi};
use crate::wakeup::{self, Event};

#[derive(Clone, Copy)]
pub enum Renewal {
    Renewed {
        expires_at: TimestampWithTimeZone,
        renew_before: TimestampWithTimeZone,
    },
    Expired,
    /// Released, or held with another token.
    Lost,
    Unknown,
}

/// Whether to wait for a renewal, a release or a theft of the lease that is in flight.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    ForRow,
    ForNothing,
}

/// Locks the row of a lease that is held with this token, and returns the time then; None if it is not held so. The caller has
/// LEASE as a renewal. It is given back here if no row was locked; where one was, but the lease had been lost meanwhile, LEASE is
/// kept: who has the row always has LEASE. What was seen to be expired is not locked: it would stay so, and closed to all, until the
/// transaction ends.
pub fn lock_held(spi: &Spi, name: &str, token: i64, wait: Wait) -> Option<TimestampWithTimeZone> {
    static LOCK: Plan = Plan::new(
        "SELECT l.expires_at FROM lockstep.leases AS l
         WHERE l.name = $1 AND l.token = $2 AND l.holder IS NOT NULL
           AND l.expires_at > pg_catalog.clock_timestamp()
         FOR NO KEY UPDATE",
    );
    let held = |lease: Lease| lease.is_held_with(token).then_some(lease.expires_at);
    let expires_at = match state::lock_if_free(name, |lease| lease.is_held_with(token)) {
        Some(lease) => lease.expires_at,
        None if wait == Wait::ForRow && state::read(name).and_then(held).is_some() => {
            let args = [Arg::from(name), Arg::from(token)];
            spi.write_latest(&LOCK, &args).get(0, 1)?
        }
        None => {
            Tag::lease(name).release(Mode::RowShare);
            return None;
        }
    };
    let now = clock_timestamp();
    (expires_at > now).then_some(now)
}

/// `ttl` None: the one that it has.
pub fn renew(name: &str, token: i64, ttl: Option<Interval>) -> Result<Renewal, Error> {
    static RENEW: Plan = Plan::new(
        "UPDATE lockstep.leases AS l
         SET renewed_at = $2, expires_at = $2 + COALESCE($3, l.ttl), ttl = COALESCE($3, l.ttl)
         WHERE l.name = $1
         RETURNING l.expires_at, $2 + l.ttl / 2",
    );
    let spi = Spi::connect();
    loop {
        Tag::lease(name).acquire(Mode::RowShare);
        if let Some(now) = lock_held(&spi, name, token, Wait::ForRow) {
            let args = [Arg::from(name), Arg::from(now), Arg::from(ttl)];
            let rows = spi.write_latest(&RENEW, &args);
            if let (Some(expires_at), Some(renew_before)) = (rows.get(0, 1), rows.get(0, 2)) {
                return Ok(Renewal::Renewed {
                    expires_at,
                    renew_before,
                });
            }
        }
        return Ok(match state::read(name) {
            None => Renewal::Unknown,
            // Renewed by another session just before it expired.
            Some(lease) if lease.is_held_with(token) => continue,
            Some(lease) if lease.holder.is_some() && lease.token == token => Renewal::Expired,
            Some(_) => Renewal::Lost,
        });
    }
}

/// True if it was held with this token and is given back.
pub fn release(name: &str, token: i64) -> Result<bool, Error> {
    static RELEASE: Plan = Plan::new(
        "UPDATE lockstep.leases AS l SET holder = NULL, metadata = NULL, expires_at = $2 WHERE l.name = $1",
    );
    let spi = Spi::connect();
    Tag::lease(name).acquire(Mode::RowShare);
    let Some(now) = lock_held(&spi, name, token, Wait::ForRow) else {
        return Ok(false);
    };
    spi.write_latest(&RELEASE, &[Arg::from(name), Arg::from(now)]);
    wakeup::announce(&Event::Lease { name });
    Ok(true)
}
