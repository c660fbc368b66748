//! Who is next: the order in which the (projection, tenant) pairs of a database get their batches.
//!
//! A pair that is due stands in line by the age of its oldest event. One that has just had a batch and has more stands as if
//! its oldest event had come [`STANDS_BACK`] later, so no second batch starts while another pair that is due has not had its
//! first; and as that is finite, a stream of new pairs cannot starve it. A pair that is running is in no line; one that failed
//! rests, and then is looked at anew. Nothing here knows a database: it is a data structure.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// How much younger a pair counts after its batch.
const STANDS_BACK: Duration = Duration::from_secs(10);
/// How long a pair rests after its first failure that is not an event's, and at the most; it doubles in between.
const FIRST_REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(300);
/// Of how many tenants it is known which pairs have nothing left.
const MOST_SETTLED: usize = 256;
/// As many as there can be.
const MOST_WORKERS: usize = super::table::MOST;

/// A projection in a tenant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    pub projection: String,
    pub tenant: String,
}

/// The role that owns the projection.
pub type Owner = u32;

/// The pairs of one owner that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Line {
    /// Of the first pair.
    pub since: i64,
    pub owner: Owner,
    pub waiting: usize,
    /// How many of them wait for their first batch or have stood back for long enough; counted up to the most workers
    /// that there can be.
    pub fresh: usize,
}

/// The pairs of a line that do not stand back.
fn fresh(line: &BTreeSet<(i64, Pair)>, now: i64) -> impl Iterator<Item = &(i64, Pair)> {
    line.iter().take_while(move |(since, _)| *since <= now)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In the line of its owner since then, in microseconds of the database's clock.
    Waiting {
        owner: Owner,
        since: i64,
    },
    /// `touched`: something happened in its tenant meanwhile.
    Running {
        touched: bool,
    },
    Resting {
        until: Instant,
    },
}

#[derive(Default)]
pub struct Queue {
    pairs: HashMap<Pair, State>,
    resting: BTreeSet<(Instant, Pair)>,
    /// By the time since when a pair waits.
    lines: HashMap<Owner, BTreeSet<(i64, Pair)>>,
    /// Failures in a row of pairs that are not an event's.
    failures: HashMap<Pair, u32>,
    /// When the rest of a pair was over that has not been found due again.
    rested: HashMap<Pair, i64>,
    /// By tenant: projections that had nothing left to apply, and their owners. The next push makes them due.
    settled: HashMap<String, Vec<(String, Owner)>>,
}

impl Queue {
    /// The pair is due, its oldest event being of `since`.
    pub fn found(&mut self, pair: Pair, owner: Owner, since: i64) {
        match self.pairs.get(&pair) {
            Some(State::Running { .. } | State::Resting { .. }) => return,
            Some(State::Waiting { owner: known, .. }) if *known == owner => return,
            _ => {}
        }
        self.leave(&pair);
        if let Some(settled) = self.settled.get_mut(&pair.tenant) {
            settled.retain(|(projection, _)| *projection != pair.projection);
        }
        // One that failed does not get in front of those that came while it rested, again and again.
        let rested = self.rested.remove(&pair).unwrap_or(since);
        self.join_line(pair, owner, since.max(rested));
    }

    /// Something happened in the tenant (None: in any), which a batch that is running may have begun too early to see.
    pub fn touch(&mut self, tenant: Option<&str>) {
        for (pair, state) in &mut self.pairs {
            if let State::Running { touched } = state {
                *touched |= tenant.is_none_or(|tenant| tenant == pair.tenant);
            }
        }
    }

    /// The tenant was pushed to, in which so many projections can be due. True: all of them are known, and those that had nothing
    /// left are in line now. Else what is due must be looked up.
    #[must_use]
    pub fn pushed(&mut self, tenant: &str, projections: usize, now: i64) -> bool {
        self.touch(Some(tenant));
        let known = self.pairs.keys().filter(|pair| pair.tenant == tenant);
        let settled = self.settled.remove(tenant).unwrap_or_default();
        if known.count() + settled.len() != projections {
            return false;
        }
        for (projection, owner) in settled {
            let tenant = tenant.to_owned();
            self.found(Pair { projection, tenant }, owner, now);
        }
        true
    }

    /// The pair's batches have left nothing.
    pub fn settle(&mut self, pair: Pair, owner: Owner) {
        if self.settled.len() >= MOST_SETTLED && !self.settled.contains_key(&pair.tenant) {
            self.settled.clear();
        }
        let settled = self.settled.entry(pair.tenant).or_default();
        settled.push((pair.projection, owner));
    }

    /// Projections are not what they were.
    pub fn settle_nothing(&mut self) {
        self.settled.clear();
    }

