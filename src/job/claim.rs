//! Claiming jobs: the steps are in `job.rs`, the search in `search.rs`.

use pgrx::datum::{Interval, IntoDatum, clock_timestamp};
use std::collections::HashSet;

use super::attempt;
use super::queue::{self, Place, Places};
use super::row;
use super::search::{self, Candidate, Found, KEYED, KeyWalk, Missing, Source};
use super::turn;
use crate::lock::{Mode, Tag};
use crate::lookup::{Lookup, Strength};
use crate::sequence;
use crate::snapshot::{self, At};
use crate::spi::{Arg, Jobs, Plan};
use crate::write::Updater;

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
        locked: Vec::new(),
        order: Vec::new(),
        keys: 0,
        places: 0,
    };
    match request.tenant {
        Some(tenant) => {
            claim.take(tenant, request.max_jobs);
        }
        None => claim.take_in_turns(),
    }
    claim.jobs.sort_by_ids(&claim.order);
    if claim.jobs.count() > 0 {
        // A crash must not hand out their tokens again.
        snapshot::force_synchronous_commit();
    }
    claim.jobs
}

struct Claim<'a> {
    request: &'a Request<'a>,
    jobs: Jobs,
    /// Ready jobs that this transaction has locked and will claim together.
    locked: Vec<i64>,
    /// The ids of all, in the order in which they were taken.
    order: Vec<i64>,
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

