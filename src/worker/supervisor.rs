//! The supervisor: keeps a launcher running in each database of `lockstep.databases`. It is connected to no database, so it can
//! see, without a word in the log, that one does not exist yet or no more.

use pgrx::bgworkers::{BackgroundWorkerBuilder, BackgroundWorkerStatus, DynamicBackgroundWorker};
use pgrx::prelude::*;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::table;
use crate::catalog;
use crate::guc;
use crate::process::{self, WaitEvent};
use crate::transaction;

/// How soon a launcher that has ended is started again, and how often a database that is not there is looked for.
const RESTART: Duration = Duration::from_secs(1);
/// The longest such time, for a launcher that cannot connect.
const LONGEST_RESTART: Duration = Duration::from_secs(60);

pub fn register() {
    if process::is_in_upgrade() {
        return;
    }
    BackgroundWorkerBuilder::new("lockstep supervisor")
        .set_library("lockstep")
        .set_function("lockstep_supervisor")
        .enable_spi_access()
        .set_restart_time(Some(RESTART))
        .load();
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn lockstep_supervisor(_argument: pg_sys::Datum) {
    process::begin();
    table::begin_supervisor();
    process::connect_to_none();
    process::set(c"application_name", c"lockstep supervisor");
    let mut supervisor = Supervisor::default();
    loop {
        process::follow_settings();
        let timeout = supervisor.look();
        process::idle(timeout, WaitEvent(c"LockstepSupervisor"));
    }
}

#[derive(Default)]
struct Supervisor {
    /// The launchers that this process has asked for, by their place in the table.
    launchers: HashMap<usize, DynamicBackgroundWorker>,
    starts: HashMap<String, Starts>,
    /// What was last said about a database, so that it is said once.
    said: HashMap<String, &'static str>,
}

struct Starts {
    last: Instant,
    /// From one start to the next.
    wait: Duration,
}

impl Supervisor {
    /// Starts the launchers that are missing. Returns when to look again if nothing happens.
    fn look(&mut self) -> Option<Duration> {
        for (database, was_ready) in table::ended_launchers() {
            if let Some(starts) = self.starts.get_mut(&database) {
                starts.ended(was_ready);
            }
        }
        self.launchers.retain(|index, launcher| {
            let has_ended = matches!(launcher.pid(), Err(BackgroundWorkerStatus::Stopped));
            if has_ended {
                table::remove_launcher(*index);
            }
            !has_ended
        });
        let wanted = guc::databases();
        let missing = table::without_launcher(&wanted);
        if missing.is_empty() {
            return None;
        }
        let (ready, waiting): (Vec<String>, Vec<String>) = missing
            .into_iter()
            .partition(|database| self.starts.get(database).is_none_or(Starts::is_over));
        if ready.is_empty() {
            return (!waiting.is_empty()).then_some(RESTART);
        }
        let Ok(Ok(existing)) = transaction::run(|| Ok::<_, ()>(catalog::databases())) else {
            return Some(RESTART);
        };
        for database in ready {
            if existing.contains(&database) {
                self.start(&database);
            } else {
                self.say(&database, "does not exist or allows no connections");
            }
        }
        Some(RESTART)
    }

    fn start(&mut self, database: &str) {
        let Some(index) = table::add_launcher(database) else {
            return self.say(database, "has no place among 32 databases");
        };
        let launcher = BackgroundWorkerBuilder::new(&format!("lockstep launcher {database}"))
            .set_type("lockstep launcher")
            .set_library("lockstep")
            .set_function("lockstep_launcher")
            .set_argument((index as i32).into_datum())
            .set_notify_pid(process::pid())
            .enable_spi_access()
            .load_dynamic();
        let starts = self.starts.entry(database.to_owned());
        starts
            .and_modify(Starts::again)
            .or_insert_with(Starts::first);
        match launcher {
            Ok(launcher) => {
                self.said.remove(database);
                self.launchers.insert(index, launcher);
            }
            Err(_) => {
                table::remove_launcher(index);
                self.say(
                    database,
                    "gets no launcher: max_worker_processes are running",
                );
            }
        }
    }

    fn say(&mut self, database: &str, what: &'static str) {
        if self.said.insert(database.to_owned(), what) != Some(what) {
            pgrx::log!("lockstep.databases: database \"{database}\" {what}");
        }
    }
}

impl Starts {
    fn first() -> Self {
        Starts {
            last: Instant::now(),
            wait: RESTART,
        }
    }

    fn again(&mut self) {
        self.last = Instant::now();
    }

    fn ended(&mut self, was_ready: bool) {
        self.wait = if was_ready {
            RESTART
        } else {
            (self.wait * 2).min(LONGEST_RESTART)
        };
    }

    fn is_over(&self) -> bool {
        self.last.elapsed() >= self.wait
    }
}
