//! Waiting for a state that another session brings about: a look, a sleep that ends early at an interrupt, a look.

use pgrx::pg_sys;
use std::time::{Duration, Instant};

use crate::guc;

/// Looks every lockstep.poll_interval until `state` is there or the time is over; whether it is there. Obeys cancel and
/// statement_timeout. Shows as a wait for `Extension`.
pub fn wait_until<E>(timeout: Duration, state: impl Fn() -> Result<bool, E>) -> Result<bool, E> {
    let begun = Instant::now();
    loop {
        if state()? {
            return Ok(true);
        }
        let left = timeout.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Ok(false);
        }
        sleep(left.min(Duration::from_millis(guc::POLL_INTERVAL.get() as u64)));
    }
}

fn sleep(time: Duration) {
    let milliseconds = time.as_millis().max(1) as i64;
    // SAFETY: the backend's own latch; a postmaster that dies ends the process.
    unsafe {
        pg_sys::WaitLatch(
            pg_sys::MyLatch,
            (pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH) as i32,
            milliseconds,
            pg_sys::PG_WAIT_EXTENSION,
        );
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    pgrx::check_for_interrupts!();
}
