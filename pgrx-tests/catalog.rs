//! What holds for every object of the extension.

#[pgrx::pg_schema]
mod tests {
    use crate::support::*;
    use pgrx::prelude::*;

    const FUNCTIONS: &str =
        "pg_proc AS p JOIN pg_depend AS d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid
         AND d.deptype = 'e' AND p.pronamespace = 'lockstep'::regnamespace";
    const RELATIONS: &str =
        "pg_class AS c JOIN pg_depend AS d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid
         AND d.objsubid = 0 AND d.deptype = 'e' AND c.relnamespace = 'lockstep'::regnamespace";

    /// What must know its caller runs with the caller's rights; see `rights.rs`.
    const INVOKER: &str =
        "'projection_create', 'projection_alter', 'projection_drop', 'projection_owner',
         'projection_run', 'projection_reset', 'projection_pause', 'projection_resume', 'failed_event_retry',
         'lease_take', 'job_wait'";

    #[pg_test]
    fn every_function_and_relation_has_a_comment() {
        assert_eq!(
            list(&format!(
                "SELECT proname FROM {FUNCTIONS} WHERE obj_description(p.oid, 'pg_proc') IS NULL
                 UNION ALL SELECT relname FROM {RELATIONS} WHERE obj_description(c.oid, 'pg_class') IS NULL
                     AND relkind IN ('r', 'S', 'v')"
            )),
            ""
        );
    }

    #[pg_test]
    fn nothing_is_granted_to_public() {
        assert_eq!(
            list(&format!(
                "SELECT proname FROM {FUNCTIONS}, aclexplode(COALESCE(proacl, acldefault('f', proowner))) AS a WHERE a.grantee = 0
                 UNION ALL SELECT relname FROM {RELATIONS}, aclexplode(relacl) AS a WHERE a.grantee = 0
                 UNION ALL SELECT nspname FROM pg_namespace, aclexplode(nspacl) AS a
                     WHERE nspname = 'lockstep' AND a.grantee = 0"
            )),
            ""
        );
    }

    #[pg_test]
    fn definers_pin_search_path_and_only_what_needs_its_caller_is_none() {
        assert_eq!(
            list(&format!(
                "SELECT proname FROM {FUNCTIONS}
                 WHERE CASE WHEN proname IN ({INVOKER}) THEN prosecdef OR proconfig IS NOT NULL
                       ELSE NOT prosecdef
                            OR proconfig IS DISTINCT FROM '{{\"search_path=pg_catalog, lockstep, pg_temp\"}}' END"
            )),
            ""
        );
    }

    #[pg_test]
    fn no_function_is_strict_or_overloaded() {
        assert_eq!(
            list(&format!(
                "SELECT proname FROM {FUNCTIONS} WHERE proisstrict"
            )),
            ""
        );
        assert_eq!(
            list(&format!(
                "SELECT proname FROM {FUNCTIONS} GROUP BY 1 HAVING count(*) > 1"
            )),
            ""
        );
    }

    #[pg_test]
    fn every_parameter_name_parses_unquoted() {
        let names: Vec<String> = one(&format!(
            "SELECT array_agg(DISTINCT n) FROM {FUNCTIONS}, unnest(proargnames, proargmodes) AS a (n, m)
             WHERE COALESCE(m, 'i') = 'i' AND n <> ''"
        ));
        assert!(!names.is_empty());
        for name in names {
            let message = raised(&format!("SELECT pg_temp.nothing({name} => 1)")).message;
            assert!(message.contains("does not exist"), "{name}: {message}");
        }
    }

    #[pg_test]
    fn every_table_has_a_primary_key_and_is_dumped() {
        assert_eq!(
            list(&format!(
                "SELECT relname FROM {RELATIONS} WHERE relkind = 'r'
                     AND NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = c.oid AND contype = 'p')
                 UNION ALL SELECT relname FROM {RELATIONS} WHERE relkind IN ('r', 'S')
                     AND NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'lockstep' AND c.oid = ANY (extconfig))"
            )),
            ""
        );
    }

    #[pg_test]
    fn the_sequences_cache_nothing() {
        assert_eq!(
            list(
                "SELECT seqcache FROM pg_sequence
                 WHERE seqrelid IN ('lockstep.ticket'::regclass, 'lockstep.token'::regclass)"
            ),
            "1,1"
        );
    }
}
