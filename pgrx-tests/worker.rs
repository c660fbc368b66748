//! The order in which pairs get their batches. The queue knows no database, so neither do these tests.

use std::time::{Duration, Instant};

use crate::worker::MOST;
use crate::worker::queue::{Line, Owner, Pair, Queue};

const SECOND: i64 = 1_000_000;
const ANN: Owner = 1;
const BOB: Owner = 2;

fn pair(projection: &str, tenant: &str) -> Pair {
    Pair {
        projection: projection.to_owned(),
        tenant: tenant.to_owned(),
    }
}

/// The pair of a projection that has only one.
fn only(projection: &str) -> Pair {
    pair(projection, "")
}

/// A queue in which these wait, all of one owner's.
fn waiting(pairs: &[(&str, i64)]) -> Queue {
    let mut queue = Queue::default();
    for (projection, since) in pairs {
        queue.found(only(projection), ANN, *since);
    }
    queue
}

fn start(queue: &mut Queue, owner: Owner) -> String {
    queue
        .start(owner)
        .map_or_else(String::new, |pair| pair.projection)
}

/// The owners in line and how many pairs of theirs wait.
fn owners(queue: &Queue) -> Vec<(Owner, usize)> {
    let lines = queue.lines(SECOND).into_iter();
    lines.map(|line| (line.owner, line.waiting)).collect()
}

/// Starts all that wait, in order.
fn start_all(queue: &mut Queue, owner: Owner) -> Vec<String> {
    std::iter::from_fn(|| queue.start(owner))
        .take(100)
        .map(|pair| pair.projection)
        .collect()
}

#[test]
fn the_pair_whose_oldest_event_is_oldest_starts_first() {
    let mut queue = waiting(&[("second", 20), ("third", 30), ("first", 10)]);
    assert_eq!(start_all(&mut queue, ANN), ["first", "second", "third"]);
    assert_eq!(queue.start(ANN), None);
}

#[test]
fn pairs_of_one_age_all_start() {
    let mut queue = waiting(&[("b", 10), ("a", 10), ("c", 10)]);
    assert_eq!(start_all(&mut queue, ANN), ["a", "b", "c"]);
}

#[test]
fn a_pair_that_is_found_again_keeps_its_place() {
    let mut queue = waiting(&[("first", 10), ("second", 20)]);
    queue.found(only("first"), ANN, 30);
    assert_eq!(owners(&queue), [(ANN, 2)]);
    assert_eq!(start_all(&mut queue, ANN), ["first", "second"]);
}

#[test]
fn a_second_batch_starts_after_the_first_ones_of_all_others() {
    let mut queue = waiting(&[("behind", 0)]);
    assert_eq!(start(&mut queue, ANN), "behind");
    let now = 100 * SECOND;
    assert!(!queue.applied(only("behind"), ANN, true, now));
    // Its oldest event is still the oldest of all.
    queue.found(only("behind"), ANN, 0);
    queue.found(only("before"), ANN, now - SECOND);
    queue.found(only("after"), ANN, now + 9 * SECOND);
    assert_eq!(start_all(&mut queue, ANN), ["before", "after", "behind"]);
}

#[test]
fn a_second_batch_waits_ten_seconds_at_the_most_for_pairs_that_come_later() {
    let mut queue = waiting(&[("behind", 0)]);
    assert_eq!(start(&mut queue, ANN), "behind");
    assert!(!queue.applied(only("behind"), ANN, true, 0));
    // A worker that has a pair a second, and a stream of new pairs that never leaves it idle.
    let starts: Vec<String> = (1..=12)
        .map(|second| {
            queue.found(only(&format!("new at {second}")), ANN, second * SECOND);
            start(&mut queue, ANN)
        })
        .collect();
    assert_eq!(
        starts.iter().position(|start| start == "behind"),
        Some(9),
        "{starts:?}"
    );
}

#[test]
fn pairs_that_are_all_behind_take_turns() {
    let mut queue = waiting(&[("a", 1), ("b", 2), ("c", 3)]);
    let mut starts = Vec::new();
    for now in 1..=9 {
        let pair = queue.start(ANN);
        starts.extend(pair.clone().map(|pair| pair.projection));
        if let Some(pair) = pair {
            assert!(!queue.applied(pair, ANN, true, now * SECOND));
        }
    }
    assert_eq!(starts.concat(), "abcabcabc");
}

