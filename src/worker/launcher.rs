//! The launcher of a database: it looks up which pairs are due, decides whose turn it is, and starts and stops the workers.

use pgrx::bgworkers::{BackgroundWorkerBuilder, BackgroundWorkerStatus, DynamicBackgroundWorker};
use pgrx::prelude::*;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::queue::{Owner, Pair, Queue};
use super::table::{self, Outcome, Seen, State};
use crate::catalog;
use crate::guc;
use crate::process::{self, WaitEvent};
use crate::projection;
use crate::transaction;
use crate::wakeup::mailbox;

/// The most time between two looks at everything: for what nobody announced (a restored dump, a prepared transaction's end).
const LOOK: Duration = Duration::from_secs(1);
/// A look at everything takes at most this part of the time.
const LOOKS_SHARE: u32 = 50;
/// How long a worker serves its owner, if that has work, before it is ended for another owner.
const TURN: Duration = Duration::from_millis(200);
/// After a worker of an owner could not be started, none is for a time, which doubles up to the longest.
const RETRY_START: Duration = Duration::from_secs(1);
const LONGEST_RETRY_START: Duration = Duration::from_secs(60);

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn lockstep_launcher(argument: pg_sys::Datum) {
    let index = argument.value();
    process::at_exit(at_exit, index);
    process::begin();
    let Some(database) = table::begin_launcher(index) else {
        return;
    };
    process::connect_as_superuser(&database);
    // What it runs is the extension's own, whatever the defaults of the database are.
    process::set(c"search_path", c"pg_catalog, pg_temp");
    process::set(c"default_transaction_isolation", c"read committed");
    process::set(c"default_transaction_read_only", c"on");
    process::set(c"statement_timeout", c"0");
    process::set(c"lock_timeout", c"0");
    process::set_application_name(&format!("lockstep launcher {database}"));
    if !mailbox::open() {
        return;
    }
    pgrx::log!("lockstep launcher of database \"{database}\" started");
    let mut launcher = Launcher::new();
    while !table::launcher_must_stop(index) {
        process::follow_settings();
        launcher.collect_batches();
        launcher.collect_mail();
        launcher.dispatch();
        process::idle(Some(launcher.time_left()), WaitEvent(c"LockstepLauncher"));
    }
    pgrx::log!("lockstep launcher of database \"{database}\" stopped");
}

#[pg_guard]
unsafe extern "C-unwind" fn at_exit(_code: i32, argument: pg_sys::Datum) {
    mailbox::close();
    table::abandon_workers();
    table::remove_launcher(argument.value());
}

struct Launcher {
    queue: Queue,
    /// The workers that this launcher has asked for, by their place in the table.
    workers: HashMap<usize, Worker>,
    /// Tenants in which something may have become due.
    tenants: HashSet<String>,
    next_look: Instant,
    /// Owners as whom no worker could be started.
    refused: HashMap<Owner, Refused>,
    /// Whether it was said that no worker process can be had.
    said_full: bool,
}

struct Worker {
    process: DynamicBackgroundWorker,
    owner: Owner,
    started: Instant,
    was_ready: bool,
    running: Option<Pair>,
}

struct Refused {
    until: Instant,
    wait: Duration,
}

impl Launcher {
    fn new() -> Self {
        Launcher {
            queue: Queue::default(),
            workers: HashMap::new(),
            tenants: HashSet::new(),
            next_look: Instant::now(),
            refused: HashMap::new(),
            said_full: false,
        }
    }

    fn time_left(&self) -> Duration {
        let next_rested = self.queue.next_rested().unwrap_or(self.next_look);
        let next = self.next_look.min(next_rested);
        next.saturating_duration_since(Instant::now())
    }

    // What is due.

    fn collect_mail(&mut self) {
        let mail = mailbox::collect();
        let now = Instant::now();
        if mail.projection_changed {
            self.queue.end_rests();
            self.refused.clear();
        }
        if mail.projection_changed || mail.overflowed || now >= self.next_look {
            return self.look(None);
        }
        for tenant in mail.tenants {
            self.queue.touch(Some(&tenant));
            self.tenants.insert(tenant);
        }
        self.tenants.extend(self.queue.rested(now));
        if !self.tenants.is_empty() {
            let tenants = std::mem::take(&mut self.tenants);
            self.look(Some(tenants.into_iter().collect()));
        }
    }

