//! Waiting for a lease.

use std::time::Duration;

use super::acquire::{self, Answer, Request};
use crate::error::Error;
use crate::lock::{Mode, Tag};
use crate::procedure;
use crate::process;
use crate::rights;
use crate::wakeup::{self, Event, Look};

/// Tries in transactions of its own until the lease is acquired or the time is over.
pub fn take(request: &Request, timeout: Duration) -> Result<Answer, Error> {
    let event = Event::Lease { name: request.name };
    let mut answer = Answer::default();
    wakeup::wait_until(&event, timeout, || {
        answer = procedure::committed(|| rights::as_extension_owner(|| acquire::acquire(request)))?;
        if answer.acquired {
            return Ok::<_, Error>(Look::There);
        }
        // Until the next try commits: lease_status shows who waits.
        Tag::lease_waiter(request.name).acquire(Mode::Shared);
        let is_own = answer.held_by.as_deref() == Some(request.holder);
        Ok(Look::NotYet(Some(if is_own {
            // Its own renewal or release is in flight.
            wakeup::poll_interval()
        } else {
            time_left(&answer)
        })))
    })?;
    Ok(answer)
}

/// Until the holder's time ends or the lease opens. Nothing tells when a guard or an acquisition that keeps it closed beyond that
/// ends, so that is looked for at every poll.
fn time_left(refusal: &Answer) -> Duration {
    let left = refusal
        .expires_at
        .map_or(0, |time| i64::from(time) - process::now());
    match u64::try_from(left) {
        Ok(left) if left > 0 => Duration::from_micros(left) + Duration::from_millis(1),
        _ => wakeup::poll_interval(),
    }
}
