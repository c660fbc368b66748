//! The generation registry, inside one transaction.

#[pgrx::pg_schema]
mod tests {
    use crate::support::*;
    use pgrx::prelude::*;

    /// A resource r at generation 5, which a and b hold; c holds 3.
    fn registry() {
        run("SELECT lockstep.resource_create('r', '{a,b,c}')");
        run("SELECT lockstep.generation_set('r', 'c', 3)");
        run("SELECT lockstep.generation_set('r', 'a', 5), lockstep.generation_set('r', 'b', 5)");
    }

    fn word(call: &str) -> String {
        one(&format!("SELECT lockstep.{call}"))
    }

    fn generation() -> i64 {
        one("SELECT generation FROM lockstep.resources WHERE resource = 'r'")
    }

    /// The replicas with what they hold.
    fn held() -> String {
        list(
            "SELECT replica || COALESCE(generation::text, '-') FROM lockstep.replicas WHERE resource = 'r' ORDER BY replica",
        )
    }

    fn current() -> String {
        list("SELECT generation_current FROM lockstep.generation_current('r')")
    }

    fn due() -> String {
        list("SELECT target FROM lockstep.replicas_due() ORDER BY target")
    }

    fn state(replica: &str) -> String {
        one(&format!(
            "SELECT state FROM lockstep.replica_status WHERE resource = 'r' AND replica = '{replica}'"
        ))
    }

    /// Begins a sync and returns its status and its token, 0 without one.
    fn begin(arguments: &str) -> (String, i64) {
        let begun = one::<Vec<Option<String>>>(&format!(
            "SELECT ARRAY[status, token::text] FROM lockstep.replica_sync_begin({arguments})"
        ));
        let mut begun = begun.into_iter();
        let status = begun.next().flatten().unwrap_or_default();
        let token = begun.next().flatten().and_then(|t| t.parse().ok());
        (status, token.unwrap_or_default())
    }

    fn started(arguments: &str) -> i64 {
        let (status, token) = begin(arguments);
        assert_eq!(status, "started");
        token
    }

    fn finish(target: &str, token: i64) -> String {
        word(&format!("replica_sync_finish('r', '{target}', {token})"))
    }

    /// As if the claim had been made long ago.
    fn expire(replica: &str) {
        run(&format!(
            "UPDATE lockstep.replicas SET sync_expires_at = now() - interval '1 s' WHERE replica = '{replica}' AND sync_token IS NOT NULL"
        ));
    }

    fn state_of_error(statement: &str) -> (String, String) {
        let error = raised(statement);
        (error.sqlstate, error.detail)
    }

    #[pg_test]
    fn a_resource_is_created_at_generation_0_with_current_replicas() {
        let incarnation: i64 = one("SELECT lockstep.resource_create('r', '{b,a,b}')");
        assert_eq!((generation(), held().as_str()), (0, "a0,b0"));
        assert_eq!((current(), due()), ("a,b".into(), "".into()));
        assert_eq!(
            one::<i64>("SELECT incarnation FROM lockstep.resources"),
            incarnation
        );
    }

    #[pg_test]
    fn a_resource_that_is_there_is_not_created_again() {
        let incarnation: i64 = one("SELECT lockstep.resource_create('r')");
        assert_eq!(
            state_of_error("SELECT lockstep.resource_create('r', '{a}')"),
            (
                "42710".into(),
                format!("Actual incarnation {incarnation}, expected none.")
            )
        );
        assert_eq!(held(), "");
    }

    #[pg_test]
    fn a_resource_that_is_created_again_has_a_greater_incarnation() {
        let first: i64 = one("SELECT lockstep.resource_create('r', '{a}')");
        run("SELECT lockstep.generation_increment('r')");
        assert!(one::<bool>("SELECT lockstep.resource_delete('r')"));
        assert!(!one::<bool>("SELECT lockstep.resource_delete('r')"));
        assert_eq!((held(), current()), ("".into(), "".into()));
        let second: i64 = one("SELECT lockstep.resource_create('r', '{b}')");
        assert!(second > first);
        assert_eq!((generation(), held().as_str()), (0, "b0"));
        run("SELECT lockstep.resource_delete('r')");
        assert_eq!(one::<i64>("SELECT lockstep.resource_purge('0')"), 1);
        assert!(one::<i64>("SELECT lockstep.resource_create('r')") > second);
    }

    #[pg_test]
    fn what_was_never_there_is_not_deleted() {
        assert!(!one::<bool>("SELECT lockstep.resource_delete('r')"));
        assert!(!one::<bool>("SELECT lockstep.replica_delete('r', 'a')"));
        assert!(!one::<bool>("SELECT lockstep.replica_invalidate('r', 'a')"));
        run("SELECT lockstep.resource_create('r', '{a}')");
        assert!(!one::<bool>("SELECT lockstep.replica_delete('r', 'b')"));
        assert!(!one::<bool>("SELECT lockstep.replica_invalidate('r', 'b')"));
        assert_eq!(current(), "a");
    }

