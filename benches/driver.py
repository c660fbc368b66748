"""Loads a server through a peer's Python library, each client in a process of its own; prints what it did as JSON.

    driver.py PEER create                             its schema
    driver.py PEER append CLIENTS SECONDS BYTES HOT   one event a transaction; HOT 1: all to one aggregate, repeated until it is taken
    driver.py PEER batch CLIENTS SECONDS SIZE         so many events of a new aggregate a transaction
    driver.py PEER consume CONSUMERS POLL SIZE        consumers that poll (milliseconds) until they are killed
    driver.py PEER catchup CONSUMERS SIZE EVENTS      until each has been passed so many events
"""

import importlib
import json
import multiprocessing
import os
import sys
import time

from load import WARM_UP
from peers import payload


def client_of(peer):
    return importlib.import_module(f"peers.{peer}").Client()


def work(peer, number, gate, results, do):
    client = client_of(peer)
    gate.wait()
    results.put(do(client, number))


def together(peer, clients, do):
    """Runs do(client, number) in so many processes; returns what each did."""
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(clients), context.Queue()
    processes = [context.Process(target=work, args=(peer, number, gate, results, do)) for number in range(clients)]
    for process in processes:
        process.start()
    done = []
    while len(done) < clients:
        try:
            done.append(results.get(timeout=1))
        except Exception:
            if any(process.exitcode for process in processes):
                sys.exit("a client has failed")
    for process in processes:
        process.join()
    return done


def timed(seconds, step):
    """Repeats step(n), which tells how many attempts failed; counts those whose end is in the window apart."""
    begun = time.monotonic()
    opened, closed = begun + WARM_UP, begun + WARM_UP + seconds
    n = counted = failed = 0
    while time.monotonic() < closed:
        failed += step(n) or 0
        n += 1
        if opened <= time.monotonic() < closed:
            counted += 1
    return counted, n, failed


def show(done, seconds):
    counted, count, failed = (sum(part) for part in zip(*done, strict=True))
    print(json.dumps({"rate": counted / seconds, "count": count, "failed": failed, "seconds": seconds}))


def create(peer):
    client_of(peer).create()
    show([(0, 0, 0)], 1)


def append(peer, clients, seconds, size, hot):
    text, run = payload(int(size)), os.getpid()

    def do(client, number):
        if int(hot):
            return timed(float(seconds), lambda n: client.append_hot(text))
        return timed(float(seconds), lambda n: client.append(f"{run}-{number}-{n // 10}", n % 10 + 1, text))

    show(together(peer, int(clients), do), float(seconds))


def batch(peer, clients, seconds, size):
    text, run = payload(150), os.getpid()

    def do(client, number):
        return timed(float(seconds), lambda n: client.append_batch(int(size), f"{run}-{number}", n, text))

    show(together(peer, int(clients), do), float(seconds))


def consume(peer, consumers, poll, size):
    def do(client, number):
        while True:
            if client.turn(number + 1, int(size)) < int(size):
                time.sleep(int(poll) / 1000)

    together(peer, int(consumers), do)


def catchup(peer, consumers, size, events):
    def do(client, number):
        begun, passed = time.monotonic(), 0
        while passed < int(events):
            got = client.turn(number + 1, int(size))
            if got == 0:
                sys.exit(f"only {passed} events")
            passed += got
        return time.monotonic() - begun, passed

    done = together(peer, int(consumers), do)
    seconds, count = max(took for took, _ in done), sum(passed for _, passed in done)
    print(json.dumps({"rate": count / seconds, "count": count, "seconds": seconds}))


if __name__ == "__main__":
    verbs = {"create": create, "append": append, "batch": batch, "consume": consume, "catchup": catchup}
    verbs[sys.argv[2]](sys.argv[1], *sys.argv[3:])
