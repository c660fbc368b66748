"""The queue that one makes by hand: a table, FOR UPDATE SKIP LOCKED, and DELETE. It has what a claim looks at, and no keys, tokens, attempts or dead
letters; a worker holds a transaction open while it works.

Recipe: https://www.postgresql.org/docs/18/sql-select.html#SQL-FOR-UPDATE-SHARE
"""

SCHEMA = """
CREATE TABLE queue (id bigserial PRIMARY KEY, key text NOT NULL, kind text NOT NULL, payload jsonb NOT NULL,
                    priority int NOT NULL DEFAULT 0, run_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX ON queue (priority DESC, id);
"""
FILL = "INSERT INTO queue (key, kind, payload) SELECT 'key ' || n, 'work', '{{\"n\": 1}}' FROM generate_series(1, {jobs}) AS n"
ENQUEUE = "INSERT INTO queue (key, kind, payload) VALUES ('new ' || :first || ' ' || :n, 'work', :payload) RETURNING id;\n"
WORK = """BEGIN;
SELECT id FROM queue WHERE run_at <= now() ORDER BY priority DESC, id LIMIT 1 FOR UPDATE SKIP LOCKED \\gset
DELETE FROM queue WHERE id = :id;
COMMIT;
"""
LEFT = "SELECT count(*) FROM queue"
