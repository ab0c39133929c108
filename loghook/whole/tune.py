"""``tune``: choose projection, rank, dtype, method and damping by what they keep of whole-gradient EK-FAC's scores.

How well a log's scores correlate with whole EK-FAC's, query by query, predicts how well they predict retraining: the
noise that a projection adds has nothing to do with the truth (docs/methods.md has the figures). It is measured on a
few hundred samples; the log itself is then made once, with the choice.
"""

import contextlib
import io
import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from loghook.capture.batch import Ids, Mask
from loghook.capture.config import Config
from loghook.capture.run import Run
from loghook.errors import ConfigError
from loghook.influence.engine import influence
from loghook.influence.fidelity import pearson
from loghook.log import maintain
from loghook.log.query import Query
from loghook.log.reader import Reader
from loghook.whole.fit import Fit

SLACK = 0.005  # fidelities that differ by less are taken for equal, and the smaller row wins
PROJECTIONS: tuple[dict[str, Any], ...] = (
    {"projection": "random"},
    {"projection": "pca"},
    *({"projection": "whitened", "whitening": whitening} for whitening in (0.01, 0.1, 1.0)),
)
METHODS: tuple[dict[str, Any], ...] = (
    {"method": "dot"},
    *({"method": method, "damping": damping} for method in ("ekfac", "fisher") for damping in (0.01, 0.1, 1.0)),
)
Batches = Callable[[], Iterable[tuple[Ids, Any]]]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to log and to score.

    Attributes:
        init: arguments of ``loghook.init``.
        scoring: arguments of ``Log.influence``.
        bytes: of a stored row.
        fidelity: mean over queries of the Pearson correlation with whole EK-FAC's scores of the same samples.
    """

    init: dict[str, Any]
    scoring: dict[str, Any]
    bytes: int
    fidelity: float


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What ``tune`` found.

    Attributes:
        candidates: the best scoring of every projection, rank and dtype that was tried, cheapest first.
        best: the choice among those within the budget.
        samples: training samples that it was measured on.
        queries: questions.
        reference: what the scores were compared with.
        factors: folder of the factors.
    """

    candidates: tuple[Candidate, ...]
    best: Candidate
    samples: int
    queries: int
    reference: str
    factors: str

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for ``loghook.init``: the choice, and its fidelity, which the log keeps."""
        fitted = {"fitted": self.factors} if self.best.init["projection"] in ("pca", "whitened") else {}
        kept = {
            "pearson": round(self.best.fidelity, 4),
            "reference": self.reference,
            "samples": self.samples,
            "queries": self.queries,
            "scoring": self.best.scoring,
        }
        return self.best.init | fitted | {"fidelity": kept}

    def __str__(self) -> str:
        """A table, cheapest first."""
        lines = [
            f"fidelity to {self.reference}: {self.samples} samples, {self.queries} queries",
            f"{'projection':<16}{'rank':>5} {'dtype':<9}{'bytes':>9}  {'fidelity':>8}  scored by",
        ]
        for one in self.candidates:
            kind = one.init["projection"] + (f" {one.init['whitening']:g}" if "whitening" in one.init else "")
            how = " ".join(str(value) for value in one.scoring.values())
            chosen = "  <-- chosen" if one is self.best else ""
            rank, dtype = one.init["rank"], one.init["dtype"]
            lines.append(f"{kind:<16}{rank:>5} {dtype:<9}{one.bytes:>9,}  {one.fidelity:>8.3f}  {how}{chosen}")
        return "\n".join(lines)


def tune(
    fit: Fit,
    samples: Batches,
    queries: Batches,
    loss: Callable[[Any], Any],
    *,
    bytes_per_sample: float | None = None,
    projections: Sequence[dict[str, Any]] = PROJECTIONS,
    ranks: Sequence[int] = (16, 32, 64),
    dtypes: Sequence[str] = ("float32", "int8", "int1"),
    methods: Sequence[dict[str, Any]] = METHODS,
    damping: float = 0.1,
    mask: Callable[[Any], Mask | None] = lambda batch: None,
) -> Tuned:
    """Measure how well small logs reproduce whole-gradient EK-FAC, and choose the best within a budget.

    Args:
        fit: finished factors of the model, from ``loghook.fit``.
        samples: called for each walk over a few hundred training samples; yields (ids, batch).
        queries: the same for some questions.
        loss: batch -> summed loss through the watched model.
        bytes_per_sample: the most that a stored row may take; None for no limit.
        projections: arguments of ``loghook.init`` to try.
        ranks: ranks to try with each.
        dtypes: dtypes to try with each; "int1" is tried on whitened rows only.
        methods: arguments of ``Log.influence`` to try with each.
        damping: of the whole EK-FAC that is the reference.
        mask: batch -> mask, as ``run(..., mask=)`` takes it.

    Returns:
        The measured candidates and the choice: the smallest row whose fidelity is within 0.005 of the best.

    Raises:
        ConfigError: if nothing fits the budget.
    """
    asked = _asked(fit, queries, loss)
    scoring = fit.score(asked, damping=damping)
    for ids, batch in samples():
        with scoring(data_id=ids):
            loss(batch).backward()
    reference = scoring.scores()
    found: list[Candidate] = []
    widest = max(max(layer.in_features + layer.bias, layer.out_features) for layer in fit.specs)
    tried = list(itertools.product(projections, [rank for rank in ranks if rank <= widest]))
    if not tried:
        raise ConfigError(f"ranks={list(ranks)} are all above the widest layer's {widest:,}: try smaller ones.")
    for projection, rank in tqdm(tried, "tuning", unit=" logs", delay=2, leave=False, disable=None):
        arguments = projection | {"rank": rank}
        with tempfile.TemporaryDirectory(prefix="loghook-tune-") as folder:
            log, query = _small_log(fit, arguments, Path(folder) / "log", samples, queries, loss, mask)
            for dtype in dtypes:
                if dtype == "int1" and projection["projection"] != "whitened":
                    continue
                if dtype != "float32":
                    maintain.compress(Path(folder) / "log", Path(folder) / dtype, dtype)
                one = log if dtype == "float32" else Reader(Path(folder) / dtype)
                scored = [(_fidelity(one, query, reference.values, how), how) for how in methods]
                best, how = max(scored, key=lambda pair: pair[0])
                found.append(
                    Candidate(init=arguments | {"dtype": dtype}, scoring=how, bytes=one.codec.row_bytes, fidelity=best)
                )
    found.sort(key=lambda one: (one.bytes, -one.fidelity))
    within = [one for one in found if bytes_per_sample is None or one.bytes <= bytes_per_sample]
    if not within:
        raise ConfigError(
            f"bytes_per_sample={bytes_per_sample} is less than the smallest row that was tried takes "
            f"({found[0].bytes:,}): allow more, or try lower ranks or fewer bits."
        )
    top = max(one.fidelity for one in within)
    return Tuned(
        candidates=tuple(found),
        best=next(one for one in within if one.fidelity >= top - SLACK),
        samples=reference.values.shape[1],
        queries=len(asked),
        reference=f"ekfac (whole gradients), damping {damping:g}",
        factors=str(fit.path),
    )


def _asked(hooked: Fit | Run, queries: Batches, loss: Callable[[Any], Any]) -> Query:
    parts = []
    for ids, batch in queries():
        with hooked.query(data_id=ids) as query:
            loss(batch).backward()
        parts.append(query)
    return Query.concat(parts)


def _small_log(
    fit: Fit, arguments: dict[str, Any], path: Path, samples: Batches, queries: Batches, loss: Callable[[Any], Any],
    mask: Callable[[Any], Mask | None],
) -> tuple[Reader, Query]:  # fmt: skip
    """Log the samples and ask the questions, with projections that follow from the factors."""
    fitted = {} if arguments["projection"] == "random" else {"fitted": fit.path}
    with Run(Config(path=path, **(arguments | fitted)), resume=False, overwrite=False) as run:
        with contextlib.redirect_stdout(io.StringIO()):
            run.watch(fit.model, **fit.watched)
        for ids, batch in samples():
            with run(data_id=ids, mask=mask(batch)):
                loss(batch).backward()
        run.finalize()
        query = _asked(run, queries, loss)
    return Reader(path), query


def _fidelity(log: Reader, query: Query, reference: np.ndarray, how: dict[str, Any]) -> float:
    values = influence(log, query, **how).values
    return float(np.mean([pearson(mine, theirs) for mine, theirs in zip(values, reference, strict=True)]))
