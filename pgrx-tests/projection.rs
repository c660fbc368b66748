//! Projections' logic, inside one transaction. It has pushed, so its claims take the horizon, which ignores its own pushes.

#[pgrx::pg_schema]
mod tests {
    use crate::support::*;
    use pgrx::prelude::*;

    fn push(aggregate_type: &str, count: usize) {
        run(&format!(
            "SELECT lockstep.push_event('{aggregate_type}', n::text, 'x') FROM generate_series(1, {count}) AS n"
        ));
    }

    fn claim(arguments: &str) -> String {
        list(&format!(
            "SELECT aggregate_type || aggregate_id FROM lockstep.projection_claim('p'{arguments})"
        ))
    }

    fn state() -> String {
        list("SELECT format('%s %s', status, more) FROM lockstep.projection_claim_state('p')")
    }

    fn advance() {
        run("SELECT lockstep.projection_advance('p')");
    }

    #[pg_test]
    fn a_claim_gives_the_same_events_until_advance() {
        push("a", 2);
        run("SELECT lockstep.projection_create('p')");
        assert_eq!(claim(""), "a1,a2");
        assert_eq!(claim(""), "a1,a2");
        assert_eq!(state(), "claimed f");
        advance();
        assert_eq!(claim(""), "");
        assert_eq!(state(), "none f");
    }

