"""Reading ahead: one piece at most, in order, verified before it is seen, and no thread left behind."""

import os
import threading

import numpy as np
import pytest
import torch

import loghook
from loghook.errors import CorruptLogError
from loghook.log import maintain, shard
from loghook.log.reader import ahead
from tests.test_influence import make_log
from tests.test_maintain import flip, write


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loghook-ahead")]


def test_items_come_in_order_and_one_is_made_ahead():
    made, gate = [], threading.Semaphore(0)

    def source():
        for i in range(6):
            made.append(i)
            yield i
            gate.release()  # the next one is asked for

    for i, item in enumerate(ahead(source())):
        assert item == i
        gate.acquire()
        assert set(made) <= set(range(i + 2))
    assert made == list(range(6)) and not threads()


def test_what_is_raised_ahead_is_raised_in_its_turn():
    def source():
        yield 1
        raise ValueError("broken")

    items = ahead(source())
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)
    assert not threads() and list(ahead([])) == []


def test_a_consumer_that_stops_leaves_no_thread(tmp_path, monkeypatch):
    log, query, _ = make_log(tmp_path, shard_bytes=1)
    for _ in log.blocks():
        break
    assert not threads()

    def interrupted(block):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("loghook.influence.products._floats", lambda *_: interrupted)
        with pytest.raises(KeyboardInterrupt):
            log.influence(query, "dot")
    assert np.isfinite(log.influence(query, "dot").values).all() and not threads()  # the traceback held it, if anything


@pytest.fixture
def records(tmp_path):
    """A shard of five records of eight rows, each a piece of its own."""
    log, query, _ = make_log(tmp_path, commit_seconds=1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "BLOCK_BYTES", 1)
        yield log, query


def test_no_row_is_seen_before_its_checksum_is_verified(records, monkeypatch):
    log, _ = records
    (file,) = log.path.glob("rows-*")
    flip(file, shard.SHARD_HEADER + 27 * log.codec.row_bytes)  # in the fourth record
    seen = []
    with pytest.raises(CorruptLogError, match="rows 24 to 31 do not match their checksum"):
        for place, _ in log.blocks():
            seen += range(place.start, place.stop)
    assert seen == list(range(24))
    with pytest.raises(CorruptLogError, match="rows 24 to 31"):
        log.rows(log.layers[0])[0]  # whoever touches a shard verifies all of it
    assert "rows 24 to 31" in log.verify()[0]


def test_checksums_are_read_once_and_a_scan_that_stopped_is_no_scan(records, monkeypatch):
    log, query = records
    counted, real = [], shard.checksum_next
    monkeypatch.setattr(shard, "checksum_next", lambda *given: counted.append(1) or real(*given))
    expected = torch.cat([block for _, block in loghook.load(log.path).blocks()])
    assert len(counted) == 5
    for place, block in log.blocks():
        assert torch.equal(block, expected[place]) and len(counted) <= 5 + place.stop // 8 + 1
        if place.stop == 16:
            break
    assert torch.equal(torch.cat([block for _, block in log.blocks()]), expected)
    read = len(counted)
    log.influence(query, "ekfac", normalize="unit", top=3)
    assert len(counted) == read and log.rows(log.layers[0])[3:9].base is not None
    assert not log.verify() and len(counted) == read + 5


def test_a_scan_keeps_no_file_open(tmp_path):
    """There may be more shards than a process may open files."""
    log, query, _ = make_log(tmp_path, size=2, shard_bytes=1)
    count = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    log.influence(query, "ekfac", normalize="unit", top=3)
    before, most = count(), 0
    for _ in range(2):  # the second time nothing is verified
        for block in log.blocks():
            most = max(most, count())
            del block  # a view of the map
    log.influence(query, "ekfac", normalize="unit", top=3)
    assert len(log._shards) == 20 and most <= before + 4 and count() == before


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_shares_have_the_places_of_the_whole_also_around_repeats(tmp_path, parts):
    a, b = (write(tmp_path / name, list(ids), shard_bytes=1) for name, ids in (("a", range(22)), ("b", range(9, 40))))
    maintain.merge(tmp_path / "run", [a.path, b.path])
    log = loghook.load(tmp_path / "run")
    assert log.data_ids == list(range(40)) and log.repeats == 13
    rows, seen = log.gather(np.arange(40)), []
    for part in range(parts):
        mine = []
        for place, block in log.blocks(3, (part, parts)):
            assert torch.equal(block, rows[place])
            mine += range(place.start, place.stop)
        assert mine == sorted(mine)
        seen += mine
    assert sorted(seen) == list(range(40))


@pytest.mark.parametrize("top", [None, 3])
def test_scores_where_blocks_are_repeats_alone(tmp_path, top):
    a, b = (write(tmp_path / name, list(ids), shard_bytes=1) for name, ids in (("a", range(22)), ("b", range(9, 40))))
    maintain.merge(tmp_path / "run", [a.path, b.path])
    log = loghook.load(tmp_path / "run")
    assert 0 not in [len(block) for _, block in log.blocks()]
    questions = log.gather(np.arange(2))
    scores = log.influence(loghook.Query([0, 1], questions, log.made), "dot", top=top)
    expected = (questions @ log.gather(np.arange(40)).T).numpy()
    np.testing.assert_allclose(scores.values, expected if top is None else -np.sort(-expected)[:, :top], rtol=1e-5)
