"""lockstep.max_parallel_claims: never more than that in the database, and a place comes back however its claim ends."""

import psycopg
import pytest
from server import wait_for_lock_wait, wait_until
from sessions import call, claim, push, raises, start, start_together

LIMIT = 2
WORKERS = 8


@pytest.fixture
def limited(cluster, new_database):
    """A database of a cluster with two places, and eight projections, each with events in it."""
    database = new_database(cluster(**{"lockstep.max_parallel_claims": LIMIT}), "limited")
    session = database.connect()
    for number in range(WORKERS):
        session.execute("SELECT lockstep.projection_create(%s, batch_size => 1)", (f"p{number}",))
    return database


def status(connection, name):
    return call(connection, "projection_claim_state", name=name)[0][0]


def hold(connection, name, **arguments):
    connection.execute("BEGIN")
    claim(connection, name, **arguments)
    return status(connection, name)


def free_places(database):
    """How many claims of different projections can be held side by side now."""
    sessions = [database.connect() for _ in range(LIMIT + 1)]
    try:
        return [hold(session, f"p{n}") for n, session in enumerate(sessions)].count("claimed")
    finally:
        for session in sessions:
            session.close()


@pytest.mark.parametrize("wait", [False, True])
def test_eight_workers_never_hold_more_than_two_claims_at_once(limited, wait):
    """Each worker notes, while it holds a claim, how many others do: by locks that the extension knows nothing of. They are given
    back before COMMIT, which gives back locks in no particular order."""
    session = limited.connect()
    session.execute("CREATE TABLE public.seen (projection text, position numeric, at_once int)")
    positions = [push(session) for _ in range(25)]

    def work(number):
        connection = limited.connect()
        name, left = f"p{number}", len(positions)
        while left:
            with connection.transaction():
                batch = claim(connection, name, wait=wait)
                if status(connection, name) == "busy":
                    continue
                connection.execute("SELECT pg_advisory_lock(1, %s)", (number,))
                connection.execute(
                    """INSERT INTO public.seen SELECT %s, unnest(%s::numeric[]), count(*) FROM pg_locks
                       WHERE locktype = 'advisory' AND classid = 1 AND objsubid = 2 AND granted""",
                    (name, batch),
                )
                connection.execute("SELECT lockstep.projection_advance(%s)", (name,))
                connection.execute("SELECT pg_advisory_unlock(1, %s)", (number,))
                left -= len(batch)

    for worker in start_together([lambda number=number: work(number) for number in range(WORKERS)]):
        worker.result(120)
    counts = session.execute("SELECT count(*), count(DISTINCT (projection, position)), max(at_once) FROM public.seen")
    assert counts.fetchone() == (WORKERS * len(positions), WORKERS * len(positions), LIMIT)


def test_the_places_come_back_however_a_claim_ends(limited):
    session = limited.connect()
    push(session)
    assert free_places(limited) == LIMIT

    def held():
        connections = [limited.connect() for _ in range(LIMIT)]
        assert [hold(connection, f"p{n + 3}") for n, connection in enumerate(connections)] == ["claimed"] * LIMIT
        assert free_places(limited) == 0
        return connections

    for ending in ("COMMIT", "ROLLBACK"):
        for connection in held():
            connection.execute(ending)
        assert free_places(limited) == LIMIT, ending
    for connection in held():
        with raises("22012"):
            connection.execute("SELECT 1 / 0")
        connection.execute("ROLLBACK")
    assert free_places(limited) == LIMIT
    for connection in held():
        connection.close()
    wait_until(lambda: free_places(limited) == LIMIT)
    for connection in held():
        session.execute("SELECT pg_terminate_backend(%s, 30000)", (connection.info.backend_pid,))
    assert free_places(limited) == LIMIT


def test_the_places_come_back_after_a_sigkill(limited):
    push(limited.connect())
    holders = [limited.connect() for _ in range(LIMIT)]
    assert [hold(holder, f"p{n}") for n, holder in enumerate(holders)] == ["claimed"] * LIMIT
    limited.cluster.kill_backend(holders[0].info.backend_pid)
    with pytest.raises(psycopg.OperationalError):
        wait_until(lambda: holders[1].execute("SELECT false").fetchone()[0])
    limited.cluster.wait_for_connections()
    assert free_places(limited) == LIMIT


def test_a_prepared_claim_keeps_its_place_until_it_is_resolved(limited):
    session = limited.connect()
    push(session)
    for number, ending in enumerate(("COMMIT PREPARED 'place'", "ROLLBACK PREPARED 'place'")):
        holder = limited.connect()
        assert hold(holder, f"p{number + 5}") == "claimed"
        holder.execute("PREPARE TRANSACTION 'place'")
        assert free_places(limited) == LIMIT - 1
        holder.execute(ending)
        assert free_places(limited) == LIMIT


def test_the_claim_that_waits_for_a_place_goes_on_when_one_is_free_and_obeys_lock_timeout(limited):
    push(limited.connect())
    holders = [limited.connect() for _ in range(LIMIT)]
    waiter, observer = limited.connect(), limited.connect()
    assert [hold(holder, f"p{n}") for n, holder in enumerate(holders)] == ["claimed"] * LIMIT
    waiter.execute("SET lock_timeout = '20ms'")
    with raises("55P03"), waiter.transaction():
        claim(waiter, "p5", wait=True)
    waiter.execute("SET lock_timeout = '30s'")
    waiting = start(hold, waiter, "p5", wait=True)
    wait_for_lock_wait(observer, waiter.info.backend_pid)
    for holder in holders:
        holder.execute("COMMIT")
    assert waiting.result(30) == "claimed"


def test_two_databases_count_apart(limited, new_database):
    other = new_database(limited.cluster, "other").connect()
    other.execute("SELECT lockstep.projection_create('p')")
    push(other)
    push(limited.connect())
    holders = [limited.connect() for _ in range(LIMIT)]
    assert [hold(holder, f"p{n}") for n, holder in enumerate(holders)] == ["claimed"] * LIMIT
    assert hold(other, "p") == "claimed"


def test_only_a_superuser_changes_the_limit_be_it_before_or_after_the_library_is_loaded(limited):
    limited.connect().execute(
        """
        CREATE ROLE unprivileged LOGIN;
        GRANT USAGE ON SCHEMA lockstep TO unprivileged;
        GRANT EXECUTE ON FUNCTION lockstep.horizon TO unprivileged;
        """
    )
    session = limited.connect(user="unprivileged")
    session.execute("SET lockstep.max_parallel_claims = 0")  # a name that the server does not know yet
    call(session, "horizon")
    assert session.execute("SHOW lockstep.max_parallel_claims").fetchone() == (str(LIMIT),)
    with raises("42501"):
        session.execute("SET lockstep.max_parallel_claims = 0")
