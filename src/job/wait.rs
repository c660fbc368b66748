//! Waiting until there is something to claim.
//!
//! Whether there is, only a claim can tell: a job may be ready and locked, its key busy, the queue full. So each look is a claim,
//! which is rolled back if it got a job; a look that only saw one would call a worker again and again for what another has.

use pgrx::datum::Interval;
use std::time::Duration;

use super::{claim, queue, search};
use crate::error::Error;
use crate::procedure;
use crate::rights;
use crate::wakeup::{self, Event, Look};

pub fn wait(queue: &str, tenant: Option<&str>, timeout: Duration) -> Result<bool, Error> {
    let event = Event::Queue { queue, tenant };
    wakeup::wait_until(&event, timeout, || {
        Ok::<_, Error>(procedure::committed_if(|| {
            rights::as_extension_owner(|| look(queue, tenant))
        }))
    })
}

/// What it found, and whether what it did is to stay: a claim may bury what has no attempts left.
fn look(queue: &str, tenant: Option<&str>) -> (Look, bool) {
    const MOMENT: i64 = 60_000_000;
    let request = claim::Request {
        queue,
        holder: "job_wait",
        max_jobs: 1,
        ttl: Interval::from_micros(MOMENT),
        tenant,
    };
    let jobs = claim::claim(&request);
    if jobs.count() > 0 {
        return (Look::There, false);
    }
    let spi = jobs.spi();
    if tenant.is_some_and(|tenant| queue::settings(spi, queue, tenant).paused) {
        return (Look::NotYet(Some(wakeup::poll_interval())), true);
    }
    let time = search::next_time(spi, queue, tenant);
    let time =
        time.map(|left| Duration::from_micros(left.max(0) as u64) + Duration::from_millis(1));
    (Look::NotYet(time), true)
}
