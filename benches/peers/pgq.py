"""PgQ 3.5 (Debian postgresql-15-pgq3), on PostgreSQL 15, for which alone it is packaged; lockstep and the control run on that server too in its cells.
Appends by pgq.insert_event, which checks no version. A consumer takes next_batch, get_batch_events and finish_batch in one transaction. Ticks are
made by pgqd, looking every 0.1 s in place of 1, with ticker_max_lag of 0.1 s in place of 3: quicker than its defaults, to its advantage.

Docs: https://pgq.github.io/extension/pgq/files/external-sql.html
"""

from . import APPLIED, CONSUMERS, HANDLER, Log

SCHEMA = (
    "CREATE EXTENSION pgq;"
    + APPLIED
    + HANDLER
    + """
SELECT pgq.create_queue('log');
SELECT pgq.set_queue_config('log', 'ticker_max_lag', '0.1 seconds'), pgq.set_queue_config('log', 'ticker_idle_period', '1 second');
CREATE FUNCTION bench.turn(of_consumer int, batch int, each boolean DEFAULT false) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    batch_id bigint := pgq.next_batch('log', 'consumer ' || of_consumer);
    event record;
    applied bigint := 0;
BEGIN
    IF batch_id IS NULL THEN
        RETURN 0;
    END IF;
    IF each THEN
        FOR event IN SELECT e.ev_id, e.ev_data::jsonb AS payload FROM pgq.get_batch_events(batch_id) AS e LOOP
            PERFORM bench.handle(of_consumer, event.ev_id, event.payload);
            applied := applied + 1;
        END LOOP;
    ELSE
        INSERT INTO bench.applied SELECT of_consumer, e.ev_id, (e.ev_data::jsonb ->> 'amount')::bigint FROM pgq.get_batch_events(batch_id) AS e;
        GET DIAGNOSTICS applied = ROW_COUNT;
    END IF;
    PERFORM pgq.finish_batch(batch_id);
    RETURN applied;
END
$$;
"""
)

# A consumer that is registered begins at the last tick.
REGISTER = f"""TRUNCATE bench.applied;
SELECT pgq.unregister_consumer('log', 'consumer ' || n) FROM generate_series(1, {CONSUMERS}) AS n
WHERE EXISTS (SELECT FROM pgq.get_consumer_info('log', 'consumer ' || n));
SELECT pgq.force_tick('log'); SELECT pgq.ticker('log')"""

# A tick, and so a batch, for each 1000 events.
FILL = """DO $$
BEGIN
    FOR block IN 0..{events} / 1000 - 1 LOOP
        PERFORM pgq.insert_event('log', 'paid', jsonb_build_object('amount', n, 'customer', 'c-' || n % 1000)::text, (n / 10)::text, NULL, NULL, NULL)
        FROM generate_series(block * 1000, block * 1000 + 999) AS n;
        COMMIT;
        PERFORM pgq.force_tick('log');
        PERFORM pgq.ticker('log');
        COMMIT;
    END LOOP;
END
$$"""
AGAIN = f"""TRUNCATE bench.applied;
SELECT pgq.unregister_consumer('log', 'consumer ' || n) FROM generate_series(1, {CONSUMERS}) AS n
WHERE EXISTS (SELECT FROM pgq.get_consumer_info('log', 'consumer ' || n));
SELECT pgq.register_consumer_at('log', 'consumer ' || n, (SELECT min(tick_id) FROM pgq.tick)) FROM generate_series(1, {{consumers}}) AS n"""

PEER = Log(
    name="PgQ",
    schema=SCHEMA,
    append="SELECT pgq.insert_event('log', 'paid', :payload, :aggregate, NULL, NULL, NULL);\n",
    committed="SELECT ev_id FROM pgq.event_template",  # with the tables that inherit from it
    reset=f"{REGISTER}; TRUNCATE pgq.event_template; SELECT pgq.register_consumer('log', 'consumer ' || n) FROM generate_series(1, {{consumers}}) AS n",
    rewind=AGAIN,
    fill=(FILL,),
    settle="SELECT pgq.force_tick('log'); SELECT pgq.ticker('log')",
)
