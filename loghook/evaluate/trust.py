"""How far a result can be relied on: would another projection seed say the same, and could it be chance?

Shapes: Q queries, N rows, k records of each query.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loghook.arguments import whole
from loghook.errors import ConfigError
from loghook.influence import engine
from loghook.influence.fidelity import correlations, shared_top
from loghook.influence.precondition import Metric, progress
from loghook.influence.scores import Scores, strongest
from loghook.log.format import LayerSpec, Layout
from loghook.log.query import Query, require_query
from loghook.log.reader import Reader
from loghook.log.source import Source
from loghook.processes import all_reduce, on_cpu

Array = NDArray[np.float64]
DRAWS = 200  # of another seed's scores, for the probabilities
DEALS = 3  # ways of dealing coordinates into parts, to average over
DRAWN = 1024  # rows whose weights in chance questions are drawn together, whatever block or process they come in


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What ``trust`` found; print it.

    Attributes:
        how: where the noise is known from: "a second log", "parts of the log's coordinates" or "no random projection"
            (whole gradients and "pca" have no seed); and whether the dtype in which rows are stored changed them in a
            way that it says nothing of.
        correlation: (Q,) Pearson correlation over rows between two seeds' scores, seen or estimated.
        together: (Q,) that of the mean of two seeds with the mean of two others (Spearman and Brown).
        overlap: (Q,) how many of the top k two seeds share: seen with a second log, else expected.
        top: (Q, k) places of the top records in the log, best first.
        stays: (Q, k) probability that a top record is in another seed's top k.
        true: (Q, k) probability that it is in the top k of the mean over all seeds. That is the top k without any
            projection where there is no curvature; what fitting curvature in the projected space changes is common to
            all seeds, so that with it fewer are in the top k of whole gradients.
        p_values: (Q, k) how often the best of all rows is as well aligned with a chance question, a sum of all rows
            with Gaussian weights; so it allows for having looked at all rows. Both sides at unit norm in the method's
            metric, whatever ``normalize`` is. None with nulls=0.
    """

    how: str
    correlation: Array
    together: Array
    overlap: Array
    top: NDArray[np.int64]
    stays: Array
    true: Array
    p_values: Array | None

    def __str__(self) -> str:
        """A few lines; the last one is a plain sentence."""
        k = self.top.shape[1]
        lines = [
            f"between seeds, from {self.how}: scores correlate {np.median(self.correlation):.2f} "
            f"(means of two: {np.median(self.together):.2f}), the top {k} share {self.overlap.mean():.1f}",
            f"in the top {k} of all seeds together: {self.true.sum(1).mean():.1f} of {k}, the first with probability "
            f"{self.true[:, 0].mean():.2f}",
        ]
        if self.p_values is not None:
            real = float((self.p_values <= 0.05).sum(1).mean())
            lines.append(f"better aligned than chance (p <= 0.05 over all rows): {real:.1f} of the top {k}")
            lines[-1] += "; none stands out alone: read the list as a whole, or ask more like it" * (real < 1)
        lines.append(
            f"{self.overlap.mean():.0f} of the top {k} would probably stay with another seed; scores correlate "
            f"{np.median(self.correlation):.2f} between seeds."
        )
        return "\n".join(lines)


