//! What the running transaction has claimed. Rolling back past a claim forgets the claim and releases its lock ([`crate::memory`]).

use std::cell::RefCell;

use crate::error::Error;
use crate::memory::{self, Memory};
use crate::position::Position;

/// How a claim went, or what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A batch: the events after `after` that pass the filter, up to and with the one at `last`. None up to `scanned` passes it
    /// after that.
    Claimed {
        after: Position,
        last: Position,
        scanned: Position,
    },
    /// The lock, but no event; the cursor is at `position`.
    None {
        position: Position,
    },
    /// Another transaction has the lock, or all places are taken.
    Busy,
    Paused,
    /// An event failed a short time ago.
    Backoff,
    /// An event of the batch failed and is to be retried.
    Failed,
    /// The definition was changed or dropped, or the cursor reset, after the claim.
    Forgotten,
}

impl Outcome {
    /// The word that projection_claim_state returns.
    pub fn status(self) -> &'static str {
        match self {
            Outcome::Claimed { .. } => "claimed",
            Outcome::None { .. } | Outcome::Failed | Outcome::Forgotten => "none",
            Outcome::Busy => "busy",
            Outcome::Paused => "paused",
            Outcome::Backoff => "backoff",
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Claim {
    pub outcome: Outcome,
    /// Events were left within the claim's bounds.
    pub more: bool,
}

/// The bounds of a claimed batch; equal if it is empty.
pub struct Batch {
    pub after: Position,
    pub last: Position,
}

thread_local! {
    /// The projections, with their tenants, whose handlers are running in this backend.
    static RUNNING: RefCell<Vec<(String, String)>> = const { RefCell::new(Vec::new()) };
}

/// Runs `body`, which calls the projection's handler. A claim of the same projection in there finds it busy: the lock is this
/// transaction's own, and would not keep a handler from applying the batch that it is part of.
pub fn while_running<T>(projection: &str, tenant: &str, body: impl FnOnce() -> T) -> T {
    struct Pop;
    impl Drop for Pop {
        fn drop(&mut self) {
            RUNNING.with_borrow_mut(Vec::pop);
        }
    }
    RUNNING.with_borrow_mut(|running| running.push((projection.to_owned(), tenant.to_owned())));
    let _pop = Pop;
    body()
}

pub fn is_running(projection: &str, tenant: &str) -> bool {
    RUNNING.with_borrow(|running| running.iter().any(|(p, t)| p == projection && t == tenant))
}

/// A handler does not move the cursor of the batch that it is part of.
pub fn refuse_in_handler(projection: &str, tenant: &str) -> Result<(), Error> {
    if is_running(projection, tenant) {
        return Err(Error::ClaimNotHeld {
            projection: projection.to_owned(),
            tenant: tenant.to_owned(),
            detail: "Its own handler is running.",
        });
    }
    Ok(())
}

struct Entry {
    projection: String,
    tenant: String,
    claim: Claim,
}

impl Entry {
    fn is_of(&self, projection: &str, tenant: &str) -> bool {
        self.projection == projection && self.tenant == tenant
    }
}

thread_local! {
    static CLAIMS: Memory<Entry> = const { Memory::new() };
}

/// This transaction's last claim of the projection for the tenant.
pub fn last_claim(projection: &str, tenant: &str) -> Option<Claim> {
    memory::look(&CLAIMS, |claims| {
        claims
            .rev()
            .find(|entry| entry.is_of(projection, tenant))
            .map(|entry| entry.claim)
    })
}

/// The batch that this transaction holds, else LS002.
pub fn batch(projection: &str, tenant: &str) -> Result<Batch, Error> {
    let detail = match last_claim(projection, tenant).map(|claim| claim.outcome) {
        Some(Outcome::Claimed { after, last, .. }) => return Ok(Batch { after, last }),
        Some(Outcome::None { position }) => {
            return Ok(Batch {
                after: position,
                last: position,
            });
        }
        Some(Outcome::Busy) => "Its last claim found the projection busy.",
        Some(Outcome::Paused) => "Its last claim found the projection paused.",
        Some(Outcome::Backoff) => "Its last claim found the projection waiting to retry an event.",
        Some(Outcome::Failed) => "It has already failed the claim.",
        Some(Outcome::Forgotten) => "The projection was changed after the claim.",
        None => "It made none, or rolled back past it.",
    };
    Err(Error::ClaimNotHeld {
        projection: projection.to_owned(),
        tenant: tenant.to_owned(),
        detail,
    })
}

/// Replaces what the same subtransaction knew of the projection and tenant.
pub fn remember(projection: &str, tenant: &str, outcome: Outcome, more: bool) {
    let entry = Entry {
        projection: projection.to_owned(),
        tenant: tenant.to_owned(),
        claim: Claim { outcome, more },
    };
    memory::note(&CLAIMS, entry, |other| other.is_of(projection, tenant));
}

/// After this the transaction holds no claim on the projection; `tenant` None: in any tenant.
pub fn forget(projection: &str, tenant: Option<&str>) {
    let tenants: Vec<String> = memory::look(&CLAIMS, |claims| {
        claims
            .filter(|entry| entry.projection == projection)
            .map(|entry| entry.tenant.clone())
            .filter(|of_entry| tenant.is_none_or(|tenant| tenant == of_entry))
            .collect()
    });
    for tenant in tenants {
        remember(projection, &tenant, Outcome::Forgotten, false);
    }
}
