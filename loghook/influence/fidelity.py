"""What a compressed log keeps of its source's scores."""

import time
from dataclasses import dataclass

import numpy as np

from loghook.errors import ConfigError
from loghook.influence.engine import influence
from loghook.influence.precondition import working_dtype
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
    if queries < 1 or len(reader) < TOP + 2:
        raise ConfigError(
            f"queries={queries} of a log with {len(reader)} rows: a comparison needs at least one question and "
            f"{TOP + 2} rows."
        )


@on_cpu
def compare(source: Reader, compressed: Reader, *, queries: int, seed: int) -> Fidelity:
    """Ask both logs the same rows of the source: with "dot", and with "ekfac" where there are statistics."""
    places, query = as_questions(source, queries, seed)
    methods = compared_methods(source)
    logs = (source, compressed)
    for reader in logs:
        _ask(reader, query, "dot")  # verifies checksums
    speeds, kept, top10 = {}, {}, {}
    for method in methods:
        (a, slow), (b, fast) = (_ask(reader, query, method) for reader in logs)
        speeds[method] = (len(source) / slow, len(source) / fast)
        # A row's own score is large and always found again: it would only flatter.
        pairs = [(np.delete(x, i), np.delete(y, i)) for x, y, i in zip(a, b, places, strict=True)]
        kept[method] = float(np.mean([pearson(x, y) for x, y in pairs]))
        top10[method] = float(np.mean([_overlap(x, y) for x, y in pairs]))
    return Fidelity(
        dtype=(source.manifest.dtype, compressed.manifest.dtype),
        rows=len(source),
        queries=len(places),
        bytes_per_sample=(source.codec.row_bytes, compressed.codec.row_bytes),
        rows_per_second=speeds["dot"],
        pearson=kept,
        top10=top10,
    )


def as_questions(reader: Reader, count: int, seed: int) -> tuple[np.ndarray, Query]:
    """Draw rows of a log as questions: their places, in order, and the query."""
    places = np.sort(np.random.default_rng(seed).choice(len(reader), min(count, len(reader)), replace=False))
    rows = reader.gather(places).to(working_dtype(reader))
    return places, Query([str(place) for place in places]).fill(rows, reader.manifest.made)


def compared_methods(reader: Reader) -> tuple[str, ...]:
    """Name "dot", and "ekfac" where there are statistics."""
    if reader.manifest.no_statistics is not None:
        return ("dot",)
    moments = reader.moments()
    counted = any(moments[count] > 0 for *_, count in reader.layout.moments.values())
    return ("dot", "ekfac") if counted else ("dot",)


def _ask(reader: Reader, query: Query, method: str) -> tuple[np.ndarray, float]:
    """Scores (queries, rows) and the seconds that they took."""
    start = time.perf_counter()
    values = influence(reader, query, method=method).values
    return values, time.perf_counter() - start


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation; 1 for equal scores and else 0 where one side is constant."""
    a, b = a.astype(np.float64) - a.mean(dtype=np.float64), b.astype(np.float64) - b.mean(dtype=np.float64)
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / scale) if scale > 0 else float(np.array_equal(a, b))


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    best = [set(np.argsort(-v, kind="stable")[:TOP].tolist()) for v in (a, b)]
    return len(best[0] & best[1]) / TOP
