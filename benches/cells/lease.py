"""Leases: acquired, renewed, guarded."""

from functools import cache, partial

from load import Pgbench
from measure import Goal, Measurement
from peers import lease_by_hand
from peers.lease_by_hand import LEASES
from schedule import Cell, Subject
from servers import server

DATABASE = "bench_lease"
# A lease of its own for every turn of a client, or one for all.
NAMES = {
    "spread": f"\\set n random(1, {LEASES} / :clients) + :client_id * ({LEASES} / :clients)\n",
    "hot": "\\set n 1\n",
}
RENEW = {"lockstep": "SELECT status FROM lockstep.lease_renew('lease-' || :n, :n);\n", "hand": lease_by_hand.RENEW}
HOLD = {
    "lockstep": """SELECT COALESCE(token, 0) AS token FROM lockstep.lease_acquire('free-' || :n, :client_id::text) \\gset
SELECT lockstep.lease_release('free-' || :n, :token);
""",
    "hand": lease_by_hand.HOLD,
}
WORK = "\\set row random(1, 100) + :client_id * 100\nBEGIN;\n{guard}UPDATE bench.data SET value = value + 1 WHERE id = :row;\nCOMMIT;\n"
LOCKSTEP_GUARD = "SELECT lockstep.lease_guard('lease-' || :n, :n);\n"
GUARD = {"lockstep": LOCKSTEP_GUARD, "hand": lease_by_hand.RENEW}
GUARDED = {"lockstep": WORK.format(guard=LOCKSTEP_GUARD), "hand": WORK.format(guard=lease_by_hand.GUARD)}
UNGUARDED = {"lockstep": GUARDED["lockstep"], "hand": WORK.format(guard="")}

# What a run must have left: every lease with the holder and the token that it had, every free one free with tokens that are not twice there,
# and of guarded work each transaction's row.
ORACLE = """SELECT count(*) FILTER (WHERE name LIKE 'lease-%' AND (holder IS DISTINCT FROM 'holder' OR 'lease-' || token <> name)
        OR name LIKE 'free-%' AND holder IS NOT NULL),
    count(*) FILTER (WHERE name LIKE 'free-%' AND transitions > 0) - count(DISTINCT token) FILTER (WHERE name LIKE 'free-%' AND transitions > 0)
FROM {schema}.leases"""


@cache
def place():
    server("plain").create_database(DATABASE)
    server("plain").execute(DATABASE, lease_by_hand.SCHEMA)
    return server("plain")


def measure(bench, scripts, which, names, clients, options=""):
    place().execute(DATABASE, *lease_by_hand.RESET)
    place().settle(DATABASE)
    loaded = Pgbench(place(), DATABASE, NAMES[names] + scripts[which], clients, bench.window, variables={"clients": clients}, options=options).finish()
    wrong, twice = place().execute(DATABASE, ORACLE.format(schema="lockstep" if which == "lockstep" else "bench"))[0]
    if scripts in (GUARDED, UNGUARDED):
        wrong += abs(loaded.count - place().value(DATABASE, "SELECT sum(value)::bigint FROM bench.data"))
    return Measurement(loaded.rate, wrong, twice)


def cells(bench):
    cases = [
        ("lease_renew", RENEW, "UPDATE … RETURNING", "renewals/s", 0.9),
        ("lease_acquire and lease_release", HOLD, "two UPDATE … RETURNING", "pairs/s", 0.9),
        ("lease_guard", GUARD, "UPDATE … RETURNING", "guards/s", 0.9),
        ("lease_guard in a transaction of one UPDATE", GUARDED, "a guard by hand, FOR KEY SHARE", "transactions/s", 0.9),
        ("lease_guard before one UPDATE", UNGUARDED, "the UPDATE without a guard", "transactions/s", None),
    ]
    for words, scripts, control, unit, bound in cases:
        for names in NAMES:
            for clients in 1, 8, 32:
                if names == "hot" and clients == 1:
                    continue
                yield Cell(
                    "leases", f"{words}, {clients} clients, {'one lease' if names == 'hot' else 'a lease each'}", unit, control,
                    partial(measure, bench, scripts, "hand", names, clients),
                    [Subject("lockstep", partial(measure, bench, scripts, "lockstep", names, clients))], Goal(bound) if bound else None,
                )  # fmt: skip
    yield Cell(
        "leases", "lease_renew, 8 clients, a lease each, synchronous_commit off", "renewals/s", "UPDATE … RETURNING",
        partial(measure, bench, RENEW, "hand", "spread", 8, "-c synchronous_commit=off"),
        [Subject("lockstep", partial(measure, bench, RENEW, "lockstep", "spread", 8, "-c synchronous_commit=off"))], Goal(0.9),
    )  # fmt: skip