    #[pg_test]
    fn batches_cut_a_push() {
        run("SELECT lockstep.projection_create('p')");
        run("SELECT * FROM lockstep.push_events((SELECT jsonb_agg(jsonb_build_object(
                 'aggregate_type', 'a', 'aggregate_id', '1', 'event_type', 'x')) FROM generate_series(1, 500)))");
        let mut batches = Vec::new();
        for _ in 0..3 {
            batches.push(one::<i64>(
                "SELECT count(*) FROM lockstep.projection_claim('p')",
            ));
            batches.push(i64::from(state() == "claimed t"));
            advance();
        }
        assert_eq!(batches, [200, 1, 200, 1, 100, 0]);
    }

    #[pg_test]
    fn what_others_have_put_on_the_cursors_sees_every_change() {
        push("a", 3);
        run("SELECT lockstep.projection_create('p', batch_size => 1)");
        run("CREATE TABLE public.seen (what text);
             CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 INSERT INTO public.seen
                 VALUES (TG_LEVEL || ' ' || TG_OP || ' ' || (SELECT count(*) FROM lockstep.projection_cursors));
                 RETURN NEW;
             END $$;
             CREATE TRIGGER a BEFORE UPDATE ON lockstep.projection_cursors FOR EACH ROW EXECUTE FUNCTION public.note();
             CREATE TRIGGER b AFTER INSERT ON lockstep.projection_cursors FOR EACH STATEMENT EXECUTE FUNCTION public.note()");
        for _ in 0..3 {
            claim("");
            advance();
        }
        assert_eq!(
            list("SELECT what FROM public.seen"),
            "STATEMENT INSERT 1,ROW UPDATE 1,STATEMENT INSERT 1,ROW UPDATE 1,STATEMENT INSERT 1"
        );
        assert_eq!(claim(""), "");
    }

    #[pg_test]
    fn an_advance_keeps_what_others_have_added_to_the_cursors() {
        push("a", 3);
        run("SELECT lockstep.projection_create('p', batch_size => 1)");
        claim("");
        advance();
        run(
            "ALTER TABLE lockstep.projection_cursors ADD note text, ADD moved int DEFAULT 7;
             UPDATE lockstep.projection_cursors SET note = repeat('x', 10000)",
        );
        for _ in 0..2 {
            claim("");
            advance();
        }
        assert_eq!(
            list("SELECT format('%s %s', length(note), moved) FROM lockstep.projection_cursors"),
            "10000 7"
        );
        assert_eq!(claim(""), "");
    }

    #[pg_test]
    fn max_events_and_max_position_bound_a_claim() {
        push("a", 5);
        run("SELECT lockstep.projection_create('p', batch_size => 4)");
        assert_eq!(claim(""), "a1,a2,a3,a4");
        assert_eq!(state(), "claimed t");
        assert_eq!(claim(", max_events => 2"), "a1,a2");
        let third = "(SELECT position FROM lockstep.events WHERE aggregate_id = '3')";
        assert_eq!(claim(&format!(", max_position => {third}")), "a1,a2,a3");
        assert_eq!(state(), "claimed f");
        assert_eq!(claim(", max_position => 0"), "");
        assert_eq!(state(), "none f");
    }

    #[pg_test]
    fn advance_to_a_position_inside_the_batch() {
        push("a", 3);
        run("SELECT lockstep.projection_create('p')");
        claim("");
        let second: String =
            one("SELECT position::text FROM lockstep.events WHERE aggregate_id = '2'");
        assert_eq!(
            one::<String>(&format!(
                "SELECT lockstep.projection_advance('p', {second})::text"
            )),
            second
        );
        assert_eq!(claim(""), "a3");
    }

    #[pg_test]
    fn advance_refuses_what_is_not_an_event_of_the_batch() {
        push("a", 1);
        push("b", 1);
        push("a", 1);
        run("SELECT lockstep.projection_create('p', aggregate_types => '{a}')");
        claim("");
        let other = "(SELECT position FROM lockstep.events WHERE aggregate_type = 'b')";
        for position in [other, "0", "0.5", "99999", "-1", "'NaN'"] {
            assert_eq!(
                sqlstate(&format!(
                    "SELECT lockstep.projection_advance('p', {position})"
                )),
                "22023",
                "{position}"
            );
        }
    }

    #[pg_test]
    fn advance_does_not_go_back() {
        push("a", 2);
        run("SELECT lockstep.projection_create('p')");
        claim("");
        advance();
        assert_eq!(
            sqlstate(
                "SELECT lockstep.projection_advance('p', (SELECT min(position) FROM lockstep.events))"
            ),
            "22023"
        );
    }

    #[pg_test]
    fn advance_without_a_claim_is_refused() {
        run("SELECT lockstep.projection_create('p')");
        let error = raised("SELECT lockstep.projection_advance('p')");
        assert_eq!(error.sqlstate, "LS002");
        assert_eq!(
            error.message,
            r#"this transaction holds no claim on projection "p" of tenant """#
        );
        assert_eq!(error.detail, "It made none, or rolled back past it.");
    }

    #[pg_test]
    fn rolling_back_past_a_claim_loses_it_and_keeps_an_earlier_one() {
        push("a", 3);
        run("SELECT lockstep.projection_create('p')");
        run("SELECT lockstep.projection_create('q')");
        claim(", max_events => 1");
        run("DO $$ BEGIN
                 PERFORM lockstep.projection_claim('p');
                 PERFORM lockstep.projection_claim('q');
                 RAISE EXCEPTION 'undo';
             EXCEPTION WHEN raise_exception THEN NULL; END $$");
        assert_eq!(sqlstate("SELECT lockstep.projection_advance('q')"), "LS002");
        advance();
        assert_eq!(claim(""), "a2,a3");
    }

    #[pg_test]
    fn a_claim_in_a_savepoint_that_is_released_counts() {
        push("a", 1);
        run("SELECT lockstep.projection_create('p')");
        run("DO $$ BEGIN
                 PERFORM lockstep.projection_claim('p');
             EXCEPTION WHEN raise_exception THEN NULL; END $$");
        advance();
        assert_eq!(claim(""), "");
    }

    #[pg_test]
    fn advancing_an_empty_batch_writes_nothing() {
        run("SELECT lockstep.projection_create('p')");
        claim("");
        assert_eq!(
            one::<String>("SELECT lockstep.projection_advance('p')::text"),
            "0"
        );
        assert_eq!(
            one::<i64>("SELECT count(*) FROM lockstep.projection_cursors"),
            0
        );
    }

    #[pg_test]
    fn filters_are_anded_and_empty_ones_let_everything_pass() {
        run(
            "SELECT lockstep.push_event(a, '1', e) FROM (VALUES ('a', 'x'), ('a', 'y'), ('b', 'x')) AS v (a, e)",
        );
        let seen = |create: &str| {
            run(&format!("SELECT lockstep.projection_create('p'{create})"));
            let seen =
                list("SELECT aggregate_type || event_type FROM lockstep.projection_claim('p')");
            run("DELETE FROM lockstep.projections");
            seen
        };
        assert_eq!(seen(", '{a}', '{x}'"), "ax");
        assert_eq!(seen(", '{a}'"), "ax,ay");
        assert_eq!(seen(", event_types => '{x}'"), "ax,bx");
        assert_eq!(seen(", '{}', '{}'"), "ax,ay,bx");
    }

    #[pg_test]
    fn a_claim_moves_past_what_does_not_match() {
        push("a", 5);
        run("SELECT lockstep.projection_create('p', aggregate_types => '{b}')");
        assert_eq!(claim(""), "");
        assert_eq!(state(), "none f");
        assert!(one::<bool>(
            "SELECT position = (SELECT max(position) FROM lockstep.events) FROM lockstep.projection_cursors"
        ));
    }

    #[pg_test]
    fn claim_scan_limit_bounds_one_claim() {
        push("a", 7);
        push("b", 1);
        run("SELECT lockstep.projection_create('p', aggregate_types => '{b}')");
        run("SET LOCAL lockstep.claim_scan_limit = 3");
        assert_eq!((claim(""), state()), (String::new(), "none t".into()));
        assert_eq!((claim(""), state()), (String::new(), "none t".into()));
        assert_eq!((claim(""), state()), ("b1".into(), "claimed f".into()));
    }

    #[pg_test]
    fn tenants_have_cursors_of_their_own() {
        run(
            "SELECT lockstep.push_event('a', '1', 'x', tenant => t) FROM unnest('{t1,t2}'::text[]) AS t",
        );
        run("SELECT lockstep.projection_create('p')");
        assert_eq!(claim(", tenant => 't1'"), "a1");
        run("SELECT lockstep.projection_advance('p', tenant => 't1')");
        assert_eq!(claim(", tenant => 't1'"), "");
        assert_eq!(claim(", tenant => 't2'"), "a1");
        assert_eq!(claim(""), "");
    }

    #[pg_test]
    fn start_after_null_begins_at_what_is_settled() {
        push("a", 2);
        run("SELECT lockstep.projection_create('p', start_after => NULL)");
        push("b", 1);
        run("SELECT lockstep.push_event('c', '1', 'x', tenant => 'new')");
        assert_eq!(claim(""), "b1");
        assert_eq!(claim(", tenant => 'new'"), "c1");
    }

    #[pg_test]
    fn start_after_a_position() {
        push("a", 3);
        run(
            "SELECT lockstep.projection_create('p', start_after => (SELECT position FROM lockstep.events WHERE aggregate_id = '2'))",
        );
        assert_eq!(claim(""), "a3");
    }

    #[pg_test]
    fn create_says_whether_it_created() {
        assert!(one::<bool>("SELECT lockstep.projection_create('p')"));
        assert!(!one::<bool>(
            "SELECT lockstep.projection_create('p', if_not_exists => true)"
        ));
        assert_eq!(
            raised("SELECT lockstep.projection_create('p')").sqlstate,
            "42710"
        );
    }

    #[pg_test]
    fn a_handler_takes_an_event_or_an_array_of_them() {
        run("CREATE FUNCTION public.one(e lockstep.events) RETURNS void LANGUAGE sql AS ''");
        run("CREATE FUNCTION public.many(e lockstep.events[]) RETURNS void LANGUAGE sql AS ''");
        run("SELECT lockstep.projection_create('p', handler => 'public.one(lockstep.events)')");
        assert_eq!(
            list("SELECT handler FROM lockstep.projections"),
            "public.one(lockstep.events)"
        );
        run("SELECT lockstep.projection_alter('p', handler => 'public.many(lockstep.events[])')");
        assert_eq!(
            list("SELECT handler FROM lockstep.projections"),
            "public.many(lockstep.events[])"
        );
        run("SELECT lockstep.projection_alter('p', handler => '-')");
        assert!(one::<bool>(
            "SELECT handler IS NULL FROM lockstep.projections"
        ));
        assert_eq!(
            sqlstate("SELECT lockstep.projection_create('q', handler => 'pg_catalog.now()')"),
            "22023"
        );
    }

    /// projection_alter refuses to run in a transaction that has pushed, so these do not push.
    #[pg_test]
    fn alter_keeps_what_is_null_and_clears_what_is_empty() {
        run(
            "SELECT lockstep.projection_create('p', '{a}', '{x}', batch_size => 7, max_failures => 8, retry_after => '9 s')",
        );
        run("SELECT lockstep.projection_alter('p', batch_size => 70)");
        let definition = || {
            list("SELECT format('%s %s %s %s %s', aggregate_types, event_types, batch_size, max_failures, retry_after)
                  FROM lockstep.projections")
        };
        assert_eq!(definition(), "{a} {x} 70 8 00:00:09");
        run(
            "SELECT lockstep.projection_alter('p', aggregate_types => '{}', event_types => '{y}', retry_after => '0')",
        );
        assert_eq!(definition(), " {y} 70 8 00:00:00");
        assert_eq!(
            sqlstate("SELECT lockstep.projection_alter('nothing')"),
            "42704"
        );
    }

    #[pg_test]
    fn drop_removes_the_cursors() {
        run("SELECT lockstep.projection_create('p')");
        run("INSERT INTO lockstep.projection_cursors VALUES ('p', '', 1)");
        run("SELECT lockstep.projection_drop('p')");
        assert_eq!(
            one::<i64>("SELECT count(*) FROM lockstep.projection_cursors"),
            0
        );
        assert_eq!(sqlstate("SELECT lockstep.projection_drop('p')"), "42704");
        assert_eq!(sqlstate("SELECT lockstep.projection_claim('p')"), "42704");
    }

    #[pg_test]
    fn only_members_of_the_owner_may_change_a_projection() {
        run("CREATE ROLE ls_owner; CREATE ROLE ls_stranger");
        run("GRANT USAGE ON SCHEMA lockstep TO ls_owner, ls_stranger");
        run("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA lockstep TO ls_owner, ls_stranger");
        run("SET LOCAL ROLE ls_owner");
        run("SELECT lockstep.projection_create('p')");
        run("SET LOCAL ROLE ls_stranger");
        for call in [
            "projection_alter('p', batch_size => 1)",
            "projection_drop('p')",
            "projection_owner('p', 'ls_stranger')",
        ] {
            let error = raised(&format!("SELECT lockstep.{call}"));
            assert_eq!(
                (error.sqlstate.as_str(), error.detail.as_str()),
                ("42501", "It belongs to role \"ls_owner\"."),
                "{call}"
            );
        }
        run("SET LOCAL ROLE ls_owner");
        assert_eq!(
            sqlstate("SELECT lockstep.projection_owner('p', 'ls_stranger')"),
            "42501"
        );
        run("RESET ROLE");
        run("SELECT lockstep.projection_owner('p', 'ls_stranger')");
        run("SET LOCAL ROLE ls_stranger");
        run("SELECT lockstep.projection_drop('p')");
        run("RESET ROLE");
    }

    #[pg_test]
    fn due_lists_what_is_behind_the_longest_waiting_first() {
        run(
            "SELECT lockstep.push_event('a', '1', 'x', tenant => t) FROM unnest('{t2,t1}'::text[]) AS t",
        );
        run("SELECT lockstep.projection_create('p')");
        run("SELECT lockstep.projection_create('q', start_after => 9000000000000000000)");
        assert_eq!(
            list("SELECT name || tenant FROM lockstep.projection_due()"),
            "pt2,pt1"
        );
        assert_eq!(
            list("SELECT name || tenant FROM lockstep.projection_due(max_rows => 1)"),
            "pt2"
        );
        assert_eq!(
            list("SELECT name || tenant FROM lockstep.projection_due('{q}')"),
            ""
        );
        claim(", tenant => 't2'");
        run("SELECT lockstep.projection_advance('p', tenant => 't2')");
        assert_eq!(
            list("SELECT name || tenant FROM lockstep.projection_due('{p}')"),
            "pt1"
        );
        assert_eq!(
            sqlstate("SELECT lockstep.projection_due('{nothing}')"),
            "42704"
        );
    }

    /// The functions that run with the caller's rights and switch to the owner's must not find the caller's operators.
    #[pg_test]
    fn operators_of_the_caller_are_not_run_with_the_owners_rights() {
        run("CREATE ROLE ls_mallory; GRANT USAGE ON SCHEMA lockstep TO ls_mallory");
        run("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA lockstep TO ls_mallory");
        run("CREATE SCHEMA evil AUTHORIZATION ls_mallory");
        run("SET LOCAL ROLE ls_mallory");
        run(
            "CREATE FUNCTION evil.eq(a text, b text) RETURNS boolean LANGUAGE plpgsql AS $$
             BEGIN RAISE EXCEPTION 'the caller''s operator ran as %', current_user; END $$",
        );
        run("CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.eq)");
        run("CREATE DOMAIN evil.text AS pg_catalog.text CHECK (false)");
        run("SET LOCAL search_path = evil, pg_catalog");
        run("SELECT lockstep.projection_create('m', start_after => NULL)");
        run("SELECT lockstep.projection_alter('m', batch_size => 5)");
        run("SELECT lockstep.projection_owner('m', 'ls_mallory')");
        run("SELECT lockstep.projection_drop('m')");
        assert_eq!(
            one::<String>("SELECT pg_catalog.current_setting('search_path')"),
            "evil, pg_catalog"
        );
        assert_eq!(
            one::<String>("SELECT current_user::pg_catalog.text"),
            "ls_mallory"
        );
    }

    #[pg_test]
    fn a_projection_that_is_dropped_after_its_claim_leaves_no_cursor() {
        run("SELECT lockstep.projection_create('p')");
        claim("");
        run("SELECT lockstep.projection_drop('p')");
        assert_eq!(
            raised("SELECT lockstep.projection_advance('p')").detail,
            "The projection was changed after the claim."
        );
    }

    #[pg_test]
    fn a_cursor_that_was_left_over_is_not_taken_for_a_new_projections() {
        run("INSERT INTO lockstep.projection_cursors VALUES ('p', '', 1000000)");
        push("a", 1);
        run("SELECT lockstep.projection_create('p')");
        assert_eq!(claim(""), "a1");
    }

    #[pg_test]
    fn a_handler_that_is_no_plain_function_is_refused() {
        run("CREATE PROCEDURE public.does(e lockstep.events) LANGUAGE sql AS ''");
        for handler in ["'public.does(lockstep.events)'", "999999::regprocedure"] {
            assert_eq!(
                sqlstate(&format!(
                    "SELECT lockstep.projection_create('p', handler => {handler})"
                )),
                "22023"
            );
        }
    }

    #[pg_test]
    fn retry_after_is_judged_by_its_length() {
        run("SELECT lockstep.projection_create('p', retry_after => '1 day -1 hour')");
        for retry_after in ["'-1 s'", "'-1 day 1 hour'"] {
            assert_eq!(
                sqlstate(&format!(
                    "SELECT lockstep.projection_create('q', retry_after => {retry_after})"
                )),
                "22023"
            );
        }
    }

    #[pg_test]
    fn claims_that_are_rolled_back_again_and_again_stay_cheap() {
        run("SELECT lockstep.projection_create('p')");
        run("DO $$ BEGIN
                 FOR i IN 1..20000 LOOP
                     BEGIN
                         PERFORM lockstep.projection_claim('p');
                         RAISE EXCEPTION 'undo';
                     EXCEPTION WHEN raise_exception THEN NULL;
                     END;
                 END LOOP;
             END $$");
        assert_eq!(sqlstate("SELECT lockstep.projection_advance('p')"), "LS002");
    }
}
