//! What each replica holds: writing, copying, and taking replicas out. All of it under the exclusive lock of the resource.

use super::resource::{self, Key, Resource, with};
use super::sync;
use crate::error::Error;
use crate::snapshot::At;
use crate::spi::{Arg, Plan, Spi};

/// A write: to the truth that lives elsewhere (None), or to the replicas named, of which those that are current follow.
pub fn increment(key: Key, replicas: Option<&[String]>) -> Result<i64, Error> {
    static FOLLOW: Plan = Plan::new(
        "UPDATE lockstep.replicas
         SET generation = generation + 1, synced_at = pg_catalog.clock_timestamp()
         WHERE tenant = $1 AND resource = $2 AND replica = ANY ($3) AND generation = $4",
    );
    let spi = Spi::connect();
    let before = resource::lock_live(&spi, key)?;
    let generation = next(before)?;
    if let Some(replicas) = replicas {
        let args = with(
            key,
            [Arg::from(replicas.to_vec()), Arg::from(before.generation)],
        );
        if spi.write(&FOLLOW, &args).count() == 0 {
            return Err(Error::OutdatedReplica {
                resource: key.resource.to_owned(),
                generation: before.generation,
                actual: actual(&spi, key, replicas),
            });
        }
    }
    raise_to(&spi, key, generation);
    Ok(generation)
}

/// The generations of the replicas, for a DETAIL.
fn actual(spi: &Spi, key: Key, replicas: &[String]) -> String {
    static ACTUAL: Plan = Plan::new(
        "SELECT pg_catalog.string_agg(pg_catalog.format('%s %s', n.replica, COALESCE(p.generation::text, 'none')), ', '
                                      ORDER BY n.ordinality)
         FROM unnest($3::text[]) WITH ORDINALITY AS n (replica)
         LEFT JOIN lockstep.replicas AS p ON p.tenant = $1 AND p.resource = $2 AND p.replica = n.replica",
    );
    let args = with(key, [Arg::from(replicas.to_vec())]);
    let actual: Option<String> = spi.read(&ACTUAL, At::Latest, &args).get(0, 1);
    actual.unwrap_or_else(|| "none".into())
}

/// The resource's next generation.
fn next(before: Resource) -> Result<i64, Error> {
    let next = before.generation.checked_add(1);
    next.ok_or_else(|| {
        Error::invalid(
            "generation out of range",
            before.generation,
            "room for one more",
            "Delete the resource and create it again: its generations begin anew, under a new incarnation.",
        )
    })
}

/// Gives the resource this generation. What is not at it wants a sync; what has wanted one for longer keeps its place. That the
/// source had nothing says nothing of its new generation.
fn raise_to(spi: &Spi, key: Key, generation: i64) {
    static RAISE: Plan = Plan::new(
        "WITH raised AS (
             UPDATE lockstep.resources SET generation = $3, changed_at = pg_catalog.clock_timestamp()
             WHERE tenant = $1 AND resource = $2
         )
         UPDATE lockstep.replicas
         SET due_at = CASE WHEN missing_at_source THEN pg_catalog.clock_timestamp()
                           ELSE GREATEST(pg_catalog.clock_timestamp(), retry_at) END,
             missing_at_source = false,
             retry_at = CASE WHEN missing_at_source THEN NULL ELSE retry_at END,
             retry_count = CASE WHEN missing_at_source THEN 0 ELSE retry_count END
         WHERE tenant = $1 AND resource = $2 AND generation IS DISTINCT FROM $3 AND (due_at IS NULL OR missing_at_source)",
    );
    spi.write(&RAISE, &with(key, [Arg::from(generation)]));
}

/// What a caller says that a replica holds now.
pub struct Holds<'a> {
    pub replica: &'a str,
    pub generation: i64,
    pub incarnation: Option<i64>,
    pub force: bool,
}

pub fn set(key: Key, holds: &Holds) -> Result<&'static str, Error> {
    static SET: Plan = Plan::new(
        "INSERT INTO lockstep.replicas AS p (tenant, resource, replica, generation, synced_at, due_at)
         VALUES ($1, $2, $3, $4, pg_catalog.clock_timestamp(),
                 CASE WHEN $4 < $5 THEN pg_catalog.clock_timestamp() END)
         ON CONFLICT (tenant, resource, replica) DO UPDATE
         SET generation = EXCLUDED.generation, synced_at = EXCLUDED.synced_at,
             due_at = CASE WHEN $4 < $5 THEN LEAST(p.due_at, EXCLUDED.due_at) END,
             retry_count = 0, retry_at = NULL, missing_at_source = false, last_error = NULL
         WHERE p.generation IS NULL OR p.generation < $4 OR ($6 AND p.generation > $4)
         RETURNING 1",
    );
    static HELD: Plan = Plan::new(
        "SELECT p.generation FROM lockstep.replicas AS p WHERE p.tenant = $1 AND p.resource = $2 AND p.replica = $3",
    );
    let spi = Spi::connect();
    let before = match resource::lock(&spi, key)? {
        None if holds.incarnation.is_none() => return Err(key.undefined(false)),
        Some(resource)
            if !resource.deleted
                && holds
                    .incarnation
                    .is_none_or(|incarnation| incarnation == resource.incarnation) =>
        {
            resource
        }
        _ => return Ok("gone"),
    };
    let args = with(
        key,
        [
            Arg::from(holds.replica),
            Arg::from(holds.generation),
            Arg::from(before.generation),
            Arg::from(holds.force),
        ],
    );
    if spi.write(&SET, &args).count() == 0 {
        let held = spi.read(&HELD, At::Latest, &with(key, [Arg::from(holds.replica)]));
        return Ok(if held.get(0, 1) == Some(holds.generation) {
            "unchanged"
        } else {
            "downgrade"
        });
    }
    if holds.generation > before.generation {
        raise_to(&spi, key, holds.generation);
    } else if holds.force {
        orphan(&spi, key, holds.replica);
        // A sync that began before would put back what was forced down.
        sync::release(&spi, key, holds.replica);
    }
    Ok("applied")
}

