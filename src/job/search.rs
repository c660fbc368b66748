//! Which jobs a claim tries, and in which order. What a search finds may be another's by now.
//!
//! Five streams, each the walk of an index, are merged: jobs with a key and jobs without one, ready at once or when a time has
//! come, and expired claims. They are kept apart so that none has to read through another's rows: the clock's through those that are
//! not due, those without a key through the backlog of a busy one.
//!
//! A key with a long backlog fills the stream of those with a key. Past [`KEYED`] of them, [`KeyWalk`] asks the index of keys
//! for one key after the other, priority by priority, and the first job of each: busy or not, a key costs one look.

use pgrx::datum::clock_timestamp;
use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{HashMap, HashSet, VecDeque};

use super::queue;
use super::row;
use crate::lookup::{Key, Lookup, Row, Strength, Walk};
use crate::snapshot::At;
use crate::spi::{Arg, Plan, Rows, Spi};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Keyed,
    Keyless,
    /// Ready since a time that came.
    Due,
    Expired,
}

#[derive(Clone, Debug)]
pub struct Candidate {
    pub source: Source,
    pub job_id: i64,
    pub key: Option<String>,
    pub kind: String,
    pub priority: i32,
    run_at: i64,
    /// It has failed before, so a twin of it may have been enqueued.
    pub failed: bool,
}

impl Candidate {
    fn read(rows: &Rows, row: usize, source: Source) -> Option<Self> {
        Some(Candidate {
            source,
            job_id: rows.get(row, 1)?,
            key: rows.get(row, 2),
            priority: rows.get(row, 3)?,
            // A timestamptz is its microseconds.
            run_at: rows.get(row, 4)?,
            failed: rows.get(row, 5)?,
            kind: rows.get(row, 7).unwrap_or_default(),
        })
    }

    fn of(row: &Row, source: Source) -> Option<Self> {
        Some(Candidate {
            source,
            job_id: row.get(row::JOB_ID)?,
            key: row.get(row::KEY),
            priority: row.get(row::PRIORITY)?,
            run_at: row.get(row::RUN_AT)?,
            failed: row::has_failed(row),
            kind: row.get(row::KIND)?,
        })
    }

    /// Among jobs that were ready at once, ids tell age and the clock has no say.
    fn goes_before(&self, other: &Candidate) -> bool {
        let at_once = |source| matches!(source, Source::Keyed | Source::Keyless);
        if self.priority == other.priority && at_once(self.source) && at_once(other.source) {
            self.job_id < other.job_id
        } else {
            self.rank() < other.rank()
        }
    }

    /// The least goes first, by priority and time.
    fn rank(&self) -> (Reverse<i32>, i64, i64) {
        (Reverse(self.priority), self.run_at, self.job_id)
    }
}

/// The streams, of which the best head goes first.
pub struct Found<'jobs> {
    streams: [Stream<'jobs>; STREAMS],
    /// The streams of jobs with a key are as long as they get.
    keyed_is_longest: bool,
}

/// Ready at once with a key and without, due with a key and without, expired.
const STREAMS: usize = 5;

/// What is to be done before the next candidate is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    Nothing,
    /// A deeper search.
    Depth,
    /// The next page of a walk from key to key.
    Keys,
}

/// What was read of a stream and, where it goes on, the walk that gives the rest when it is asked for.
#[derive(Default)]
struct Stream<'jobs> {
    read: VecDeque<Candidate>,
    walk: Option<Lane<'jobs>>,
    /// There is more than may be read.
    cut: bool,
}

/// The walk along a lane of the jobs that are ready at once.
struct Lane<'jobs> {
    walk: Walk<'jobs>,
    queue: &'jobs str,
    tenant: &'jobs str,
    source: Source,
    /// The priority that is too high to be wanted.
    below: Option<i32>,
    /// How many more may be read.
    left: usize,
}

