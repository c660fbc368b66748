//! Jobs, inside one transaction: what one session sees. Claims that a session holds itself expire as those of others do.

#[pgrx::pg_schema]
mod tests {
    use crate::support::*;
    use pgrx::prelude::*;

    /// Enqueues and tells `id enqueued`.
    fn enqueue(arguments: &str) -> String {
        list(&format!(
            "SELECT format('%s %s', job_id, enqueued) FROM lockstep.job_enqueue({arguments})"
        ))
    }

    fn enqueue_new(arguments: &str) -> i64 {
        let answer = enqueue(arguments);
        assert!(answer.ends_with(" t"), "{arguments}: {answer}");
        answer.trim_end_matches(" t").parse().unwrap_or_default()
    }

    /// Claims and tells the kinds, in order.
    fn claim(arguments: &str) -> String {
        list(&format!(
            "SELECT kind FROM lockstep.job_claim('q', 'w', {arguments})"
        ))
    }

    /// `function(id, token)` of the job in progress of this kind.
    fn acknowledge(function: &str, kind: &str, arguments: &str) -> String {
        list(&format!(
            "SELECT lockstep.{function}(job_id, token{arguments}) FROM lockstep.jobs
             WHERE kind = '{kind}' AND state = 'in_progress'"
        ))
    }

    fn states() -> String {
        list(
            "SELECT format('%s %s %s', kind, state, attempts_left) FROM lockstep.jobs ORDER BY job_id",
        )
    }

    fn expire() {
        run(
            "UPDATE lockstep.jobs SET claimed_until = clock_timestamp() - interval '1 second' WHERE token IS NOT NULL",
        );
    }

    #[pg_test]
    fn enqueueing_onto_a_ready_twin_gives_its_id() {
        let first = enqueue_new("'q', 'k', 'a'");
        assert_eq!(enqueue("'q', 'k', 'a'"), format!("{first} f"));
        assert_eq!(states(), "a ready 3");
    }