/// The generation that the target will have when the source has been copied to it; None: the source holds nothing.
pub fn replicated(key: Key, source: &str, target: &str) -> Result<Option<i64>, Error> {
    static BOTH: Plan = Plan::new(
        "SELECT r.deleted_at IS NOT NULL, s.generation, t.generation
         FROM lockstep.resources AS r
         LEFT JOIN lockstep.replicas AS s ON s.tenant = r.tenant AND s.resource = r.resource AND s.replica = $3
         LEFT JOIN lockstep.replicas AS t ON t.tenant = r.tenant AND t.resource = r.resource AND t.replica = $4
         WHERE r.tenant = $1 AND r.resource = $2",
    );
    let spi = Spi::connect();
    let args = with(key, [Arg::from(source), Arg::from(target)]);
    let rows = spi.read(&BOTH, At::Statement, &args);
    let deleted: Option<bool> = rows.get(0, 1);
    if deleted != Some(false) {
        return Err(key.undefined(deleted.is_some()));
    }
    let (source_generation, target_generation): (Option<i64>, Option<i64>) =
        (rows.get(0, 2), rows.get(0, 3));
    match target_generation {
        Some(target_generation) if source_generation.is_none_or(|s| s <= target_generation) => {
            Err(Error::GenerationDowngrade {
                resource: key.resource.to_owned(),
                source: source.to_owned(),
                target: target.to_owned(),
                source_generation,
                target_generation,
            })
        }
        _ => Ok(source_generation),
    }
}

/// The replicas at the resource's generation.
pub fn current(key: Key) -> Result<Vec<String>, Error> {
    static CURRENT: Plan = Plan::new(
        "SELECT p.replica FROM lockstep.resources AS r
         LEFT JOIN lockstep.replicas AS p
             ON p.tenant = r.tenant AND p.resource = r.resource AND p.generation = r.generation AND r.deleted_at IS NULL
         WHERE r.tenant = $1 AND r.resource = $2
         ORDER BY p.tenant, p.resource, p.replica",
    );
    let spi = Spi::connect();
    let rows = spi.read(&CURRENT, At::Statement, &key.args());
    if rows.count() == 0 {
        return Err(key.undefined(false));
    }
    Ok((0..rows.count())
        .filter_map(|row| rows.get(row, 1))
        .collect())
}

/// The resource's next generation is this replica's, and nobody else's. A sync to it would overwrite it: its claim is void.
pub fn make_authoritative(key: Key, replica: &str) -> Result<i64, Error> {
    static FOLLOW: Plan = Plan::new(
        "UPDATE lockstep.replicas
         SET generation = $4, synced_at = pg_catalog.clock_timestamp(), due_at = NULL,
             sync_token = NULL, sync_holder = NULL, sync_started_at = NULL, sync_expires_at = NULL,
             sync_generation = NULL, sync_source = NULL, sync_source_lost = false,
             retry_count = 0, retry_at = NULL, missing_at_source = false, last_error = NULL
         WHERE tenant = $1 AND resource = $2 AND replica = $3",
    );
    let spi = Spi::connect();
    let before = resource::lock_live(&spi, key)?;
    let generation = next(before)?;
    raise_to(&spi, key, generation);
    let args = with(key, [Arg::from(replica), Arg::from(generation)]);
    if spi.write(&FOLLOW, &args).count() == 0 {
        return Err(Error::UndefinedReplica {
            resource: key.resource.to_owned(),
            replica: replica.to_owned(),
        });
    }
    Ok(generation)
}

/// Takes the replica out. False: it was not there.
pub fn delete(key: Key, replica: &str) -> Result<bool, Error> {
    let spi = Spi::connect();
    remove(&spi, key, replica)
}

/// Takes out a replica whose content proved bad; the resource goes with its last replica.
pub fn invalidate(key: Key, replica: &str) -> Result<bool, Error> {
    static OTHERS: Plan = Plan::new(
        "SELECT 1 FROM lockstep.replicas AS p WHERE p.tenant = $1 AND p.resource = $2 LIMIT 1",
    );
    let spi = Spi::connect();
    let removed = remove(&spi, key, replica)?;
    if removed && spi.read(&OTHERS, At::Latest, &key.args()).count() == 0 {
        resource::bury(&spi, key);
    }
    Ok(removed)
}

fn remove(spi: &Spi, key: Key, replica: &str) -> Result<bool, Error> {
    static DELETE: Plan = Plan::new(
        "DELETE FROM lockstep.replicas WHERE tenant = $1 AND resource = $2 AND replica = $3",
    );
    if resource::lock(spi, key)?.is_none_or(|resource| resource.deleted) {
        return Ok(false);
    }
    let removed = spi.write(&DELETE, &with(key, [Arg::from(replica)])).count() > 0;
    if removed {
        orphan(spi, key, replica);
    }
    Ok(removed)
}

/// The syncs that copy from this replica have lost their source. That it is current at their end would not show it: it may have
/// been synced anew by then.
fn orphan(spi: &Spi, key: Key, source: &str) {
    static ORPHAN: Plan = Plan::new(
        "UPDATE lockstep.replicas SET sync_source_lost = true
         WHERE tenant = $1 AND resource = $2 AND sync_source = $3",
    );
    spi.write(&ORPHAN, &with(key, [Arg::from(source)]));
}