@on_cpu
def trust(
    log: Reader,
    query: Query,
    method: str = "ekfac",
    *,
    other: tuple[Reader, Query] | None = None,
    damping: float = 0.1,
    damping_abs: float | None = None,
    normalize: str | None = None,
    k: int = 10,
    nulls: int = 99,
    seed: int = 0,
) -> Trust:
    """Say how much of a result is the projection's chance.

    With ``other``, the same data logged with another seed and the same questions asked of it, agreement is seen.
    Without, it is estimated: halves and quarters of the projected coordinates are scored as if each were a log of a
    smaller rank, and their disagreement is extended to the whole rank (docs/methods.md).

    Args:
        log: an open log.
        query: its questions.
        method: as for ``Log.influence``, as are damping, damping_abs and normalize.
        other: (log, query) with another seed.
        damping: relative.
        damping_abs: absolute, instead.
        normalize: None, "unit" or "relatif".
        k: how many top records of each query.
        nulls: chance questions for the p-values; 0 leaves them out.
        seed: of everything drawn here.

    Raises:
        ConfigError: arguments that cannot work, as refined questions with ``nulls``; or, without ``other``, a rank too
            small for quarters (below 8).
        MismatchError: ids of the two logs that do not match.
    """
    engine.require_rows(log)
    if len(log) < 2:
        raise ConfigError(f"{log.path} holds one row, which is first whatever the seed: log more.")
    k, nulls = whole("k", k, 1, len(log) - 1, hint=", below the number of rows"), whole("nulls", nulls, 0)
    require_query(query)
    if nulls and query.direction is not None:
        raise ConfigError(
            f"chance questions are not preconditioned, as this query is ({query.direction}): pass nulls=0."
        )
    metric = Metric(method=method, damping=damping, damping_abs=damping_abs, normalize=normalize)
    first = engine.influence(log, query, metric)
    values_QN = _fisher_z(first.values, metric)
    top_Qk = np.stack([strongest(values, k) for values in values_QN])
    pair, overlap = None, None  # scores of two seeds, or as if of two; and how many of their top k they share
    if other is not None:
        if _rank_shares(log) and other[0].fingerprint == log.fingerprint:
            raise ConfigError(
                f"other={other[0].path} has the same projection as the log, so that it says nothing of the seed's "
                "chance: log with another seed= (and, for projection='whitened', without fitted=)."
            )
        second = engine.influence(*other, metric)
        pair = values_QN, _fisher_z(Scores.combine([first, second], [0, 1]).values, metric)
        how, correlation, overlap = "a second log", correlations(*pair), shared_top(*pair, k)
    elif _rank_shares(log):
        how = "parts of the log's coordinates"
        if log.manifest.projection == "whitened":
            how += " (optimistic for whitened rows: other= measures it)"
        elif not metric.plain:
            how += " (optimistic at small ranks, as curvature is fitted anew with each seed: other= measures it)"
        correlation, pair = _estimated_agreement(log, query, metric, seed)
    else:
        how, correlation = "no random projection", np.ones(len(values_QN))
    if other is None and log.codec.coded and (pair is None or log.codec.name.startswith("lowrank")):
        how += f" (what {log.codec.name} rows changed is not in it: `loghook compress` prints that)"
    if metric.normalize is None:  # noise is about as large as a row; for unit rows it depends on the score itself
        row_sizes = engine.self_influence(log, metric, None).astype(np.float64)
        level = np.broadcast_to(np.sqrt(row_sizes / max(row_sizes.mean(), 1e-300)), values_QN.shape)
    elif metric.normalize == "unit" and pair is not None:
        level = _noise_level(*pair)
    else:
        level = np.ones_like(values_QN)
    stays, true = membership(values_QN, correlation, level, top_Qk, np.random.default_rng(seed))
    return Trust(
        how=how,
        correlation=correlation,
        together=2 * correlation / (1 + correlation.clip(min=0)),
        overlap=stays.sum(1) if overlap is None else overlap,
        top=top_Qk,
        stays=stays,
        true=true,
        p_values=_p_values(log, query, metric, top_Qk, nulls, seed) if nulls else None,
    )


def _estimated_agreement(log: Reader, query: Query, metric: Metric, seed: int) -> tuple[Array, tuple[Array, Array]]:
    """Correlation between seeds, (Q,), from parts of the coordinates; and two halves' scores, as if of two seeds."""
    halves_Q, quarters_Q, pairs = np.zeros(len(query)), np.zeros(len(query)), []
    for deal in range(DEALS):
        first, second = _scores_of_parts(log, query, 2, metric, seed + deal)
        pairs.append((first, second))
        halves_Q += correlations(first, second) / DEALS
        quarters = _scores_of_parts(log, query, 4, metric, seed + deal)
        quarters_Q += np.mean([correlations(a, b) for a, b in itertools.combinations(quarters, 2)], axis=0) / DEALS
    return extended(halves_Q, quarters_Q, float(np.mean(_rank_shares(log)))), pairs[0]


def extended(halves_Q: Array, quarters_Q: Array, share: float) -> Array:
    """Correlation between seeds at the whole rank, from that between halves and between quarters of it: (Q,).

    ``share`` is the rank over the width, of the projected sides. The coordinates are drawn without replacement, so that
    what is noise in one part is missing in the others: with k of n coordinates in p parts, noise D (the variance of a
    part's scores less their covariance with another's) and covariance C the signal is C + D k / (n p), and the noise of
    the whole is less by 1 - k / n than that of k coordinates drawn one by one (Cochran 1977, section 2.6).

    From quarters to halves noise over signal fell by a factor, and from halves to the whole it is taken to fall by the
    same one again. Averaging over one side's coordinates alone would halve it each time, over both sides' at once
    quarter it, which is the least factor that is believed; a preconditioner, fitted anew at each rank, makes it fall
    more slowly. The factor is the queries' median, as a single query's is too noisy.
    """
    noise_of_half, noise_of_quarter = (  # over signal
        (1 - r) / np.clip(r + (1 - r) * share / parts, 1e-3, None) for r, parts in ((halves_Q, 2), (quarters_Q, 4))
    )
    factor = float(np.clip(np.median(noise_of_half) / max(float(np.median(noise_of_quarter)), 1e-12), 0.25, 1.0))
    return np.asarray(1 / (1 + noise_of_half * factor * (1 - share)), dtype=np.float64)