    #[pg_test]
    fn an_increment_is_followed_by_current_named_replicas_only() {
        registry();
        assert_eq!(
            one::<i64>("SELECT lockstep.generation_increment('r', '{a,c}')"),
            6
        );
        assert_eq!((generation(), held().as_str()), (6, "a6,b5,c3"));
        assert_eq!((current(), due()), ("a".into(), "b,c".into()));
    }

    #[pg_test]
    fn an_increment_without_names_outdates_every_replica() {
        registry();
        assert_eq!(one::<i64>("SELECT lockstep.generation_increment('r')"), 6);
        assert_eq!((generation(), held().as_str()), (6, "a5,b5,c3"));
        assert_eq!((current(), due()), ("".into(), "a,b,c".into()));
    }

    #[pg_test]
    fn an_increment_of_outdated_replicas_is_ls005_and_changes_nothing() {
        registry();
        for (named, actual) in [("{c}", "c 3"), ("{c,x}", "c 3, x none"), ("{}", "none")] {
            assert_eq!(
                state_of_error(&format!(
                    "SELECT lockstep.generation_increment('r', '{named}')"
                )),
                (
                    "LS005".into(),
                    format!("Actual generations {actual}, expected 5.")
                )
            );
        }
        assert_eq!((generation(), held().as_str()), (5, "a5,b5,c3"));
    }

    #[pg_test]
    fn an_increment_creates_no_row_for_a_ghost_replica() {
        registry();
        run("SELECT lockstep.generation_increment('r', '{a,ghost}')");
        assert_eq!(held(), "a6,b5,c3");
    }

    #[pg_test]
    fn an_increment_of_an_unknown_or_deleted_resource_is_42704() {
        for call in [
            "generation_increment('r')",
            "generation_increment('r', '{a}')",
            "generation_set('r', 'a', 1)",
            "generation_replicated('r', 'a', 'b')",
            "generation_current('r')",
            "replica_make_authoritative('r', 'a')",
            "replica_sync_begin('r', 'a', 'w')",
        ] {
            assert_eq!(
                sqlstate(&format!("SELECT lockstep.{call}")),
                "42704",
                "{call}"
            );
        }
        registry();
        run("SELECT lockstep.resource_delete('r')");
        for call in [
            "generation_increment('r')",
            "generation_increment('r', '{a}')",
            "generation_replicated('r', 'a', 'b')",
            "replica_make_authoritative('r', 'a')",
        ] {
            assert_eq!(
                state_of_error(&format!("SELECT lockstep.{call}")),
                ("42704".into(), "It was deleted.".into()),
                "{call}"
            );
        }
    }

    #[pg_test]
    fn a_set_applies_what_is_newer_and_leaves_what_is_as_new() {
        registry();
        assert_eq!(word("generation_set('r', 'c', 4)"), "applied");
        assert_eq!(word("generation_set('r', 'c', 4)"), "unchanged");
        assert_eq!((held(), due()), ("a5,b5,c4".into(), "c".into()));
        assert_eq!(word("generation_set('r', 'c', 5)"), "applied");
        assert_eq!((current(), due()), ("a,b,c".into(), "".into()));
    }

    #[pg_test]
    fn a_set_refuses_a_downgrade_and_the_stored_value_is_untouched() {
        registry();
        run("UPDATE lockstep.replicas SET synced_at = 'epoch'");
        assert_eq!(word("generation_set('r', 'a', 4)"), "downgrade");
        assert_eq!((held(), due()), ("a5,b5,c3".into(), "c".into()));
        assert!(one::<bool>(
            "SELECT bool_and(synced_at = 'epoch') FROM lockstep.replicas"
        ));
    }

    #[pg_test]
    fn a_forced_set_goes_back_and_the_replica_is_due() {
        registry();
        assert_eq!(
            word("generation_set('r', 'a', 4, force => true)"),
            "applied"
        );
        assert_eq!(
            word("generation_set('r', 'a', 4, force => true)"),
            "unchanged"
        );
        assert_eq!((generation(), held().as_str()), (5, "a4,b5,c3"));
        assert_eq!((current(), due()), ("b".into(), "a,c".into()));
    }

    #[pg_test]
    fn a_set_above_the_resource_raises_it_and_outdates_the_others() {
        registry();
        assert_eq!(word("generation_set('r', 'c', 9)"), "applied");
        assert_eq!((generation(), held().as_str()), (9, "a5,b5,c9"));
        assert_eq!((current(), due()), ("c".into(), "a,b".into()));
    }

    #[pg_test]
    fn a_set_adds_a_replica_that_was_not_there() {
        registry();
        assert_eq!(word("generation_set('r', 'd', 5)"), "applied");
        assert_eq!(word("generation_set('r', 'e', 0)"), "applied");
        assert_eq!((held(), due()), ("a5,b5,c3,d5,e0".into(), "c,e".into()));
    }

