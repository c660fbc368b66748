//! Claiming jobs: the steps are in `job.rs`, the search in `search.rs`.

use pgrx::datum::Interval;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use super::attempt;
use super::queue::{self, Place, Places};
use super::search::{self, Candidate, Found, KEYED, KeyWalk, Missing, Source};
use crate::lock::{Mode, Tag};
use crate::process;
use crate::snapshot::{self, At};
use crate::spi::{Arg, Jobs, Plan, Spi};

pub struct Request<'a> {
    pub queue: &'a str,
    pub holder: &'a str,
    pub max_jobs: usize,
    pub ttl: Interval,
    /// None: any.
    pub tenant: Option<&'a str>,
}

/// Each key claimed and each place taken is a lock until the transaction ends, and the lock table is of the whole server.
const MOST_KEYS: usize = 1000;
const MOST_PLACES: usize = 1000;
/// How many candidates more than jobs are asked for: others may have them.
const SPARE: usize = 8;

pub fn claim(request: &Request) -> Jobs {
    let mut claim = Claim {
        request,
        jobs: Jobs::none(),
        keys: 0,
        places: 0,
    };
    match request.tenant {
        Some(tenant) => {
            claim.take(tenant, request.max_jobs);
        }
        None => claim.take_in_turns(),
    }
    if claim.jobs.count() > 0 {
        // A crash must not hand out their tokens again.
        snapshot::force_synchronous_commit();
    }
    claim.jobs
}

struct Claim<'a> {
    request: &'a Request<'a>,
    jobs: Jobs,
    /// How many keys were locked for the jobs.
    keys: usize,
    /// How many places were taken for them.
    places: usize,
}

/// The claims in one tenant.
struct InTenant<'a> {
    tenant: &'a str,
    /// Of its jobs with a key that are ready at once.
    lane: i64,
    limit: Option<i32>,
    /// Keys of which no job can be claimed now.
    busy: HashSet<String>,
    tried: HashSet<i64>,
    /// The places to try, once they have been read.
    places: Option<Places>,
    /// A place that was taken and that no job has yet.
    place: Option<Place>,
    full: bool,
}

macro_rules! claim_rows {
    ($rows:literal) => {
        concat!(
            "UPDATE lockstep.jobs AS j
             SET state = 'in_progress', attempts = j.attempts + 1, attempts_left = j.attempts_left - 1,
                 token = pg_catalog.nextval('lockstep.token'), holder = $1, claimed_at = pg_catalog.clock_timestamp(),
                 claimed_until = pg_catalog.clock_timestamp() + $2, slot = $3, delayed_until = 'epoch', lane = NULL
             FROM (", $rows, ") AS c
             WHERE j.job_id = c.job_id
             RETURNING j.*"
        )
    };
}

