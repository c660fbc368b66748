//! What was said of a queue: paused or not, how many jobs at once, how long failed ones wait.

use pgrx::datum::Interval;
use std::collections::HashSet;
use std::ffi::CStr;

use super::turn;
use crate::error::Error;
use crate::guc;
use crate::lock::{Mode, Tag};
use crate::lookup::{Key, Lookup, Row};
use crate::snapshot::At;
use crate::spi::{Arg, Plan, Spi};
use crate::wakeup::{self, Event};

/// The numbers of a queue's places in use are read by each claim.
pub const MOST_IN_PROGRESS: i32 = 10_000;

/// The number of the queue in the tenant; the three after it are its other lanes. Jobs carry it into dumps, so it is the same on
/// every machine: FNV-1a. Where two queues have one, their claims read past each other's jobs.
pub fn lane(queue: &str, tenant: &str) -> i64 {
    let length = (queue.len() as u32).to_le_bytes();
    let bytes = length
        .iter()
        .chain(queue.as_bytes())
        .chain(tenant.as_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash & !3) as i64
}

/// How a queue is worked on in a tenant.
pub struct Settings {
    pub paused: bool,
    /// None: any number.
    pub max_in_progress: Option<i32>,
    pub backoff: Interval,
    pub max_backoff: Interval,
}

/// What to change; None keeps.
pub struct Changes {
    pub paused: Option<bool>,
    pub max_in_progress: Option<i32>,
    pub backoff: Option<Interval>,
    pub max_backoff: Option<Interval>,
}

const SECOND: i64 = 1_000_000;

pub fn limit(value: i32) -> Result<i32, Error> {
    if !(-1..=MOST_IN_PROGRESS).contains(&value) {
        return Err(Error::invalid(
            format!("max_in_progress must be between -1 and {MOST_IN_PROGRESS}, not {value}"),
            value,
            format!("-1 to {MOST_IN_PROGRESS}"),
            "0 is for any number, -1 for what lockstep.max_jobs_in_progress says.",
        ));
    }
    Ok(value)
}

pub fn settings(queue: &str, tenant: &str) -> Settings {
    const INDEX: &CStr = c"queues_pkey";
    // The columns of the table, the first three of which are the index's.
    const QUEUE: i16 = 1;
    const EVERY_TENANT: i16 = 2;
    const TENANT: i16 = 3;
    const PAUSED: i16 = 4;
    const MAX_IN_PROGRESS: i16 = 5;
    const BACKOFF: i16 = 6;
    const MAX_BACKOFF: i16 = 7;
    let mut settings = Settings {
        paused: false,
        max_in_progress: None,
        backoff: Interval::from_micros(SECOND),
        max_backoff: Interval::from_micros(300 * SECOND),
    };
    let mut max_in_progress = -1;
    let keys = |every_tenant, tenant| {
        [
            Key::equal(QUEUE, queue),
            Key::equal(EVERY_TENANT, every_tenant),
            Key::equal(TENANT, tenant),
        ]
    };
    let mut read = |row: Option<Row>| {
        if let Some(row) = row {
            settings.paused = row.get(PAUSED).unwrap_or(settings.paused);
            max_in_progress = row.get(MAX_IN_PROGRESS).unwrap_or(max_in_progress);
            settings.backoff = row.get(BACKOFF).unwrap_or(settings.backoff);
            settings.max_backoff = row.get(MAX_BACKOFF).unwrap_or(settings.max_backoff);
        }
    };
    let queues = Lookup::of(c"queues", At::Latest);
    let mut walk = queues.walk(INDEX, &keys(true, ""));
    read(walk.step());
    // What was said of the tenant itself goes before what was said of all.
    walk.seek(&keys(false, tenant));
    read(walk.step());
    if max_in_progress < 0 {
        max_in_progress = guc::MAX_JOBS_IN_PROGRESS.get();
    }
    settings.max_in_progress = Some(max_in_progress).filter(|limit| *limit > 0);
    settings
}

pub fn change(queue: &str, tenant: Option<&str>, changes: &Changes) {
    static UPSERT: Plan = Plan::new(
        "INSERT INTO lockstep.queues AS q (queue, every_tenant, tenant, paused, max_in_progress, backoff, max_backoff)
         VALUES ($1, $2, $3, $4, $5, $6, $7)
         ON CONFLICT (queue, every_tenant, tenant) DO UPDATE
         SET paused = COALESCE(EXCLUDED.paused, q.paused),
             max_in_progress = COALESCE(EXCLUDED.max_in_progress, q.max_in_progress),
             backoff = COALESCE(EXCLUDED.backoff, q.backoff),
             max_backoff = COALESCE(EXCLUDED.max_backoff, q.max_backoff)",
    );
    let args = [
        Arg::from(queue),
        Arg::from(tenant.is_none()),
        Arg::from(tenant.unwrap_or_default()),
        Arg::from(changes.paused),
        Arg::from(changes.max_in_progress),
        Arg::from(changes.backoff),
        Arg::from(changes.max_backoff),
    ];
    Spi::connect().write_latest(&UPSERT, &args);
    match tenant {
        Some(tenant) => announce(queue, tenant),
        None => announce_everywhere(queue),
    }
}