    #[pg_test]
    fn a_set_of_another_incarnation_or_of_a_tombstone_is_gone() {
        let incarnation: i64 = one("SELECT lockstep.resource_create('r', '{a}')");
        let set = |incarnation: i64| {
            word(&format!(
                "generation_set('r', 'a', 7, incarnation => {incarnation})"
            ))
        };
        assert_eq!(set(incarnation - 1), "gone");
        assert_eq!(set(incarnation), "applied");
        run("SELECT lockstep.resource_delete('r')");
        assert_eq!(set(incarnation), "gone");
        assert_eq!(word("generation_set('r', 'a', 7)"), "gone");
        run("SELECT lockstep.resource_create('r', '{a}')");
        assert_eq!((set(incarnation), held()), ("gone".into(), "a0".into()));
        run("SELECT lockstep.resource_delete('r'), lockstep.resource_purge('0')");
        assert_eq!(set(incarnation), "gone");
        assert_eq!(one::<i64>("SELECT count(*) FROM lockstep.replicas"), 0);
    }

    #[pg_test]
    fn a_generation_below_0_is_22023() {
        registry();
        assert_eq!(
            sqlstate("SELECT lockstep.generation_set('r', 'a', -1)"),
            "22023"
        );
    }

    #[pg_test]
    fn replicated_is_the_source_unless_the_target_is_not_behind() {
        registry();
        run("SELECT * FROM lockstep.replica_sync_begin('r', 'd', 'w')");
        let replicated = |source: &str, target: &str| {
            format!("SELECT lockstep.generation_replicated('r', '{source}', '{target}')")
        };
        for target in ["c", "d", "unknown"] {
            assert_eq!(one::<i64>(&replicated("a", target)), 5, "{target}");
        }
        assert!(one::<bool>(&format!(
            "SELECT ({}) IS NULL",
            replicated("d", "unknown")
        )));
        assert!(one::<bool>(&format!(
            "SELECT ({}) IS NULL",
            replicated("unknown", "unknown")
        )));
        for (source, target, detail) in [
            ("a", "b", "Target generation 5, source generation 5."),
            ("c", "a", "Target generation 5, source generation 3."),
            (
                "unknown",
                "a",
                "Target generation 5, source generation none.",
            ),
        ] {
            assert_eq!(
                state_of_error(&replicated(source, target)),
                ("LS004".into(), detail.into())
            );
        }
    }

    #[pg_test]
    fn making_a_replica_authoritative_leaves_it_alone_current() {
        registry();
        assert_eq!(
            one::<i64>("SELECT lockstep.replica_make_authoritative('r', 'c')"),
            6
        );
        assert_eq!((held(), current()), ("a5,b5,c6".into(), "c".into()));
        assert_eq!(due(), "a,b");
        assert_eq!(
            sqlstate("SELECT lockstep.replica_make_authoritative('r', 'ghost')"),
            "42704"
        );
        assert_eq!((generation(), held().as_str()), (6, "a5,b5,c6"));
    }

    #[pg_test]
    fn an_invalid_replica_leaves_and_the_resource_with_the_last() {
        run("SELECT lockstep.resource_create('r', '{a,b}')");
        assert!(one::<bool>("SELECT lockstep.replica_invalidate('r', 'a')"));
        assert_eq!(current(), "b");
        assert!(one::<bool>("SELECT lockstep.replica_invalidate('r', 'b')"));
        assert_eq!(begin("'r', 'a', 'w'").0, "gone");
        assert!(one::<bool>(
            "SELECT deleted_at IS NOT NULL FROM lockstep.resources"
        ));
    }

    #[pg_test]
    fn a_deleted_last_replica_leaves_the_resource() {
        run("SELECT lockstep.resource_create('r', '{a}')");
        assert!(one::<bool>("SELECT lockstep.replica_delete('r', 'a')"));
        assert_eq!((held(), generation()), ("".into(), 0));
        assert!(one::<bool>(
            "SELECT deleted_at IS NULL FROM lockstep.resources"
        ));
    }

    #[pg_test]
    fn a_sync_makes_its_target_current() {
        registry();
        let token = started("'r', 'c', 'w', 'a'");
        assert_eq!((state("c"), due()), ("syncing".into(), "".into()));
        assert_eq!(finish("c", token), "current");
        assert_eq!((held(), current()), ("a5,b5,c5".into(), "a,b,c".into()));
        assert_eq!((state("c"), due()), ("current".into(), "".into()));
        assert_eq!(finish("c", token), "lost");
    }

    #[pg_test]
    fn a_sync_that_begins_hands_out_incarnation_and_generation() {
        registry();
        assert_eq!(
            list(
                "SELECT (b.status, b.incarnation = r.incarnation, b.generation)
                  FROM lockstep.resources AS r, lockstep.replica_sync_begin('r', 'c', 'w') AS b"
            ),
            "(started,t,5)"
        );
        assert_eq!(
            list(
                "SELECT (b.status, b.token, b.incarnation = r.incarnation, b.generation)
                  FROM lockstep.resources AS r, lockstep.replica_sync_begin('r', 'a', 'w') AS b"
            ),
            "(current,,t,5)"
        );
    }

