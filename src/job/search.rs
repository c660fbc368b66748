//! Which jobs a claim tries, and in which order. A search only reads: what it finds may be another's by now.
//!
//! Five streams, each the walk of an index, are merged: jobs with a key and jobs without one, ready at once or when a time has
//! come, and expired claims. They are kept apart so that none has to read through another's rows: the clock's through those that are
//! not due, those without a key through the backlog of a busy one.
//!
//! A key with a long backlog fills the stream of those with a key. Past [`KEYED`] of them, [`KeyWalk`] asks the index of keys
//! for one key after the other, priority by priority, and the first job of each: busy or not, a key costs one look.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};

use super::queue;
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
            run_at: rows.get(row, 4)?,
            failed: rows.get(row, 5)?,
            kind: rows.get(row, 7).unwrap_or_default(),
        })
    }

    /// Among jobs that were ready at once, ids tell age and the clock has no say.
    fn goes_before(&self, other: &Candidate) -> bool {
        let at_once = |source| matches!(source, Source::Keyed | Source::Keyless);
        if self.priority != other.priority {
            self.priority > other.priority
        } else if at_once(self.source) && at_once(other.source) {
            self.job_id < other.job_id
        } else {
            (self.run_at, self.job_id) < (other.run_at, other.job_id)
        }
    }
}

/// The streams, of which the best head goes first.
pub struct Found {
    streams: Vec<VecDeque<Candidate>>,
    /// Of which streams there is more than was read.
    cut: [bool; STREAMS],
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

impl Found {
    /// A stream that was cut and has run dry may have gone on with a job that is before all others.
    pub fn missing(&self) -> Missing {
        let is_dry = |stream: usize| self.cut[stream] && self.streams[stream].is_empty();
        if is_dry(1) || is_dry(3) || is_dry(4) {
            Missing::Depth
        } else if !is_dry(0) && !is_dry(2) {
            Missing::Nothing
        } else if self.keyed_is_longest {
            Missing::Keys
        } else {
            Missing::Depth
        }
    }

    /// Puts a page of a walk from key to key in the place of the jobs with a key; None: it is over.
    pub fn put_keys(&mut self, page: Option<Vec<Candidate>>) {
        self.cut[0] = page.is_some();
        self.cut[2] = false;
        self.keyed_is_longest = true;
        self.streams[0] = page.unwrap_or_default().into();
        self.streams[2].clear();
    }

    /// None of those with a key is wanted.
    pub fn drop_keyed(&mut self) {
        for stream in [0, 2] {
            self.streams[stream].clear();
            self.cut[stream] = false;
        }
    }

    /// None of those without a key that were ready at once is wanted, down to that priority.
    pub fn drop_keyless(&mut self, least: i32) {
        self.streams[1].retain(|candidate| candidate.priority < least);
    }

    pub fn take_expired(&mut self) -> VecDeque<Candidate> {
        std::mem::take(&mut self.streams[4])
    }

