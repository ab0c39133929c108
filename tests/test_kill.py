"""Promise 3: killed at any instant and started again, the finished log equals one that was never interrupted."""

import datetime
import signal
from pathlib import Path

import numpy as np
import pytest

import loghook
from tests.killing import OPTIONS, SAMPLES, Killer, Plan, assert_same, log_everything

PAGE = """# The kill test's last result

{date}, seed {seed}: {one} kills of a run of one process, {two} kills of ranks of a run of two.

Every run was resumed until done and then equalled one that was never interrupted: each id once and none missing, rows
bit by bit, where they come from, statistics to 1e-12, every checksum. About half of the kills came from outside at a
random moment, the others at a random call that changes the disk, writes being half done.
`make test-long ARGS="-k two_hundred_kills"` writes this page; `tests/killing.py` says how.
"""
RECORD = Path(__file__).parents[1] / "docs" / "kill-test.md"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for repeats in (False, True):
        log_everything(Plan(str(folder / f"one-{repeats}"), OPTIONS[0], repeats=repeats))
    Killer(0).ranks_until_done(0, folder, path=str(folder / "two"), options=OPTIONS[0])
    return folder


def kill_one_process(killer, tmp_path, whole, kills):
    start = killer.kills
    for number in range(1000):
        if killer.kills - start >= kills:
            break
        repeats = bool(number % 2)
        path = str(tmp_path / f"run-{number}")
        options = OPTIONS[number % len(OPTIONS)]
        killer.until_done(5, path=path, options=options, repeats=repeats, skip=number % 3 == 2)
        assert_same(path, whole / f"one-{repeats}")
        if number % 3 != 2:
            assert loghook.load(path).repeats == loghook.load(whole / f"one-{repeats}").repeats
    return killer.kills - start


def kill_two_ranks(killer, tmp_path, whole, kills):
    start = killer.kills
    for number in range(1000):
        if killer.kills - start >= kills:
            break
        folder = tmp_path / f"two-{number}"
        folder.mkdir()
        killer.ranks_until_done(3, folder, path=str(folder / "run"), options=OPTIONS[number % len(OPTIONS)])
        assert_same(folder / "run", whole / "two")
    return killer.kills - start


def test_a_run_killed_at_random_instants_ends_as_if_it_never_was(tmp_path, whole):
    assert kill_one_process(Killer(1), tmp_path, whole, 20) >= 20


def test_two_ranks_killed_at_random_instants_end_as_if_they_never_were(tmp_path, whole):
    assert kill_two_ranks(Killer(2), tmp_path, whole, 5) >= 5


@pytest.mark.long
def test_two_hundred_kills(tmp_path, whole):
    killer = Killer(int(datetime.datetime.now().timestamp()))
    one, two = kill_one_process(killer, tmp_path, whole, 160), kill_two_ranks(killer, tmp_path, whole, 40)
    RECORD.write_text(PAGE.format(date=datetime.date.today(), seed=killer.seed, one=one, two=two))


def test_a_run_killed_after_its_end_is_started_again_in_vain(tmp_path, whole):
    for _ in range(2):
        log_everything(Plan(str(tmp_path / "run"), OPTIONS[0]))
    assert_same(tmp_path / "run", whole / "one-False")


def test_one_process_finishes_what_two_ranks_began(tmp_path, whole):
    killer, path = Killer(3), tmp_path / "run"
    plans = [
        Plan(str(path), OPTIONS[0], rank=rank, world=2, die_at=die, store=str(tmp_path / "store"))
        for rank, die in ((0, 40), (1, 28))
    ]
    started, pipes = zip(*map(killer.start, plans), strict=True)
    for process in started:
        process.join(60)
    assert any(process.exitcode == -signal.SIGKILL for process in started) and all(pipes)
    with open(path / "commits-00001.jsonl", "ab") as file:
        file.write(b"000000ff torn")
    log_everything(Plan(str(path), OPTIONS[0]))
    log, one = loghook.load(path), loghook.load(whole / "one-False")
    assert sorted(log.data_ids) == list(range(SAMPLES)) and not log.verify() and log.repeats == 0
    np.testing.assert_allclose(log.moments(), one.moments(), rtol=1e-12)
    for name in one.layers:
        np.testing.assert_allclose(log.rows(name)[np.argsort(log.data_ids)], one.rows(name)[:], rtol=1e-12, atol=1e-14)
