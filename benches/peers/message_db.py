"""message-db 1.3.1 (npm @eventide/message-db), installed by its own install.sh. Appends by write_message with the expected version, each aggregate a
stream of the category `order`; a consumer reads the category by get_category_messages from its position on and keeps that position with what
it wrote. write_message serialises the writers of a category until their commit, so that a category's order has no gaps.

Docs: http://docs.eventide-project.org/user-guide/message-db/server-functions.html
"""

from . import APPLIED, REWIND, Log, consumer

NEXT_EVENTS = """SELECT m.global_position AS position, m.data::jsonb AS payload
        FROM message_store.get_category_messages('order', seen + 1, batch) AS m"""
WRITE = "SELECT message_store.write_message(gen_random_uuid()::text, {stream}, 'paid', :payload, NULL, {version});\n"

PEER = Log(
    name="message-db",
    schema=APPLIED + consumer(NEXT_EVENTS, type="bigint"),
    append=WRITE.format(stream="'order-' || :aggregate", version=":sequence - 2"),
    hot=WRITE.format(stream="'order-hot'", version="NULL"),
    committed="SELECT global_position FROM message_store.messages",
    reset=f"TRUNCATE message_store.messages; {REWIND}",
    rewind=REWIND,
    fill=(
        """INSERT INTO message_store.messages (stream_name, position, type, data)
SELECT 'order-' || n / 10, n % 10, 'paid', jsonb_build_object('amount', n, 'customer', 'c-' || n % 1000)
FROM generate_series(0, {events} - 1) AS n""",
    ),
    options="-c search_path=message_store,public",  # as its role message_store has it
)
