//! The event log's logic, inside one transaction. What waits, or needs several sessions, is in tests/.

#[pgrx::pg_schema]
mod tests {
    use crate::support::*;
    use pgrx::prelude::*;

    fn push(elements: &str) -> String {
        format!("SELECT * FROM lockstep.push_events('[{elements}]')")
    }

    /// An element with these further keys.
    fn event(id: &str, keys: &str) -> String {
        format!(
            r#"{{"aggregate_type":"order","aggregate_id":"{id}","event_type":"happened"{keys}}}"#
        )
    }

    fn sequences(elements: &str) -> String {
        list(&format!(
            "SELECT sequence FROM ({}) AS pushed",
            push(elements)
        ))
    }

    #[pg_test]
    fn sequences_start_at_1_and_continue_per_aggregate() {
        assert_eq!(
            sequences(&[event("a", ""), event("b", ""), event("a", "")].join(",")),
            "1,1,2"
        );
        assert_eq!(sequences(&event("a", "")), "3");
        assert_eq!(
            one::<i64>("SELECT sequence FROM lockstep.push_event('order', 'b', 'x')"),
            2
        );
    }

    #[pg_test]
    fn what_others_have_put_on_the_log_sees_every_push() {
        run("CREATE TABLE public.seen (what text);
             CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 INSERT INTO public.seen VALUES (TG_WHEN || ' ' || TG_LEVEL);
                 RETURN NEW;
             END $$;
             CREATE TRIGGER a BEFORE INSERT ON lockstep.events FOR EACH ROW EXECUTE FUNCTION public.note();
             CREATE TRIGGER b AFTER INSERT ON lockstep.events FOR EACH STATEMENT EXECUTE FUNCTION public.note()");
        run("SELECT lockstep.push_event('order', 'a', 'x')");
        run(&push(&[event("a", ""), event("b", "")].join(",")));
        assert_eq!(
            list("SELECT what FROM public.seen"),
            "BEFORE ROW,AFTER STATEMENT,BEFORE ROW,BEFORE ROW,AFTER STATEMENT"
        );
    }

    #[pg_test]
    fn a_column_that_others_have_added_gets_its_default() {
        run("ALTER TABLE lockstep.events ADD note text DEFAULT 'none'");
        run("SELECT lockstep.push_event('order', 'a', 'x')");
        assert_eq!(list("SELECT note FROM lockstep.events"), "none");
    }

    #[pg_test]
    fn positions_share_a_ticket_and_have_no_trailing_zeros() {
        run(&push(&vec![event("a", ""); 11].join(",")));
        let ticket: i64 = one("SELECT last_value FROM lockstep.ticket");
        let expected: Vec<String> = (0..11)
            .map(|index| match index {
                0 => ticket.to_string(),
                10 => format!("{ticket}.00001"),
                _ => format!("{ticket}.00000{index}"),
            })
            .collect();
        assert_eq!(
            list("SELECT position FROM lockstep.events ORDER BY position"),
            expected.join(",")
        );
    }

    #[pg_test]
    fn the_rows_come_in_the_order_given() {
        let elements = [event("z", ""), event("a", ""), event("m", "")].join(",");
        assert_eq!(
            list(&format!(
                "SELECT aggregate_id FROM ({}) AS pushed",
                push(&elements)
            )),
            "z,a,m"
        );
    }

    #[pg_test]
    fn json_is_kept_exactly() {
        let number = "123456789012345678901234567890.123456789012345678901234567890";
        run(&push(&event(
            "a",
            &format!(r#","payload":{{"n":{number}}},"metadata":[1.10,null]"#),
        )));
        assert_eq!(
            one::<String>("SELECT payload ->> 'n' FROM lockstep.events"),
            number
        );
        assert_eq!(
            one::<String>("SELECT metadata::text FROM lockstep.events"),
            "[1.10, null]"
        );
    }

    #[pg_test]
    fn an_absent_payload_is_null_and_a_json_null_is_kept() {
        run(&push(
            &[event("a", ""), event("a", r#","payload":null"#)].join(","),
        ));
        assert_eq!(
            list("SELECT COALESCE(payload::text, 'absent') FROM lockstep.events ORDER BY position"),
            "absent,null"
        );
    }

    #[pg_test]
    fn expected_sequence_counts_the_events_before_it_in_the_same_push() {
        let elements = [
            event("a", r#","expected_sequence":0"#),
            event("a", r#","expected_sequence":1"#),
        ];
        assert_eq!(sequences(&elements.join(",")), "1,2");
    }

    #[pg_test]
    fn a_sequence_conflict_names_both_numbers() {
        run(&push(&[event("a", ""), event("a", "")].join(",")));
        let error =
            raised("SELECT * FROM lockstep.push_event('order', 'a', 'x', expected_sequence => 5)");
        assert_eq!(error.sqlstate, "LS001");
        assert_eq!(
            error.message,
            r#"aggregate "order/a" is at sequence 2, expected 5"#
        );
        assert_eq!(error.detail, "Actual sequence 2, expected 5.");
        assert!(!error.hint.is_empty());
    }

    #[pg_test]
    fn an_event_id_is_taken_once_per_tenant() {
        let id = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
        let element = event("a", &format!(r#","event_id":"{id}","expected_sequence":0"#));
        run(&push(&element));
        let error = raised(&push(&element));
        assert_eq!(error.sqlstate, "23505");
        assert_eq!(error.constraint, "events_tenant_event_id_key");
        assert_eq!(
            error.detail,
            format!("Key (tenant, event_id)=(, {id}) already exists.")
        );
        assert_eq!(
            sqlstate(&push(
                &[
                    event("b", &format!(r#","event_id":"{id}""#)),
                    event("b", "")
                ]
                .join(",")
            )),
            "23505"
        );
        run(&format!(
            "SELECT * FROM lockstep.push_events('[{element}]', tenant => 'other')"
        ));
    }

    #[pg_test]
    fn an_event_id_twice_in_one_push_is_refused() {
        let element = event("a", r#","event_id":"6ba7b810-9dad-11d1-80b4-00c04fd430c8""#);
        assert_eq!(sqlstate(&push(&format!("{element},{element}"))), "23505");
    }

    fn unique(op: &str, value: &str, global: bool) -> String {
        format!(r#"{{"op":"{op}","scope":"email","value":"{value}","global":{global}}}"#)
    }

    fn with_unique(operations: &[String]) -> String {
        event("a", &format!(r#","unique":[{}]"#, operations.join(",")))
    }

    #[pg_test]
    fn a_unique_key_is_taken_until_it_is_removed() {
        run(&push(&with_unique(&[unique("add", "x", false)])));
        let error = raised(&push(&with_unique(&[unique("add", "x", false)])));
        assert_eq!(error.sqlstate, "23505");
        assert_eq!(error.constraint, "unique_keys_pkey");
        assert_eq!(
            error.detail,
            "Key (tenant, scope, value)=(, email, x) already exists."
        );
        run(&push(&with_unique(&[unique("remove", "x", false)])));
        run(&push(&with_unique(&[unique("add", "x", false)])));
    }

    #[pg_test]
    fn unique_operations_apply_in_order() {
        run(&push(&with_unique(&[unique("add", "x", false)])));
        run(&push(&with_unique(&[
            unique("remove", "x", false),
            unique("add", "x", false),
        ])));
        assert!(one::<bool>(
            "SELECT k.position = (SELECT max(position) FROM lockstep.events) FROM lockstep.unique_keys AS k"
        ));
        assert_eq!(
            sqlstate(&push(&with_unique(&[
                unique("add", "y", false),
                unique("add", "y", false)
            ]))),
            "23505"
        );
        run(&push(&with_unique(&[
            unique("add", "z", false),
            unique("remove", "z", false),
        ])));
        assert_eq!(list("SELECT value FROM lockstep.unique_keys"), "x");
    }

    #[pg_test]
    fn unique_keys_are_compared_exactly() {
        run(&push(&with_unique(&[
            unique("add", "x", false),
            unique("add", "X", false),
            unique("add", "x ", false),
        ])));
        run(&push(&with_unique(&[unique("remove", "nothing", false)])));
        assert_eq!(one::<i64>("SELECT count(*) FROM lockstep.unique_keys"), 3);
    }

    #[pg_test]
    fn a_global_key_is_taken_for_all_tenants() {
        let plain = with_unique(&[unique("add", "plain", false)]);
        let global = with_unique(&[unique("add", "global", true)]);
        run(&push(&format!("{plain},{global}")));
        run(&format!(
            "SELECT * FROM lockstep.push_events('[{plain}]', tenant => 'other')"
        ));
        let error = raised(&format!(
            "SELECT * FROM lockstep.push_events('[{global}]', tenant => 'other')"
        ));
        assert_eq!(error.sqlstate, "23505");
        assert_eq!(
            error.detail,
            "Key (scope, value)=(email, global) already exists."
        );
        let remove = with_unique(&[unique("remove", "global", true)]);
        run(&format!(
            "SELECT * FROM lockstep.push_events('[{remove}]', tenant => 'other')"
        ));
        assert_eq!(
            one::<i64>("SELECT count(*) FROM lockstep.unique_keys WHERE global"),
            1
        );
    }

    #[pg_test]
    fn bad_elements_are_refused_with_their_index_and_key() {
        for (keys, message) in [
            (
                r#","sequence":1"#,
                r#"event 1: key "sequence" is not a key of an event"#,
            ),
            (
                r#","expected_sequence":"1""#,
                r#"event 1: key "expected_sequence" must be a whole number"#,
            ),
            (
                r#","expected_sequence":1.5"#,
                r#"event 1: key "expected_sequence" must be a whole number"#,
            ),
            (
                r#","expected_sequence":null"#,
                r#"event 1: key "expected_sequence" must be a whole number"#,
            ),
            (
                r#","expected_sequence":-1"#,
                r#"event 1: key "expected_sequence" must not be negative: -1"#,
            ),
            (
                r#","event_id":"x""#,
                r#"event 1: key "event_id" must be a uuid"#,
            ),
            (
                r#","event_type":7"#,
                r#"event 1: key "event_type" must be a string"#,
            ),
            (
                r#","event_type":"""#,
                r#"event 1: key "event_type" must not be empty"#,
            ),
        ] {
            let error = raised(&push(&[event("a", ""), event("a", keys)].join(",")));
            assert_eq!(
                (error.sqlstate.as_str(), error.message.as_str()),
                ("22023", message)
            );
        }
        for operations in [
            "1",
            r#"[1]"#,
            r#"[{"op":"drop","scope":"s","value":"v"}]"#,
            r#"[{"op":"add","scope":"s"}]"#,
            r#"[{"op":"add","scope":"","value":"v"}]"#,
            r#"[{"op":"add","scope":"s","value":"v","x":1}]"#,
        ] {
            let error = raised(&push(&event("a", &format!(r#","unique":{operations}"#))));
            assert_eq!(error.sqlstate, "22023");
            assert!(
                error.message.starts_with(r#"event 0: key "unique""#),
                "{}",
                error.message
            );
        }
        assert_eq!(one::<i64>("SELECT count(*) FROM lockstep.events"), 0);
    }

    #[pg_test]
    fn bad_arrays_are_refused() {
        for events in [
            "[]",
            "{}",
            "1",
            "null",
            "[1]",
            "[null]",
            r#"[{"aggregate_type":"a","aggregate_id":"b"}]"#,
        ] {
            assert_eq!(
                sqlstate(&format!("SELECT * FROM lockstep.push_events('{events}')")),
                "22023",
                "{events}"
            );
        }
    }

    #[pg_test]
    fn names_have_a_limit() {
        let error = raised("SELECT * FROM lockstep.push_event('order', repeat('x', 10000), 'x')");
        assert_eq!(error.sqlstate, "22023");
        assert_eq!(error.detail, "It has 10000 bytes, at most 800 are allowed.");
        run(
            "SELECT * FROM lockstep.push_event(repeat('x', 800), repeat('y', 800), 'z', tenant => repeat('t', 800))",
        );
    }

    #[pg_test]
    fn a_push_on_too_many_aggregates_is_refused_before_any_lock() {
        let error = raised(
            "SELECT * FROM lockstep.push_events((SELECT jsonb_agg(jsonb_build_object(
                 'aggregate_type', 'order', 'aggregate_id', n::text, 'event_type', 'x')) FROM generate_series(1, 1001) AS n))",
        );
        assert_eq!(error.sqlstate, "54000");
        assert_eq!(
            one::<i64>(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
            ),
            0
        );
        run("SET LOCAL lockstep.max_aggregates_per_push = 1001");
        run("SELECT * FROM lockstep.push_events((SELECT jsonb_agg(jsonb_build_object(
                 'aggregate_type', 'order', 'aggregate_id', n::text, 'event_type', 'x')) FROM generate_series(1, 1001) AS n))");
    }

    #[pg_test]
    fn a_sequence_behind_the_log_is_found_and_resynced() {
        run("SELECT setval('lockstep.ticket', 1000)");
        run(&push(&event("a", "")));
        run("SELECT setval('lockstep.ticket', 5)");
        let error = raised(&push(&event("a", "")));
        assert_eq!(error.sqlstate, "55000");
        assert_eq!(
            error.hint,
            "SELECT lockstep.ticket_resync() sets the sequence above the log."
        );
        assert_eq!(one::<i64>("SELECT lockstep.ticket_resync()"), 1001);
        run(&push(&event("a", "")));
        assert_eq!(
            one::<String>("SELECT max(position)::text FROM lockstep.events"),
            "1002"
        );
    }

    #[pg_test]
    fn after_data_loss_raises_tickets_by_2_to_the_32() {
        run("SELECT setval('lockstep.ticket', 7)");
        run("SELECT lockstep.after_data_loss()");
        assert_eq!(
            one::<i64>("SELECT last_value FROM lockstep.ticket"),
            7 + (1_i64 << 32)
        );
    }

    #[pg_test]
    fn a_sequence_that_was_never_called_is_read_as_its_predecessor() {
        run("SELECT setval('lockstep.ticket', 100)");
        run(&push(&event("a", "")));
        run("SELECT setval('lockstep.ticket', 500, false)");
        assert_eq!(one::<String>("SELECT lockstep.horizon()::text"), "101");
    }

    #[pg_test]
    fn what_would_wait_is_refused_in_a_transaction_that_has_pushed() {
        run(&push(&event("a", "")));
        for call in [
            "lockstep.barrier()",
            "lockstep.projection_claim('p', wait => true)",
        ] {
            assert_eq!(sqlstate(&format!("SELECT {call}")), "25000", "{call}");
        }
        assert_eq!(one::<i64>("SELECT count(*) FROM lockstep.read_events()"), 1);
        assert!(one::<bool>("SELECT lockstep.horizon() > 0"));
    }

    #[pg_test]
    fn a_push_that_was_rolled_back_to_a_savepoint_is_none() {
        run("DO $$ BEGIN
                 PERFORM lockstep.push_event('order', 'a', 'x');
                 RAISE EXCEPTION 'undo';
             EXCEPTION WHEN raise_exception THEN NULL; END $$");
        assert_eq!(sqlstate("SELECT lockstep.barrier()"), "");
        assert_eq!(sequences(&event("a", "")), "1");
    }

    #[pg_test]
    fn barrier_and_horizon_are_0_in_an_empty_log() {
        assert_eq!(one::<String>("SELECT lockstep.barrier()::text"), "0");
        assert_eq!(one::<String>("SELECT lockstep.horizon()::text"), "0");
    }

    #[pg_test]
    fn read_events_filters_limits_and_continues() {
        for n in 1..=4 {
            run(&format!("SELECT lockstep.push_event('even', '{n}', 'x')"));
            run(&format!("SELECT lockstep.push_event('odd', '{n}', 'y')"));
        }
        let read = |arguments: &str| {
            list(&format!(
                "SELECT aggregate_type || aggregate_id FROM lockstep.read_events({arguments})"
            ))
        };
        assert_eq!(read("max_events => 3"), "even1,odd1,even2");
        assert_eq!(
            read("aggregate_types => '{even}'"),
            "even1,even2,even3,even4"
        );
        assert_eq!(read("event_types => '{y}', max_events => 2"), "odd1,odd2");
        assert_eq!(
            read("aggregate_types => '{even}', event_types => '{y}'"),
            ""
        );
        assert_eq!(
            read(
                "after => (SELECT position FROM lockstep.events WHERE aggregate_type = 'odd' AND aggregate_id = '3')"
            ),
            "even4,odd4"
        );
        assert_eq!(read("tenant => 'other'"), "");
    }

    #[pg_test]
    fn a_position_that_no_event_can_have_is_refused() {
        for position in [
            "-1",
            "'NaN'",
            "'Infinity'",
            "0.0000001",
            "9223372036854775808",
            "1e30",
        ] {
            assert_eq!(
                sqlstate(&format!("SELECT lockstep.read_events(after => {position})")),
                "22023",
                "{position}"
            );
        }
    }

    #[pg_test]
    fn aggregate_events_reads_one_aggregate() {
        run(&push(&vec![event("a", ""); 5].join(",")));
        run(&push(&event("b", "")));
        let read = |arguments: &str| {
            list(&format!(
                "SELECT sequence FROM lockstep.aggregate_events('order', 'a'{arguments})"
            ))
        };
        assert_eq!(read(""), "1,2,3,4,5");
        assert_eq!(read(", after_sequence => 2, max_events => 2"), "3,4");
        assert_eq!(read(", tenant => 'other'"), "");
    }

    #[pg_test]
    fn tenants_lists_each_tenant_once_with_its_head() {
        for tenant in ["", "b", "a", "b"] {
            run(&format!(
                "SELECT lockstep.push_event('order', 'x', 'x', tenant => '{tenant}')"
            ));
        }
        assert_eq!(
            list("SELECT t.tenant || (SELECT count(*) FROM lockstep.events AS e WHERE e.tenant = t.tenant AND e.position <= t.head)
                  FROM lockstep.tenants AS t"),
            "1,a1,b2"
        );
    }

    #[pg_test]
    fn a_trigger_on_the_log_may_push() {
        run(
            "CREATE FUNCTION pg_temp.echo() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 IF NEW.aggregate_type = 'order' THEN
                     PERFORM lockstep.push_event('echo', NEW.aggregate_id, 'echoed');
                 END IF;
                 RETURN NEW;
             END $$",
        );
        run(
            "CREATE TRIGGER echo AFTER INSERT ON lockstep.events FOR EACH ROW EXECUTE FUNCTION pg_temp.echo()",
        );
        run(&push(&[event("a", ""), event("b", "")].join(",")));
        assert_eq!(
            list("SELECT aggregate_type || aggregate_id FROM lockstep.events ORDER BY position"),
            "ordera,orderb,echoa,echob"
        );
    }

    #[pg_test]
    fn null_elements_of_a_filter_are_null_values() {
        assert_eq!(
            sqlstate("SELECT lockstep.read_events(event_types => ARRAY['x', NULL])"),
            "22004"
        );
    }

    #[pg_test]
    fn only_the_documented_form_of_an_operation_is_taken() {
        for operation in [
            r#"["add","s","v"]"#,
            r#"{"op":{"add":null},"scope":"s","value":"v"}"#,
        ] {
            assert_eq!(
                sqlstate(&push(&event("a", &format!(r#","unique":[{operation}]"#)))),
                "22023"
            );
        }
        let error = raised(&push(&event(
            "a",
            r#","unique":[{"op":"add","scope":"s","value":"v"},{"op":"put"}]"#,
        )));
        assert_eq!(
            error.message,
            r#"event 0: key "unique" [1]: op "put" is neither "add" nor "remove""#
        );
    }
}
