//! A worker: connected as one owner, it runs a batch of a pair whenever its launcher gives it one, each in a transaction of its
//! own.

use pgrx::prelude::*;
use std::time::{Duration, Instant};

use super::table::{self, Done, Outcome, Task};
use crate::catalog;
use crate::error::Error;
use crate::guc;
use crate::process::{self, WaitEvent};
use crate::projection::{self, Report, Status};
use crate::rights;
use crate::schema;
use crate::subtransaction::Failure;
use crate::transaction;

/// After this time a batch ends with the event that is being applied: it is another pair's turn.
const LONGEST_BATCH: Duration = Duration::from_secs(1);

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn lockstep_worker(argument: pg_sys::Datum) {
    let index = argument.value();
    process::at_exit(at_exit, index);
    process::begin();
    let (database, owner) = table::begin_worker(index);
    process::connect_as(database, owner);
    // Claims need it, whatever the defaults of the role and the database are.
    process::set(c"default_transaction_isolation", c"read committed");
    process::set(c"default_transaction_read_only", c"off");
    let (number, quiet) = table::worker_is_ready(index);
    process::set_application_name(&format!("lockstep worker {number}"));
    let role = transaction::run(|| Ok::<_, ()>(rights::role_name(owner).unwrap_or_default()));
    let role = role.ok().and_then(Result::ok).unwrap_or_default();
    say(
        quiet,
        &format!("lockstep worker {number} started as role \"{role}\""),
    );
    loop {
        process::follow_settings();
        match table::next_task(index) {
            Task::Run { projection, tenant } => {
                let (outcome, done) = Batch::run(&projection, &tenant);
                process::reset_session();
                table::finish(index, outcome, &done);
                process::report_statistics(false);
            }
            Task::Stop { quiet } => {
                say(
                    quiet,
                    &format!("lockstep worker {number} of role \"{role}\" stopped"),
                );
                return;
            }
            Task::Nothing => {
                process::report_statistics(true);
                process::idle(None, WaitEvent(c"LockstepWorker"));
            }
        }
        process::ignore_cancel();
        pgrx::check_for_interrupts!();
    }
}

fn say(quiet: bool, what: &str) {
    if quiet {
        pgrx::debug1!("{what}");
    } else {
        pgrx::log!("{what}");
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn at_exit(_code: i32, argument: pg_sys::Datum) {
    table::end_worker(argument.value());
}

/// One pair's turn.
struct Batch<'a> {
    projection: &'a str,
    tenant: &'a str,
    done: Done,
}

impl<'a> Batch<'a> {
    fn run(projection: &'a str, tenant: &'a str) -> (Outcome, Done) {
        process::report(Some(&format!(
            "projection \"{projection}\", tenant \"{tenant}\""
        )));
        let mut batch = Batch {
            projection,
            tenant,
            done: Done::default(),
        };
        let outcome = match batch.attempt(false) {
            Ok(outcome) => outcome,
            // A cancel is meant for the batch.
            Err(failure) if failure.is_cancel() => batch.error(failure.message),
            Err(_) => batch.one_by_one(),
        };
        process::report(None);
        (outcome, batch.done)
    }

    /// After a batch that failed as a whole: an event a transaction, until the time is over or one fails.
    fn one_by_one(&mut self) -> Outcome {
        let begun = Instant::now();
        loop {
            match self.attempt(true) {
                Ok(Outcome::Applied { more: true }) if begun.elapsed() < LONGEST_BATCH => {}
                Ok(outcome) => return outcome,
                Err(failure) => return self.error(failure.message),
            }
            pgrx::check_for_interrupts!();
        }
    }

    /// One transaction; an Err if it failed as a whole.
    fn attempt(&mut self, careful: bool) -> Result<Outcome, Failure> {
        let run = || {
            // The launcher, which hands out no work then, says so in the log.
            let is_for_workers = catalog::has_extension() && schema::check().is_ok();
            if !is_for_workers || rights::is_superuser(rights::caller()) {
                return Ok(None);
            }
            let report =
                projection::run_for_worker(self.projection, self.tenant, LONGEST_BATCH, careful)?;
            process::drop_temporary_tables();
            if report.status == Status::Ok && report.processed + report.skipped == 0 {
                // At the most the cursor has moved over events that are none of the projection's: if a crash takes that back,
                // it is moved again.
                guc::set_local(c"synchronous_commit", c"off");
            }
            Ok(Some(report))
        };
        Ok(match transaction::run(run)? {
            Ok(Some(report)) => self.outcome(report),
            Ok(None) | Err(Error::UndefinedProjection(_) | Error::NoHandler(_)) => Outcome::Gone,
            Err(error) => {
                let (projection, tenant) = (self.projection, self.tenant);
                pgrx::log!("projection \"{projection}\", tenant \"{tenant}\": {error}");
                self.error(error.to_string())
            }
        })
    }

    fn outcome(&mut self, report: Report) -> Outcome {
        self.done.events += report.processed;
        self.done.errors += report.skipped + i64::from(report.status == Status::Failed);
        self.done.last_error = report.error.or(self.done.last_error.take());
        match report.status {
            Status::Ok => Outcome::Applied { more: report.more },
            Status::Busy => Outcome::Busy,
            Status::Failed | Status::Backoff => Outcome::Retry {
                milliseconds: report.retry_in.unwrap_or_default().as_millis() as u64,
            },
            Status::HandlerGone => self.error("its handler does not exist".to_owned()),
            Status::Paused | Status::NotOwner => Outcome::Gone,
        }
    }

    fn error(&mut self, message: String) -> Outcome {
        self.done.errors += 1;
        self.done.last_error = Some(message);
        Outcome::Error
    }
}
