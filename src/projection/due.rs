//! Which projections have work, for a worker to choose from, and which are being worked on.

use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys;
use std::time::Duration;

use crate::error::Error;
use crate::event_log::settle::Horizons;
use crate::event_log::{self, tenants};
use crate::lock::Tag;
use crate::lock::table::{Holder, Locks};
use crate::position::Position;
use crate::process;
use crate::snapshot::{self, At};
use crate::spi::{Arg, Plan, Spi};

/// The pairs that are behind. The tenant's head first, one descent a tenant, so that only those are looked into.
macro_rules! behind {
    ($columns:literal, $role:expr, $cursor:expr, $condition:literal) => {
        concat!(
            "SELECT p.name, t.tenant, next.created_at",
            $columns,
            " FROM (SELECT t.tenant, t.horizon,
                      (SELECT e.position FROM lockstep.events AS e
                       WHERE e.tenant = t.tenant AND e.position <= t.horizon
                       ORDER BY e.position DESC LIMIT 1) AS head
               FROM unnest($1::text[], $2::numeric[]) AS t (tenant, horizon) OFFSET 0) AS t
         CROSS JOIN lockstep.projections AS p ",
            $role,
            $cursor,
            " CROSS JOIN LATERAL (SELECT e.position, e.created_at FROM lockstep.events AS e
                             WHERE e.tenant = t.tenant
                               AND e.position > COALESCE(c.position, p.start_after)
                               AND e.position <= t.horizon
                             ORDER BY e.position LIMIT 1) AS next
         LEFT JOIN lockstep.projection_pauses AS x ON x.projection = p.name AND x.tenant = t.tenant
         WHERE COALESCE(c.position, p.start_after) < t.head AND NOT COALESCE(x.paused, p.paused)
           AND NOT COALESCE(c.retry_at > pg_catalog.clock_timestamp(), false) AND ",
            $condition,
            " ORDER BY next.created_at, next.position, p.name"
        )
    };
}

/// The cursors, for a look at all of them.
macro_rules! cursors {
    () => {
        " LEFT JOIN lockstep.projection_cursors AS c ON c.projection = p.name AND c.tenant = t.tenant"
    };
}

/// Each cursor, found from the end of its dead versions, as `cursor.rs` does. BETWEEN, and not =, or the order would be nothing to the
/// planner.
macro_rules! newest_of_each_cursor {
    () => {
        " LEFT JOIN LATERAL (SELECT c.position, c.retry_at FROM lockstep.projection_cursors AS c
                            WHERE c.projection = p.name AND c.tenant BETWEEN t.tenant AND t.tenant
                            ORDER BY c.tenant DESC LIMIT 1) AS c ON true"
    };
}

/// The projection's owner, as whom a worker can connect.
macro_rules! owner_for_workers {
    ($connects_as_any_role:literal) => {
        concat!(
            "JOIN pg_catalog.pg_roles AS r ON r.rolname = p.owner AND NOT r.rolsuper AND (r.rolcanlogin OR ",
            $connects_as_any_role,
            ") AND pg_catalog.has_database_privilege(r.oid, pg_catalog.current_database(), 'CONNECT')"
        )
    };
}

/// (projection, tenant) pairs with settled events after the cursor, the longest waiting first.
pub fn due(names: Option<Vec<String>>, max_rows: usize) -> Result<Vec<(String, String)>, Error> {
    static BEHIND: Plan = Plan::joining(behind!(
        "",
        "",
        cursors!(),
        "($3::text[] IS NULL OR p.name = ANY ($3))"
    ));
    snapshot::require_primary("projection_due")?;
    let spi = Spi::connect();
    if let Some(names) = &names {
        require_known(&spi, names)?;
    }
    let horizons = Horizons::now();
    let tenants = tenants(&spi);
    let bounds: Vec<Position> = tenants.iter().map(|tenant| horizons.of(tenant)).collect();
    let args = [Arg::from(tenants), Arg::from(bounds), Arg::from(names)];
    let rows = spi.read(&BEHIND, At::Latest, &args);
    Ok((0..rows.count())
        .filter_map(|row| Some((rows.get::<String>(row, 1)?, rows.get::<String>(row, 2)?)))
        .filter(|(name, tenant)| !horizons.locks().is_claimed_elsewhere(name, tenant))
        .take(max_rows)
        .collect())
}

/// A pair that is due, as the launcher of the workers needs it.
pub struct Due {
    pub projection: String,
    pub tenant: String,
    /// The role that a worker must be connected as.
    pub owner: pg_sys::Oid,
    /// When its oldest event was pushed, in PostgreSQL's microseconds.
    pub since: i64,
    /// Another transaction has the claim now.
    pub is_claimed: bool,
}

