//! The workers of a database: the processes that its launcher starts, hands pairs and ends. Whose turn it is, is the launcher's
//! to say.

use pgrx::PgMemoryContexts;
use pgrx::bgworkers::{BackgroundWorkerBuilder, BackgroundWorkerStatus, DynamicBackgroundWorker};
use pgrx::prelude::*;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::queue::{Owner, Pair};
use super::table::{self, Outcome, Seen, State};
use crate::guc;
use crate::process;
use crate::rights;
use crate::transaction;

/// A worker that has had nothing to do for so long is ended: its process and its connection are of use to others.
const LONGEST_IDLE: Duration = Duration::from_secs(300);
/// After a worker of an owner could not be started, none is for a time, which doubles up to the longest.
const RETRY_START: Duration = Duration::from_secs(1);
const LONGEST_RETRY_START: Duration = Duration::from_secs(60);

#[derive(Default)]
pub struct Crew {
    /// Those that this launcher has asked for, by their place in the table.
    workers: HashMap<usize, Worker>,
    /// Owners as whom no worker could be started.
    refused: HashMap<Owner, Refused>,
    /// Owners whose first worker is in the log.
    known: HashSet<Owner>,
    /// Whether it is in the log that no process can be had.
    said_full: bool,
}

struct Worker {
    process: DynamicBackgroundWorker,
    /// What `process` was allocated in: PostgreSQL leaves it to the launcher to free it.
    _memory: PgMemoryContexts,
    owner: Owner,
    started: Instant,
    idle_since: Instant,
    /// The process was seen connected.
    was_ready: bool,
    running: Option<Pair>,
}

struct Refused {
    until: Instant,
    wait: Duration,
}

/// What has become of a pair that a worker was given.
pub enum News {
    Done {
        pair: Pair,
        owner: Owner,
        outcome: Outcome,
        has_applied: bool,
    },
    /// The worker ended meanwhile.
    Lost { pair: Pair },
}

/// A worker that waits for work.
#[derive(Clone, Copy)]
pub struct Idle {
    index: usize,
    pub owner: Owner,
    pub served_for: Duration,
    pub idle_for: Duration,
}

impl Crew {
    /// Takes back what workers have done, and the places of those that have ended.
    pub fn collect(&mut self) -> Vec<News> {
        let seen: HashMap<usize, Seen> = table::workers()
            .into_iter()
            .map(|worker| (worker.index, worker))
            .collect();
        let known: Vec<usize> = self.workers.keys().copied().collect();
        let mut news = Vec::new();
        for index in known {
            let seen = seen.get(&index);
            match seen.map(|worker| worker.state) {
                Some(State::Done(outcome)) => {
                    table::make_idle(index);
                    let has_applied = seen.is_some_and(|worker| worker.has_applied);
                    news.extend(self.done(index, outcome, has_applied));
                }
                Some(State::Starting) if !self.has_stopped(index) => {}
                Some(State::Starting | State::Ended) => news.extend(self.ended(index)),
                // Told to end, and gone; the place may be another launcher's by now.
                None => {
                    self.workers.remove(&index);
                }
                Some(_) => self.is_ready(index),
            }
        }
        self.end_strangers(seen.values());
        news
    }

