-- Read models, and who keeps them: workers as the role bench_worker, or a listener as the superuser, whom workers refuse.
DO $$
BEGIN
    CREATE ROLE bench_worker LOGIN;
EXCEPTION WHEN duplicate_object THEN
    NULL; -- left by an earlier run
END
$$;
GRANT USAGE ON SCHEMA bench, lockstep TO bench_worker;

CREATE TABLE bench.applied (position numeric NOT NULL);
GRANT INSERT ON bench.applied TO bench_worker;

CREATE FUNCTION bench.apply(event lockstep.events) RETURNS void LANGUAGE sql
BEGIN ATOMIC
    INSERT INTO bench.applied (position) VALUES (event.position);
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
        EXECUTE format('CREATE TABLE bench.balances_%s (customer text PRIMARY KEY, balance numeric NOT NULL) WITH (fillfactor = 50)', n);
        EXECUTE format('GRANT SELECT, INSERT, UPDATE ON bench.balances_%s TO bench_worker', n);
        EXECUTE format($f$
            CREATE FUNCTION bench.add_%1$s(events lockstep.events[]) RETURNS void LANGUAGE sql AS $h$
                INSERT INTO bench.balances_%1$s AS b (customer, balance)
                SELECT e.payload ->> 'customer', sum((e.payload ->> 'amount')::numeric) FROM unnest(events) AS e GROUP BY 1
                ON CONFLICT (customer) DO UPDATE SET balance = b.balance + EXCLUDED.balance
            $h$
            $f$, n);
    END LOOP;
END
$$;

CREATE PROCEDURE bench.follow_16() LANGUAGE plpgsql AS $$
BEGIN
    PERFORM lockstep.projection_drop(name) FROM lockstep.projections;
    FOR n IN 1..16 LOOP
        EXECUTE format('TRUNCATE bench.balances_%s', n);
        PERFORM lockstep.projection_create('add ' || n, batch_size => 1000, handler => format('bench.add_%s(lockstep.events[])', n)::regprocedure);
        PERFORM lockstep.projection_owner('add ' || n, 'bench_worker');
    END LOOP;
END
$$;
