"""The linear datamodelling score against the independent reference in tests/dense.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loghook.errors import ConfigError
from loghook.evaluate.lds import interval, lds, random_subsets
from tests import dense

Case = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def cases(draw: Any) -> Case:
    """Scores (Q, N), members (m, N), losses (m, Q). Whole numbers give many ties, whose sums are exact in any order."""
    queries, samples, subsets = draw(st.integers(1, 5)), draw(st.integers(1, 8)), draw(st.integers(2, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Distinct subsets: the sums of two equal ones tie, which fractions added in another order may miss.
    members = np.unique(rng.random((subsets, samples)) < 0.5, axis=0)
    if len(members) < 2:
        members = np.array([[False] * samples, [True] * samples])
    if draw(st.booleans()):
        return rng.integers(-2, 3, (queries, samples)), members, rng.integers(0, 3, (len(members), queries))
    return rng.normal(size=(queries, samples)), members, rng.normal(size=(len(members), queries))


@given(cases())
def test_agrees_with_the_reference(case: Case) -> None:
    scores, members, losses = case
    result = lds(scores, members, losses)
    assert result.mean == pytest.approx(dense.lds(scores, members, losses), abs=1e-12)
    alone = [dense.lds(scores[q : q + 1], members, losses[:, q : q + 1]) for q in range(len(scores))]
    assert result.per_query == pytest.approx(np.array(alone), abs=1e-12)
    assert result.per_query.min() - 1e-12 <= result.low <= result.high <= result.per_query.max() + 1e-12


@given(cases(), st.permutations(range(5)))
def test_sign_scale_and_order(case: Case, order: list[int]) -> None:
    scores, members, losses = case
    mean = lds(scores, members, losses).mean
    assert lds(-scores, members, losses).mean == pytest.approx(-mean, abs=1e-12)
    assert lds(4.0 * scores, members, np.exp(losses)).mean == pytest.approx(mean, abs=1e-12)  # only ranks count
    order = [q for q in order if q < len(scores)]
    assert lds(scores[order], members, losses[:, order]).mean == pytest.approx(mean, abs=1e-12)


def test_a_truth_that_adds_up_is_predicted_perfectly() -> None:
    members = random_subsets(30, 20, seed=3)
    scores = np.random.default_rng(0).normal(size=(4, 30))
    result = lds(scores, members, -(members @ scores.T))
    assert result.mean == result.low == result.high == 1.0


def test_interval_covers_the_mean() -> None:
    rng, covered = np.random.default_rng(0), 0
    for seed in range(200):
        low, high = interval(rng.normal(1.0, 2.0, 30), resamples=400, seed=seed)
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_is_seeded_and_narrows_with_queries() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = interval(values)
    assert (low, high) == interval(values) != interval(values, seed=1)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    wide = interval(values[:40])
    assert wide[1] - wide[0] > 2 * (high - low)


@given(st.integers(2, 40), st.integers(1, 8), st.floats(0.05, 0.95), st.integers(0, 99))
def test_random_subsets(n: int, m: int, fraction: float, seed: int) -> None:
    if not 0 < round(fraction * n) < n:
        with pytest.raises(ConfigError, match=f"n={n}"):
            random_subsets(n, m, fraction, seed)
        return
    members = random_subsets(n, m, fraction, seed)
    assert members.shape == (m, n) and members.dtype == bool
    assert (members.sum(1) == round(fraction * n)).all()
    assert (members == random_subsets(n, m, fraction, seed)).all()


def test_random_subsets_are_even_and_differ() -> None:
    members = random_subsets(50, 400, 0.5, seed=1)
    assert members.mean(0) == pytest.approx(np.full(50, 0.5), abs=0.12)
    assert len(np.unique(members, axis=0)) == 400
    assert (members != random_subsets(50, 400, 0.5, seed=2)).any()


@pytest.mark.parametrize(
    ("scores", "members", "losses", "says"),
    [
        (np.ones((2, 5)), np.ones((3, 5), bool), np.ones((3, 4)), "do not fit"),
        (np.ones((2, 5)), np.ones((3, 4), bool), np.ones((3, 2)), "one column per sample"),
        (np.ones((2, 5)), np.ones((3, 5)), np.ones((3, 2)), "must be bool"),
        (np.ones((2, 5)), np.ones((1, 5), bool), np.ones((1, 2)), "at least two subsets"),
        (np.full((2, 5), np.nan), np.ones((3, 5), bool), np.ones((3, 2)), "not finite"),
        (np.ones((2, 5)), np.ones((3, 5), bool), np.full((3, 2), np.inf), "not finite"),
    ],
)
def test_bad_input(scores: np.ndarray, members: np.ndarray, losses: np.ndarray, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        lds(scores, members, losses)


@given(cases(), st.sampled_from([0.1, 1 / 3, 1e-30]))
def test_rounding_of_sums_breaks_no_ties(case: Case, unit: float) -> None:
    scores, members, losses = case
    whole = np.rint(4 * scores)
    assert lds(whole * unit, members, losses).mean == pytest.approx(lds(whole, members, losses).mean, abs=1e-12)
