//! The table in shared memory through which supervisor, launchers and workers know of each other. A launcher hands a worker one
//! (projection, tenant) at a time, and the worker hands back how the batch went.
//!
//! A place goes Free → Starting (the launcher has asked the postmaster for a process) → Idle → Assigned → Running → Done → Idle.
//! From Running it goes back to Assigned if there is more to apply, or its tenant was pushed to meanwhile, and no pair waits for a
//! worker: a batch after another costs no turn of the launcher.
//! The process's own exit callback makes it Free if it was told to end, else Ended, which its launcher sees. A crash of any process
//! makes the postmaster reset all of shared memory, this table too, and end all other processes; the supervisor is what it
//! starts again.

use pgrx::{PGRXSharedMemory, PgLwLock, pg_shmem_init, prelude::*};

use crate::argument::MAX_NAME_BYTES;
use crate::guc;
use crate::process;
use crate::wakeup::mailbox;

/// Workers in the whole server.
pub const MOST: usize = 64;
const DATABASES: usize = mailbox::BOXES;
/// Of what pg_stat_activity and the table show of an error.
const ERROR_LIMIT: usize = 400;
/// The time over which events per second are counted, in microseconds.
const WINDOW: i64 = 10_000_000;

/// A text in shared memory, cut off at a character.
#[derive(Clone, Copy)]
pub struct Text<const LIMIT: usize> {
    length: usize,
    bytes: [u8; LIMIT],
}

impl<const LIMIT: usize> Text<LIMIT> {
    const EMPTY: Self = Text {
        length: 0,
        bytes: [0; LIMIT],
    };

    fn new(text: &str) -> Self {
        let mut length = text.len().min(LIMIT);
        while !text.is_char_boundary(length) {
            length -= 1;
        }
        let mut bytes = [0; LIMIT];
        bytes[..length].copy_from_slice(&text.as_bytes()[..length]);
        Text { length, bytes }
    }

    pub fn read(&self) -> String {
        String::from_utf8_lossy(&self.bytes[..self.length]).into_owned()
    }
}

/// A launcher, running or about to.
#[derive(Clone, Copy)]
struct Launcher {
    database: Text<64>,
    process: Option<Process>,
    /// It is connected.
    is_ready: bool,
    must_stop: bool,
    has_ended: bool,
}

#[derive(Clone, Copy)]
struct Process {
    pid: i32,
    number: usize,
}

