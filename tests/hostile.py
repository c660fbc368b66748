"""A hostile surrounding for the extension's functions, and a scenario whose outcome it must not change."""

from decimal import Decimal

import psycopg
from psycopg.types.json import Jsonb
from psycopg.types.string import TextLoader

# Types whose operators and functions the extension's SQL could use.
TYPES = """text, name, int2, int4, int8, numeric, float8, interval, timestamptz, bool, json, jsonb, uuid, oid, xid, xid8, regclass,
           regnamespace, regrole, regprocedure, anyelement, anyarray, anycompatible, anycompatiblearray, anynonarray,
           text[], int8[], numeric[]"""

# In a schema, what the caller's search_path finds first if something looks a name up with it: operators and functions with the
# names of those that the extension uses, and its own. Whatever reaches one of them raises TRAP1 and says as whom.
NAMES = """abs aclexplode array_.* bool_.* clock_timestamp concat.* count current_.* extract floor format generate_series greatest
           has_.* hash.* jsonb_.* least length lower make_interval max min mod now nextval pg_.* power quote_.* random round
           row_number set_config setval currval string_.* sum to_.* trim.* trunc unnest upper"""
TRAPS = """
    CREATE FUNCTION {schema}.trap() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
        RAISE 'trapped as %', current_user USING ERRCODE = 'TRAP1'; END $$;
    DO $$
    DECLARE
        types oid[] := string_to_array('{types}', ',')::regtype[];
        body text := ' LANGUAGE plpgsql AS $body$ BEGIN PERFORM {schema}.trap(); END $body$';
        made record;
    BEGIN
        FOR made IN
            SELECT o.oprname, 'trap_' || o.oid AS trap, o.oprresult::regtype AS result,
                NULLIF(o.oprleft, 0)::regtype AS l, o.oprright::regtype AS r
            FROM pg_operator AS o
            WHERE o.oprnamespace = 'pg_catalog'::regnamespace AND (o.oprleft = 0 OR o.oprleft = ANY (types))
              AND o.oprright = ANY (types) AND o.oprresult = ANY (types)
        LOOP
            EXECUTE format('CREATE FUNCTION {schema}.%s(%s) RETURNS %s', made.trap, concat_ws(', ', made.l, made.r), made.result)
                || body;
            EXECUTE format('CREATE OPERATOR {schema}.%s (%s)', made.oprname,
                concat_ws(', ', 'LEFTARG = ' || made.l, 'RIGHTARG = ' || made.r, 'FUNCTION = {schema}.' || made.trap));
        END LOOP;
        FOR made IN
            SELECT DISTINCT ON (p.proname, p.proargtypes) p.proname, array_to_string(p.proargtypes::regtype[], ', ') AS arguments,
                CASE WHEN p.prorettype = ANY (types) THEN p.prorettype::regtype ELSE 'void' END AS result
            FROM pg_proc AS p
            WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind IN ('f', 'a') AND p.proargtypes::oid[] <@ types
              AND p.proname ~ '^({names})$'
        LOOP
            BEGIN
                EXECUTE format('CREATE FUNCTION {schema}.%I(%s) RETURNS %s', made.proname, made.arguments, made.result) || body;
            EXCEPTION WHEN invalid_function_definition THEN  -- a polymorphic result of no polymorphic argument
                NULL;
            END;
        END LOOP;
        FOR made IN
            SELECT p.proname, pg_get_function_identity_arguments(p.oid) AS arguments
            FROM pg_proc AS p WHERE p.pronamespace = 'lockstep'::regnamespace AND p.prokind = 'f'
        LOOP
            EXECUTE format('CREATE FUNCTION {schema}.%I(%s) RETURNS void', made.proname, made.arguments) || body;
        END LOOP;
    END $$;
"""
# Relations with the names of the extension's, and types with those of PostgreSQL's.
RELATIONS = """
    DO $$
    DECLARE
        name text;
    BEGIN
        FOR name IN
            SELECT c.relname FROM pg_class AS c
            WHERE c.relnamespace = 'lockstep'::regnamespace AND c.relkind IN ('r', 'v', 'S')
        LOOP
            EXECUTE format('CREATE TABLE {schema}.%I (tenant text, position numeric, name text)', name);
        END LOOP;
        FOREACH name IN ARRAY '{text,int4,int8,bool,float8,numeric,interval,timestamptz,jsonb,uuid,oid,xid,regclass}'::text[] LOOP
            EXECUTE format('CREATE DOMAIN {schema}.%I AS pg_catalog.%I CHECK ({schema}.trap())', name, name);
        END LOOP;
    END $$;
"""