#[test]
fn a_thousand_single_events_start_before_a_million_goes_on() {
    let mut queue = waiting(&[("million", 0)]);
    for tenant in 0..1000 {
        queue.found(pair("single", &tenant.to_string()), ANN, 50 * SECOND);
    }
    let mut now = 60 * SECOND;
    assert_eq!(start(&mut queue, ANN), "million");
    assert!(!queue.applied(only("million"), ANN, true, now));
    for _ in 0..1000 {
        now += SECOND / 100;
        let single = queue.start(ANN).filter(|pair| pair.projection == "single");
        assert!(single.is_some_and(|pair| !queue.applied(pair, ANN, false, now)));
    }
    assert_eq!(start(&mut queue, ANN), "million");
}

#[test]
fn each_owner_has_a_line_and_the_one_that_waits_longest_is_first() {
    let mut queue = waiting(&[("a1", 20), ("a2", 30)]);
    queue.found(only("b1"), BOB, 10);
    assert_eq!(owners(&queue), [(BOB, 1), (ANN, 2)]);
    assert_eq!(start(&mut queue, ANN), "a1");
    assert_eq!(start(&mut queue, BOB), "b1");
    assert_eq!(owners(&queue), [(ANN, 1)]);
    assert_eq!(queue.start(BOB), None);
}

#[test]
fn a_pair_that_was_given_to_another_owner_waits_in_that_ones_line() {
    let mut queue = waiting(&[("p", 10)]);
    queue.found(only("p"), BOB, 10);
    assert_eq!(owners(&queue), [(BOB, 1)]);
    assert_eq!(queue.start(ANN), None);
    assert_eq!(start(&mut queue, BOB), "p");
}

#[test]
fn a_pair_that_is_running_is_in_no_line() {
    let mut queue = waiting(&[("p", 10)]);
    assert_eq!(start(&mut queue, ANN), "p");
    queue.found(only("p"), ANN, 10);
    queue.found(only("p"), BOB, 10);
    assert_eq!(owners(&queue), []);
}

#[test]
fn what_happens_in_the_tenant_of_a_running_pair_is_looked_up_after_it() {
    for (touched, looks) in [
        (Some("t"), true),
        (None, true),
        (Some("another"), false),
        (Some(""), false),
    ] {
        let mut queue = Queue::default();
        queue.found(pair("p", "t"), ANN, 10);
        let started = queue.start(ANN);
        queue.touch(touched);
        assert_eq!(started, Some(pair("p", "t")));
        assert_eq!(
            queue.applied(pair("p", "t"), ANN, false, 20),
            looks,
            "{touched:?}"
        );
    }
}

#[test]
fn a_pair_with_more_to_apply_is_in_line_already_and_not_looked_up() {
    let mut queue = waiting(&[("p", 10)]);
    assert_eq!(start(&mut queue, ANN), "p");
    queue.touch(None);
    assert!(!queue.applied(only("p"), ANN, true, 20));
    assert_eq!(start(&mut queue, ANN), "p");
}

#[test]
fn what_happened_before_a_pair_started_does_not_count() {
    let mut queue = waiting(&[("p", 10)]);
    queue.touch(None);
    assert_eq!(start(&mut queue, ANN), "p");
    assert!(!queue.applied(only("p"), ANN, false, 20));
    queue.found(only("p"), ANN, 30);
    assert_eq!(start(&mut queue, ANN), "p");
    assert!(
        !queue.applied(only("p"), ANN, false, 40),
        "nor for a later batch"
    );
}

/// A queue in which these have applied all there was.
fn settled(projections: &[&str]) -> Queue {
    let mut queue = Queue::default();
    for projection in projections {
        queue.found(only(projection), ANN, 10);
        assert_eq!(start(&mut queue, ANN), *projection);
        assert!(!queue.applied(only(projection), ANN, false, 20));
        queue.settle(only(projection), ANN);
    }
    queue
}

#[test]
fn pairs_with_nothing_left_are_in_line_at_the_next_push() {
    let mut queue = settled(&["p", "q"]);
    assert!(queue.pushed("", 2, 30));
    assert_eq!(start_all(&mut queue, ANN), ["p", "q"]);
    assert!(queue.pushed("", 2, 40), "those that are running are known");
}

#[test]
fn what_is_due_is_looked_up_where_a_projection_is_not_known() {
    let mut queue = settled(&["p"]);
    assert!(!queue.pushed("another", 1, 30));
    assert!(!queue.pushed("", 2, 30));
    assert_eq!(owners(&queue), []);
    assert!(!queue.pushed("", 1, 30), "the look decides, and none came");
    queue.settle(only("p"), ANN);
    queue.settle_nothing();
    assert!(!queue.pushed("", 1, 30));
}

