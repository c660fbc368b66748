"""A client that keeps a read model over the claim, a statement for each event.
    client.py BATCH [savepoints]    a transaction for each BATCH events; and a savepoint for each event"""

import sys
import time
from contextlib import nullcontext

import psycopg

ADD = """INSERT INTO bench.balances AS b (customer, balance) VALUES (%s, %s)
         ON CONFLICT (customer) DO UPDATE SET balance = b.balance + EXCLUDED.balance"""

batch, savepoints = int(sys.argv[1]), "savepoints" in sys.argv
more = True
with psycopg.connect(autocommit=True) as connection:
    begun = time.monotonic()
    while more:
        with connection.transaction():
            events = connection.execute(
                "SELECT payload FROM lockstep.projection_claim('add', max_events => %s, tenant => 'log')", [batch]
            ).fetchall()
            (more,) = connection.execute("SELECT more FROM lockstep.projection_claim_state('add', 'log')").fetchone()
            for (payload,) in events:
                with connection.transaction() if savepoints else nullcontext():
                    connection.execute(ADD, [payload["customer"], payload["amount"]])
            connection.execute("SELECT lockstep.projection_advance('add', tenant => 'log')")
    print(f"Time: {(time.monotonic() - begun) * 1000:.3f} ms")
