"""What each role may do: read out of the pages' GRANT recipes, and found out by trying everything.

An attempt is a statement that exercises one privilege on one object. `Extension` finds the objects in the catalogs and yields
the attempts on each; an object of a kind that it does not know is an error, so that nothing new goes untested.
"""

import re
from pathlib import Path
from typing import NamedTuple

import psycopg
from psycopg.types.json import Jsonb

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

SQL = re.compile(r"^```sql\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMES = r"(\w+(?:, \w+)*)"
OBJECTS = r"(lockstep\.\w+(?:, lockstep\.\w+)*)"

DENIED = "42501"


class Recipes:
    """The GRANTs of one page, as it writes them, and what each of its roles has by them."""

    def __init__(self, page):
        script = re.sub(r"--[^\n]*", "", "\n".join(SQL.findall(page.read_text())))
        self.name = page.name
        statements = [" ".join(statement.split()) for statement in script.split(";")]
        self.grants = [statement for statement in statements if statement.startswith("GRANT ")]
        self.granted, self.memberships = {}, {}
        for grant in self.grants:
            self._read(grant)
        self.roles = list(self.granted)

    def _read(self, grant):
        def is_(pattern):
            return re.fullmatch(pattern, grant)

        if found := is_(r"GRANT USAGE ON SCHEMA lockstep TO (\w+)"):
            self._add(found[1], [("schema", "lockstep", "USAGE")])
        elif found := is_(rf"GRANT EXECUTE ON (FUNCTION|PROCEDURE) {OBJECTS} TO (\w+)"):
            self._add(found[3], [(found[1].lower(), name, "EXECUTE") for name in short(found[2])])
        elif found := is_(r"GRANT SELECT ON ALL TABLES IN SCHEMA lockstep TO (\w+)"):
            self._add(found[1], [("relation", "*", "SELECT")])
        elif found := is_(rf"GRANT SELECT ON {OBJECTS} TO (\w+)"):
            self._add(found[2], [("relation", name, "SELECT") for name in short(found[1])])
        elif found := is_(rf"GRANT {NAMES} TO (\w+)"):
            self._add(found[2], [])
            self.memberships.setdefault(found[2], []).extend(found[1].split(", "))
        else:
            raise AssertionError(f"{self.name}: this test cannot read {grant}")

    def _add(self, role, privileges):
        self.granted.setdefault(role, set()).update(privileges)

    def expected(self, role):
        """The (kind, name, privilege) triples that the role has, itself or by what it is a member of."""
        privileges = set(self.granted.get(role, ()))
        for group in self.memberships.get(role, ()):
            privileges |= self.expected(group)
        return privileges

    def create(self, roles):
        """Makes the page's roles and grants, with names of this database's own; returns these by the page's."""
        made = {role: roles.create(role) for role in self.roles}
        for grant in self.grants:
            for role, name in made.items():
                grant = re.sub(rf"\b{role}\b", name, grant)
            roles.admin.execute(grant)
        return made


def short(names):
    return [name.removeprefix("lockstep.") for name in names.split(", ")]


RECIPES = {page.name: recipes for page in PAGES if (recipes := Recipes(page)).grants}


class Attempt(NamedTuple):
    """`needs`: the privileges without which it is refused. None: nobody has it."""

    object: str
    statement: str
    needs: frozenset | None
    # What it raises where it is allowed, else None.
    outcome: str | None = None
    # What it may raise besides 42501 where it is refused: what no privilege would allow is no matter of privileges.
    refusals: tuple = (DENIED,)


USAGE = ("schema", "lockstep", "USAGE")
NOTHING = frozenset()

# A valid call of each function in the database that `prepare` makes.
CALLS = {
    "after_data_loss": "",
    "aggregate_events": "'order', 'one'",
    "barrier": "",
    "failed_event_discard": "'dead', {event}",
    "failed_event_retry": "'dead', {event}",
    "generation_current": "'r'",
    "generation_increment": "'r'",
    "generation_replicated": "'r', 'a', 'c'",
    "generation_set": "'r', 'a', 9",
    "horizon": "",
    "job_cancel": "{ready_job}",
    "job_claim": "'q', 'w'",
    "job_complete": "{job}, {job_token}",
    "job_discard": "{dead_job}",
    "job_enqueue": "'q', 'k', 'a'",
    "job_fail": "{job}, {job_token}, 'no'",
    "job_guard": "{job}, {job_token}",
    "job_purge": "'1 day'",
    "job_reap": "",
    "job_renew": "ARRAY[{job}], ARRAY[{job_token}]",
    "job_requeue": "{dead_job}",
    "job_wait": "'q', '1 minute'",
    "lease_acquire": "'fresh', 'h'",
    "lease_delete_expired": "'1 day'",
    "lease_guard": "'l', {lease_token}",
    "lease_guard_at_commit": "'l', {lease_token}",
    "lease_guard_trigger": None,
    "lease_locks": "",
    "lease_release": "'l', {lease_token}",
    "lease_renew": "'l', {lease_token}",
    "lease_steal": "'l', 'thief', '1 minute', 'test'",
    "lease_take": "'taken', 'h', '1 hour', '1 minute'",
    "projection_advance": "'p'",
    "projection_alter": "'p', batch_size => 5",
    "projection_claim": "'p'",
    "projection_claim_state": "'p'",
    "projection_create": "'new'",
    "projection_drop": "'p'",
    "projection_due": "",
    "projection_fail": "'p', {event}, 'no'",
    "projection_locks": "",
    "projection_owner": "'p', current_user::regrole",
    "projection_pause": "'p'",
    "projection_reset": "'p'",
    "projection_resume": "'p'",
    "projection_run": "'p'",
    "projection_wait": "'p', 0",
    "push_event": "'order', 'one', 'added'",
    "push_events": """'[{{"aggregate_type": "order", "aggregate_id": "one", "event_type": "added"}}]'""",
    "queue_configure": "'q', 5",
    "queue_pause": "'q'",
    "queue_resume": "'q'",
    "read_events": "",
    "registry_follow": "'updated', 'r'",
    "replica_delete": "'r', 'c'",
    "replica_invalidate": "'r', 'c'",
    "replica_make_authoritative": "'r', 'a'",
    "replica_sync_begin": "'r', 'c', 'w'",
    "replica_sync_claim": "'w'",
    "replica_sync_finish": "'r', 'b', {sync_token}",
    "replica_sync_renew": "'r', 'b', {sync_token}",
    "replicas_due": "",
    "resource_create": "'new'",
    "resource_delete": "'r'",
    "resource_purge": "'1 day'",
    "ticket_resync": "",
    "workers": "",
    "workers_are_on": "",
    "writer_locks": "",
}
# What it raises there: what it must follow in the same transaction is missing.
OUTCOMES = {"projection_advance": "LS002", "projection_fail": "LS002"}


def prepare(admin):
    """Something of each sort to act on. Returns what the calls name it by."""
    one = admin.execute
    one(
        """
        CREATE SCHEMA workshop;
        GRANT ALL ON SCHEMA workshop TO PUBLIC;
        CREATE FUNCTION public.handle(lockstep.events) RETURNS void LANGUAGE sql AS '';
        SELECT lockstep.projection_create('p', handler => 'public.handle(lockstep.events)');
        SELECT lockstep.projection_create('dead', max_failures => 1, handler => 'public.handle(lockstep.events)');
        SELECT lockstep.resource_create('r', '{a,b,c}');
        SELECT lockstep.generation_increment('r', '{a}');
        """
    )
    values = {}

    def keep(name, query, *arguments):
        (values[name],) = one(query, arguments).fetchone()

    events = [{"aggregate_type": "order", "aggregate_id": "one", "event_type": "added"}]
    keep("event", "SELECT position FROM lockstep.push_events(%s)", Jsonb(events))
    with admin.transaction():
        one("SELECT lockstep.projection_claim('dead')")
        one("SELECT lockstep.projection_fail('dead', %s, 'no')", (values["event"],))
    keep("lease_token", "SELECT token FROM lockstep.lease_acquire('l', 'h', '1 hour')")
    keep("sync_token", "SELECT token FROM lockstep.replica_sync_begin('r', 'b', 'w', ttl => '1 hour')")
    keep("dead_job", "SELECT job_id FROM lockstep.job_enqueue('q', 'dead', 'a', max_attempts => 1)")
    keep("job_token", "SELECT token FROM lockstep.job_claim('q', 'w')")
    one("SELECT lockstep.job_fail(%s, %s, 'no')", (values["dead_job"], values["job_token"]))
    keep("job", "SELECT job_id FROM lockstep.job_enqueue('q', 'held', 'a')")
    keep("job_token", "SELECT token FROM lockstep.job_claim('q', 'w', ttl => '1 hour')")
    keep("ready_job", "SELECT job_id FROM lockstep.job_enqueue('q', 'ready', 'a')")
    return values


MEMBERS = """
    WITH RECURSIVE members (classid, objid) AS (
        SELECT d.classid, d.objid FROM pg_depend AS d JOIN pg_extension AS e ON e.oid = d.refobjid
        WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' AND e.extname = 'lockstep'
        UNION
        SELECT d.classid, d.objid FROM pg_depend AS d JOIN members AS m ON m.classid = d.refclassid AND m.objid = d.refobjid
    ), objects (classid, objid) AS (
        SELECT * FROM members
        UNION SELECT 'pg_namespace'::regclass, 'lockstep'::regnamespace
        UNION SELECT 'pg_proc'::regclass, p.oid FROM pg_proc AS p WHERE p.pronamespace = 'lockstep'::regnamespace
        UNION SELECT 'pg_class'::regclass, c.oid FROM pg_class AS c WHERE c.relnamespace = 'lockstep'::regnamespace
        UNION SELECT 'pg_type'::regclass, t.oid FROM pg_type AS t WHERE t.typnamespace = 'lockstep'::regnamespace
        UNION SELECT 'pg_operator'::regclass, o.oid FROM pg_operator AS o WHERE o.oprnamespace = 'lockstep'::regnamespace
        UNION SELECT 'pg_event_trigger'::regclass, t.oid FROM pg_event_trigger AS t
    )
    SELECT i.type, i.identity, o.objid FROM objects AS o, pg_identify_object(o.classid, o.objid, 0) AS i ORDER BY 1, 2
"""


# What is tried, a statement a line.
TABLE_READ = """
    SELECT * FROM {table}
    SELECT count(*) FROM {table}
    SELECT t FROM {table} AS t
    COPY {table} TO STDOUT
    LOCK TABLE {table} IN ACCESS SHARE MODE
    CREATE TEMP TABLE copied AS TABLE {table}
    CREATE TEMP TABLE same (LIKE {table})
    EXPLAIN SELECT FROM {table}
    DECLARE c CURSOR FOR TABLE {table}
"""
TABLE_WRITE = """
    INSERT INTO {table} DEFAULT VALUES
    INSERT INTO {table} SELECT * FROM {table}
    UPDATE {table} SET {column} = NULL
    DELETE FROM {table}
    DELETE FROM {table} WHERE false
    WITH w AS (DELETE FROM {table} RETURNING *) SELECT * FROM w
    TRUNCATE {table}
    COPY {table} FROM STDIN
    MERGE INTO {table} USING (SELECT 1) AS s ON true WHEN MATCHED THEN DELETE
    MERGE INTO {table} USING (SELECT 1) AS s ON false WHEN NOT MATCHED THEN INSERT DEFAULT VALUES
    SELECT 1 FROM {table} FOR UPDATE
    SELECT 1 FROM {table} FOR NO KEY UPDATE
    SELECT 1 FROM {table} FOR SHARE
    SELECT 1 FROM {table} FOR KEY SHARE
    LOCK TABLE {table} IN ROW EXCLUSIVE MODE
    LOCK TABLE {table} IN SHARE MODE
    LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE
"""
TABLE_CHANGE = """
    CREATE TRIGGER t BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()
    CREATE CONSTRAINT TRIGGER t AFTER INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()
    CREATE RULE r AS ON INSERT TO {table} DO ALSO SELECT 1
    CREATE POLICY p ON {table} USING (true)
    CREATE INDEX ON {table} ({column})
    CREATE STATISTICS pg_temp.s (ndistinct) ON {columns} FROM {table}
    CREATE TEMP TABLE child () INHERITS ({table})
    CREATE PUBLICATION p FOR TABLE {table}
    ALTER TABLE {table} ADD COLUMN c int
    ALTER TABLE {table} DISABLE TRIGGER ALL
    ALTER TABLE {table} ENABLE ROW LEVEL SECURITY
    ALTER TABLE {table} OWNER TO CURRENT_USER
    ALTER TABLE {table} SET SCHEMA public
    ALTER TABLE {table} RENAME TO other
    ALTER TABLE {table} SET (autovacuum_enabled = off)
    ALTER TABLE {table} ALTER {column} SET STATISTICS 0
    REINDEX TABLE {table}
    COMMENT ON TABLE {table} IS ''
    DROP TABLE {table}
"""
VIEW_WRITE = """
    INSERT INTO {view} DEFAULT VALUES
    UPDATE {view} SET {column} = NULL
    DELETE FROM {view}
    MERGE INTO {view} USING (SELECT 1) AS s ON true WHEN MATCHED THEN DELETE
"""
VIEW_CHANGE = """
    CREATE RULE r AS ON INSERT TO {view} DO INSTEAD NOTHING
    CREATE TRIGGER t INSTEAD OF DELETE ON {view} FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()
    CREATE OR REPLACE VIEW {view} AS SELECT 1 AS one
    ALTER VIEW {view} SET (security_barrier = off)
    ALTER VIEW {view} OWNER TO CURRENT_USER
    LOCK TABLE {view} IN ACCESS EXCLUSIVE MODE
    DROP VIEW {view}
"""
SEQUENCE = """
    SELECT last_value FROM {sequence}
    SELECT nextval('{sequence}')
    SELECT setval('{sequence}', 1)
    SELECT currval('{sequence}')
    CREATE TEMP TABLE uses (n int DEFAULT nextval('{sequence}')); INSERT INTO uses DEFAULT VALUES
    ALTER SEQUENCE {sequence} RESTART
    ALTER SEQUENCE {sequence} CACHE 100
    DROP SEQUENCE {sequence}
"""
SCHEMA = """
    CREATE TABLE {schema}.x ()
    CREATE TABLE {schema}.x AS SELECT 1
    CREATE VIEW {schema}.x AS SELECT 1
    CREATE SEQUENCE {schema}.x
    CREATE TYPE {schema}.x AS (n int)
    CREATE DOMAIN {schema}.x AS text
    CREATE COLLATION {schema}.x (locale = 'C')
    CREATE FUNCTION {schema}.x() RETURNS int LANGUAGE sql AS 'SELECT 1'
    CREATE OPERATOR {schema}.= (LEFTARG = text, RIGHTARG = text, FUNCTION = pg_catalog.texteq)
    ALTER SCHEMA {schema} RENAME TO other
    ALTER SCHEMA {schema} OWNER TO CURRENT_USER
    DROP SCHEMA {schema} CASCADE
    ALTER EXTENSION lockstep UPDATE
    ALTER EXTENSION lockstep DROP TABLE lockstep.events
    DROP EXTENSION lockstep
"""
TYPE = """
    ALTER TYPE {type} OWNER TO CURRENT_USER
    ALTER TYPE {type} SET SCHEMA public
    DROP TYPE {type} CASCADE
"""
INDEX = """
    REINDEX INDEX {index}
    ALTER INDEX {index} SET (fillfactor = 50)
    ALTER INDEX {index} RENAME TO other
    DROP INDEX {index}
"""
ROUTINE = """
    ALTER {kind} {routine} RENAME TO other
    ALTER {kind} {routine} SET work_mem = '1GB'
    ALTER {kind} {routine} OWNER TO CURRENT_USER
    DROP {kind} {routine}
"""


class Extension:
    """The objects of the extension in a database that holds nothing else that depends on it."""

    def __init__(self, admin):
        self.admin = admin
        self.objects = admin.execute(MEMBERS).fetchall()
        self.values = prepare(admin)

    def names(self, *kinds):
        return [identity for kind, identity, _ in self.objects if kind in kinds]

    def acls(self):
        """What is granted on what."""
        return self.admin.execute(
            """
            SELECT oid, nspacl FROM pg_namespace
            UNION ALL SELECT oid, proacl FROM pg_proc WHERE pronamespace = 'lockstep'::regnamespace
            UNION ALL SELECT oid, relacl FROM pg_class WHERE relnamespace = 'lockstep'::regnamespace
            UNION ALL SELECT oid, typacl FROM pg_type WHERE typnamespace = 'lockstep'::regnamespace
            ORDER BY 1
            """
        ).fetchall()

    def attempts(self):
        return [attempt for object in self.objects for attempt in self._attempts(*object)]

    def _attempts(self, kind, identity, oid):
        try:
            found = getattr(self, f"_{kind.replace(' ', '_')}")
        except AttributeError:
            raise AssertionError(f"{kind} {identity}: nothing says who may do what with it") from None
        attempts = list(found(identity, oid))
        assert attempts, f"{kind} {identity}: nothing tries it"
        return attempts

    def _routine(self, kind, identity, verb):
        name = re.match(r"lockstep\.(\w+)\(", identity)[1]
        assert name in CALLS, f"{identity}: CALLS has no call of it"
        needs = frozenset({USAGE, (kind, name, "EXECUTE")})
        if CALLS[name] is None:
            statement = f"""CREATE TEMP TABLE own (); CREATE TRIGGER t BEFORE INSERT ON own
                            EXECUTE FUNCTION lockstep.{name}('l')"""
        else:
            statement = f"{verb} lockstep.{name}({CALLS[name].format(**self.values)})"
        yield Attempt(identity, statement, needs, OUTCOMES.get(name))
        yield from refused(identity, ROUTINE, kind=kind, routine=identity)
        yield grant(identity, f"GRANT EXECUTE ON {kind} {identity} TO PUBLIC")

    def _function(self, identity, oid):
        return self._routine("function", identity, "SELECT * FROM")

    def _procedure(self, identity, oid):
        return self._routine("procedure", identity, "CALL")

    def _columns(self, oid):
        query = "SELECT attname FROM pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
        return [f'"{name}"' for (name,) in self.admin.execute(query, (oid,)).fetchall()]

    def _table(self, table, oid):
        needs = frozenset({USAGE, ("relation", table.removeprefix("lockstep."), "SELECT")})
        columns = self._columns(oid)
        for statement in lines(TABLE_READ, table=table):
            yield Attempt(table, statement, needs)
        for column in columns:
            yield Attempt(table, f"SELECT {column} FROM {table}", needs)
            yield nobody(table, f"UPDATE {table} SET {column} = DEFAULT")
        names = {"table": table, "column": columns[0], "columns": ", ".join(columns[:2])}
        yield from refused(table, TABLE_WRITE, **names)
        yield from refused(table, TABLE_CHANGE, **names)
        keys = self.admin.execute(
            """SELECT quote_ident(a.attname), format_type(a.atttypid, NULL) FROM pg_constraint AS c
               JOIN pg_attribute AS a ON a.attrelid = c.conrelid AND a.attnum = ANY (c.conkey)
               WHERE c.conrelid = %s AND c.contype = 'p' ORDER BY array_position(c.conkey, a.attnum)""",
            (oid,),
        ).fetchall()
        if keys:
            definitions = ", ".join(" ".join(key) for key in keys)
            key = ", ".join(name for name, _ in keys)
            yield nobody(table, f"CREATE TABLE workshop.refers ({definitions}, FOREIGN KEY ({key}) REFERENCES {table})")
        yield grant(table, f"GRANT SELECT ON {table} TO PUBLIC")
        yield grant(table, f"GRANT INSERT ON {table} TO CURRENT_USER")

    def _view(self, view, oid):
        # A view's functions are called with its reader's rights.
        called = self.admin.execute(
            """SELECT DISTINCT p.proname FROM pg_rewrite AS r
               JOIN pg_depend AS d
                   ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_proc'::regclass
               JOIN pg_proc AS p ON p.oid = d.refobjid AND p.pronamespace = 'lockstep'::regnamespace
               WHERE r.ev_class = %s""",
            (oid,),
        ).fetchall()
        needs = {USAGE, ("relation", view.removeprefix("lockstep."), "SELECT")}
        needs |= {("function", name, "EXECUTE") for (name,) in called}
        columns = self._columns(oid)
        reads = [f"SELECT * FROM {view}", f"COPY (SELECT * FROM {view}) TO STDOUT"]
        for statement in [*reads, *(f"SELECT {column} FROM {view}" for column in columns)]:
            yield Attempt(view, statement, frozenset(needs))
        # Most views cannot be written through at all: then that is the error.
        yield from refused(view, VIEW_WRITE, "55000", "0A000", "42809", view=view, column=columns[0])
        yield from refused(view, VIEW_CHANGE, view=view)
        yield grant(view, f"GRANT SELECT ON {view} TO PUBLIC")

    def _sequence(self, sequence, oid):
        yield from refused(sequence, SEQUENCE, sequence=sequence)
        yield grant(sequence, f"GRANT USAGE ON SEQUENCE {sequence} TO PUBLIC")

    def _schema(self, schema, oid):
        yield Attempt(schema, "SELECT 'lockstep.events'::regclass", frozenset({USAGE}))
        yield from refused(schema, SCHEMA, schema=schema)
        yield grant(schema, f"GRANT CREATE ON SCHEMA {schema} TO CURRENT_USER")

    def _type(self, type_, oid):
        # PostgreSQL lets everybody use a type whose schema he may use; a handler's argument is of one.
        yield Attempt(type_, f"CREATE TEMP TABLE typed (c {type_})", frozenset({USAGE}))
        if type_.endswith("[]"):
            type_ = type_.removesuffix("[]").replace(".", "._")
        # Row types and array types go with their tables: 42809, 2BP01.
        yield from refused(type_, TYPE, "42809", "2BP01", type=type_)

    def _index(self, index, oid):
        yield from refused(index, INDEX, index=index)

    def _toast_table(self, table, oid):
        yield nobody(table, f"SELECT * FROM {table}")

    def _table_constraint(self, identity, oid):
        name, table = identity.split(" on ")
        yield nobody(identity, f"ALTER TABLE {table} DROP CONSTRAINT {name}")

    def _rule(self, identity, oid):
        name, view = identity.split(" on ")
        yield nobody(identity, f"DROP RULE {name} ON {view}")

    def _default_value(self, identity, oid):
        table, column = re.fullmatch(r"for (\w+\.\w+)\.(\w+)", identity).groups()
        yield nobody(identity, f"ALTER TABLE {table} ALTER {column} DROP DEFAULT")


def lines(statements, **names):
    return [line.strip().format(**names) for line in statements.strip().splitlines()]


def refused(object, statements, *refusals, **names):
    for statement in lines(statements, **names):
        yield nobody(object, statement, *refusals)


def nobody(object, statement, *refusals):
    return Attempt(object, statement, None, refusals=(DENIED, *refusals))


def grant(object, statement):
    """To one who may use the object but not pass that on, a GRANT does nothing, with a warning: see `Extension.acls`."""
    return nobody(object, statement, None)


def everything(extension):
    """The privileges that the attempts need, all of them."""
    return frozenset().union(*(attempt.needs for attempt in extension.attempts() if attempt.needs))


def has(expected, privilege):
    kind, _, right = privilege
    return privilege in expected or (kind == "relation" and (kind, "*", right) in expected)


def try_all(session, expected, attempts):
    """Fails if the session could do something against its privileges, or could not in spite of them."""
    problems = []
    for attempt in attempts:
        allowed = attempt.needs is not None and all(has(expected, privilege) for privilege in attempt.needs)
        raised = run(session, attempt.statement)
        state = raised and raised.diag.sqlstate
        if allowed and state != attempt.outcome:
            problems.append(f"{attempt.statement}: should be allowed, raised {state}: {raised}")
        if not allowed and state not in attempt.refusals:
            problems.append(f"{attempt.statement}: should be refused, raised {state}: {raised}")
    assert not problems, "\n".join(problems)


def run(session, statement):
    """Tries the statement, and takes back what it did; returns the error, or None."""
    try:
        if statement.startswith(("CALL ", "GRANT ")):
            session.execute(statement)
            return None
        with session.transaction(force_rollback=True):
            if statement.startswith("COPY "):
                with session.cursor().copy(statement) as copy:
                    if "FROM STDIN" not in statement:
                        list(copy)
            else:
                session.execute(statement)
    except psycopg.Error as error:
        return error
    return None
