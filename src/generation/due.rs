//! What wants a sync: the pick among it that several workers make without meeting, and the claim of what was picked.
//!
//! A pick locks as a sync does, the resource shared and then the replica, and skips what is locked: it waits for nobody, so the
//! order in which it meets resources cannot deadlock. Until its transaction ends nobody else picks the same.

use pgrx::datum::{Interval, TimestampWithTimeZone, clock_timestamp};
use std::collections::HashSet;

use super::resource;
use crate::error::Error;
use crate::lookup::{Key, Lookup, Row, Strength};
use crate::sequence;
use crate::snapshot::{self, At};
use crate::spi::{Arg, Plan, Spi};

/// A replica that was picked, or claimed.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Name {
    pub tenant: String,
    pub resource: String,
    pub replica: String,
}

impl Name {
    fn of(row: &Row, tenant: &str) -> Option<Self> {
        Some(Name {
            tenant: tenant.to_owned(),
            resource: row.get(column::RESOURCE)?,
            replica: row.get(column::REPLICA)?,
        })
    }
}

pub struct Due {
    pub name: Name,
    pub held: Option<i64>,
    pub generation: i64,
    pub due_at: Option<TimestampWithTimeZone>,
}

pub struct Claimed {
    pub name: Name,
    pub token: i64,
    pub incarnation: i64,
    pub generation: i64,
}

/// Picks up to `max` replicas, the longest due first; `tenant` None: of any tenant, each getting an equal share as long as it
/// has so many.
pub fn due(max: usize, tenant: Option<&str>) -> Vec<Due> {
    pick(&Spi::connect(), max, tenant)
}

/// Picks and claims, as `sync::begin` without a source does.
pub fn claim(
    max: usize,
    tenant: Option<&str>,
    holder: &str,
    ttl: Interval,
) -> Result<Vec<Claimed>, Error> {
    let spi = Spi::connect();
    let picked = pick(&spi, max, tenant);
    claim_picked(&spi, &picked, holder, ttl)
}

fn pick(spi: &Spi, max: usize, tenant: Option<&str>) -> Vec<Due> {
    if let Some(tenant) = tenant {
        return pick_of(tenant, max);
    }
    let mut tenants = tenants(spi);
    let mut share = 0;
    let mut picked: Vec<Due> = Vec::new();
    let mut names = HashSet::new();
    while picked.len() < max && !tenants.is_empty() {
        share += (max - picked.len()).div_ceil(tenants.len());
        tenants.retain(|tenant| {
            if picked.len() >= max {
                return false;
            }
            // What this transaction has picked before comes again: it skips the locks of others only.
            let of_tenant = pick_of(tenant, share);
            let more = of_tenant.len() == share;
            let new = of_tenant
                .into_iter()
                .filter(|due| names.insert(due.name.clone()));
            picked.extend(new.take(max - picked.len()));
            more
        });
    }
    picked
}

/// All tenants with something due, the one that has waited longest first: one descent of the index for each. What is due may be
/// claimed already, so the first ones may have nothing to pick.
fn tenants(spi: &Spi) -> Vec<String> {
    static TENANTS: Plan = Plan::new(
        "WITH RECURSIVE walk (tenant, due_at) AS (
             (SELECT p.tenant, p.due_at FROM lockstep.replicas AS p
              WHERE p.due_at IS NOT NULL ORDER BY p.tenant, p.due_at LIMIT 1)
             UNION ALL
             SELECT n.tenant, n.due_at
             FROM walk
             CROSS JOIN LATERAL (SELECT p.tenant, p.due_at FROM lockstep.replicas AS p
                                 WHERE p.due_at IS NOT NULL AND p.tenant > walk.tenant
                                 ORDER BY p.tenant, p.due_at LIMIT 1) AS n
         )
         SELECT walk.tenant FROM walk WHERE walk.due_at <= $1 ORDER BY walk.due_at",
    );
    let rows = spi.read(&TENANTS, At::Latest, &[Arg::from(clock_timestamp())]);
    (0..rows.count())
        .filter_map(|row| rows.get(row, 1))
        .collect()
}