def membership(
    values_QN: Array, correlation_Q: Array, level_QN: Array, top_Qk: NDArray[np.int64], rng: np.random.Generator
) -> tuple[Array, Array]:
    """How probable it is that each top record stays, with another seed and without noise: twice (Q, k).

    Given one seed's scores s with correlation r between seeds, mean m and variance v over rows, scores without noise
    are taken as Gaussian with mean m + r (s - m) and variance v r (1 - r), another seed's with the same mean and
    v (1 - r^2): both times the squared ``level`` of the row, whose mean square is 1.
    """
    stays, true = np.zeros(top_Qk.shape), np.zeros(top_Qk.shape)
    k = top_Qk.shape[1]
    for q, (values, r, level) in enumerate(zip(values_QN, correlation_Q.clip(0, 1), level_QN, strict=True)):
        centre = values.mean() + r * (values - values.mean())
        for total, variance in ((stays, 1 - r**2), (true, r * (1 - r))):
            deviation = level * values.std() * np.sqrt(variance)
            # Only rows count that six deviations may bring among the first k.
            near = np.flatnonzero(centre + 6 * deviation >= np.partition(centre - 6 * deviation, -k)[-k])
            top = np.searchsorted(near, top_Qk[q])
            for _ in range(DRAWS):
                drawn = centre[near] + deviation[near] * rng.standard_normal(len(near))
                total[q] += drawn[top] >= np.partition(drawn, -k)[-k]
    return stays / DRAWS, true / DRAWS


def _fisher_z(values: NDArray[np.float32], metric: Metric) -> Array:
    """Cosines on Fisher's z scale, where noise does not shrink towards 1; others as they are."""
    wide = values.astype(np.float64)
    return np.arctanh(wide.clip(-1 + 1e-6, 1 - 1e-6)) if metric.normalize == "unit" else wide


def _scores_of_parts(log: Reader, query: Query, parts: int, metric: Metric, seed: int) -> list[Array]:
    """Scores of each part of the coordinates: parts times (Q, N)."""
    smallest = min(k for spec in log.layout.layers for k, width in _sides(spec) if k < width)
    if smallest < 2 * parts:
        raise ConfigError(
            f"a side projected to {smallest} values is too small to be cut in {parts} parts: pass other=(log, query) "
            "of another seed, or log at rank 8 or more."
        )
    dealt = [Part(log, part, parts, seed) for part in range(parts)]
    return [_fisher_z(engine.influence(part, part.query(query), metric).values, metric) for part in dealt]


def _rank_shares(log: Reader) -> list[float]:
    """Of every side that a seed projects, its rank over how many coordinates there were to draw from."""
    if log.manifest.projection == "pca":
        return []
    return [k / (1 << (width - 1).bit_length()) for spec in log.layout.layers for k, width in _sides(spec) if k < width]


