"""The vector index: candidates from reduced rows, exact scores from the log, against scans of the log."""

import sys

import numpy as np
import pytest
import torch

import loghook
from loghook.errors import ConfigError, CorruptLogError, MismatchError, StateError
from loghook.influence.index import leading_directions
from loghook.log import maintain
from tests.harness import log_and_ask, squares
from tests.test_influence import METHODS, make_log


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("log") / "run", n=90, shard_bytes=3000)[:2]


@pytest.mark.parametrize("dimensions", [1, 5, 12, 50])
def test_directions_are_the_singular_vectors(dimensions):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((20, 12)) @ np.diag(1.5 ** -np.arange(12)) @ rng.standard_normal((12, 200))
    basis = leading_directions(torch.from_numpy(rows).float(), dimensions).double().numpy()
    expected = np.linalg.svd(rows)[2][: min(dimensions, 12)]  # no more than the rank of the rows
    assert basis.shape == expected.shape
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=0.02)
    strong = min(len(basis), 8)
    np.testing.assert_allclose(basis[-strong:].T @ basis[-strong:], expected[:strong].T @ expected[:strong], atol=1e-3)


def test_rows_are_reduced(logged):
    log, _ = logged
    index = log.index(7, "Flat", sample=30)
    rows = log.gather(np.arange(90), slice(0, log.layout.gradient_width)).numpy()
    assert index.rows.shape == (90, 7) and index.basis.shape == (7, log.layout.gradient_width)
    np.testing.assert_allclose(index.rows, rows @ index.basis.double().numpy().T, rtol=1e-4, atol=1e-5)
    assert len(log.index(500, "Flat", sample=9).basis) == 9  # no more than the sample allows
    drawn = [log.index(4, "Flat", sample=20, seed=seed).basis for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_with_every_row_as_candidate_it_is_the_scan(tmp_path, logged):
    log, query = logged
    maintain.compress(log.path, tmp_path / "int8", "int8")
    for one in (log, loghook.load(tmp_path / "int8")):
        index = one.index(3, "Flat")
        for method in METHODS:
            for options in ({}, {"layers": log.layers[1:], "damping": 0.01}):
                found = index.search(query, 7, method, candidates=90, **options)
                true = one.influence(query, method, top=7, **options)
                np.testing.assert_allclose(found.values, true.values, rtol=1e-4)
                np.testing.assert_array_equal(found.places, true.places)
                assert found.values.dtype == np.float32 and found.damping == true.damping
                assert found.top(3)[0][0].data_id == true.top(3)[0][0].data_id
        assert index.recall(query, candidates=500) == index.recall(5, candidates=500) == 1


def test_candidates_are_the_best_of_the_reduced_rows(logged):
    log, query = logged
    index = log.index(2, "Flat")
    width = log.layout.gradient_width
    rows, asked = log.gather(np.arange(90), slice(0, width)).numpy(), query.matrix[:, :width].numpy()
    basis = index.basis.double().numpy()
    proposed = np.argsort(-(asked @ basis.T) @ (basis @ rows.T))[:, :6]
    exact = np.take_along_axis(asked @ rows.T, proposed, 1)
    places = np.take_along_axis(proposed, np.argsort(-exact)[:, :5], 1)
    found = index.search(query, 5, "dot", candidates=6)
    np.testing.assert_array_equal(found.places, places)
    np.testing.assert_allclose(found.values, -np.sort(-exact)[:, :5], rtol=1e-4)
    true = np.argsort(-(asked @ rows.T))[:, :5]
    share = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(places.tolist(), true.tolist(), strict=True)])
    assert index.recall(query, 5, "dot", candidates=6) == pytest.approx(share) and 0 < share < 1


def clustered(path, rows=400):
    """Rows around 40 centres, ten each."""
    torch.manual_seed(0)
    model, centres = torch.nn.Linear(12, 10, bias=False), torch.randn(40, 12)
    x = centres.repeat_interleave(rows // 40, 0) + 0.1 * torch.randn(rows, 12)
    return log_and_ask(path, model, squares, x, centres[:8], projection="none")


def test_a_graph_finds_clusters(tmp_path, capsys):
    log, query = clustered(tmp_path / "run")
    index = log.index(32)
    shown = capsys.readouterr().out
    assert "400 rows in 32 of 120 dimensions" in shown
    assert index.recall(query, candidates=40) > 0.9
    assert float(shown.split("finds ")[1].split("%")[0]) / 100 == pytest.approx(index.recall(16), abs=0.006)
    assert index.recall(16) > 0.9
    alone = index.search(query, 1, "dot", candidates=1)  # one candidate: a row of the question's own cluster
    assert (alone.places[:, 0] // 10 == np.arange(8)).mean() > 0.5


def test_saved_and_loaded(tmp_path, logged):
    log, query = logged
    index, file = log.index(6), tmp_path / "index.safetensors"
    index.save(file)
    again = loghook.load(log.path).load_index(file)
    one, two = (i.search(query, 5, candidates=6) for i in (index, again))
    np.testing.assert_array_equal(one.values, two.values)
    np.testing.assert_array_equal(one.places, two.places)
    maintain.compress(log.path, tmp_path / "other", "float32")
    maintain.delete(tmp_path / "other", [3])
    with pytest.raises(MismatchError, match="build it again"):
        loghook.load(tmp_path / "other").load_index(file)
    query.save(file)
    with pytest.raises(ConfigError, match="saved query: open it with"):
        log.load_index(file)
    file.write_bytes(b"nonsense")
    with pytest.raises(CorruptLogError, match="no index file"):
        log.load_index(file)
    maintain.reopen(tmp_path / "other")
    with pytest.raises(StateError, match="finalise"):
        loghook.load(tmp_path / "other").index(6).save(file)


def test_rows_as_questions_take_no_candidate_of_what_is_asked_for(logged):
    log, _ = logged
    assert 0 <= log.index(6).recall(5, 10, candidates=10) <= 1
    ten = np.int64(10)  # numbers of numpy's are numbers
    assert 0 <= log.index(np.int64(6), "Flat", sample=ten).recall(np.int64(5), ten, candidates=ten) <= 1


def test_refusals(monkeypatch, tmp_path, logged):
    log, query = logged
    index = log.index(6)
    with pytest.raises(ConfigError, match=r"cannot take method='cosine'.*Use log"):
        index.search(query, method="cosine")
    with pytest.raises(ConfigError, match=r"cannot take normalize: it serves.*damping.*Use log"):
        index.search(query, normalize="unit")
    for ask in (index.search, index.recall):
        with pytest.raises(ConfigError, match="candidates=4 must be a whole number of at least 5, as top=5"):
            ask(query, 5, candidates=4)
        with pytest.raises(ConfigError, match="top=None must be a whole number"):
            ask(query, top=None)
    assert log.index(6, "Flat").search(query, top=300).places.shape == (len(query), len(log))  # more than by default
    with pytest.raises(ConfigError, match="at least 1"):
        log.index(0)
    with pytest.raises(ConfigError, match="'nothing' is none that faiss knows"):
        log.index(6, "nothing")
    with pytest.raises(ConfigError, match="proposed fewer than top=11"):
        log.index(6, "IVF30,Flat")  # looks into one list of thirty
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'loghook\[faiss\]'"):
        log.index(6)