/// The pairs that are due, of these tenants (None: of all), for workers to run: with a handler, and of an owner who is there
/// and no superuser. And whether a prepared transaction has pushed: nothing tells when that ends.
pub fn for_workers(tenants: Option<Vec<String>>) -> (Vec<Due>, bool) {
    macro_rules! behind_with_handler {
        ($cursor:expr) => {
            behind!(
                ", r.oid",
                owner_for_workers!("$3"),
                $cursor,
                "p.handler IS NOT NULL"
            )
        };
    }
    static ALL: Plan = Plan::joining(behind_with_handler!(cursors!()));
    static FEW: Plan = Plan::new(behind_with_handler!(newest_of_each_cursor!()));
    let spi = Spi::connect();
    let plan = if tenants.is_some() { &FEW } else { &ALL };
    let horizons = Horizons::now();
    let tenants = tenants.unwrap_or_else(|| event_log::tenants(&spi));
    let bounds: Vec<Position> = tenants.iter().map(|tenant| horizons.of(tenant)).collect();
    let args = [
        Arg::from(tenants),
        Arg::from(bounds),
        Arg::from(process::CONNECTS_AS_ANY_ROLE),
    ];
    let rows = spi.read(plan, At::Latest, &args);
    let due = |row| {
        let (projection, tenant): (String, String) = (rows.get(row, 1)?, rows.get(row, 2)?);
        Some(Due {
            is_claimed: horizons.locks().is_claimed_elsewhere(&projection, &tenant),
            since: rows.get::<TimestampWithTimeZone>(row, 3)?.into(),
            owner: rows.get(row, 4)?,
            projection,
            tenant,
        })
    };
    let is_prepared = horizons.writers().any(|(_, _, holder)| holder.pid == 0);
    ((0..rows.count()).filter_map(due).collect(), is_prepared)
}

/// The projections that can be due for workers, in each tenant.
pub fn count_for_workers() -> usize {
    static COUNT: Plan = Plan::joining(concat!(
        "SELECT count(*) FROM lockstep.projections AS p ",
        owner_for_workers!("$1"),
        " WHERE p.handler IS NOT NULL"
    ));
    let args = [Arg::from(process::CONNECTS_AS_ANY_ROLE)];
    let count: Option<i64> = Spi::connect().read(&COUNT, At::Latest, &args).get(0, 1);
    count.unwrap_or_default() as usize
}

/// The pairs whose failed event waits to be retried, and for how long.
pub fn next_retries() -> Vec<(String, String, Duration)> {
    static RETRIES: Plan = Plan::joining(
        "SELECT c.projection, c.tenant,
                GREATEST(EXTRACT(epoch FROM c.retry_at - pg_catalog.clock_timestamp()), 0)::float8
         FROM lockstep.projection_cursors AS c WHERE c.retry_at > pg_catalog.clock_timestamp()",
    );
    let spi = Spi::connect();
    let rows = spi.read(&RETRIES, At::Latest, &[]);
    let retry = |row| {
        let wait = Duration::from_secs_f64(rows.get(row, 3)?);
        Some((rows.get(row, 1)?, rows.get(row, 2)?, wait))
    };
    (0..rows.count()).filter_map(retry).collect()
}

fn require_known(spi: &Spi, names: &[String]) -> Result<(), Error> {
    static UNKNOWN: Plan = Plan::new(
        "SELECT n.name FROM unnest($1::text[]) AS n (name)
         WHERE NOT EXISTS (SELECT FROM lockstep.projections AS p WHERE p.name = n.name) LIMIT 1",
    );
    let unknown: Option<String> = spi
        .read(&UNKNOWN, At::Latest, &[Arg::from(names.to_vec())])
        .get(0, 1);
    unknown.map_or(Ok(()), |name| Err(Error::UndefinedProjection(name)))
}

/// A claim that is held, and by whom.
pub struct Held {
    pub projection: String,
    pub tenant: String,
    pub holder: Holder,
}

/// The claims held now. The names are found by their locks' keys, so only when there are locks.
pub fn claims() -> Result<Vec<Held>, Error> {
    static PAIRS: Plan = Plan::joining(
        "SELECT p.name, t.tenant FROM lockstep.projections AS p
         CROSS JOIN (SELECT t.tenant FROM lockstep.tenants AS t
                     UNION SELECT c.tenant FROM lockstep.projection_cursors AS c) AS t",
    );
    if snapshot::in_recovery() {
        return Ok(Vec::new());
    }
    let claims = Locks::now().claims();
    if claims.is_empty() {
        return Ok(Vec::new());
    }
    let spi = Spi::connect();
    let rows = spi.read(&PAIRS, At::Latest, &[]);
    let held = |row| {
        let (projection, tenant): (String, String) = (rows.get(row, 1)?, rows.get(row, 2)?);
        let holder = *claims.get(&Tag::projection(&projection, &tenant))?;
        Some(Held {
            projection,
            tenant,
            holder,
        })
    };
    Ok((0..rows.count()).filter_map(held).collect())
}
