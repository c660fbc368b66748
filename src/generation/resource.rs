//! Resources: the row that every change locks first, creation, deletion, and the removal of tombstones.
//!
//! Invariant: an incarnation is drawn under the lock of the resource's row, from the sequence that also gives the tokens of
//! syncs. So a token below the resource's incarnation was given out for something that has since been deleted.

use pgrx::datum::{Interval, TimestampWithTimeZone};
use std::ffi::CStr;

use crate::error::Error;
use crate::lookup::{self, Lookup, Row, Strength};
use crate::sequence;
use crate::snapshot::{self, At};
use crate::spi::{Arg, Plan, Spi};

/// What names a resource.
#[derive(Clone, Copy)]
pub struct Key<'a> {
    pub tenant: &'a str,
    pub resource: &'a str,
}

impl Key<'_> {
    pub fn args(&self) -> [Arg<'static>; 2] {
        [
            Arg::from(self.tenant.to_owned()),
            Arg::from(self.resource.to_owned()),
        ]
    }

    pub fn undefined(&self, deleted: bool) -> Error {
        Error::UndefinedResource {
            resource: self.resource.to_owned(),
            deleted,
        }
    }
}

/// A resource as it is while its row is locked.
#[derive(Clone, Copy, Debug)]
pub struct Resource {
    pub incarnation: i64,
    pub generation: i64,
    pub deleted: bool,
}

/// The table, and the columns of it that are looked up without SQL.
pub const TABLE: &CStr = c"resources";
const INCARNATION: i16 = 3;
const GENERATION: i16 = 4;
const DELETED_AT: i16 = 7;

impl Resource {
    fn of(row: &Row) -> Option<Self> {
        Some(Resource {
            incarnation: row.get(INCARNATION)?,
            generation: row.get(GENERATION)?,
            deleted: row.get::<TimestampWithTimeZone>(DELETED_AT).is_some(),
        })
    }
}

/// Locks the row against everybody, to change the resource or to say which replicas are current. Waits, obeying lock_timeout.
pub fn lock(spi: &Spi, key: Key) -> Result<Option<Resource>, Error> {
    // NO KEY: the lock that an UPDATE of the row takes. It conflicts with the syncs' FOR SHARE.
    static EXCLUSIVE: Plan = Plan::new(
        "SELECT r.incarnation, r.generation, r.deleted_at IS NOT NULL FROM lockstep.resources AS r
         WHERE r.tenant = $1 AND r.resource = $2 FOR NO KEY UPDATE",
    );
    lock_with(spi, key, &EXCLUSIVE)
}

/// Locks the row against changes of the resource, along with others who sync its replicas.
pub fn lock_shared(spi: &Spi, key: Key) -> Result<Option<Resource>, Error> {
    static SHARED: Plan = Plan::new(
        "SELECT r.incarnation, r.generation, r.deleted_at IS NOT NULL FROM lockstep.resources AS r
         WHERE r.tenant = $1 AND r.resource = $2 FOR SHARE",
    );
    lock_with(spi, key, &SHARED)
}

/// Locks the row, if the resource is as it should be and nobody has locked it; the resource. For READ COMMITTED.
pub fn lock_if_free(
    resources: &Lookup,
    key: Key,
    strength: Strength,
    is_right: impl FnOnce(&Resource) -> bool,
) -> Option<Resource> {
    let keys = [
        lookup::Key::equal(1, key.tenant),
        lookup::Key::equal(2, key.resource),
    ];
    let mut walk = resources.walk(c"resources_pkey", &keys);
    walk.lock_next(strength, |row| Resource::of(row).filter(is_right))
}

/// Locks a resource that is there, else 42704.
pub fn lock_live(spi: &Spi, key: Key) -> Result<Resource, Error> {
    match lock(spi, key)? {
        Some(resource) if !resource.deleted => Ok(resource),
        other => Err(key.undefined(other.is_some())),
    }
}