impl<'jobs> Stream<'jobs> {
    fn walking(lane: Lane<'jobs>) -> Self {
        Stream {
            walk: Some(lane),
            ..Stream::default()
        }
    }

    /// Of a search that was limited to so many.
    fn limited(read: VecDeque<Candidate>, limit: usize) -> Self {
        Stream {
            cut: read.len() == limit,
            read,
            walk: None,
        }
    }

    /// Reads the next candidate of a walk, if there is none.
    fn fill(&mut self) {
        if self.read.is_empty()
            && let Some(lane) = &mut self.walk
        {
            self.cut = lane.left == 0;
            match lane.next() {
                Some(candidate) => self.read.push_back(candidate),
                None => self.walk = None,
            }
        }
    }

    fn is_dry(&self) -> bool {
        self.cut && self.read.is_empty()
    }
}

impl Lane<'_> {
    fn next(&mut self) -> Option<Candidate> {
        self.left = self.left.checked_sub(1)?;
        loop {
            let row = self.walk.step()?;
            let is_wanted = self
                .below
                .is_none_or(|below| row.get(row::PRIORITY).is_some_and(|is: i32| is < below));
            if is_wanted && is_of(&row, self.queue, self.tenant) {
                return Candidate::of(&row, self.source);
            }
        }
    }
}

/// Another queue's lane may have the same number.
fn is_of(row: &Row, queue: &str, tenant: &str) -> bool {
    row.has(row::QUEUE, queue) && row.has(row::TENANT, tenant)
}

impl Found<'_> {
    /// A stream that was cut and has run dry may have gone on with a job that is before all others.
    pub fn missing(&mut self) -> Missing {
        self.streams.iter_mut().for_each(Stream::fill);
        let is_dry = |stream: usize| self.streams[stream].is_dry();
        if is_dry(3) || is_dry(4) {
            Missing::Depth
        } else if is_dry(0) {
            Missing::Keys
        } else if !is_dry(2) {
            Missing::Nothing
        } else if self.keyed_is_longest {
            Missing::Keys
        } else {
            Missing::Depth
        }
    }

    /// Puts a page of a walk from key to key in the place of the jobs with a key; None: it is over.
    pub fn put_keys(&mut self, page: Option<Vec<Candidate>>) {
        self.keyed_is_longest = true;
        self.streams[0] = Stream {
            cut: page.is_some(),
            read: page.unwrap_or_default().into(),
            walk: None,
        };
        self.streams[2] = Stream::default();
    }

    /// None of those with a key is wanted.
    pub fn drop_keyed(&mut self) {
        for stream in [0, 2] {
            self.streams[stream] = Stream::default();
        }
    }

    /// None of those without a key that were ready at once is wanted, down to that priority.
    pub fn drop_keyless(&mut self, least: i32) {
        let stream = &mut self.streams[1];
        stream.read.retain(|candidate| candidate.priority < least);
        if let Some(lane) = &mut stream.walk {
            lane.below = Some(least);
        }
    }

    pub fn take_expired(&mut self) -> VecDeque<Candidate> {
        std::mem::take(&mut self.streams[4].read)
    }

    fn best(&self) -> Option<usize> {
        let mut best: Option<(usize, &Candidate)> = None;
        for (index, stream) in self.streams.iter().enumerate() {
            if let Some(head) = stream.read.front()
                && best.is_none_or(|(_, other)| head.goes_before(other))
            {
                best = Some((index, head));
            }
        }
        best.map(|(index, _)| index)
    }

    /// The next candidate and, if it is one of those without a key, how many of these come before anything else, it included, at
    /// most `most`.
    pub fn next(&mut self, most: usize) -> Option<(Candidate, usize)> {
        let best = self.best()?;
        let first = self.streams[best].read.pop_front()?;
        let mut run = 1;
        if first.source == Source::Keyless {
            self.streams[best].fill();
            while run < most
                && let Some(index) = self.best()
                && self.streams[index]
                    .read
                    .front()
                    .is_some_and(|head| head.source == Source::Keyless)
            {
                self.streams[index].read.pop_front();
                self.streams[index].fill();
                run += 1;
            }
        }
        Some((first, run))
    }

    /// The priority that the next candidate has.
    pub fn next_priority(&self) -> Option<i32> {
        let head = self.streams[self.best()?].read.front()?;
        Some(head.priority)
    }
}