    #[pg_test]
    fn a_sync_adds_a_target_that_was_not_there() {
        registry();
        let token = started("'r', 'd', 'w'");
        assert_eq!(held(), "a5,b5,c3,d-");
        assert_eq!(finish("d", token), "current");
        assert_eq!(held(), "a5,b5,c3,d5");
    }

    #[pg_test]
    fn a_live_claim_is_busy_and_an_expired_one_is_taken_over() {
        registry();
        let first = started("'r', 'c', 'w1'");
        assert_eq!(begin("'r', 'c', 'w2'").0, "busy");
        assert_eq!(begin("'r', 'c', 'w1'").0, "busy");
        expire("c");
        let second = started("'r', 'c', 'w2'");
        assert!(second > first);
        assert_eq!(finish("c", first), "lost");
        assert_eq!(state("c"), "syncing");
        assert_eq!(finish("c", second), "current");
    }

    #[pg_test]
    fn an_expired_claim_that_nobody_took_over_counts() {
        registry();
        let token = started("'r', 'c', 'w'");
        expire("c");
        assert_eq!((state("c"), due()), ("outdated".into(), "c".into()));
        assert!(one::<bool>(&format!(
            "SELECT lockstep.replica_sync_renew('r', 'c', {token})"
        )));
        assert_eq!((state("c"), due()), ("syncing".into(), "".into()));
        expire("c");
        assert_eq!(finish("c", token), "current");
    }

    #[pg_test]
    fn a_claim_is_renewed_by_its_token_only() {
        registry();
        let token = started("'r', 'c', 'w', ttl => '1 s'");
        let renew = |token: i64| {
            one::<bool>(&format!(
                "SELECT lockstep.replica_sync_renew('r', 'c', {token}, '1 hour')"
            ))
        };
        assert!(!renew(token + 1));
        assert!(renew(token));
        assert!(one::<bool>(
            "SELECT sync_expires_at > now() + interval '59 min' FROM lockstep.replicas WHERE replica = 'c'"
        ));
        run("SELECT lockstep.resource_delete('r')");
        assert!(!renew(token));
        run("SELECT lockstep.resource_create('r', '{c}')");
        assert!(!renew(token));
    }

    #[pg_test]
    fn a_source_that_is_not_current_is_ls006() {
        registry();
        for (source, actual) in [("c", "3"), ("ghost", "none")] {
            assert_eq!(
                state_of_error(&format!(
                    "SELECT lockstep.replica_sync_begin('r', 'd', 'w', '{source}')"
                )),
                (
                    "LS006".into(),
                    format!("Actual generation {actual}, expected 5.")
                )
            );
        }
        assert_eq!(held(), "a5,b5,c3");
    }

    #[pg_test]
    fn a_change_during_the_sync_leaves_the_target_outdated() {
        registry();
        let token = started("'r', 'c', 'w'");
        run("SELECT lockstep.generation_increment('r')");
        assert_eq!(finish("c", token), "outdated");
        assert_eq!((held(), due()), ("a5,b5,c5".into(), "a,b,c".into()));
        let token = started("'r', 'c', 'w'");
        assert_eq!(
            (finish("c", token), current()),
            ("current".into(), "c".into())
        );
    }

    #[pg_test]
    fn a_change_that_the_source_follows_leaves_the_target_outdated() {
        registry();
        let token = started("'r', 'c', 'w', 'a'");
        run("SELECT lockstep.generation_increment('r', '{a}')");
        assert_eq!(
            (finish("c", token), held()),
            ("outdated".into(), "a6,b5,c5".into())
        );
    }

    #[pg_test]
    fn a_finish_does_not_take_back_what_was_recorded_meanwhile() {
        registry();
        let token = started("'r', 'c', 'w'");
        run("SELECT lockstep.generation_set('r', 'c', 8)");
        assert_eq!(
            (finish("c", token), held()),
            ("current".into(), "a5,b5,c8".into())
        );
    }

    #[pg_test]
    fn a_delete_during_the_sync_is_gone_and_no_row_comes_back() {
        registry();
        let token = started("'r', 'c', 'w'");
        run("SELECT lockstep.resource_delete('r')");
        assert_eq!(begin("'r', 'c', 'w'").0, "gone");
        assert_eq!(finish("c", token), "gone");
        assert_eq!((held(), current()), ("".into(), "".into()));
        assert_eq!(finish("c", token), "gone");
    }