    /// What a launcher before this one has left.
    fn end_strangers<'a>(&self, seen: impl Iterator<Item = &'a Seen>) {
        for worker in seen.filter(|worker| !self.workers.contains_key(&worker.index)) {
            if worker.state == State::Ended {
                table::free(worker.index, false);
            } else if !worker.stopping {
                table::stop(worker.index, false);
            }
        }
    }

    fn is_ready(&mut self, index: usize) {
        if let Some(worker) = self.workers.get_mut(&index)
            && !worker.was_ready
        {
            worker.was_ready = true;
            worker.idle_since = Instant::now();
            self.refused.remove(&worker.owner);
        }
    }

    fn done(&mut self, index: usize, outcome: Outcome, has_applied: bool) -> Option<News> {
        let worker = self.workers.get_mut(&index)?;
        worker.idle_since = Instant::now();
        Some(News::Done {
            pair: worker.running.take()?,
            owner: worker.owner,
            outcome,
            has_applied,
        })
    }

    /// The tenant was pushed to: workers that run its pairs go on with them.
    pub fn touch(&self, tenant: Option<&str>) {
        for (index, worker) in &self.workers {
            let pair = worker.running.as_ref();
            if pair.is_some_and(|pair| tenant.is_none_or(|tenant| tenant == pair.tenant)) {
                table::touch(*index);
            }
        }
    }

    fn has_stopped(&self, index: usize) -> bool {
        let process = self.workers.get(&index).map(|worker| worker.process.pid());
        matches!(process, Some(Err(BackgroundWorkerStatus::Stopped)))
    }

    /// One that was not told to end, or could not be started.
    fn ended(&mut self, index: usize) -> Option<News> {
        let worker = self.workers.remove(&index)?;
        table::free(index, worker.was_ready);
        self.known.remove(&worker.owner);
        if let Some(pair) = worker.running {
            return Some(News::Lost { pair });
        }
        if worker.was_ready {
            pgrx::log!("a lockstep worker ended");
        } else {
            self.refuse(worker.owner);
        }
        None
    }

    fn refuse(&mut self, owner: Owner) {
        let now = Instant::now();
        let refused = self.refused.entry(owner).or_insert(Refused {
            until: now,
            wait: RETRY_START / 2,
        });
        refused.wait = (refused.wait * 2).min(LONGEST_RETRY_START);
        refused.until = now + refused.wait;
        let wait = refused.wait;
        let role = transaction::run(|| Ok::<_, ()>(rights::role_name(pg_sys::Oid::from(owner))));
        let role = role.ok().and_then(Result::ok).flatten().unwrap_or_default();
        pgrx::log!("a lockstep worker could not be started as role \"{role}\", next in {wait:?}");
    }

    /// Whether no worker of the owner's is to be started now.
    pub fn is_refused(&self, owner: Owner) -> bool {
        let refused = self.refused.get(&owner);
        refused.is_some_and(|refused| refused.until > Instant::now())
    }

    /// When the next of them may be tried again.
    pub fn next_retry(&self) -> Option<Instant> {
        let now = Instant::now();
        let until = self.refused.values().map(|refused| refused.until);
        until.filter(|until| *until > now).min()
    }

    /// Why a worker could not be started may have been mended.
    pub fn refuse_nobody(&mut self) {
        self.refused.clear();
    }

    pub fn idle(&self) -> Vec<Idle> {
        let idle = |seen: &Seen| {
            let worker = self.workers.get(&seen.index)?;
            (seen.state == State::Idle && !seen.stopping).then(|| Idle {
                index: seen.index,
                owner: worker.owner,
                served_for: worker.started.elapsed(),
                idle_for: worker.idle_since.elapsed(),
            })
        };
        table::workers().iter().filter_map(idle).collect()
    }

    pub fn idle_of(&self, owner: Owner) -> Option<Idle> {
        self.idle().into_iter().find(|idle| idle.owner == owner)
    }

    /// The owner's workers that are about to be idle.
    pub fn starting(&self, owner: Owner) -> usize {
        let workers = table::workers().into_iter();
        workers
            .filter(|worker| worker.state == State::Starting && worker.owner.to_u32() == owner)
            .count()
    }

    pub fn assign(&mut self, idle: Idle, pair: Pair) {
        self.is_ready(idle.index);
        if let Some(worker) = self.workers.get_mut(&idle.index) {
            table::assign(idle.index, &pair.projection, &pair.tenant);
            worker.running = Some(pair);
        }
    }

    /// Starts a worker as the owner. False: there is no number, no place or no process left.
    pub fn start(&mut self, owner: Owner) -> bool {
        let seen = table::workers();
        let is_free = |number: &i32| seen.iter().all(|worker| worker.number != *number);
        let Some(number) = (1..=guc::WORKERS.get()).find(is_free) else {
            return false;
        };
        let quiet = self.known.contains(&owner);
        let Some(index) = table::add_worker(number, pg_sys::Oid::from(owner), quiet) else {
            self.say_full("all places of lockstep's workers are taken");
            return false;
        };
        let mut memory = PgMemoryContexts::new("lockstep worker's handle");
        // SAFETY: only the handle is allocated in it, which is not used after it.
        let process = unsafe {
            memory.switch_to(|_| {
                BackgroundWorkerBuilder::new(&format!("lockstep worker {number}"))
                    .set_type("lockstep worker")
                    .set_library("lockstep")
                    .set_function("lockstep_worker")
                    .set_argument((index as i32).into_datum())
                    .set_notify_pid(process::pid())
                    .enable_spi_access()
                    .load_dynamic()
            })
        };
        let Ok(process) = process else {
            table::free(index, false);
            self.say_full("max_worker_processes are running");
            return false;
        };
        self.said_full = false;
        self.known.insert(owner);
        let now = Instant::now();
        let worker = Worker {
            process,
            _memory: memory,
            owner,
            started: now,
            idle_since: now,
            was_ready: false,
            running: None,
        };
        self.workers.insert(index, worker);
        true
    }

    /// Ends one idle worker that can be done without, if none is ending already.
    pub fn make_room(&self, can_be_done_without: impl Fn(&Idle) -> bool) {
        let is_ending = |worker: &Seen| {
            worker.stopping && matches!(worker.state, State::Starting | State::Idle)
        };
        if table::workers().iter().any(is_ending) {
            return;
        }
        if let Some(idle) = self.idle().into_iter().find(can_be_done_without) {
            table::stop(idle.index, true);
        }
    }

    /// Ends those that a reload made too many, and those that have had nothing to do for long.
    pub fn end_surplus(&self) {
        let idle = self.idle();
        for worker in table::workers() {
            let Some(idle) = idle.iter().find(|idle| idle.index == worker.index) else {
                continue;
            };
            if worker.number > guc::WORKERS.get() {
                table::stop(worker.index, false);
            } else if idle.idle_for > LONGEST_IDLE {
                table::stop(worker.index, true);
            }
        }
    }

    fn say_full(&mut self, why: &str) {
        if !std::mem::replace(&mut self.said_full, true) {
            pgrx::log!("a lockstep worker could not be started: {why}");
        }
    }
}
