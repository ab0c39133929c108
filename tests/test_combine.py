"""Scores of several logs added up: matched by ids, weighted, refused where pairs do not match."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from loghook.errors import ConfigError, MismatchError
from loghook.evaluate.lds import lds
from loghook.influence.scores import Scores
from tests.harness import log_and_ask
from tests.test_influence import data, loss_fn, make_log, make_model


def made(values, queries=("a", "b"), rows=(1, 2, 3), **changed):
    values = np.asarray(values, dtype=np.float32)
    about = {"query_ids": list(queries), "data_ids": list(rows), "places": None, "by_layer": None, "layers": ("0",)}
    about |= {"method": "dot", "normalize": None, "damping": None, "damping_abs": None, "fingerprint": "f", "log": "l"}
    return Scores(values=values, **(about | changed))


def test_pairs_are_matched_by_their_ids_and_weighted():
    one, other = made([[1, 2, 3], [4, 5, 6]]), made([[60, 40, 50], [30, 10, 20]], ("b", "a"), (3, 1, 2), log="m")
    both = Scores.combine([one, other], [1.0, 0.1])
    np.testing.assert_allclose(both.values, [[2, 4, 6], [8, 10, 12]])
    assert (both.query_ids, both.data_ids) == (["a", "b"], [1, 2, 3])
    assert (both.method, both.weights, both.log) == ("ensemble of 2: dot", (1.0, 0.1), "l, m")
    np.testing.assert_allclose(Scores.combine([one, other]).values, [[5.5, 11, 16.5], [22, 27.5, 33]])


def test_candidates_are_one_list_for_each_question_all_equally_long():
    scores = made([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(scores.among([[1, 3], [3, 2]]).values, [[3, 1], [6, 5]])
    for wrong in ([[1, 2]], [[1, 2], [3]]):
        with pytest.raises(ConfigError, match="pass one for each, all equally long"):
            scores.among(wrong)
    epochs = made([[1, 2, 3], [4, 5, 6]], rows=(1, 2, 1))
    np.testing.assert_array_equal(epochs.among([[2], [2]]).values, [[2], [5]])
    with pytest.raises(ConfigError, match="1 names several rows"):
        epochs.among([[1], [2]])


def test_sums_beyond_float32_are_refused():
    scores = made([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ConfigError, match="does not fit in float32"):
        Scores.combine([scores, scores], [1e38, 1e38])


def test_standardized_scores_speak_equally_loud_for_each_question():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 3)), rng.normal(size=(2, 3)) * [[1e4], [1e-4]]
    both = Scores.combine([made(one), made(other)], [1, 1], standardize=True)
    expected = [a / np.std(a) + b / np.std(b) for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(both.values, expected, rtol=1e-5)
    flat = Scores.combine([made(np.zeros((2, 3))), made(one)], standardize=True)
    assert np.isfinite(flat.values).all() and "standardized" in flat.method


def test_ids_in_the_same_order_are_not_looked_up():
    """Which takes far less memory than dictionaries of all ids."""
    n = 50_000
    one, other, turned = (made(np.ones((1, n)), ("a",), ids) for ids in (range(n), range(n), range(n)[::-1]))
    peaks, values = [], []
    for second in (other, turned):
        tracemalloc.start()
        try:
            values.append(Scores.combine([one, second]).values)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert np.array_equal(*values) and peaks[0] < peaks[1] / 2, peaks


def test_tracin_over_checkpoints(tmp_path):
    """Learning rate times gradient products, summed over checkpoints, against gradients taken one by one."""
    import torch

    rates, parts, expected = (0.1, 0.03), [], np.zeros((3, 6))
    for step, rate in enumerate(rates):
        model = make_model(seed=step)
        order = list(range(6)) if step == 0 else list(range(5, -1, -1))
        options = {"ids": order, "projection": "none", "dtype": "float64"}
        log, query = log_and_ask(tmp_path / str(step), model, loss_fn, data(6)[order], data(3, seed=2), **options)
        parts.append(log.influence(query, "dot", per_layer=True))
        one = lambda x, model=model: torch.cat(  # noqa: E731
            [g.flatten() for g in torch.autograd.grad(loss_fn(model, x[None]), list(model.parameters()))]
        )
        questions, rows = torch.stack([one(x) for x in data(3, seed=2)]), torch.stack([one(x) for x in data(6)])
        expected += rate * (questions @ rows.T).numpy()
    tracin = Scores.combine(parts, rates)
    np.testing.assert_allclose(tracin.values, expected, rtol=1e-5)
    np.testing.assert_allclose(tracin.by_layer.sum(0), tracin.values, rtol=1e-4, atol=1e-5)
    tracin.save(tmp_path / "s")
    assert Scores.load(tmp_path / "s").weights == rates
    assert tracin.top(1)[0][0].data_id == int(expected[0].argmax())
    backwards = tracin.values[:, ::-1]
    replace(tracin, values=backwards).save(tmp_path / "s")
    assert np.array_equal(Scores.load(tmp_path / "s").values, backwards)


def test_what_cannot_be_matched_is_refused(tmp_path):
    one = made(np.zeros((2, 3)))
    for other, says in (
        (made(np.zeros((2, 3)), rows=(1, 2, 4)), "data_id 3"),
        (made(np.zeros((2, 4)), rows=(1, 2, 3, 9)), "data_id 9"),
        (made(np.zeros((2, 4)), rows=(1, 2, 3, 3)), r"data_id 3 is there more than once.*log each"),
        (made(np.zeros((2, 3)), queries=("a", "c")), "query_id 'b'"),
        (made(np.zeros((2, 3)), queries=("a", "a")), r"query_id 'a' is there more than once.*ask each"),
    ):
        with pytest.raises(MismatchError, match=says):
            Scores.combine([one, other])
    twice = made(np.zeros((2, 3)), rows=(7, 7, 8))
    with pytest.raises(MismatchError, match="data_id 7"):
        Scores.combine([twice, twice])
    log, query, _ = make_log(tmp_path)
    with pytest.raises(ConfigError, match="without top"):
        Scores.combine([log.influence(query, "dot", top=3)])
    for weights in ([1.0], [1.0, float("nan")]):
        with pytest.raises(ConfigError, match="2 finite numbers"):
            Scores.combine([one, one], weights)
    for none in ([], one):
        with pytest.raises(ConfigError, match="no list of scores"):
            Scores.combine(none)
    assert np.array_equal(Scores.combine(iter([one, one])).values, one.values)
    with pytest.raises(ConfigError, match=r"k=2\.5 must be a whole number"):
        one.top(2.5)
    assert one.top(np.int64(2)) == one.top(2)
    with pytest.raises(ConfigError, match="is a folder"):
        one.save(tmp_path)


def test_scores_of_all_rows_are_arrays_for_the_judges(tmp_path):
    log, query, _ = make_log(tmp_path)
    scores = log.influence(query, "dot")
    assert np.array_equal(np.asarray(scores), scores.values)
    assert np.asarray(scores, dtype=np.float64).dtype == np.float64
    members = np.random.default_rng(0).random((12, len(log))) < 0.5
    losses = np.random.default_rng(1).random((12, len(query)))
    of = [lds(one, members, losses).mean for one in (scores, scores.values)]
    assert of[0] == of[1]
    with pytest.raises(ConfigError, match="without top"):
        np.asarray(log.influence(query, "dot", top=2))


def test_an_id_with_several_rows_is_one_candidate():
    scores = made(np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]]), rows=(7, 7, 8, 9, 8))
    assert scores.distinct(2) == [[7, 8], [8, 9]]
    assert scores.distinct(9) == [[7, 8, 9], [8, 9, 7]]
