//! Generations: a resource has a generation, each of its replicas the one that it holds, and a sync brings a replica up.
//!
//! Invariants: while it lives, a resource's generation never falls, and a replica's falls only where `generation_set` is told
//! to force it. What was deleted comes back only by being created, as a new incarnation, which no earlier sync touches.
//!
//! Every function that writes locks the resource's row first: exclusively to change the resource or to say which replicas are current,
//! shared to sync a replica; then, in a next statement with a new snapshot, it judges and acts. A single statement would judge
//! by the resource as it was before its wait.
//!
//! A sync's steps, and what each prevents:
//! 1. `begin` hands out the resource's generation with a token: what `finish` records is not what the resource is at by then,
//!    so a change during the sync leaves the replica outdated, not falsely current;
//! 2. the token is drawn under the replica's lock: a claim that was taken over, or given back, has another one, and the first
//!    worker's finish is lost, not counted as the second's;
//! 3. incarnations and tokens come from one sequence: a token below the incarnation is that of a resource that was deleted, so
//!    a zombie's finish recreates nothing and does not touch what was created in its place;
//! 4. `finish` looks at the source, if one was named, under the lock that whatever makes a replica current or takes it out also
//!    takes: a copy of what proved bad, or fell behind, is not recorded;
//! 5. one statement records the generation and the success: no reader sees the one without the other.
//!
//! Locks: the resource before its replicas. Within one call at most one resource is waited for; `due.rs` takes several and
//! waits for none. A transaction that changes several resources should take them in one order.

mod due;
mod follow;
mod replica;
mod resource;
mod sync;

use pgrx::datum::Interval;
use pgrx::prelude::*;

use crate::argument;
use crate::error::{Error, OrRaise};
use crate::snapshot;
use crate::spi::{Columns, Table};
use resource::Key;

pub use sync::raise_tokens;

fn key<'a>(resource: Option<&'a str>, tenant: Option<&'a str>) -> Result<Key<'a>, Error> {
    Ok(Key {
        tenant: argument::tenant(tenant)?,
        resource: argument::name("resource", resource)?,
    })
}

fn names(argument: &'static str, value: Option<Vec<Option<String>>>) -> Result<Vec<String>, Error> {
    let value = argument::required(argument, value)?;
    Ok(argument::filter(argument, Some(value))?.unwrap_or_default())
}

/// Creates a resource at generation 0 and returns its incarnation. The `replicas` hold generation 0 and are current.
///
/// After `resource_delete` it is a new incarnation: syncs and calls of the old one say `gone`. Waits for another transaction
/// that creates or changes it. Raises 42710 if it is there.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn resource_create(
    resource: Option<&str>,
    replicas: default!(Option<Vec<Option<String>>>, "'{}'"),
    tenant: default!(Option<&str>, "''"),
) -> i64 {
    let run = || {
        let key = key(resource, tenant)?;
        let replicas = names("replicas", replicas)?;
        snapshot::require_read_write("resource_create")?;
        resource::create(key, &replicas)
    };
    run().or_raise()
}

/// Deletes a resource and its replicas; false if there is none. A tombstone stays until `resource_purge`: what comes late says
/// `gone` and recreates nothing. Waits for its changes and syncs in open transactions, not for claimed syncs.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn resource_delete(resource: Option<&str>, tenant: default!(Option<&str>, "''")) -> bool {
    let run = || {
        let key = key(resource, tenant)?;
        snapshot::require_read_write("resource_delete")?;
        resource::delete(key)
    };
    run().or_raise()
}

/// Removes the tenant's tombstones that are at least so old, and returns their number. Those with a live claim stay, and those
/// that another transaction has locked. Waits for nobody. Raises 25000 in REPEATABLE READ and SERIALIZABLE.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn resource_purge(older_than: Option<Interval>, tenant: default!(Option<&str>, "''")) -> i64 {
    let run = || {
        let older_than = argument::span("older_than", older_than)?;
        let tenant = argument::tenant(tenant)?;
        snapshot::require_read_write("resource_purge")?;
        snapshot::require_read_committed("resource_purge")?;
        resource::purge(tenant, older_than)
    };
    run().or_raise()
}