/// The clock is read before: a pick waits for nothing, and the index is walked only as far as something is due.
fn pick_of(tenant: &str, max: usize) -> Vec<Due> {
    let now = clock_timestamp();
    let replicas = Lookup::to_lock(c"replicas");
    let resources = Lookup::to_lock(resource::TABLE);
    let keys = [Key::equal(1, tenant), Key::at_most(2, now)];
    let mut walk = replicas.walk(c"replicas_tenant_due_at_idx", &keys);
    let mut picked = Vec::new();
    while picked.len() < max
        && let Some(row) = walk.step()
    {
        if is_syncing(&row, now) {
            continue;
        }
        let Some(name) = Name::of(&row, tenant) else {
            continue;
        };
        let Some(generation) = lock_generation(&resources, &name) else {
            continue;
        };
        let due = Due {
            name,
            held: row.get(column::GENERATION),
            generation,
            due_at: row.get(column::DUE_AT),
        };
        if walk.lock(Strength::NoKeyUpdate) {
            picked.push(due);
        }
    }
    picked
}

fn is_syncing(row: &Row, now: TimestampWithTimeZone) -> bool {
    let expires_at: Option<TimestampWithTimeZone> = row.get(column::SYNC_EXPIRES_AT);
    row.get::<i64>(column::SYNC_TOKEN).is_some()
        && expires_at.is_some_and(|expires_at| expires_at > now)
}

/// The generation of the resource, whose row is locked shared, unless somebody has it.
fn lock_generation(resources: &Lookup, name: &Name) -> Option<i64> {
    let key = resource::Key {
        tenant: &name.tenant,
        resource: &name.resource,
    };
    resource::lock_if_free(resources, key, Strength::Share, |_| true)
        .map(|resource| resource.generation)
}

/// The columns of `lockstep.replicas` that are looked up without SQL.
mod column {
    pub const RESOURCE: i16 = 2;
    pub const REPLICA: i16 = 3;
    pub const GENERATION: i16 = 4;
    pub const DUE_AT: i16 = 6;
    pub const SYNC_TOKEN: i16 = 7;
    pub const SYNC_EXPIRES_AT: i16 = 10;
}

fn claim_picked(
    spi: &Spi,
    picked: &[Due],
    holder: &str,
    ttl: Interval,
) -> Result<Vec<Claimed>, Error> {
    static CLAIM: Plan = Plan::new(
        "UPDATE lockstep.replicas AS p
         SET sync_token = pg_catalog.nextval('lockstep.token'), sync_holder = $4, sync_source = NULL,
             sync_started_at = pg_catalog.clock_timestamp(), sync_expires_at = pg_catalog.clock_timestamp() + $5,
             sync_generation = r.generation, sync_source_lost = false, retry_at = NULL, missing_at_source = false
         FROM unnest($1::text[], $2::text[], $3::text[]) AS n (tenant, resource, replica)
         JOIN lockstep.resources AS r ON r.tenant = n.tenant AND r.resource = n.resource
         WHERE p.tenant = n.tenant AND p.resource = n.resource AND p.replica = n.replica
         RETURNING p.tenant, p.resource, p.replica, p.sync_token, r.incarnation, p.sync_generation",
    );
    if picked.is_empty() {
        return Ok(Vec::new());
    }
    let column = |of: fn(&Name) -> &String| {
        Arg::from(
            picked
                .iter()
                .map(|due| of(&due.name).clone())
                .collect::<Vec<_>>(),
        )
    };
    let args = [
        column(|name| &name.tenant),
        column(|name| &name.resource),
        column(|name| &name.replica),
        Arg::from(holder),
        Arg::from(ttl),
    ];
    let rows = spi.write(&CLAIM, &args);
    snapshot::force_synchronous_commit();
    let claimed = |row| {
        Some(Claimed {
            name: Name {
                tenant: rows.get(row, 1)?,
                resource: rows.get(row, 2)?,
                replica: rows.get(row, 3)?,
            },
            token: rows.get(row, 4)?,
            incarnation: rows.get(row, 5)?,
            generation: rows.get(row, 6)?,
        })
    };
    let claimed: Vec<Claimed> = (0..rows.count()).filter_map(claimed).collect();
    for claim in &claimed {
        sequence::require_above(claim.token, claim.incarnation)?;
    }
    Ok(claimed)
}