#[test]
fn a_pair_that_was_found_again_is_not_counted_twice() {
    let mut queue = settled(&["p"]);
    queue.found(only("p"), ANN, 30);
    assert!(!queue.pushed("", 2, 40));
    assert!(queue.pushed("", 1, 40));
    assert_eq!(owners(&queue), [(ANN, 1)]);
}

#[test]
fn no_more_than_so_many_tenants_are_remembered() {
    let mut queue = Queue::default();
    for n in 0..1000 {
        queue.settle(pair("p", &n.to_string()), ANN);
    }
    let known = (0..1000).filter(|n| queue.pushed(&n.to_string(), 1, 10));
    assert!((1..=256).contains(&known.count()));
}

#[test]
fn a_pair_that_rests_is_in_no_line_until_its_time_is_over() {
    let mut queue = waiting(&[("p", 10)]);
    let now = Instant::now();
    let until = now + Duration::from_secs(5);
    assert_eq!(start(&mut queue, ANN), "p");
    queue.rest(only("p"), until);
    queue.found(only("p"), ANN, 10);
    assert_eq!(owners(&queue), []);
    assert_eq!(queue.next_rested(), Some(until));
    assert!(queue.rested(until - Duration::from_millis(1), 0).is_empty());
    assert_eq!(queue.rested(until, 0), [""]);
    assert_eq!(queue.next_rested(), None);
    queue.found(only("p"), ANN, 10);
    assert_eq!(start(&mut queue, ANN), "p");
}

#[test]
fn the_tenants_of_rests_that_are_over_are_told_and_no_others() {
    let mut queue = Queue::default();
    let now = Instant::now();
    for (tenant, seconds) in [("late", 3), ("soon", 1), ("later", 4), ("next", 2)] {
        queue.rest(pair("p", tenant), now + Duration::from_secs(seconds));
    }
    assert_eq!(queue.next_rested(), Some(now + Duration::from_secs(1)));
    assert_eq!(
        queue.rested(now + Duration::from_secs(2), 0),
        ["soon", "next"]
    );
    assert_eq!(queue.next_rested(), Some(now + Duration::from_secs(3)));
}

#[test]
fn a_pair_that_waits_can_be_put_to_rest_and_a_later_rest_replaces_the_first() {
    let mut queue = waiting(&[("p", 10)]);
    let now = Instant::now();
    queue.rest_at_least(only("p"), now + Duration::from_secs(1));
    queue.rest_at_least(only("p"), now + Duration::from_secs(2));
    assert_eq!(owners(&queue), []);
    assert!(queue.rested(now + Duration::from_secs(1), 0).is_empty());
    assert_eq!(queue.rested(now + Duration::from_secs(2), 0), [""]);
}

#[test]
fn a_look_does_not_shorten_a_rest() {
    let mut queue = waiting(&[("p", 10)]);
    let now = Instant::now();
    assert_eq!(start(&mut queue, ANN), "p");
    let rest = queue.failed(only("p"), now);
    queue.rest_at_least(only("p"), now);
    assert!(queue.rested(now + rest / 2, 0).is_empty());
    assert_eq!(queue.rested(now + rest, 0), [""]);
}

#[test]
fn a_pair_that_stands_back_is_not_fresh_until_its_time_is_over() {
    let mut queue = waiting(&[("p", 10), ("q", 20)]);
    assert_eq!(queue.lines(SECOND)[0].fresh, 2);
    assert_eq!(start(&mut queue, ANN), "p");
    assert!(!queue.applied(only("p"), ANN, true, SECOND));
    assert_eq!(queue.lines(SECOND)[0].fresh, 1);
    assert!(queue.has_fresh(SECOND, 1) && !queue.has_fresh(SECOND, 2));
    assert!(queue.has_fresh(11 * SECOND, 2));
}

#[test]
fn a_line_tells_how_many_wait_and_how_many_of_these_are_fresh() {
    let mut queue = waiting(&[("p", 10), ("q", 20)]);
    queue.found(only("r"), BOB, 30);
    assert!(queue.has_fresh(SECOND, 3) && !queue.has_fresh(SECOND, 4));
    assert_eq!(start(&mut queue, ANN), "p");
    assert!(!queue.applied(only("p"), ANN, true, SECOND));
    let line = |owner, since, waiting, fresh| Line {
        since,
        owner,
        waiting,
        fresh,
    };
    assert_eq!(
        queue.lines(SECOND),
        [line(ANN, 20, 2, 1), line(BOB, 30, 1, 1)]
    );
}

