//! Leases as one session sees them. Time passes by moving the row's own times.

#[pgrx::pg_schema]
mod tests {
    use crate::support::*;
    use pgrx::prelude::*;

    fn acquire(holder: &str, more: &str) -> String {
        list(&format!(
            "SELECT acquired::text FROM lockstep.lease_acquire('job', '{holder}'{more})"
        ))
    }

    fn token(holder: &str) -> i64 {
        one(&format!(
            "SELECT token FROM lockstep.lease_acquire('job', '{holder}')"
        ))
    }

    fn renew(token: i64) -> String {
        one(&format!(
            "SELECT status FROM lockstep.lease_renew('job', {token})"
        ))
    }

    fn release(token: i64) -> bool {
        one(&format!("SELECT lockstep.lease_release('job', {token})"))
    }

    fn guard(token: i64) -> Raised {
        raised(&format!("SELECT lockstep.lease_guard('job', {token})"))
    }

    /// So much time passes for the lease.
    fn pass(time: &str) {
        run(&format!(
            "UPDATE lockstep.leases SET expires_at = expires_at - interval '{time}',
                 acquired_at = acquired_at - interval '{time}', min_hold_until = min_hold_until - interval '{time}'"
        ));
    }

    #[pg_test]
    fn an_acquisition_gives_a_token_its_expiry_and_half_the_ttl() {
        assert_eq!(
            list(
                "SELECT (acquired, token = (SELECT last_value FROM lockstep.token), held_by,
                         expires_at - clock_timestamp() BETWEEN '19 s' AND '20 s',
                         expires_at - renew_before)
                 FROM lockstep.lease_acquire('job', 'a', '20 seconds')"
            ),
            "(t,t,a,t,00:00:10)"
        );
    }

    #[pg_test]
    fn what_others_have_put_on_the_leases_sees_every_change() {
        let first = token("a");
        run("CREATE TABLE public.seen (what text);
             CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 INSERT INTO public.seen VALUES (TG_LEVEL || ' ' || (SELECT holder IS NULL FROM lockstep.leases));
                 RETURN NEW;
             END $$;
             CREATE TRIGGER a BEFORE UPDATE ON lockstep.leases FOR EACH ROW EXECUTE FUNCTION public.note();
             CREATE TRIGGER b AFTER UPDATE ON lockstep.leases FOR EACH STATEMENT EXECUTE FUNCTION public.note()");
        assert_eq!(renew(first), "renewed");
        assert!(release(first));
        assert!(token("b") > first);
        assert_eq!(
            list("SELECT what FROM public.seen"),
            "ROW false,STATEMENT false,ROW false,STATEMENT true,ROW true,STATEMENT false"
        );
    }

    #[pg_test]
    fn a_change_keeps_what_others_have_added_to_the_leases() {
        let first = token("a");
        run("ALTER TABLE lockstep.leases ADD note text;
             UPDATE lockstep.leases SET note = repeat('x', 10000)");
        assert_eq!(renew(first), "renewed");
        assert!(release(first));
        assert_eq!(list("SELECT length(note) FROM lockstep.leases"), "10000");
    }

    #[pg_test]
    fn another_is_refused_and_told_by_whom_until_when_but_no_token() {
        token("a");
        assert_eq!(
            list(
                "SELECT (q.acquired, q.token, q.held_by, q.expires_at = l.expires_at, q.renew_before)
                 FROM lockstep.lease_acquire('job', 'b') AS q, lockstep.leases AS l"
            ),
            "(f,,a,t,)"
        );
    }

    #[pg_test]
    fn the_same_holder_renews_a_live_lease_and_keeps_its_token() {
        let first = token("a");
        pass("5 s");
        assert_eq!(
            list(
                "SELECT acquired::text || (expires_at > clock_timestamp() + '25 s')
                  FROM lockstep.lease_acquire('job', 'a', '30 s', '{\"host\": 1}')"
            ),
            "truetrue"
        );
        assert_eq!(token("a"), first);
        assert_eq!(
            list("SELECT (transitions, metadata, ttl) FROM lockstep.leases"),
            "(0,\"{\"\"host\"\": 1}\",00:00:10)"
        );
    }

    #[pg_test]
    fn after_an_expiry_the_same_holder_gets_a_new_token() {
        let first = token("a");
        pass("11 s");
        assert!(token("a") > first);
        assert_eq!(one::<i64>("SELECT transitions FROM lockstep.leases"), 1);
    }

    #[pg_test]
    fn after_a_release_the_same_holder_gets_a_new_token() {
        let first = token("a");
        assert!(release(first));
        assert!(token("a") > first);
    }

    #[pg_test]
    fn a_free_lease_goes_to_the_next_with_a_greater_token() {
        let first = token("a");
        assert!(release(first));
        let second = token("b");
        pass("11 s");
        let third = token("c");
        assert!(first < second && second < third);
        assert_eq!(
            list("SELECT (holder, token, transitions) FROM lockstep.leases"),
            format!("(c,{third},2)")
        );
    }

    #[pg_test]
    fn a_lease_is_released_once_and_with_its_token_only() {
        let held = token("a");
        assert!(!release(held + 1));
        assert!(!release(held - 1));
        assert!(release(held));
        assert!(!release(held));
        assert!(!one::<bool>("SELECT lockstep.lease_release('unknown', 1)"));
    }

    #[pg_test]
    fn an_expired_lease_is_not_released_any_more() {
        let held = token("a");
        pass("11 s");
        assert!(!release(held));
        assert_eq!(list("SELECT holder FROM lockstep.leases"), "a");
    }

    #[pg_test]
    fn a_renewal_says_renewed_expired_lost_or_unknown() {
        let held = token("a");
        assert_eq!(renew(held), "renewed");
        assert_eq!(renew(held - 1), "lost");
        pass("11 s");
        assert_eq!(renew(held), "expired");
        assert_eq!(renew(held), "expired");
        let next = token("b");
        assert_eq!(renew(held), "lost");
        assert!(release(next));
        assert_eq!(renew(next), "lost");
        assert_eq!(
            list(
                "SELECT (status, expires_at, renew_before) FROM lockstep.lease_renew('unknown', 1)"
            ),
            "(unknown,,)"
        );
    }

    #[pg_test]
    fn a_renewal_keeps_the_ttl_or_sets_it() {
        let held = token("a");
        let lasts = |call: &str| {
            list(&format!(
                "SELECT (round(extract(epoch FROM expires_at - clock_timestamp())), expires_at - renew_before)
                 FROM lockstep.lease_renew('job', {held}{call})"
            ))
        };
        assert_eq!(lasts(""), "(10,00:00:05)");
        assert_eq!(lasts(", '1 minute'"), "(60,00:00:30)");
        assert_eq!(lasts(""), "(60,00:00:30)");
    }

    #[pg_test]
    fn times_are_those_of_the_clock_and_not_of_the_transaction() {
        run("SELECT pg_sleep(2.1)");
        let held = token("a");
        assert!(one::<bool>(
            "SELECT expires_at > clock_timestamp() + '9.5 s' FROM lockstep.leases"
        ));
        assert_eq!(acquire("b", ""), "false");
        run("SELECT pg_sleep(1)");
        assert_eq!(renew(held), "renewed");
        assert!(one::<bool>(
            "SELECT expires_at > clock_timestamp() + '9.5 s' FROM lockstep.leases"
        ));
        run(&format!(
            "SELECT lockstep.lease_renew('job', {held}, '0.2 s')"
        ));
        run("SELECT pg_sleep(0.3)");
        assert_eq!(renew(held), "expired");
        assert_eq!(acquire("b", ""), "true");
    }

    #[pg_test]
    fn a_lock_delay_keeps_an_expired_lease_closed_from_its_expiry() {
        assert_eq!(acquire("a", ", lock_delay => '1 minute'"), "true");
        pass("11 s");
        assert_eq!(
            list("SELECT (acquired, held_by, expires_at - clock_timestamp() BETWEEN '50 s' AND '1 minute')
                  FROM lockstep.lease_acquire('job', 'b')"),
            "(f,,t)"
        );
        assert_eq!(acquire("a", ""), "false");
        pass("1 minute");
        assert_eq!(acquire("b", ""), "true");
    }

    #[pg_test]
    fn a_lock_delay_does_not_count_after_a_release() {
        assert_eq!(acquire("a", ", lock_delay => '1 minute'"), "true");
        assert!(release(one("SELECT token FROM lockstep.leases")));
        assert_eq!(acquire("b", ""), "true");
    }

    #[pg_test]
    fn a_min_hold_outlives_an_early_release_for_all() {
        assert_eq!(acquire("a", ", min_hold => '1 minute'"), "true");
        assert!(release(one("SELECT token FROM lockstep.leases")));
        assert_eq!(acquire("b", ""), "false");
        assert_eq!(acquire("a", ""), "false");
        pass("1 minute 1 s");
        assert_eq!(acquire("b", ""), "true");
    }

    #[pg_test]
    fn a_min_hold_outlives_an_expiry() {
        assert_eq!(
            acquire("a", ", ttl => '1 s', min_hold => '1 minute'"),
            "true"
        );
        pass("2 s");
        assert_eq!(acquire("b", ""), "false");
        pass("1 minute");
        assert_eq!(acquire("b", ""), "true");
    }

    #[pg_test]
    fn a_guard_lets_the_holder_pass_and_nobody_else() {
        let held = token("a");
        assert_eq!(guard(held), Raised::default());
        let error = guard(held - 1);
        assert_eq!(error.sqlstate, "LS003");
        assert_eq!(
            error.message,
            format!("lease \"job\" is not held with token {}", held - 1)
        );
        assert_eq!(
            error.detail,
            format!(
                "Actual: held by \"a\" with another token, expected: held with token {}.",
                held - 1
            )
        );
        assert!(!error.hint.is_empty());
    }

    #[pg_test]
    fn a_guard_says_how_the_lease_is_and_never_its_token() {
        assert!(guard(1).detail.contains("there is no such lease"));
        let held = token("a");
        pass("11 s");
        assert!(guard(held).detail.contains("expired at 2"));
        let next = token("b");
        assert!(!guard(held).detail.contains(&format!("token {next}")));
        pass("11 s");
        assert!(guard(held).detail.contains("taken by \"b\""));
        pass("-11 s");
        assert!(release(next));
        let error = guard(next);
        assert_eq!(error.sqlstate, "LS003");
        assert!(error.detail.contains("released at 2"));
    }

    const PROTECTED: &str = "CREATE TEMP TABLE protected (a int);
         CREATE TRIGGER guarded BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON protected
         FOR EACH STATEMENT EXECUTE FUNCTION lockstep.lease_guard_trigger('job', 'app.token');";

    #[pg_test]
    fn the_trigger_refuses_every_kind_of_write_without_a_guard() {
        run(PROTECTED);
        let held = token("a");
        for write in [
            "INSERT INTO protected VALUES (1)",
            "UPDATE protected SET a = 2",
            "DELETE FROM protected",
            "TRUNCATE protected",
        ] {
            let error = raised(write);
            assert_eq!(error.sqlstate, "LS003", "{write}");
            assert_eq!(
                error.message,
                "lease \"job\" is not guarded by this transaction"
            );
        }
        run("SET app.token = 'many'");
        assert_eq!(sqlstate("INSERT INTO protected VALUES (1)"), "LS003");
        assert!(
            !raised("INSERT INTO protected VALUES (1)")
                .detail
                .contains("many")
        );
        run(&format!("SET app.token = '{}'", held + 1));
        let error = raised("INSERT INTO protected VALUES (1)");
        assert_eq!(error.sqlstate, "LS003");
        assert!(error.message.ends_with(&format!("token {}", held + 1)));
    }

    #[pg_test]
    fn the_trigger_lets_pass_what_is_guarded() {
        run(PROTECTED);
        let held = token("a");
        run(&format!("SELECT lockstep.lease_guard('job', {held})"));
        assert_eq!(sqlstate("INSERT INTO protected VALUES (1)"), "");
    }

    #[pg_test]
    fn the_trigger_lets_pass_what_is_guarded_at_commit() {
        run(PROTECTED);
        let held = token("a");
        run(&format!(
            "SELECT lockstep.lease_guard_at_commit('job', {held})"
        ));
        assert_eq!(sqlstate("INSERT INTO protected VALUES (1)"), "");
    }

    #[pg_test]
    fn the_trigger_guards_by_itself_with_the_token_of_the_setting() {
        run(PROTECTED);
        let held = token("a");
        run(&format!("SET LOCAL app.token = ' {held} '"));
        assert_eq!(sqlstate("INSERT INTO protected VALUES (1)"), "");
        assert_eq!(
            list("SELECT name || purpose FROM lockstep.lease_locks() WHERE pid = pg_backend_pid()"),
            "jobguard"
        );
    }

    #[pg_test]
    fn a_renewal_or_an_acquisition_is_no_guard() {
        run(PROTECTED);
        let held = token("a");
        assert_eq!(renew(held), "renewed");
        assert_eq!(sqlstate("INSERT INTO protected VALUES (1)"), "LS003");
        assert_eq!(list("SELECT purpose FROM lockstep.lease_locks()"), "");
    }

    #[pg_test]
    fn a_guard_goes_with_its_savepoint() {
        run(PROTECTED);
        let held = token("a");
        for guard in ["lease_guard", "lease_guard_at_commit"] {
            run(&format!(
                "DO $$ BEGIN
                     PERFORM lockstep.{guard}('job', {held});
                     RAISE division_by_zero;
                 EXCEPTION WHEN division_by_zero THEN END $$"
            ));
            assert_eq!(
                sqlstate("INSERT INTO protected VALUES (1)"),
                "LS003",
                "{guard}"
            );
        }
    }

    #[pg_test]
    fn a_trigger_that_is_made_wrongly_says_so() {
        run("CREATE TEMP TABLE protected (a int)");
        for (made, state) in [
            (
                "AFTER INSERT ON protected FOR EACH STATEMENT EXECUTE FUNCTION lockstep.lease_guard_trigger('job')",
                "39P01",
            ),
            (
                "BEFORE INSERT ON protected FOR EACH ROW EXECUTE FUNCTION lockstep.lease_guard_trigger('job')",
                "39P01",
            ),
            (
                "BEFORE INSERT ON protected EXECUTE FUNCTION lockstep.lease_guard_trigger()",
                "22023",
            ),
            (
                "BEFORE INSERT ON protected EXECUTE FUNCTION lockstep.lease_guard_trigger('')",
                "22023",
            ),
            (
                "BEFORE INSERT ON protected EXECUTE FUNCTION lockstep.lease_guard_trigger('job', '')",
                "22023",
            ),
            (
                "BEFORE INSERT ON protected EXECUTE FUNCTION lockstep.lease_guard_trigger('job', 'app.token', 'c')",
                "22023",
            ),
        ] {
            run(&format!("CREATE TRIGGER wrong {made}"));
            assert_eq!(
                sqlstate("INSERT INTO protected VALUES (1)"),
                state,
                "{made}"
            );
            run("DROP TRIGGER wrong ON protected");
        }
    }

    #[pg_test]
    fn a_theft_takes_a_live_lease_with_a_new_token_and_says_why() {
        let held = token("a");
        assert_eq!(
            list(
                "SELECT (acquired, token > 0, held_by, expires_at - renew_before)
                  FROM lockstep.lease_steal('job', 'b', '20 s', 'a hangs')"
            ),
            "(t,t,b,00:00:10)"
        );
        assert_eq!(
            list(
                "SELECT (token > 0, transitions, stolen_from, steal_reason) FROM lockstep.lease_status"
            ),
            "(t,1,a,\"a hangs\")"
        );
        assert!(one::<i64>("SELECT token FROM lockstep.leases") > held);
        assert_eq!(renew(held), "lost");
        assert_eq!(guard(held).sqlstate, "LS003");
    }

    #[pg_test]
    fn a_theft_opens_what_is_closed_and_makes_what_is_not_there() {
        run("SELECT lockstep.lease_steal('new', 'b', '20 s', 'first')");
        assert_eq!(
            acquire("a", ", min_hold => '1 hour', lock_delay => '1 hour'"),
            "true"
        );
        pass("11 s");
        run("SELECT lockstep.lease_steal('job', 'b', '20 s', 'now')");
        assert_eq!(
            list("SELECT (name, holder, stolen_from) FROM lockstep.leases ORDER BY name"),
            "(job,b,),(new,b,)"
        );
        assert!(release(one(
            "SELECT token FROM lockstep.leases WHERE name = 'job'"
        )));
        assert_eq!(acquire("c", ""), "true");
        assert_eq!(
            list("SELECT steal_reason IS NULL FROM lockstep.leases WHERE name = 'job'"),
            "true"
        );
    }

    #[pg_test]
    fn deletion_takes_what_has_long_been_open_and_no_token_comes_again() {
        let first = token("a");
        pass("30 s");
        let delete = |older_than: &str| {
            one::<i64>(&format!(
                "SELECT lockstep.lease_delete_expired('{older_than}')"
            ))
        };
        assert_eq!(delete("1 minute"), 0);
        assert_eq!(delete("10 s"), 1);
        let second = token("a");
        assert!(second > first);
        assert_eq!(delete("0"), 0);
        assert!(release(second));
        assert_eq!(delete("0"), 1);
        assert_eq!(renew(second), "unknown");
        assert!(token("b") > second);
    }

    #[pg_test]
    fn deletion_leaves_what_is_closed() {
        assert_eq!(acquire("a", ", lock_delay => '1 hour'"), "true");
        pass("1 minute");
        assert_eq!(one::<i64>("SELECT lockstep.lease_delete_expired('0')"), 0);
        assert_eq!(acquire("b", ""), "false");
        pass("1 hour");
        assert_eq!(one::<i64>("SELECT lockstep.lease_delete_expired('0')"), 1);
    }

    #[pg_test]
    fn after_a_data_loss_no_old_token_counts_and_new_ones_are_far_off() {
        let held = token("a");
        run("SELECT lockstep.after_data_loss()");
        assert_eq!(renew(held), "lost");
        assert!(!release(held));
        assert_eq!(guard(held).sqlstate, "LS003");
        pass("11 s");
        assert!(token("b") > held + (1 << 32));
    }

    #[pg_test]
    fn a_token_sequence_that_is_behind_is_noticed() {
        let held = token("a");
        assert!(release(held));
        run(&format!("SELECT setval('lockstep.token', {held}, false)"));
        let error = raised("SELECT lockstep.lease_acquire('job', 'b')");
        assert_eq!(error.sqlstate, "55000");
        assert_eq!(
            error.detail,
            format!("Token drawn {held}, last token handed out {held}.")
        );
        assert!(error.hint.contains("after_data_loss()"));
        run("SELECT lockstep.after_data_loss()");
        assert!(token("b") > held);
    }

    #[pg_test]
    fn after_a_data_loss_the_token_sequence_is_above_every_token() {
        run("SELECT setval('lockstep.token', 5000)");
        let held = token("a");
        assert!(release(held));
        run("SELECT setval('lockstep.token', 1)"); // as a logical replication leaves it
        run("SELECT lockstep.after_data_loss()");
        assert!(token("b") > held + (1 << 32));
    }

    #[pg_test]
    fn lease_take_cannot_be_called_in_a_transaction() {
        let error = raised("CALL lockstep.lease_take('job', 'a', '1 s', '1 s')");
        assert_eq!(error.sqlstate, "2D000");
        assert!(error.hint.contains("outside of a transaction block"));
        assert_eq!(one::<i64>("SELECT count(*) FROM lockstep.leases"), 0);
    }

    #[pg_test]
    fn the_status_says_held_expired_released_and_the_time_left() {
        run(
            "SELECT lockstep.lease_acquire('held', 'a', '20 s', '{\"host\": \"h\"}');
             SELECT lockstep.lease_acquire('job', 'a', lock_delay => '1 minute')",
        );
        run("SELECT lockstep.lease_release(name, token) FROM lockstep.lease_acquire('released', 'a') AS q,
             (VALUES ('released')) AS n (name)");
        run(
            "UPDATE lockstep.leases SET expires_at = expires_at - interval '30 s' WHERE name = 'job'",
        );
        assert_eq!(
            list(
                "SELECT (name, holder, state, round(extract(epoch FROM remaining)), metadata,
                          round(extract(epoch FROM opens_at - clock_timestamp())),
                          waiting_pids, guarding_pids, guarding_gids)
                  FROM lockstep.lease_status ORDER BY name"
            ),
            "(held,a,held,20,\"{\"\"host\"\": \"\"h\"\"}\",20,{},{},{}),\
             (job,a,expired,0,,40,{},{},{}),\
             (released,,released,0,,,{},{},{})"
        );
    }

    #[pg_test]
    fn an_interval_is_elapsed_time_in_whatever_time_zone() {
        run("SET LOCAL TimeZone = 'Europe/Berlin'");
        assert_eq!(
            list(
                "SELECT ttl FROM lockstep.lease_acquire('job', 'a', '1 month 1 day') AS q, lockstep.leases AS l"
            ),
            ""
        );
        assert_eq!(list("SELECT ttl FROM lockstep.leases"), "744:00:00");
    }
}