    #[pg_test]
    fn what_others_have_put_on_the_jobs_sees_claims_and_completions() {
        enqueue_new("'q', 'k', 'a'");
        enqueue_new("'q', NULL, 'b'");
        run("CREATE TABLE public.seen (what text);
             CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 INSERT INTO public.seen VALUES (TG_OP || ' ' || TG_LEVEL);
                 RETURN coalesce(NEW, OLD);
             END $$;
             CREATE TRIGGER a BEFORE UPDATE OR DELETE ON lockstep.jobs FOR EACH ROW EXECUTE FUNCTION public.note();
             CREATE TRIGGER b AFTER UPDATE OR DELETE ON lockstep.jobs FOR EACH STATEMENT EXECUTE FUNCTION public.note()");
        assert_eq!(claim("2"), "a,b");
        assert_eq!(acknowledge("job_complete", "a", ""), "completed");
        assert_eq!(
            list("SELECT what FROM public.seen"),
            "UPDATE ROW,UPDATE ROW,UPDATE STATEMENT,DELETE ROW,DELETE STATEMENT"
        );
    }

    #[pg_test]
    fn what_is_claimed_is_given_as_it_stands_in_the_table() {
        run("ALTER TABLE lockstep.jobs ADD note text DEFAULT 'n'");
        let payload = "('{\"text\": \"' || repeat('long ', 5000) || '\"}')::jsonb";
        enqueue_new(&format!("'q', 'k', 'a', {payload}"));
        enqueue_new("'q', NULL, 'b'");
        run("CREATE TEMP TABLE given AS SELECT * FROM lockstep.job_claim('q', 'w', 2)");
        assert_eq!(
            list(
                "SELECT count(*) FROM given AS g JOIN lockstep.jobs AS j USING (job_id) WHERE to_jsonb(g) = to_jsonb(j)"
            ),
            "2"
        );
    }

    #[pg_test]
    fn enqueueing_while_a_twin_is_in_progress_makes_a_second_job() {
        enqueue_new("'q', 'k', 'a'");
        assert_eq!(claim("1"), "a");
        let second = enqueue_new("'q', 'k', 'a'");
        assert_eq!(enqueue("'q', 'k', 'a'"), format!("{second} f"));
        assert_eq!(states(), "a in_progress 2,a ready 3");
    }

    #[pg_test]
    fn another_key_kind_queue_or_tenant_is_no_twin() {
        enqueue_new("'q', 'k', 'a'");
        enqueue_new("'q', 'l', 'a'");
        enqueue_new("'q', 'k', 'b'");
        enqueue_new("'r', 'k', 'a'");
        enqueue_new("'q', 'k', 'a', tenant => 't'");
        enqueue_new("'q', 'ka', ''' | % _ \"'");
        enqueue_new("'q', 'k%', 'a'");
        enqueue_new("'q', 'k_', 'a'");
        enqueue_new("'q', 'k|', 'a'");
        enqueue_new("'q', 'k''', 'a'");
        assert_eq!(one::<i64>("SELECT count(*) FROM lockstep.jobs"), 10);
    }

    #[pg_test]
    fn without_a_key_there_are_no_twins_and_any_number_in_progress() {
        enqueue_new("'q', NULL, 'a'");
        enqueue_new("'q', NULL, 'a'");
        assert_eq!(claim("5"), "a,a");
    }

    #[pg_test]
    fn keep_leaves_the_twin_and_replace_changes_it() {
        enqueue_new("'q', 'k', 'a', '{\"n\": 1}'");
        enqueue("'q', 'k', 'a', '{\"n\": 2}', priority => 5, delay => '1 hour'");
        let job = "SELECT format('%s %s %s', payload ->> 'n', priority, run_at > clock_timestamp()) FROM lockstep.jobs";
        assert_eq!(list(job), "1 0 f");
        enqueue(
            "'q', 'k', 'a', '{\"n\": 3}', priority => 5, delay => '1 hour', on_twin => 'replace'",
        );
        assert_eq!(list(job), "3 5 t");
        assert_eq!(claim("1"), "");
        enqueue("'q', 'k', 'a', '{\"n\": 4}', on_twin => 'replace'");
        assert_eq!(list(job), "4 0 f");
        assert_eq!(claim("1"), "a");
    }

    #[pg_test]
    fn replace_changes_a_twin_that_has_failed() {
        enqueue_new("'q', 'k', 'a', '{\"n\": 1}'");
        claim("1");
        assert_eq!(
            acknowledge("job_fail", "a", ", 'no', retry_after => '1 hour'"),
            "retry"
        );
        assert_eq!(claim("1"), "");
        assert!(enqueue("'q', 'k', 'a', '{\"n\": 2}', on_twin => 'replace'").ends_with(" f"));
        assert_eq!(
            list("SELECT payload ->> 'n' FROM lockstep.job_claim('q', 'w')"),
            "2"
        );
    }

    #[pg_test]
    fn the_highest_priority_goes_first_then_the_oldest() {
        for (kind, key, priority) in [
            ("a", "'1'", 0),
            ("b", "NULL", 0),
            ("c", "'2'", 7),
            ("d", "NULL", 7),
            ("e", "'3'", -2_147_483_648),
            ("f", "'4'", 2_147_483_647),
            ("g", "'5'", 0),
        ] {
            enqueue_new(&format!("'q', {key}, '{kind}', priority => {priority}"));
        }
        assert_eq!(claim("2"), "f,c");
        assert_eq!(claim("1"), "d");
        assert_eq!(claim("10"), "a,b,g,e");
    }

    #[pg_test]
    fn one_job_of_a_key_at_a_time_in_the_order_of_enqueueing() {
        for kind in ["a", "b", "c"] {
            enqueue_new(&format!("'q', 'k', '{kind}'"));
        }
        enqueue_new("'q', 'l', 'x'");
        assert_eq!(claim("10"), "a,x");
        assert_eq!(claim("10"), "");
        acknowledge("job_complete", "a", "");
        assert_eq!(claim("10"), "b");
        acknowledge("job_complete", "b", "");
        assert_eq!(claim("10"), "c");
    }

    #[pg_test]
    fn the_jobs_of_a_busy_key_do_not_hide_those_of_others() {
        run(
            "SELECT lockstep.job_enqueue('q', 'hot', n::text, priority => 5) FROM generate_series(1, 700) AS n",
        );
        enqueue_new("'q', 'cold', 'cold'");
        enqueue_new("'q', NULL, 'keyless'");
        enqueue_new("'q', 'warm', 'warm', delay => '1 microsecond'");
        assert_eq!(claim("1"), "1");
        assert_eq!(claim("1"), "cold");
        assert_eq!(claim("1"), "keyless");
        assert_eq!(claim("1"), "warm");
        assert_eq!(claim("1"), "");
        acknowledge("job_complete", "1", "");
        assert_eq!(claim("5"), "2");
    }

    #[pg_test]
    fn a_walk_from_key_to_key_reaches_all_of_them() {
        run(
            "SELECT lockstep.job_enqueue('q', 'hot', n::text, priority => 5) FROM generate_series(1, 100) AS n",
        );
        run("SELECT lockstep.job_enqueue('q', 'k' || n, 'cold') FROM generate_series(1, 600) AS n");
        assert_eq!(claim("1"), "1");
        let claims =
            "SELECT count(*) FROM generate_series(1, 600) AS n, lockstep.job_claim('q', 'w' || n)";
        assert_eq!(one::<i64>(claims), 600);
        assert_eq!(claim("1"), "");
    }

    #[pg_test]
    fn a_walk_from_key_to_key_goes_from_the_highest_priority_down() {
        run(
            "SELECT lockstep.job_enqueue('q', 'hot', n::text, priority => n % 3) FROM generate_series(1, 300) AS n",
        );
        assert_eq!(claim("1"), "2");
        run("SELECT lockstep.job_enqueue('q', 'k' || n, 'cold') FROM generate_series(1, 600) AS n");
        run("SELECT lockstep.job_enqueue('q', NULL, 'keyless') FROM generate_series(1, 100) AS n");
        enqueue_new("'q', 'k5', 'soon', priority => 2, delay => '1 hour'");
        enqueue_new("'q', 'z', 'warm', priority => 1");
        enqueue_new("'q', 'k5', 'due', priority => -1, delay => '1 microsecond'");
        assert_eq!(claim("2"), "warm,cold");
        let claims =
            "SELECT count(*) FROM generate_series(1, 700) AS n, lockstep.job_claim('q', 'w' || n)";
        assert_eq!(one::<i64>(claims), 699);
        assert_eq!(claim("1"), "");
        run("DELETE FROM lockstep.jobs WHERE key = 'k5' AND token IS NOT NULL");
        assert_eq!(claim("2"), "due");
    }

    #[pg_test]
    fn a_delayed_job_is_claimed_when_its_time_has_come() {
        enqueue_new("'q', 'k', 'a', delay => '1 hour'");
        enqueue_new("'q', NULL, 'b', delay => '1 hour'");
        assert_eq!(claim("5"), "");
        run("UPDATE lockstep.jobs SET delayed_until = clock_timestamp() - interval '1 second'");
        assert_eq!(claim("5"), "a,b");
    }

    #[pg_test]
    fn a_job_that_has_become_due_goes_by_its_priority() {
        enqueue_new("'q', 'k', 'a'");
        enqueue_new("'q', 'l', 'b', priority => 3, delay => '1 microsecond'");
        enqueue_new("'q', 'm', 'c', priority => 9, delay => '1 hour'");
        enqueue_new("'q', NULL, 'd', priority => 2, delay => '1 microsecond'");
        assert_eq!(claim("5"), "b,d,a");
    }

    #[pg_test]
    fn an_old_token_is_lost_and_changes_nothing() {
        let job = enqueue_new("'q', 'k', 'a'");
        claim("1, ttl => '1 microsecond'");
        let old: i64 = one("SELECT token FROM lockstep.jobs");
        assert_eq!(claim("1"), "a");
        let row = "SELECT j::text FROM lockstep.jobs AS j";
        let before: String = one(row);
        assert_eq!(
            one::<String>(&format!("SELECT lockstep.job_complete({job}, {old})")),
            "lost"
        );
        assert_eq!(
            one::<String>(&format!("SELECT lockstep.job_fail({job}, {old}, 'no')")),
            "lost"
        );
        assert_eq!(
            list(&format!(
                "SELECT lockstep.job_renew(ARRAY[{job}::bigint], ARRAY[{old}::bigint])"
            )),
            ""
        );
        assert_eq!(
            sqlstate(&format!("SELECT lockstep.job_guard({job}, {old})")),
            "LS007"
        );
        assert_eq!(one::<String>(row), before);
    }

    #[pg_test]
    fn the_second_acknowledgement_is_lost() {
        let job = enqueue_new("'q', 'k', 'a'");
        claim("1");
        let token: i64 = one("SELECT token FROM lockstep.jobs");
        let complete = format!("SELECT lockstep.job_complete({job}, {token})");
        assert_eq!(one::<String>(&complete), "completed");
        assert_eq!(one::<String>(&complete), "lost");
        let fail = format!("SELECT lockstep.job_fail({job}, {token}, 'no')");
        assert_eq!(one::<String>(&fail), "lost");
        assert_eq!(states(), "");
    }

    #[pg_test]
    fn a_failure_ends_the_claim() {
        let job = enqueue_new("'q', 'k', 'a'");
        claim("1");
        let token: i64 = one("SELECT token FROM lockstep.jobs");
        assert_eq!(
            acknowledge("job_fail", "a", ", 'no', retry_after => '0'"),
            "retry"
        );
        let complete = format!("SELECT lockstep.job_complete({job}, {token})");
        assert_eq!(one::<String>(&complete), "lost");
        assert_eq!(claim("1"), "a");
    }

    #[pg_test]
    fn three_attempts_are_retry_retry_dead() {
        enqueue_new("'q', 'k', 'a'");
        let mut ends = Vec::new();
        for attempt in 1..=3 {
            assert_eq!(claim("1"), "a", "attempt {attempt}");
            ends.push(acknowledge(
                "job_fail",
                "a",
                &format!(", 'error {attempt}', retry_after => '0'"),
            ));
        }
        assert_eq!(ends, ["retry", "retry", "dead"]);
        assert_eq!(claim("1"), "");
        assert_eq!(
            list("SELECT format('%s %s %s %s', error, attempts, max_attempts, last_holder) FROM lockstep.dead_jobs
                  WHERE died_at >= claimed_at AND claimed_at >= created_at"),
            "error 3 3 3 w"
        );
    }

    #[pg_test]
    fn without_a_number_of_attempts_a_job_never_dies() {
        enqueue_new("'q', 'k', 'a', max_attempts => NULL");
        for _ in 0..20 {
            assert_eq!(claim("1"), "a");
            assert_eq!(
                acknowledge("job_fail", "a", ", 'no', retry_after => '0'"),
                "retry"
            );
        }
    }

    #[pg_test]
    fn a_worker_that_only_crashes_ends_in_dead_letters() {
        enqueue_new("'q', 'k', 'a'");
        enqueue_new("'q', NULL, 'b'");
        for attempts_left in [2, 1, 0] {
            assert_eq!(claim("5"), "a,b");
            assert_eq!(
                list("SELECT DISTINCT attempts_left FROM lockstep.jobs"),
                attempts_left.to_string()
            );
            expire();
        }
        assert_eq!(claim("5"), "");
        assert_eq!(
            list("SELECT kind || ' ' || error FROM lockstep.dead_jobs ORDER BY 1"),
            "a the claim of \"w\" expired,b the claim of \"w\" expired"
        );
    }

    #[pg_test]
    fn a_takeover_reports_the_previous_attempt() {
        enqueue_new("'q', 'k', 'a'");
        run("SELECT lockstep.job_claim('q', 'one', ttl => '1 microsecond')");
        assert_eq!(
            list("SELECT format('%s|%s|%s|%s|%s', previous_holder, last_error, last_failed_at IS NOT NULL, attempts, holder)
                  FROM lockstep.job_claim('q', 'two')"),
            "one|the claim of \"one\" expired|t|2|two"
        );
    }

    #[pg_test]
    fn an_expired_claim_goes_in_the_order_of_its_priority() {
        enqueue_new("'q', 'k', 'low'");
        assert_eq!(claim("1, ttl => '1 microsecond'"), "low");
        enqueue_new("'q', 'l', 'high', priority => 1");
        enqueue_new("'q', 'm', 'late'");
        assert_eq!(claim("1"), "high");
        assert_eq!(claim("1"), "low");
    }

    #[pg_test]
    fn an_expired_claim_holds_up_no_job_of_its_key_with_more_priority() {
        enqueue_new("'q', 'k', 'low'");
        claim("1, ttl => '1 microsecond'");
        enqueue_new("'q', 'k', 'high', priority => 1");
        assert_eq!(claim("5"), "high");
        assert_eq!(states(), "low ready 2,high in_progress 2");
    }

    #[pg_test]
    fn an_expired_claim_that_nobody_took_over_is_still_its_workers() {
        enqueue_new("'q', 'k', 'a'");
        claim("1");
        expire();
        assert_eq!(
            list(
                "SELECT (SELECT lockstep.job_renew(ARRAY[job_id], ARRAY[token])) = job_id FROM lockstep.jobs"
            ),
            "true"
        );
        expire();
        acknowledge("job_guard", "a", "");
        assert_eq!(acknowledge("job_complete", "a", ""), "completed");
    }

    #[pg_test]
    fn what_fails_is_merged_into_its_ready_twin() {
        enqueue_new("'q', 'k', 'a', '{\"n\": 1}'");
        claim("1");
        let twin = enqueue_new("'q', 'k', 'a', '{\"n\": 2}'");
        assert_eq!(acknowledge("job_fail", "a", ", 'no'"), "retry");
        assert_eq!(
            list(
                "SELECT format('%s %s %s %s', job_id, payload ->> 'n', attempts_left, last_error) FROM lockstep.jobs"
            ),
            format!("{twin} 2 2 no")
        );
        assert_eq!(claim("1"), "a");
    }

    #[pg_test]
    fn what_expires_is_merged_into_its_ready_twin() {
        enqueue_new("'q', 'k', 'a', max_attempts => NULL");
        claim("1");
        let twin = enqueue_new("'q', 'k', 'a', max_attempts => 2");
        expire();
        assert_eq!(
            list(
                "SELECT format('%s %s %s', job_id, attempts_left, last_error) FROM lockstep.job_claim('q', 'w2')"
            ),
            format!("{twin} 1 the claim of \"w\" expired")
        );
        assert_eq!(states(), "a in_progress 1");
    }

    #[pg_test]
    fn the_last_attempt_dies_beside_its_twin_and_leaves_that_its_own() {
        enqueue_new("'q', 'k', 'a', max_attempts => 1");
        claim("1");
        enqueue_new("'q', 'k', 'a'");
        assert_eq!(acknowledge("job_fail", "a", ", 'no'"), "dead");
        assert_eq!(states(), "a ready 3");
    }

    #[pg_test]
    fn reaping_makes_expired_claims_ready_or_dead() {
        enqueue_new("'q', 'k', 'a', max_attempts => 1");
        enqueue_new("'q', 'l', 'b'");
        enqueue_new("'q', 'm', 'c'");
        enqueue_new("'q', 'n', 'd', tenant => 't'");
        assert_eq!(claim("5"), "a,b,c");
        assert_eq!(claim("5, tenant => 't'"), "d");
        enqueue_new("'q', 'l', 'b', max_attempts => 5");
        run(
            "UPDATE lockstep.jobs SET claimed_until = clock_timestamp() WHERE token IS NOT NULL AND kind <> 'c'",
        );
        assert_eq!(one::<i64>("SELECT lockstep.job_reap('')"), 2);
        assert_eq!(states(), "c in_progress 2,d in_progress 2,b ready 2");
        assert_eq!(list("SELECT kind FROM lockstep.dead_jobs"), "a");
        assert_eq!(one::<i64>("SELECT lockstep.job_reap()"), 1);
        assert_eq!(one::<i64>("SELECT lockstep.job_reap()"), 0);
        assert_eq!(states(), "c in_progress 2,d ready 2,b ready 2");
    }

    #[pg_test]
    fn renewing_returns_what_is_still_claimed() {
        let ids: Vec<i64> = ["'1'", "'2'", "NULL"]
            .iter()
            .map(|key| enqueue_new(&format!("'q', {key}, 'a'")))
            .collect();
        claim("3, ttl => '1 second'");
        let renewed = list(
            "SELECT r FROM lockstep.job_renew((SELECT array_agg(job_id ORDER BY job_id) FROM lockstep.jobs),
                 (SELECT array_agg(CASE WHEN key = '2' THEN token + 1 ELSE token END ORDER BY job_id) FROM lockstep.jobs),
                 ttl => '1 hour') AS r",
        );
        assert_eq!(renewed, format!("{},{}", ids[0], ids[2]));
        assert_eq!(
            list(
                "SELECT claimed_until > clock_timestamp() + interval '59 minutes' FROM lockstep.jobs ORDER BY job_id"
            ),
            "true,false,true"
        );
    }

    #[pg_test]
    fn backoff_doubles_up_to_its_limit_with_jitter() {
        run(
            "SELECT lockstep.queue_configure('q', backoff => '10 seconds', max_backoff => '25 seconds')",
        );
        enqueue_new("'q', 'k', 'a', max_attempts => NULL");
        for longest in [10, 20, 25, 25] {
            run("UPDATE lockstep.jobs SET delayed_until = LEAST(delayed_until, clock_timestamp())");
            assert_eq!(claim("1"), "a");
            acknowledge("job_fail", "a", ", 'no'");
            let waits: f64 = one(
                "SELECT EXTRACT(epoch FROM run_at - last_failed_at)::float8 FROM lockstep.jobs WHERE run_at = delayed_until",
            );
            assert!(
                waits >= f64::from(longest) / 2.0 && waits <= f64::from(longest),
                "{waits} of {longest}"
            );
        }
    }

    #[pg_test]
    fn backoffs_of_many_failures_are_not_all_alike() {
        run("SELECT lockstep.job_enqueue('q', n::text, 'a') FROM generate_series(1, 20) AS n");
        claim("20");
        acknowledge("job_fail", "a", ", 'no'");
        assert!(
            one::<i64>(
                "SELECT count(DISTINCT round(EXTRACT(epoch FROM run_at - last_failed_at), 3)) FROM lockstep.jobs"
            ) > 10
        );
    }

    #[pg_test]
    fn a_job_can_fail_more_often_than_any_backoff_can_double() {
        enqueue_new("'q', 'k', 'a', max_attempts => NULL");
        run("UPDATE lockstep.jobs SET attempts = 2000000000");
        claim("1");
        assert_eq!(acknowledge("job_fail", "a", ", 'no'"), "retry");
        run(
            "SELECT lockstep.queue_configure('q', backoff => '900 years', max_backoff => '1000 years')",
        );
        run("UPDATE lockstep.jobs SET delayed_until = clock_timestamp()");
        claim("1");
        assert_eq!(acknowledge("job_fail", "a", ", 'no'"), "retry");
    }

    #[pg_test]
    fn cancelling_removes_a_ready_job_and_one_in_progress() {
        let ready = enqueue_new("'q', 'k', 'a'");
        let other = enqueue_new("'q', 'l', 'b'");
        assert_eq!(claim("1"), "a");
        let token: i64 = one("SELECT token FROM lockstep.jobs WHERE kind = 'a'");
        for job in [ready, other] {
            assert!(one::<bool>(&format!("SELECT lockstep.job_cancel({job})")));
            assert!(!one::<bool>(&format!("SELECT lockstep.job_cancel({job})")));
        }
        assert_eq!(
            one::<String>(&format!("SELECT lockstep.job_complete({ready}, {token})")),
            "lost"
        );
    }

    #[pg_test]
    fn a_dead_job_is_requeued_with_all_its_attempts() {
        let job = enqueue_new("'q', 'k', 'a', '{\"n\": 1}', max_attempts => 1, priority => 4");
        claim("1");
        acknowledge("job_fail", "a", ", 'no'");
        assert!(one::<bool>(&format!("SELECT lockstep.job_requeue({job})")));
        assert!(!one::<bool>(&format!("SELECT lockstep.job_requeue({job})")));
        assert_eq!(
            list(
                "SELECT format('%s %s %s %s %s', job_id, payload ->> 'n', attempts_left, max_attempts, priority) FROM lockstep.jobs"
            ),
            format!("{job} 1 1 1 4")
        );
        assert_eq!(claim("1"), "a");
    }

    #[pg_test]
    fn requeueing_beside_a_ready_twin_leaves_the_twin() {
        let job = enqueue_new("'q', 'k', 'a', max_attempts => 1");
        claim("1");
        acknowledge("job_fail", "a", ", 'no'");
        enqueue_new("'q', 'k', 'a'");
        assert!(one::<bool>(&format!("SELECT lockstep.job_requeue({job})")));
        assert_eq!(states(), "a ready 3");
        assert_eq!(list("SELECT job_id FROM lockstep.dead_jobs"), "");
    }

    #[pg_test]
    fn dead_jobs_are_discarded_one_by_one_and_purged_by_age() {
        run("SELECT lockstep.job_enqueue('q', n::text, 'a', max_attempts => 1, tenant => CASE WHEN n = 4 THEN 't' ELSE '' END)
             FROM generate_series(1, 4) AS n");
        claim("5");
        claim("5, tenant => 't'");
        acknowledge("job_fail", "a", ", 'no'");
        assert!(one::<bool>(
            "SELECT lockstep.job_discard(min(job_id)) FROM lockstep.dead_jobs"
        ));
        assert!(!one::<bool>("SELECT lockstep.job_discard(-1)"));
        assert_eq!(one::<i64>("SELECT lockstep.job_purge('1 hour')"), 0);
        assert_eq!(one::<i64>("SELECT lockstep.job_purge('0', 't')"), 1);
        assert_eq!(one::<i64>("SELECT lockstep.job_purge('0')"), 2);
    }

    #[pg_test]
    fn a_paused_queue_gives_no_jobs_until_it_is_resumed() {
        enqueue_new("'q', 'k', 'a'");
        enqueue_new("'q', 'k', 'b', tenant => 't'");
        run("SELECT lockstep.queue_pause('q')");
        assert_eq!(claim("1"), "");
        assert_eq!(claim("1, tenant => NULL"), "b");
        run("SELECT lockstep.queue_resume('q')");
        assert_eq!(claim("1"), "a");
    }

    #[pg_test]
    fn a_queue_paused_in_every_tenant_can_be_resumed_in_one() {
        enqueue_new("'q', 'k', 'a'");
        enqueue_new("'q', 'k', 'b', tenant => 't'");
        run("SELECT lockstep.queue_resume('q', 't'), lockstep.queue_pause('q', NULL)");
        assert_eq!(claim("5, tenant => NULL"), "");
        run("SELECT lockstep.queue_resume('q', 't')");
        assert_eq!(claim("5, tenant => NULL"), "b");
        run("SELECT lockstep.queue_resume('q', NULL)");
        assert_eq!(claim("5, tenant => NULL"), "a");
    }

    #[pg_test]
    fn a_limit_holds_for_the_jobs_in_progress() {
        run("SELECT lockstep.job_enqueue('q', n::text, n::text) FROM generate_series(1, 3) AS n");
        run("SELECT lockstep.job_enqueue('q', NULL, n::text) FROM generate_series(4, 6) AS n");
        run("SELECT lockstep.queue_configure('q', max_in_progress => 4)");
        assert_eq!(claim("10"), "1,2,3,4");
        assert_eq!(claim("10"), "");
        acknowledge("job_complete", "2", "");
        assert_eq!(claim("10"), "5");
        run("SELECT lockstep.queue_configure('q', max_in_progress => 0)");
        assert_eq!(claim("10"), "6");
        run("SELECT lockstep.job_enqueue('q', NULL, '7')");
        run("SELECT lockstep.queue_configure('q', max_in_progress => 5)");
        assert_eq!(claim("10"), "");
        acknowledge("job_complete", "1", "");
        assert_eq!(claim("10"), "7");
    }

    #[pg_test]
    fn a_lowered_limit_counts_the_jobs_above_it() {
        run("SELECT lockstep.job_enqueue('q', NULL, n::text) FROM generate_series(1, 30) AS n");
        run("SELECT lockstep.queue_configure('q', max_in_progress => 10)");
        assert_eq!(claim("20"), "1,2,3,4,5,6,7,8,9,10");
        for kind in ["1", "2", "3", "4", "5"] {
            acknowledge("job_complete", kind, "");
        }
        run("SELECT lockstep.queue_configure('q', max_in_progress => 5)");
        assert_eq!(claim("20"), "");
        acknowledge("job_complete", "9", "");
        assert_eq!(claim("20"), "11");
        run("SELECT lockstep.queue_configure('q', max_in_progress => 0)");
        assert_eq!(claim("2"), "12,13");
        run("SELECT lockstep.queue_configure('q', max_in_progress => 6)");
        assert_eq!(claim("20"), "");
        acknowledge("job_complete", "11", "");
        assert_eq!(claim("20"), "");
        acknowledge("job_complete", "6", "");
        assert_eq!(claim("20"), "14");
    }

    #[pg_test]
    fn a_full_queue_that_gets_room_in_a_claim_uses_it() {
        run("SELECT lockstep.queue_configure('q', max_in_progress => 1)");
        for (key, attempts) in [("k", "1"), ("NULL", "3")] {
            run(&format!(
                "SELECT lockstep.job_enqueue('q', NULLIF('{key}', 'NULL'), 'spent', max_attempts => 1)"
            ));
            assert_eq!(claim("5"), "spent");
            enqueue_new(&format!(
                "'q', 'first', 'first', max_attempts => {attempts}, priority => 5"
            ));
            expire();
            assert_eq!(claim("5"), "first");
            acknowledge("job_complete", "first", "");
        }
        enqueue_new("'q', 'k', 'twin'");
        assert_eq!(claim("5"), "twin");
        enqueue_new("'q', 'k', 'twin'");
        enqueue_new("'q', 'first', 'first', priority => 5");
        expire();
        assert_eq!(claim("5"), "twin", "a takeover keeps its place");
        assert_eq!(claim("5"), "");
    }

    #[pg_test]
    fn an_expired_claim_is_taken_over_in_a_full_queue() {
        run("SELECT lockstep.queue_configure('q', max_in_progress => 1)");
        enqueue_new("'q', 'k', 'a'");
        enqueue_new("'q', 'l', 'b', priority => 3, delay => '1 microsecond'");
        enqueue_new("'q', 'm', 'c'");
        assert_eq!(claim("10"), "b");
        enqueue_new("'q', 'n', 'd', priority => 9");
        expire();
        assert_eq!(claim("10"), "b");
        acknowledge("job_complete", "b", "");
        assert_eq!(claim("10"), "d");
    }

    #[pg_test]
    fn the_setting_limits_queues_of_which_nothing_was_said() {
        run("SELECT lockstep.job_enqueue('q', NULL, n::text) FROM generate_series(1, 5) AS n");
        run("SET LOCAL lockstep.max_jobs_in_progress = 2");
        assert_eq!(claim("10"), "1,2");
        run("SELECT lockstep.queue_configure('q', max_in_progress => 3)");
        assert_eq!(claim("10"), "3");
        run("SELECT lockstep.queue_configure('q', max_in_progress => -1)");
        assert_eq!(claim("10"), "");
    }

    #[pg_test]
    fn any_tenant_is_every_tenant_in_turns() {
        run(
            "SELECT lockstep.job_enqueue('q', NULL, 'big', tenant => 'big', priority => 9) FROM generate_series(1, 50)",
        );
        run(
            "SELECT lockstep.job_enqueue('q', NULL, 'small', tenant => t) FROM unnest(ARRAY['', 'a', 'z']) AS t, generate_series(1, 2)",
        );
        let claims = "SELECT tenant, count(*) FROM generate_series(1, 8) AS n, lockstep.job_claim('q', 'w' || n, tenant => NULL) GROUP BY 1 ORDER BY 1";
        assert_eq!(
            list(&format!(
                "SELECT format('%s %s', tenant, count) FROM ({claims}) AS c"
            )),
            " 2,a 2,big 2,z 2"
        );
        assert_eq!(claim("3, tenant => NULL"), "big,big,big");
    }

    #[pg_test]
    fn a_queue_of_another_name_is_not_touched() {
        enqueue_new("'r', 'k', 'a'");
        assert_eq!(claim("5"), "");
        assert_eq!(claim("5, tenant => NULL"), "");
    }

    #[pg_test]
    fn the_status_counts_and_measures() {
        enqueue_new("'q', 'done', 'done', priority => 1");
        claim("1");
        run(
            "UPDATE lockstep.jobs SET run_at = clock_timestamp() - interval '60 seconds',
                                      claimed_at = clock_timestamp() - interval '20 seconds'",
        );
        acknowledge("job_complete", "done", "");
        enqueue_new("'q', 'dead', 'dead', max_attempts => 1");
        claim("1");
        acknowledge("job_fail", "dead", ", 'no'");
        enqueue_new("'q', '1', 'busy'");
        claim("1");
        enqueue_new("'q', '2', 'ready'");
        enqueue_new("'q', '3', 'delayed', delay => '1 hour'");
        run(
            "UPDATE lockstep.jobs SET run_at = clock_timestamp() - interval '5 minutes' WHERE kind = 'ready'",
        );
        assert_eq!(
            list("SELECT format('%s %s %s %s %s %s %s %s %s', ready, delayed, in_progress, expired, dead,
                                round(EXTRACT(epoch FROM oldest_age)), round(EXTRACT(epoch FROM mean_wait)),
                                round(EXTRACT(epoch FROM mean_run)), paused)
                  FROM lockstep.queue_status WHERE queue = 'q'"),
            "1 1 1 0 1 300 40 20 f"
        );
    }

    #[pg_test]
    fn after_data_loss_no_token_counts_and_no_id_is_given_again() {
        let job = enqueue_new("'q', 'k', 'a'");
        claim("1");
        let token: i64 = one("SELECT token FROM lockstep.jobs");
        run("SELECT lockstep.after_data_loss()");
        let complete = format!("SELECT lockstep.job_complete({job}, {token})");
        assert_eq!(one::<String>(&complete), "lost");
        assert!(enqueue_new("'r', 'k', 'a'") > job + (1 << 32));
        expire();
        assert_eq!(
            list(&format!(
                "SELECT token > {token} + 2::bigint ^ 32 FROM lockstep.job_claim('q', 'w')"
            )),
            "true"
        );
    }

    #[pg_test]
    fn after_data_loss_ids_of_jobs_are_above_all_that_are_there() {
        let job: i64 = enqueue_new("'q', 'k', 'a'");
        run("SELECT setval('lockstep.job_id', 1, false)"); // as a logical replication leaves it
        run("SELECT lockstep.after_data_loss()");
        let later: i64 = enqueue_new("'q', 'k', 'b'");
        assert_eq!(later, job + (1 << 32) + 1);
    }

    #[pg_test]
    fn the_errors_name_the_values() {
        let long = "x".repeat(10_000);
        for (statement, state, message) in [
            (
                "job_enqueue('', 'k', 'a')",
                "22023",
                "queue must not be empty",
            ),
            (
                "job_enqueue('q', '', 'a')",
                "22023",
                "key must not be empty",
            ),
            (
                "job_enqueue('q', 'k', '')",
                "22023",
                "kind must not be empty",
            ),
            (
                "job_enqueue('q', 'k', 'a', on_twin => 'drop')",
                "22023",
                "on_twin must be keep or replace, not \"drop\"",
            ),
            (
                "job_enqueue('q', 'k', 'a', max_attempts => 0)",
                "22023",
                "max_attempts must be at least 1, not 0",
            ),
            (
                "job_enqueue('q', 'k', 'a', delay => '-1 second')",
                "22023",
                "delay must be finite and not negative",
            ),
            ("job_claim('q', '')", "22023", "holder must not be empty"),
            (
                "job_claim('q', 'w', 0)",
                "22023",
                "max_jobs must be at least 1, not 0",
            ),
            (
                "job_claim('q', 'w', ttl => '0')",
                "22023",
                "ttl must be above 0",
            ),
            (
                "job_renew('{1,2}', '{1}')",
                "22023",
                "job_ids and tokens must be of one length, not 2 and 1",
            ),
            (
                "job_renew('{NULL}', '{1}')",
                "22004",
                "argument \"job_ids\" must not contain null",
            ),
            (
                "job_fail(1, 1, 'no', '-1 second')",
                "22023",
                "retry_after must be finite and not negative",
            ),
            (
                "job_guard(1, 2)",
                "LS007",
                "job 1 is not claimed with token 2",
            ),
            (
                "queue_configure('q', -2)",
                "22023",
                "max_in_progress must be between -1 and 10000, not -2",
            ),
        ] {
            let raised = raised(&format!("SELECT lockstep.{statement}"));
            assert_eq!(
                (raised.sqlstate.as_str(), raised.message.as_str()),
                (state, message),
                "{statement}"
            );
        }
        for statement in [
            format!("job_enqueue('{long}', 'k', 'a')"),
            format!("job_enqueue('q', '{long}', 'a')"),
            format!("job_enqueue('q', 'k', '{long}')"),
        ] {
            let raised = raised(&format!("SELECT lockstep.{statement}"));
            assert_eq!(raised.sqlstate, "22023");
            assert_eq!(
                raised.detail,
                "It has 10000 bytes, at most 600 are allowed."
            );
        }
    }

    #[pg_test]
    fn names_mean_nothing_to_patterns_or_quotes() {
        let names = ["%", "_", "|", "'", "\"", "\\", "a%", "a_", "a|b", "é", " "];
        for name in names {
            let name = name.replace('\'', "''");
            run(&format!(
                "SELECT lockstep.job_enqueue('{name}', '{name}', '{name}', tenant => '{name}')"
            ));
        }
        for name in names {
            let quoted = name.replace('\'', "''");
            assert_eq!(
                list(&format!(
                    "SELECT concat_ws(',', tenant, queue, key, kind) FROM lockstep.job_claim('{quoted}', 'w', 10, tenant => NULL)"
                )),
                [name; 4].join(",")
            );
        }
    }

    #[pg_test]
    fn the_longest_names_fit_into_the_indexes() {
        run("SELECT lockstep.job_enqueue(lpad('', 600, md5('q')), (SELECT string_agg(md5(n::text), '') FROM generate_series(1, 18) AS n),
                 (SELECT string_agg(md5((n * 31)::text), '') FROM generate_series(1, 18) AS n),
                 tenant => (SELECT string_agg(md5((n * 37)::text), '') FROM generate_series(1, 25) AS n))");
        assert_eq!(one::<i64>("SELECT count(*) FROM lockstep.jobs"), 1);
    }

    /// Rows are looked up by the numbers of columns.
    #[pg_test]
    fn columns_looked_up_by_number_are_where_the_code_has_them() {
        let columns = |table: &str| {
            list(&format!(
                "SELECT string_agg(attname, ' ' ORDER BY attnum) FROM pg_attribute
                 WHERE attrelid = '{table}'::regclass AND attnum > 0 AND NOT attisdropped"
            ))
        };
        assert_eq!(
            columns("lockstep.jobs"),
            "job_id tenant queue key kind payload priority state attempts_left token holder claimed_until run_at created_at \
             last_error last_failed_at previous_holder attempts max_attempts claimed_at enqueued slot retry_id delayed_until lane"
        );
        assert_eq!(
            columns("lockstep.queues"),
            "queue every_tenant tenant paused max_in_progress backoff max_backoff"
        );
        assert_eq!(
            columns("lockstep.leases"),
            "name holder token acquired_at renewed_at expires_at ttl transitions metadata min_hold_until lock_delay stolen_from \
             steal_reason"
        );
        assert_eq!(
            columns("lockstep.events"),
            "tenant position aggregate_type aggregate_id sequence event_type event_id payload metadata created_at"
        );
        assert_eq!(
            columns("lockstep.jobs_twin_key"),
            "key queue tenant kind retry_id"
        );
        assert_eq!(columns("lockstep.jobs_in_progress_key"), "key queue tenant");
        assert_eq!(
            columns("lockstep.jobs_order_idx"),
            "lane priority delayed_until job_id"
        );
        assert_eq!(
            columns("lockstep.jobs_delayed_until_idx"),
            "queue tenant delayed_until"
        );
        assert_eq!(
            columns("lockstep.jobs_claimed_until_idx"),
            "queue tenant claimed_until"
        );
        assert_eq!(columns("lockstep.queues_pkey"), "queue every_tenant tenant");
        assert_eq!(
            columns("lockstep.resources"),
            "tenant resource incarnation generation created_at changed_at deleted_at"
        );
        assert_eq!(
            columns("lockstep.replicas"),
            "tenant resource replica generation synced_at due_at sync_token sync_holder sync_started_at sync_expires_at \
             sync_generation sync_source sync_source_lost retry_count retry_at missing_at_source last_error"
        );
        assert_eq!(columns("lockstep.resources_pkey"), "tenant resource");
        assert_eq!(
            columns("lockstep.replicas_tenant_due_at_idx"),
            "tenant due_at"
        );
    }

    #[pg_test]
    fn jobs_claimed_together_come_in_their_order() {
        enqueue_new("'q', 'k1', 'low'");
        enqueue_new("'q', NULL, 'keyless'");
        enqueue_new("'q', 'k2', 'high', priority => 1");
        enqueue_new("'q', 'k3', 'last'");
        assert_eq!(claim("10"), "high,low,keyless,last");
    }
}