impl Claim<'_> {
    /// Claims up to `wanted` jobs of the tenant.
    fn take(&mut self, tenant: &str, wanted: usize) -> usize {
        let settings = queue::settings(self.jobs.spi(), self.request.queue, tenant);
        if settings.paused {
            return 0;
        }
        let mut at = InTenant {
            tenant,
            lane: queue::lane(self.request.queue, tenant),
            limit: settings.max_in_progress,
            busy: HashSet::new(),
            tried: HashSet::new(),
            places: None,
            place: None,
            full: false,
        };
        let before = self.jobs.count();
        self.search(&mut at, before + wanted);
        if let Some(place) = at.place {
            place.release();
        }
        let claimed = self.jobs.count() - before;
        if claimed > 0 {
            queue::announce_if_rolled_back(self.request.queue, tenant);
        }
        claimed
    }

    /// Until there are `until` jobs in all, or nothing more to try.
    fn search(&mut self, at: &mut InTenant, until: usize) {
        while self.try_in_order(at, until) {
            at.tried.clear();
        }
    }

    /// True: a place has come free, and jobs that were passed over for want of one are to be tried again.
    fn try_in_order(&mut self, at: &mut InTenant, until: usize) -> bool {
        let queue = self.request.queue;
        let wanted = until - self.jobs.count();
        let mut depth = wanted + SPARE;
        let mut walk: Option<KeyWalk> = None;
        loop {
            let mut found = search::search(self.jobs.spi(), queue, at.tenant, wanted, depth);
            if walk.is_some() {
                found.put_keys(Some(Vec::new()));
            }
            loop {
                if self.jobs.count() >= until {
                    return false;
                }
                if at.full {
                    self.take_expired(at, &mut found, until);
                    return !at.full;
                }
                if self.keys >= MOST_KEYS {
                    found.drop_keyed();
                }
                match found.missing() {
                    Missing::Nothing => {}
                    Missing::Depth => break,
                    Missing::Keys => {
                        let walk = walk.get_or_insert_with(|| KeyWalk::new(queue, at.tenant));
                        found.put_keys(walk.next(self.jobs.spi()));
                        continue;
                    }
                }
                let most = match at.limit {
                    Some(_) => 1,
                    None => until - self.jobs.count(),
                };
                let Some((candidate, run)) = found.next(most) else {
                    return false;
                };
                if candidate.source == Source::Keyless {
                    let least = found.next_priority().unwrap_or(i32::MIN);
                    let least = least.min(candidate.priority);
                    if self.take_keyless(at, run, least) < run {
                        found.drop_keyless(least);
                    }
                } else if at.tried.insert(candidate.job_id) {
                    self.take_one(at, &candidate);
                }
            }
            depth = (depth * 8).max(wanted + KEYED);
        }
    }

    /// What has expired has its place in the queue already.
    fn take_expired(&mut self, at: &mut InTenant, found: &mut Found, until: usize) {
        for candidate in found.take_expired() {
            if self.jobs.count() >= until {
                return;
            }
            if at.tried.insert(candidate.job_id) {
                self.take_one(at, &candidate);
            }
        }
    }

    /// Tries one job; true if it, or the twin that it was merged into, was claimed.
    fn take_one(&mut self, at: &mut InTenant, candidate: &Candidate) -> bool {
        let Some(key) = &candidate.key else {
            return match candidate.source {
                Source::Expired => self.take_over(at, candidate),
                _ => self.claim_one(at, candidate.job_id, None, None),
            };
        };
        if at.busy.contains(key) {
            return false;
        }
        let lock = Tag::job_key(self.request.queue, at.tenant, key);
        if self.keys >= MOST_KEYS || !lock.try_acquire(Mode::Exclusive) {
            at.busy.insert(key.clone());
            return false;
        }
        let claimed = match candidate.source {
            Source::Expired => self.take_over(at, candidate),
            _ => self.take_of_key(at, candidate, key),
        };
        if claimed {
            at.busy.insert(key.clone());
            self.keys += 1;
        } else {
            // Or this transaction would keep others from a key of which it has nothing.
            lock.release(Mode::Exclusive);
        }
        claimed
    }

    /// With JOB_KEY held.
    fn take_of_key(&mut self, at: &mut InTenant, candidate: &Candidate, key: &str) -> bool {
        let kind = Some(candidate.kind.as_str());
        if !candidate.failed && self.claim_one(at, candidate.job_id, Some(key), kind) {
            return true;
        }
        if at.full {
            return false;
        }
        let spi = self.jobs.spi();
        if let Some(job_id) = in_progress(spi, self.request.queue, at.tenant, key) {
            let Some(expired) = attempt::lock_expired(spi, job_id) else {
                at.busy.insert(key.to_owned());
                return false;
            };
            expired.settle(spi, at.lane);
            at.place_came_free();
        }
        let failed = if candidate.failed {
            Some(candidate.job_id)
        } else {
            failed_twin(spi, self.request.queue, at.tenant, key, &candidate.kind)
        };
        let merged = failed
            .filter(|job_id| lock_ready(spi, *job_id))
            .and_then(|job_id| attempt::merge(spi, job_id, None));
        self.claim_one(at, merged.unwrap_or(candidate.job_id), Some(key), None)
    }

    /// Takes an expired claim over: with JOB_KEY held, if it has a key.
    fn take_over(&mut self, at: &mut InTenant, candidate: &Candidate) -> bool {
        static TAKE_OVER: Plan = Plan::new(
            "UPDATE lockstep.jobs
             SET attempts = attempts + 1, attempts_left = attempts_left - 1, token = pg_catalog.nextval('lockstep.token'),
                 holder = $2, claimed_at = pg_catalog.clock_timestamp(),
                 claimed_until = pg_catalog.clock_timestamp() + $3, previous_holder = holder, last_error = $4,
                 last_failed_at = pg_catalog.clock_timestamp()
             WHERE job_id = $1
             RETURNING *",
        );
        let spi = self.jobs.spi();
        let Some(expired) = attempt::lock_expired(spi, candidate.job_id) else {
            return false;
        };
        if expired.spent {
            expired.settle(spi, at.lane);
            at.place_came_free();
            return false;
        }
        if candidate.key.is_some()
            && let Some(twin) = attempt::merge(spi, candidate.job_id, Some(&expired.error))
        {
            at.place_came_free();
            return self.claim_one(at, twin, candidate.key.as_deref(), None);
        }
        let args = [
            Arg::from(candidate.job_id),
            Arg::from(self.request.holder),
            Arg::from(self.request.ttl),
            Arg::from(expired.error.as_str()),
        ];
        !self.jobs.write(&TAKE_OVER, &args).is_empty()
    }

    /// Claims a ready job, unless somebody has locked it, something of its key is in progress or, where the kind is given, a twin
    /// has failed that is to be merged into it. Of a job with a key the caller holds JOB_KEY.
    fn claim_one(
        &mut self,
        at: &mut InTenant,
        job_id: i64,
        key: Option<&str>,
        kind: Option<&str>,
    ) -> bool {
        static CLAIM: Plan = Plan::new(claim_rows!(
            "SELECT r.job_id FROM lockstep.jobs AS r
             WHERE r.job_id = $4 AND COALESCE(r.token, 0) = 0
                 AND r.delayed_until <= (SELECT pg_catalog.clock_timestamp())
                 AND NOT EXISTS (SELECT FROM lockstep.jobs AS b
                                 WHERE b.queue = $5 AND b.tenant = $6 AND b.key = $7 AND b.state = 'in_progress')
                 AND NOT EXISTS (SELECT FROM lockstep.jobs AS t
                                 WHERE t.queue = $5 AND t.tenant = $6 AND t.key = $7 AND t.kind = $8 AND t.state = 'ready'
                                     AND t.retry_id > 0)
             FOR UPDATE OF r SKIP LOCKED"
        ));
        let Some(slot) = self.place(at) else {
            return false;
        };
        let args = [
            Arg::from(self.request.holder),
            Arg::from(self.request.ttl),
            Arg::from(slot),
            Arg::from(job_id),
            Arg::from(self.request.queue),
            Arg::from(at.tenant),
            Arg::from(key),
            Arg::from(kind),
        ];
        let claimed = !self.jobs.write(&CLAIM, &args).is_empty();
        if claimed {
            self.use_place(at);
        }
        claimed
    }

    /// Claims up to `count` of the jobs without a key, in their order, none of less priority than `least`; how many. Fewer: others
    /// have locked the rest of them, or the queue is full.
    fn take_keyless(&mut self, at: &mut InTenant, count: usize, least: i32) -> usize {
        static CLAIM: Plan = Plan::new(claim_rows!(
            "SELECT r.job_id FROM lockstep.jobs AS r
             WHERE r.lane = $8 AND r.queue = $4 AND r.tenant = $5 AND r.priority >= $7
             ORDER BY r.priority DESC, r.delayed_until, r.job_id LIMIT $6
             FOR UPDATE OF r SKIP LOCKED"
        ));
        let Some(slot) = self.place(at) else {
            return 0;
        };
        let args = [
            Arg::from(self.request.holder),
            Arg::from(self.request.ttl),
            Arg::from(slot),
            Arg::from(self.request.queue),
            Arg::from(at.tenant),
            Arg::from(count as i64),
            Arg::from(least),
            Arg::from(at.lane + 1),
        ];
        let claimed = self.jobs.write(&CLAIM, &args).len();
        if claimed > 0 {
            self.use_place(at);
        }
        claimed
    }

    /// None: the queue is full. Some(None): it has no limit.
    fn place(&self, at: &mut InTenant) -> Option<Option<i32>> {
        let Some(limit) = at.limit else {
            return Some(None);
        };
        if at.place.is_none() && !at.full && self.places < MOST_PLACES {
            let (spi, queue) = (self.jobs.spi(), self.request.queue);
            at.place = at
                .places
                .get_or_insert_with(|| Places::read(spi, queue, at.tenant, limit))
                .take(spi, queue, at.tenant);
        }
        at.full = at.place.is_none();
        at.place.as_ref().map(|place| Some(place.number))
    }

    /// The place that was taken has its job.
    fn use_place(&mut self, at: &mut InTenant) {
        self.places += usize::from(at.place.take().is_some());
    }

    /// The tenants in a circle, a share of each at a time, until there are enough jobs or a round gave none.
    fn take_in_turns(&mut self) {
        let queue = self.request.queue;
        let mut at = last_tenant(self.jobs.spi(), queue);
        let (mut claimed_in_round, mut rounds) = (false, 0);
        while self.jobs.count() < self.request.max_jobs {
            let next = match &at {
                Some(tenant) => queue::next_tenant(self.jobs.spi(), queue, tenant),
                None => queue::first_tenant(self.jobs.spi(), queue),
            };
            let Some(tenant) = next else {
                // The first round may have begun in the middle.
                if at.is_none() || (rounds > 0 && !claimed_in_round) {
                    break;
                }
                rounds += 1;
                claimed_in_round = false;
                at = None;
                continue;
            };
            let left = self.request.max_jobs - self.jobs.count();
            claimed_in_round |= self.take(&tenant, 1 + left / 16) > 0;
            at = Some(tenant);
        }
        remember_tenant(queue, at);
    }
}