    fn best(&self) -> Option<usize> {
        let mut best: Option<(usize, &Candidate)> = None;
        for (index, stream) in self.streams.iter().enumerate() {
            if let Some(head) = stream.front()
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
        let first = self.streams[best].pop_front()?;
        let mut run = 1;
        if first.source == Source::Keyless {
            while run < most
                && let Some(index) = self.best()
                && self.streams[index]
                    .front()
                    .is_some_and(|head| head.source == Source::Keyless)
            {
                self.streams[index].pop_front();
                run += 1;
            }
        }
        Some((first, run))
    }

    /// The priority that the next candidate has.
    pub fn next_priority(&self) -> Option<i32> {
        let head = self.streams[self.best()?].front()?;
        Some(head.priority)
    }
}

/// How many with a key are read, besides those wanted, before the search goes from key to key.
pub const KEYED: usize = 64;
/// Up to `depth` of each stream, of those with a key not many more than `wanted`.
pub fn search(spi: &Spi, queue: &str, tenant: &str, wanted: usize, depth: usize) -> Found {
    // The last only tells whether anything is due.
    static SEARCH: Plan = Plan::new(
        "(SELECT j.job_id, j.key, j.priority, (EXTRACT(epoch FROM j.run_at)::float8 * 1000000)::bigint, j.retry_id > 0, 0, j.kind
          FROM lockstep.jobs AS j
          WHERE j.lane = $6 AND j.queue = $1 AND j.tenant = $2
          ORDER BY j.priority DESC, j.delayed_until, j.job_id LIMIT $3)
         UNION ALL
         (SELECT j.job_id, NULL, j.priority, (EXTRACT(epoch FROM j.run_at)::float8 * 1000000)::bigint, false, 1, NULL
          FROM lockstep.jobs AS j
          WHERE j.lane = $6 + 1 AND j.queue = $1 AND j.tenant = $2
          ORDER BY j.priority DESC, j.delayed_until, j.job_id LIMIT $4)
         UNION ALL
         (SELECT j.job_id, j.key, j.priority, (EXTRACT(epoch FROM j.run_at)::float8 * 1000000)::bigint, false, 4, j.kind
          FROM lockstep.jobs AS j
          WHERE j.queue = $1 AND j.tenant = $2 AND j.claimed_until <= (SELECT pg_catalog.clock_timestamp())
          ORDER BY j.claimed_until LIMIT $5)
         UNION ALL
         (SELECT 0, NULL, 0, 0, false, 2, NULL
          FROM lockstep.jobs AS j
          WHERE j.queue = $1 AND j.tenant = $2 AND j.delayed_until > 'epoch'
              AND j.delayed_until <= (SELECT pg_catalog.clock_timestamp())
          LIMIT 1)",
    );
    let most_keyed = wanted + KEYED;
    let keyed = depth.min(most_keyed);
    let lane = queue::lane(queue, tenant);
    let expired = depth.max(1000);
    let args = [
        Arg::from(queue),
        Arg::from(tenant),
        Arg::from(keyed as i64),
        Arg::from(depth as i64),
        Arg::from(expired as i64),
        Arg::from(lane),
    ];
    let rows = spi.read(&SEARCH, At::Latest, &args);
    let mut streams = vec![VecDeque::new(); STREAMS];
    let mut some_are_due = false;
    for row in 0..rows.count() {
        let stream: i32 = rows.get(row, 6).unwrap_or_default();
        let source = match stream {
            0 => Source::Keyed,
            1 => Source::Keyless,
            4 => Source::Expired,
            _ => {
                some_are_due = true;
                continue;
            }
        };
        if let Some(candidate) = Candidate::read(&rows, row, source) {
            streams[stream as usize].push_back(candidate);
        }
    }
    if some_are_due {
        streams[2] = due(spi, queue, tenant, lane + 2, keyed);
        streams[3] = due(spi, queue, tenant, lane + 3, depth);
    }
    streams[4].make_contiguous().sort_by_key(|candidate| {
        (
            std::cmp::Reverse(candidate.priority),
            candidate.run_at,
            candidate.job_id,
        )
    });
    let is_full = |stream: usize, limit| streams[stream].len() == limit;
    Found {
        cut: [
            is_full(0, keyed),
            is_full(1, depth),
            is_full(2, keyed),
            is_full(3, depth),
            is_full(4, expired),
        ],
        keyed_is_longest: keyed == most_keyed,
        streams,
    }
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
             SELECT j.job_id, j.key, j.priority, (EXTRACT(epoch FROM j.run_at)::float8 * 1000000)::bigint, j.retry_id > 0, 2, j.kind
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
                 SELECT j.job_id, j.priority, (EXTRACT(epoch FROM j.run_at)::float8 * 1000000)::bigint AS run_at,
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
        candidates.sort_by_key(|c| (std::cmp::Reverse(c.priority), c.run_at, c.job_id));
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