    /// Looks up what is due in the tenants (None: in all).
    fn look(&mut self, tenants: Option<Vec<String>>) {
        let begun = Instant::now();
        let everywhere = tenants.is_none();
        let looked = transaction::run(|| {
            if !catalog::has_extension() {
                return Err(());
            }
            let retries = if everywhere {
                projection::next_retries()
            } else {
                Vec::new()
            };
            Ok((projection::for_workers(tenants), retries))
        });
        let (now, rest) = (Instant::now(), begun.elapsed() * LOOKS_SHARE);
        let poll_interval = Duration::from_millis(guc::POLL_INTERVAL.get() as u64);
        if everywhere {
            self.queue.touch(None);
            self.tenants.clear();
            let _ = self.queue.rested(begun);
            self.next_look = now + LOOK.max(rest);
        }
        let Ok(Ok(((due, is_prepared), retries))) = looked else {
            // Dropped, or being dropped.
            self.queue.keep_waiting(|_| false);
            self.next_look = now + LOOK;
            return;
        };
        if is_prepared {
            self.next_look = self.next_look.min(now + poll_interval.max(rest));
        }
        let pair = |projection, tenant| Pair { projection, tenant };
        let mut found = HashSet::new();
        for due in due {
            let pair = pair(due.projection, due.tenant);
            if due.is_claimed {
                self.queue.rest_unless_running(pair, now + poll_interval);
                continue;
            }
            if everywhere {
                found.insert(pair.clone());
            }
            self.queue.found(pair, due.owner.to_u32(), due.since);
        }
        for (projection, tenant, wait) in retries {
            self.queue
                .rest_unless_running(pair(projection, tenant), begun + wait);
        }
        if everywhere {
            self.queue.keep_waiting(|pair| found.contains(pair));
        }
    }

    // The workers.

    /// Takes back what workers have done, and the places of those that have ended.
    fn collect_batches(&mut self) {
        let seen: HashMap<usize, Seen> = table::workers()
            .into_iter()
            .map(|worker| (worker.index, worker))
            .collect();
        let known: Vec<usize> = self.workers.keys().copied().collect();
        for index in known {
            match seen.get(&index).map(|worker| worker.state) {
                Some(State::Done(outcome)) => {
                    table::make_idle(index);
                    self.batch_is_done(index, outcome);
                }
                Some(State::Starting) if self.has_stopped(index) => self.worker_has_ended(index),
                Some(State::Ended) => self.worker_has_ended(index),
                Some(State::Starting) => {}
                // Told to end, and gone; the place may be another launcher's by now.
                None => {
                    self.workers.remove(&index);
                }
                Some(_) => {
                    if let Some(worker) = self.workers.get_mut(&index) {
                        worker.was_ready = true;
                        self.refused.remove(&worker.owner);
                    }
                }
            }
        }
        // Left by a launcher before this one.
        for worker in seen
            .values()
            .filter(|worker| !self.workers.contains_key(&worker.index))
        {
            if worker.state == State::Ended {
                table::free(worker.index, false);
            } else if !worker.stopping {
                table::stop(worker.index);
            }
        }
    }

    fn has_stopped(&self, index: usize) -> bool {
        let process = self.workers.get(&index).map(|worker| worker.process.pid());
        matches!(process, Some(Err(BackgroundWorkerStatus::Stopped)))
    }

    fn batch_is_done(&mut self, index: usize, outcome: Outcome) {
        let Some(worker) = self.workers.get_mut(&index) else {
            return;
        };
        let (owner, Some(pair)) = (worker.owner, worker.running.take()) else {
            return;
        };
        let now = Instant::now();
        match outcome {
            Outcome::Applied { more } => {
                let tenant = pair.tenant.clone();
                if self.queue.applied(pair, owner, more, process::now()) {
                    self.tenants.insert(tenant);
                }
            }
            Outcome::Retry { milliseconds } => {
                let wait = Duration::from_millis(milliseconds + 1);
                self.queue.rest(pair, now + wait);
            }
            Outcome::Busy => {
                let wait = Duration::from_millis(guc::POLL_INTERVAL.get() as u64);
                self.queue.rest(pair, now + wait);
            }
            Outcome::Gone => self.queue.forget(&pair),
            Outcome::Error => {
                self.queue.failed(pair, now);
            }
        }
    }

    /// A worker has ended that was not told to, or could not be started.
    fn worker_has_ended(&mut self, index: usize) {
        let Some(worker) = self.workers.remove(&index) else {
            return;
        };
        table::free(index, worker.was_ready);
        let now = Instant::now();
        match worker.running {
            Some(pair) => {
                let (projection, tenant) = (pair.projection.clone(), pair.tenant.clone());
                let rest = self.queue.failed(pair, now);
                pgrx::log!(
                    "a lockstep worker ended while it ran projection \"{projection}\", tenant \"{tenant}\", which rests for {rest:?}"
                );
            }
            None if worker.was_ready => pgrx::log!("a lockstep worker ended"),
            None => {
                let refused = self.refused.entry(worker.owner).or_insert(Refused {
                    until: now,
                    wait: RETRY_START / 2,
                });
                refused.wait = (refused.wait * 2).min(LONGEST_RETRY_START);
                refused.until = now + refused.wait;
                pgrx::log!(
                    "a lockstep worker could not be started, next in {:?}",
                    refused.wait
                );
                self.next_look = self.next_look.min(refused.until);
            }
        }
    }

