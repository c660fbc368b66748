//! What the launcher of a database's workers has to look at: the tenants that were pushed to. A box for each database whose
//! workers are on; it holds names, so that a push costs the launcher a look at one tenant and not at all of them.

use pgrx::{PGRXSharedMemory, PgLwLock, pg_shmem_init, prelude::*};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::process;

/// The databases that can have workers.
pub const BOXES: usize = 32;
/// Of tenants' names, each after its length in two bytes. When they do not fit, the launcher looks at everything.
const BYTES: usize = 8192;

#[derive(PartialEq, Eq, Hash)]
pub enum Mail {
    /// A projection is not what it was.
    ProjectionChanged,
    Tenant(String),
}

/// What has come since the last look.
#[derive(Default)]
pub struct Collected {
    pub projection_changed: bool,
    /// There were more tenants than fit.
    pub overflowed: bool,
    /// Each once, in the order of their first push.
    pub tenants: Vec<String>,
}

#[derive(Clone, Copy)]
struct Reader {
    database: pg_sys::Oid,
    process: usize,
    /// Whether a push can be of interest to it.
    heeds_pushes: bool,
}

#[derive(Clone, Copy)]
struct Contents {
    projection_changed: bool,
    overflowed: bool,
    used: usize,
    names: [u8; BYTES],
}

struct Boxes {
    readers: [Option<Reader>; BOXES],
    contents: [Contents; BOXES],
}

// SAFETY: plain values.
unsafe impl PGRXSharedMemory for Boxes {}

// SAFETY: the only lock of this name.
static MAIL: PgLwLock<Boxes> = unsafe { PgLwLock::new(c"LockstepMail") };
static IS_THERE: AtomicBool = AtomicBool::new(false);

/// Called last by the postmaster: all of the shared memory is there then.
pub fn preload() {
    pg_shmem_init!(
        MAIL = Boxes {
            readers: [None; BOXES],
            contents: [Contents::EMPTY; BOXES],
        }
    );
    IS_THERE.store(true, Ordering::Relaxed);
}

/// Whether the library was preloaded.
pub fn is_there() -> bool {
    IS_THERE.load(Ordering::Relaxed)
}

impl Contents {
    const EMPTY: Contents = Contents {
        projection_changed: false,
        overflowed: false,
        used: 0,
        names: [0; BYTES],
    };

    fn is_empty(&self) -> bool {
        !self.projection_changed && !self.overflowed && self.used == 0
    }

    fn add(&mut self, mail: &Mail) {
        let Mail::Tenant(tenant) = mail else {
            self.projection_changed = true;
            return;
        };
        let (name, length) = (tenant.as_bytes(), tenant.len() as u16);
        if self.names().any(|known| known == name) {
            return;
        }
        let end = self.used + 2 + name.len();
        if end > BYTES {
            self.overflowed = true;
            return;
        }
        self.names[self.used..self.used + 2].copy_from_slice(&length.to_le_bytes());
        self.names[self.used + 2..end].copy_from_slice(name);
        self.used = end;
    }

    /// In the order in which they came.
    fn names(&self) -> impl Iterator<Item = &[u8]> {
        let mut names = &self.names[..self.used];
        std::iter::from_fn(move || {
            let (length, rest) = names.split_first_chunk::<2>()?;
            let (name, rest) = rest.split_at(u16::from_le_bytes(*length) as usize);
            names = rest;
            Some(name)
        })
    }

    fn take(&mut self) -> Collected {
        let name = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
        let collected = Collected {
            projection_changed: self.projection_changed,
            overflowed: self.overflowed,
            tenants: self.names().map(name).collect(),
        };
        self.projection_changed = false;
        self.overflowed = false;
        self.used = 0;
        collected
    }
}

/// Puts it into this database's box, if somebody reads that and heeds it, and wakes the reader unless there is mail already: then
/// it has been woken.
pub fn post(mail: &Mail) {
    let is_push = matches!(mail, Mail::Tenant(_));
    if is_push && !heeds_pushes() {
        return;
    }
    let mut boxes = MAIL.exclusive();
    let Some((index, reader)) = boxes.reader_of(process::database()) else {
        return;
    };
    if !is_push {
        boxes.heed_pushes(index, true);
    }
    let contents = &mut boxes.contents[index];
    let was_empty = contents.is_empty();
    contents.add(mail);
    drop(boxes);
    if was_empty {
        process::wake(reader.process);
    }
}

impl Boxes {
    fn reader_of(&self, database: pg_sys::Oid) -> Option<(usize, Reader)> {
        let mut readers = self.readers.iter().enumerate();
        readers.find_map(|(index, reader)| {
            reader
                .filter(|reader| reader.database == database)
                .map(|reader| (index, reader))
        })
    }

    fn heed_pushes(&mut self, index: usize, heeds: bool) {
        if let Some(reader) = &mut self.readers[index] {
            reader.heeds_pushes = heeds;
        }
    }
}

fn heeds_pushes() -> bool {
    let boxes = MAIL.share();
    let reader = boxes.reader_of(process::database());
    reader.is_some_and(|(_, reader)| reader.heeds_pushes)
}

/// Says whether there is any projection that a push could make due, as the reader's last look at everything has found it. While
/// there is none, pushes neither fill the box nor wake anybody. A projection that was changed meanwhile may be one, and makes
/// pushes heeded again.
pub fn heed_pushes(heeds: bool) {
    let mut boxes = MAIL.exclusive();
    if let Some((index, _)) = boxes.reader_of(process::database()) {
        let heeds = heeds || boxes.contents[index].projection_changed;
        boxes.heed_pushes(index, heeds);
    }
}

/// Makes this process the reader of its database's box until its end. False: all boxes are taken.
#[must_use]
pub fn open() -> bool {
    let mut boxes = MAIL.exclusive();
    let database = process::database();
    let free = || boxes.readers.iter().position(Option::is_none);
    let Some(index) = boxes
        .reader_of(database)
        .map(|(index, _)| index)
        .or_else(free)
    else {
        return false;
    };
    boxes.readers[index] = Some(Reader {
        database,
        process: process::number(),
        heeds_pushes: true,
    });
    boxes.contents[index] = Contents::EMPTY;
    true
}

/// Called at the reader's end.
pub fn close() {
    let mut boxes = MAIL.exclusive();
    if let Some((index, _)) = boxes.reader_of(process::database()) {
        boxes.readers[index] = None;
    }
}

/// Whether somebody reads this database's box: its workers are on.
pub fn is_open() -> bool {
    is_there() && MAIL.share().reader_of(process::database()).is_some()
}

/// Empties this database's box.
pub fn collect() -> Collected {
    let mut boxes = MAIL.exclusive();
    match boxes.reader_of(process::database()) {
        Some((index, _)) => boxes.contents[index].take(),
        None => Collected::default(),
    }
}