/// How many with a key are read, besides those wanted, before the search goes from key to key.
pub const KEYED: usize = 64;

/// What there is to claim. Of what a time has come for up to `depth`, of those with a key not many more than `wanted`.
pub fn search<'jobs>(
    jobs: &'jobs Lookup,
    spi: &Spi,
    queue: &'jobs str,
    tenant: &'jobs str,
    wanted: usize,
    depth: usize,
) -> Found<'jobs> {
    let most_keyed = wanted + KEYED;
    let keyed = depth.min(most_keyed);
    let number = queue::lane(queue, tenant);
    let lane = |number, source, left| {
        Stream::walking(Lane {
            walk: walk_lane(jobs, number),
            queue,
            tenant,
            source,
            below: None,
            left,
        })
    };
    let mut streams: [Stream; STREAMS] = Default::default();
    streams[0] = lane(number, Source::Keyed, most_keyed);
    streams[4] = expired(jobs, queue, tenant, depth.max(1000));
    streams[1] = lane(number + 1, Source::Keyless, usize::MAX);
    // The lanes of what was delayed are only looked at where something is due.
    if is_due(jobs, queue, tenant) {
        streams[2] = Stream::limited(due(spi, queue, tenant, number + 2, keyed), keyed);
        streams[3] = Stream::limited(due(spi, queue, tenant, number + 3, depth), depth);
    }
    Found {
        streams,
        keyed_is_longest: keyed == most_keyed,
    }
}

fn walk_lane<'jobs>(jobs: &'jobs Lookup, number: i64) -> Walk<'jobs> {
    let lane = Key::equal(row::by_order::LANE, number);
    jobs.walk(row::by_order::INDEX, &[lane])
}

/// Whether a time has come for any job.
fn is_due(jobs: &Lookup, queue: &str, tenant: &str) -> bool {
    let keys = [
        Key::equal(row::by_delayed_until::QUEUE, queue),
        Key::equal(row::by_delayed_until::TENANT, tenant),
        Key::at_most(row::by_delayed_until::DELAYED_UNTIL, clock_timestamp()),
    ];
    jobs.walk(row::by_delayed_until::INDEX, &keys)
        .step()
        .is_some()
}

/// Whether any job is ready: at once, or since a time that has come.
pub fn is_ready(jobs: &Lookup, queue: &str, tenant: &str) -> bool {
    let number = queue::lane(queue, tenant);
    let has_lane = |lane| {
        let mut walk = walk_lane(jobs, lane);
        while let Some(row) = walk.step() {
            if is_of(&row, queue, tenant) {
                return true;
            }
        }
        false
    };
    is_due(jobs, queue, tenant) || has_lane(number) || has_lane(number + 1)
}

/// Locks up to `count` jobs without a key that are ready at once, in their order, none of less priority than `least`; their ids. Skips
/// what others have locked or taken, and what was `tried`.
pub fn lock_keyless(
    jobs: &Lookup,
    queue: &str,
    tenant: &str,
    count: usize,
    least: i32,
    tried: &mut HashSet<i64>,
) -> Vec<i64> {
    let mut walk = walk_lane(jobs, queue::lane(queue, tenant) + 1);
    let mut locked = Vec::new();
    while locked.len() < count
        && let Some(row) = walk.step()
        && row
            .get::<i32>(row::PRIORITY)
            .is_some_and(|priority| priority >= least)
    {
        if is_of(&row, queue, tenant)
            && let Some(job_id) = row.get(row::JOB_ID)
            && !tried.contains(&job_id)
            && walk.lock(Strength::Update)
        {
            tried.insert(job_id);
            locked.push(job_id);
        }
    }
    locked
}

