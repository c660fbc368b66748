//! Following the event log: what an event says of a resource, done to the registry.

use super::replica;
use super::resource::{self, Key, with};
use crate::error::Error;
use crate::spi::{Arg, Plan, Spi};

/// What an event's type says by its ending.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Created,
    Updated,
    Deleted,
}

impl Change {
    fn of(event_type: &str) -> Option<Self> {
        let event_type = event_type.to_ascii_lowercase();
        [
            ("created", Change::Created),
            ("updated", Change::Updated),
            ("deleted", Change::Deleted),
        ]
        .into_iter()
        .find_map(|(ending, change)| event_type.ends_with(ending).then_some(change))
    }
}

/// Does what the event says. It can be told twice, and from the middle of the log on: a resource that is there is not created
/// but changed, and one that was never heard of is created by a change. One that was deleted comes back with `…created` only.
pub fn follow(key: Key, event_type: &str, replicas: &[String]) -> Result<&'static str, Error> {
    let Some(change) = Change::of(event_type) else {
        return Ok("ignored");
    };
    if change == Change::Deleted {
        return Ok(if resource::delete(key)? {
            "deleted"
        } else {
            "gone"
        });
    }
    let spi = Spi::connect();
    loop {
        match resource::lock(&spi, key)? {
            Some(resource) if !resource.deleted => {
                add_missing(&spi, key, replicas);
                replica::increment(key, None)?;
                return Ok("incremented");
            }
            Some(_) if change == Change::Updated => return Ok("gone"),
            _ => match resource::create_empty(&spi, key) {
                // Another transaction created it after the look: look again.
                Err(Error::DuplicateResource { .. }) => {}
                created => {
                    created?;
                    add_missing(&spi, key, replicas);
                    return Ok("created");
                }
            },
        }
    }
}

/// The replicas that should hold the resource and hold nothing yet: due.
fn add_missing(spi: &Spi, key: Key, replicas: &[String]) {
    static ADD: Plan = Plan::new(
        "INSERT INTO lockstep.replicas (tenant, resource, replica, due_at)
         SELECT $1, $2, n.replica, pg_catalog.clock_timestamp() FROM unnest($3::text[]) AS n (replica)
         ON CONFLICT (tenant, resource, replica) DO NOTHING",
    );
    if !replicas.is_empty() {
        spi.write(&ADD, &with(key, [Arg::from(replicas.to_vec())]));
    }
}
