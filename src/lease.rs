//! Leases: names that one holder at a time has, for a time, and that the database enforces on the writes which they protect.
//!
//! Invariants: the token of a lease grows at every acquisition and is never handed out twice; and a transaction in which
//! `lease_guard` or the check at COMMIT succeeded is visible before anybody else has acquired the lease.
//!
//! # The order of locks
//! LEASE first, then the lease's row. Whatever locks the row holds LEASE until its transaction ends: a guard shared (and no row),
//! a renewal and a release RowShare, an acquisition and a theft exclusively. So who has LEASE alone finds the row unlocked, and
//! nobody waits for a row while another waits for his LEASE. Exceptions: `lease_delete_expired` skips locked rows, and
//! `after_data_loss` waits for them.
//!
//! # Which interleaving each step prevents
//! An acquisition: (1) reads the row without a lock; (2) takes LEASE exclusively if that needs no wait; (3) locks the row, skipping
//! one that is locked, with a snapshot taken after (2); (4) draws a token; (5) writes.
//! A guard: (a) takes LEASE shared; (b) reads the row with a snapshot taken after (a), in REPEATABLE READ too.
//!
//! - A row lock in place of (1): who is refused in a long transaction would hold up the holder's renewals, and the lease would be
//!   lost to nobody.
//! - (2) with a wait, or an INSERT in place of it: it would wait for another's uncommitted acquisition, and be refused afterwards.
//! - (3) with the snapshot of (1): two who saw the same expired lease would both take it, one after the other.
//! - (4) before (2): the one with the lesser token could be the later holder, and refuse the greater one's writes.
//! - (b) before (a): the lease is taken over and the new holder writes between the two; both write.
//! - A row lock in place of (a): guards would wait for renewals or cost a multixact each; and the lock of (2) is what makes an
//!   acquisition give way to a guard.
//! - The time in (5) or of a renewal from before the row is locked: part of the ttl has gone in the wait, or an expired lease is
//!   renewed. So the row is locked by one statement and the clock read after it.

mod acquire;
mod guard;
mod hold;
mod overview;
mod state;
mod take;
mod trigger;

use pgrx::datum::Interval;
use pgrx::prelude::*;

use crate::argument;
use crate::error::{Error, OrRaise};
use crate::jsonb::Jsonb;
use crate::procedure::{self, Outcome};
use crate::snapshot;
use crate::spi::{Columns, Table};
use acquire::{Answer, Request};
use hold::{Renewal, Wait};

pub use overview::raise_tokens;

/// Acquires the lease for `ttl`, if nobody holds it and it is not closed; the holder itself renews it and keeps its token.
///
/// Where `acquired` is false, `held_by` and `expires_at` say who holds it until when, or when it opens, if that is known. Waits for
/// nobody but the same holder's own renewal or release in flight: a lease that another transaction guards or is acquiring is refused
/// at once. `min_hold` keeps it closed for so
/// long after this acquisition, released or not; `lock_delay` keeps it closed for so long after it expired. The token counts once
/// the transaction has committed. Raises 22023, 22004, 25006, and 55000 when the token sequence is behind.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn lease_acquire<'a>(
    name: Option<&'a str>,
    holder: Option<&'a str>,
    ttl: default!(Option<Interval>, "'10 seconds'"),
    metadata: default!(Option<Jsonb<'a>>, "NULL"),
    min_hold: default!(Option<Interval>, "'0'"),
    lock_delay: default!(Option<Interval>, "'0'"),
) -> Table<Acquisition> {
    let run = || {
        let request = Request {
            name: argument::name("name", name)?,
            holder: argument::name("holder", holder)?,
            ttl: argument::positive_span("ttl", ttl)?,
            metadata,
            min_hold: argument::span("min_hold", min_hold)?,
            lock_delay: argument::span("lock_delay", lock_delay)?,
            wait: Wait::ForRow,
        };
        snapshot::require_read_write("lease_acquire")?;
        acquire::acquire(&request)
    };
    run().or_raise().into()
}

/// For the lease and nothing more.
fn plain_request<'a>(
    name: Option<&'a str>,
    holder: Option<&'a str>,
    ttl: Option<Interval>,
) -> Result<Request<'a>, Error> {
    Ok(Request {
        name: argument::name("name", name)?,
        holder: argument::name("holder", holder)?,
        ttl: argument::positive_span("ttl", ttl)?,
        metadata: None,
        min_hold: Interval::from_micros(0),
        lock_delay: Interval::from_micros(0),
        wait: Wait::ForNothing,
    })
}

