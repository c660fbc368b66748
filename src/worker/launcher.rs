//! The launcher of a database: it looks up which pairs are due, and decides whose turn it is.

use pgrx::prelude::*;
use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::crew::{Crew, Idle, News};
use super::queue::{Line, Pair, Queue};
use super::table::{self, Outcome};
use crate::catalog;
use crate::error::Error;
use crate::guc;
use crate::process::{self, WaitEvent};
use crate::projection;
use crate::schema;
use crate::transaction;
use crate::wakeup::mailbox;

/// The most time between two looks at everything: for what nobody announced (a restored dump, a prepared transaction's end).
const LOOK: Duration = Duration::from_secs(1);
/// A look at everything that nobody asked for takes at most this part of the time,
const LOOKS_SHARE: u32 = 50;
/// and one that is asked for, by a changed projection or by a mailbox that has overflowed, this one.
const URGENT_LOOKS_SHARE: u32 = 4;
/// While looks fail, the time between them doubles up to this.
const LONGEST_LOOK: Duration = Duration::from_secs(60);
/// The tenants that are looked at before workers are given work again,
const TENANTS_AT_ONCE: usize = 64;
/// and the pairs that wait for their first batch above which it is of no use to know of more.
const ENOUGH_PAIRS: usize = 256;
/// How long a worker serves its owner before it is ended for another owner, if both have work.
const TURN: Duration = Duration::from_millis(200);

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn lockstep_launcher(argument: pg_sys::Datum) {
    let index = argument.value();
    process::begin();
    let Some(database) = table::begin_launcher(index) else {
        return;
    };
    process::at_exit(at_exit, index);
    process::connect_as_superuser(&database);
    // What it runs is the extension's own, whatever the defaults of the database are.
    process::set(c"search_path", c"pg_catalog, pg_temp");
    process::set(c"default_transaction_isolation", c"read committed");
    process::set(c"default_transaction_read_only", c"on");
    process::set(c"statement_timeout", c"0");
    process::set(c"lock_timeout", c"0");
    process::set(c"jit", c"off");
    process::set_application_name(&format!("lockstep launcher {database}"));
    if !mailbox::open() {
        return;
    }
    table::launcher_is_ready(index);
    pgrx::log!("lockstep launcher of database \"{database}\" started");
    let mut launcher = Launcher::new();
    while !table::launcher_must_stop(index) {
        process::follow_settings();
        launcher.collect_news();
        launcher.collect_mail();
        launcher.look_if_needed();
        launcher.dispatch();
        process::idle(Some(launcher.time_left()), WaitEvent(c"LockstepLauncher"));
    }
    pgrx::log!("lockstep launcher of database \"{database}\" stopped");
}

#[pg_guard]
unsafe extern "C-unwind" fn at_exit(_code: i32, argument: pg_sys::Datum) {
    mailbox::close();
    table::abandon_workers();
    table::end_launcher(argument.value());
}

struct Launcher {
    queue: Queue,
    crew: Crew,
    tenants: Tenants,
    looks: Looks,
    /// How many projections can be due in a tenant, when everything was looked at last; None: they have changed since.
    projections: Option<usize>,
    /// Why it does not look, once said.
    refused: Option<Error>,
}

/// Tenants in which something may have become due, each once, in the order in which they were named.
#[derive(Default)]
struct Tenants {
    line: VecDeque<String>,
    known: HashSet<String>,
}

impl Tenants {
    fn add(&mut self, tenant: String) {
        if self.known.insert(tenant.clone()) {
            self.line.push_back(tenant);
        }
    }

    fn take(&mut self, most: usize) -> Vec<String> {
        let taken: Vec<String> = self.line.drain(..most.min(self.line.len())).collect();
        for tenant in &taken {
            self.known.remove(tenant);
        }
        taken
    }
}

/// When everything is looked at.
struct Looks {
    last: Instant,
    /// How long that took.
    cost: Duration,
    next: Instant,
    failures: u32,
}

impl Looks {
    fn done(&mut self, begun: Instant, succeeded: bool) {
        self.last = Instant::now();
        self.cost = begun.elapsed();
        self.failures = if succeeded { 0 } else { self.failures + 1 };
        let doubled = LOOK * (1 << self.failures.saturating_sub(1).min(6));
        self.next = self.last + doubled.min(LONGEST_LOOK).max(self.cost * LOOKS_SHARE);
    }

