//! What a backend remembers of the running transaction. It follows the transaction's end and its savepoints exactly as locks do:
//! rolling back past a note forgets it.

use pgrx::{
    PgSubXactCallbackEvent, PgXactCallbackEvent, pg_sys, register_subxact_callback,
    register_xact_callback,
};
use std::cell::{Cell, RefCell};
use std::thread::LocalKey;

use crate::snapshot;

/// For a `thread_local!`.
pub struct Memory<T: 'static> {
    /// Oldest first, each with the subtransaction that noted it.
    notes: RefCell<Vec<(pg_sys::SubTransactionId, T)>>,
    /// Whether the running transaction's end and savepoints are followed already.
    following: Cell<bool>,
}

impl<T: 'static> Memory<T> {
    pub const fn new() -> Self {
        Memory {
            notes: RefCell::new(Vec::new()),
            following: Cell::new(false),
        }
    }
}

/// Notes `value`, in place of what the same subtransaction noted that it replaces. True: it is the transaction's first note.
pub fn note<T>(
    memory: &'static LocalKey<Memory<T>>,
    value: T,
    replaces: impl Fn(&T) -> bool,
) -> bool {
    let level = snapshot::current_level();
    memory.with(|memory| {
        let mut notes = memory.notes.borrow_mut();
        notes.retain(|(of, noted)| *of != level || !replaces(noted));
        notes.push((level, value));
    });
    let is_first = !memory.with(|memory| memory.following.replace(true));
    if is_first {
        follow_transaction(memory);
    }
    is_first
}

/// Looks at the notes, oldest first.
pub fn look<T, R>(
    memory: &'static LocalKey<Memory<T>>,
    body: impl FnOnce(&mut dyn DoubleEndedIterator<Item = &T>) -> R,
) -> R {
    memory.with(|memory| body(&mut memory.notes.borrow().iter().map(|(_, value)| value)))
}

fn follow_transaction<T>(memory: &'static LocalKey<Memory<T>>) {
    for end in [
        PgXactCallbackEvent::Commit,
        PgXactCallbackEvent::Abort,
        PgXactCallbackEvent::Prepare,
    ] {
        register_xact_callback(end, || {
            memory.with(|memory| {
                memory.notes.borrow_mut().clear();
                memory.following.set(false);
            });
        });
    }
    register_subxact_callback(PgSubXactCallbackEvent::AbortSub, |level, _| {
        memory.with(|memory| memory.notes.borrow_mut().retain(|(of, _)| *of != level));
    });
    register_subxact_callback(PgSubXactCallbackEvent::CommitSub, |level, parent| {
        memory.with(|memory| {
            let mut notes = memory.notes.borrow_mut();
            for (of, _) in notes.iter_mut().filter(|(of, _)| *of == level) {
                *of = parent;
            }
        });
    });
}
