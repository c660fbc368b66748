//! What a projection is: creating, changing, giving away and dropping it.
//!
//! These functions must know their caller and so run with the caller's rights (see `rights.rs`); each SQL statement here is
//! schema-qualified and runs as the extension's owner. Whether the caller may is decided before any lock is requested, so that
//! a stranger cannot hold up claims.

use pgrx::datum::Interval;

use super::cursor;
use super::held;
use crate::argument;
use crate::error::Error;
use crate::event_log::settle::{self, Horizons};
use crate::event_log::{Filter, event_at, last_position, tenants};
use crate::lock::{Mode, Tag};
use crate::position::Position;
use crate::rights::{self, Procedure, Role};
use crate::snapshot::{self, At};
use crate::spi::{Arg, EventTypes, Plan, Spi};
use crate::wakeup;

pub struct NewProjection<'a> {
    pub name: &'a str,
    pub filter: Filter,
    pub handler: Option<String>,
    pub batch_size: i32,
    pub max_failures: i32,
    pub retry_after: Interval,
    /// None: after what each tenant has settled now.
    pub start_after: Option<Position>,
}

/// What to change; None keeps. In the filters and the handler, Some(None) clears.
pub struct Changes {
    pub aggregate_types: Option<Option<Vec<String>>>,
    pub event_types: Option<Option<Vec<String>>>,
    pub handler: Option<Option<String>>,
    pub batch_size: Option<i32>,
    pub max_failures: Option<i32>,
    pub retry_after: Option<Interval>,
}

pub fn filter_change(
    argument: &'static str,
    value: Option<Vec<Option<String>>>,
) -> Result<Option<Option<Vec<String>>>, Error> {
    match value {
        None => Ok(None),
        given => Ok(Some(argument::filter(argument, given)?)),
    }
}

/// The handler as it is stored: schema-qualified, with its argument types.
pub fn handler_name(handler: Option<Procedure>) -> Result<Option<String>, Error> {
    let Some(handler) = handler.filter(|handler| !handler.is_none()) else {
        return Ok(None);
    };
    if !handler.is_plain_function() {
        return Err(Error::InvalidParameter {
            message: format!(
                "handler {} is not a function that returns one value",
                handler.0.to_u32()
            ),
            detail:
                "Actual: an aggregate, a procedure, one that returns a set, or nothing of this oid."
                    .into(),
            hint: A_HANDLER,
        });
    }
    let name = handler.qualified_name();
    let types = EventTypes::look_up();
    if handler
        .argument_type()
        .is_some_and(|argument| argument == types.row || argument == types.array)
    {
        return Ok(Some(name));
    }
    Err(Error::InvalidParameter {
        message: format!("handler {name} does not take an event"),
        detail:
            "Actual other arguments, expected one, of type lockstep.events or lockstep.events[]."
                .into(),
        hint: A_HANDLER,
    })
}

const A_HANDLER: &str = "CREATE FUNCTION … (lockstep.events) or (lockstep.events[])";

pub fn create(new: &NewProjection, if_not_exists: bool) -> Result<bool, Error> {
    snapshot::require_read_write("projection_create")?;
    let owner = rights::role_name(rights::caller()).unwrap_or_default();
    let created = rights::as_extension_owner(|| insert(new, &owner));
    if !created && !if_not_exists {
        return Err(Error::DuplicateProjection(new.name.to_owned()));
    }
    Ok(created)
}

fn insert(new: &NewProjection, owner: &str) -> bool {
    static INSERT: Plan = Plan::new(
        "INSERT INTO lockstep.projections (name, owner, aggregate_types, event_types, handler, batch_size, max_failures,
                                           retry_after, start_after, created_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, pg_catalog.clock_timestamp())
         ON CONFLICT (name) DO NOTHING",
    );
    let spi = Spi::connect();
    let args = [
        Arg::from(new.name),
        Arg::from(owner),
        Arg::from(new.filter.aggregate_types.clone()),
        Arg::from(new.filter.event_types.clone()),
        Arg::from(new.handler.as_deref()),
        Arg::from(new.batch_size),
        Arg::from(new.max_failures),
        Arg::from(new.retry_after),
        Arg::from(new.start_after.unwrap_or(Position::ZERO)),
    ];
    let created = spi.write(&INSERT, &args).count() == 1;
    if created {
        delete_progress(&spi, new.name);
        if new.start_after.is_none() {
            start_at_horizons(&spi, new.name);
        }
        wakeup::announce_projection_change();
    }
    created
}