    /// Gives each idle worker a pair, the longest waiting first, and starts or ends workers as the owners of the waiting pairs
    /// need them.
    fn dispatch(&mut self) {
        let limit = guc::WORKERS.get() as usize;
        for worker in self.idle() {
            if worker.number as usize > limit {
                self.stop(worker.index);
            }
        }
        let now = Instant::now();
        for (owner, waiting) in self.queue.owners() {
            if self
                .refused
                .get(&owner)
                .is_some_and(|refused| refused.until > now)
            {
                continue;
            }
            let mut waiting = waiting;
            // A worker may be wanted by an owner whose pair has waited longer.
            for index in self
                .idle()
                .iter()
                .filter(|worker| worker.owner.to_u32() == owner)
                .map(|worker| worker.index)
            {
                if waiting == 0 {
                    break;
                }
                self.assign(index, owner);
                waiting -= 1;
            }
            let starting = self.starting(owner);
            for _ in starting..waiting.min(limit) {
                if !self.start_for(owner, limit) {
                    break;
                }
            }
        }
    }

    fn idle(&self) -> Vec<Seen> {
        let mut idle = table::workers();
        idle.retain(|worker| {
            worker.state == State::Idle
                && !worker.stopping
                && self.workers.contains_key(&worker.index)
        });
        idle
    }

    fn starting(&self, owner: Owner) -> usize {
        let workers = table::workers().into_iter();
        workers
            .filter(|worker| worker.state == State::Starting && worker.owner.to_u32() == owner)
            .count()
    }

    fn assign(&mut self, index: usize, owner: Owner) {
        if let Some(worker) = self.workers.get_mut(&index)
            && let Some(pair) = self.queue.start(owner)
        {
            table::assign(index, &pair.projection, &pair.tenant);
            worker.was_ready = true;
            worker.running = Some(pair);
        }
    }

    /// Starts a worker as the owner, or makes room for one. False: there is nothing to be had now.
    fn start_for(&mut self, owner: Owner, limit: usize) -> bool {
        let seen = table::workers();
        let number =
            (1..=limit as i32).find(|number| seen.iter().all(|worker| worker.number != *number));
        let Some(number) = number else {
            self.make_room();
            return false;
        };
        self.start(number, owner)
    }

    /// Ends a worker that waits for work of an owner that has none, or has had its turn.
    fn make_room(&mut self) {
        if table::workers().iter().any(|worker| worker.stopping) {
            return;
        }
        let has_work = self.queue.owners();
        let idle = self.idle().into_iter();
        let dispensable = |worker: &Seen| {
            let owner = worker.owner.to_u32();
            let turn_is_over = self
                .workers
                .get(&worker.index)
                .is_some_and(|worker| worker.started.elapsed() >= TURN);
            turn_is_over || has_work.iter().all(|(waiting, _)| *waiting != owner)
        };
        let dispensable: Option<Seen> = { idle }.find(dispensable);
        if let Some(worker) = dispensable {
            self.stop(worker.index);
        }
    }

    fn start(&mut self, number: i32, owner: Owner) -> bool {
        let Some(index) = table::add_worker(number, pg_sys::Oid::from(owner)) else {
            self.say_full("all places of lockstep's workers are taken");
            return false;
        };
        let process = BackgroundWorkerBuilder::new(&format!("lockstep worker {number}"))
            .set_type("lockstep worker")
            .set_library("lockstep")
            .set_function("lockstep_worker")
            .set_argument((index as i32).into_datum())
            .set_notify_pid(process::pid())
            .enable_spi_access()
            .load_dynamic();
        let Ok(process) = process else {
            table::free(index, false);
            self.say_full("max_worker_processes are running");
            return false;
        };
        self.said_full = false;
        let worker = Worker {
            process,
            owner,
            started: Instant::now(),
            was_ready: false,
            running: None,
        };
        self.workers.insert(index, worker);
        true
    }

    fn stop(&mut self, index: usize) {
        table::stop(index);
    }

    fn say_full(&mut self, why: &str) {
        if !std::mem::replace(&mut self.said_full, true) {
            pgrx::log!("a lockstep worker could not be started: {why}");
        }
    }
}