/// Takes the lease from whoever holds it, closed or not, with a new token, and writes down why. Waits, obeying lock_timeout, for the
/// transactions that guard it, are renewing it or are acquiring it. Raises 55P03 naming their pids.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn lease_steal(
    name: Option<&str>,
    holder: Option<&str>,
    ttl: Option<Interval>,
    reason: Option<&str>,
) -> Table<Acquisition> {
    let run = || {
        let request = plain_request(name, holder, ttl)?;
        let reason = argument::name("reason", reason)?;
        snapshot::require_read_write("lease_steal")?;
        acquire::steal(&request, reason)
    };
    run().or_raise().into()
}

struct Acquisition;

impl Columns for Acquisition {
    const SQL: &'static str = "TABLE (acquired boolean, token bigint, held_by text, expires_at timestamptz, renew_before timestamptz)";
}

impl From<Answer> for Table<Acquisition> {
    fn from(answer: Answer) -> Self {
        Table::new(vec![vec![
            answer.acquired.into_datum(),
            answer.token.into_datum(),
            answer.held_by.into_datum(),
            answer.expires_at.into_datum(),
            answer.renew_before.into_datum(),
        ]])
    }
}

/// Makes a lease that is held with this token last for `ttl` (NULL: the ttl that it has) from now.
///
/// `renewed`; `expired`, never revived; `lost`: released, or held with another token; `unknown`: no such lease. Waits for other
/// renewals, a release or a theft of the lease, not for guards; the time counts from after the wait.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn lease_renew(
    name: Option<&str>,
    token: Option<i64>,
    ttl: default!(Option<Interval>, "NULL"),
) -> Table<Renewed> {
    let run = || {
        let name = argument::name("name", name)?;
        let token = argument::required("token", token)?;
        let ttl = match ttl {
            None => None,
            given => Some(argument::positive_span("ttl", given)?),
        };
        snapshot::require_read_write("lease_renew")?;
        let (status, expires_at, renew_before) = match hold::renew(name, token, ttl)? {
            Renewal::Renewed {
                expires_at,
                renew_before,
            } => ("renewed", Some(expires_at), Some(renew_before)),
            Renewal::Expired => ("expired", None, None),
            Renewal::Lost => ("lost", None, None),
            Renewal::Unknown => ("unknown", None, None),
        };
        Ok::<_, Error>(Table::new(vec![vec![
            status.into_datum(),
            expires_at.into_datum(),
            renew_before.into_datum(),
        ]]))
    };
    run().or_raise()
}

struct Renewed;

impl Columns for Renewed {
    const SQL: &'static str =
        "TABLE (status text, expires_at timestamptz, renew_before timestamptz)";
}

/// Gives the lease back: true; false if it is not held with this token any more. Others may acquire it once this has committed, the
/// guards of it have ended, and a `min_hold` is over. Waits as `lease_renew`.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn lease_release(name: Option<&str>, token: Option<i64>) -> bool {
    let run = || {
        let name = argument::name("name", name)?;
        let token = argument::required("token", token)?;
        snapshot::require_read_write("lease_release")?;
        hold::release(name, token)
    };
    run().or_raise()
}

/// Raises LS003 unless the lease is held with this token. After it nobody takes the lease over until this transaction, or the
/// savepoint in which it was called, ends: neither after the expiry nor after a release. Waits, obeying lock_timeout, for a transaction
/// that is just taking the lease; not for other guards or for renewals.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn lease_guard(name: Option<&str>, token: Option<i64>) {
    let run = || {
        let name = argument::name("name", name)?;
        let token = argument::required("token", token)?;
        snapshot::require_primary("lease_guard")?;
        guard::guard(name, token)
    };
    run().or_raise()
}

/// Makes the COMMIT of this transaction fail with LS003 unless the lease is held with this token then. Until then it can be taken
/// over. PREPARE TRANSACTION is refused (0A000). Called in a savepoint that is rolled back, it counts for nothing.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn lease_guard_at_commit(name: Option<&str>, token: Option<i64>) {
    let run = || {
        let name = argument::name("name", name)?;
        let token = argument::required("token", token)?;
        snapshot::require_primary("lease_guard_at_commit")?;
        guard::guard_at_commit(name, token);
        Ok::<_, Error>(())
    };
    run().or_raise()
}