impl Claim<'_> {
    /// Claims up to `wanted` jobs of the tenant.
    fn take(&mut self, tenant: &str, wanted: usize) -> usize {
        let settings = queue::settings(self.request.queue, tenant);
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
        let before = self.order.len();
        self.search(&mut at, before + wanted);
        self.claim_locked(None);
        if let Some(place) = at.place {
            place.release();
        }
        let claimed = self.order.len() - before;
        if claimed > 0 {
            queue::announce_if_rolled_back(self.request.queue, tenant);
        }
        claimed
    }

    /// Until there are `until` jobs in all, or nothing more to try.
    fn search(&mut self, at: &mut InTenant, until: usize) {
        while self.try_in_order(at, until) {
            // Only where there is a limit, and then what was taken is claimed already.
            at.tried.clear();
        }
    }

    /// True: a place has come free, and jobs that were passed over for want of one are to be tried again.
    fn try_in_order(&mut self, at: &mut InTenant, until: usize) -> bool {
        let queue = self.request.queue;
        let wanted = until - self.order.len();
        let mut depth = wanted + SPARE;
        let mut walk: Option<KeyWalk> = None;
        loop {
            // What was locked up to now is not to be found again.
            self.claim_locked(None);
            let jobs = Lookup::of(row::TABLE, At::Latest);
            let mut found = search::search(&jobs, self.jobs.spi(), queue, at.tenant, wanted, depth);
            if walk.is_some() {
                found.put_keys(Some(Vec::new()));
            }
            loop {
                if self.order.len() >= until {
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
                    None => until - self.order.len(),
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
            if self.order.len() >= until {
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
                _ => self.claim_one(at, candidate.job_id),
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
        if self.place(at).is_none() {
            return false;
        }
        let (queue, spi) = (self.request.queue, self.jobs.spi());
        let failed_twin = |jobs: &Lookup| match candidate.failed {
            true => Some(candidate.job_id),
            false => row::failed_twin(jobs, queue, at.tenant, key, &candidate.kind),
        };
        let jobs = Lookup::to_lock(row::TABLE);
        let in_progress = row::in_progress(&jobs, queue, at.tenant, key);
        if in_progress.is_none() && failed_twin(&jobs).is_none() {
            return self.lock_one(at, &jobs, candidate.job_id);
        }
        drop(jobs);
        if let Some(job_id) = in_progress {
            let Some(expired) = attempt::lock_expired(job_id) else {
                at.busy.insert(key.to_owned());
                return false;
            };
            expired.settle(spi, at.lane);
            at.place_came_free();
        }
        // What has expired may have become a failed twin just now.
        let merged = failed_twin(&Lookup::of(row::TABLE, At::Latest))
            .filter(|job_id| {
                let jobs = Lookup::to_lock(row::TABLE);
                row::lock(&jobs, *job_id, Strength::Update, row::if_ready).is_some()
            })
            .and_then(|job_id| attempt::merge(spi, job_id, None));
        self.claim_one(at, merged.unwrap_or(candidate.job_id))
    }

    /// Takes an expired claim over: with JOB_KEY held, if it has a key.
    fn take_over(&mut self, at: &mut InTenant, candidate: &Candidate) -> bool {
        static TAKE_OVER: Plan = Plan::new(
            "UPDATE lockstep.jobs AS j
             SET attempts = j.attempts + 1, attempts_left = j.attempts_left - 1, token = pg_catalog.nextval('lockstep.token'),
                 holder = $2, claimed_at = pg_catalog.clock_timestamp(),
                 claimed_until = pg_catalog.clock_timestamp() + $3, previous_holder = j.holder, last_error = $4,
                 last_failed_at = pg_catalog.clock_timestamp()
             WHERE j.job_id = $1
             RETURNING j.job_id, j",
        );
        let spi = self.jobs.spi();
        let Some(expired) = attempt::lock_expired(candidate.job_id) else {
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
            return self.claim_one(at, twin);
        }
        let args = [
            Arg::from(candidate.job_id),
            Arg::from(self.request.holder),
            Arg::from(self.request.ttl),
            Arg::from(expired.error.as_str()),
        ];
        let taken = self.jobs.write(&TAKE_OVER, &args);
        self.order.extend(&taken);
        !taken.is_empty()
    }

    /// As [`Self::lock_one`], with a snapshot taken now.
    fn claim_one(&mut self, at: &mut InTenant, job_id: i64) -> bool {
        self.lock_one(at, &Lookup::to_lock(row::TABLE), job_id)
    }

    /// Locks a ready job to be claimed, unless somebody has. Of one with a key the caller holds JOB_KEY, and has seen that nothing of
    /// the key is in progress.
    fn lock_one(&mut self, at: &mut InTenant, jobs: &Lookup, job_id: i64) -> bool {
        let Some(slot) = self.place(at) else {
            return false;
        };
        if row::lock(jobs, job_id, Strength::Update, row::if_due).is_none() {
            return false;
        }
        self.locked.push(job_id);
        self.order.push(job_id);
        if slot.is_some() {
            self.claim_locked(slot);
            self.use_place(at);
        }
        true
    }

    /// Claims the jobs that were locked.
    fn claim_locked(&mut self, slot: Option<i32>) {
        static CLAIM: Plan = Plan::new(
            "UPDATE lockstep.jobs AS j
             SET state = 'in_progress', attempts = j.attempts + 1, attempts_left = j.attempts_left - 1,
                 token = pg_catalog.nextval('lockstep.token'), holder = $1, claimed_at = pg_catalog.clock_timestamp(),
                 claimed_until = pg_catalog.clock_timestamp() + $2, slot = $3, delayed_until = 'epoch', lane = NULL
             WHERE j.job_id = ANY ($4)
             RETURNING j.job_id, j",
        );
        let mut locked = std::mem::take(&mut self.locked);
        if locked.is_empty() {
            return;
        }
        let jobs = Lookup::to_write(row::TABLE, At::Latest);
        let Some(mut updater) = Updater::of(&jobs) else {
            let args = [
                Arg::from(self.request.holder),
                Arg::from(self.request.ttl),
                Arg::from(slot),
                Arg::from(locked),
            ];
            self.jobs.write(&CLAIM, &args);
            return;
        };
        locked.sort_unstable();
        locked.dedup();
        let mut walk = jobs.walk_to_seek(row::by_id::INDEX, 1);
        for job_id in locked {
            walk.seek(&[row::id(job_id)]);
            let Some(job) = walk.step() else {
                continue;
            };
            let attempts: i32 = job.get(row::ATTEMPTS).unwrap_or_default();
            let attempts_left: Option<i32> = job.get(row::ATTEMPTS_LEFT);
            let now = clock_timestamp();
            let changes = [
                (row::STATE, "in_progress".into_datum()),
                (row::ATTEMPTS, (attempts + 1).into_datum()),
                (
                    row::ATTEMPTS_LEFT,
                    attempts_left.map(|left| left - 1).into_datum(),
                ),
                (row::TOKEN, sequence::TOKEN.next().into_datum()),
                (row::HOLDER, self.request.holder.into_datum()),
                (row::CLAIMED_AT, now.into_datum()),
                (row::CLAIMED_UNTIL, (now + self.request.ttl).into_datum()),
                (row::SLOT, slot.into_datum()),
                (row::DELAYED_UNTIL, row::not_delayed().into_datum()),
                (row::LANE, None),
            ];
            let job = updater.change_returning(&walk, &changes);
            self.jobs.add(job_id, job);
        }
    }

    /// Locks up to `count` of the jobs without a key to be claimed, in their order, none of less priority than `least`; how many.
    /// Fewer: others have locked the rest of them, or the queue is full.
    fn take_keyless(&mut self, at: &mut InTenant, count: usize, least: i32) -> usize {
        let Some(slot) = self.place(at) else {
            return 0;
        };
        let jobs = Lookup::to_lock(row::TABLE);
        let locked = search::lock_keyless(
            &jobs,
            self.request.queue,
            at.tenant,
            count,
            least,
            &mut at.tried,
        );
        self.locked.extend(&locked);
        self.order.extend(&locked);
        if slot.is_some() && !locked.is_empty() {
            self.claim_locked(slot);
            self.use_place(at);
        }
        locked.len()
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
        let most = self.request.max_jobs;
        let mut last = turn::last_tenant(queue);
        let mut before_round = None;
        while self.order.len() < most && before_round != Some(self.order.len()) {
            before_round = Some(self.order.len());
            for tenant in turn::Round::new(queue, last.clone()) {
                let left = most - self.order.len();
                if left == 0 {
                    break;
                }
                self.take(&tenant, 1 + left / 16);
                last = Some(tenant);
            }
        }
        if let Some(last) = last {
            turn::remember_tenant(queue, last);
        }
    }
}

impl InTenant<'_> {
    /// A job of this tenant that was in progress is not any more.
    fn place_came_free(&mut self) {
        self.full = false;
        self.places = None;
    }
}