fn lock_with(spi: &Spi, key: Key, plan: &Plan) -> Result<Option<Resource>, Error> {
    let rows = spi.write(plan, &key.args());
    let resource = || {
        Some(Resource {
            incarnation: rows.get(0, 1)?,
            generation: rows.get(0, 2)?,
            deleted: rows.get(0, 3)?,
        })
    };
    require_unchanged(spi, key)?;
    Ok(resource())
}

/// Under a transaction snapshot PostgreSQL refuses to write what was changed after it, but a row that this snapshot does not
/// show is silently not there, and a replica that has become current since would silently not follow. So, with the resource
/// locked, its rows must be those of the snapshot.
pub fn require_unchanged(spi: &Spi, key: Key) -> Result<(), Error> {
    static VERSIONS: Plan = Plan::new(
        "SELECT ARRAY(SELECT r.ctid::text FROM lockstep.resources AS r WHERE r.tenant = $1 AND r.resource = $2)
             || ARRAY(SELECT p.replica || ' ' || p.ctid::text FROM lockstep.replicas AS p
                      WHERE p.tenant = $1 AND p.resource = $2 ORDER BY p.replica)",
    );
    if !snapshot::is_transaction_snapshot() {
        return Ok(());
    }
    let versions = |at| {
        let versions: Option<Vec<String>> = spi.read(&VERSIONS, at, &key.args()).get(0, 1);
        versions
    };
    if versions(At::Transaction) != versions(At::Latest) {
        return Err(Error::SerializationFailure(format!(
            "Resource \"{}\" was changed after the transaction's snapshot.",
            key.resource
        )));
    }
    Ok(())
}

/// Creates the resource, or a new incarnation of one that was deleted. The replicas hold generation 0.
pub fn create(key: Key, replicas: &[String]) -> Result<i64, Error> {
    static INSERT: Plan = Plan::new(
        "INSERT INTO lockstep.replicas (tenant, resource, replica, generation, synced_at)
         SELECT $1, $2, n.replica, 0, pg_catalog.clock_timestamp() FROM unnest($3::text[]) AS n (replica)
         ON CONFLICT (tenant, resource, replica) DO NOTHING",
    );
    let spi = Spi::connect();
    let incarnation = create_empty(&spi, key)?;
    if !replicas.is_empty() {
        spi.write(&INSERT, &with(key, [Arg::from(replicas.to_vec())]));
    }
    Ok(incarnation)
}

/// The arguments of a statement: the key's and more.
pub fn with<'a, const N: usize>(key: Key, more: [Arg<'a>; N]) -> Vec<Arg<'a>> {
    key.args().into_iter().chain(more).collect()
}

pub fn create_empty(spi: &Spi, key: Key) -> Result<i64, Error> {
    // A tombstone until it is made: so that there is a row to lock before the incarnation is drawn.
    static PLACE: Plan = Plan::new(
        "INSERT INTO lockstep.resources (tenant, resource, incarnation, generation, created_at, changed_at, deleted_at)
         VALUES ($1, $2, 0, 0, pg_catalog.now(), pg_catalog.now(), pg_catalog.now())
         ON CONFLICT (tenant, resource) DO NOTHING",
    );
    static MAKE: Plan = Plan::new(
        "UPDATE lockstep.resources
         SET incarnation = $3, generation = 0, created_at = pg_catalog.clock_timestamp(),
             changed_at = pg_catalog.clock_timestamp(), deleted_at = NULL
         WHERE tenant = $1 AND resource = $2",
    );
    // The syncs of the last incarnation: their tokens are below the new one.
    static FORGET: Plan =
        Plan::new("DELETE FROM lockstep.replicas WHERE tenant = $1 AND resource = $2");
    let previous = loop {
        spi.write(&PLACE, &key.args());
        match lock(spi, key)? {
            Some(resource) if !resource.deleted => {
                return Err(Error::DuplicateResource {
                    resource: key.resource.to_owned(),
                    incarnation: resource.incarnation,
                });
            }
            Some(resource) => break resource.incarnation,
            // A tombstone that was purged between the two statements.
            None => {}
        }
    };
    let incarnation = sequence::TOKEN.next();
    sequence::require_above(incarnation, previous)?;
    snapshot::force_synchronous_commit();
    spi.write(&MAKE, &with(key, [Arg::from(incarnation)]));
    spi.write(&FORGET, &key.args());
    Ok(incarnation)
}