/// Also when a projection is created: a cursor that was left over, by whatever way, would skip events silently.
fn delete_progress(spi: &Spi, name: &str) {
    static CURSORS: Plan =
        Plan::new("DELETE FROM lockstep.projection_cursors WHERE projection = $1");
    static PAUSES: Plan = Plan::new("DELETE FROM lockstep.projection_pauses WHERE projection = $1");
    static FAILED: Plan = Plan::new("DELETE FROM lockstep.failed_events WHERE projection = $1");
    for delete in [&CURSORS, &PAUSES, &FAILED] {
        spi.write(delete, &[Arg::from(name)]);
    }
}

/// Puts a cursor at what each tenant has settled now. Events that are visible but not settled come later, as any others.
fn start_at_horizons(spi: &Spi, name: &str) {
    static INSERT: Plan = Plan::new(
        "INSERT INTO lockstep.projection_cursors (projection, tenant, position)
         SELECT $1, t.tenant, settled.position
         FROM unnest($2::text[], $3::numeric[]) AS t (tenant, horizon)
         CROSS JOIN LATERAL (SELECT e.position FROM lockstep.events AS e
                             WHERE e.tenant = t.tenant AND e.position <= t.horizon
                             ORDER BY e.position DESC LIMIT 1) AS settled",
    );
    let horizons = Horizons::now();
    let tenants = tenants(spi);
    let positions: Vec<Position> = tenants.iter().map(|tenant| horizons.of(tenant)).collect();
    let args = [Arg::from(name), Arg::from(tenants), Arg::from(positions)];
    spi.write(&INSERT, &args);
}

pub fn alter(name: &str, changes: Changes) -> Result<(), Error> {
    static UPDATE: Plan = Plan::new(
        "UPDATE lockstep.projections
         SET aggregate_types = CASE WHEN $2 THEN $3 ELSE aggregate_types END,
             event_types = CASE WHEN $4 THEN $5 ELSE event_types END,
             handler = CASE WHEN $6 THEN $7 ELSE handler END,
             batch_size = COALESCE($8, batch_size),
             max_failures = COALESCE($9, max_failures),
             retry_after = COALESCE($10, retry_after)
         WHERE name = $1",
    );
    let args = [
        Arg::from(name),
        Arg::from(changes.aggregate_types.is_some()),
        Arg::from(changes.aggregate_types.flatten()),
        Arg::from(changes.event_types.is_some()),
        Arg::from(changes.event_types.flatten()),
        Arg::from(changes.handler.is_some()),
        Arg::from(changes.handler.flatten()),
        Arg::from(changes.batch_size),
        Arg::from(changes.max_failures),
        Arg::from(changes.retry_after),
    ];
    exclusively("projection_alter", name, || {
        Spi::connect().write(&UPDATE, &args);
    })
}

pub fn drop(name: &str) -> Result<(), Error> {
    static DEFINITION: Plan = Plan::new("DELETE FROM lockstep.projections WHERE name = $1");
    exclusively("projection_drop", name, || {
        let spi = Spi::connect();
        delete_progress(&spi, name);
        spi.write(&DEFINITION, &[Arg::from(name)]);
    })
}

/// Runs `body` while no other transaction has claimed the projection in any tenant. What this one has claimed is forgotten:
/// it was claimed under another definition.
fn exclusively(function: &'static str, name: &str, body: impl FnOnce()) -> Result<(), Error> {
    snapshot::require_read_write(function)?;
    // What an older snapshot does not show, the statements of `body` would leave behind.
    snapshot::require_read_committed(function)?;
    require_owner(name)?;
    settle::refuse_after_push(function)?;
    Tag::projection_all(name).acquire_after_holders();
    // Dropped, or given to another role, while this waited.
    require_owner(name)?;
    rights::as_extension_owner(body);
    wakeup::announce_projection_change();
    held::forget(name, None);
    Ok(())
}

