"""All cells, in the order of docs/benchmarks.md, where each topic has its heading."""

from dataclasses import dataclass


@dataclass
class Bench:
    """What the cells are told; the window may be set after they have been made."""

    window: float = 4
    large: int = 10_000_000  # events in the large log
    catch_up: int = 50_000  # events that are read in a catch-up
    hold: float = 300  # seconds that a transaction stays open in the cells of decay


def all_cells(bench):
    from . import append, catch_up, decay, generation, growth, hot_aggregate, job, latency, lease, loss, stall, worker

    topics = (append, hot_aggregate, loss, stall, catch_up, latency, worker, decay, growth, lease, generation, job)
    return [cell for topic in topics for cell in topic.cells(bench)]