    #[pg_test]
    fn a_new_incarnation_is_not_touched_by_a_sync_of_the_old_one() {
        registry();
        let token = started("'r', 'c', 'w'");
        run("SELECT lockstep.resource_delete('r')");
        run("SELECT lockstep.resource_create('r', '{a}')");
        run("SELECT lockstep.generation_increment('r', '{a}')");
        let second = started("'r', 'c', 'w2'");
        assert_eq!(finish("c", token), "gone");
        assert_eq!((held(), state("c")), ("a1,c-".into(), "syncing".into()));
        assert_eq!(
            (finish("c", second), held()),
            ("current".into(), "a1,c1".into())
        );
    }

    #[pg_test]
    fn a_sync_outlives_neither_its_resource_nor_the_purge_of_it() {
        registry();
        let token = started("'r', 'c', 'w'");
        run("SELECT lockstep.resource_delete('r')");
        expire("c");
        assert_eq!(one::<i64>("SELECT lockstep.resource_purge('0')"), 1);
        assert_eq!(finish("c", token), "gone");
        assert_eq!(one::<i64>("SELECT count(*) FROM lockstep.replicas"), 0);
    }

    #[pg_test]
    fn a_replica_deleted_during_the_sync_is_gone() {
        for call in ["replica_delete('r', 'c')", "replica_invalidate('r', 'c')"] {
            registry();
            let token = started("'r', 'c', 'w'");
            run(&format!("SELECT lockstep.{call}"));
            assert_eq!(
                (finish("c", token), held()),
                ("gone".into(), "a5,b5".into())
            );
            run("SELECT lockstep.resource_delete('r')");
        }
    }

    #[pg_test]
    fn a_replica_made_authoritative_during_the_sync_is_alone_current() {
        registry();
        let token = started("'r', 'c', 'w'");
        run("SELECT lockstep.replica_make_authoritative('r', 'b')");
        assert_eq!(
            (finish("c", token), current()),
            ("outdated".into(), "b".into())
        );
        let token = started("'r', 'c', 'w', 'b'");
        run("SELECT lockstep.replica_make_authoritative('r', 'a')");
        assert_eq!(
            (finish("c", token), current()),
            ("source_lost".into(), "a".into())
        );
        let token = started("'r', 'c', 'w', 'a'");
        run("SELECT lockstep.replica_make_authoritative('r', 'c')");
        assert_eq!((finish("c", token), current()), ("lost".into(), "c".into()));
    }

    #[pg_test]
    fn a_source_that_falls_behind_during_the_sync_is_lost() {
        registry();
        for change in [
            "generation_increment('r')",
            "generation_set('r', 'b', 20)",
            "replica_make_authoritative('r', 'b')",
        ] {
            run("SELECT lockstep.replica_make_authoritative('r', 'a')");
            let token = started("'r', 'c', 'w', 'a'");
            run(&format!("SELECT lockstep.{change}"));
            assert_eq!(finish("c", token), "source_lost", "{change}");
            assert_eq!(
                (state("c"), held().contains("c3")),
                ("outdated".into(), true)
            );
        }
    }

    #[pg_test]
    fn a_source_that_proved_bad_is_lost_even_if_it_is_current_again() {
        for change in [
            "replica_invalidate('r', 'a')",
            "replica_delete('r', 'a')",
            "generation_set('r', 'a', 2, force => true)",
        ] {
            registry();
            let token = started("'r', 'c', 'w', 'a'");
            run(&format!("SELECT lockstep.{change}"));
            run("SELECT lockstep.generation_set('r', 'a', 5)");
            assert_eq!(current(), "a,b");
            assert_eq!(finish("c", token), "source_lost", "{change}");
            assert_eq!((current(), due()), ("a,b".into(), "c".into()));
            let token = started("'r', 'c', 'w', 'a'");
            assert_eq!(finish("c", token), "current");
            run("SELECT lockstep.resource_delete('r')");
        }
    }

    #[pg_test]
    fn a_failed_sync_backs_off_from_1_s_to_1_hour() {
        registry();
        for failure in 1..=14 {
            let token = started("'r', 'c', 'w'");
            assert_eq!(
                word(&format!(
                    "replica_sync_finish('r', 'c', {token}, 'no {failure}')"
                )),
                "failed"
            );
            let seconds = (1 << (failure - 1)).min(2880);
            let wait: f64 = one(
                "SELECT extract(epoch FROM retry_at - clock_timestamp())::float8 FROM lockstep.replicas WHERE replica = 'c'",
            );
            let least = f64::from(seconds);
            assert!(
                wait > least - 0.5 && wait < least * 1.25,
                "{failure}: {wait}"
            );
            assert_eq!(
                (begin("'r', 'c', 'w'").0, state("c")),
                ("backoff".into(), "backoff".into())
            );
            assert_eq!(due(), "");
            assert_eq!(
                list(
                    "SELECT (retry_count, last_error, missing_at_source) FROM lockstep.replica_status WHERE replica = 'c'"
                ),
                format!("({failure},\"no {failure}\",f)")
            );
            run(
                "UPDATE lockstep.replicas SET retry_at = now(), due_at = now() WHERE replica = 'c'",
            );
        }
        let token = started("'r', 'c', 'w'");
        assert_eq!(finish("c", token), "current");
        assert_eq!(
            list(
                "SELECT (retry_count, retry_at, last_error) FROM lockstep.replicas WHERE replica = 'c'"
            ),
            "(0,,)"
        );
    }

