"""All cells, in the order of docs/benchmarks.md, where each topic has its heading."""

import re
from dataclasses import dataclass

# The cells that a run without the time for all of them makes: of each topic, and for each goal, at least one.
CORE = """
append: (8|32) clients, 150 B, synchronous_commit on
append: 8 clients, 2048 B, synchronous_commit on
append: 8 clients, 150 B, (synchronous_commit off|Node|Python|PostgreSQL 15)
append in batches: 100 events of (1|100) aggregates, 8 clients
append in batches: 100 events, 1 client, Python
hot aggregate: 32 clients, (SQL|Node)
loss: 8 writers, (SQL|Node)
stall: p99 of pushes, 8 projections, a transaction open 1 s in (the same tenant|another tenant|another database)
stall: p99 of pushes, 64 projections, .*
age: oldest unapplied event, a transaction open 1 s in another tenant
catch-up: (1|16) projections, a handler of (sets|one event), SQL
catch-up: 1 projections?, (a handler of sets, PostgreSQL 15|a client that applies each event, Node)
latency: .*
workers: pushes, 8 clients, beside workers (that apply all|with nothing to apply)
decay: a consumer.s turn, .*
growth: (push|claim), .*(events|writers in flight)
growth: claim, .*(tenants|projections)
leases: (lease_renew|lease_acquire and lease_release|lease_guard|lease_guard in a transaction of one UPDATE|lease_guard before one UPDATE), 8 clients, a lease each
leases: lease_renew, 32 clients, one lease
generations: (generation_set|replica_sync_begin and replica_sync_finish), 8 clients
generations: replica_sync_claim of 10 of 100 due, 1,000,000 resources
jobs: job_enqueue, 8 clients
jobs: enqueue, (claim and complete|complete and claim in one transaction), 8 workers, (1,000|1,000,000) ready
jobs: enqueue, claim and complete, 1,000,000 ready
jobs in Node: (enqueue|work), 8 at once
"""


@dataclass
class Bench:
    """What the cells are told; the window may be set after they have been made."""

    window: float = 4
    large: int = 10_000_000  # events in the large log
    catch_up: int = 100_000  # events that are read, one by one, in a catch-up
    hold: float = 300  # seconds that a transaction stays open in the cells of decay

    @property
    def tail(self):
        """Seconds of a window of which a 99th percentile is the figure."""
        return max(self.window, 5)


def all_cells(bench):
    from . import append, catch_up, decay, generation, growth, hot_aggregate, job, latency, lease, loss, stall, worker

    topics = (append, hot_aggregate, loss, stall, catch_up, latency, worker, decay, growth, lease, generation, job)
    return [cell for topic in topics for cell in topic.cells(bench)]


def is_core(cell):
    return any(re.fullmatch(pattern, cell.name) for pattern in CORE.strip().splitlines())
