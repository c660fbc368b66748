//! What the holder does with its lease: renew it, give it back.

use pgrx::datum::Interval;
use pgrx::prelude::*;

use super::state::{self, Lease, column};
use crate::error::Error;
use crate::lock::{Mode, Tag};
use crate::lookup::{Lookup, Walk};
use crate::snapshot::At;
use crate::spi::{Arg, Plan, Spi};
use crate::wakeup::{self, Event};
use crate::write::{Change, Updater};

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

/// Locks the row of a lease that is held with this token, and returns what `then` does with it, which is told the time then; None if
/// the lease is not held so. The caller has LEASE as a renewal. It is given back here if no row was locked; where one was, but the lease
/// had been lost meanwhile, LEASE is kept: who has the row always has LEASE. What was seen to be expired is not locked: it would stay
/// so, and closed to all, until the transaction ends.
pub fn with_held<T>(name: &str, token: i64, wait: Wait, then: impl FnOnce(Held) -> T) -> Option<T> {
    static LOCK: Plan = Plan::new(
        "SELECT FROM lockstep.leases AS l
         WHERE l.name = $1 AND l.token = $2 AND l.holder IS NOT NULL
           AND l.expires_at > pg_catalog.clock_timestamp()
         FOR NO KEY UPDATE",
    );
    let is_held = |lease: &Lease| lease.is_held_with(token);
    let leases = Lookup::to_write(state::TABLE, At::Latest);
    let mut row = state::walk(&leases, name);
    if let Some(lease) = state::lock_next(&mut row, is_held) {
        return Held::now(&row, lease).map(then);
    }
    if wait == Wait::ForRow && state::read(name).is_some_and(|lease| is_held(&lease)) {
        let args = [Arg::from(name), Arg::from(token)];
        if Spi::connect().write_latest(&LOCK, &args).count() == 0 {
            return None;
        }
        // As it is now that it is locked.
        let leases = Lookup::to_write(state::TABLE, At::Latest);
        let mut row = state::walk(&leases, name);
        let lease = row.step().and_then(|row| Lease::of(&row))?;
        return Held::now(&row, lease).map(then);
    }
    Tag::lease(name).release(Mode::RowShare);
    None
}

/// A lease whose row this transaction has locked, and which was live then.
pub struct Held<'a> {
    row: &'a Walk<'a>,
    lease: Lease,
    pub now: TimestampWithTimeZone,
}

impl<'a> Held<'a> {
    fn now(row: &'a Walk<'a>, lease: Lease) -> Option<Self> {
        let now = clock_timestamp();
        (lease.expires_at > now).then_some(Held { row, lease, now })
    }

    /// False: a statement must do it.
    #[must_use]
    fn change(&self, changes: &[Change]) -> bool {
        let Some(mut updater) = Updater::of(self.row.lookup()) else {
            return false;
        };
        updater.change(self.row, changes);
        true
    }
}

/// `ttl` None: the one that it has.
pub fn renew(name: &str, token: i64, ttl: Option<Interval>) -> Result<Renewal, Error> {
    static RENEW: Plan = Plan::new(
        "UPDATE lockstep.leases AS l SET renewed_at = $2, expires_at = $3, ttl = $4 WHERE l.name = $1",
    );
    let renewed = |held: Held| {
        let ttl = ttl.unwrap_or(held.lease.ttl);
        let expires_at = held.now + ttl;
        let changes = [
            (column::RENEWED_AT, held.now.into_datum()),
            (column::EXPIRES_AT, expires_at.into_datum()),
            (column::TTL, ttl.into_datum()),
        ];
        if !held.change(&changes) {
            let args = [
                Arg::from(name),
                Arg::from(held.now),
                Arg::from(expires_at),
                Arg::from(ttl),
            ];
            Spi::connect().write_latest(&RENEW, &args);
        }
        Renewal::Renewed {
            expires_at,
            renew_before: held.now + ttl / 2.0,
        }
    };
    loop {
        Tag::lease(name).acquire(Mode::RowShare);
        if let Some(renewal) = with_held(name, token, Wait::ForRow, renewed) {
            return Ok(renewal);
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
    let release = |held: Held| {
        let changes = [
            (column::HOLDER, None),
            (column::METADATA, None),
            (column::EXPIRES_AT, held.now.into_datum()),
        ];
        if !held.change(&changes) {
            let args = [Arg::from(name), Arg::from(held.now)];
            Spi::connect().write_latest(&RELEASE, &args);
        }
    };
    Tag::lease(name).acquire(Mode::RowShare);
    if with_held(name, token, Wait::ForRow, release).is_none() {
        return Ok(false);
    }
    wakeup::announce(&Event::Lease { name });
    Ok(true)
}
