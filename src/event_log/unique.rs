//! Unique keys: values that at most one live row may hold, per tenant or over all tenants, taken and given back by events.
//!
//! The keys' locks are held when [`plan`] reads which of them are taken, so nobody else can take or give back one of them
//! until the push's transaction ends, and the inserts and deletes that follow never wait.

use serde::Deserialize;
use std::collections::HashMap;

use super::input::NewEvent;
use crate::error::Error;
use crate::lock::Tag;
use crate::position::Position;
use crate::snapshot::At;
use crate::spi::{Arg, Plan, Spi};

/// One element of an event's key `unique`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Operation {
    op: Op,
    pub scope: String,
    pub value: String,
    #[serde(default)]
    global: bool,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
enum Op {
    Add,
    Remove,
}

impl TryFrom<String> for Op {
    type Error = String;

    fn try_from(op: String) -> Result<Self, String> {
        match op.as_str() {
            "add" => Ok(Op::Add),
            "remove" => Ok(Op::Remove),
            _ => Err(format!("op \"{op}\" is neither \"add\" nor \"remove\"")),
        }
    }
}

impl Operation {
    /// A global key needs both locks: it must differ from every tenant's global keys and from its own tenant's keys.
    pub fn tags(&self, tenant: &str) -> impl Iterator<Item = Tag> {
        let own = Tag::unique_key(tenant, &self.scope, &self.value);
        let global = self
            .global
            .then(|| Tag::global_unique_key(&self.scope, &self.value));
        std::iter::once(own).chain(global)
    }
}

/// The rows to delete and to insert, which is what is left of the operations when they are applied in order.
#[derive(Default)]
pub struct Changes<'a> {
    delete: Vec<(&'a str, &'a str)>,
    insert: Vec<Insert<'a>>,
}

struct Insert<'a> {
    scope: &'a str,
    value: &'a str,
    global: bool,
    event: usize,
}

/// One key while the operations are applied to it.
struct Key {
    /// The tenant's own row as it was: whether it is global.
    before: Option<bool>,
    /// The tenant that holds it globally, other than this one.
    held_by_other: bool,
    now: Now,
}

#[derive(Clone, Copy, PartialEq)]
enum Now {
    AsBefore,
    Free,
    Taken { global: bool, event: usize },
}

impl Key {
    fn taken(&self) -> Option<bool> {
        match self.now {
            Now::AsBefore => self.before,
            Now::Free => None,
            Now::Taken { global, .. } => Some(global),
        }
    }
}

/// Applies the events' operations in order. Raises 23505 where one adds a key that is taken.
pub fn plan<'a>(tenant: &str, events: &'a [NewEvent<'a>]) -> Result<Changes<'a>, Error> {
    let mut keys = read_keys(tenant, events);
    for (event, operation) in operations(events) {
        let name = (operation.scope.as_str(), operation.value.as_str());
        let Some(key) = keys.get_mut(&name) else {
            continue;
        };
        match operation.op {
            Op::Add if key.taken().is_some() => {
                return Err(Error::UniqueViolation {
                    constraint: "unique_keys_pkey",
                    key: format!("(tenant, scope, value)=({tenant}, {}, {})", name.0, name.1),
                });
            }
            Op::Add if operation.global && key.held_by_other => {
                return Err(Error::UniqueViolation {
                    constraint: "unique_keys_scope_value_key",
                    key: format!("(scope, value)=({}, {})", name.0, name.1),
                });
            }
            Op::Add => {
                key.now = Now::Taken {
                    global: operation.global,
                    event,
                }
            }
            Op::Remove if key.taken() == Some(operation.global) => key.now = Now::Free,
            Op::Remove => {}
        }
    }
    let mut changes = Changes::default();
    for ((scope, value), key) in keys {
        if key.before.is_some() && key.now != Now::AsBefore {
            changes.delete.push((scope, value));
        }
        if let Now::Taken { global, event } = key.now {
            changes.insert.push(Insert {
                scope,
                value,
                global,
                event,
            });
        }
    }
    Ok(changes)
}

fn operations<'a>(events: &'a [NewEvent<'a>]) -> impl Iterator<Item = (usize, &'a Operation)> {
    events
        .iter()
        .enumerate()
        .flat_map(|(index, event)| event.unique.iter().map(move |operation| (index, operation)))
}

fn read_keys<'a>(tenant: &str, events: &'a [NewEvent<'a>]) -> HashMap<(&'a str, &'a str), Key> {
    static TAKEN: Plan = Plan::new(
        "SELECT (SELECT k.global FROM lockstep.unique_keys AS k
                 WHERE k.tenant = $1 AND k.scope = named.scope AND k.value = named.value),
                EXISTS (SELECT FROM lockstep.unique_keys AS k
                        WHERE k.scope = named.scope AND k.value = named.value AND k.global AND k.tenant <> $1)
         FROM unnest($2::text[], $3::text[]) AS named (scope, value)",
    );
    let (scopes, values): (Vec<&str>, Vec<&str>) = operations(events)
        .map(|(_, operation)| (operation.scope.as_str(), operation.value.as_str()))
        .unzip();
    if scopes.is_empty() {
        return HashMap::new();
    }
    let args = [
        Arg::from(tenant),
        Arg::from(scopes.clone()),
        Arg::from(values.clone()),
    ];
    let spi = Spi::connect();
    let rows = spi.read(&TAKEN, At::Latest, &args);
    scopes
        .into_iter()
        .zip(values)
        .enumerate()
        .map(|(row, name)| {
            let key = Key {
                before: rows.get(row, 1),
                held_by_other: rows.get(row, 2).unwrap_or(false),
                now: Now::AsBefore,
            };
            (name, key)
        })
        .collect()
}

impl Changes<'_> {
    /// Writes them, each key with the position of the event that took it.
    pub fn apply(self, tenant: &str, position: impl Fn(usize) -> Position) -> Result<(), Error> {
        static DELETE: Plan = Plan::new(
            "DELETE FROM lockstep.unique_keys AS k USING unnest($2::text[], $3::text[]) AS freed (scope, value)
             WHERE k.tenant = $1 AND k.scope = freed.scope AND k.value = freed.value",
        );
        static INSERT: Plan = Plan::new(
            "INSERT INTO lockstep.unique_keys (tenant, scope, value, global, position)
             SELECT $1, taken.* FROM unnest($2::text[], $3::text[], $4::boolean[], $5::numeric[]) AS taken",
        );
        if !self.delete.is_empty() {
            let expected = self.delete.len();
            let (scopes, values): (Vec<_>, Vec<_>) = self.delete.into_iter().unzip();
            let args = [Arg::from(tenant), Arg::from(scopes), Arg::from(values)];
            // Only under a transaction snapshot can a row that was just seen be invisible to the DELETE.
            if Spi::connect().write(&DELETE, &args).count() < expected {
                return Err(Error::SerializationFailure(
                    "A unique key that this push gives back was taken after the transaction's snapshot."
                        .into(),
                ));
            }
        }
        if !self.insert.is_empty() {
            let rows = self.insert.iter();
            let args = [
                Arg::from(tenant),
                Arg::from(rows.clone().map(|row| row.scope).collect::<Vec<_>>()),
                Arg::from(rows.clone().map(|row| row.value).collect::<Vec<_>>()),
                Arg::from(rows.clone().map(|row| row.global).collect::<Vec<_>>()),
                Arg::from(rows.map(|row| position(row.event)).collect::<Vec<_>>()),
            ];
            Spi::connect().write(&INSERT, &args);
        }
        Ok(())
    }
}
