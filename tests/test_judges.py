"""Judges and controls against slow references that follow the words of their definitions."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loghook.errors import ConfigError
from loghook.evaluate import controls
from loghook.evaluate.judges import (
    brittleness,
    loss_difference,
    mislabel_auc,
    mislabel_recall,
    mrr,
    recall_at,
    tail_patch,
    without_top,
)

seeds = st.integers(0, 2**32 - 1)


def tied(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Scores of few values, so that many tie."""
    return rng.integers(0, 3, shape).astype(float)


def test_without_top_takes_each_querys_strongest() -> None:
    scores = np.array([[3.0, 1.0, 2.0, -5.0], [0.0, 0.0, 1.0, 0.0]])
    assert without_top(scores, 2).tolist() == [[False, True, False, True], [False, True, False, True]]


@given(seeds, st.integers(1, 6))
def test_without_top_keeps_nothing_stronger_than_what_it_takes(seed: int, k: int) -> None:
    scores = tied(np.random.default_rng(seed), 3, 7)
    for row, kept in zip(scores, without_top(scores, k), strict=True):
        assert (~kept).sum() == k and row[~kept].min() >= row[kept].max()


def test_loss_difference_is_a_rise_beside_the_random_one() -> None:
    full, removed = np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.0, 4.0])
    random = np.array([[1.0, 2.2, 3.0], [1.2, 2.0, 3.0]])
    result = loss_difference(full, removed, random)
    assert result.top.per_query == pytest.approx([0.5, 0.0, 1.0])
    assert result.random.per_query == pytest.approx([0.1, 0.1, 0.0])
    assert result.lead.per_query == pytest.approx([0.4, -0.1, 1.0])
    for part in (result.top, result.random, result.lead):
        assert part.mean == pytest.approx(part.per_query.mean()) and part.low <= part.mean <= part.high


def test_brittleness_is_a_share_of_flips_for_each_k() -> None:
    before = np.array([0, 1, 2, 3])
    after = np.array([[0, 1, 2, 3], [0, 5, 2, 3], [1, 1, 0, 3]])
    curve = brittleness(before, after, ks=[1, 10, 100])
    assert {k: one.mean for k, one in curve.items()} == {1: 0.0, 10: 0.25, 100: 0.5}
    assert curve[100].per_query.tolist() == [1, 0, 1, 0]
    words = brittleness(["cat", "dog"], [["cat", "cat"]], ks=[1])
    assert words[1].mean == 0.5
    with pytest.raises(ConfigError, match="not finite"):
        brittleness([0, 1], [[0, np.nan]], ks=[1])
    with pytest.raises(ConfigError, match="names a number twice"):
        brittleness([0, 1], [[0, 1], [0, 1]], ks=[3, 3])


