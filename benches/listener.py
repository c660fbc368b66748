"""What one would have in place of the workers: a client that listens and runs the projection. Ends with its standard input."""

import sys
import threading
import os

import psycopg

threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
with psycopg.connect(autocommit=True) as connection:
    connection.execute("LISTEN pushed")
    print("listening", flush=True)
    while True:
        more = True
        while more:
            run = "SELECT more OR processed > 0 FROM lockstep.projection_run('follow', barrier => false)"
            (more,) = connection.execute(run).fetchone()
        for _ in connection.notifies(timeout=1, stop_after=1):
            pass
