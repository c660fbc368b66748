//! Reading the log. Every statement here walks one index in its order.

use crate::position::Position;
use crate::snapshot::At;
use crate::spi::{Arg, Events, Plan, Spi};

/// The events that a reader wants; both filters must pass. None lets everything pass.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub aggregate_types: Option<Vec<String>>,
    pub event_types: Option<Vec<String>>,
}

impl Filter {
    pub fn passes_all(&self) -> bool {
        self.aggregate_types.is_none() && self.event_types.is_none()
    }
}

/// The positions above `after`, up to and with `up_to`.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    pub after: Position,
    pub up_to: Position,
}

macro_rules! columns {
    () => {
        "tenant, position, aggregate_type, aggregate_id, sequence, event_type, event_id, payload, metadata, created_at"
    };
}

/// The settled events of the range, of which the first `max_events` that pass the filter; it looks at the first `scan_limit`
/// only. The range's end must come from `settle`; the snapshot is taken here, after it.
pub fn scan(
    tenant: &str,
    range: Range,
    filter: &Filter,
    max_events: i32,
    scan_limit: Option<i64>,
) -> Events {
    static SCAN: Plan = Plan::new(concat!(
        "SELECT ",
        columns!(),
        " FROM (SELECT * FROM lockstep.events WHERE tenant = $1 AND position > $2 AND position <= $3",
        " ORDER BY position LIMIT $4) AS scanned",
        " WHERE ($5::text[] IS NULL OR aggregate_type = ANY ($5)) AND ($6::text[] IS NULL OR event_type = ANY ($6))",
        " ORDER BY position LIMIT $7"
    ));
    let spi = Spi::connect();
    let args = [
        Arg::from(tenant),
        Arg::from(range.after),
        Arg::from(range.up_to),
        Arg::from(scan_limit),
        Arg::from(filter.aggregate_types.clone()),
        Arg::from(filter.event_types.clone()),
        Arg::from(i64::from(max_events)),
    ];
    Events::read(spi, &SCAN, At::Latest, &args)
}

/// The standby has no writer locks and its sequence runs ahead, but a committed cursor is a settled position: the greatest one
/// of the tenant, read in the same snapshot as the events.
pub fn on_standby(tenant: &str, after: Position, filter: &Filter, max_events: i32) -> Events {
    static SCAN: Plan = Plan::new(concat!(
        "SELECT ",
        columns!(),
        " FROM lockstep.events WHERE tenant = $1 AND position > $2 AND position <= (",
        "SELECT max((SELECT c.position FROM lockstep.projection_cursors AS c",
        " WHERE c.projection = p.name AND c.tenant = $1)) FROM lockstep.projections AS p)",
        " AND ($3::text[] IS NULL OR aggregate_type = ANY ($3)) AND ($4::text[] IS NULL OR event_type = ANY ($4))",
        " ORDER BY position LIMIT $5"
    ));
    let spi = Spi::connect();
    let args = [
        Arg::from(tenant),
        Arg::from(after),
        Arg::from(filter.aggregate_types.clone()),
        Arg::from(filter.event_types.clone()),
        Arg::from(i64::from(max_events)),
    ];
    Events::read(spi, &SCAN, At::Statement, &args)
}

pub fn aggregate(
    tenant: &str,
    aggregate_type: &str,
    aggregate_id: &str,
    after_sequence: i64,
    max_events: Option<i32>,
) -> Events {
    static AGGREGATE: Plan = Plan::new(concat!(
        "SELECT ",
        columns!(),
        " FROM lockstep.events WHERE tenant = $1 AND aggregate_type = $2 AND aggregate_id = $3 AND sequence > $4",
        " ORDER BY sequence LIMIT $5"
    ));
    let spi = Spi::connect();
    let args = [
        Arg::from(tenant),
        Arg::from(aggregate_type),
        Arg::from(aggregate_id),
        Arg::from(after_sequence),
        Arg::from(max_events.map(i64::from)),
    ];
    Events::read(spi, &AGGREGATE, At::Statement, &args)
}

/// The event at the position, or none.
pub fn event_at(tenant: &str, position: Position) -> Events {
    static AT: Plan = Plan::new(concat!(
        "SELECT ",
        columns!(),
        " FROM lockstep.events WHERE tenant = $1 AND position = $2"
    ));
    let spi = Spi::connect();
    let args = [Arg::from(tenant), Arg::from(position)];
    Events::read(spi, &AT, At::Latest, &args)
}

/// The position of the last event before the position; 0 if there is none.
pub fn position_before(tenant: &str, position: Position) -> Position {
    static BEFORE: Plan = Plan::new(
        "SELECT position FROM lockstep.events WHERE tenant = $1 AND position < $2 ORDER BY position DESC LIMIT 1",
    );
    let args = [Arg::from(tenant), Arg::from(position)];
    Spi::connect()
        .read(&BEFORE, At::Latest, &args)
        .get(0, 1)
        .unwrap_or(Position::ZERO)
}

/// The position of the tenant's last event at or below `up_to` that a snapshot taken now shows; 0 if there is none.
pub fn last_position(tenant: &str, up_to: Position) -> Position {
    static LAST: Plan = Plan::new(
        "SELECT position FROM lockstep.events WHERE tenant = $1 AND position <= $2 ORDER BY position DESC LIMIT 1",
    );
    let spi = Spi::connect();
    spi.read(&LAST, At::Latest, &[Arg::from(tenant), Arg::from(up_to)])
        .get(0, 1)
        .unwrap_or(Position::ZERO)
}

/// The position of the `n`-th event of the range; None if it has fewer.
pub fn position_of_nth(tenant: &str, range: Range, n: i64) -> Option<Position> {
    static NTH: Plan = Plan::new(
        "SELECT position FROM lockstep.events WHERE tenant = $1 AND position > $2 AND position <= $3
         ORDER BY position OFFSET $4 LIMIT 1",
    );
    let args = [
        Arg::from(tenant),
        Arg::from(range.after),
        Arg::from(range.up_to),
        Arg::from(n - 1),
    ];
    Spi::connect().read(&NTH, At::Latest, &args).get(0, 1)
}

/// The tenants that have events.
pub fn tenants(spi: &Spi) -> Vec<String> {
    static TENANTS: Plan = Plan::new("SELECT tenant FROM lockstep.tenants");
    let rows = spi.read(&TENANTS, At::Latest, &[]);
    (0..rows.count())
        .filter_map(|row| rows.get(row, 1))
        .collect()
}

/// The greatest ticket in the log of any tenant; 0 if it is empty.
pub fn last_ticket() -> i64 {
    static LAST: Plan = Plan::new("SELECT trunc(max(head))::bigint FROM lockstep.tenants");
    let spi = Spi::connect();
    spi.read(&LAST, At::Latest, &[]).get(0, 1).unwrap_or(0)
}
