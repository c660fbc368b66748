//! How long jobs wait and run. Each session keeps its sums and adds them to a row of the queue now and then: a row written at
//! every completion would cost as much as the completion. What a session has not added when it ends, or whose transaction rolls
//! back, makes the means a little wrong, no more.

use std::cell::RefCell;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::lock::{Mode, Tag};
use crate::process;
use crate::spi::{Arg, Plan, Spi};

/// How often a session adds its sums.
const EVERY: Duration = Duration::from_secs(1);
/// The rows of a queue.
const PARTS: i32 = 8;
/// The queues of which a session keeps sums.
const QUEUES: usize = 1000;

#[derive(Default)]
struct Sums {
    added: Option<Instant>,
    jobs: f64,
    waited: f64,
    ran: f64,
}

thread_local! {
    static SUMS: RefCell<HashMap<(String, String), Sums>> = RefCell::new(HashMap::new());
}

/// Counts a job that was completed; seconds.
pub fn completed(queue: &str, tenant: &str, waited: f64, ran: f64) {
    let due = SUMS.with_borrow_mut(|all| {
        if all.len() >= QUEUES {
            all.clear();
        }
        let sums = all
            .entry((queue.to_owned(), tenant.to_owned()))
            .or_default();
        sums.jobs += 1.0;
        sums.waited += waited.max(0.0);
        sums.ran += ran.max(0.0);
        if sums.added.is_some_and(|added| added.elapsed() < EVERY) {
            return None;
        }
        sums.added = Some(Instant::now());
        Some((sums.jobs, sums.waited, sums.ran))
    });
    if let Some((jobs, waited, ran)) = due
        && add(queue, tenant, jobs, waited, ran)
    {
        SUMS.with_borrow_mut(|all| {
            if let Some(sums) = all.get_mut(&(queue.to_owned(), tenant.to_owned())) {
                *sums = Sums {
                    added: sums.added,
                    ..Sums::default()
                };
            }
        });
    }
}

/// False: another transaction is adding to the row.
fn add(queue: &str, tenant: &str, jobs: f64, waited: f64, ran: f64) -> bool {
    // Of the last jobs: at 1,000 in a row they begin to count for half.
    static UPSERT: Plan = Plan::new(
        "INSERT INTO lockstep.queue_statistics AS s (queue, tenant, part, jobs, waited, ran)
         VALUES ($1, $2, $3, $4, $5, $6)
         ON CONFLICT (queue, tenant, part) DO UPDATE
         SET jobs = CASE WHEN s.jobs >= 1000 THEN 0.5 ELSE 1 END * s.jobs + EXCLUDED.jobs,
             waited = CASE WHEN s.jobs >= 1000 THEN 0.5 ELSE 1 END * s.waited + EXCLUDED.waited,
             ran = CASE WHEN s.jobs >= 1000 THEN 0.5 ELSE 1 END * s.ran + EXCLUDED.ran",
    );
    let part = process::pid() % PARTS;
    if !Tag::job_statistics(queue, tenant, part).try_acquire(Mode::Exclusive) {
        return false;
    }
    let args = [
        Arg::from(queue),
        Arg::from(tenant),
        Arg::from(part),
        Arg::from(jobs),
        Arg::from(waited),
        Arg::from(ran),
    ];
    Spi::connect().write_latest(&UPSERT, &args);
    true
}
