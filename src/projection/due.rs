//! Which projections have work, for a worker to choose from.

use crate::error::Error;
use crate::event_log::settle::Horizons;
use crate::position::Position;
use crate::snapshot::{self, At};
use crate::spi::{Arg, Plan, Spi};

/// (projection, tenant) pairs with settled events after the cursor, the longest waiting first.
pub fn due(names: Option<Vec<String>>, max_rows: usize) -> Result<Vec<(String, String)>, Error> {
    static TENANTS: Plan = Plan::new("SELECT tenant FROM lockstep.tenants");
    // The tenant's head first, one descent a tenant, so that only the pairs that are behind are looked into.
    static BEHIND: Plan = Plan::joining(
        "SELECT p.name, t.tenant, next.created_at
         FROM (SELECT t.tenant, t.horizon,
                      (SELECT e.position FROM lockstep.events AS e
                       WHERE e.tenant = t.tenant AND e.position <= t.horizon
                       ORDER BY e.position DESC LIMIT 1) AS head
               FROM unnest($1::text[], $2::numeric[]) AS t (tenant, horizon) OFFSET 0) AS t
         CROSS JOIN lockstep.projections AS p
         LEFT JOIN lockstep.projection_cursors AS c ON c.projection = p.name AND c.tenant = t.tenant
         CROSS JOIN LATERAL (SELECT e.position, e.created_at FROM lockstep.events AS e
                             WHERE e.tenant = t.tenant
                               AND e.position > COALESCE(c.position, p.start_after)
                               AND e.position <= t.horizon
                             ORDER BY e.position LIMIT 1) AS next
         WHERE ($3::text[] IS NULL OR p.name = ANY ($3)) AND COALESCE(c.position, p.start_after) < t.head
         ORDER BY next.created_at, next.position, p.name",
    );
    snapshot::require_primary("projection_due")?;
    let spi = Spi::connect();
    if let Some(names) = &names {
        require_known(&spi, names)?;
    }
    let horizons = Horizons::now();
    let rows = spi.read(&TENANTS, At::Latest, &[]);
    let tenants: Vec<String> = (0..rows.count())
        .filter_map(|row| rows.get(row, 1))
        .collect();
    let bounds: Vec<Position> = tenants.iter().map(|tenant| horizons.of(tenant)).collect();
    let args = [Arg::from(tenants), Arg::from(bounds), Arg::from(names)];
    let rows = spi.read(&BEHIND, At::Latest, &args);
    Ok((0..rows.count())
        .filter_map(|row| Some((rows.get::<String>(row, 1)?, rows.get::<String>(row, 2)?)))
        .filter(|(name, tenant)| !horizons.locks().is_claimed_elsewhere(name, tenant))
        .take(max_rows)
        .collect())
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