/// Makes the resource a tombstone. False: there was none.
pub fn delete(key: Key) -> Result<bool, Error> {
    let spi = Spi::connect();
    match lock(&spi, key)? {
        Some(resource) if !resource.deleted => {
            bury(&spi, key);
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// The row of a live claim stays until its sync finishes or the claim expires: it keeps the tombstone from being purged.
pub fn bury(spi: &Spi, key: Key) {
    static DELETE: Plan = Plan::new(
        "UPDATE lockstep.resources
         SET deleted_at = pg_catalog.clock_timestamp(), changed_at = pg_catalog.clock_timestamp()
         WHERE tenant = $1 AND resource = $2",
    );
    static REPLICAS: Plan = Plan::new(
        "DELETE FROM lockstep.replicas
         WHERE tenant = $1 AND resource = $2
           AND (sync_token IS NULL OR sync_expires_at <= pg_catalog.clock_timestamp())",
    );
    static CLAIMS: Plan = Plan::new(
        "UPDATE lockstep.replicas
         SET generation = NULL, synced_at = NULL, due_at = NULL
         WHERE tenant = $1 AND resource = $2",
    );
    for plan in [&DELETE, &REPLICAS, &CLAIMS] {
        spi.write(plan, &key.args());
    }
}

/// Removes the tenant's tombstones of that age; not those with a live claim, and not those that somebody is using.
pub fn purge(tenant: &str, older_than: Interval) -> Result<i64, Error> {
    const BATCH: usize = 10_000;
    static FIND: Plan = Plan::new(
        "SELECT r.resource, r.incarnation FROM lockstep.resources AS r
         WHERE r.tenant = $1 AND r.deleted_at IS NOT NULL AND r.deleted_at <= pg_catalog.clock_timestamp() - $2::interval
           AND NOT EXISTS (SELECT FROM lockstep.replicas AS p
                           WHERE p.tenant = r.tenant AND p.resource = r.resource
                             AND p.sync_expires_at > pg_catalog.clock_timestamp())",
    );
    // A claim that was made and orphaned while the rows were being locked is live, and not in the snapshot of that statement.
    static DELETE: Plan = Plan::new(
        "WITH purged AS (
             DELETE FROM lockstep.resources AS r
             WHERE r.tenant = $1 AND r.resource = ANY ($2)
               AND NOT EXISTS (SELECT FROM lockstep.replicas AS p
                               WHERE p.tenant = r.tenant AND p.resource = r.resource
                                 AND p.sync_expires_at > pg_catalog.clock_timestamp())
             RETURNING r.resource
         ), claims AS (
             DELETE FROM lockstep.replicas AS p
             WHERE p.tenant = $1 AND p.resource = ANY (ARRAY(SELECT purged.resource FROM purged))
         )
         SELECT pg_catalog.count(*) FROM purged",
    );
    let spi = Spi::connect();
    let rows = spi.read(
        &FIND,
        At::Latest,
        &[Arg::from(tenant), Arg::from(older_than)],
    );
    let found: Vec<(String, i64)> = (0..rows.count())
        .filter_map(|row| Some((rows.get(row, 1)?, rows.get(row, 2)?)))
        .collect();
    let mut purged = 0;
    for batch in found.chunks(BATCH) {
        let resources = Lookup::to_lock(TABLE);
        let lock = |(resource, incarnation): &(String, i64)| {
            let key = Key { tenant, resource };
            lock_if_free(&resources, key, Strength::Update, |resource| {
                resource.deleted && resource.incarnation == *incarnation
            })
            .map(|_| resource.clone())
        };
        let locked: Vec<String> = batch.iter().filter_map(lock).collect();
        drop(resources);
        let rows = spi.write(&DELETE, &[Arg::from(tenant), Arg::from(locked)]);
        purged += rows.get::<i64>(0, 1).unwrap_or_default();
    }
    Ok(purged)
}
