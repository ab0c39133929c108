"""The linear datamodelling score: do summed scores predict what retraining on a subset does?

Ilyas et al. 2022, "Datamodels" (the idea); Park et al. 2023, "TRAK", section 2 (the score).

Shapes: Q queries, N training samples, m subsets of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loghook.errors import ConfigError
from loghook.influence.fidelity import correlations
from loghook.influence.scores import Scores


@dataclass(frozen=True)
class Estimate:
    """A mean over queries.

    Attributes:
        mean: of ``per_query``.
        low, high: ends of its bootstrap interval over queries.
        per_query: (Q,) float64.
    """

    mean: float
    low: float
    high: float
    per_query: NDArray[np.float64] = field(repr=False)


def random_subsets(n: int, m: int, fraction: float = 0.5, seed: int = 0) -> NDArray[np.bool_]:
    """Draw m subsets of n samples, each of ``round(fraction * n)`` without replacement: (m, n) bool.

    Raises:
        ConfigError: if a subset would hold none of the samples, or all of them.
    """
    size = round(fraction * n)
    if not 0 < size < n or m < 1:
        raise ConfigError(
            f"m={m} subsets of fraction={fraction} hold {size} of n={n} samples each: a subset must hold some and "
            "leave some out, and there must be at least one."
        )
    order_mn = np.random.default_rng(seed).random((m, n)).argsort(axis=1)
    members = np.zeros((m, n), dtype=bool)
    np.put_along_axis(members, order_mn[:, :size], True, axis=1)
    return members


def lds(
    scores: ArrayLike,
    members: ArrayLike,
    losses: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Correlate summed scores with measured losses.

    For each query, the Spearman correlation over subsets (ties share their mean rank) between the summed scores of a
    subset's members and *minus* the loss measured after training on it: a positive score promises a lower loss.

    Args:
        scores: (Q, N), positive for proponents, with samples in the order of ``members``; see ``Scores.align``.
        members: (m, N) bool, which samples each subset holds.
        losses: (m, Q), each query's loss after training on each subset, best averaged over several seeds. Hand over
            the negative of an output that is better when larger (a margin, a log-probability).
        confidence: of the bootstrap interval, which resamples queries (not subsets).
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The mean over queries with its interval; ``per_query`` is 0 where predictions or losses are all equal.

    Raises:
        ConfigError: shapes that do not fit, fewer than two subsets, values that are not finite, or Scores whose ids
            are the numbers 0 to N - 1 in another order.
    """
    scores_QN, losses_mQ, members_mN = floats("scores", scores, 2), floats("losses", losses, 2), np.asarray(members)
    shapes = f"scores {scores_QN.shape}, members {members_mN.shape}, losses {losses_mQ.shape}"
    if members_mN.ndim != 2 or losses_mQ.shape != (len(members_mN), len(scores_QN)):
        raise ConfigError(f"{shapes} do not fit: pass (queries, samples), (subsets, samples) and (subsets, queries).")
    if members_mN.shape[1] != scores_QN.shape[1] or members_mN.dtype != bool:
        raise ConfigError(f"{shapes}: members is {members_mN.dtype} and must be bool, with one column per sample.")
    if len(members_mN) < 2:
        raise ConfigError(f"{shapes}: a correlation needs at least two subsets.")
    predicted_Qm = scores_QN @ members_mN.T.astype(np.float64)
    rounding_Q = 1e-12 * np.abs(scores_QN).sum(axis=1)  # of the sums, which must not break ties
    per_query = correlations(_ranks(predicted_Qm, rounding_Q), _ranks(-losses_mQ.T, np.zeros(len(scores_QN))))
    return estimate(per_query, confidence=confidence, resamples=resamples, seed=seed)


def interval(
    per_query: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap a mean over queries (percentile interval): its lower and upper end. per_query: (Q,)."""
    if not 0 < confidence < 1 or resamples < 1:
        raise ConfigError(f"confidence={confidence} must lie between 0 and 1, and resamples={resamples} be at least 1.")
    values = floats("per_query", per_query, 1)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[draws].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def estimate(per_query: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of one value a query, with its bootstrap interval. per_query: (Q,)."""
    values = np.asarray(per_query, dtype=np.float64)
    low, high = interval(values, confidence=confidence, resamples=resamples, seed=seed)
    return Estimate(float(values.mean()), low, high, values)


def floats(name: str, values: ArrayLike, ndim: int) -> NDArray[np.float64]:
    """An argument as float64, if it has so many axes, none of them empty, and is finite."""
    if isinstance(values, Scores):
        n = len(values.data_ids)
        require_order(
            values.data_ids, f"pass scores.align(range({n})), or scores.values if all has the order of the log"
        )
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or not array.size:
        raise ConfigError(f"{name} has shape {array.shape} and must have {ndim} axes, none of them empty.")
    if not np.isfinite(array).all():
        raise ConfigError(f"{name} holds values that are not finite and have no rank or mean: leave those out.")
    return array


def require_order(ids: Sequence[int | str], remedy: str) -> None:
    """Raise where ids are places in a data set, 0 to n - 1, and rows are not in its order."""
    ids, places = list(ids), list(range(len(ids)))
    if ids and isinstance(ids[0], int) and ids != places and sorted(ids) == places:
        raise ConfigError(
            f"rows are in the order of the log (data_id {', '.join(map(str, ids[:3]))}, ...), and what is known of the "
            f"samples is probably in that of the data: {remedy}."
        )


def _ranks(values_Qm: NDArray[np.float64], rounding_Q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks along the last axis, from 1, ties at their mean; neighbours that differ by mere rounding tie: (Q, m)."""
    ranks_Qm = np.empty_like(values_Qm)
    for values, ranks, rounding in zip(values_Qm, ranks_Qm, rounding_Q, strict=True):
        order = np.argsort(values, kind="stable")
        group = np.cumsum(np.diff(values[order], prepend=values[order[:1]]) > rounding)
        last = np.cumsum(np.bincount(group))
        ranks[order] = ((last + np.append(0, last[:-1]) + 1) / 2)[group]
    return ranks_Qm
