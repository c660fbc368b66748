//! Guards: what makes a write of a former holder fail, whenever it wakes up.
//!
//! The guards that are to be checked at COMMIT are remembered, and follow the savepoints in which they were taken
//! ([`crate::memory`]). Those that are held are locks, and need nothing else.

use pgrx::{PgXactCallbackEvent, register_xact_callback};

use super::state::{self, Lease};
use crate::error::{Error, OrRaise};
use crate::lock::{Mode, Tag};
use crate::memory::{self, Memory};
use crate::rights;

/// The lock first, then the row: read before it, the row could show a lease that is taken over until the lock is there.
pub fn guard(name: &str, token: i64) -> Result<(), Error> {
    Tag::lease(name).acquire(Mode::Shared);
    let lease = state::read(name);
    if lease
        .as_ref()
        .is_some_and(|lease| lease.is_held_with(token))
    {
        return Ok(());
    }
    Err(Error::LeaseLost {
        name: name.to_owned(),
        token: Some(token),
        actual: described(lease, token),
    })
}

/// Does not tell the token: who could learn it could act as the holder.
fn described(lease: Option<Lease>, token: i64) -> String {
    match lease {
        None => "there is no such lease".into(),
        Some(Lease {
            holder: Some(holder),
            token: actual,
            expires_at,
            live,
            ..
        }) => match (live, actual == token) {
            (true, _) => format!("held by \"{holder}\" with another token"),
            (false, true) => format!("expired at {expires_at}"),
            (false, false) => {
                format!("taken by \"{holder}\" with another token, expired at {expires_at}")
            }
        },
        Some(Lease { expires_at, .. }) => format!("released at {expires_at}"),
    }
}

/// Whether this transaction guards the lease, now or at its COMMIT.
pub fn is_guarded(name: &str) -> bool {
    Tag::lease(name).is_held(Mode::Shared)
        || memory::look(&AT_COMMIT, |guards| {
            guards.filter(|guard| guard.name == name).count() > 0
        })
}

#[derive(Clone, PartialEq)]
struct AtCommit {
    name: String,
    token: i64,
}

thread_local! {
    static AT_COMMIT: Memory<AtCommit> = const { Memory::new() };
}

pub fn guard_at_commit(name: &str, token: i64) {
    let name = name.to_owned();
    let guard = AtCommit { name, token };
    if memory::note(&AT_COMMIT, guard.clone(), |noted| *noted == guard) {
        register_xact_callback(PgXactCallbackEvent::PreCommit, check_all);
        register_xact_callback(PgXactCallbackEvent::PrePrepare, || {
            if let Some(guard) = noted().into_iter().next() {
                Error::CannotPrepare(guard.name).raise();
            }
        });
    }
}

fn noted() -> Vec<AtCommit> {
    memory::look(&AT_COMMIT, |guards| guards.cloned().collect())
}

/// Takes the guards in the transaction's last step before it commits, after deferred triggers. They are held until its rows are
/// visible, so that nobody takes the lease over between the check and the commit.
fn check_all() {
    let guards = noted();
    if guards.is_empty() {
        return;
    }
    rights::as_extension_owner(|| {
        for check in guards {
            guard(&check.name, check.token).or_raise();
        }
    });
}
