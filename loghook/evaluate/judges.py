"""Judges other than the linear datamodelling score: what leaving samples out does, what is found, what one step does.

Shapes: Q queries, N training samples, K numbers of removed samples, R random removals. Ties among scores favour
nobody: what a random order of them would give on average is what counts. Intervals are 95 % bootstrap ones over
queries; for others, pass an estimate's ``per_query`` to ``loghook.evaluate.lds.interval``. Shapes that do not fit,
values that are not finite and numbers out of range raise ConfigError.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loghook.arguments import whole
from loghook.errors import ConfigError
from loghook.evaluate.lds import Estimate, estimate, floats

Relevant = NDArray[np.bool_] | Sequence[Collection[int] | int]


@dataclass(frozen=True)
class LossDifference:
    """Query loss difference. Each is a mean over queries with its interval.

    Attributes:
        top: rise of a query's loss without its strongest samples, over training on everything.
        random: the same without as many random samples, mean over the random removals.
        lead: the first minus the second, query by query.
    """

    top: Estimate
    random: Estimate
    lead: Estimate


def without_top(scores: ArrayLike, k: int) -> NDArray[np.bool_]:
    """For each query, the training set without its k strongest samples: (Q, N) -> (Q, N) bool.

    These are the subsets to hand to ``retrain`` for ``loss_difference`` and ``brittleness``. For a group of queries
    that share a removal, pass the sum of their scores as one row. Among ties the first samples go.
    """
    scores_QN = floats("scores", scores, 2)
    k = whole("k", k, 1, scores_QN.shape[1] - 1)
    members_QN = np.ones(scores_QN.shape, dtype=bool)
    np.put_along_axis(members_QN, np.argsort(-scores_QN, axis=1, kind="stable")[:, :k], False, axis=1)
    return members_QN


def loss_difference(full: ArrayLike, removed: ArrayLike, random: ArrayLike) -> LossDifference:
    """How much a query's loss rises after retraining without its strongest samples, beside a random removal.

    Args:
        full: (Q,) losses after training on everything, best averaged over several seeds.
        removed: (Q,) loss of each query after training without *its own* strongest samples (``without_top``).
        random: (R, Q) losses after training without as many random samples.
    """
    full_Q, removed_Q = floats("full", full, 1), floats("removed", removed, 1)
    random_RQ = floats("random", random, 2)
    if not full_Q.shape == removed_Q.shape == random_RQ.shape[1:]:
        raise ConfigError(
            f"full {full_Q.shape}, removed {removed_Q.shape}, random {random_RQ.shape} do not fit: pass (queries,), "
            "(queries,) and (removals, queries)."
        )
    top_Q, chance_Q = removed_Q - full_Q, random_RQ.mean(axis=0) - full_Q
    return LossDifference(*(estimate(rise) for rise in (top_Q, chance_Q, top_Q - chance_Q)))


def brittleness(before: ArrayLike, after: ArrayLike, ks: Sequence[int]) -> dict[int, Estimate]:
    """Share of predictions that flip when a query's k strongest samples are left out, for each k.

    Args:
        before: (Q,) predicted classes after training on everything.
        after: (K, Q) each query's predicted class after training without its own k strongest samples.
        ks: the K numbers of samples left out, which become the keys of the result.
    """
    before_Q, after_KQ = np.asarray(before), np.asarray(after)
    if any(t.dtype.kind == "f" and not np.isfinite(t).all() for t in (before_Q, after_KQ)):
        raise ConfigError("predicted classes hold values that are not finite: leave those queries out.")
    if len(set(ks)) < len(ks):
        raise ConfigError(f"ks={list(ks)} names a number twice, and results are by number: name each once.")
    if before_Q.ndim != 1 or not len(before_Q) or after_KQ.shape != (len(ks), len(before_Q)):
        raise ConfigError(f"before {before_Q.shape}, {after_KQ.shape} do not fit {len(ks)} values of k: (Q,) (K, Q).")
    return {k: estimate(flips) for k, flips in zip(ks, after_KQ != before_Q, strict=True)}


def mislabel_auc(scores: ArrayLike, flipped: ArrayLike) -> Estimate:
    """Chance that a mislabelled sample scores higher than a clean one (area under the ROC curve), ties counting half.

    Args:
        scores: (N,) larger for more suspicious, as ``Log.self_influence``.
        flipped: (N,) bool, which samples are mislabelled.

    Returns:
        The area. Its interval resamples the mislabelled samples: ``per_query`` holds, for each of them, the share of
        clean samples below it.
    """
    scores_N, flipped_N = _suspects(scores, flipped)
    clean, bad = np.sort(scores_N[~flipped_N]), scores_N[flipped_N]
    below = (np.searchsorted(clean, bad, "left") + np.searchsorted(clean, bad, "right")) / 2
    return estimate(below / len(clean))


def mislabel_recall(scores: ArrayLike, flipped: ArrayLike, share: float = 0.1) -> Estimate:
    """Share of the mislabelled samples that are among the ``share`` of all samples with the largest scores.

    Args:
        scores: (N,) larger for more suspicious.
        flipped: (N,) bool, which samples are mislabelled.
        share: of all samples that somebody would look at; ``round(share * N)`` of them, at least one.

    Returns:
        The share, with an interval over the mislabelled samples.
    """
    scores_N, flipped_N = _suspects(scores, flipped)
    if not 0 < share <= 1:
        raise ConfigError(f"share={share} must lie above 0 and be at most 1: it is the part of the samples looked at.")
    chance_N = _chance_within(scores_N[None], max(1, round(share * len(scores_N))))[0]
    return estimate(chance_N[flipped_N])


def tail_patch(before: ArrayLike, after: ArrayLike) -> Estimate:
    """Rise in the target's probability after one training step on a top sample (Chang et al. 2024).

    Args:
        before: (Q,) log-probability of each query's target.
        after: (Q, K) the same after one step, from the same parameters, on each of its K strongest samples alone.

    Returns:
        The mean over queries; a query's value is the mean over its samples.
    """
    before_Q, after_QK = floats("before", before, 1), floats("after", after, 2)
    if len(before_Q) != len(after_QK) or not after_QK.shape[1]:
        raise ConfigError(f"before {before_Q.shape}, after {after_QK.shape}: pass (queries,) and (queries, samples).")
    if max(before_Q.max(), after_QK.max()) > 1e-6:
        raise ConfigError("a log-probability is above 0: hand over log-probabilities, which are minus the loss.")
    return estimate((np.exp(after_QK) - np.exp(before_Q)[:, None]).mean(axis=1))


def recall_at(scores: ArrayLike, relevant: Relevant, k: int) -> Estimate:
    """Share of a query's relevant samples that are among its k strongest.

    Args:
        scores: (Q, N).
        relevant: (Q, N) bool, or for each query the places of its relevant samples, or the place of the only one.
        k: how many samples are looked at. Where a query has more than k relevant ones, it cannot reach 1.
    """
    scores_QN = floats("scores", scores, 2)
    relevant_QN = _relevant(relevant, scores_QN.shape)
    k = whole("k", k, 1, scores_QN.shape[1])
    return estimate((_chance_within(scores_QN, k) * relevant_QN).sum(axis=1) / relevant_QN.sum(axis=1))


def mrr(scores: ArrayLike, relevant: Relevant) -> Estimate:
    """Mean reciprocal rank of a query's first relevant sample.

    Where it ties with others, it is the mean over random orders of them.

    Args:
        scores: (Q, N).
        relevant: (Q, N) bool, or for each query the places of its relevant samples, or the place of the only one.
    """
    scores_QN = floats("scores", scores, 2)
    relevant_QN = _relevant(relevant, scores_QN.shape)
    best_Q1 = np.where(relevant_QN, scores_QN, -np.inf).max(axis=1, keepdims=True)
    tied_QN = scores_QN == best_Q1
    above_Q, relevant_Q = (scores_QN > best_Q1).sum(axis=1), (tied_QN & relevant_QN).sum(axis=1)
    return estimate(list(map(_reciprocal, above_Q, relevant_Q, tied_QN.sum(axis=1) - relevant_Q)))


def _reciprocal(above: int, relevant: int, irrelevant: int) -> float:
    """Mean of 1 / rank of the first of the relevant samples in random orders of them and irrelevant ones."""
    ahead = np.arange(irrelevant + 1)  # how many irrelevant ones come first; their chances follow one another
    behind = irrelevant - ahead[:-1]
    chance = np.cumprod([relevant / (relevant + irrelevant), *(behind / (relevant + behind - 1))])
    return float((chance / (above + 1 + ahead)).sum())


def _chance_within(scores_QN: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Chance of each sample to be among the k strongest, where ties come in random order: (Q, N)."""
    cut_Q1 = -np.sort(-scores_QN, axis=1)[:, k - 1 : k]
    above_QN, tied_QN = scores_QN > cut_Q1, scores_QN == cut_Q1
    places_Q1 = k - above_QN.sum(axis=1, keepdims=True)  # that are left for the tied ones
    return above_QN + tied_QN * places_Q1 / tied_QN.sum(axis=1, keepdims=True)


