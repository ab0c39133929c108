"""Self-influence kept beside a finished log: taken only where it is that of these rows, and never needed."""

import random
import shutil

import numpy as np
import pytest
import safetensors

import loghook
from loghook.influence import engine
from loghook.log import files, maintain
from loghook.log.files import KEPT, MOST, load_kept
from tests.forked import two_processes
from tests.test_influence import make_log


@pytest.fixture
def path(tmp_path):
    return make_log(tmp_path / "run")[0].path


@pytest.fixture
def scans(monkeypatch):
    """How often rows were scanned for their self-influence."""
    counted, real = [], engine._add_quadratics
    monkeypatch.setattr(engine, "_add_quadratics", lambda *a: (counted.append(1), real(*a))[1])
    return counted


def test_computed_once(path, scans):
    first = loghook.load(path).self_influence("ekfac")
    assert len(scans) == 1 and (path / KEPT).exists()
    np.testing.assert_array_equal(loghook.load(path).self_influence("ekfac"), first)
    assert len(scans) == 1
    for method, options in (
        ("ekfac", {"damping": 0.2}), ("ekfac", {"damping_abs": 0.1}), ("kfac", {}), ("dot", {}),
        ("ekfac", {"layers": ["0"]}),
    ):  # fmt: skip
        before = len(scans)
        fresh = loghook.load(path).self_influence(method, **options)
        assert len(scans) == before + 1 and not np.array_equal(fresh, first)
        np.testing.assert_array_equal(loghook.load(path).self_influence(method, **options), fresh)
        assert len(scans) == before + 1
    assert loghook.load(path).verify() == []
    with safetensors.safe_open(path / KEPT, "np") as file:
        assert "loghook_kept" in file.metadata() and len(file.keys()) == 6


def test_scores_at_unit_norm_are_the_same(tmp_path, scans):
    log, query, _ = make_log(tmp_path / "run")
    for method, normalize in (("cosine", None), ("ekfac", "unit"), ("fisher", "relatif")):
        first = log.influence(query, method, normalize=normalize).values
        before = len(scans)
        np.testing.assert_array_equal(
            loghook.load(log.path).influence(query, method, normalize=normalize).values, first
        )
        assert len(scans) == before


def test_other_rows_are_never_taken_for_these(path, scans):
    first = loghook.load(path).self_influence("dot")
    maintain.reopen(path)
    loghook.load(path).self_influence("dot")
    loghook.load(path).self_influence("dot")
    assert len(scans) == 3  # an open run keeps nothing
    run = loghook.init(path, rank=4, dtype="float64", resume=True)
    run.finalize()
    run.close()
    np.testing.assert_array_equal(loghook.load(path).self_influence("dot"), first)
    assert len(scans) == 4
    old = (path / KEPT).read_bytes()
    maintain.delete(path, [3])
    assert not (path / KEPT).exists()
    (path / KEPT).write_bytes(old)  # as a kill would leave it
    np.testing.assert_array_equal(loghook.load(path).self_influence("dot"), np.delete(first, 3))
    assert len(scans) == 5


def test_damage_is_not_believed(path):
    expected = loghook.load(path).self_influence("dot")
    good = (path / KEPT).read_bytes()
    draw = random.Random(0)
    for turn in range(300):
        data = bytearray(good)
        if turn % 3:
            data[draw.randrange(len(data))] ^= draw.randint(1, 255)
        else:
            data = data[: draw.randrange(len(data))] if turn % 2 else data + draw.randbytes(9)
        (path / KEPT).write_bytes(data)
        log = loghook.load(path)
        np.testing.assert_array_equal(log.self_influence("dot"), expected)


def test_a_folder_that_cannot_be_written(path, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(files, "write_atomically", refuse)
    assert loghook.load(path).self_influence("dot").shape == (40,) and not (path / KEPT).exists()


def test_the_oldest_goes(path):
    for place in range(MOST + 2):
        loghook.load(path).self_influence("kfac", damping=0.1 + place)
    log = loghook.load(path)
    names = list(load_kept(path, log.seal))
    assert len(names) == MOST and '"damping":2.1,' in names[0] and '"damping":9.1,' in names[-1]
    assert load_kept(path, "another") == {}


def test_overwriting_a_run_takes_it_along(path):
    loghook.load(path).self_influence("dot")
    loghook.init(path, overwrite=True).close()
    assert not (path / KEPT).exists()


SCRIPT = """
import sys, torch, loghook
torch.distributed.init_process_group("gloo")
for _ in range(2):
    found = loghook.load(sys.argv[1]).self_influence("ekfac")
    assert abs(found - loghook.load(sys.argv[2]).self_influence("ekfac")).max() < 1e-5 * found.max()
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_it(tmp_path):
    path = make_log(tmp_path / "run", shard_bytes=1)[0].path
    shutil.copytree(path, tmp_path / "copy")
    loghook.load(tmp_path / "copy").self_influence("ekfac")
    two_processes(SCRIPT, path, tmp_path / "copy")
    seal = loghook.load(path).seal
    assert len(load_kept(path, seal)) == 1