/// What is said of every tenant holds for each, whatever was said of it before.
pub fn set_paused(queue: &str, tenant: Option<&str>, paused: bool) {
    static CLEAR: Plan = Plan::new(
        "UPDATE lockstep.queues SET paused = NULL WHERE queue = $1 AND every_tenant = false AND paused IS NOT NULL",
    );
    if tenant.is_none() {
        Spi::connect().write_latest(&CLEAR, &[Arg::from(queue)]);
    }
    let changes = Changes {
        paused: Some(paused),
        max_in_progress: None,
        backoff: None,
        max_backoff: None,
    };
    change(queue, tenant, &changes);
}

/// Wakes who waits for the queue's jobs when this transaction has ended.
pub fn announce(queue: &str, tenant: &str) {
    tell(queue, tenant, wakeup::announce);
}

/// Wakes who waits for the queue's jobs if this transaction, which has claimed some, is rolled back.
pub fn announce_if_rolled_back(queue: &str, tenant: &str) {
    tell(queue, tenant, wakeup::announce_if_rolled_back);
}

/// Who waits for a job of this tenant, and who waits for one of any.
fn tell(queue: &str, tenant: &str, announce: impl Fn(&Event)) {
    for tenant in [Some(tenant), None] {
        announce(&Event::Queue { queue, tenant });
    }
}

fn announce_everywhere(queue: &str) {
    let mut tenant = turn::next_tenant(queue, None, None);
    while let Some(name) = tenant {
        announce(queue, &name);
        tenant = turn::next_tenant(queue, Some(&name), None);
    }
}

/// The free places of a queue that has a limit, as they were when they were read.
pub struct Places {
    /// The lowest last.
    free: Vec<i32>,
}

/// One of them, taken for this transaction.
pub struct Place {
    pub number: i32,
    tag: Tag,
}

impl Place {
    /// Gives it back: no job was claimed for it.
    pub fn release(self) {
        self.tag.release(Mode::Exclusive);
    }
}

impl Places {
    pub fn read(spi: &Spi, queue: &str, tenant: &str, limit: i32) -> Self {
        static TAKEN: Plan = Plan::new(
            "SELECT j.slot FROM lockstep.jobs AS j
             WHERE j.queue = $1 AND j.tenant = $2 AND j.claimed_until IS NOT NULL",
        );
        let rows = spi.read(&TAKEN, At::Latest, &[Arg::from(queue), Arg::from(tenant)]);
        let taken: HashSet<i32> = (0..rows.count())
            .filter_map(|row| rows.get(row, 1))
            .collect();
        let placeless = rows.count() - taken.len();
        Places {
            free: free_places(limit, &taken, placeless),
        }
    }

    /// Takes one that no job and no other claim has, if there is one. JOB_SLOT before the look: two claims that saw the same
    /// place free would meet in the index.
    pub fn take(&mut self, spi: &Spi, queue: &str, tenant: &str) -> Option<Place> {
        static IS_FREE: Plan = Plan::new(
            "SELECT NOT EXISTS (SELECT FROM lockstep.jobs AS j
                                WHERE j.queue = $1 AND j.tenant = $2 AND j.slot = $3)",
        );
        while let Some(number) = self.free.pop() {
            let tag = Tag::job_slot(queue, tenant, number);
            if !tag.try_acquire(Mode::Exclusive) {
                continue;
            }
            let place = Place { number, tag };
            let args = [Arg::from(queue), Arg::from(tenant), Arg::from(number)];
            if spi.read(&IS_FREE, At::Latest, &args).get(0, 1) == Some(true) {
                return Some(place);
            }
            place.release();
        }
        None
    }
}

/// Jobs that are from before the limit have no place, or one above it. Each of them counts for one of the last places.
fn free_places(limit: i32, taken: &HashSet<i32>, placeless: usize) -> Vec<i32> {
    let mut last = limit;
    let mut beyond = placeless + taken.iter().filter(|number| **number > limit).count();
    while last > 0 && last as usize + beyond > limit as usize {
        beyond += usize::from(taken.contains(&last));
        last -= 1;
    }
    (1..=last)
        .rev()
        .filter(|number| !taken.contains(number))
        .collect()
}