def _sides(spec: LayerSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rank and width of a layer's output side and of its input side; where they are equal nothing is projected."""
    return (spec.k_out, spec.widths[0]), (spec.k_in, spec.widths[1])


class Part(Source):
    """A log as a smaller rank would have made it: one of several parts of its coordinates; curvature is fitted anew.

    The coordinates of a random projection are exchangeable, so that a part is a projection of a smaller rank, and
    disjoint parts are (nearly) independent ones. Values are scaled so that inner products keep their mean.
    """

    def __init__(self, whole: Reader, part: int, parts: int, seed: int = 0) -> None:
        """Take the ``part``-th of ``parts`` equal shares of every projected side; ``seed`` deals them out."""
        super().__init__()
        self.path, self.data_ids = whole.path, whole.data_ids
        self.warned = True  # the whole log has said that it is not finished
        self._whole = whole
        specs, columns, scale, moments = [], [], [], []
        for spec in whole.layout.layers:
            start = whole.layout.columns[spec.name].start
            # Sides of equal rank are dealt alike: layers that share an input projection keep sharing it.
            out, into = (
                np.sort(np.random.default_rng([seed, k]).permutation(k)[part::parts]) if k < width else np.arange(k)
                for k, width in _sides(spec)
            )
            specs.append(replace(spec, k_out=len(out), k_in=len(into), activations=None, output_gradients=None))
            columns.append((start + out[:, None] * spec.k_in + into).reshape(-1))
            scale.append(np.full(len(columns[-1]), (spec.width / len(columns[-1])) ** 0.5))
            inputs, outputs, count = whole.layout.moments[spec.name]
            moments.append((inputs.start + into[:, None] * spec.k_in + into).reshape(-1))
            moments.append((outputs.start + out[:, None] * spec.k_out + out).reshape(-1))
            moments.append(np.array([count]))
        self.layout = Layout(specs)
        # Only a query that was cut alike fits. Without a seal, what is computed from a part is not kept with the log.
        self.manifest = replace(whole.manifest, layers=self.layout.layers, sealed=None)
        self.codec = self.layout.codec("float64" if whole.dtype == torch.float64 else "float32")  # blocks come decoded
        self._columns, self._scale = torch.from_numpy(np.concatenate(columns)), torch.from_numpy(np.concatenate(scale))
        self._moments = np.concatenate(moments)  # places of its own among those of the whole

    def query(self, query: Query) -> Query:
        return Query(query.data_ids, self._cut(query.matrix), self.made)

    def blocks(
        self, rows: int | None = None, share: tuple[int, int] = (0, 1), *, stored: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        for place, block in self._whole.blocks(rows, share):
            yield place, self._cut(block.to(self.dtype))

    def moments(self) -> np.ndarray:
        return self._whole.moments()[self._moments]

    def _cut(self, rows: Tensor) -> Tensor:
        return rows[:, self._columns] * self._scale.to(rows.dtype)


def _noise_level(one_QN: Array, other_QN: Array) -> Array:
    """Relative noise by rank in the list, (Q, N): root mean square over queries and neighbouring ranks.

    What neighbours in the ranking have in common does not change their order and is taken out.
    """
    one, other = (a / np.where((s := a.std(axis=1, keepdims=True)) > 0, s, 1) for a in (one_QN, other_QN))
    order = np.argsort(-(one + other), axis=1, kind="stable")
    noise = np.take_along_axis(one - other, order, axis=1)
    variance_N = _mean_of_neighbours(((noise - _mean_of_neighbours(noise)) ** 2).mean(axis=0))
    total = (noise**2).mean()
    level = np.empty_like(noise)
    np.put_along_axis(level, order, np.sqrt(variance_N / total if total > 0 else variance_N)[None, :], axis=1)
    return level


def _mean_of_neighbours(values: Array) -> Array:
    """Each value's mean with its neighbours along the last axis, fewer at the ends."""
    window = np.ones(min(25, values.shape[-1]))
    count = np.convolve(np.ones(values.shape[-1]), window, "same")
    return np.asarray(np.apply_along_axis(np.convolve, -1, values, window, "same") / count)


def _p_values(log: Reader, query: Query, metric: Metric, top_Qk: NDArray[np.int64], nulls: int, seed: int) -> Array:
    """Share of chance questions whose best row is at least as well aligned, both sides at unit norm: (Q, k).

    A chance question is a sum of all rows at unit norm with Gaussian weights: it knows which directions are common, and
    has no more to do with one row than with another. At unit norm, since a few very large rows would be all of it.
    """
    row_sizes = torch.from_numpy(engine.self_influence(log, metric, None)).double()
    scales = torch.where(row_sizes > 0, row_sizes, torch.inf).rsqrt()
    width = log.layout.gradient_width
    gradients = torch.zeros(nulls, width, dtype=torch.float64)

    @lru_cache(1)
    def drawn(part: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng([seed, part]).standard_normal((nulls, DRAWN)))

    for place, block in progress(log, "chance"):
        for part in range(place.start // DRAWN, -(-place.stop // DRAWN)):
            first = part * DRAWN
            rows = slice(max(place.start, first), min(place.stop, first + DRAWN))
            weights = drawn(part)[:, rows.start - first : rows.stop - first] * scales[rows]
            gradients.addmm_(weights, block[rows.start - place.start : rows.stop - place.start, :width].double())
    chance = Query(list(range(nulls)), all_reduce(gradients), log.made)
    unit = replace(metric, normalize="unit")
    best_of_chance = engine.influence(log, chance, unit, top=1).values[:, 0]
    seen_Qk = np.take_along_axis(engine.influence(log, query, unit).values, top_Qk, axis=1)
    return np.asarray((1 + (best_of_chance >= seen_Qk[:, :, None]).sum(axis=2)) / (1 + nulls), dtype=np.float64)
