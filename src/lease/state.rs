//! What a lease's row says now.

use pgrx::datum::Interval;
use pgrx::prelude::*;

use crate::lookup::{Key, Lookup, Row, Strength, Walk};
use crate::snapshot::At;

pub struct Lease {
    /// None after a release.
    pub holder: Option<String>,
    pub token: i64,
    pub expires_at: TimestampWithTimeZone,
    pub ttl: Interval,
    pub transitions: i64,
    /// Held, and not expired.
    pub live: bool,
    /// When it opens, if nobody holds it; None if it is not closed at all. `lock_delay` counts from an expiry and not after a
    /// release; `min_hold` outlives both. So does `lease_status`.
    pub opens_at: Option<TimestampWithTimeZone>,
    /// Anybody may acquire it.
    pub open: bool,
}

pub const TABLE: &std::ffi::CStr = c"leases";

/// Where the columns of `lockstep.leases` are, for what looks it up and writes it without SQL.
pub mod column {
    pub const HOLDER: i16 = 2;
    pub const TOKEN: i16 = 3;
    pub const ACQUIRED_AT: i16 = 4;
    pub const RENEWED_AT: i16 = 5;
    pub const EXPIRES_AT: i16 = 6;
    pub const TTL: i16 = 7;
    pub const TRANSITIONS: i16 = 8;
    pub const METADATA: i16 = 9;
    pub const MIN_HOLD_UNTIL: i16 = 10;
    pub const LOCK_DELAY: i16 = 11;
    pub const STOLEN_FROM: i16 = 12;
    pub const STEAL_REASON: i16 = 13;
}

/// The walk that finds it by its name.
pub fn walk<'leases>(leases: &'leases Lookup, name: &str) -> Walk<'leases> {
    leases.walk(c"leases_pkey", &[Key::equal(1, name)])
}

/// Reads it with a snapshot taken now, without a lock: what it says of time is judged by the clock as it is now.
pub fn read(name: &str) -> Option<Lease> {
    let leases = Lookup::of(TABLE, At::Latest);
    Lease::of(&walk(&leases, name).step()?)
}

/// Locks the row, if the lease is as it should be and nobody has locked it; the lease.
pub fn lock_if_free(name: &str, is_right: impl FnOnce(&Lease) -> bool) -> Option<Lease> {
    let leases = Lookup::to_lock(TABLE);
    lock_next(&mut walk(&leases, name), is_right)
}

/// Locks the row that the walk finds, if the lease is as it should be and nobody has locked it; the lease.
pub fn lock_next(walk: &mut Walk, is_right: impl FnOnce(&Lease) -> bool) -> Option<Lease> {
    walk.lock_next(Strength::NoKeyUpdate, |row| Lease::of(row).filter(is_right))
}

impl Lease {
    pub fn of(row: &Row) -> Option<Self> {
        let holder: Option<String> = row.get(column::HOLDER);
        let expires_at: TimestampWithTimeZone = row.get(column::EXPIRES_AT)?;
        let lock_delay: Interval = row.get(column::LOCK_DELAY)?;
        let min_hold_until: Option<TimestampWithTimeZone> = row.get(column::MIN_HOLD_UNTIL);
        let now = clock_timestamp();
        let after_expiry = holder.is_some().then(|| expires_at + lock_delay);
        let opens_at = min_hold_until.max(after_expiry);
        Some(Lease {
            live: holder.is_some() && expires_at > now,
            open: opens_at.is_none_or(|opens_at| opens_at <= now),
            token: row.get(column::TOKEN)?,
            ttl: row.get(column::TTL)?,
            transitions: row.get(column::TRANSITIONS)?,
            holder,
            expires_at,
            opens_at,
        })
    }

    pub fn is_held_with(&self, token: i64) -> bool {
        self.live && self.token == token
    }
}