impl Process {
    fn this() -> Self {
        Process {
            pid: process::pid(),
            number: process::number(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Free,
    Starting,
    Idle,
    Assigned,
    Running,
    Done(Outcome),
    Ended,
}

/// How a batch went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// `more`: events were left.
    Applied { more: bool },
    /// An event failed, and the cursor waits to retry it.
    Retry { milliseconds: u64 },
    /// Another session has the claim, or all places are taken.
    Busy,
    /// Not for this worker: dropped, paused, or given to another role.
    Gone,
    /// The batch failed as a whole.
    Error,
}

/// What a worker is known by, for as long as its database has workers.
#[derive(Clone, Copy)]
struct Worker {
    state: State,
    database: pg_sys::Oid,
    /// From 1, in the database.
    number: i32,
    owner: pg_sys::Oid,
    process: Option<Process>,
    /// The number of the launcher's process.
    launcher: usize,
    must_stop: bool,
    /// A pair waits for a worker.
    is_wanted: bool,
    /// The tenant was pushed to since the batch began.
    touched: bool,
    /// It has applied events since it was given the pair.
    has_applied: bool,
    /// Its start or end is a matter of turns and not for the log.
    quiet: bool,
    projection: Text<MAX_NAME_BYTES>,
    tenant: Text<MAX_NAME_BYTES>,
    started_at: Option<i64>,
    counts: Counts,
}

/// What a worker has done, its predecessors under the same number included.
#[derive(Clone, Copy)]
pub struct Counts {
    pub batches: i64,
    pub events: i64,
    pub errors: i64,
    pub restarts: i64,
    pub last_error: Text<ERROR_LIMIT>,
    /// Times are in microseconds, as PostgreSQL's.
    pub last_error_at: Option<i64>,
    pub batch_started_at: Option<i64>,
    rate: Rate,
}

/// A sliding window of two halves.
#[derive(Clone, Copy)]
struct Rate {
    window: i64,
    before: i64,
    now: i64,
}

impl Rate {
    fn add(&mut self, events: i64, now: i64) {
        let window = now / WINDOW;
        if window != self.window {
            self.before = if window == self.window + 1 {
                self.now
            } else {
                0
            };
            self.now = 0;
            self.window = window;
        }
        self.now += events;
    }

    fn per_second(mut self, now: i64) -> f64 {
        self.add(0, now);
        let part = (now % WINDOW) as f64 / WINDOW as f64;
        (self.before as f64 * (1.0 - part) + self.now as f64) * 1e6 / WINDOW as f64
    }
}

impl Counts {
    const NONE: Counts = Counts {
        batches: 0,
        events: 0,
        errors: 0,
        restarts: 0,
        last_error: Text::EMPTY,
        last_error_at: None,
        batch_started_at: None,
        rate: Rate {
            window: 0,
            before: 0,
            now: 0,
        },
    };

    pub fn events_per_second(&self) -> f64 {
        self.rate.per_second(process::now())
    }
}

impl Worker {
    const FREE: Worker = Worker {
        state: State::Free,
        database: pg_sys::InvalidOid,
        number: 0,
        owner: pg_sys::InvalidOid,
        process: None,
        launcher: 0,
        must_stop: false,
        is_wanted: false,
        touched: false,
        has_applied: false,
        quiet: false,
        projection: Text::EMPTY,
        tenant: Text::EMPTY,
        started_at: None,
        counts: Counts::NONE,
    };
}

struct Table {
    supervisor: Option<Process>,
    launchers: [Option<Launcher>; DATABASES],
    workers: [Worker; MOST],
}

// SAFETY: plain values.
unsafe impl PGRXSharedMemory for Table {}

// SAFETY: the only lock of this name.
static TABLE: PgLwLock<Table> = unsafe { PgLwLock::new(c"LockstepWorkers") };

pub fn preload() {
    pg_shmem_init!(
        TABLE = Table {
            supervisor: None,
            launchers: [None; DATABASES],
            workers: [Worker::FREE; MOST],
        }
    );
}

// What the supervisor does.

/// Makes this process the one that learns of a launcher's end. The postmaster would tell only the supervisor that asked for that
/// launcher, and this one may have come after it.
pub fn begin_supervisor() {
    let mut table = TABLE.exclusive();
    table.supervisor = Some(Process::this());
    for launcher in &mut table.launchers {
        // Whether that will ever be started is not known any more.
        if launcher.is_some_and(|launcher| launcher.process.is_none()) {
            *launcher = None;
        }
    }
}

/// Tells the launchers of other databases than these to stop, and returns which of these have none.
pub fn without_launcher(wanted: &[String]) -> Vec<String> {
    let mut table = TABLE.exclusive();
    for launcher in table.launchers.iter_mut().flatten() {
        if !wanted.contains(&launcher.database.read()) && !launcher.must_stop {
            launcher.must_stop = true;
            if let Some(process) = launcher.process {
                process::wake(process.number);
            }
        }
    }
    let has_launcher = |database: &String| {
        let mut launchers = table.launchers.iter().flatten();
        launchers.any(|launcher| launcher.database.read() == *database)
    };
    wanted
        .iter()
        .filter(|name| !has_launcher(name))
        .cloned()
        .collect()
}

/// A place for the launcher of the database; None if all are taken.
pub fn add_launcher(database: &str) -> Option<usize> {
    let mut table = TABLE.exclusive();
    let index = table.launchers.iter().position(Option::is_none)?;
    table.launchers[index] = Some(Launcher {
        database: Text::new(database),
        process: None,
        is_ready: false,
        must_stop: false,
        has_ended: false,
    });
    Some(index)
}

/// Takes back the place of a launcher that could not be started.
pub fn remove_launcher(index: usize) {
    TABLE.exclusive().launchers[index] = None;
}

/// Takes back the places of the launchers that have ended, and returns their databases and whether they had been connected.
pub fn ended_launchers() -> Vec<(String, bool)> {
    let mut table = TABLE.exclusive();
    let places = table.launchers.iter_mut();
    let ended = places.filter_map(|place| place.take_if(|launcher| launcher.has_ended));
    ended
        .map(|launcher| (launcher.database.read(), launcher.is_ready))
        .collect()
}

// What a launcher does.

/// The name of the launcher's database.
pub fn begin_launcher(index: usize) -> Option<String> {
    let mut table = TABLE.exclusive();
    // Else it was asked for by a supervisor that has ended since, and another has it.
    let launcher = table.launchers[index]
        .as_mut()
        .filter(|launcher| launcher.process.is_none())?;
    launcher.process = Some(Process::this());
    Some(launcher.database.read())
}

/// The launcher is connected.
pub fn launcher_is_ready(index: usize) {
    if let Some(launcher) = &mut TABLE.exclusive().launchers[index] {
        launcher.is_ready = true;
    }
}

/// The process ends.
pub fn end_launcher(index: usize) {
    let mut table = TABLE.exclusive();
    if let Some(launcher) = &mut table.launchers[index] {
        launcher.has_ended = true;
    }
    if let Some(process) = table.supervisor {
        process::wake(process.number);
    }
}

pub fn launcher_must_stop(index: usize) -> bool {
    TABLE.share().launchers[index].is_none_or(|launcher| launcher.must_stop)
}

/// A place for a worker of that number. None: all are taken.
pub fn add_worker(number: i32, owner: pg_sys::Oid, quiet: bool) -> Option<usize> {
    let mut table = TABLE.exclusive();
    let database = process::database();
    let free = |worker: &Worker| worker.state == State::Free;
    let own = |worker: &Worker| worker.database == database && worker.number == number;
    let workers = &mut table.workers;
    let index = workers
        .iter()
        .position(|worker| free(worker) && own(worker))
        .or_else(|| workers.iter().position(free))?;
    let counts = if own(&workers[index]) {
        workers[index].counts
    } else {
        Counts::NONE
    };
    workers[index] = Worker {
        state: State::Starting,
        database,
        number,
        owner,
        counts,
        quiet,
        launcher: process::number(),
        ..Worker::FREE
    };
    Some(index)
}

/// A worker of this database as its launcher sees it.
#[derive(Clone, Copy)]
pub struct Seen {
    pub index: usize,
    pub number: i32,
    pub owner: pg_sys::Oid,
    pub state: State,
    pub has_applied: bool,
    pub stopping: bool,
}

/// This database's workers that are not Free.
pub fn workers() -> Vec<Seen> {
    let table = TABLE.share();
    let database = process::database();
    let workers = table.workers.iter().enumerate();
    workers
        .filter(|(_, worker)| worker.database == database && worker.state != State::Free)
        .map(|(index, worker)| Seen {
            index,
            number: worker.number,
            owner: worker.owner,
            state: worker.state,
            has_applied: worker.has_applied,
            stopping: worker.must_stop,
        })
        .collect()
}

pub fn assign(index: usize, projection: &str, tenant: &str) {
    let mut table = TABLE.exclusive();
    let worker = &mut table.workers[index];
    worker.projection = Text::new(projection);
    worker.tenant = Text::new(tenant);
    worker.has_applied = false;
    // Until the launcher has seen that nothing else waits.
    worker.is_wanted = true;
    worker.state = State::Assigned;
    if let Some(process) = worker.process {
        process::wake(process.number);
    }
}

/// The worker's pair may have become due once more while it runs.
pub fn touch(index: usize) {
    TABLE.exclusive().workers[index].touched = true;
}

/// `pairs_wait`: for one of this database's workers, so that none is to go on with its own pair. Nor is one that a reload made too
/// many.
pub fn want_workers(pairs_wait: bool) {
    let database = process::database();
    let wrong = |worker: &Worker| {
        let is_wanted = pairs_wait || worker.number > guc::WORKERS.get();
        worker.database == database && worker.is_wanted != is_wanted
    };
    if TABLE.share().workers.iter().any(wrong) {
        let mut table = TABLE.exclusive();
        let workers = table.workers.iter_mut();
        for worker in workers.filter(|worker| wrong(worker)) {
            worker.is_wanted = !worker.is_wanted;
        }
    }
}

/// Takes back a worker that is Done.
pub fn make_idle(index: usize) {
    let mut table = TABLE.exclusive();
    if matches!(table.workers[index].state, State::Done(_)) {
        table.workers[index].state = State::Idle;
    }
}

/// Takes back the place of a worker that has Ended or was not started. It is a restart if nobody had told it to.
pub fn free(index: usize, is_restart: bool) {
    let mut table = TABLE.exclusive();
    let worker = &mut table.workers[index];
    worker.state = State::Free;
    worker.process = None;
    worker.counts.restarts += i64::from(is_restart);
}

/// Asks it to end after its batch.
pub fn stop(index: usize, quiet: bool) {
    let mut table = TABLE.exclusive();
    let worker = &mut table.workers[index];
    worker.must_stop = true;
    worker.quiet = quiet;
    if let Some(process) = worker.process {
        process::wake(process.number);
    }
}

/// Asks all workers of this database to end, and gives up their places: at the launcher's end.
pub fn abandon_workers() {
    let mut table = TABLE.exclusive();
    let database = process::database();
    let workers = table.workers.iter_mut();
    for worker in workers.filter(|worker| worker.database == database) {
        worker.must_stop = true;
        worker.quiet = false;
        if worker.state == State::Ended {
            worker.state = State::Free;
        }
        if let Some(process) = worker.process {
            process::wake(process.number);
        }
    }
}

// What a worker does.

/// The database and the role that the worker is to connect to.
pub fn begin_worker(index: usize) -> (pg_sys::Oid, pg_sys::Oid) {
    let mut table = TABLE.exclusive();
    let worker = &mut table.workers[index];
    worker.process = Some(Process::this());
    (worker.database, worker.owner)
}

/// The worker is connected. Returns its number, and whether to be quiet about it.
pub fn worker_is_ready(index: usize) -> (i32, bool) {
    let now = process::now();
    let mut table = TABLE.exclusive();
    let worker = &mut table.workers[index];
    worker.started_at = Some(now);
    if worker.state == State::Starting {
        worker.state = State::Idle;
    }
    process::wake(worker.launcher);
    (worker.number, worker.quiet)
}

/// What a worker finds when it looks.
pub enum Task {
    Nothing,
    Stop { quiet: bool },
    Run { projection: String, tenant: String },
}

pub fn next_task(index: usize) -> Task {
    let now = process::now();
    let mut table = TABLE.exclusive();
    let worker = &mut table.workers[index];
    if worker.state == State::Assigned {
        worker.state = State::Running;
        worker.touched = false;
        worker.counts.batch_started_at = Some(now);
        return Task::Run {
            projection: worker.projection.read(),
            tenant: worker.tenant.read(),
        };
    }
    if worker.must_stop {
        Task::Stop {
            quiet: worker.quiet,
        }
    } else {
        Task::Nothing
    }
}

/// What a batch adds to the counts.
#[derive(Default)]
pub struct Done {
    pub events: i64,
    pub errors: i64,
    pub last_error: Option<String>,
}

pub fn finish(index: usize, outcome: Outcome, done: &Done) {
    let now = process::now();
    let mut table = TABLE.exclusive();
    let worker = &mut table.workers[index];
    worker.has_applied |= done.events > 0;
    let has_more = match outcome {
        Outcome::Applied { more } => more || worker.touched,
        _ => false,
    };
    let goes_on = has_more && !worker.is_wanted && !worker.must_stop;
    worker.state = if goes_on {
        State::Assigned
    } else {
        State::Done(outcome)
    };
    worker.counts.batches += 1;
    worker.counts.events += done.events;
    worker.counts.errors += done.errors;
    worker.counts.rate.add(done.events, now);
    if let Some(error) = &done.last_error {
        worker.counts.last_error = Text::new(error);
        worker.counts.last_error_at = Some(now);
    }
    if !goes_on {
        process::wake(worker.launcher);
    }
}

/// The process ends: the launcher learns it from the place and from the postmaster's signal.
pub fn end_worker(index: usize) {
    let mut table = TABLE.exclusive();
    let worker = &mut table.workers[index];
    worker.process = None;
    worker.state = if worker.must_stop {
        State::Free
    } else {
        State::Ended
    };
}

// What the view shows.

pub struct Shown {
    pub number: i32,
    pub pid: Option<i32>,
    pub owner: pg_sys::Oid,
    pub state: &'static str,
    pub projection: String,
    pub tenant: String,
    pub started_at: Option<i64>,
    pub counts: Counts,
}

/// This database's workers.
pub fn show() -> Vec<Shown> {
    if !mailbox::is_there() {
        return Vec::new();
    }
    let table = TABLE.share();
    let database = process::database();
    let workers = table.workers.iter();
    workers
        .filter(|worker| worker.database == database && worker.state != State::Free)
        .map(|worker| Shown {
            number: worker.number,
            pid: worker.process.map(|process| process.pid),
            owner: worker.owner,
            state: match worker.state {
                _ if worker.must_stop => "stopping",
                State::Free | State::Starting => "starting",
                State::Idle | State::Done(_) => "idle",
                State::Assigned | State::Running => "running",
                State::Ended => "stopping",
            },
            projection: worker.projection.read(),
            tenant: worker.tenant.read(),
            started_at: worker.started_at,
            counts: worker.counts,
        })
        .collect()
}