/// A BEFORE trigger for each STATEMENT, with the arguments `lease_name` and, if wanted, `setting_name`: raises LS003 unless this
/// transaction guards the lease, or that setting holds the token with which it then does.
// A definer, so that who writes to the table needs no right to the leases.
#[pg_trigger(sql = r#"
CREATE FUNCTION lockstep.lease_guard_trigger() RETURNS trigger
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path TO pg_catalog, lockstep, pg_temp
    AS '@MODULE_PATHNAME@', '@FUNCTION_NAME@';
"#)]
fn lease_guard_trigger<'a>(
    trigger: &'a PgTrigger<'a>,
) -> Result<Option<PgHeapTuple<'a, AllocatedByPostgres>>, Error> {
    trigger::require_guard(trigger).or_raise();
    Ok(None)
}

/// Waits until it has acquired the lease for `ttl`, or `timeout` is over; it tries, and commits, in transactions of its own, and
/// between two tries holds neither a transaction id nor a snapshot.
///
/// Woken by a release where the library is preloaded, else it looks every `lockstep.poll_interval`. Raises 2D000 in a transaction
/// block. Not SECURITY DEFINER and without a SET clause, or it could not commit: it tries with the rights of the extension's owner.
#[pg_extern(sql = r#"
CREATE PROCEDURE lockstep.lease_take(
    name text, holder text, ttl interval, timeout interval,
    INOUT acquired boolean DEFAULT NULL, INOUT token bigint DEFAULT NULL,
    INOUT expires_at timestamptz DEFAULT NULL, INOUT renew_before timestamptz DEFAULT NULL)
    LANGUAGE c AS '@MODULE_PATHNAME@', '@FUNCTION_NAME@';
"#)]
#[allow(clippy::too_many_arguments)]
fn lease_take(
    name: Option<&str>,
    holder: Option<&str>,
    ttl: Option<Interval>,
    timeout: Option<Interval>,
    _acquired: Option<bool>,
    _token: Option<i64>,
    _expires_at: Option<TimestampWithTimeZone>,
    _renew_before: Option<TimestampWithTimeZone>,
    call: pg_sys::FunctionCallInfo,
) -> Outcome {
    let run = || {
        let request = plain_request(name, holder, ttl)?;
        let timeout = argument::duration("timeout", argument::required("timeout", timeout)?)?;
        procedure::require_own_transaction("lease_take", call)?;
        snapshot::require_read_write("lease_take")?;
        let answer = take::take(&request, timeout)?;
        let when_acquired = |time| Some(time).filter(|_| answer.acquired).flatten();
        Ok::<_, Error>(Outcome(vec![
            answer.acquired.into_datum(),
            answer.token.into_datum(),
            when_acquired(answer.expires_at).into_datum(),
            when_acquired(answer.renew_before).into_datum(),
        ]))
    };
    run().or_raise()
}

/// Deletes the leases that nobody has held, and that have been open, for at least `older_than`, and returns how many. Waits for
/// nobody: those that somebody is just acquiring stay. Tokens go on growing.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
fn lease_delete_expired(older_than: Option<Interval>) -> i64 {
    let run = || {
        let older_than = argument::span("older_than", older_than)?;
        snapshot::require_read_write("lease_delete_expired")?;
        Ok::<_, Error>(overview::delete_expired(older_than))
    };
    run().or_raise()
}

/// Lists the transactions that guard a lease (`guard`) and the sessions that wait in `lease_take` (`wait`): the backend's pid, or the
/// transaction id if it is a prepared transaction. What `lockstep.lease_status` is made of.
#[pg_extern(security_definer, volatile, parallel_unsafe)]
#[search_path(pg_catalog, lockstep, pg_temp)]
#[allow(clippy::type_complexity)]
fn lease_locks() -> TableIterator<
    'static,
    (
        name!(name, String),
        name!(purpose, &'static str),
        name!(pid, Option<i32>),
        name!(prepared_transaction, Option<i64>),
    ),
> {
    let row = |lock: overview::Lock| {
        (
            lock.lease,
            lock.purpose,
            Some(lock.holder.pid).filter(|pid| *pid != 0),
            lock.holder.transaction_id.map(i64::from),
        )
    };
    TableIterator::new(overview::locks().into_iter().map(row).collect::<Vec<_>>())
}
