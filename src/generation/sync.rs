//! Syncs: a claim with a token at the start, one conditional statement at the end.
//!
//! A claim is the replica row's `sync_*` columns; it is live until it expires, and valid until another takes it over. The
//! resource's row is locked shared, then the replica's, so that a claim's time is counted from after the wait.

use pgrx::datum::Interval;

use super::resource::{self, Key, Resource, with};
use crate::error::Error;
use crate::sequence;
use crate::snapshot::{self, At};
use crate::spi::{Arg, Plan, Spi};

/// What `begin` hands out.
pub struct Begun {
    pub status: &'static str,
    pub token: Option<i64>,
    pub incarnation: Option<i64>,
    pub generation: Option<i64>,
}

pub struct Request<'a> {
    pub target: &'a str,
    pub holder: &'a str,
    pub source: Option<&'a str>,
    pub ttl: Interval,
}

pub fn begin(key: Key, request: &Request) -> Result<Begun, Error> {
    static CLAIM: Plan = Plan::new(
        "UPDATE lockstep.replicas
         SET sync_token = pg_catalog.nextval('lockstep.token'), sync_holder = $4, sync_source = $5,
             sync_started_at = pg_catalog.clock_timestamp(), sync_expires_at = pg_catalog.clock_timestamp() + $6,
             sync_generation = $7, sync_source_lost = false, retry_at = NULL, missing_at_source = false
         WHERE tenant = $1 AND resource = $2 AND replica = $3
           AND due_at <= pg_catalog.clock_timestamp()
           AND (sync_token IS NULL OR sync_expires_at <= pg_catalog.clock_timestamp())
         RETURNING sync_token",
    );
    let spi = Spi::connect();
    let resource = match lock_to_begin(&spi, key, request.target)? {
        Some(resource) if !resource.deleted => resource,
        None => return Err(key.undefined(false)),
        Some(_) => {
            return Ok(Begun {
                status: "gone",
                token: None,
                incarnation: None,
                generation: None,
            });
        }
    };
    let begun = |status, token| Begun {
        status,
        token,
        incarnation: Some(resource.incarnation),
        generation: Some(resource.generation),
    };
    let args = with(
        key,
        [
            Arg::from(request.target),
            Arg::from(request.holder),
            Arg::from(request.source),
            Arg::from(request.ttl),
            Arg::from(resource.generation),
        ],
    );
    let Some(token) = spi.write(&CLAIM, &args).get(0, 1) else {
        return Ok(begun(why_not(&spi, key, request.target, resource), None));
    };
    sequence::require_above(token, resource.incarnation)?;
    snapshot::force_synchronous_commit();
    if let Some(source) = request.source {
        let actual = held(&spi, key, source);
        if actual != Some(resource.generation) {
            return Err(Error::SourceNotCurrent {
                resource: key.resource.to_owned(),
                source: source.to_owned(),
                actual,
                expected: resource.generation,
            });
        }
    }
    Ok(begun("started", Some(token)))
}

/// Why a replica could not be claimed a moment ago.
fn why_not(spi: &Spi, key: Key, target: &str, resource: Resource) -> &'static str {
    static STATE: Plan = Plan::new(
        "SELECT p.generation, p.sync_token IS NOT NULL FROM lockstep.replicas AS p
         WHERE p.tenant = $1 AND p.resource = $2 AND p.replica = $3",
    );
    let rows = spi.read(&STATE, At::Latest, &with(key, [Arg::from(target)]));
    if rows.get(0, 1) == Some(resource.generation) {
        "current"
    } else if rows.get(0, 2) == Some(true) {
        "busy"
    } else {
        "backoff"
    }
}

fn held(spi: &Spi, key: Key, replica: &str) -> Option<i64> {
    static HELD: Plan = Plan::new(
        "SELECT p.generation FROM lockstep.replicas AS p WHERE p.tenant = $1 AND p.resource = $2 AND p.replica = $3",
    );
    spi.read(&HELD, At::Latest, &with(key, [Arg::from(replica)]))
        .get(0, 1)
}

/// Locks the resource and the replica's row, which is made if it is not there.
fn lock_to_begin(spi: &Spi, key: Key, target: &str) -> Result<Option<Resource>, Error> {
    static ADD: Plan = Plan::new(
        "INSERT INTO lockstep.replicas (tenant, resource, replica, due_at)
         VALUES ($1, $2, $3, pg_catalog.clock_timestamp())
         ON CONFLICT (tenant, resource, replica) DO NOTHING",
    );
    if let Some(found) = lock_both(spi, key, target)? {
        return Ok(Some(found.resource));
    }
    let resource = resource::lock_shared(spi, key)?;
    if resource.is_some_and(|resource| !resource.deleted) {
        spi.write(&ADD, &with(key, [Arg::from(target)]));
        lock_both(spi, key, target)?;
    }
    Ok(resource)
}

