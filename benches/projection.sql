-- A log of 50,000 events, a read model, and who keeps it: a bare loop, or projection_run with one of two handlers.
INSERT INTO lockstep.events
SELECT 'log', n, 'order', (n / 10)::text, n % 10 + 1, 'paid', NULL, jsonb_build_object('amount', n, 'customer', 'c-' || n % 1000), NULL, now()
FROM generate_series(1, 50000) AS n;
SELECT lockstep.ticket_resync();
VACUUM ANALYZE lockstep.events;

CREATE TABLE bench.payments (position numeric PRIMARY KEY, customer text NOT NULL, amount numeric NOT NULL);
CREATE TABLE bench.balances (customer text PRIMARY KEY, balance numeric NOT NULL) WITH (fillfactor = 50);

CREATE PROCEDURE bench.copy_unprotected(batch int) LANGUAGE plpgsql AS $$
DECLARE
    last numeric := 0;
BEGIN
    LOOP
        INSERT INTO bench.payments (position, customer, amount)
        SELECT e.position, e.payload ->> 'customer', (e.payload ->> 'amount')::numeric
        FROM lockstep.events AS e
        WHERE e.tenant = 'log' AND e.position > last
        ORDER BY e.position LIMIT batch;
        EXIT WHEN NOT FOUND;
        SELECT max(p.position) INTO last FROM bench.payments AS p;
        COMMIT;
    END LOOP;
END
$$;

CREATE FUNCTION bench.copy(events lockstep.events[]) RETURNS void LANGUAGE sql AS $$
    INSERT INTO bench.payments (position, customer, amount)
    SELECT e.position, e.payload ->> 'customer', (e.payload ->> 'amount')::numeric FROM unnest(events) AS e
$$;

CREATE FUNCTION bench.add(event lockstep.events) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO bench.balances AS b (customer, balance)
    VALUES (event.payload ->> 'customer', (event.payload ->> 'amount')::numeric)
    ON CONFLICT (customer) DO UPDATE SET balance = b.balance + EXCLUDED.balance;
END
$$;

SELECT lockstep.projection_create('copy', handler => 'bench.copy(lockstep.events[])');
SELECT lockstep.projection_create('add', handler => 'bench.add(lockstep.events)');

CREATE PROCEDURE bench.run(name text, batch int) LANGUAGE plpgsql AS $$
DECLARE
    run record;
BEGIN
    LOOP
        SELECT * INTO run FROM lockstep.projection_run(name, max_events => batch, tenant => 'log');
        COMMIT;
        EXIT WHEN NOT run.more;
    END LOOP;
END
$$;