def set_traps(session, schema):
    """As a session that may do it."""
    traps = TRAPS.replace("{types}", TYPES).replace("{names}", "|".join(NAMES.split()))
    with session.transaction():
        session.execute("SET LOCAL search_path = pg_catalog")
        session.execute(traps.replace("{schema}", schema))
        session.execute(RELATIONS.replace("{schema}", schema))


WORKSHOP = """
    CREATE SCHEMA workshop;
    CREATE TABLE workshop.notes (nth int GENERATED ALWAYS AS IDENTITY, what text, who text DEFAULT current_user);
    CREATE TABLE workshop.guarded (n int);
    CREATE FUNCTION workshop.apply(e lockstep.events) RETURNS void LANGUAGE sql BEGIN ATOMIC
        INSERT INTO workshop.notes (what) VALUES (e.event_type || ' ' || (e.payload ->> 'n'));
        SELECT CASE e.event_type WHEN 'bad' THEN 1 / (e.sequence - e.sequence) END;
    END;
    GRANT ALL ON SCHEMA workshop TO PUBLIC;
    GRANT ALL ON ALL TABLES IN SCHEMA workshop TO PUBLIC;
"""

TIMES = (1082, 1083, 1114, 1184, 1186, 1266)
JSONB = 3802


class Scenario:
    """Calls each part of the extension, as one who may do everything, and keeps what came back.

    Times, process ids, roles and what is drawn by lot are left out: two runs in fresh databases are the same.
    """

    def __init__(self, session, admin):
        self.session, self.admin, self.outcomes = session, admin, []
        for oid in (*TIMES, JSONB):
            session.adapters.register_loader(
                oid, TextLoader
            )  # the driver does not read every DateStyle, nor JSON in another encoding
        admin.execute("SET search_path = pg_catalog")

    def run(self):
        self.events()
        self.projections()
        self.leases()
        self.registry()
        self.jobs()
        self.views()
        self.call("ticket_resync")
        self.call("after_data_loss")
        self.call("push_event", aggregate_type="late", aggregate_id="a", event_type="added")
        return self.outcomes, self.state()

    def call(self, function, **arguments):
        named = ", ".join(f"{name} => %({name})s" for name in arguments)
        return self.execute(f"SELECT * FROM lockstep.{function}({named})", **arguments)

    def execute(self, statement, **arguments):
        """Returns the rows, or the SQLSTATE."""
        try:
            cursor = self.session.execute(statement, arguments)
            rows = cursor.fetchall() if cursor.description else []
            self.outcomes.append((statement, sorted(str(plain(cursor.description, row)) for row in rows)))
            return rows
        except psycopg.Error as error:
            self.outcomes.append((statement, error.diag.sqlstate, error.diag.message_primary, error.diag.message_detail))
            return error.diag.sqlstate

    def events(self):
        payload = Jsonb({"n": Decimal("12345678901234567890.12345").__str__(), "text": "é ' \\ \\u0041 \" %s $1"})
        for tenant in ("", "blué"):
            for n in range(3):
                self.call(
                    "push_event",
                    aggregate_type="order",
                    aggregate_id=f"o'{n}\\",
                    event_type="placed",
                    payload=payload,
                    tenant=tenant,
                )
            self.call(
                "push_event",
                aggregate_type="order",
                aggregate_id="o'0\\",
                event_type="paid",
                expected_sequence=1,
                tenant=tenant,
            )
            assert (
                self.call(
                    "push_event",
                    aggregate_type="order",
                    aggregate_id="o'0\\",
                    event_type="x",
                    expected_sequence=1,
                    tenant=tenant,
                )
                == "LS001"
            )
        event = {
            "aggregate_type": "user",
            "aggregate_id": "u",
            "event_type": "bad",
            "payload": {"n": 1},
            "unique": [
                {"op": "add", "scope": "mail", "value": "a"},
                {"op": "add", "scope": "g", "value": "b", "global": True},
            ],
            "event_id": "0a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a",
        }
        self.call(
            "push_events", events=Jsonb([event, event | {"event_id": "1a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a", "unique": []}])
        )
        self.call("push_events", events=Jsonb([event]))
        self.call("push_events", events=Jsonb([{**event, "event_id": "2a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a"}]))
        self.call(
            "push_events",
            events=Jsonb(
                [
                    {
                        **event,
                        "event_id": "3a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a",
                        "unique": [{"op": "remove", "scope": "mail", "value": "a"}],
                    }
                ]
            ),
        )
        for function in ("barrier", "horizon", "read_events", "writer_locks"):
            self.call(function)
        self.call("read_events", after=2, max_events=3, aggregate_types=["order"], event_types=["placed", "bad"])
        self.call("aggregate_events", aggregate_type="order", aggregate_id="o'0\\", tenant="blué")

    def projections(self):
        self.call("projection_create", name="run", handler="workshop.apply(lockstep.events)", max_failures=1)
        self.call(
            "projection_create", name="claim", event_types=["placed", "bad"], batch_size=2, retry_after="1 day 02:03:04.5"
        )
        self.call("projection_create", name="late", start_after=None)
        self.call("projection_create", name="claim", if_not_exists=True)
        self.call("projection_due")
        self.call("projection_run", name="run")
        self.call("projection_run", name="run", tenant="blué", max_duration="1 minute", barrier=False)
        for _ in range(4):
            with self.session.transaction():
                events = self.call("projection_claim", name="claim")
                self.call("projection_claim_state", name="claim")
                if events and events[-1][5] == "bad":
                    self.call("projection_fail", name="claim", event_position=events[-1][1], error="no é")
                elif events:
                    self.call("projection_advance", name="claim", up_to=events[0][1])
        self.call("projection_wait", name="run", up_to=1)
        bad = [
            row[0]
            for row in self.admin.execute(
                "SELECT position FROM lockstep.failed_events WHERE projection = 'run' ORDER BY 1"
            ).fetchall()
        ]
        assert len(bad) >= 2
        self.call("failed_event_retry", name="run", event_position=bad[0])
        self.call("failed_event_discard", name="run", event_position=bad[1])
        self.call("projection_pause", name="run", tenant="blué")
        self.call("projection_run", name="run", tenant="blué")
        self.call("projection_resume", name="run")
        self.call("projection_alter", name="claim", batch_size=7, event_types=[], retry_after="2 months 3 days")
        self.call("projection_reset", name="run", up_to=2)
        self.call("projection_due", names=["run", "claim"])
        self.call("projection_drop", name="late")
        self.call("projection_locks")

    def leases(self):
        self.execute(
            "CREATE TRIGGER g BEFORE INSERT ON workshop.guarded EXECUTE FUNCTION lockstep.lease_guard_trigger('l', 'app.token')"
        )
        ((_, token, *_),) = self.call("lease_acquire", name="l", holder="hé'", ttl="1 month 2 days 03:04:05.6", metadata="{}")
        self.call("lease_acquire", name="l", holder="other")
        self.call("lease_renew", name="l", token=token, ttl="2 days")
        self.call("lease_renew", name="l", token=7)
        self.execute("INSERT INTO workshop.guarded VALUES (1)")
        with self.session.transaction():
            self.call("lease_guard", name="l", token=token)
            self.call("lease_guard_at_commit", name="l", token=token)
            self.execute("INSERT INTO workshop.guarded VALUES (2)")
        self.execute(f"SET app.token = '{token}'")
        self.execute("INSERT INTO workshop.guarded VALUES (3)")
        self.call("lease_guard", name="l", token=7)
        self.execute("CALL lockstep.lease_take('l', 'third', '1 minute', '10 milliseconds')")
        self.call("lease_steal", name="l", holder="thief", ttl="1 hour", reason="é")
        self.call("lease_release", name="l", token=token)
        self.execute("CALL lockstep.lease_take('t', 'third', '1 day', '1 minute')")
        self.call("lease_delete_expired", older_than="1 day")
        self.call("lease_locks")

    def registry(self):
        self.call("resource_create", resource="r'é", replicas=["a", "b", "c"], tenant="blué")
        for n in range(2):
            self.call("resource_create", resource=f"r{n}", replicas=["a", "b", "c"])
        self.call("generation_increment", resource="r0", replicas=["a"])
        self.call("generation_set", resource="r0", replica="a", generation=5)
        self.call("generation_current", resource="r0")
        self.call("generation_replicated", resource="r0", source="a", target="b")
        ((_, token, *_),) = self.call("replica_sync_begin", resource="r0", target="b", holder="w", source="a", ttl="1 day")
        self.call("replica_sync_begin", resource="r0", target="b", holder="x", source="a")
        self.call("replica_sync_renew", resource="r0", target="b", token=token)
        self.call("replica_sync_finish", resource="r0", target="b", token=token)
        self.call("replica_sync_claim", holder="w")
        self.call("replicas_due")
        self.call("registry_follow", event_type="updated", resource="r1")
        self.call("replica_make_authoritative", resource="r1", replica="b")
        self.call("replica_delete", resource="r1", replica="c")
        self.call("replica_invalidate", resource="r1", replica="a")
        self.call("resource_delete", resource="r1")
        self.call("resource_purge", older_than="1 day")

    def jobs(self):
        self.call("queue_configure", queue="q", max_in_progress=3, backoff="1 day 2 hours", max_backoff="1 month")
        for n in range(5):
            self.call(
                "job_enqueue",
                queue="q",
                key=f"k{n % 3}",
                kind=f"é{n}",
                payload='{"n": 1.10}',
                priority=n,
                max_attempts=1 + n % 2,
            )
        self.call("job_enqueue", queue="q", key="k0", kind="é0", payload='{"n": 2}', on_twin="replace", delay="1 day 1 hour")
        jobs = self.call("job_claim", queue="q", holder="w", max_jobs=3, ttl="1 day")
        ids = [(job[0], job[9]) for job in jobs]
        assert len(ids) == 3
        self.call("job_renew", job_ids=[job for job, _ in ids], tokens=[token for _, token in ids], ttl="1 hour")
        (first, second, third) = ids
        self.call("job_guard", job_id=first[0], token=first[1])
        self.call("job_guard", job_id=first[0], token=7)
        self.call("job_complete", job_id=first[0], token=first[1])
        self.call("job_fail", job_id=second[0], token=second[1], error="no é")
        self.call("job_fail", job_id=third[0], token=third[1], error="no", retry_after="2 days 3 hours")
        self.call("job_reap")
        dead = [row[0] for row in self.admin.execute("SELECT job_id FROM lockstep.dead_jobs ORDER BY 1").fetchall()]
        for job in dead:
            self.call("job_requeue", job_id=job)
        self.call("job_discard", job_id=first[0])
        self.call("job_cancel", job_id=third[0])
        self.call("job_purge", older_than="1 day")
        self.call("queue_pause", queue="q")
        self.execute("CALL lockstep.job_wait('q', '10 milliseconds')")
        self.call("queue_resume", queue="q")
        self.execute("CALL lockstep.job_wait('q', '1 minute')")

    def views(self):
        for (view,) in self.admin.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'lockstep'::regnamespace AND relkind = 'v' ORDER BY 1"
        ).fetchall():
            self.execute(f"SELECT * FROM lockstep.{view}")

    def state(self):
        """Every table, but for times, pids and owners."""
        found = {"notes": self.admin.execute("SELECT what FROM workshop.notes ORDER BY nth").fetchall()}
        for (table,) in self.admin.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'lockstep'::regnamespace AND relkind = 'r' ORDER BY 1"
        ).fetchall():
            cursor = self.admin.execute(f"SELECT * FROM lockstep.{table}")
            # Durations are stored, and must not depend on how they are printed.
            found[table] = sorted(str(plain(cursor.description, row, (1184, 701))) for row in cursor.fetchall())
        return found


def plain(columns, row, left_out=TIMES):
    return [
        value
        for column, value in zip(columns, row, strict=True)
        if column.type_code not in left_out and "pid" not in column.name and column.name not in ("owner", "context", "part")
    ]