    /// No look before that, but one as soon as its share of the time allows.
    fn not_later_than(&mut self, wait: Duration, share: u32) {
        self.next = self.next.min(self.last + wait.max(self.cost * share));
    }
}

impl Launcher {
    fn new() -> Self {
        let now = Instant::now();
        Launcher {
            queue: Queue::default(),
            crew: Crew::default(),
            tenants: Tenants::default(),
            looks: Looks {
                last: now,
                cost: Duration::ZERO,
                next: now,
                failures: 0,
            },
            projections: None,
            refused: None,
        }
    }

    fn time_left(&self) -> Duration {
        if !self.tenants.line.is_empty() && self.wants_pairs() {
            return Duration::ZERO;
        }
        let mut next = self.looks.next;
        for time in [self.queue.next_rested(), self.crew.next_retry()] {
            next = next.min(time.unwrap_or(next));
        }
        if !self.lines().is_empty() {
            // A worker may have had its turn by then.
            next = next.min(Instant::now() + TURN);
        }
        next.saturating_duration_since(Instant::now())
    }

    // What is due.

    fn collect_mail(&mut self) {
        let mail = mailbox::collect();
        if mail.projection_changed {
            self.queue.end_rests();
            self.queue.settle_nothing();
            self.projections = None;
            self.crew.refuse_nobody();
            self.looks.failures = 0;
        }
        if mail.projection_changed || mail.overflowed {
            self.looks
                .not_later_than(Duration::ZERO, URGENT_LOOKS_SHARE);
        }
        if mail.overflowed {
            self.queue.touch(None);
            self.crew.touch(None);
        }
        for tenant in mail.tenants {
            self.crew.touch(Some(&tenant));
            let projections = self.projections.unwrap_or(usize::MAX);
            if !self.queue.pushed(&tenant, projections, process::now()) {
                self.tenants.add(tenant);
            }
        }
        for tenant in self.queue.rested(Instant::now(), process::now()) {
            self.tenants.add(tenant);
        }
    }

    /// Whether more pairs are of use: as long as those that wait for their first batch are few. Those that are known have waited
    /// longer than those that are not.
    fn wants_pairs(&self) -> bool {
        !self.queue.has_fresh(process::now(), ENOUGH_PAIRS)
    }

    fn look_if_needed(&mut self) {
        if Instant::now() >= self.looks.next {
            self.look(None);
        } else if !self.tenants.line.is_empty() && self.wants_pairs() {
            let tenants = self.tenants.take(TENANTS_AT_ONCE);
            self.look(Some(tenants));
        }
    }

    /// Looks up what is due in the tenants (None: in all).
    fn look(&mut self, tenants: Option<Vec<String>>) {
        let begun = Instant::now();
        let everywhere = tenants.is_none();
        if everywhere {
            self.queue.touch(None);
            self.tenants = Tenants::default();
        }
        let looked = transaction::run(|| {
            if !catalog::has_extension() {
                return Err(None);
            }
            schema::check().map_err(Some)?;
            let (due, is_prepared) = projection::for_workers(tenants);
            let others =
                everywhere.then(|| (projection::next_retries(), projection::count_for_workers()));
            Ok((due, is_prepared, others))
        });
        // If the look had to wait for a lock, that took the calls of mail that has come meanwhile.
        process::wake(process::number());
        // An Ok(Err) is no failure: there is no extension, or it waits for the other half of an upgrade.
        if everywhere || looked.is_err() {
            self.looks.done(begun, looked.is_ok());
        }
        self.say_refused(
            looked
                .as_ref()
                .ok()
                .and_then(|looked| looked.as_ref().err()?.clone()),
        );
        let Ok(Ok((due, is_prepared, others))) = looked else {
            self.queue.keep_waiting(|_| false);
            self.projections = None;
            return;
        };
        let (retries, projections) = others.unzip();
        if let Some(projections) = projections {
            self.projections = Some(projections);
            mailbox::heed_pushes(projections > 0);
        }
        let poll_interval = Duration::from_millis(guc::POLL_INTERVAL.get() as u64);
        if is_prepared {
            self.looks.not_later_than(poll_interval, LOOKS_SHARE);
        }
        let mut found = HashSet::new();
        for due in due {
            let pair = Pair {
                projection: due.projection,
                tenant: due.tenant,
            };
            if due.is_claimed {
                self.queue.rest_at_least(pair, begun + poll_interval);
                continue;
            }
            if everywhere {
                found.insert(pair.clone());
            }
            self.queue.found(pair, due.owner.to_u32(), due.since);
        }
        for (projection, tenant, wait) in retries.unwrap_or_default() {
            let pair = Pair { projection, tenant };
            self.queue.rest_at_least(pair, begun + wait);
        }
        if everywhere {
            self.queue.keep_waiting(|pair| found.contains(pair));
        }
    }

