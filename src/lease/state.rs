//! What a lease's row says now.

use pgrx::prelude::*;

use crate::snapshot::At;
use crate::spi::{Arg, Plan, Spi};

/// When a lease that nobody holds opens, of a row `l`; null if it is not closed at all. `lock_delay` counts from an expiry and
/// not after a release; `min_hold` outlives both.
macro_rules! opens_at {
    () => {
        "GREATEST(l.min_hold_until, CASE WHEN l.holder IS NOT NULL THEN l.expires_at + l.lock_delay END)"
    };
}
pub(super) use opens_at;

pub struct Lease {
    /// None after a release.
    pub holder: Option<String>,
    pub token: i64,
    pub expires_at: TimestampWithTimeZone,
    /// Held, and not expired.
    pub live: bool,
    pub opens_at: Option<TimestampWithTimeZone>,
    /// Anybody may acquire it.
    pub open: bool,
}

/// Reads it with a snapshot taken now, without a lock: what it says of time is judged by the clock as it is now.
pub fn read(spi: &Spi, name: &str) -> Option<Lease> {
    static READ: Plan = Plan::new(concat!(
        "SELECT l.holder, l.token, l.expires_at,
                l.holder IS NOT NULL AND l.expires_at > pg_catalog.clock_timestamp(),
                ",
        opens_at!(),
        ",
                COALESCE(",
        opens_at!(),
        " <= pg_catalog.clock_timestamp(), true)
         FROM lockstep.leases AS l WHERE l.name = $1"
    ));
    let rows = spi.read(&READ, At::Latest, &[Arg::from(name)]);
    Some(Lease {
        holder: rows.get(0, 1),
        token: rows.get(0, 2)?,
        expires_at: rows.get(0, 3)?,
        live: rows.get(0, 4)?,
        opens_at: rows.get(0, 5),
        open: rows.get(0, 6)?,
    })
}

impl Lease {
    pub fn is_held_with(&self, token: i64) -> bool {
        self.live && self.token == token
    }
}