/// Adds one to the resource's generation and returns it.
///
/// `replicas` NULL: the truth lives elsewhere and has changed; every replica is outdated. Else those named that are current
/// follow, and all others are outdated. Waits for the resource's other changes, and for syncs that are beginning or finishing.
/// Raises LS005 if none of the named is current, 42704 if there is no such resource.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn generation_increment(
    resource: Option<&str>,
    replicas: default!(Option<Vec<Option<String>>>, "NULL"),
    tenant: default!(Option<&str>, "''"),
) -> i64 {
    let run = || {
        let key = key(resource, tenant)?;
        let replicas = match replicas {
            None => None,
            given => Some(names("replicas", given)?),
        };
        snapshot::require_read_write("generation_increment")?;
        replica::increment(key, replicas.as_deref())
    };
    run().or_raise()
}

/// Records the generation that a replica holds: `applied`; `unchanged`; `downgrade` (it holds a newer one and `force` is false:
/// nothing is changed); `gone` (the resource was deleted, or is not of this `incarnation`).
///
/// A replica that was not there is added. A generation above the resource's raises the resource, and outdates the other
/// replicas. Waits as `generation_increment`. Raises 42704 if there is no such resource and no `incarnation` is named.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn generation_set(
    resource: Option<&str>,
    replica: Option<&str>,
    generation: Option<i64>,
    incarnation: default!(Option<i64>, "NULL"),
    force: default!(Option<bool>, false),
    tenant: default!(Option<&str>, "''"),
) -> &'static str {
    let run = || {
        let key = key(resource, tenant)?;
        let holds = replica::Holds {
            replica: argument::name("replica", replica)?,
            generation: argument::required("generation", generation)?,
            incarnation,
            force: argument::required("force", force)?,
        };
        if holds.generation < 0 {
            return Err(Error::invalid(
                format!("generation must not be negative, not {}", holds.generation),
                holds.generation,
                "at least 0",
                "Give the generation that the replica holds.",
            ));
        }
        snapshot::require_read_write("generation_set")?;
        replica::set(key, &holds)
    };
    run().or_raise()
}

/// Returns the generation that `target` will hold when `source` has been copied to it: that of `source`, NULL if neither holds
/// anything. Waits for nobody: `replica_sync_begin` is what keeps it so. Raises LS004 if `target` is not behind, 42704 if there is
/// no such resource.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn generation_replicated(
    resource: Option<&str>,
    source: Option<&str>,
    target: Option<&str>,
    tenant: default!(Option<&str>, "''"),
) -> Option<i64> {
    let run = || {
        let key = key(resource, tenant)?;
        replica::replicated(
            key,
            argument::name("source", source)?,
            argument::name("target", target)?,
        )
    };
    run().or_raise()
}

/// Lists the replicas at the resource's generation, by name; none if it was deleted. Waits for nobody. Raises 42704 if there is
/// no such resource.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn generation_current(
    resource: Option<&str>,
    tenant: default!(Option<&str>, "''"),
) -> SetOfIterator<'static, String> {
    let run = || replica::current(key(resource, tenant)?);
    SetOfIterator::new(run().or_raise())
}

/// Declares that a replica holds the truth: it gets a new generation, which is returned, and all others are outdated. A sync
/// that is under way to it is `lost`. Waits as `generation_increment`. Raises 42704 if there is no such resource or replica.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn replica_make_authoritative(
    resource: Option<&str>,
    replica: Option<&str>,
    tenant: default!(Option<&str>, "''"),
) -> i64 {
    let run = || {
        let key = key(resource, tenant)?;
        let replica = argument::name("replica", replica)?;
        snapshot::require_read_write("replica_make_authoritative")?;
        replica::make_authoritative(key, replica)
    };
    run().or_raise()
}

/// Takes a replica out of the registry; false if it was not there. Syncs to it say `gone`, syncs from it `source_lost`. Waits as
/// `generation_increment`.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn replica_delete(
    resource: Option<&str>,
    replica: Option<&str>,
    tenant: default!(Option<&str>, "''"),
) -> bool {
    let run = || {
        let key = key(resource, tenant)?;
        let replica = argument::name("replica", replica)?;
        snapshot::require_read_write("replica_delete")?;
        replica::delete(key, replica)
    };
    run().or_raise()
}