/// The claims that have expired, as they would be claimed were they ready.
fn expired<'jobs>(jobs: &Lookup, queue: &str, tenant: &str, most: usize) -> Stream<'jobs> {
    let keys = [
        Key::equal(row::by_claimed_until::QUEUE, queue),
        Key::equal(row::by_claimed_until::TENANT, tenant),
        Key::at_most(row::by_claimed_until::CLAIMED_UNTIL, clock_timestamp()),
    ];
    let mut walk = jobs.walk(row::by_claimed_until::INDEX, &keys);
    let mut found = Vec::new();
    while found.len() < most
        && let Some(row) = walk.step()
    {
        found.extend(Candidate::of(&row, Source::Expired));
    }
    found.sort_by_key(Candidate::rank);
    Stream::limited(found.into(), most)
}

/// The jobs of a lane of which a time has come: those of each priority in the order in which they became due.
fn due(spi: &Spi, queue: &str, tenant: &str, lane: i64, depth: usize) -> VecDeque<Candidate> {
    static DUE: Plan = Plan::new(
        "WITH RECURSIVE p (priority) AS (
             (SELECT j.priority FROM lockstep.jobs AS j
              WHERE j.lane = $3 AND j.queue = $1 AND j.tenant = $2
              ORDER BY j.priority DESC LIMIT 1)
             UNION ALL
             SELECT (SELECT j.priority FROM lockstep.jobs AS j
                     WHERE j.lane = $3 AND j.queue = $1 AND j.tenant = $2 AND j.priority < p.priority
                     ORDER BY j.priority DESC LIMIT 1)
             FROM p WHERE p.priority IS NOT NULL
         )
         SELECT d.*
         FROM p
         CROSS JOIN LATERAL (
             SELECT j.job_id, j.key, j.priority, j.run_at, j.retry_id > 0, 2, j.kind
             FROM lockstep.jobs AS j
             WHERE j.lane = $3 AND j.queue = $1 AND j.tenant = $2 AND j.priority = p.priority
                 AND j.delayed_until <= (SELECT pg_catalog.clock_timestamp())
             ORDER BY j.delayed_until, j.job_id LIMIT $4
         ) AS d
         LIMIT $4",
    );
    let args = [
        Arg::from(queue),
        Arg::from(tenant),
        Arg::from(lane),
        Arg::from(depth as i64),
    ];
    let rows = spi.read(&DUE, At::Latest, &args);
    (0..rows.count())
        .filter_map(|row| Candidate::read(&rows, row, Source::Due))
        .collect()
}

thread_local! {
    /// By queue and tenant: the last key that this session looked at, where there were more than it looks at together.
    static LAST_KEY: RefCell<HashMap<(String, String), String>> = RefCell::new(HashMap::new());
}

/// A walk from key to key, from the highest priority to the lowest; of each, in a circle that begins after the key at which the last
/// such walk of this session ended, so that no key waits for ever behind others of its priority.
pub struct KeyWalk<'a> {
    queue: &'a str,
    tenant: &'a str,
    begin: String,
    at: Step,
    over: bool,
}

/// A key of a priority. `wrapped`: in the second part of the circle.
struct Step {
    priority: i64,
    wrapped: bool,
    key: String,
}

/// How many keys are looked at together.
const KEYS: i32 = 256;

impl<'a> KeyWalk<'a> {
    pub fn new(queue: &'a str, tenant: &'a str) -> Self {
        let name = (queue.to_owned(), tenant.to_owned());
        let begin = LAST_KEY.with_borrow(|keys| keys.get(&name).cloned());
        KeyWalk {
            queue,
            tenant,
            begin: begin.unwrap_or_default(),
            at: Step {
                priority: i64::from(i32::MAX) + 1,
                wrapped: true,
                key: String::new(),
            },
            over: false,
        }
    }

