//! Rows of `lockstep.jobs` looked up without SQL, and where the columns of the table and its indexes are.

use pgrx::datum::{TimestampWithTimeZone, clock_timestamp};

use crate::lookup::{Key, Lookup, Row, Strength};

pub const TABLE: &std::ffi::CStr = c"jobs";

/// The columns of the table.
pub const JOB_ID: i16 = 1;
pub const TENANT: i16 = 2;
pub const QUEUE: i16 = 3;
pub const KEY: i16 = 4;
pub const KIND: i16 = 5;
pub const PRIORITY: i16 = 7;
pub const TOKEN: i16 = 10;
pub const RUN_AT: i16 = 13;
pub const RETRY_ID: i16 = 23;
pub const DELAYED_UNTIL: i16 = 24;

/// The first columns of its indexes, as keys.
pub mod by_id {
    pub const INDEX: &std::ffi::CStr = c"jobs_pkey";
    pub const JOB_ID: i16 = 1;
}

pub mod by_twin {
    pub const INDEX: &std::ffi::CStr = c"jobs_twin_key";
    pub const KEY: i16 = 1;
    pub const QUEUE: i16 = 2;
    pub const TENANT: i16 = 3;
    pub const KIND: i16 = 4;
    pub const RETRY_ID: i16 = 5;
}

pub mod by_key_in_progress {
    pub const INDEX: &std::ffi::CStr = c"jobs_in_progress_key";
    pub const KEY: i16 = 1;
    pub const QUEUE: i16 = 2;
    pub const TENANT: i16 = 3;
}

pub mod by_order {
    pub const INDEX: &std::ffi::CStr = c"jobs_order_idx";
    pub const LANE: i16 = 1;
}

pub mod by_delayed_until {
    pub const INDEX: &std::ffi::CStr = c"jobs_delayed_until_idx";
    pub const QUEUE: i16 = 1;
    pub const TENANT: i16 = 2;
    pub const DELAYED_UNTIL: i16 = 3;
}

pub mod by_claimed_until {
    pub const INDEX: &std::ffi::CStr = c"jobs_claimed_until_idx";
    pub const QUEUE: i16 = 1;
    pub const TENANT: i16 = 2;
    pub const CLAIMED_UNTIL: i16 = 3;
}

/// What finds the ready jobs of the key and kind, those that have failed last.
pub fn twin_keys<'a>(queue: &'a str, tenant: &'a str, key: &'a str, kind: &'a str) -> [Key<'a>; 4] {
    [
        Key::equal(by_twin::KEY, key),
        Key::equal(by_twin::QUEUE, queue),
        Key::equal(by_twin::TENANT, tenant),
        Key::equal(by_twin::KIND, kind),
    ]
}

/// A job of the key and kind that has failed and is ready.
pub fn failed_twin(jobs: &Lookup, queue: &str, tenant: &str, key: &str, kind: &str) -> Option<i64> {
    let [key, queue, tenant, kind] = twin_keys(queue, tenant, key, kind);
    let failed = Key::above(by_twin::RETRY_ID, 0_i64);
    let mut walk = jobs.walk(by_twin::INDEX, &[key, queue, tenant, kind, failed]);
    walk.step()?.get(JOB_ID)
}

pub fn has_failed(row: &Row) -> bool {
    row.get::<i64>(RETRY_ID).is_some_and(|id| id > 0)
}

/// The job of the key that is in progress.
pub fn in_progress(jobs: &Lookup, queue: &str, tenant: &str, key: &str) -> Option<i64> {
    let keys = [
        Key::equal(by_key_in_progress::KEY, key),
        Key::equal(by_key_in_progress::QUEUE, queue),
        Key::equal(by_key_in_progress::TENANT, tenant),
    ];
    jobs.walk(by_key_in_progress::INDEX, &keys)
        .step()?
        .get(JOB_ID)
}

/// Locks a job, unless somebody has; true if it is locked and still as it should be.
pub fn lock(jobs: &Lookup, job_id: i64, is_right: impl Fn(&Row) -> bool) -> bool {
    let mut walk = jobs.walk(by_id::INDEX, &[Key::equal(by_id::JOB_ID, job_id)]);
    walk.step().is_some_and(|row| is_right(&row))
        && walk
            .lock(Strength::Update)
            .is_some_and(|row| is_right(&row))
}

pub fn is_ready(row: &Row) -> bool {
    row.get::<i64>(TOKEN).is_none()
}

/// Ready, and not for later.
pub fn is_due(row: &Row) -> bool {
    let time: Option<TimestampWithTimeZone> = row.get(DELAYED_UNTIL);
    is_ready(row) && time.is_some_and(|time| time <= clock_timestamp())
}