/// Puts the cursor of one tenant at 0 or at a settled event, when no other transaction has claimed it.
pub fn reset(name: &str, tenant: &str, up_to: Position) -> Result<(), Error> {
    snapshot::require_read_write("projection_reset")?;
    snapshot::require_read_committed("projection_reset")?;
    require_owner(name)?;
    settle::refuse_after_push("projection_reset()")?;
    held::refuse_in_handler(name, tenant)?;
    Tag::projection_all(name).acquire(Mode::Shared);
    Tag::projection(name, tenant).acquire(Mode::Exclusive);
    require_owner(name)?;
    rights::as_extension_owner(|| {
        let settled = last_position(tenant, settle::horizon(tenant));
        if up_to > settled || up_to > Position::ZERO && event_at(tenant, up_to).count() == 0 {
            return Err(Error::InvalidParameter {
                message: format!("up_to {up_to} is not the position of a settled event"),
                detail: format!("The last settled event of tenant \"{tenant}\" is at {settled}."),
                hint: "Give the position of an event up to there, or leave it out.",
            });
        }
        cursor::reset(name, tenant, up_to);
        Ok(())
    })?;
    wakeup::announce_projection_change();
    held::forget(name, Some(tenant));
    Ok(())
}

/// What is said of one tenant holds for it until something is said of all.
pub fn set_paused(
    function: &'static str,
    name: &str,
    tenant: Option<&str>,
    paused: bool,
) -> Result<(), Error> {
    static ALL: Plan = Plan::new("UPDATE lockstep.projections SET paused = $2 WHERE name = $1");
    static NO_TENANT: Plan =
        Plan::new("DELETE FROM lockstep.projection_pauses WHERE projection = $1");
    static ONE: Plan = Plan::new(
        "INSERT INTO lockstep.projection_pauses (projection, tenant, paused) VALUES ($1, $3, $2)
         ON CONFLICT (projection, tenant) DO UPDATE SET paused = EXCLUDED.paused",
    );
    snapshot::require_read_write(function)?;
    require_owner(name)?;
    rights::as_extension_owner(|| {
        let spi = Spi::connect();
        let (projection, paused) = (|| Arg::from(name), Arg::from(paused));
        match tenant {
            Some(tenant) => {
                spi.write(&ONE, &[projection(), paused, Arg::from(tenant)]);
            }
            None => {
                spi.write(&ALL, &[projection(), paused]);
                spi.write(&NO_TENANT, &[projection()]);
            }
        }
    });
    wakeup::announce_projection_change();
    Ok(())
}

/// The update names the owner that was checked: in the meantime the projection may have been given to another.
pub fn set_owner(name: &str, owner: Role) -> Result<(), Error> {
    static UPDATE: Plan =
        Plan::new("UPDATE lockstep.projections SET owner = $2 WHERE name = $1 AND owner = $3");
    snapshot::require_read_write("projection_owner")?;
    let old_owner = require_owner(name)?;
    let new_owner = rights::role_name(owner.0).ok_or_else(|| {
        Error::invalid(
            format!("owner {} is not a role", owner.0.to_u32()),
            "no role of this oid",
            "a role",
            "Name it: 'role'::regrole.",
        )
    })?;
    if !rights::may_give_to(rights::caller(), owner.0) {
        return Err(Error::NotMember { role: new_owner });
    }
    let args = [Arg::from(name), Arg::from(new_owner), Arg::from(old_owner)];
    if rights::as_extension_owner(|| Spi::connect().write(&UPDATE, &args).count()) == 1 {
        wakeup::announce_projection_change();
        return Ok(());
    }
    require_owner(name)?;
    Err(Error::SerializationFailure(format!(
        "The owner of projection \"{name}\" was changed meanwhile."
    )))
}

/// Returns the owner if the caller may act for it.
fn require_owner(name: &str) -> Result<String, Error> {
    static OWNER: Plan = Plan::new("SELECT owner FROM lockstep.projections WHERE name = $1");
    let owner: Option<String> = rights::as_extension_owner(|| {
        Spi::connect()
            .read(&OWNER, At::Latest, &[Arg::from(name)])
            .get(0, 1)
    });
    let owner = owner.ok_or_else(|| Error::UndefinedProjection(name.to_owned()))?;
    if !rights::may_act_for(rights::caller(), &owner) {
        return Err(Error::NotOwner {
            projection: name.to_owned(),
            owner,
        });
    }
    Ok(owner)
}