/// The resource, and the replica's claim.
struct Found {
    resource: Resource,
    token: Option<i64>,
    source: Option<String>,
    source_lost: bool,
}

/// Locks both rows, the resource's first; None if one of them is not there.
fn lock_both(spi: &Spi, key: Key, replica: &str) -> Result<Option<Found>, Error> {
    static BOTH: Plan = Plan::new(
        "SELECT r.incarnation, r.generation, r.deleted_at IS NOT NULL, p.sync_token, p.sync_source, p.sync_source_lost
         FROM lockstep.resources AS r
         JOIN lockstep.replicas AS p ON p.tenant = r.tenant AND p.resource = r.resource
         WHERE r.tenant = $1 AND r.resource = $2 AND p.replica = $3
         FOR SHARE OF r FOR NO KEY UPDATE OF p",
    );
    let rows = spi.write(&BOTH, &with(key, [Arg::from(replica)]));
    let found = || {
        Some(Found {
            resource: Resource {
                incarnation: rows.get(0, 1)?,
                generation: rows.get(0, 2)?,
                deleted: rows.get(0, 3)?,
            },
            token: rows.get(0, 4),
            source: rows.get(0, 5),
            source_lost: rows.get(0, 6)?,
        })
    };
    let found = found();
    if found.is_some() {
        resource::require_unchanged(spi, key)?;
    }
    Ok(found)
}

/// Locks what a token is for, and tells what has become of it.
fn lock_claim(spi: &Spi, key: Key, target: &str, token: i64) -> Result<Standing, Error> {
    let (resource, found) = match lock_both(spi, key, target)? {
        Some(found) => (Some(found.resource), Some(found)),
        // Without the replica's row the resource's is still waited for: what deletes both may yet be rolled back.
        None => match resource::lock_shared(spi, key)? {
            None => (None, None),
            // It may be there now, with what that wait was for.
            resource => (resource, lock_both(spi, key, target)?),
        },
    };
    Ok(match (resource, found) {
        (None, _) | (_, None) => Standing::Gone { buried: false },
        (Some(resource), Some(_)) if token < resource.incarnation => {
            Standing::Gone { buried: false }
        }
        (Some(resource), Some(found)) if resource.deleted => Standing::Gone {
            buried: found.token == Some(token),
        },
        (Some(_), Some(found)) if found.token != Some(token) => Standing::Lost,
        (Some(_), Some(found)) => Standing::Valid(found),
    })
}

enum Standing {
    Valid(Found),
    /// The claim is another's, or was finished.
    Lost,
    /// The replica, the resource or its incarnation was deleted. `buried`: the claim keeps the tombstone.
    Gone {
        buried: bool,
    },
}

/// False: the claim is no longer the caller's.
pub fn renew(key: Key, target: &str, token: i64, ttl: Interval) -> Result<bool, Error> {
    static RENEW: Plan = Plan::new(
        "UPDATE lockstep.replicas SET sync_expires_at = pg_catalog.clock_timestamp() + $4
         WHERE tenant = $1 AND resource = $2 AND replica = $3",
    );
    let spi = Spi::connect();
    let Standing::Valid(_) = lock_claim(&spi, key, target, token)? else {
        return Ok(false);
    };
    spi.write(&RENEW, &with(key, [Arg::from(target), Arg::from(ttl)]));
    Ok(true)
}

/// How a sync ended.
pub enum End<'a> {
    Copied,
    Failed(Option<&'a str>),
    MissingAtSource(Option<&'a str>),
}

pub fn finish(key: Key, target: &str, token: i64, end: &End) -> Result<&'static str, Error> {
    static BURIED: Plan = Plan::new(
        "DELETE FROM lockstep.replicas WHERE tenant = $1 AND resource = $2 AND replica = $3",
    );
    let spi = Spi::connect();
    if let End::Copied = end
        && let Some(status) = finish_plainly(&spi, key, target, token)?
    {
        return Ok(status);
    }
    let found = match lock_claim(&spi, key, target, token)? {
        Standing::Valid(found) => found,
        Standing::Lost => return Ok("lost"),
        Standing::Gone { buried } => {
            if buried {
                spi.write(&BURIED, &with(key, [Arg::from(target)]));
            }
            return Ok("gone");
        }
    };
    let (error, missing) = match end {
        End::Copied if source_is_lost(&spi, key, &found) => {
            release(&spi, key, target);
            return Ok("source_lost");
        }
        End::Copied => {
            let recorded = record(&spi, key, target, token, found.resource, true);
            return Ok(recorded.unwrap_or("lost"));
        }
        End::Failed(error) => (*error, false),
        End::MissingAtSource(error) => (*error, true),
    };
    back_off(&spi, key, target, error, missing);
    Ok(if missing { "missing" } else { "failed" })
}