@given(seeds, st.booleans())
def test_mislabel_auc_counts_pairs(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    flipped = rng.permutation([True, False] + [bool(x) for x in rng.integers(0, 2, 10)])
    scores = tied(rng, 12) if ties else rng.normal(size=12)
    pairs = [(a > b) + (a == b) / 2 for a in scores[flipped] for b in scores[~flipped]]
    result = mislabel_auc(scores, flipped)
    assert result.mean == pytest.approx(np.mean(pairs))
    assert mislabel_auc(-scores, flipped).mean == pytest.approx(1 - result.mean)


def test_mislabel_auc_equals_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, flipped = rng.integers(0, 40, 300), rng.random(300) < 0.1
    assert mislabel_auc(scores, flipped).mean == pytest.approx(metrics.roc_auc_score(flipped, scores))


def expected(judge: Any, scores: np.ndarray) -> float:
    """Mean of a judge over every order that ties could come in: ``judge(order)`` sees places, strongest first."""
    places = range(len(scores))
    orders = [
        o for o in itertools.permutations(places) if all(scores[a] >= scores[b] for a, b in itertools.pairwise(o))
    ]
    return float(np.mean([judge(order) for order in orders]))


@given(seeds, st.integers(1, 6))
def test_recalls_average_over_the_orders_of_ties(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    scores, relevant = tied(rng, 2, 6), rng.permuted(np.arange(12).reshape(2, 6) % 3 == 0, axis=1)
    reference = [
        expected(lambda order, rel=rel: rel[list(order[:k])].sum() / rel.sum(), row)
        for row, rel in zip(scores, relevant, strict=True)
    ]
    result = recall_at(scores, relevant, k)
    assert result.per_query == pytest.approx(np.array(reference))
    forms = (
        [set(np.flatnonzero(rel)) for rel in relevant],
        relevant.tolist(),
        relevant.astype(int),
        torch.tensor(relevant),
    )
    assert {recall_at(scores, form, k).mean for form in forms} == {result.mean}
    assert mislabel_recall(scores[0], relevant[0], share=k / 6).mean == pytest.approx(reference[0])


@given(seeds, st.booleans())
def test_mrr_averages_over_the_orders_of_ties(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = tied(rng, 2, 6) if ties else rng.normal(size=(2, 6))
    relevant = rng.permuted(np.arange(12).reshape(2, 6) % 3 == 0, axis=1)
    reference = [
        expected(lambda order, rel=rel: 1 / (1 + list(rel[list(order)]).index(True)), row)
        for row, rel in zip(scores, relevant, strict=True)
    ]
    assert mrr(scores, relevant).per_query == pytest.approx(np.array(reference))


def test_a_constant_score_finds_nothing() -> None:
    flipped = np.arange(100) < 10
    assert mislabel_auc(np.zeros(100), flipped).mean == 0.5
    assert mislabel_recall(np.zeros(100), flipped, 0.2).mean == pytest.approx(0.2)
    assert recall_at(np.zeros((1, 100)), flipped[None], 20).mean == pytest.approx(0.2)
    assert mrr(np.zeros((1, 100)), [{7}]).mean == pytest.approx((1 / np.arange(1, 101)).mean())


def test_tail_patch_is_a_rise_in_probability() -> None:
    before, after = np.log([0.5, 0.1]), np.log([[0.6, 0.8], [0.1, 0.05]])
    assert tail_patch(before, after).per_query == pytest.approx([0.2, -0.025])


ONES = np.ones((2, 5))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: without_top(ONES, 5), "k=5 must be a whole number from 1 to 4"),
        (lambda: without_top(np.full((2, 3), np.nan), 1), "not finite"),
        (lambda: loss_difference([1.0], [1.0, 2.0], [[1.0]]), "do not fit"),
        (lambda: brittleness([1, 2], [[1, 2]], ks=[1, 2]), "do not fit 2 values"),
        (lambda: mislabel_auc([1.0, 2.0], [True, True]), "both kinds"),
        (lambda: mislabel_auc([1.0, 2.0], [1, 0]), "a number and a bool"),
        (lambda: mislabel_recall([1.0, 2.0], np.array([True, False]), share=0.0), "share=0.0"),
        (lambda: tail_patch([0.5], [[0.2]]), "minus the loss"),
        (lambda: tail_patch([-0.5], [[-0.2], [-0.1]]), r"\(queries, samples\)"),
        (lambda: recall_at(ONES, [{1}, set()], 2), "query 1 has no relevant"),
        (lambda: recall_at(ONES, [{1}, {5}], 2), "between 0 and 4"),
        (lambda: recall_at(ONES, [{1}], 2), "one set for each query"),
        (lambda: recall_at(ONES, [[1, 1], [2]], 2), "each once"),
        (lambda: recall_at(ONES, [[0.5], [2]], 2), "whole numbers"),
        (lambda: mrr(ONES, np.ones((2, 4), bool)), "one set for each query"),
        (lambda: mrr(ONES, {0: [1], 1: [2]}), "a dict, which has no order"),
        (lambda: controls.bm25("the cat", ["a"]), "queries is a single text"),
        (lambda: controls.bm25(["the cat"], []), "documents is empty"),
        (lambda: controls.cosine(ONES, np.ones((3, 4))), "do not fit"),
    ],
)
def test_bad_input(call: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        call()


# Controls


def test_cosine_and_labels() -> None:
    queries, samples = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[1.0, 0.0], [-6.0, -8.0], [0.0, 0.0]])
    assert controls.cosine(queries, samples) == pytest.approx(np.array([[0.6, -1, 0], [0, 0, 0]]))
    assert controls.same_label([1, 2], [2, 2, 1]).tolist() == [[0, 0, 1], [1, 1, 0]]


def test_random_is_seeded() -> None:
    one = controls.random(3, 400)
    assert (one == controls.random(3, 400)).all() and (one != controls.random(3, 400, seed=1)).any()
    assert abs(one.mean()) < 0.1 and one.std() == pytest.approx(1, abs=0.1)


def slow_bm25(query: str, documents: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    words = [re.findall(r"\w+", document.lower()) for document in documents]
    mean, scores = sum(map(len, words)) / len(words), []
    for these in words:
        score = 0.0
        for word in re.findall(r"\w+", query.lower()):
            holders = sum(word in others for others in words)
            idf = math.log(1 + (len(words) - holders + 0.5) / (holders + 0.5))
            f = Counter(these)[word]
            score += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(these) / mean))
        scores.append(score)
    return scores


def test_bm25_equals_its_formula() -> None:
    documents = ["The cat sat", "the dog sat; the DOG barked", "", "nothing in common here", "cat cat cat dog"]
    queries = ["the cat", "dog dog bird", "unseen", ""]
    expected = [slow_bm25(query, documents) for query in queries]
    np.testing.assert_allclose(controls.bm25(queries, documents), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_query_with_one_relevant_sample_needs_no_list_of_one(kind):
    scores = np.random.default_rng(0).standard_normal((3, 9))
    assert mrr(scores, kind([4, 0, 1])).mean == mrr(scores, [[4], [0], [1]]).mean