    /// Pairs that wait but are not among those that were found now are due no more.
    pub fn keep_waiting(&mut self, is_due: impl Fn(&Pair) -> bool) {
        let waits = |state: &State| matches!(state, State::Waiting { .. });
        let gone: Vec<Pair> = self
            .pairs
            .iter()
            .filter(|(pair, state)| waits(state) && !is_due(pair))
            .map(|(pair, _)| pair.clone())
            .collect();
        for pair in gone {
            self.leave(&pair);
        }
        self.failures
            .retain(|pair, _| self.pairs.contains_key(pair));
        self.rested.clear();
    }

    /// The lines, the one whose first pair waits longest first.
    pub fn lines(&self, now: i64) -> Vec<Line> {
        let line = |(owner, line): (&Owner, &BTreeSet<(i64, Pair)>)| {
            Some(Line {
                since: line.first()?.0,
                owner: *owner,
                waiting: line.len(),
                fresh: fresh(line, now).take(MOST_WORKERS).count(),
            })
        };
        let mut lines: Vec<Line> = self.lines.iter().filter_map(line).collect();
        lines.sort_unstable();
        lines
    }

    /// Whether so many pairs wait for their first batch.
    pub fn has_fresh(&self, now: i64, count: usize) -> bool {
        let fresh = self.lines.values().flat_map(|line| fresh(line, now));
        fresh.take(count).count() == count
    }

    /// Takes the owner's first pair out of line: it is running now.
    pub fn start(&mut self, owner: Owner) -> Option<Pair> {
        let (_, pair) = self.lines.get(&owner)?.first()?.clone();
        self.leave(&pair);
        self.pairs
            .insert(pair.clone(), State::Running { touched: false });
        Some(pair)
    }

    /// The pair's batch is applied. With more events it goes to the back of the line. True: something happened in its tenant
    /// meanwhile, so what is due there must be looked up.
    #[must_use]
    pub fn applied(&mut self, pair: Pair, owner: Owner, more: bool, now: i64) -> bool {
        let touched = self.forget(&pair);
        if more {
            self.join_line(pair, owner, now + STANDS_BACK.as_micros() as i64);
        }
        touched && !more
    }

    /// The pair waits for a time.
    pub fn rest(&mut self, pair: Pair, until: Instant) {
        self.leave(&pair);
        self.resting.insert((until, pair.clone()));
        self.pairs.insert(pair, State::Resting { until });
    }

    /// As `rest`, unless the pair is running, or rests for longer.
    pub fn rest_at_least(&mut self, pair: Pair, until: Instant) {
        match self.pairs.get(&pair) {
            Some(State::Running { .. }) => {}
            Some(State::Resting { until: known }) if *known >= until => {}
            _ => self.rest(pair, until),
        }
    }

    /// The pair failed for a reason that is no event's. Returns how long it rests.
    pub fn failed(&mut self, pair: Pair, now: Instant) -> Duration {
        let failures = self.failures.entry(pair.clone()).or_default();
        let rest = FIRST_REST
            .saturating_mul(1 << (*failures).min(16))
            .min(LONGEST_REST);
        *failures += 1;
        self.rest(pair, now + rest);
        rest
    }

    /// The pair is nobody's concern any more. True as for `applied`.
    pub fn forget(&mut self, pair: &Pair) -> bool {
        let touched = self.pairs.get(pair) == Some(&State::Running { touched: true });
        self.leave(pair);
        self.failures.remove(pair);
        touched
    }

    /// Ends the rests whose time is over, and returns their tenants: what is due there must be looked up. `clock` is the
    /// database's for `now`.
    pub fn rested(&mut self, now: Instant, clock: i64) -> Vec<String> {
        let mut tenants = Vec::new();
        while let Some((until, _)) = self.resting.first()
            && *until <= now
            && let Some((_, pair)) = self.resting.pop_first()
        {
            self.pairs.remove(&pair);
            tenants.push(pair.tenant.clone());
            self.rested.insert(pair, clock);
        }
        tenants
    }

    /// Ends all rests: what they waited for may have been mended.
    pub fn end_rests(&mut self) {
        for (_, pair) in std::mem::take(&mut self.resting) {
            self.pairs.remove(&pair);
        }
    }

    /// When the next rest is over.
    pub fn next_rested(&self) -> Option<Instant> {
        self.resting.first().map(|(until, _)| *until)
    }

    fn join_line(&mut self, pair: Pair, owner: Owner, since: i64) {
        self.pairs
            .insert(pair.clone(), State::Waiting { owner, since });
        self.lines.entry(owner).or_default().insert((since, pair));
    }

    fn leave(&mut self, pair: &Pair) {
        match self.pairs.remove(pair) {
            Some(State::Waiting { owner, since }) => {
                if let Some(line) = self.lines.get_mut(&owner) {
                    line.remove(&(since, pair.clone()));
                    if line.is_empty() {
                        self.lines.remove(&owner);
                    }
                }
            }
            Some(State::Resting { until }) => {
                self.resting.remove(&(until, pair.clone()));
            }
            Some(State::Running { .. }) | None => {}
        }
    }
}