impl InTenant<'_> {
    /// A job of this tenant that was in progress is not any more.
    fn place_came_free(&mut self) {
        self.full = false;
        self.places = None;
    }
}

fn in_progress(spi: &Spi, queue: &str, tenant: &str, key: &str) -> Option<i64> {
    static READ: Plan = Plan::new(
        "SELECT job_id FROM lockstep.jobs
         WHERE queue = $1 AND tenant = $2 AND key = $3 AND key IS NOT NULL AND state = 'in_progress'",
    );
    let args = [Arg::from(queue), Arg::from(tenant), Arg::from(key)];
    spi.read(&READ, At::Latest, &args).get(0, 1)
}

/// A job of the key and kind that has failed and is ready.
fn failed_twin(spi: &Spi, queue: &str, tenant: &str, key: &str, kind: &str) -> Option<i64> {
    static READ: Plan = Plan::new(
        "SELECT job_id FROM lockstep.jobs
         WHERE queue = $1 AND tenant = $2 AND key = $3 AND key IS NOT NULL AND kind = $4 AND state = 'ready' AND retry_id > 0
         ORDER BY retry_id LIMIT 1",
    );
    let args = [
        Arg::from(queue),
        Arg::from(tenant),
        Arg::from(key),
        Arg::from(kind),
    ];
    spi.read(&READ, At::Latest, &args).get(0, 1)
}

