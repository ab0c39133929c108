"""What a compressed log keeps of its source's scores."""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loghook.arguments import whole
from loghook.errors import ConfigError
from loghook.influence.engine import influence
from loghook.influence.precondition import Metric, working_dtype
from loghook.influence.scores import strongest
from loghook.log.query import Query
from loghook.log.reader import Reader
from loghook.processes import on_cpu

TOP = 10


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Scores of a compressed log beside those of its source, for rows of the source as questions.

    Attributes:
        dtype: of the source and of the compressed log.
        rows: rows in each.
        queries: rows that were asked, each left out of its own ranking.
        bytes_per_sample: of the source and of the compressed log.
        rows_per_second: scanned by "dot" with these questions, once checksums are verified, in the same two.
        pearson: {method: mean over questions of the correlation between both logs' scores}.
        top10: {method: mean over questions of the share of the source's ten best that are among the other's}.
    """

    dtype: tuple[str, str]
    rows: int
    queries: int
    bytes_per_sample: tuple[int, int]
    rows_per_second: tuple[float, float]
    pearson: dict[str, float]
    top10: dict[str, float]

    def __str__(self) -> str:
        (was, now), (slow, fast) = self.bytes_per_sample, self.rows_per_second
        lines = [
            f"{self.rows:,} rows, {self.dtype[0]} to {self.dtype[1]}",
            f"  {was:,} to {now:,} bytes a sample, {was / now:.1f} times fewer",
            f"  {slow:,.0f} to {fast:,.0f} rows/s scanned with {self.queries} questions",
        ]
        lines += [
            f"  {method:<6} Pearson {self.pearson[method]:.4f}, top-{TOP} overlap {self.top10[method]:.2f}"
            for method in self.pearson
        ]
        return "\n".join(lines)


def check_sample(reader: Reader, queries: int) -> None:
    """Raise ConfigError unless so many rows can be asked."""
    whole("queries", queries)
    if len(reader) < TOP + 2:
        raise ConfigError(f"{reader.path} has {len(reader)} rows, and a comparison needs at least {TOP + 2}.")


@on_cpu
def compare(source: Reader, compressed: Reader, *, queries: int, seed: int) -> Fidelity:
    """Ask both logs the same rows of the source: with "dot", and with "ekfac" where there are statistics."""
    places, query = as_questions(source, queries, seed)
    logs = (source, compressed)
    for reader in logs:
        _ask(reader, query, "dot")  # verifies checksums
    speeds, pearson, top10 = {}, {}, {}
    for method in compared_methods(source):
        (a, slow), (b, fast) = (_ask(reader, query, method) for reader in logs)
        speeds[method] = (len(source) / slow, len(source) / fast)
        likes, shared = [], []
        for one, other, place in zip(a, b, places, strict=True):  # not all at once: what is made of them is far larger
            # A row's own score is large and always found again: it would only flatter.
            pair = np.delete(one, place)[None], np.delete(other, place)[None]
            likes.append(likeness(*pair))
            shared.append(shared_top(*pair, TOP))
        pearson[method], top10[method] = float(np.mean(likes)), float(np.mean(shared)) / TOP
    return Fidelity(
        dtype=(source.manifest.dtype, compressed.manifest.dtype),
        rows=len(source),
        queries=len(places),
        bytes_per_sample=(source.codec.row_bytes, compressed.codec.row_bytes),
        rows_per_second=speeds["dot"],
        pearson=pearson,
        top10=top10,
    )


def as_questions(reader: Reader, count: int, seed: int) -> tuple[np.ndarray, Query]:
    """Rows of a log, drawn as questions: their places, in order, and the query."""
    places = np.sort(np.random.default_rng(seed).choice(len(reader), min(count, len(reader)), replace=False))
    rows = reader.gather(places).to(working_dtype(reader))
    return places, Query([str(place) for place in places], rows, reader.made)


def compared_methods(reader: Reader) -> tuple[str, ...]:
    """The method "dot", and "ekfac" where there are statistics."""
    if reader.manifest.no_statistics is not None:
        return ("dot",)
    moments = reader.moments()
    counted = any(moments[count] > 0 for *_, count in reader.layout.moments.values())
    return ("dot", "ekfac") if counted else ("dot",)


def _ask(reader: Reader, query: Query, method: str) -> tuple[np.ndarray, float]:
    """Scores (queries, rows) and the seconds that they took."""
    start = time.perf_counter()
    return influence(reader, query, Metric(method=method)).values, time.perf_counter() - start


def correlations(a: np.ndarray, b: np.ndarray) -> NDArray[np.float64]:
    """Pearson correlation along the last axis, 0 where a side is constant: (Q, N), (Q, N) -> (Q,)."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a.astype(np.float64), b.astype(np.float64)))
    size = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    correlation: NDArray[np.float64] = np.divide((a * b).sum(axis=-1), size, out=np.zeros_like(size), where=size > 0)
    return correlation


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Mean correlation between two scorings (Q, N) of the same questions; 1 for equal scores, also constant ones."""
    return float(np.where((a == b).all(axis=-1), 1.0, correlations(a, b)).mean())


def shared_top(a: np.ndarray, b: np.ndarray, k: int) -> NDArray[np.float64]:
    """How many rows are among the k best in both of two scorings (Q, N): (Q,)."""
    shared = [len(np.intersect1d(strongest(one, k), strongest(other, k))) for one, other in zip(a, b, strict=True)]
    return np.array(shared, dtype=np.float64)