    #[pg_test]
    fn what_fails_together_is_not_tried_together() {
        run("SELECT lockstep.resource_create(n::text) FROM generate_series(1, 20) AS n");
        run(
            "SELECT lockstep.replica_sync_finish(n::text, 'a', b.token, 'no')
             FROM generate_series(1, 20) AS n, lockstep.replica_sync_begin(n::text, 'a', 'w') AS b",
        );
        assert!(one::<bool>(
            "SELECT max(retry_at) - min(retry_at) > interval '50 ms' FROM lockstep.replicas"
        ));
    }

    #[pg_test]
    fn what_is_missing_at_the_source_is_tried_again_after_4_hours() {
        registry();
        let token = started("'r', 'c', 'w'");
        assert_eq!(
            word(&format!(
                "replica_sync_finish('r', 'c', {token}, missing_at_source => true)"
            )),
            "missing"
        );
        assert!(one::<bool>(
            "SELECT retry_at - clock_timestamp() BETWEEN interval '3:59' AND interval '4:13' AND missing_at_source
             FROM lockstep.replicas WHERE replica = 'c'"
        ));
        assert_eq!(
            (begin("'r', 'c', 'w'").0, due()),
            ("backoff".into(), "".into())
        );
        assert_eq!(held(), "a5,b5,c3");
    }

    #[pg_test]
    fn a_change_ends_the_wait_for_what_was_missing_and_no_other() {
        registry();
        for (target, how) in [("c", "missing_at_source => true"), ("d", "error => 'no'")] {
            let token = started(&format!("'r', '{target}', 'w'"));
            run(&format!(
                "SELECT lockstep.replica_sync_finish('r', '{target}', {token}, {how})"
            ));
        }
        assert_eq!(due(), "");
        run("SELECT lockstep.generation_increment('r', '{a,b}')");
        assert_eq!(due(), "c");
        assert_eq!(state("d"), "backoff");
    }

    #[pg_test]
    fn a_purge_takes_old_tombstones_without_a_live_claim() {
        run("SELECT lockstep.resource_create(n) FROM unnest('{r,old,young,live}'::text[]) AS n");
        run("SELECT lockstep.resource_create('r', tenant => 'other')");
        run("SELECT lockstep.resource_delete('r', 'other')");
        let token = started("'r', 'c', 'w'");
        run("SELECT lockstep.resource_delete(n) FROM unnest('{r,old,young}'::text[]) AS n");
        run(
            "UPDATE lockstep.resources SET deleted_at = now() - interval '2 days' WHERE resource IN ('r', 'old') AND tenant = ''",
        );
        assert_eq!(one::<i64>("SELECT lockstep.resource_purge('1 day')"), 1);
        assert_eq!(
            list("SELECT resource FROM lockstep.resources ORDER BY 1"),
            "live,r,r,young"
        );
        assert_eq!(finish("c", token), "gone");
        assert_eq!(one::<i64>("SELECT lockstep.resource_purge('0')"), 2);
        assert_eq!(
            one::<i64>("SELECT lockstep.resource_purge('0', 'other')"),
            1
        );
        assert_eq!(list("SELECT resource FROM lockstep.resources"), "live");
    }

    #[pg_test]
    fn due_is_what_is_outdated_or_missing_oldest_first() {
        run(
            "SELECT lockstep.resource_create(n, '{a}') FROM unnest('{current,first,second,third,busy,failed}'::text[]) AS n",
        );
        run(
            "SELECT lockstep.generation_increment(n) FROM unnest('{third,second,first,busy,failed}'::text[]) AS n",
        );
        run(
            "UPDATE lockstep.replicas SET due_at = now() - interval '1 hour' WHERE resource = 'first'",
        );
        run(
            "UPDATE lockstep.replicas SET due_at = now() - interval '1 min' WHERE resource = 'second'",
        );
        run("SELECT * FROM lockstep.replica_sync_begin('busy', 'a', 'w')");
        run(
            "SELECT lockstep.replica_sync_finish('failed', 'a', b.token, 'no')
             FROM lockstep.replica_sync_begin('failed', 'a', 'w') AS b",
        );
        assert_eq!(
            list(
                "SELECT (resource, target, held_generation, generation) FROM lockstep.replicas_due()"
            ),
            "(first,a,0,1),(second,a,0,1),(third,a,0,1)"
        );
        assert_eq!(
            list("SELECT resource FROM lockstep.replicas_due(1)"),
            "first"
        );
        assert_eq!(
            list("SELECT resource FROM lockstep.replicas_due(tenant => 'other')"),
            ""
        );
    }

