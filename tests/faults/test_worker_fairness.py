"""Whose turn it is: nobody's events wait for another tenant's backlog, failures or slow writer."""

import itertools
import time

import pytest
from server import wait_until
from sessions import call, push, start
from workers import NOTE, sleeps

PROJECTIONS = ("p1", "p2", "p3")
FAIL = "IF e.tenant = 'failing' THEN RAISE 'never'; END IF;"


def fill(app, tenant, count):
    """So many events without the cost of so many pushes: the log is written by its owner."""
    app.admin.execute("DROP INDEX lockstep.events_tenant_event_id_key")  # nothing here has an id
    app.admin.execute("SET synchronous_commit = off")
    app.admin.execute(
        """INSERT INTO lockstep.events (tenant, position, aggregate_type, aggregate_id, sequence, event_type, created_at)
           SELECT %s, n, 'order', 'one', n, 'added', clock_timestamp() FROM generate_series(1, %s) AS n""",
        (tenant, count),
    )
    app.admin.execute("SELECT lockstep.ticket_resync()")
    app.admin.execute("VACUUM ANALYZE lockstep.events")


def applied_in_order(app):
    """(projection, tenant) of what was applied in the tenants with one event."""
    return app.admin.execute("SELECT projection, tenant FROM public.applied WHERE tenant LIKE 't%' ORDER BY nth").fetchall()


def overtaken(expected, order):
    """The most pairs that had not had their turn when one that had waited less had had it."""
    place = {pair: n for n, pair in enumerate(expected)}
    waiting, most, reached = set(), 0, 0
    for pair in order:
        n = place[pair]
        waiting |= set(range(reached, n))
        reached = max(reached, n + 1)
        waiting.discard(n)
        most = max(most, len(waiting))
    return most


def test_overtaken_can_tell():
    assert overtaken("abcd", "abcd") == 0
    assert overtaken("abcd", "bacd") == 1
    assert overtaken("abcd", "bcda") == 1
    assert overtaken("abcd", "dcba") == 3


@pytest.mark.parametrize("workers, tenants, backlog", [(1, 1000, 1_000_000), (2, 300, 20_000)])
def test_a_thousand_tenants_get_their_turn_in_the_order_of_their_waiting(own_app, workers, tenants, backlog):
    """Beside one tenant far behind, one that fails for ever and one with an open writer."""
    app = own_app(max_wal_size="8GB", checkpoint_timeout="1h", autovacuum="off")
    for projection in PROJECTIONS:
        app.project(projection, body=FAIL + NOTE, max_failures=1000, retry_after="100 ms")
    fill(app, "huge", backlog)
    app.push("failing")
    slow = app.db.connect()
    slow.execute("BEGIN")
    behind_it = [push(slow, tenant="slow"), app.push("slow")]
    names = [f"t{n:04}" for n in range(tenants)]
    for name in names:
        app.push(name)
    app.turn_on(workers=workers)
    expected = list(itertools.product(names, PROJECTIONS))
    begun = time.monotonic()
    wait_until(lambda: len(applied_in_order(app)) == len(expected), timeout=100)
    print(f"{len(expected)} in {time.monotonic() - begun:.1f} s")

    order = [(tenant, projection) for projection, tenant in applied_in_order(app)]
    assert sorted(order) == sorted(expected), "each once"
    assert overtaken(expected, order) <= workers - 1
    # One batch of each projection came first: its events have waited longest. No second one came before all the others' first.
    rows = app.admin.execute(
        """SELECT projection, count(*) FROM public.applied
           WHERE tenant = 'huge' AND nth < (SELECT max(nth) FROM public.applied WHERE tenant LIKE 't%') GROUP BY 1"""
    ).fetchall()
    assert sorted(rows) == [(projection, 200) for projection in PROJECTIONS]

    assert app.applied(tenant="failing") == [] and app.applied("p1", "slow") == []
    failed = app.admin.execute("SELECT count(*), min(failures) FROM lockstep.failed_events WHERE tenant = 'failing'").fetchone()
    assert failed[0] == 3
    wait_until(lambda: len(app.applied("p1", "huge")) > 200)
    slow.execute("COMMIT")
    for projection in PROJECTIONS:
        wait_until(lambda projection=projection: app.applied(projection, "slow") == behind_it)