    /// The first job of each of the next keys where nothing is in progress or something expired, the best first; None at the end.
    pub fn next(&mut self, spi: &Spi) -> Option<Vec<Candidate>> {
        // From one step to the next: a later key of the priority, the circle's second part, the next priority, though all of its jobs
        // be without a key. BETWEEN, and not =, or the order would be one that the primary key has too.
        static WALK: Plan = Plan::new(
            "WITH RECURSIVE k (priority, wrapped, key, n) AS (
                 SELECT $4, $5, $6, 0
                 UNION ALL
                 SELECT s.*, k.n + 1
                 FROM k
                 CROSS JOIN LATERAL (
                     (SELECT k.priority, false, j.key FROM lockstep.jobs AS j
                      WHERE j.queue = $1 AND j.tenant = $2 AND j.token IS NULL AND j.priority = k.priority AND NOT k.wrapped
                          AND j.key > k.key
                      ORDER BY j.key LIMIT 1)
                     UNION ALL
                     (SELECT k.priority, true, j.key FROM lockstep.jobs AS j
                      WHERE j.queue = $1 AND j.tenant = $2 AND j.token IS NULL AND j.priority = k.priority AND NOT k.wrapped
                          AND j.key <= $3
                      ORDER BY j.key LIMIT 1)
                     UNION ALL
                     (SELECT k.priority, true, j.key FROM lockstep.jobs AS j
                      WHERE j.queue = $1 AND j.tenant = $2 AND j.token IS NULL AND j.priority = k.priority AND k.wrapped
                          AND j.key > k.key AND j.key <= $3
                      ORDER BY j.key LIMIT 1)
                     UNION ALL
                     (SELECT p.priority, f.*
                      FROM (SELECT j.priority::bigint FROM lockstep.jobs AS j
                            WHERE j.queue = $1 AND j.tenant = $2 AND j.token IS NULL AND j.priority < k.priority
                            ORDER BY j.priority DESC LIMIT 1) AS p
                      CROSS JOIN LATERAL (
                          (SELECT false, j.key FROM lockstep.jobs AS j
                           WHERE j.queue = $1 AND j.tenant = $2 AND j.token IS NULL AND j.priority = p.priority AND j.key > $3
                           ORDER BY j.key LIMIT 1)
                          UNION ALL
                          (SELECT true, j.key FROM lockstep.jobs AS j
                           WHERE j.queue = $1 AND j.tenant = $2 AND j.token IS NULL AND j.priority = p.priority AND j.key <= $3
                           ORDER BY j.key LIMIT 1)
                          UNION ALL
                          SELECT true, NULL
                          LIMIT 1) AS f)
                     LIMIT 1) AS s (priority, wrapped, key)
                 WHERE k.n < $7
             )
             SELECT f.job_id, k.key, f.priority, f.run_at, f.failed, 0, f.kind, k.priority, k.wrapped
             FROM k
             LEFT JOIN LATERAL (
                 SELECT j.job_id, j.priority, j.run_at,
                        j.retry_id > 0 AS failed, j.kind
                 FROM lockstep.jobs AS j
                 WHERE j.queue = $1 AND j.tenant = $2 AND j.token IS NULL AND j.priority = k.priority
                     AND j.key BETWEEN k.key AND k.key AND j.delayed_until <= (SELECT pg_catalog.clock_timestamp())
                     AND COALESCE((SELECT b.claimed_until <= pg_catalog.clock_timestamp() FROM lockstep.jobs AS b
                                   WHERE b.queue = $1 AND b.tenant = $2 AND b.key = k.key AND b.key IS NOT NULL
                                       AND b.state = 'in_progress'), true)
                 ORDER BY j.key, j.job_id LIMIT 1
             ) AS f ON true
             WHERE k.n > 0",
        );
        if self.over {
            return None;
        }
        let args = [
            Arg::from(self.queue),
            Arg::from(self.tenant),
            Arg::from(self.begin.as_str()),
            Arg::from(self.at.priority),
            Arg::from(self.at.wrapped),
            Arg::from(self.at.key.as_str()),
            Arg::from(KEYS),
        ];
        let rows = spi.read(&WALK, At::Latest, &args);
        let mut candidates: Vec<Candidate> = (0..rows.count())
            .filter_map(|row| Candidate::read(&rows, row, Source::Keyed))
            .collect();
        candidates.sort_by_key(Candidate::rank);
        self.over = rows.count() < KEYS as usize;
        if !self.over {
            let last = rows.count() - 1;
            self.at = Step {
                priority: rows.get(last, 8)?,
                wrapped: rows.get(last, 9)?,
                key: rows.get(last, 2).unwrap_or_default(),
            };
        }
        self.remember();
        Some(candidates)
    }

    fn remember(&self) {
        const QUEUES: usize = 1000;
        LAST_KEY.with_borrow_mut(|keys| {
            if keys.len() >= QUEUES {
                keys.clear();
            }
            let name = (self.queue.to_owned(), self.tenant.to_owned());
            if self.over {
                keys.remove(&name);
            } else {
                keys.insert(name, self.at.key.clone());
            }
        });
    }
}