    #[pg_test]
    fn an_old_claim_that_expired_comes_before_younger_wishes() {
        run("SELECT lockstep.resource_create(n, '{a}') FROM unnest('{r,s}'::text[]) AS n");
        run("SELECT lockstep.generation_increment('r')");
        let first = started("'r', 'a', 'w'");
        run("SELECT lockstep.generation_increment('s')");
        assert_eq!(list("SELECT resource FROM lockstep.replicas_due()"), "s");
        expire("a");
        assert_eq!(list("SELECT resource FROM lockstep.replicas_due()"), "r,s");
        let second: i64 = one("SELECT token FROM lockstep.replica_sync_claim('w2', 1)");
        assert_eq!(
            (finish("a", first), finish("a", second)),
            ("lost".into(), "current".into())
        );
    }

    #[pg_test]
    fn a_claim_begins_what_is_due() {
        registry();
        run("SELECT lockstep.generation_increment('r', '{a}')");
        assert_eq!(
            list("SELECT (c.resource, c.target, c.incarnation = r.incarnation, c.generation, resource_tenant)
                  FROM lockstep.replica_sync_claim('w', 10, '1 hour') AS c JOIN lockstep.resources AS r USING (resource)"),
            "(r,c,t,6,\"\"),(r,b,t,6,\"\")"
        );
        assert_eq!(
            list("SELECT resource FROM lockstep.replica_sync_claim('w')"),
            ""
        );
        assert_eq!(
            list(
                "SELECT (replica, sync_holder, sync_expires_at > now() + interval '59 min')
                  FROM lockstep.replicas WHERE sync_token IS NOT NULL ORDER BY replica"
            ),
            "(b,w,t),(c,w,t)"
        );
    }

    #[pg_test]
    fn a_tenant_whose_syncs_are_running_does_not_hide_another() {
        for tenant in ["first", "second"] {
            run(&format!(
                "SELECT lockstep.resource_create('r', '{{a,b}}', '{tenant}'), lockstep.generation_increment('r', '{{a}}', '{tenant}')"
            ));
        }
        let claim =
            "SELECT resource_tenant FROM lockstep.replica_sync_claim('w', 1, '1 hour', NULL)";
        assert_eq!(list(claim), "first");
        assert_eq!(list(claim), "second");
        assert_eq!(list(claim), "");
    }

    #[pg_test]
    fn what_was_forced_down_during_a_sync_is_not_put_back_by_it() {
        registry();
        let token = started("'r', 'c', 'w'");
        run("SELECT lockstep.generation_set('r', 'c', 2, force => true)");
        assert_eq!(finish("c", token), "lost");
        assert_eq!(
            list("SELECT generation FROM lockstep.replicas WHERE replica = 'c'"),
            "2"
        );
    }

    #[pg_test]
    fn a_backoff_lasts_when_the_generation_is_raised_meanwhile() {
        registry();
        let token = started("'r', 'c', 'w'");
        run("SELECT lockstep.generation_set('r', 'c', 5)");
        run(&format!(
            "SELECT lockstep.replica_sync_finish('r', 'c', {token}, 'no')"
        ));
        run("SELECT lockstep.generation_increment('r', '{a}')");
        assert_eq!(
            list("SELECT status FROM lockstep.replica_sync_begin('r', 'c', 'w')"),
            "backoff"
        );
    }

    #[pg_test]
    fn tenants_get_equal_shares_of_what_is_due_in_any() {
        let fill = |tenant: &str, count: usize| {
            run(&format!(
                "SELECT lockstep.resource_create('r' || n, '{{a}}', '{tenant}'), lockstep.generation_increment('r' || n, tenant => '{tenant}')
                 FROM generate_series(1, {count}) AS n"
            ));
        };
        fill("flood", 50);
        fill("few", 3);
        fill("many", 20);
        let shares = |call: &str| {
            list(&format!(
                "SELECT resource_tenant || count(*) FROM lockstep.{call} GROUP BY resource_tenant ORDER BY 1"
            ))
        };
        assert_eq!(shares("replicas_due(2, NULL)"), "few1,flood1");
        assert_eq!(shares("replicas_due(12, NULL)"), "few3,flood5,many4");
        assert_eq!(shares("replicas_due(100, NULL)"), "few3,flood50,many20");
        assert_eq!(shares("replicas_due(10, 'many')"), "many10");
        assert_eq!(
            shares("replica_sync_claim('w', 12, tenant => NULL)"),
            "few3,flood5,many4"
        );
        assert_eq!(
            shares("replica_sync_claim('w', 100, tenant => NULL)"),
            "flood45,many16"
        );
        assert_eq!(shares("replica_sync_claim('w', 100, tenant => NULL)"), "");
    }

    #[pg_test]
    fn tenants_have_resources_of_their_own() {
        registry();
        let other: i64 = one("SELECT lockstep.resource_create('r', '{x}', 'other')");
        run("SELECT lockstep.generation_increment('r', '{x}', 'other')");
        run("SELECT lockstep.resource_delete('r')");
        assert_eq!(
            list("SELECT (incarnation, generation) FROM lockstep.resources WHERE tenant = 'other'"),
            format!("({other},1)")
        );
        assert_eq!(
            list("SELECT * FROM lockstep.generation_current('r', 'other')"),
            "x"
        );
    }

    #[pg_test]
    fn the_registry_follows_events() {
        let follow =
            |event_type: &str| word(&format!("registry_follow('{event_type}', 'r', '{{a,b}}')"));
        assert_eq!(follow("file_created"), "created");
        assert_eq!(
            (generation(), held(), due()),
            (0, "a-,b-".into(), "a,b".into())
        );
        assert_eq!(follow("FileUpdated"), "incremented");
        assert_eq!(follow("file_renamed"), "ignored");
        let token = started("'r', 'a', 'w'");
        assert_eq!(
            (finish("a", token), held()),
            ("current".into(), "a1,b-".into())
        );
        assert_eq!(follow("file_created"), "incremented");
        assert_eq!((generation(), current()), (2, "".into()));
        assert_eq!(follow("file_deleted"), "deleted");
        assert_eq!(
            (follow("file_deleted"), follow("file_updated")),
            ("gone".into(), "gone".into())
        );
        assert_eq!(held(), "");
        assert_eq!(follow("file_created"), "created");
        assert_eq!((generation(), held()), (0, "a-,b-".into()));
        assert_eq!(
            word("registry_follow('updated', 'from_the_middle', '{a}')"),
            "created"
        );
        assert_eq!(word("registry_follow('deleted', 'never_heard_of')"), "gone");
    }

    #[pg_test]
    fn a_new_replica_is_added_by_the_next_event() {
        run("SELECT lockstep.registry_follow('created', 'r', '{a}')");
        run("SELECT lockstep.registry_follow('updated', 'r', '{a,b}')");
        assert_eq!(held(), "a-,b-");
    }

    #[pg_test]
    fn the_views_tell_each_state() {
        registry();
        let resource = || {
            list(
                "SELECT (state, replicas, current, syncing, failing) FROM lockstep.resource_status WHERE resource = 'r'",
            )
        };
        assert_eq!(resource(), "(partly,3,2,0,0)");
        let token = started("'r', 'd', 'w', 'a'");
        assert_eq!(
            list("SELECT (replica, state, generation, resource_generation, behind, sync_holder, sync_source)
                  FROM lockstep.replica_status ORDER BY replica"),
            "(a,current,5,5,0,,),(b,current,5,5,0,,),(c,outdated,3,5,2,,),(d,syncing,,5,,w,a)"
        );
        assert_eq!(resource(), "(partly,4,2,1,0)");
        run(&format!(
            "SELECT lockstep.replica_sync_finish('r', 'd', {token}, 'no')"
        ));
        assert_eq!(resource(), "(partly,4,2,0,1)");
        run(
            "UPDATE lockstep.replicas SET retry_at = now() - interval '1 s', due_at = now() WHERE replica = 'd'",
        );
        assert_eq!(state("d"), "missing");
        run("SELECT lockstep.generation_increment('r')");
        assert_eq!(resource(), "(outdated,4,0,0,1)");
        run("SELECT * FROM lockstep.replica_sync_begin('r', 'c', 'w')");
        run("SELECT lockstep.resource_delete('r')");
        assert_eq!(
            (resource(), state("c")),
            ("(gone,1,0,1,0)".into(), "gone".into())
        );
        run("SELECT lockstep.resource_create('r', '{a}')");
        assert_eq!(resource(), "(current,1,1,0,0)");
    }

    #[pg_test]
    fn tokens_and_incarnations_grow_and_meet_never() {
        let mut numbers: Vec<i64> = Vec::new();
        for _ in 0..3 {
            numbers.push(one("SELECT lockstep.resource_create('r', '{a}')"));
            run("SELECT lockstep.generation_increment('r')");
            numbers.push(started("'r', 'a', 'w'"));
            expire("a");
            numbers.push(started("'r', 'a', 'w'"));
            run("SELECT lockstep.resource_delete('r'), lockstep.resource_purge('0')");
        }
        assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    }

    #[pg_test]
    fn the_token_sequence_caches_nothing_and_a_loss_of_data_raises_it() {
        assert_eq!(
            one::<i64>(
                "SELECT seqcache FROM pg_sequence WHERE seqrelid = 'lockstep.token'::regclass"
            ),
            1
        );
        let before: i64 = one("SELECT nextval('lockstep.token')");
        registry();
        let token = started("'r', 'c', 'w'");
        let before = before.max(token);
        run("SELECT lockstep.after_data_loss()");
        assert_eq!(
            (finish("c", token), state("c")),
            ("lost".into(), "syncing".into())
        );
        assert_eq!(
            one::<i64>("SELECT nextval('lockstep.token')"),
            before + (1 << 32) + 1
        );
    }
}