def _listed(samples: Any) -> NDArray[Any]:
    try:
        return np.asarray(list(samples))
    except TypeError:  # a single place
        return np.asarray([samples])


def _relevant(relevant: Relevant, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if isinstance(relevant, Mapping):
        raise ConfigError("relevant is a dict, which has no order: pass a list with one set of places for each query.")
    sets = [_listed(samples) for samples in relevant]  # for each query bools or places
    # Places repeat none, so that a 0 or 1 for each of three or more samples can only mean what bools mean.
    if len({samples.shape for samples in sets}) == 1 and all(
        samples.dtype == bool or (samples.shape == shape[1:] and samples.size > 2 and np.isin(samples, (0, 1)).all())
        for samples in sets
    ):
        relevant_QN = np.array(sets, dtype=bool)
    else:
        relevant_QN = np.zeros((len(sets), shape[1]), dtype=bool)
        for row, places in zip(relevant_QN, sets, strict=True):
            valid = not places.size or (places.dtype.kind in "iu" and 0 <= places.min() <= places.max() < shape[1])
            if not valid or len(set(places.tolist())) < places.size:
                raise ConfigError(
                    f"relevant places {places.tolist()[:20]} must be whole numbers between 0 and {shape[1] - 1}, each "
                    f"once; or pass a bool for each of the {shape[1]} samples."
                )
            row[places.astype(np.int64)] = True
    if relevant_QN.shape != shape:
        raise ConfigError(f"relevant is for {relevant_QN.shape} and scores are {shape}: pass one set for each query.")
    if not relevant_QN.any(axis=1).all():
        query = int(np.argmin(relevant_QN.any(axis=1)))
        raise ConfigError(f"query {query} has no relevant sample, so nothing can be found: leave such queries out.")
    return relevant_QN


def _suspects(scores: ArrayLike, flipped: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    scores_N, flipped_N = floats("scores", scores, 1), np.asarray(flipped)
    if scores_N.shape != flipped_N.shape or flipped_N.dtype != bool:
        raise ConfigError(f"{scores_N.shape}, {flipped_N.shape} {flipped_N.dtype}: pass a number and a bool a sample.")
    if flipped_N.all() or not flipped_N.any():
        raise ConfigError(f"{flipped_N.sum()} of {len(flipped_N)} samples are flipped: there must be both kinds.")
    return scores_N, flipped_N