/// What most syncs come to, without a look at the replica's row before it is written: no source to judge, and the claim there.
/// The times that it records may be from before a wait for that row: nothing expires by them.
/// None: it is not so plain, and nothing was done.
fn finish_plainly(
    spi: &Spi,
    key: Key,
    target: &str,
    token: i64,
) -> Result<Option<&'static str>, Error> {
    Ok(match resource::lock_shared(spi, key)? {
        Some(resource) if !resource.deleted && token > resource.incarnation => {
            record(spi, key, target, token, resource, false)
        }
        _ => None,
    })
}

/// Records what the claim was for; None if it is not there, or names a source that nobody has judged. What the replica holds
/// already, it keeps: somebody may have recorded more.
fn record(
    spi: &Spi,
    key: Key,
    target: &str,
    token: i64,
    resource: Resource,
    source_is_good: bool,
) -> Option<&'static str> {
    static RECORD: Plan = Plan::new(
        "UPDATE lockstep.replicas
         SET generation = GREATEST(generation, sync_generation), synced_at = pg_catalog.clock_timestamp(),
             due_at = CASE WHEN GREATEST(generation, sync_generation) < $5 THEN pg_catalog.clock_timestamp() END,
             sync_token = NULL, sync_holder = NULL, sync_started_at = NULL, sync_expires_at = NULL,
             sync_generation = NULL, sync_source = NULL, sync_source_lost = false,
             retry_count = 0, retry_at = NULL, missing_at_source = false, last_error = NULL
         WHERE tenant = $1 AND resource = $2 AND replica = $3
           AND sync_token = $4 AND (sync_source IS NULL OR $6)
         RETURNING generation",
    );
    let args = with(
        key,
        [
            Arg::from(target),
            Arg::from(token),
            Arg::from(resource.generation),
            Arg::from(source_is_good),
        ],
    );
    let reached: i64 = spi.write(&RECORD, &args).get(0, 1)?;
    Some(if reached >= resource.generation {
        "current"
    } else {
        "outdated"
    })
}

fn source_is_lost(spi: &Spi, key: Key, found: &Found) -> bool {
    found.source.as_deref().is_some_and(|source| {
        found.source_lost || held(spi, key, source) != Some(found.resource.generation)
    })
}

/// Ends a claim that brought nothing, through no fault of the target.
pub fn release(spi: &Spi, key: Key, target: &str) {
    static RELEASE: Plan = Plan::new(
        "UPDATE lockstep.replicas
         SET sync_token = NULL, sync_holder = NULL, sync_started_at = NULL, sync_expires_at = NULL,
             sync_generation = NULL, sync_source = NULL, sync_source_lost = false
         WHERE tenant = $1 AND resource = $2 AND replica = $3",
    );
    spi.write(&RELEASE, &with(key, [Arg::from(target)]));
}

/// Ends a claim that failed. The next attempt is 1 s away, doubled for each failure more, and up to a quarter longer so that
/// what failed together is not tried together; never more than an hour. 4 hours and a little if the source had nothing.
fn back_off(spi: &Spi, key: Key, target: &str, error: Option<&str>, missing: bool) {
    static FAIL: Plan = Plan::new(
        "UPDATE lockstep.replicas AS p
         SET retry_count = LEAST(p.retry_count::bigint + 1, 2147483647)::int, retry_at = t.retry_at,
             due_at = CASE WHEN p.due_at IS NOT NULL THEN t.retry_at END,
             missing_at_source = $5, last_error = $4,
             sync_token = NULL, sync_holder = NULL, sync_started_at = NULL, sync_expires_at = NULL,
             sync_generation = NULL, sync_source = NULL, sync_source_lost = false
         FROM (SELECT pg_catalog.clock_timestamp()
                      + CASE WHEN $5 THEN interval '4 hours' * (1 + 0.05 * pg_catalog.random())
                             ELSE LEAST(interval '1 second' * pg_catalog.power(2, LEAST(o.retry_count, 30)),
                                        interval '48 minutes') * (1 + 0.25 * pg_catalog.random()) END AS retry_at
               FROM lockstep.replicas AS o WHERE o.tenant = $1 AND o.resource = $2 AND o.replica = $3 OFFSET 0) AS t
         WHERE p.tenant = $1 AND p.resource = $2 AND p.replica = $3",
    );
    let args = with(
        key,
        [Arg::from(target), Arg::from(error), Arg::from(missing)],
    );
    spi.write(&FAIL, &args);
}

/// Voids every claim: their tokens are no longer those that were handed out. The claims stay live until they expire.
pub fn raise_tokens(by: i64) {
    static RAISE: Plan = Plan::joining(
        "UPDATE lockstep.replicas SET sync_token = sync_token + $1 WHERE sync_token IS NOT NULL",
    );
    Spi::connect().write_latest(&RAISE, &[Arg::from(by)]);
}