#[test]
fn no_more_pairs_are_counted_as_fresh_than_there_can_be_workers() {
    let mut queue = Queue::default();
    for tenant in 0..=MOST {
        queue.found(pair("p", &tenant.to_string()), ANN, 10);
    }
    let line = queue.lines(SECOND)[0];
    assert_eq!((line.waiting, line.fresh), (MOST + 1, MOST));
}

#[test]
fn a_pair_that_is_running_is_not_put_to_rest_by_what_a_look_finds() {
    let mut queue = waiting(&[("p", 10)]);
    assert_eq!(start(&mut queue, ANN), "p");
    queue.touch(None);
    queue.rest_at_least(only("p"), Instant::now());
    assert_eq!(queue.next_rested(), None);
    assert!(
        queue.applied(only("p"), ANN, false, 20),
        "it was still running"
    );
}

#[test]
fn a_pair_that_failed_stands_behind_those_that_came_while_it_rested() {
    let mut queue = waiting(&[("fails", 10)]);
    let now = Instant::now();
    assert_eq!(start(&mut queue, ANN), "fails");
    queue.rest(only("fails"), now);
    queue.found(only("new"), ANN, 50);
    assert_eq!(queue.rested(now, 60), [""]);
    queue.found(only("fails"), ANN, 10);
    queue.found(only("newer"), ANN, 70);
    assert_eq!(start_all(&mut queue, ANN), ["new", "fails", "newer"]);
}

#[test]
fn all_rests_end_when_what_they_waited_for_may_be_mended() {
    let mut queue = Queue::default();
    let now = Instant::now();
    queue.failed(only("a"), now);
    queue.rest(only("b"), now + Duration::from_secs(300));
    queue.end_rests();
    assert_eq!(queue.next_rested(), None);
    queue.found(only("a"), ANN, 10);
    queue.found(only("b"), ANN, 20);
    assert_eq!(start_all(&mut queue, ANN), ["a", "b"]);
}

#[test]
fn each_failure_in_a_row_doubles_the_rest_up_to_five_minutes() {
    let mut queue = Queue::default();
    let now = Instant::now();
    let fail = |queue: &mut Queue| {
        let rest = queue.failed(only("p"), now);
        assert_eq!(queue.next_rested(), Some(now + rest));
        rest.as_secs()
    };
    let rests: Vec<u64> = (0..11).map(|_| fail(&mut queue)).collect();
    assert_eq!(rests, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
    assert!((0..100).all(|_| fail(&mut queue) == 300));
}

#[test]
fn the_end_of_a_rest_does_not_forgive_and_a_batch_that_is_applied_does() {
    let mut queue = Queue::default();
    let now = Instant::now();
    assert_eq!(queue.failed(only("p"), now).as_secs(), 1);
    assert_eq!(queue.rested(now + Duration::from_secs(1), 0), [""]);
    assert_eq!(queue.failed(only("p"), now).as_secs(), 2);
    queue.end_rests();
    assert_eq!(queue.failed(only("p"), now).as_secs(), 4);
    assert_eq!(queue.failed(only("another"), now).as_secs(), 1);
    queue.end_rests();
    queue.found(only("p"), ANN, 10);
    assert_eq!(start(&mut queue, ANN), "p");
    assert!(!queue.applied(only("p"), ANN, false, 20));
    assert_eq!(queue.failed(only("p"), now).as_secs(), 1);
}

#[test]
fn a_pair_that_waits_and_is_due_no_more_leaves_its_line() {
    let mut queue = waiting(&[("running", 1), ("stays", 10), ("goes", 20)]);
    assert_eq!(start(&mut queue, ANN), "running");
    let until = Instant::now();
    queue.rest(only("rests"), until);
    queue.touch(None);
    queue.keep_waiting(|pair| pair.projection == "stays");
    assert_eq!(owners(&queue), [(ANN, 1)]);
    assert_eq!(start_all(&mut queue, ANN), ["stays"]);
    assert_eq!(queue.next_rested(), Some(until));
    assert!(queue.applied(only("running"), ANN, false, 30));
}

#[test]
fn a_pair_that_is_forgotten_is_in_no_line_and_may_be_found_anew() {
    let mut queue = waiting(&[("waits", 10), ("rests", 20), ("runs", 5)]);
    assert_eq!(start(&mut queue, ANN), "runs");
    queue.rest(only("rests"), Instant::now());
    for name in ["waits", "rests", "runs"] {
        queue.forget(&only(name));
    }
    assert_eq!((owners(&queue), queue.next_rested()), (vec![], None));
    queue.found(only("runs"), ANN, 10);
    assert_eq!(start_all(&mut queue, ANN), ["runs"]);
}
