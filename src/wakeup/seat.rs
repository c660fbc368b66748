//! Sessions that wait for one thing each. A process has one seat, found by its number in PostgreSQL's table of processes.

use pgrx::{PGRXSharedMemory, PgLwLock, pg_shmem_init, prelude::*};
use std::sync::atomic::{AtomicBool, Ordering};

use super::mailbox;
use crate::process;

/// A process with a greater number polls.
const SEATS: usize = 4096;

struct Seats {
    taken: usize,
    /// What the process of that number waits for; 0: nothing.
    keys: [u64; SEATS],
    /// Whether it has been called. The latch alone does not tell: what the process does between two sleeps may have reset it.
    called: [AtomicBool; SEATS],
}

// SAFETY: numbers and atomics only.
unsafe impl PGRXSharedMemory for Seats {}

// SAFETY: the only lock of this name.
static ROOM: PgLwLock<Seats> = unsafe { PgLwLock::new(c"LockstepSeats") };
pub fn preload() {
    pg_shmem_init!(
        ROOM = Seats {
            taken: 0,
            keys: [0; SEATS],
            called: [const { AtomicBool::new(false) }; SEATS]
        }
    );
}

/// This process's seat, until dropped.
pub struct Seat(usize);

impl Seat {
    pub fn take(key: u64) -> Option<Self> {
        let number = process::number();
        if !mailbox::is_there() || number >= SEATS {
            return None;
        }
        let mut room = ROOM.exclusive();
        // One that a process left in it when it was ended is counted already.
        if room.keys[number] == 0 {
            room.taken += 1;
        }
        room.keys[number] = key.max(1);
        Some(Seat(number))
    }

    /// Whether it was called since this was last asked.
    pub fn was_called(&self) -> bool {
        ROOM.share().called[self.0].swap(false, Ordering::Relaxed)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut room = ROOM.exclusive();
        if room.keys[self.0] != 0 {
            room.keys[self.0] = 0;
            room.taken -= 1;
        }
    }
}

/// Wakes all that wait for it.
pub fn wake(key: u64) {
    let room = ROOM.share();
    if room.taken == 0 {
        return;
    }
    let waiting = room.keys.iter().enumerate();
    for (number, _) in waiting.filter(|(_, waits_for)| **waits_for == key.max(1)) {
        room.called[number].store(true, Ordering::Relaxed);
        process::wake(number);
    }
}
