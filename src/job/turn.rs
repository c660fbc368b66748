//! Whose turn it is: the tenants with jobs to claim in a queue, in a circle.
//!
//! One tenant after the other, and never job after job: of each, the first entry of an index says most. The tenant that was served last
//! comes last and is not looked for, so where there is only one, nothing is read of its jobs here.

use pgrx::datum::{TimestampWithTimeZone, clock_timestamp};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CStr;

use super::row;
use super::search;
use crate::lookup::{Key, Lookup, Row};
use crate::process;
use crate::snapshot::At;

/// Once around: the tenants after the one that was served last, those before it, and that one, whether it has jobs or not.
pub struct Round<'a> {
    queue: &'a str,
    last: Option<String>,
    at: Option<String>,
    part: Part,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    AfterLast,
    BeforeLast,
    Over,
}

impl<'a> Round<'a> {
    pub fn new(queue: &'a str, last: Option<String>) -> Self {
        Round {
            queue,
            at: last.clone(),
            last,
            part: Part::AfterLast,
        }
    }
}

impl Iterator for Round<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        if self.part == Part::Over {
            return None;
        }
        let is_before = self.part == Part::BeforeLast;
        let before = self.last.as_deref().filter(|_| is_before);
        let next = next_tenant(self.queue, self.at.as_deref(), before);
        if next.is_some() {
            self.at = next.clone();
            return next;
        }
        if self.part == Part::AfterLast && self.last.is_some() {
            self.part = Part::BeforeLast;
            self.at = None;
            return self.next();
        }
        self.part = Part::Over;
        self.last.take()
    }
}

/// The first of the tenants that have jobs in the queue which are ready, due or expired; of those after and before these ones, where they
/// are given.
pub fn next_tenant(queue: &str, after: Option<&str>, before: Option<&str>) -> Option<String> {
    let jobs = Lookup::of(row::TABLE, At::Latest);
    let now = clock_timestamp();
    let is_past = |row: &Row, column| {
        row.get(column)
            .is_some_and(|time: TimestampWithTimeZone| time <= now)
    };
    let mut tenants = Tenants {
        queue,
        after,
        before,
        up_to: None,
    };
    let ready = tenants.first(&jobs, row::by_key_order::INDEX, |first, tenant| {
        // The first in order may be for later, another of the tenant not.
        is_past(first, row::DELAYED_UNTIL) || search::is_ready(&jobs, queue, tenant)
    });
    tenants.up_to = ready.as_deref();
    let expired = tenants.first(&jobs, row::by_claimed_until::INDEX, |first, _| {
        is_past(first, row::CLAIMED_UNTIL)
    });
    expired.or(ready)
}

struct Tenants<'a> {
    queue: &'a str,
    after: Option<&'a str>,
    before: Option<&'a str>,
    up_to: Option<&'a str>,
}

impl Tenants<'_> {
    /// The first of them whose first job in the index, of queue and tenant, is as it should be.
    fn first(
        &self,
        jobs: &Lookup,
        index: &'static CStr,
        is_right: impl Fn(&Row, &str) -> bool,
    ) -> Option<String> {
        let mut after = self.after.map(str::to_owned);
        loop {
            pgrx::check_for_interrupts!();
            let mut keys = vec![Key::equal(1, self.queue)];
            keys.extend(after.as_deref().map(|tenant| Key::above(2, tenant)));
            keys.extend(self.before.map(|tenant| Key::below(2, tenant)));
            keys.extend(self.up_to.map(|tenant| Key::at_most(2, tenant)));
            let mut walk = jobs.walk(index, &keys);
            let first = walk.step()?;
            let tenant: String = first.get(row::TENANT)?;
            if is_right(&first, &tenant) {
                return Some(tenant);
            }
            after = Some(tenant);
        }
    }
}

thread_local! {
    /// By queue: the tenant that this session's last claim in turns ended with.
    static LAST_TENANT: RefCell<HashMap<String, String>> = RefCell::new(HashMap::new());
}

/// After whom to begin. A new session begins anywhere among the first ones, or those would be served by every new session.
pub fn last_tenant(queue: &str) -> Option<String> {
    const FIRST_ONES: usize = 64;
    let last = LAST_TENANT.with_borrow(|last| last.get(queue).cloned());
    if last.is_some() {
        return last;
    }
    let mut tenants: Vec<Option<String>> = vec![None];
    let mut next = next_tenant(queue, None, None);
    while let Some(tenant) = next
        && tenants.len() < FIRST_ONES
    {
        next = next_tenant(queue, Some(&tenant), None);
        tenants.push(Some(tenant));
    }
    let random =
        process::now().unsigned_abs() as usize / 7 + process::pid().unsigned_abs() as usize;
    tenants.swap_remove(random % tenants.len())
}

pub fn remember_tenant(queue: &str, tenant: String) {
    const QUEUES: usize = 1000;
    LAST_TENANT.with_borrow_mut(|last| {
        if last.len() >= QUEUES {
            last.clear();
        }
        last.insert(queue.to_owned(), tenant);
    });
}
