"""lockstep with a projection that applies what is pushed: by workers, as the role bench_worker (they refuse a superuser's projections), or by the
client of listen_notify.py.

Reference: docs/worker.md
"""

from dataclasses import replace

from . import APPLIED, lockstep

SCHEMA = (
    "CREATE EXTENSION lockstep;"
    + APPLIED
    + """
DO $$
BEGIN
    CREATE ROLE bench_worker LOGIN;
EXCEPTION WHEN duplicate_object THEN
    NULL; -- made in another database of this server
END
$$;
GRANT USAGE ON SCHEMA bench, lockstep TO bench_worker;
GRANT INSERT ON bench.applied TO bench_worker;

CREATE FUNCTION bench.apply(event lockstep.events) RETURNS void LANGUAGE sql
BEGIN ATOMIC
    INSERT INTO bench.applied VALUES (1, event.position, (event.payload ->> 'amount')::bigint);
END;

-- A projection that applies what is pushed from now on.
CREATE PROCEDURE bench.follow(owner regrole) LANGUAGE plpgsql AS $$
BEGIN
    TRUNCATE bench.applied;
    PERFORM lockstep.projection_create('follow', start_after => NULL, handler => 'bench.apply(lockstep.events)');
    PERFORM lockstep.projection_owner('follow', owner);
END
$$;

-- A read model of its own for each of 16 projections, so that none waits for another's rows.
DO $$
BEGIN
    FOR n IN 1..16 LOOP
        EXECUTE format('CREATE TABLE bench.applied_%s (position numeric NOT NULL)', n);
        EXECUTE format('GRANT INSERT ON bench.applied_%s TO bench_worker', n);
        EXECUTE format($f$
            CREATE FUNCTION bench.apply_%1$s(events lockstep.events[]) RETURNS void LANGUAGE sql AS
                'INSERT INTO bench.applied_%1$s SELECT (e).position FROM unnest(events) AS e'
            $f$, n);
    END LOOP;
END
$$;

CREATE PROCEDURE bench.follow_16() LANGUAGE plpgsql AS $$
BEGIN
    PERFORM lockstep.projection_drop(name) FROM lockstep.projections;
    FOR n IN 1..16 LOOP
        EXECUTE format('TRUNCATE bench.applied_%s', n);
        PERFORM lockstep.projection_create('follow ' || n, batch_size => 1000, handler => format('bench.apply_%s(lockstep.events[])', n)::regprocedure);
        PERFORM lockstep.projection_owner('follow ' || n, 'bench_worker');
    END LOOP;
END
$$;
"""
)

PEER = replace(lockstep.PEER, schema=SCHEMA, reset="TRUNCATE lockstep.events, bench.applied")
