"""What tests do with sessions: push, claim, run a call beside the test, expect an SQLSTATE."""

import contextlib
import itertools
import threading
from concurrent.futures import Future

import psycopg
import pytest
from psycopg.types.json import Jsonb

_numbers = itertools.count(1)


def start(function, *arguments, **options):
    """Runs the call in a thread; returns its Future."""
    future = Future()

    def run():
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def start_together(calls):
    """Starts the calls, one thread each, none before all threads are there; returns their Futures."""
    gate = threading.Barrier(len(calls))

    def run(call):
        gate.wait()
        return call()

    return [start(run, call) for call in calls]


@contextlib.contextmanager
def raises(sqlstate):
    """Expects an error of the server with this SQLSTATE. Its fields are in `.value.diag`."""
    with pytest.raises(psycopg.Error) as caught:
        yield caught
    diag = caught.value.diag
    assert diag.sqlstate == sqlstate, caught.value
    # PostgreSQL names the source file of its own errors, and not of the extension's.
    assert diag.source_file or (diag.message_detail and diag.message_hint), f"without DETAIL or HINT: {caught.value}"


def call(connection, function, **arguments):
    """Calls a function of the extension by named arguments; returns its rows."""
    named = ", ".join(f"{name} => %({name})s" for name in arguments)
    return connection.execute(f"SELECT * FROM lockstep.{function}({named})", arguments).fetchall()


def push(connection, aggregate_id=None, event_type="added", tenant="", **arguments):
    """Pushes one event, to an aggregate of its own unless one is named; returns its position."""
    aggregate_id = aggregate_id or f"aggregate-{next(_numbers)}"
    arguments |= {"aggregate_type": "order", "aggregate_id": aggregate_id, "event_type": event_type, "tenant": tenant}
    return call(connection, "push_event", **arguments)[0][0]


def push_many(connection, count, event_type="added", tenant=""):
    """Pushes `count` events to one new aggregate in one push; returns their positions."""
    aggregate_id = f"aggregate-{next(_numbers)}"
    event = {"aggregate_type": "order", "aggregate_id": aggregate_id, "event_type": event_type}
    return [row[0] for row in call(connection, "push_events", events=Jsonb([event] * count), tenant=tenant)]


def claim(connection, name="p", **arguments):
    """Claims; returns the positions of the batch. The connection must be in a transaction for the claim to live on."""
    return [row[1] for row in call(connection, "projection_claim", name=name, **arguments)]


def advance(connection, name="p", **arguments):
    return call(connection, "projection_advance", name=name, **arguments)[0][0]


def claim_and_advance(connection, name="p", tenant="", **arguments):
    """One round of a worker in a transaction of its own; returns the positions of the batch."""
    with connection.transaction():
        positions = claim(connection, name, tenant=tenant, **arguments)
        if positions:
            advance(connection, name, tenant=tenant)
    return positions


def drain(connection, name="p", tenant="", **arguments):
    """Claims until nothing is left; returns all positions in the order seen."""
    seen = []
    while True:
        with connection.transaction():
            positions = claim(connection, name, tenant=tenant, **arguments)
            if positions:
                advance(connection, name, tenant=tenant)
            status, more = call(connection, "projection_claim_state", name=name, tenant=tenant)[0]
        assert status != "busy"
        seen += positions
        if not positions and not more:
            return seen


def log(connection, tenant=""):
    """The positions in the log as a superuser sees them now."""
    rows = connection.execute("SELECT position FROM lockstep.events WHERE tenant = %s ORDER BY position", (tenant,))
    return [position for (position,) in rows]


def locks(observer, connection):
    """How many locks the session of `connection` holds or waits for."""
    pid = connection.info.backend_pid
    return observer.execute("SELECT count(*) FROM pg_locks WHERE pid = %s", (pid,)).fetchone()[0]
