"""Choosing a damping: against a truth made to favour one, and by held-out likelihood against a dense reference."""

import copy

import numpy as np
import pytest

from loghook.errors import ConfigError
from loghook.evaluate import sweep
from loghook.evaluate.judges import without_top
from loghook.evaluate.lds import lds, random_subsets
from loghook.evaluate.sweep import held_out_likelihood
from tests.test_influence import data, loss_fn, make_log


def twice(query):
    """The same questions again, under other names."""
    again = copy.copy(query)
    again.data_ids = [f"{name} again" for name in query.data_ids]
    return query + again


def test_the_setting_that_made_the_truth_wins(tmp_path):
    log, _, model = make_log(tmp_path)
    with log.attach(model).query(data_id=range(12)) as query:
        loss_fn(model, data(12, seed=3)).backward()
    members = random_subsets(40, 60)
    losses = -(members @ log.influence(query, "ekfac", damping=0.3).values.T)
    found = sweep(log, query, members=members, losses=losses, dampings=(0.01, 0.3, 3))
    assert (found.best.method, found.best.damping) == ("ekfac", 0.3) and len(found.settings) == 6
    assert found.best.criterion > 0.999 and found.best.held_out.mean > 0.999 and len(found.best.held_out.per_query) == 6
    assert "\nekfac    0.3      1.0000; on the other queries 1.0000 (1.0000 to 1.0000)  <- best" in str(found)


def test_the_choice_sees_half_of_the_queries_only(tmp_path):
    log, query, _ = make_log(tmp_path)
    query = twice(query)
    members, rng = random_subsets(40, 20), np.random.default_rng(0)
    losses = rng.normal(size=(20, 6))
    one = sweep(log, query, members=members, losses=losses, dampings=(0.1,), methods=("dot",))
    choose = np.random.default_rng(0).permutation(6)[:3]
    losses[:, np.setdiff1d(np.arange(6), choose)] *= -1
    other = sweep(log, query, members=members, losses=losses, dampings=(0.1,), methods=("dot",))
    assert one.best.criterion == other.best.criterion and one.best.held_out.mean == -other.best.held_out.mean


@pytest.mark.parametrize("rank", [2, 6])  # more and fewer rows than values in a layer
def test_held_out_likelihood_is_that_of_a_gaussian(tmp_path, rank):
    log, *_ = make_log(tmp_path, n=30, rank=rank)
    widths = [spec.width for spec in log.layout.layers]
    assert (max(widths) < 15) if rank == 2 else (max(widths) > 15)
    fit = np.zeros(30, dtype=bool)
    fit[np.random.default_rng(0).permutation(30)[:15]] = True
    for damping, value in held_out_likelihood(log, (0.01, 1.0)):
        total = 0.0
        for name in log.layers:
            rows = log.rows(name)[:].reshape(30, -1)
            H = rows[fit].T @ rows[fit] / 15
            H += damping * np.trace(H) / len(H) * np.eye(len(H))
            log_det = np.linalg.slogdet(2 * np.pi * H)[1]
            total += np.mean([-0.5 * (log_det + row @ np.linalg.solve(H, row)) for row in rows[~fit]])
        assert value == pytest.approx(total / sum(widths), rel=1e-6)


def test_without_truth_too_little_and_too_much_damping_lose(tmp_path):
    log, *_ = make_log(tmp_path, n=60, rank=6)
    found = sweep(log, dampings=(1e-6, 1e-2, 1e-1, 1, 1e6))
    assert found.best.damping not in (1e-6, 1e6) and found.best.held_out is None
    assert "held-out rows" in str(found)


def test_one_method_by_name_and_an_array_of_dampings(tmp_path):
    log, *_ = make_log(tmp_path)
    found = sweep(log, methods="fisher", dampings=np.logspace(-2, 0, 3))
    assert [one.damping for one in found.settings] == pytest.approx([0.01, 0.1, 1]) and found.best.method == "fisher"


@pytest.mark.parametrize("columns", [3, 9])
def test_losses_of_other_questions_are_refused(tmp_path, columns):
    log, query, _ = make_log(tmp_path)
    query = twice(query)
    with pytest.raises(ConfigError, match=rf"losses \(20, {columns}\) must be .*\(20, 6\)"):
        sweep(log, query, members=random_subsets(40, 20), losses=np.zeros((20, columns)))


def test_a_truth_in_the_order_of_the_data_is_not_that_of_a_shuffled_log(tmp_path):
    """Which of the two is meant nobody can tell from the shapes."""
    log, query, _ = make_log(tmp_path, ids=list(range(39, -1, -1)))
    query, members = twice(query), random_subsets(40, 60)
    scores = log.influence(query, "ekfac", damping=0.3)
    losses = -(members @ scores.align(range(40)).values.T)
    given = {"members": members, "losses": losses, "dampings": (0.3,), "methods": "ekfac"}
    assert sweep(log, query, ids=range(40), **given).best.criterion == pytest.approx(1.0)
    assert sweep(log, query, ids=log.data_ids, **given).best.criterion < 0.9
    shuffled = r"order of the log \(data_id 39, 38, 37, \.\.\.\).*"
    with pytest.raises(ConfigError, match=shuffled + r"ids=range\(40\)"):
        sweep(log, query, **given)
    assert lds(scores.align(range(40)), members, losses).mean == pytest.approx(1.0)
    for judge in (lambda: lds(scores, members, losses), lambda: without_top(scores, 3)):
        with pytest.raises(ConfigError, match=shuffled + r"scores\.align\(range\(40\)\), or scores\.values"):
            judge()
    assert lds(scores.values, members, losses).mean < 0.9


def test_layers_that_fit_in_memory_share_a_scan(tmp_path, monkeypatch):
    log, *_ = make_log(tmp_path, n=30)
    scans, blocks = [], type(log).blocks
    monkeypatch.setattr(type(log), "blocks", lambda self, *a, **k: scans.append(1) or blocks(self, *a, **k))
    together = dict(held_out_likelihood(log, (0.1,)))
    assert len(scans) == 1
    monkeypatch.setattr("loghook.influence.precondition.FIT_BYTES", 1)
    assert dict(held_out_likelihood(log, (0.1,))) == pytest.approx(together) and len(scans) == 1 + len(log.layers)


def test_what_cannot_be_swept_is_refused(tmp_path):
    log, query, _ = make_log(tmp_path)
    six = twice(query)
    for arguments, says in (
        ({"methods": ("ekfac",)}, "cannot be tuned without retraining"),
        ({"members": np.ones((2, 40), bool)}, "the two, or neither"),
        ({"members": np.ones((2, 40), bool), "losses": np.ones((2, 3)), "query": query}, "at least 4 questions"),
        ({"dampings": ()}, "none to try"),
        ({"dampings": (0.1, -1)}, "damping=.*positive"),
        ({"methods": "ekfac"}, "cannot be tuned without retraining"),
        ({"methods": []}, "methods=.. has none"),
        ({"query": six, "members": 5, "losses": np.zeros((2, 6))}, r"must be .*\(1, 6\)"),
    ):
        with pytest.raises(ConfigError, match=says):
            sweep(log, **arguments)
