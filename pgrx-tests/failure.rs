//! Failing events and handlers, inside one transaction. The log is filled directly, so that the transaction has not pushed.

#[pgrx::pg_schema]
mod tests {
    use crate::support::*;
    use pgrx::prelude::*;

    /// Events a1, a2, … at the positions 1000001, 1000002, …
    fn log(count: usize) {
        run("SELECT setval('lockstep.ticket', 2000000)");
        run(&format!(
            "INSERT INTO lockstep.events SELECT '', 1000000 + n, 'a', n::text, 1, 'x', NULL, NULL, NULL, now()
             FROM generate_series(1, {count}) AS n"
        ));
    }

    /// A table of what was applied, and handlers that fail for the events in the table bad.
    fn handlers() {
        run(
            "CREATE TABLE public.applied (id text, at_subtransaction xid8 DEFAULT pg_current_xact_id())",
        );
        run("CREATE TABLE public.bad (id text)");
        run(
            "CREATE FUNCTION public.apply(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$
             BEGIN
                 INSERT INTO public.applied VALUES (e.aggregate_id);
                 IF EXISTS (SELECT FROM public.bad WHERE id = e.aggregate_id) THEN
                     RAISE EXCEPTION 'cannot apply %', e.aggregate_id USING ERRCODE = 'XY123';
                 END IF;
             END $$",
        );
        run("CREATE FUNCTION public.apply_all(e lockstep.events[]) RETURNS void LANGUAGE plpgsql AS $$
             BEGIN
                 INSERT INTO public.applied SELECT aggregate_id FROM unnest(e);
                 IF EXISTS (SELECT FROM public.bad JOIN unnest(e) AS u ON u.aggregate_id = bad.id) THEN
                     RAISE EXCEPTION 'cannot apply one of %', cardinality(e);
                 END IF;
             END $$");
    }

    fn applied() -> String {
        list("SELECT id FROM public.applied ORDER BY length(id), id")
    }

    fn run_once() -> String {
        list(
            "SELECT format('%s %s %s %s', status, processed, skipped, more) FROM lockstep.projection_run('p')",
        )
    }

    fn cursor() -> String {
        list("SELECT position - 1000000 FROM lockstep.projection_cursors")
    }

    #[pg_test]
    fn a_run_applies_and_advances() {
        log(3);
        handlers();
        run("SELECT lockstep.projection_create('p', handler => 'public.apply(lockstep.events)')");
        assert_eq!(run_once(), "ok 3 0 f");
        assert_eq!((applied(), cursor()), ("1,2,3".into(), "3".into()));
        assert_eq!(run_once(), "ok 0 0 f");
    }

    #[pg_test]
    fn the_third_of_five_fails_until_it_is_skipped() {
        log(5);
        handlers();
        run("INSERT INTO public.bad VALUES ('3')");
        run(
            "SELECT lockstep.projection_create('p', handler => 'public.apply(lockstep.events)', retry_after => '0')",
        );
        assert_eq!(run_once(), "failed 2 0 t");
        for failures in 2..=4 {
            assert_eq!(run_once(), "failed 0 0 t");
            assert_eq!(
                one::<i32>("SELECT failures FROM lockstep.failed_events"),
                failures
            );
            assert_eq!((applied(), cursor()), ("1,2".into(), "2".into()));
        }
        assert_eq!(run_once(), "ok 2 1 f");
        assert_eq!((applied(), cursor()), ("1,2,4,5".into(), "5".into()));
        assert_eq!(
            list("SELECT format('%s %s %s %s %s', position - 1000000, failures, error, sqlstate, skipped_at IS NOT NULL)
                  FROM lockstep.failed_events"),
            "3 5 cannot apply 3 XY123 t"
        );
        assert!(
            one::<String>("SELECT context FROM lockstep.failed_events")
                .contains("PL/pgSQL function")
        );
    }

    #[pg_test]
    fn a_last_event_that_is_skipped_is_passed() {
        log(2);
        handlers();
        run("INSERT INTO public.bad VALUES ('2')");
        run(
            "SELECT lockstep.projection_create('p', handler => 'public.apply(lockstep.events)', max_failures => 1)",
        );
        assert_eq!(run_once(), "ok 1 1 f");
        assert_eq!((run_once(), cursor()), ("ok 0 0 f".into(), "2".into()));
    }

    #[pg_test]
    fn an_event_that_succeeds_after_failures_leaves_no_trace() {
        log(3);
        handlers();
        run("INSERT INTO public.bad VALUES ('2')");
        run(
            "SELECT lockstep.projection_create('p', handler => 'public.apply(lockstep.events)', retry_after => '0')",
        );
        assert_eq!(run_once(), "failed 1 0 t");
        run("DELETE FROM public.bad");
        assert_eq!(run_once(), "ok 2 0 f");
        assert_eq!(one::<i64>("SELECT count(*) FROM lockstep.failed_events"), 0);
        assert_eq!(applied(), "1,2,3");
    }

    #[pg_test]
    fn one_bad_event_of_200_in_a_set() {
        log(200);
        handlers();
        run("INSERT INTO public.bad VALUES ('77')");
        run(
            "SELECT lockstep.projection_create('p', handler => 'public.apply_all(lockstep.events[])', max_failures => 1)",
        );
        assert_eq!(run_once(), "ok 199 1 f");
        assert_eq!(
            one::<i64>("SELECT count(DISTINCT id) FROM public.applied"),
            199
        );
        assert_eq!(one::<i64>("SELECT count(*) FROM public.applied"), 199);
        assert_eq!(
            list("SELECT position - 1000000 FROM lockstep.failed_events"),
            "77"
        );
    }

    #[pg_test]
    fn every_tenth_of_1000_fails_with_few_subtransactions() {
        log(1000);
        handlers();
        run("INSERT INTO public.bad SELECT n::text FROM generate_series(10, 1000, 10) AS n");
        run(
            "SELECT lockstep.projection_create('p', handler => 'public.apply(lockstep.events)', max_failures => 1, batch_size => 1000)",
        );
        assert_eq!(run_once(), "ok 540 60 t");
        assert_eq!(run_once(), "ok 360 40 f");
        assert_eq!(one::<i64>("SELECT count(*) FROM public.applied"), 900);
    }

    #[pg_test]
    fn a_handler_that_fails_on_its_second_write_leaves_neither() {
        log(1);
        run("CREATE TABLE public.twice (n int CHECK (n < 2))");
        run(
            "CREATE FUNCTION public.writes(e lockstep.events) RETURNS void LANGUAGE sql AS
             'INSERT INTO public.twice VALUES (1); INSERT INTO public.twice VALUES (2)'",
        );
        run("SELECT lockstep.projection_create('p', handler => 'public.writes(lockstep.events)')");
        assert_eq!(run_once(), "failed 0 0 t");
        assert_eq!(one::<i64>("SELECT count(*) FROM public.twice"), 0);
        assert_eq!(list("SELECT sqlstate FROM lockstep.failed_events"), "23514");
    }

    #[pg_test]
    fn backoff_doubles_up_to_five_minutes() {
        log(1);
        handlers();
        run("INSERT INTO public.bad VALUES ('1')");
        run(
            "SELECT lockstep.projection_create('p', handler => 'public.apply(lockstep.events)', max_failures => 100, retry_after => '40 s')",
        );
        for seconds in [40, 80, 160, 300, 300] {
            assert_eq!(run_once(), "failed 0 0 t");
            assert!(one::<bool>(&format!(
                "SELECT retry_at - clock_timestamp() BETWEEN interval '{seconds} s' - interval '5 s' AND interval '{seconds} s'
                 FROM lockstep.projection_cursors"
            )));
            assert_eq!(run_once(), "backoff 0 0 f");
            run("SELECT * FROM lockstep.projection_claim('p')");
            assert_eq!(
                list("SELECT status FROM lockstep.projection_claim_state('p')"),
                "backoff"
            );
            assert_eq!(list("SELECT name FROM lockstep.projection_due()"), "");
            run("UPDATE lockstep.projection_cursors SET retry_at = now() - interval '1 s'");
        }
    }

    #[pg_test]
    fn a_client_counts_failures_with_projection_fail() {
        log(3);
        run("SELECT lockstep.projection_create('p', max_failures => 2, retry_after => '0')");
        let fail =
            |position: &str| format!("SELECT lockstep.projection_fail('p', {position}, 'no good')");
        assert_eq!(sqlstate(&fail("1000002")), "LS002");
        run("SELECT * FROM lockstep.projection_claim('p')");
        for position in ["1", "1000004", "0.5", "-1"] {
            assert_eq!(sqlstate(&fail(position)), "22023", "{position}");
        }
        assert_eq!(one::<String>(&fail("1000002")), "retry");
        assert_eq!(cursor(), "1");
        for call in [
            "projection_advance('p')",
            "projection_fail('p', 1000002, 'x')",
        ] {
            let error = raised(&format!("SELECT lockstep.{call}"));
            assert_eq!(
                (error.sqlstate.as_str(), error.detail.as_str()),
                ("LS002", "It has already failed the claim.")
            );
        }
        assert_eq!(
            list("SELECT aggregate_id FROM lockstep.projection_claim('p')"),
            "2,3"
        );
        assert_eq!(one::<String>(&fail("1000002")), "skip");
        run("SELECT lockstep.projection_advance('p')");
        assert_eq!(cursor(), "3");
    }

    #[pg_test]
    fn a_dead_letter_is_retried_or_discarded() {
        log(3);
        handlers();
        run("INSERT INTO public.bad VALUES ('1'), ('2')");
        run(
            "SELECT lockstep.projection_create('p', handler => 'public.apply(lockstep.events)', max_failures => 1)",
        );
        assert_eq!(run_once(), "ok 1 2 f");
        let retry = "SELECT lockstep.failed_event_retry('p', 1000001)";
        assert!(!one::<bool>(retry));
        assert_eq!(
            one::<i32>("SELECT failures FROM lockstep.failed_events WHERE position = 1000001"),
            2
        );
        run("DELETE FROM public.bad");
        assert!(one::<bool>(retry));
        assert_eq!(applied(), "1,3");
        assert_eq!(sqlstate(retry), "22023");
        run("SELECT lockstep.failed_event_discard('p', 1000002)");
        assert_eq!(one::<i64>("SELECT count(*) FROM lockstep.failed_events"), 0);
        assert_eq!(
            sqlstate("SELECT lockstep.failed_event_discard('p', 1000002)"),
            "22023"
        );
        assert_eq!(cursor(), "3");
    }

    #[pg_test]
    fn an_event_that_is_still_retried_is_no_dead_letter() {
        log(1);
        handlers();
        run("INSERT INTO public.bad VALUES ('1')");
        run("SELECT lockstep.projection_create('p', handler => 'public.apply(lockstep.events)')");
        assert_eq!(run_once(), "failed 0 0 t");
        assert_eq!(
            sqlstate("SELECT lockstep.failed_event_retry('p', 1000001)"),
            "55000"
        );
        assert_eq!(
            sqlstate("SELECT lockstep.failed_event_discard('p', 1000001)"),
            "55000"
        );
    }

    #[pg_test]
    fn without_a_handler_nothing_is_run() {
        log(1);
        run("SELECT lockstep.projection_create('p', max_failures => 1)");
        let error = raised("SELECT lockstep.projection_run('p')");
        assert_eq!(
            (error.sqlstate.as_str(), error.message.as_str()),
            ("55000", "projection \"p\" has no handler")
        );
        run("SELECT lockstep.projection_claim('p')");
        run("SELECT lockstep.projection_fail('p', 1000001, 'x')");
        assert_eq!(
            sqlstate("SELECT lockstep.failed_event_retry('p', 1000001)"),
            "55000"
        );
    }

    #[pg_test]
    fn a_handler_that_is_gone_is_a_status() {
        log(1);
        handlers();
        run("SELECT lockstep.projection_create('p', handler => 'public.apply(lockstep.events)')");
        run("DROP FUNCTION public.apply(lockstep.events)");
        assert_eq!(run_once(), "failed 0 0 t");
    }

    #[pg_test]
    fn max_duration_stops_after_the_event_that_passes_it() {
        log(3);
        run(
            "CREATE FUNCTION public.slow(e lockstep.events) RETURNS void LANGUAGE sql AS 'SELECT pg_sleep(0.02)'",
        );
        run("SELECT lockstep.projection_create('p', handler => 'public.slow(lockstep.events)')");
        assert_eq!(
            list(
                "SELECT format('%s %s %s', status, processed, more) FROM lockstep.projection_run('p', max_duration => '1 ms')"
            ),
            "ok 1 t"
        );
        assert_eq!(cursor(), "1");
        assert_eq!(
            sqlstate("SELECT lockstep.projection_run('p', max_duration => '0')"),
            "22023"
        );
    }

    #[pg_test]
    fn a_handler_may_push_and_run_another_projection() {
        log(2);
        handlers();
        run(
            "SELECT lockstep.projection_create('other', handler => 'public.apply(lockstep.events)')",
        );
        run(
            "CREATE FUNCTION public.busy(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$
             BEGIN
                 PERFORM lockstep.push_event('follow-up', e.aggregate_id, 'x', tenant => 'other');
                 PERFORM lockstep.projection_run('other');
             END $$",
        );
        run("SELECT lockstep.projection_create('p', handler => 'public.busy(lockstep.events)')");
        assert_eq!(run_once(), "ok 2 0 f");
        assert_eq!(applied(), "1,2");
        assert_eq!(
            one::<i64>("SELECT count(*) FROM lockstep.events WHERE tenant = 'other'"),
            2
        );
    }

    #[pg_test]
    fn a_handler_cannot_run_or_claim_its_own_projection() {
        log(3);
        handlers();
        run("CREATE TABLE public.nested (status text, claimed bigint)");
        run("INSERT INTO public.bad VALUES ('3')");
        run("CREATE FUNCTION public.nests(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$
             BEGIN
                 INSERT INTO public.nested
                 SELECT r.status, (SELECT count(*) FROM lockstep.projection_claim('p')) FROM lockstep.projection_run('p') AS r;
                 PERFORM public.apply(e);
             END $$");
        run(
            "SELECT lockstep.projection_create('p', handler => 'public.nests(lockstep.events)', max_failures => 1)",
        );
        assert_eq!(run_once(), "ok 2 1 f");
        assert_eq!(applied(), "1,2");
        assert_eq!(
            list("SELECT DISTINCT format('%s %s', status, claimed) FROM public.nested"),
            "busy 0"
        );
    }

    #[pg_test]
    fn a_cancel_in_a_handler_goes_on_and_leaves_nothing() {
        log(2);
        handlers();
        run(
            "CREATE FUNCTION public.cancels(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$
             BEGIN
                 PERFORM public.apply(e);
                 RAISE query_canceled;
             END $$",
        );
        run("SELECT lockstep.projection_create('p', handler => 'public.cancels(lockstep.events)')");
        run("DO $$ BEGIN
                 INSERT INTO public.bad VALUES ('from the block');
                 PERFORM lockstep.projection_run('p');
             EXCEPTION WHEN query_canceled THEN
                 INSERT INTO public.bad VALUES ('caught');
             END $$");
        assert_eq!(list("SELECT id FROM public.bad"), "caught");
        assert_eq!(applied(), "");
        assert_eq!(one::<i64>("SELECT count(*) FROM lockstep.failed_events"), 0);
    }

    #[pg_test]
    fn a_failed_assertion_in_a_handler_counts() {
        log(1);
        run(
            "CREATE FUNCTION public.asserts(e lockstep.events) RETURNS void LANGUAGE plpgsql AS 'BEGIN ASSERT false; END'",
        );
        run(
            "SELECT lockstep.projection_create('p', handler => 'public.asserts(lockstep.events)', max_failures => 1)",
        );
        assert_eq!(run_once(), "ok 0 1 f");
        assert_eq!(list("SELECT sqlstate FROM lockstep.failed_events"), "P0004");
    }

    #[pg_test]
    fn a_handler_cannot_move_its_own_cursor() {
        log(2);
        run("CREATE TABLE public.told (sqlstate text)");
        run("CREATE FUNCTION public.tries(e lockstep.events) RETURNS void LANGUAGE plpgsql AS $$
             DECLARE
                 call text;
             BEGIN
                 FOREACH call IN ARRAY ARRAY['advance(''p'')', 'fail(''p'', 1000001, ''x'')', 'reset(''p'')'] LOOP
                     BEGIN
                         EXECUTE 'SELECT lockstep.projection_' || call;
                     EXCEPTION WHEN OTHERS THEN
                         INSERT INTO public.told VALUES (SQLSTATE);
                     END;
                 END LOOP;
             END $$");
        run("SELECT lockstep.projection_create('p', handler => 'public.tries(lockstep.events)')");
        assert_eq!(run_once(), "ok 2 0 f");
        assert_eq!(list("SELECT DISTINCT sqlstate FROM public.told"), "LS002");
        assert_eq!(one::<i64>("SELECT count(*) FROM public.told"), 6);
    }

    #[pg_test]
    fn a_refused_or_busy_claim_leaves_nothing_locked() {
        log(1);
        run("SELECT lockstep.projection_create('p')");
        run("SELECT lockstep.projection_pause('p')");
        let locks = || {
            one::<i64>(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
            )
        };
        run("SELECT lockstep.projection_claim('p')");
        assert_eq!(locks(), 0);
        run("SELECT lockstep.projection_resume('p')");
        run("SELECT lockstep.projection_create('empty', aggregate_types => '{none}')");
        run("SET LOCAL lockstep.max_parallel_claims = 1");
        run("SELECT lockstep.projection_claim('empty')");
        assert_eq!(locks(), 2);
        run("SELECT lockstep.projection_claim('p')");
        assert_eq!(locks(), 5);
    }

    #[pg_test]
    fn a_variadic_handler_is_refused() {
        run(
            "CREATE FUNCTION public.any(VARIADIC e lockstep.events[]) RETURNS void LANGUAGE sql AS ''",
        );
        assert_eq!(
            sqlstate(
                "SELECT lockstep.projection_create('p', handler => 'public.any(lockstep.events[])')"
            ),
            "22023"
        );
    }

    #[pg_test]
    fn the_longest_retry_after_can_be_doubled() {
        log(1);
        handlers();
        run("INSERT INTO public.bad VALUES ('1')");
        run(
            "SELECT lockstep.projection_create('p', handler => 'public.apply(lockstep.events)', retry_after => '178000000 years')",
        );
        for _ in 0..2 {
            assert_eq!(run_once(), "failed 0 0 t");
            run("UPDATE lockstep.projection_cursors SET retry_at = now() - interval '1 s'");
        }
    }

    #[pg_test]
    fn a_handler_runs_with_its_callers_rights_and_search_path() {
        log(1);
        run("CREATE TABLE public.who (who text, path text)");
        run(
            "CREATE FUNCTION public.tell(e lockstep.events) RETURNS void LANGUAGE sql AS
             'INSERT INTO public.who VALUES (current_user, current_setting(''search_path''))'",
        );
        run(
            "CREATE ROLE ls_runner; GRANT USAGE ON SCHEMA lockstep TO ls_runner; GRANT INSERT ON public.who TO ls_runner",
        );
        run("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA lockstep TO ls_runner");
        run("SELECT lockstep.projection_create('p', handler => 'public.tell(lockstep.events)')");
        run("SET LOCAL ROLE ls_runner; SET LOCAL search_path = pg_temp, public");
        assert_eq!(
            one::<String>("SELECT status FROM lockstep.projection_run('p')"),
            "ok"
        );
        run("RESET ROLE; RESET search_path");
        assert_eq!(
            list("SELECT format('%s %s', who, path) FROM public.who"),
            "ls_runner pg_temp, public"
        );
    }

    #[pg_test]
    fn a_handler_that_its_caller_may_not_call_is_no_events_fault() {
        log(1);
        handlers();
        run("REVOKE EXECUTE ON FUNCTION public.apply(lockstep.events) FROM PUBLIC");
        run("CREATE ROLE ls_runner; GRANT USAGE ON SCHEMA lockstep TO ls_runner");
        run("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA lockstep TO ls_runner");
        run(
            "SELECT lockstep.projection_create('p', handler => 'public.apply(lockstep.events)', max_failures => 1)",
        );
        run("SET LOCAL ROLE ls_runner");
        let error = raised("SELECT lockstep.projection_run('p')");
        run("RESET ROLE");
        assert_eq!(
            (error.sqlstate.as_str(), error.message.as_str()),
            (
                "42501",
                "permission denied for handler public.apply(lockstep.events)"
            )
        );
        assert_eq!(one::<i64>("SELECT count(*) FROM lockstep.failed_events"), 0);
    }

    #[pg_test]
    fn pause_and_resume_for_one_tenant_and_for_all() {
        log(1);
        run(
            "INSERT INTO lockstep.events SELECT 't', 1000009, 'a', '1', 1, 'x', NULL, NULL, NULL, now()",
        );
        run("SELECT lockstep.projection_create('p')");
        let claimable = || {
            let claim = |tenant: &str| {
                list(&format!(
                    "SELECT aggregate_id FROM lockstep.projection_claim('p', tenant => '{tenant}')"
                ))
            };
            (claim("") == "1", claim("t") == "1")
        };
        assert_eq!(claimable(), (true, true));
        run("SELECT lockstep.projection_pause('p', '')");
        assert_eq!(claimable(), (false, true));
        assert_eq!(
            list("SELECT status FROM lockstep.projection_claim_state('p')"),
            "paused"
        );
        assert_eq!(list("SELECT tenant FROM lockstep.projection_due()"), "t");
        run("SELECT lockstep.projection_pause('p')");
        assert_eq!(claimable(), (false, false));
        run("SELECT lockstep.projection_resume('p', 't')");
        assert_eq!(claimable(), (false, true));
        run("SELECT lockstep.projection_resume('p')");
        assert_eq!(claimable(), (true, true));
        assert_eq!(
            sqlstate("SELECT lockstep.projection_pause('nothing')"),
            "42704"
        );
    }

    #[pg_test]
    fn reset_goes_to_0_or_to_a_settled_event() {
        log(3);
        run("SELECT lockstep.projection_create('p')");
        run("SELECT lockstep.projection_claim('p')");
        run("SELECT lockstep.projection_advance('p')");
        run("SELECT lockstep.projection_reset('p', 1000002)");
        assert_eq!(
            list("SELECT aggregate_id FROM lockstep.projection_claim('p')"),
            "3"
        );
        run("SELECT lockstep.projection_reset('p')");
        assert_eq!(sqlstate("SELECT lockstep.projection_advance('p')"), "LS002");
        assert_eq!(
            list("SELECT aggregate_id FROM lockstep.projection_claim('p')"),
            "1,2,3"
        );
        for position in ["1000002.5", "1000004", "5"] {
            assert_eq!(
                sqlstate(&format!(
                    "SELECT lockstep.projection_reset('p', {position})"
                )),
                "22023"
            );
        }
        assert_eq!(
            sqlstate("SELECT lockstep.projection_reset('nothing')"),
            "42704"
        );
    }

    #[pg_test]
    fn wait_tells_whether_the_cursor_has_come() {
        log(2);
        run("SELECT lockstep.projection_create('p')");
        run("SET LOCAL lockstep.poll_interval = 1");
        assert!(!one::<bool>(
            "SELECT lockstep.projection_wait('p', 1000001, '5 ms')"
        ));
        run("SELECT lockstep.projection_claim('p')");
        run("SELECT lockstep.projection_advance('p', 1000001)");
        assert!(one::<bool>(
            "SELECT lockstep.projection_wait('p', 1000001, '5 ms')"
        ));
        assert!(!one::<bool>(
            "SELECT lockstep.projection_wait('p', 1000002, '5 ms')"
        ));
        assert_eq!(
            sqlstate("SELECT lockstep.projection_wait('nothing', 1)"),
            "42704"
        );
        assert_eq!(
            sqlstate("SELECT lockstep.projection_wait('p', 1, '0')"),
            "22023"
        );
        run("SELECT lockstep.push_event('a', 'b', 'c')");
        assert_eq!(sqlstate("SELECT lockstep.projection_wait('p', 1)"), "25000");
    }

    fn status(columns: &str) -> String {
        list(&format!(
            "SELECT concat_ws(' ', {columns}) FROM lockstep.projection_status ORDER BY projection, tenant"
        ))
    }

    #[pg_test]
    fn the_status_tells_state_backlog_and_failures() {
        log(3);
        handlers();
        run("INSERT INTO public.bad VALUES ('2')");
        run("SELECT lockstep.projection_create('p', handler => 'public.apply(lockstep.events)')");
        let columns = "position - 1000000, head - 1000000, behind, behind_capped, state, failures, skipped, last_error";
        assert_eq!(
            status("state, behind, oldest_unapplied_age IS NOT NULL, last_applied_at IS NULL"),
            "idle 3 t t"
        );
        assert_eq!(run_once(), "failed 1 0 t");
        assert_eq!(status(columns), "1 3 2 f running 1 0 cannot apply 2");
        assert_eq!(
            one::<i32>("SELECT claim_pid FROM lockstep.projection_status"),
            one::<i32>("SELECT pg_backend_pid()")
        );
        run("UPDATE lockstep.projection_cursors SET retry_at = NULL");
        run("SELECT lockstep.projection_alter('p', event_types => '{y}')");
        assert_eq!(status("behind"), "0");
    }

    #[pg_test]
    fn the_backlog_is_counted_to_ten_thousand() {
        log(10_001);
        run("SELECT lockstep.projection_create('p')");
        run("SELECT lockstep.projection_create('q', start_after => 1000001)");
        assert_eq!(
            status("projection, behind, behind_capped"),
            "p 10000 t,q 10000 f"
        );
        run("SELECT lockstep.projection_reset('q', 1000002)");
        assert_eq!(
            status("projection, behind, behind_capped"),
            "p 10000 t,q 9999 f"
        );
    }

    #[pg_test]
    fn writers_lists_pushes_in_flight() {
        run("SELECT lockstep.push_event('a', '1', 'x', tenant => 't')");
        assert_eq!(
            list("SELECT concat_ws(' ', tenant, pid = pg_backend_pid(), gid, transaction_start = now(),
                                   least_position <= (SELECT max(position) FROM lockstep.events))
                  FROM lockstep.writers"),
            "t t t t"
        );
    }
}