/// Microseconds until time alone can make a job claimable: the next that becomes due, the next claim that expires. `tenant` None: of
/// any.
pub fn next_time(spi: &Spi, queue: &str, tenant: Option<&str>) -> Option<i64> {
    static NEXT: Plan = Plan::new(
        "SELECT (EXTRACT(epoch FROM LEAST(
             (SELECT j.delayed_until FROM lockstep.jobs AS j
              WHERE j.queue = $1 AND j.tenant = $2 AND j.delayed_until > 'epoch'
                  AND j.delayed_until > (SELECT pg_catalog.clock_timestamp())
              ORDER BY j.delayed_until LIMIT 1),
             (SELECT j.claimed_until FROM lockstep.jobs AS j
              WHERE j.queue = $1 AND j.tenant = $2 AND j.claimed_until > (SELECT pg_catalog.clock_timestamp())
              ORDER BY j.claimed_until LIMIT 1)) - pg_catalog.clock_timestamp()) * 1000000)::bigint",
    );
    static NEXT_OF_ANY: Plan = Plan::new(
        "WITH RECURSIVE t (tenant) AS (
             (SELECT j.tenant FROM lockstep.jobs AS j
              WHERE j.queue = $1 AND j.delayed_until > 'epoch'
              ORDER BY j.tenant LIMIT 1)
             UNION ALL
             SELECT (SELECT j.tenant FROM lockstep.jobs AS j
                     WHERE j.queue = $1 AND j.delayed_until > 'epoch' AND j.tenant > t.tenant
                     ORDER BY j.tenant LIMIT 1)
             FROM t WHERE t.tenant IS NOT NULL
         )
         SELECT (EXTRACT(epoch FROM LEAST(
             (SELECT pg_catalog.min(d.delayed_until)
              FROM t
              CROSS JOIN LATERAL (SELECT j.delayed_until FROM lockstep.jobs AS j
                                  WHERE j.queue = $1 AND j.tenant = t.tenant AND j.delayed_until > 'epoch'
                                      AND j.delayed_until > (SELECT pg_catalog.clock_timestamp())
                                  ORDER BY j.delayed_until LIMIT 1) AS d),
             (SELECT pg_catalog.min(j.claimed_until) FROM lockstep.jobs AS j
              WHERE j.queue = $1 AND j.claimed_until > (SELECT pg_catalog.clock_timestamp())))
             - pg_catalog.clock_timestamp()) * 1000000)::bigint",
    );
    let rows = match tenant {
        Some(tenant) => spi.read(&NEXT, At::Latest, &[Arg::from(queue), Arg::from(tenant)]),
        None => spi.read(&NEXT_OF_ANY, At::Latest, &[Arg::from(queue)]),
    };
    rows.get(0, 1)
}
