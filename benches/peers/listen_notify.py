"""LISTEN/NOTIFY as the wake-up: each append notifies, and a client that listens runs the projection. It is what one has without workers in the server.
Run as a program (python -m peers.listen_notify), it is that client; it ends with its standard input.

Manual: https://www.postgresql.org/docs/18/sql-notify.html, https://www.psycopg.org/psycopg3/docs/advanced/async.html#asynchronous-notifications
"""

APPEND = "SELECT *, pg_notify('pushed', '') FROM lockstep.push_event('order', :aggregate, 'paid', :payload, :sequence - 1);\n"
RUN = "SELECT more OR processed > 0 FROM lockstep.projection_run('follow', barrier => false)"


def listen():
    import os
    import sys
    import threading

    import psycopg

    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    with psycopg.connect(autocommit=True) as connection:
        connection.execute("LISTEN pushed")
        print("listening", flush=True)
        while True:
            more = True
            while more:
                (more,) = connection.execute(RUN).fetchone()
            for _ in connection.notifies(timeout=1, stop_after=1):
                pass


if __name__ == "__main__":
    listen()