fn lock_ready(spi: &Spi, job_id: i64) -> bool {
    static LOCK: Plan = Plan::new(
        "SELECT FROM lockstep.jobs WHERE job_id = $1 AND COALESCE(token, 0) = 0 FOR UPDATE SKIP LOCKED",
    );
    spi.write_latest(&LOCK, &[Arg::from(job_id)]).count() > 0
}

thread_local! {
    /// By queue: the tenant that this session's last claim in turns ended with.
    static LAST_TENANT: RefCell<HashMap<String, Option<String>>> = RefCell::new(HashMap::new());
}

/// After whom to begin. A new session begins anywhere among the first ones, or those would be served by every new session.
fn last_tenant(spi: &Spi, queue: &str) -> Option<String> {
    const FIRST_ONES: usize = 64;
    if let Some(last) = LAST_TENANT.with_borrow(|last| last.get(queue).cloned()) {
        return last;
    }
    let mut tenants: Vec<Option<String>> = vec![None];
    let mut next = queue::first_tenant(spi, queue);
    while let Some(tenant) = next
        && tenants.len() < FIRST_ONES
    {
        next = queue::next_tenant(spi, queue, &tenant);
        tenants.push(Some(tenant));
    }
    let random =
        process::now().unsigned_abs() as usize / 7 + process::pid().unsigned_abs() as usize;
    tenants.swap_remove(random % tenants.len())
}

fn remember_tenant(queue: &str, tenant: Option<String>) {
    const QUEUES: usize = 1000;
    LAST_TENANT.with_borrow_mut(|last| {
        if last.len() >= QUEUES {
            last.clear();
        }
        last.insert(queue.to_owned(), tenant);
    });
}