    fn say_refused(&mut self, refused: Option<Error>) {
        if refused != self.refused
            && let Some(error) = &refused
        {
            error.log();
        }
        self.refused = refused;
    }

    // Whose turn it is.

    fn collect_news(&mut self) {
        for news in self.crew.collect() {
            match news {
                News::Done {
                    pair,
                    owner,
                    outcome,
                    has_applied,
                } => self.batch_is_done(pair, owner, outcome, has_applied),
                News::Lost { pair } => {
                    let (projection, tenant) = (pair.projection.clone(), pair.tenant.clone());
                    let rest = self.queue.failed(pair, Instant::now());
                    pgrx::log!(
                        "a lockstep worker ended while it ran projection \"{projection}\", tenant \"{tenant}\", which rests for {rest:?}"
                    );
                }
            }
        }
    }

    fn batch_is_done(&mut self, pair: Pair, owner: u32, outcome: Outcome, has_applied: bool) {
        let now = Instant::now();
        let tenant = pair.tenant.clone();
        let is_touched = match outcome {
            Outcome::Applied { more: false } if has_applied => {
                let is_touched = self
                    .queue
                    .applied(pair.clone(), owner, false, process::now());
                self.queue.settle(pair, owner);
                is_touched
            }
            Outcome::Applied { more } => self.queue.applied(pair, owner, more, process::now()),
            Outcome::Gone => self.queue.forget(&pair),
            Outcome::Retry { milliseconds } => {
                let wait = Duration::from_millis(milliseconds + 1);
                self.queue.rest(pair, now + wait);
                false
            }
            Outcome::Busy => {
                let wait = Duration::from_millis(guc::POLL_INTERVAL.get() as u64);
                self.queue.rest(pair, now + wait);
                false
            }
            Outcome::Error => {
                self.queue.failed(pair, now);
                false
            }
        };
        if is_touched {
            self.tenants.add(tenant);
        }
    }

    /// First the pairs that wait for their first batch; only when all of those have a worker, the others.
    fn dispatch(&mut self) {
        self.crew.end_surplus();
        self.give_work();
        table::want_workers(!self.lines().is_empty());
    }

    fn give_work(&mut self) {
        let is_short = self.serve(|line| line.fresh);
        let lines = self.lines();
        let fresh_of = |owner| {
            lines
                .iter()
                .any(|line| line.owner == owner && line.fresh > 0)
        };
        if lines.iter().any(|line| line.fresh > 0) {
            if is_short {
                let has_had_its_turn =
                    |idle: &Idle| !fresh_of(idle.owner) || idle.served_for >= TURN;
                self.crew.make_room(has_had_its_turn);
            }
        } else if self.serve(|line| line.waiting) {
            let lines = self.lines();
            let has_no_work = |idle: &Idle| {
                idle.idle_for >= TURN && lines.iter().all(|line| line.owner != idle.owner)
            };
            self.crew.make_room(has_no_work);
        }
    }

    /// The lines of owners as whom workers can be started.
    fn lines(&self) -> Vec<Line> {
        let mut lines = self.queue.lines(process::now());
        lines.retain(|line| !self.crew.is_refused(line.owner));
        lines
    }

    /// Gives the owners' idle workers pairs, as many of each line as `wanted` says, and starts workers for the rest. True: some
    /// could not be started.
    fn serve(&mut self, wanted: impl Fn(&Line) -> usize) -> bool {
        let mut is_short = false;
        for line in self.lines() {
            let mut wanted = wanted(&line);
            while wanted > 0
                && let Some(idle) = self.crew.idle_of(line.owner)
                && let Some(pair) = self.queue.start(line.owner)
            {
                self.crew.assign(idle, pair);
                wanted -= 1;
            }
            for _ in self.crew.starting(line.owner)..wanted {
                if !self.crew.start(line.owner) {
                    is_short = true;
                    break;
                }
            }
        }
        is_short
    }
}