/// Takes out a replica whose content proved bad, as `replica_delete`; with its last replica the resource is deleted.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn replica_invalidate(
    resource: Option<&str>,
    replica: Option<&str>,
    tenant: default!(Option<&str>, "''"),
) -> bool {
    let run = || {
        let key = key(resource, tenant)?;
        let replica = argument::name("replica", replica)?;
        snapshot::require_read_write("replica_invalidate")?;
        replica::invalidate(key, replica)
    };
    run().or_raise()
}

/// Begins a sync of `target`: `started`, with the token that `replica_sync_finish` wants and the generation that it will record;
/// or `current`; `busy` (another claim is live); `backoff` (it failed a short time ago); `gone` (the resource was deleted).
///
/// `source` is the replica to copy from, which must be current; NULL: the truth lives elsewhere. A target that was not there is
/// added. The claim is live for `ttl`; after that another may take it over. Waits for the resource's changes in open
/// transactions and for another begin or finish of the same target, obeying lock_timeout. Raises LS006 if the source is not
/// current, 42704 if there is no such resource.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn replica_sync_begin(
    resource: Option<&str>,
    target: Option<&str>,
    holder: Option<&str>,
    source: default!(Option<&str>, "NULL"),
    ttl: default!(Option<Interval>, "'1 minute'"),
    tenant: default!(Option<&str>, "''"),
) -> Table<SyncBegin> {
    let run = || {
        let key = key(resource, tenant)?;
        let request = sync::Request {
            target: argument::name("target", target)?,
            holder: argument::name("holder", holder)?,
            source: source
                .map(|source| argument::name("source", Some(source)))
                .transpose()?,
            ttl: argument::positive_span("ttl", ttl)?,
        };
        snapshot::require_read_write("replica_sync_begin")?;
        let begun = sync::begin(key, &request)?;
        Ok::<_, Error>(Table::new(vec![vec![
            begun.status.into_datum(),
            begun.token.into_datum(),
            begun.incarnation.into_datum(),
            begun.generation.into_datum(),
        ]]))
    };
    run().or_raise()
}

struct SyncBegin;

impl Columns for SyncBegin {
    const SQL: &'static str =
        "TABLE (status text, token bigint, incarnation bigint, generation bigint)";
}

/// Keeps a claim live for `ttl` from now; false if it is no longer the caller's: taken over, finished, or its replica or resource
/// deleted. An expired claim that nobody has taken over is live again. Waits as `replica_sync_begin`.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn replica_sync_renew(
    resource: Option<&str>,
    target: Option<&str>,
    token: Option<i64>,
    ttl: default!(Option<Interval>, "'1 minute'"),
    tenant: default!(Option<&str>, "''"),
) -> bool {
    let run = || {
        let key = key(resource, tenant)?;
        let target = argument::name("target", target)?;
        let token = argument::required("token", token)?;
        let ttl = argument::positive_span("ttl", ttl)?;
        snapshot::require_read_write("replica_sync_renew")?;
        sync::renew(key, target, token, ttl)
    };
    run().or_raise()
}

/// Ends a sync and its claim.
///
/// With `error` NULL the replica gets the generation that `begin` handed out: `current`, or `outdated` (a newer one came
/// meanwhile). Else `failed`: the next attempt waits 1 s, doubled for each failure more, at most 1 hour. `missing_at_source`:
/// `missing`, and the next attempt waits 4 hours. Nothing is recorded with `source_lost` (the named source is no longer current
/// or was taken out), `lost` (the claim is another's, or was finished) and `gone` (the replica, the resource or its incarnation
/// was deleted). Waits as `replica_sync_begin`, and judges by what is there after the wait.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn replica_sync_finish(
    resource: Option<&str>,
    target: Option<&str>,
    token: Option<i64>,
    error: default!(Option<&str>, "NULL"),
    missing_at_source: default!(Option<bool>, false),
    tenant: default!(Option<&str>, "''"),
) -> &'static str {
    let run = || {
        let key = key(resource, tenant)?;
        let target = argument::name("target", target)?;
        let token = argument::required("token", token)?;
        let end = match argument::required("missing_at_source", missing_at_source)? {
            true => sync::End::MissingAtSource(error),
            false if error.is_some() => sync::End::Failed(error),
            false => sync::End::Copied,
        };
        snapshot::require_read_write("replica_sync_finish")?;
        sync::finish(key, target, token, &end)
    };
    run().or_raise()
}

