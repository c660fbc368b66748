"""All that the catalogs know of the extension, as text, to compare two installations of it."""

import re

# Each query gives rows of (what it is, its name, all that is to be the same of it). Members are what the extension owns; the rest is
# looked up through the schema, which holds nothing else, so that an object that is no member is seen too.
QUERIES = (
    # Names, because two installations have other oids.
    """
    SELECT 'member', (pg_identify_object(classid, objid, objsubid)).type, (pg_identify_object(classid, objid, objsubid)).identity
    FROM pg_depend
    WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e'
      AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'lockstep')
    """,
    """
    SELECT 'extension', x.extname,
           (x.extowner::regrole, x.extnamespace::regnamespace, x.extrelocatable, obj_description(x.oid, 'pg_extension'),
            array(SELECT (c.relation::regclass, x.extcondition[c.nth])::text
                  FROM unnest(x.extconfig) WITH ORDINALITY AS c (relation, nth) ORDER BY 1))::text
    FROM pg_extension AS x WHERE x.extname = 'lockstep'
    """,
    """
    SELECT 'schema', nspname, (nspowner::regrole, sorted(nspacl), obj_description(oid, 'pg_namespace'))::text
    FROM pg_namespace WHERE nspname = 'lockstep'
    """,
    """
    SELECT 'relation', c.oid::regclass::text,
           (c.relkind, c.relowner::regrole, c.relpersistence, a.amname, sorted(c.reloptions), sorted(t.reloptions), sorted(c.relacl),
            c.relrowsecurity, c.relforcerowsecurity, c.relreplident, c.relhassubclass, c.relnatts, c.relchecks,
            obj_description(c.oid, 'pg_class'),
            CASE WHEN c.relkind = 'v' THEN pg_get_viewdef(c.oid) END)::text
    FROM pg_class AS c
    LEFT JOIN pg_am AS a ON a.oid = c.relam
    LEFT JOIN pg_class AS t ON t.oid = c.reltoastrelid
    WHERE c.relnamespace = 'lockstep'::regnamespace
    """,
    # pg_attver: PostgreSQL's own mark since 15.20, different in each table.
    """
    SELECT 'column', format('%s.%s', a.attrelid::regclass, a.attname),
           (a.attnum, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated, a.attstorage,
            a.attcompression, a.attcollation::regcollation, a.attisdropped, a.attislocal, sorted(a.attacl),
            array(SELECT o FROM unnest(a.attoptions) AS o WHERE o NOT LIKE 'pg_attver=%' ORDER BY o),
            pg_get_expr(d.adbin, d.adrelid), col_description(a.attrelid, a.attnum))::text
    FROM pg_attribute AS a
    JOIN pg_class AS c ON c.oid = a.attrelid AND c.relnamespace = 'lockstep'::regnamespace
    LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attnum > 0
    """,
    """
    SELECT 'constraint', format('%s of %s', conname, COALESCE(conrelid::regclass::text, contypid::regtype::text)),
           (pg_get_constraintdef(oid), convalidated, connoinherit, obj_description(oid, 'pg_constraint'))::text
    FROM pg_constraint WHERE connamespace = 'lockstep'::regnamespace
    """,
    """
    SELECT 'index', i.indexrelid::regclass::text,
           (pg_get_indexdef(i.indexrelid), i.indisvalid, i.indisready, i.indisclustered, i.indisreplident)::text
    FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid WHERE c.relnamespace = 'lockstep'::regnamespace
    """,
    """
    SELECT 'sequence', s.seqrelid::regclass::text,
           (s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqmax, s.seqmin, s.seqcache, s.seqcycle,
            (SELECT array_agg(d.refobjid::regclass::text) FROM pg_depend AS d
             WHERE d.classid = 'pg_class'::regclass AND d.objid = s.seqrelid AND d.deptype IN ('a', 'i')))::text
    FROM pg_sequence AS s JOIN pg_class AS c ON c.oid = s.seqrelid WHERE c.relnamespace = 'lockstep'::regnamespace
    """,
    """
    SELECT 'function', p.oid::regprocedure::text,
           (pg_get_functiondef(p.oid), p.proowner::regrole, sorted(p.proacl), obj_description(p.oid, 'pg_proc'))::text
    FROM pg_proc AS p WHERE p.pronamespace = 'lockstep'::regnamespace AND p.prokind <> 'a'
    """,
    """
    SELECT 'type', t.oid::regtype::text, (t.typtype, t.typowner::regrole, sorted(t.typacl), obj_description(t.oid, 'pg_type'))::text
    FROM pg_type AS t WHERE t.typnamespace = 'lockstep'::regnamespace
    """,
    """
    SELECT 'trigger', format('%s of %s', t.tgname, t.tgrelid::regclass), (pg_get_triggerdef(t.oid), t.tgenabled)::text
    FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid WHERE c.relnamespace = 'lockstep'::regnamespace
    """,
    """
    SELECT 'rule', format('%s of %s', r.rulename, r.ev_class::regclass), (pg_get_ruledef(r.oid), r.ev_enabled)::text
    FROM pg_rewrite AS r JOIN pg_class AS c ON c.oid = r.ev_class WHERE c.relnamespace = 'lockstep'::regnamespace
    """,
    # What pg_dump takes as the privileges that the extension itself has set.
    """
    SELECT 'initial privileges', (pg_identify_object(i.classoid, i.objoid, i.objsubid)).identity, (i.privtype, sorted(i.initprivs))::text
    FROM pg_init_privs AS i
    JOIN pg_depend AS d ON d.classid = i.classoid AND d.objid = i.objoid AND d.deptype = 'e'
    JOIN pg_extension AS x ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = x.oid AND x.extname = 'lockstep'
    """,
)

SORTED = """
    CREATE OR REPLACE FUNCTION pg_temp.sorted(items anyarray) RETURNS text LANGUAGE sql
    AS 'SELECT array_agg(item::text ORDER BY item::text)::text FROM unnest(items) AS u (item)'
"""


def describe(connection, privileges=True):
    """The description of each object of the extension, by what it is and its name; without who may do what, if so asked."""
    queries = [query.replace("sorted(", "pg_temp.sorted(") for query in QUERIES]
    if not privileges:
        queries = [re.sub(r"pg_temp\.sorted\(\S*acl\)", "NULL", query) for query in queries if "pg_init_privs" not in query]
    with connection.transaction():
        connection.execute("SET LOCAL search_path = pg_catalog, pg_temp")
        connection.execute(SORTED)
        rows = [row for query in queries for row in connection.execute(query).fetchall()]
    description = {(what, name): text for what, name, text in rows if what != "member"}
    description |= {("member", f"{kind} {name}"): "" for what, kind, name in rows if what == "member"}
    return description


def differences(one, other):
    """One line for each object that is not the same in both."""
    return [
        f"{what} {name}: {one.get((what, name), 'missing')} | {other.get((what, name), 'missing')}"
        for what, name in sorted(one.keys() | other.keys())
        if one.get((what, name)) != other.get((what, name))
    ]
