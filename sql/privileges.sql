-- Nothing for PUBLIC: who may do what is granted function by function (see the README's recipes).
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA lockstep FROM PUBLIC;
REVOKE ALL ON ALL PROCEDURES IN SCHEMA lockstep FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA lockstep FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA lockstep FROM PUBLIC;
REVOKE ALL ON SCHEMA lockstep FROM PUBLIC;

-- Nor for whom the default privileges of the role that installs would have it.
DO $$
DECLARE
    revocation text;
BEGIN
    FOR revocation IN
        SELECT DISTINCT pg_catalog.format('REVOKE ALL ON %s FROM %s', o.object, a.grantee::regrole)
        FROM (SELECT 'SCHEMA lockstep', n.nspacl, n.nspowner
              FROM pg_catalog.pg_namespace AS n WHERE n.nspname = 'lockstep'
              UNION ALL
              SELECT pg_catalog.format('%s lockstep.%I', CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.relname),
                     c.relacl, c.relowner
              FROM pg_catalog.pg_class AS c WHERE c.relnamespace = 'lockstep'::regnamespace
              UNION ALL
              SELECT pg_catalog.format('ROUTINE lockstep.%I', p.proname), p.proacl, p.proowner
              FROM pg_catalog.pg_proc AS p WHERE p.pronamespace = 'lockstep'::regnamespace) AS o (object, acl, owner),
             pg_catalog.aclexplode(o.acl) AS a
        WHERE a.grantee <> 0 AND a.grantee <> o.owner
    LOOP
        EXECUTE revocation;
    END LOOP;
END
$$;

-- No function is STRICT; pgrx makes those without arguments so.
ALTER FUNCTION lockstep.ticket_resync() CALLED ON NULL INPUT;
ALTER FUNCTION lockstep.after_data_loss() CALLED ON NULL INPUT;
ALTER FUNCTION lockstep.writer_locks() CALLED ON NULL INPUT;
ALTER FUNCTION lockstep.projection_locks() CALLED ON NULL INPUT;
ALTER FUNCTION lockstep.workers() CALLED ON NULL INPUT;
ALTER FUNCTION lockstep.workers_are_on() CALLED ON NULL INPUT;
ALTER FUNCTION lockstep.lease_locks() CALLED ON NULL INPUT;
