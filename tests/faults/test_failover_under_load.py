"""A standby is promoted in the middle of everything, and a server is recovered to a point in time.

Under a synchronous standby nothing that was acknowledged is lost. Where commits are lost, after_data_loss() sees to it that no
number is given again and that no claim from before counts; without it both happen, as a test here shows.
"""

import pytest
from server import wait_until
from sessions import call, claim, claim_and_advance, drain, log, push, raises


def replicate_synchronously(primary, thrown_away):
    """A standby that each commit of the primary waits for."""
    standby = thrown_away(primary.standby(synchronous_standby_names=""))
    primary.conf(synchronous_standby_names="*")
    primary.restart()  # after a reload, commits begin to wait whenever the checkpointer has read the setting
    with primary.connect() as connection:
        state = "SELECT sync_state FROM pg_stat_replication"
        wait_until(lambda: connection.execute(state).fetchall() == [("sync",)], 120)
    return standby


def cut_off(standby):
    """What the primary commits from now on does not reach the standby."""
    with standby.connect() as connection:
        connection.execute("ALTER SYSTEM SET primary_conninfo = ''")  # where pg_basebackup put it
        connection.execute("SELECT pg_reload_conf()")
        wait_until(lambda: not connection.execute("SELECT FROM pg_stat_wal_receiver").fetchall(), 120)


@pytest.mark.parametrize("rounds", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_after_a_promotion_of_a_synchronous_standby_what_was_acknowledged_is_there_once(rounds, load, loaded, thrown_away):
    primary = loaded()
    running = load.Load(primary)
    running.set_up()
    standby = replicate_synchronously(primary, thrown_away)
    with running.started():
        for n in range(rounds):
            running.progress()
            primary.crash()
            standby.promote()
            running.move(standby)
            running.progress()
            if n + 1 < rounds:
                primary, standby = standby, replicate_synchronously(standby, thrown_away)
    assert not running.lossy
    running.check()


def lose(running, primary, standby):
    """The primary acknowledges what the standby never hears of, and is gone; the standby takes its place."""
    running.doubt()
    primary.wait_for_replay(standby, 120)
    cut_off(standby)
    running.progress(50)  # more than a sequence writes ahead to the WAL
    primary.crash()
    standby.promote()


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_after_a_promotion_that_lost_commits_no_number_is_given_twice(rounds, load, loaded, thrown_away):
    primary = loaded()
    with load.Load(primary) as running:
        for _ in range(rounds):
            standby = thrown_away(primary.standby())
            running.progress()
            lose(running, primary, standby)
            running.after_data_loss(standby)
            running.move(standby)
            running.progress()
            primary = standby
    running.check()


@pytest.mark.timeout(900)
def test_without_after_data_loss_numbers_are_given_twice_and_a_cursor_outside_passes_events(load, loaded, thrown_away):
    primary = loaded()
    with load.Load(primary) as running:
        standby = thrown_away(primary.standby())
        running.progress()
        lose(running, primary, standby)
        running.move(standby)
        running.progress()
    wrong = running.judge()
    for what in ("ticket", "token", "job id"):
        assert any(line.startswith(what) and "was given to" in line for line in wrong), wrong
    assert any("a cursor outside passed" in line for line in wrong), wrong


@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_after_a_recovery_to_a_point_in_time_no_number_is_given_twice(rounds, load, loaded, thrown_away):
    primary = loaded(start=False)
    primary.create()
    archived = primary.archive()
    primary.start()
    with load.Load(primary) as running:
        for n in range(rounds):
            copy = thrown_away(primary.backup(**archived))
            running.progress()
            running.doubt()
            with primary.connect() as connection:
                connection.execute("SELECT pg_create_restore_point('before')")
            running.progress(50)
            primary.wait_for_archive()
            primary.stop("immediate")
            copy.recover(recovery_target_name="before")
            running.after_data_loss(copy)
            running.move(copy)
            running.progress()
            if n + 1 < rounds:
                archived = copy.archive()
                copy.restart()
            primary = copy
    running.check()


def test_after_a_loss_no_claim_from_before_counts_and_all_can_be_claimed_anew(cluster, new_database, load, thrown_away):
    primary = cluster()
    session = new_database(primary, "claims").connect()
    session.execute("SELECT lockstep.projection_create('p')")
    kept = load.Claims(session, "kept")
    before = [push(session) for _ in range(3)]
    assert claim_and_advance(session, max_events=2) == before[:2]
    standby = thrown_away(primary.standby(wal_retrieve_retry_interval="100ms"))
    primary.wait_for_replay(standby, 120)
    cut_off(standby)
    lost = load.Claims(session, "kept", again=True)
    new = load.Claims(session, "new")
    passed = [push(session) for _ in range(40)]
    drain(session)
    primary.crash()
    standby.promote()

    session = standby.connect("claims")
    session.execute("SELECT lockstep.after_data_loss()")
    for claims in (kept, lost, new):
        claims.are_refused(session)
    with raises("LS002"):
        call(session, "projection_advance", name="p", up_to=passed[-1])
    after = [push(session) for _ in range(2)]
    with raises("22023"), session.transaction():
        claim(session)
        call(session, "projection_advance", name="p", up_to=passed[-1])
    assert min(after) > max(passed)
    assert [row[1] for row in call(session, "read_events", after=passed[-1])] == after, "a cursor kept elsewhere stays right"
    assert drain(session) == [before[2], *after]
    assert log(session) == before + after

    anew = [load.Claims(session, "kept", again=True), load.Claims(session, "new")]
    tokens = [token for claims in (kept, lost, new) for token in claims.tokens()]
    assert min(token for claims in anew for token in claims.tokens()) > max(tokens)
    for claims in anew:
        claims.are_held(session)
    for claims in (kept, lost, new):
        claims.are_refused(session)