/// Picks what wants a sync: outdated or missing replicas that are not in backoff and have no live claim, the longest due first.
/// `tenant` NULL: of any tenant, in equal shares.
///
/// Until this transaction ends nobody else picks or changes them: begin what you picked in the same transaction, and commit.
/// Skips what others have locked; waits for nobody. Raises 25000 in REPEATABLE READ and SERIALIZABLE.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn replicas_due(
    max_replicas: default!(Option<i32>, 100),
    tenant: default!(Option<&str>, "''"),
) -> Table<ReplicasDue> {
    let run = || {
        let max = max_replicas_argument(max_replicas)?;
        let tenant = argument::any_tenant(tenant)?;
        snapshot::require_read_write("replicas_due")?;
        snapshot::require_read_committed("replicas_due")?;
        let row = |due: due::Due| {
            vec![
                due.name.resource.into_datum(),
                due.name.replica.into_datum(),
                due.held.into_datum(),
                due.generation.into_datum(),
                due.due_at.into_datum(),
                due.name.tenant.into_datum(),
            ]
        };
        let picked = due::due(max, tenant);
        Ok::<_, Error>(picked.into_iter().map(row).collect())
    };
    Table::new(run().or_raise())
}

struct ReplicasDue;

impl Columns for ReplicasDue {
    const SQL: &'static str = "TABLE (resource text, target text, held_generation bigint, generation bigint, due_at timestamptz, resource_tenant text)";
}

/// Picks as `replicas_due` and begins their syncs, without a source: a row for each, with the token that `replica_sync_finish`
/// wants. Expired claims are taken over. Waits for nobody. Raises 25000 in REPEATABLE READ and SERIALIZABLE.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn replica_sync_claim(
    holder: Option<&str>,
    max_replicas: default!(Option<i32>, 100),
    ttl: default!(Option<Interval>, "'1 minute'"),
    tenant: default!(Option<&str>, "''"),
) -> Table<SyncClaim> {
    let run = || {
        let holder = argument::name("holder", holder)?;
        let max = max_replicas_argument(max_replicas)?;
        let ttl = argument::positive_span("ttl", ttl)?;
        let tenant = argument::any_tenant(tenant)?;
        snapshot::require_read_write("replica_sync_claim")?;
        snapshot::require_read_committed("replica_sync_claim")?;
        let row = |claimed: due::Claimed| {
            vec![
                claimed.name.resource.into_datum(),
                claimed.name.replica.into_datum(),
                claimed.token.into_datum(),
                claimed.incarnation.into_datum(),
                claimed.generation.into_datum(),
                claimed.name.tenant.into_datum(),
            ]
        };
        let claimed = due::claim(max, tenant, holder, ttl)?;
        Ok::<_, Error>(claimed.into_iter().map(row).collect())
    };
    Table::new(run().or_raise())
}

struct SyncClaim;

impl Columns for SyncClaim {
    const SQL: &'static str = "TABLE (resource text, target text, token bigint, incarnation bigint, generation bigint, resource_tenant text)";
}

fn max_replicas_argument(value: Option<i32>) -> Result<usize, Error> {
    let value = argument::required("max_replicas", value)?;
    Ok(argument::positive("max_replicas", value)? as usize)
}

/// Does to the registry what an event of the log says of the resource, for use in a projection's handler: `created` (its type
/// ends with "created", or it is the first that is heard of the resource), `incremented` ("updated"; "created" of one that is
/// there), `deleted`, `gone` (there is nothing to change or delete), `ignored` (another type). The `replicas` are to hold the
/// resource: those that are not there yet are added, holding nothing. Waits as `generation_increment`.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn registry_follow(
    event_type: Option<&str>,
    resource: Option<&str>,
    replicas: default!(Option<Vec<Option<String>>>, "'{}'"),
    tenant: default!(Option<&str>, "''"),
) -> &'static str {
    let run = || {
        let event_type = argument::name("event_type", event_type)?;
        let key = key(resource, tenant)?;
        let replicas = names("replicas", replicas)?;
        snapshot::require_read_write("registry_follow")?;
        follow::follow(key, event_type, &replicas)
    };
    run().or_raise()
}
