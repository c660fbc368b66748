"""message-db 1.3.1 (npm @eventide/message-db), installed by its own install.sh. Appends by write_message with the expected version, each aggregate a
stream of the category `order`; a consumer reads the category by get_category_messages from its position on and keeps that position with what
it wrote. write_message serialises the writers of a category until their commit, so that a category's order has no gaps.

Docs: http://docs.eventide-project.org/user-guide/message-db/server-functions.html
"""

from . import APPLIED, Log

SCHEMA = (
    APPLIED
    + """
CREATE TABLE bench.cursors (consumer int PRIMARY KEY, position bigint NOT NULL) WITH (fillfactor = 50);
CREATE FUNCTION bench.turn(of_consumer int, batch int, each boolean DEFAULT false) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    seen bigint;
    event record;
    applied bigint := 0;
BEGIN
    SELECT c.position INTO seen FROM bench.cursors AS c WHERE c.consumer = of_consumer FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    IF each THEN
        FOR event IN SELECT m.global_position FROM message_store.get_category_messages('order', seen + 1, batch) AS m LOOP
            INSERT INTO bench.applied VALUES (of_consumer, event.global_position);
            seen := event.global_position;
            applied := applied + 1;
        END LOOP;
    ELSE
        WITH new AS (
            INSERT INTO bench.applied
            SELECT of_consumer, m.global_position FROM message_store.get_category_messages('order', seen + 1, batch) AS m
            RETURNING position
        )
        SELECT count(*), coalesce(max(position), seen) INTO applied, seen FROM new;
    END IF;
    IF applied > 0 THEN
        UPDATE bench.cursors AS c SET position = seen WHERE c.consumer = of_consumer;
    END IF;
    RETURN applied;
END
$$;
"""
)

WRITE = "SELECT message_store.write_message(gen_random_uuid()::text, {stream}, 'paid', :payload, NULL, {version});\n"
CURSORS = "TRUNCATE bench.applied, bench.cursors; INSERT INTO bench.cursors SELECT n, 0 FROM generate_series(1, 64) AS n"

PEER = Log(
    name="message-db",
    schema=SCHEMA,
    append=WRITE.format(stream="'order-' || :aggregate", version=":sequence - 2"),
    hot=WRITE.format(stream="'order-hot'", version="NULL"),
    committed="SELECT global_position FROM message_store.messages",
    reset=f"TRUNCATE message_store.messages; {CURSORS}",
    rewind=CURSORS,
    fill=(
        """INSERT INTO message_store.messages (stream_name, position, type, data)
SELECT 'order-' || n / 10, n % 10, 'paid', jsonb_build_object('amount', n, 'customer', 'c-' || n % 1000)
FROM generate_series(0, {events} - 1) AS n""",
    ),
    options="-c search_path=message_store,public",  # as its role message_store has it
)
