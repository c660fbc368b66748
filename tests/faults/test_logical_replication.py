"""A logical replication carries the tables and leaves the sequences behind: what that means for who goes on at the subscriber."""

from psycopg import sql
from server import wait_until
from sessions import call, claim_and_advance, drain, log, push, raises


def subscribe(publisher, subscriber, dbname):
    """Replicates the extension's tables; returns when what is there is there."""
    with publisher.connect(dbname) as connection:
        connection.execute("CREATE PUBLICATION everything FOR TABLES IN SCHEMA lockstep")
    with subscriber.connect(dbname) as connection:
        where = sql.Literal(f"host={publisher.host} port={publisher.port} dbname={dbname} user=postgres")
        connection.execute(sql.SQL("CREATE SUBSCRIPTION everything CONNECTION {} PUBLICATION everything").format(where))
        unready = "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'"
        wait_until(lambda: connection.execute(unready).fetchone()[0] == 0, 60)


def switch_over(publisher, subscriber, dbname):
    """The publisher ends after everything has arrived; the subscriber is told to go on alone."""
    with publisher.connect(dbname) as connection, subscriber.connect(dbname) as replica:
        (end,) = connection.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
        arrived = "SELECT confirmed_flush_lsn >= %s FROM pg_replication_slots WHERE slot_name = 'everything'"
        wait_until(lambda: connection.execute(arrived, (end,)).fetchone()[0], 60)
        replica.execute("ALTER SUBSCRIPTION everything DISABLE")
        replica.execute("ALTER SUBSCRIPTION everything SET (slot_name = NONE)")
        replica.execute("DROP SUBSCRIPTION everything")
    publisher.stop()


def test_at_a_subscriber_all_goes_on_after_ticket_resync_and_after_data_loss(cluster, new_database, load):
    publisher, subscriber = cluster(wal_level="logical"), cluster(wal_retrieve_retry_interval="100ms")
    session = new_database(publisher, "app").connect()
    new_database(subscriber, "app")
    session.execute("SELECT lockstep.after_data_loss()")  # its numbers are beyond what this adds to a new sequence
    session.execute("SELECT lockstep.projection_create('p')")
    pushed = [push(session) for _ in range(5)]
    early = load.Claims(session, "early")
    subscribe(publisher, subscriber, "app")
    pushed += [push(session, tenant="") for _ in range(40)]
    assert claim_and_advance(session, max_events=7) == pushed[:7]
    late = load.Claims(session, "late")
    call(session, "job_enqueue", queue="q", key="k", kind="waiting")
    switch_over(publisher, subscriber, "app")

    session = subscriber.connect("app")
    assert log(session) == pushed
    with raises("55000") as caught:
        push(session)
    assert "ticket_resync()" in caught.value.diag.message_hint
    session.execute("UPDATE lockstep.leases SET expires_at = now() - interval '1 second' WHERE name = 'early'")
    with raises("55000") as caught:
        call(session, "lease_acquire", name="early", holder="w")
    assert "after_data_loss()" in caught.value.diag.message_hint

    session.execute("SELECT lockstep.ticket_resync()")
    session.execute("SELECT lockstep.after_data_loss()")
    pushed.append(push(session))
    assert pushed == sorted(pushed) == log(session)
    assert drain(session) == pushed[7:]
    for claims in (early, late):
        claims.are_refused(session)
    anew = [load.Claims(session, "early", again=True), load.Claims(session, "late", again=True), load.Claims(session, "new")]
    tokens = [token for claims in (early, late) for token in claims.tokens()]
    assert min(token for claims in anew for token in claims.tokens()) > max(tokens)
    for claims in anew:
        claims.are_held(session)
    assert session.execute("SELECT kind FROM lockstep.job_claim('q', 'w')").fetchall() == [("waiting",)]
