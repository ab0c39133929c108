"""An optional vector index: rows reduced to few dimensions propose candidates, and the log scores those exactly."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loghook.arguments import whole
from loghook.errors import ConfigError, MismatchError, StateError
from loghook.influence.engine import influence
from loghook.influence.fidelity import TOP, as_questions, compared_methods
from loghook.influence.precondition import Metric, progress
from loghook.influence.scores import Scores
from loghook.influence.solvers import gram_basis
from loghook.log.files import loading, save_checked
from loghook.log.query import Query
from loghook.log.reader import Reader
from loghook.processes import all_reduce, rank_and_size
from loghook.project.linear import linear

CANDIDATES = 200  # that are scored for each question, unless another number is asked for
OPTIONS = ("damping", "damping_abs", "layers")  # of ``Log.influence``; rows in an index have no norms
QUESTIONS = 16  # rows that a new index is tried with
GATHERED = 2**25  # values of candidates that are read at a time
ROUNDING = 1e-6  # of a Gram matrix's largest eigenvalue, in float32: smaller ones mean nothing


class Index:
    """A log's rows, reduced, in a faiss index of inner products; made by ``Log.index`` and ``Log.load_index``.

    Attributes:
        basis: (dimensions, values of a row's gradients) float32, orthonormal.
        rows: (rows, dimensions) float32: the log's rows in this basis.
        factory: what faiss was asked for.
    """

    def __init__(self, reader: Reader, basis: Tensor, rows: Tensor, factory: str) -> None:
        self._reader, self.basis, self.rows, self.factory = reader, basis, rows, factory
        self._faiss = _empty(factory, len(basis))
        self._faiss.train(rows.numpy())
        self._faiss.add(rows.numpy())

    def search(
        self, query: Query, top: int = TOP, method: str = "ekfac", *, candidates: int | None = None, **options: Any
    ) -> Scores:
        """Let the index propose rows for each question, and score those from the log.

        Args:
            query: the questions, as for ``Log.influence``.
            top: how many rows to keep for each.
            method: as in ``Log.influence``, without "cosine".
            candidates: how many rows the index proposes for each question; 200 by default, or ``top`` if that is more.
            options: ``damping``, ``damping_abs`` and ``layers`` of ``Log.influence``.

        Returns:
            What ``Log.influence(..., top=top)`` returns, but for rows that the index did not propose: the scores
            themselves are exact.

        Raises:
            ConfigError: an argument that cannot work.
        """
        unfit = [*(options.keys() - OPTIONS), *(["method='cosine'"] if method == "cosine" else [])]
        if unfit:
            raise ConfigError(
                f"an index cannot take {unfit[0]}: it serves the other methods with {', '.join(OPTIONS)}. Use "
                "log.influence(..., top=)."
            )
        top, candidates = _checked(top, candidates)
        scan = partial(self._rescore, top=top, candidates=min(candidates, len(self.rows)))
        metric, others = Metric.among({"method": method} | options)
        return influence(self._reader, query, metric, top=top, scan=scan, **others)

    def recall(
        self,
        query: Query | int,
        top: int = TOP,
        method: str = "ekfac",
        *,
        candidates: int | None = None,
        **options: Any,
    ) -> float:
        """Share of the true best rows, from a scan of the log, that ``search`` finds: the mean over questions.

        ``query`` may be how many of the log's rows to ask, each left out of its own ranking. The other arguments are as
        in ``search``.
        """
        top, candidates = _checked(top, candidates)
        asked_row = None  # of each question, where questions are rows
        if not isinstance(query, Query):
            asked_row, query = as_questions(self._reader, whole("query", query, hint=", or a Query"), seed=0)
            top += 1
            candidates = max(candidates, top)
        proposed = self.search(query, top, method, candidates=candidates, **options).places
        metric, others = Metric.among({"method": method} | options)
        best = influence(self._reader, query, metric, top=top, **others).places
        assert proposed is not None and best is not None
        wanted = best if asked_row is None else [np.setdiff1d(*pair) for pair in zip(best, asked_row, strict=True)]
        return float(np.mean([np.isin(*pair).mean() for pair in zip(wanted, proposed, strict=True)]))

    def save(self, path: str | Path) -> None:
        """Write basis and reduced rows to one safetensors file, for ``Log.load_index``.

        Raises:
            StateError: if the log is not finished, so that the file could not say which rows it speaks of.
        """
        if self._reader.seal is None:
            raise StateError(f"{self._reader.path} is not finished: its index would be stale, so finalise it first.")
        header = {"seal": self._reader.seal, "factory": self.factory}
        save_checked(path, "index", header, {"basis": self.basis, "rows": self.rows})

    def _rescore(self, matrix: Tensor, top: int, candidates: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact scores and places of the best candidates of preconditioned questions (Q, width)."""
        _, proposed = self._faiss.search((matrix.float() @ self.basis.T).numpy(), candidates)
        places = torch.from_numpy(proposed).sort(1).values  # equal scores stay in the order of the log
        filled = places >= 0  # faiss says -1 where it found fewer
        values = torch.full(places.shape, -torch.inf, dtype=matrix.dtype)
        for i, question in enumerate(matrix):
            values[i, filled[i]] = self._scores(question, places[i, filled[i]])
        best = values.argsort(dim=1, descending=True, stable=True)[:, :top]
        if not filled.gather(1, best).all():
            raise ConfigError(
                f"factory={self.factory!r} proposed fewer than top={top} rows: ask for fewer, or take another factory."
            )
        return values.gather(1, best).float().numpy(), places.gather(1, best).numpy()

    def _scores(self, question: Tensor, places: Tensor) -> Tensor:
        """Inner products of a preconditioned question (width,) with some rows of the log."""
        columns, step = slice(0, len(question)), max(1, GATHERED // len(question))
        chunks = (self._reader.gather(chunk.numpy(), columns) for chunk in places.split(step))
        return torch.cat([rows.to(question.dtype) @ question for rows in chunks])


def build(reader: Reader, dimensions: int, factory: str, sample: int, seed: int) -> Index:
    """Reduce every row of a log, index them, and print how well that finds the best rows; see ``Log.index``."""
    dimensions, sample = whole("dimensions", dimensions), whole("sample", sample)
    if not len(reader):
        raise ConfigError(f"{reader.path} holds no rows to index: log some first.")
    _empty(factory, dimensions)  # says now what is wrong with it
    columns = slice(0, reader.layout.gradient_width)
    drawn = np.random.default_rng(seed).choice(len(reader), min(sample, len(reader)), replace=False)
    basis = leading_directions(reader.gather(np.sort(drawn), columns).float(), dimensions)
    rows = torch.zeros(len(reader), len(basis))
    for place, block in progress(reader, "reducing"):
        rows[place] = linear(block[:, columns].float(), basis)
    index = Index(reader, basis, all_reduce(rows), factory)
    method, top = compared_methods(reader)[-1], min(TOP, len(reader) - 1)
    recall = index.recall(min(QUESTIONS, len(reader)), top, method) if top else 1.0
    if rank_and_size()[0] == 0:
        print(f"index of {len(reader):,} rows in {len(basis):,} of {columns.stop:,} dimensions")
        print(
            f"  finds {recall:.0%} of the {top} best rows by {method} among {min(CANDIDATES, len(reader))} candidates"
        )
    return index


def load(reader: Reader, path: str | Path) -> Index:
    """Read what ``Index.save`` wrote of this log; see ``Log.load_index``."""
    with loading(path, "index") as (header, tensors):
        seal, factory, basis, rows = header["seal"], header["factory"], tensors["basis"], tensors["rows"]
    if seal != reader.seal:
        raise MismatchError(f"{path} indexes other rows than those of {reader.path}: build it again, log.index().")
    return Index(reader, basis, rows, factory)


def _checked(top: int, candidates: int | None) -> tuple[int, int]:
    top = whole("top", top, hint=": log.influence(...) gives the scores of all rows")
    candidates = max(CANDIDATES, top) if candidates is None else candidates
    return top, whole("candidates", candidates, top, hint=f", as top={top}")


def leading_directions(rows: Tensor, dimensions: int) -> Tensor:
    """Leading right singular vectors of rows (n, w), the strongest last: (d, w); d is at most the rows' rank."""
    values, mix = gram_basis((rows @ rows.T).double(), ROUNDING)
    if not len(values):
        raise ConfigError("the sampled rows are all zero, so that they have no directions: sample more.")
    return mix[:, -dimensions:].float().T @ rows


def _empty(factory: str, dimensions: int) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("an index needs faiss: pip install 'loghook[faiss]'.") from error
    try:
        return faiss.index_factory(dimensions, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(f"factory={factory!r} is none that faiss knows: take 'HNSW32' or 'Flat'.") from error
