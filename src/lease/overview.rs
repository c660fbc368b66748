//! Which leases are guarded and waited for now, and removing those that nobody has used for long.

use pgrx::datum::Interval;

use super::state;
use crate::lock::table::{Holder, Locks};
use crate::snapshot::{self, At};
use crate::spi::{Arg, Plan, Spi};

pub struct Lock {
    pub lease: String,
    /// `guard` or `wait`.
    pub purpose: &'static str,
    pub holder: Holder,
}

/// The names are found by their locks' keys, so only when there are locks.
pub fn locks() -> Vec<Lock> {
    static NAMES: Plan = Plan::joining("SELECT l.name FROM lockstep.leases AS l");
    if snapshot::in_recovery() {
        return Vec::new();
    }
    let locks = Locks::now();
    if !locks.has_leases() {
        return Vec::new();
    }
    let spi = Spi::connect();
    let rows = spi.read(&NAMES, At::Latest, &[]);
    let of_lease = |lease: String| {
        let lock = |purpose: &'static str| {
            let lease = lease.clone();
            move |holder| Lock {
                lease: lease.clone(),
                purpose,
                holder,
            }
        };
        let guards = locks.guards(&lease).map(lock("guard"));
        let waiters = locks.lease_waiters(&lease).map(lock("wait"));
        guards.chain(waiters).collect::<Vec<_>>()
    };
    (0..rows.count())
        .filter_map(|row| rows.get(row, 1))
        .flat_map(of_lease)
        .collect()
}

/// Deletes the leases that have been open for at least so long; those whose row is locked are left. Tokens come from one
/// sequence for all leases, so that one which is made again under its old name gets a greater token than it ever had.
pub fn delete_expired(older_than: Interval) -> i64 {
    // As `Lease::opens_at`.
    static FIND: Plan = Plan::joining(
        "SELECT l.name, l.token FROM lockstep.leases AS l
         WHERE GREATEST(l.expires_at, l.min_hold_until, CASE WHEN l.holder IS NOT NULL THEN l.expires_at + l.lock_delay END)
             <= pg_catalog.clock_timestamp() - $1",
    );
    static DELETE: Plan = Plan::new("DELETE FROM lockstep.leases WHERE name = ANY ($1)");
    let spi = Spi::connect();
    let rows = spi.read(&FIND, At::Latest, &[Arg::from(older_than)]);
    // Whoever has acquired it since has another token.
    let lock = |name: &String, token| {
        state::lock_if_free(name, |lease| Some(lease.token) == token).is_some()
    };
    let locked: Vec<String> = (0..rows.count())
        .filter_map(|row| rows.get(row, 1).filter(|name| lock(name, rows.get(row, 2))))
        .collect();
    spi.write_latest(&DELETE, &[Arg::from(locked)]).count() as i64
}

/// Makes every token that was handed out up to now one that nobody holds.
pub fn raise_tokens(by: i64) {
    static RAISE: Plan = Plan::joining("UPDATE lockstep.leases AS l SET token = l.token + $1");
    Spi::connect().write_latest(&RAISE, &[Arg::from(by)]);
}