def test_a_single_event_does_not_wait_for_a_backlog(own_app):
    app = own_app(autovacuum="off")
    app.project(batch_size=1000)
    fill(app, "huge", 300_000)
    app.turn_on(workers=1)
    wait_until(lambda: len(app.applied(tenant="huge")) > 1000)
    waits = []
    for n in range(30):
        position, begun = app.push(f"t{n}"), time.monotonic()
        wait_until(lambda position=position, n=n: app.applied(tenant=f"t{n}") == [position])
        waits.append(time.monotonic() - begun)
    assert len(app.applied(tenant="huge")) < 300_000, "there was a backlog all the time"
    print(f"median {sorted(waits)[15]:.3f} s, most {max(waits):.3f} s")
    assert max(waits) < 2.5, "two batches and a little"


def test_a_long_batch_ends_after_a_second_when_it_is_anothers_turn(app):
    app.project(body="IF e.tenant = 'long' THEN PERFORM pg_sleep(0.05); END IF;" + NOTE, batch_size=1000)
    session = app.db.connect()
    with session.transaction():
        for _ in range(100):
            push(session, tenant="long")
    app.turn_on(workers=1)
    app.wait_for_handler("Timeout")
    begun = time.monotonic()
    position = app.push("short")
    wait_until(lambda: app.applied(tenant="short") == [position])
    assert time.monotonic() - begun < 2.5
    assert 0 < len(app.applied(tenant="long")) < 60
    app.wait_and_check()


def test_a_pair_is_run_by_one_worker_at_a_time_and_in_order(app):
    """With more workers than pairs and a handler slow enough for them to meet."""
    for projection in ("p", "q"):
        app.project(projection, body="PERFORM pg_sleep(0.001);" + NOTE, batch_size=3)
    app.turn_on(workers=6)

    def push_some(tenant):
        session = app.db.connect()
        for _ in range(60):
            push(session, tenant=tenant)

    pushing = [start(push_some, tenant) for tenant in "aabb"]
    for future in pushing:
        future.result(60)
    app.wait_and_check(("p", "q"))
    assert app.admin.execute("SELECT count(DISTINCT pid) FROM public.applied").fetchone()[0] > 1


def test_a_tenant_that_always_fails_is_retried_on_its_own_time_and_delays_nobody(app):
    app.project(body=FAIL + NOTE, max_failures=1000, retry_after="200 ms")
    app.turn_on(workers=1)
    app.push("failing")
    wait_until(app.failures)
    waits = []
    for n in range(30):
        position, begun = app.push("other"), time.monotonic()
        wait_until(lambda position=position: position in app.applied(tenant="other"))
        waits.append(time.monotonic() - begun)
    assert sorted(waits)[15] < 0.1
    app.push("failing")
    wait_until(lambda: app.failures("failures") == [(4,)])
    # 0.2, 0.4 and 0.8 s; not sooner, for all the wake-ups of the others.
    elapsed = app.failures("extract(epoch FROM last_failed_at - first_failed_at)::float8")[0][0]
    assert 1.4 <= elapsed < 3


def test_each_projection_backs_off_for_itself(app):
    app.project("bad", body="RAISE 'never';", retry_after="1 minute")
    app.project()
    app.turn_on(workers=1)
    positions = []
    for _ in range(10):
        positions.append(app.push())
        app.wait_for(positions)
    assert app.failures("projection, failures") == [("bad", 1)]
    assert app.state("bad") == "backoff"


def test_an_open_writer_delays_its_own_tenant_and_no_other_and_holds_no_worker(app):
    app.project()
    app.turn_on(workers=1)
    slow = app.db.connect()
    slow.execute("BEGIN")
    first = push(slow, tenant="slow")
    second = app.push("slow")
    for n in range(20):
        position = app.push("other")
        wait_until(lambda position=position: position in app.applied(tenant="other"), timeout=2)
    looks = sleeps(app.launcher())
    wait_until(lambda: sleeps(app.launcher()) >= looks + 2)
    assert app.applied(tenant="slow") == []
    assert app.status("state") == [("idle",)]
    slow.execute("COMMIT")
    app.wait_for([first, second], tenant="slow")


def test_a_pair_that_a_client_has_claimed_is_left_to_it_and_run_when_it_is_free(app):
    app.project()
    client = app.db.connect()
    client.execute("BEGIN")
    positions = [app.push("held"), app.push("held")]
    assert len(call(client, "projection_claim", name="p", tenant="held")) == 2
    app.turn_on(workers=1)
    app.wait_for(app.push("free"), tenant="free")
    assert app.applied(tenant="held") == []
    client.execute("ROLLBACK")
    app.wait_for(positions, tenant="held")
