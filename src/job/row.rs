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
pub const STATE: i16 = 8;
pub const ATTEMPTS_LEFT: i16 = 9;
pub const TOKEN: i16 = 10;
pub const HOLDER: i16 = 11;
pub const CLAIMED_UNTIL: i16 = 12;
pub const RUN_AT: i16 = 13;
pub const ATTEMPTS: i16 = 18;
pub const CLAIMED_AT: i16 = 20;
pub const SLOT: i16 = 22;
pub const RETRY_ID: i16 = 23;
pub const DELAYED_UNTIL: i16 = 24;
pub const LANE: i16 = 25;

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

pub mod by_key_order {
    pub const INDEX: &std::ffi::CStr = c"jobs_key_order_idx";
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

/// What finds a job.
pub fn id(job_id: i64) -> Key<'static> {
    Key::equal(by_id::JOB_ID, job_id)
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

/// Locks a job, unless somebody has, if `read` gives something for its row; that.
pub fn lock<T>(
    jobs: &Lookup,
    job_id: i64,
    strength: Strength,
    read: impl FnOnce(&Row) -> Option<T>,
) -> Option<T> {
    jobs.walk(by_id::INDEX, &[id(job_id)])
        .lock_next(strength, read)
}

/// Locks the first ready twin of a job that nobody has locked, one that has not failed before one that has; its id.
pub fn lock_twin(jobs: &Lookup, job_id: i64) -> Option<i64> {
    let mut of_job = jobs.walk(by_id::INDEX, &[id(job_id)]);
    let row = of_job.step()?;
    let name = |column| row.get::<String>(column);
    let (queue, tenant, key, kind) = (name(QUEUE)?, name(TENANT)?, name(KEY)?, name(KIND)?);
    let mut walk = jobs.walk(by_twin::INDEX, &twin_keys(&queue, &tenant, &key, &kind));
    while let Some(row) = walk.step() {
        let twin = row.get(JOB_ID)?;
        if twin != job_id && walk.lock(Strength::Update) {
            return Some(twin);
        }
    }
    None
}

pub fn if_ready(row: &Row) -> Option<()> {
    row.get::<i64>(TOKEN).is_none().then_some(())
}

/// Ready, and not for later.
pub fn if_due(row: &Row) -> Option<()> {
    let time: TimestampWithTimeZone = row.get(DELAYED_UNTIL)?;
    if_ready(row).filter(|_| time <= clock_timestamp())
}

/// `delayed_until` of what is ready at once: the time 'epoch'.
pub fn not_delayed() -> TimestampWithTimeZone {
    pgrx::datum::to_timestamp(0.0)
}
