"""``Scoring``: one pass over training samples that scores each against preconditioned questions as it goes by."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loghook.capture.batch import Blocks, Given, Ids, check_ids
from loghook.capture.whole import Products
from loghook.errors import StateError
from loghook.influence.precondition import Curvature
from loghook.influence.scores import Scores
from loghook.influence.share import share
from loghook.log.finite import not_finite
from loghook.log.query import Query

if TYPE_CHECKING:
    from loghook.whole.fit import Fit


class Scoring(Blocks):
    """A scoring pass: call it around each batch's forward and backward, then take ``scores()``.

    Attributes:
        lost: with low-rank questions, the largest share of a question's squared norm that the approximation left out
            in any layer; else None.
    """

    def __init__(
        self,
        fit: "Fit",
        query: Query,
        held: Mapping[str, tuple[Tensor, Tensor | None]],
        curvature: Curvature,
        *,
        per_layer: bool,
        lost: float | None,
    ) -> None:
        """See ``Fit.score``."""
        self._fit, self._query, self._curvature, self._per_layer, self.lost = fit, query, curvature, per_layer, lost
        self._job = Products(held, len(query))
        self._seen: dict[int | str, None] = {}
        self._parts: list[Tensor] = []

    @contextmanager
    def _block(self, data_id: Ids, given: Given) -> Iterator[None]:
        """Score the samples of one batch; an id that comes again is scored once."""
        ids = check_ids(data_id)
        first = [i for i, one in enumerate(ids) if one not in self._seen and one not in ids[:i]]
        with self._fit._capture(len(ids), given, job=self._job) as captured:
            yield
        results = captured[0].results
        zero = torch.zeros(len(ids), self._job.count)
        parts = torch.stack([results.get(name, zero).float().cpu() for name in self._fit.layers])  # (L, B, Q)
        total = parts if self._per_layer else parts.sum(0, keepdim=True)
        if not bool(torch.isfinite(total).all()):
            raise not_finite(ids, total.sum(0))
        self._seen.update(dict.fromkeys(ids[i] for i in first))
        self._parts.append(total[:, first])

    def scores(self) -> Scores:
        """Return the scores of all samples so far, of all processes: the same on each of them."""
        values = torch.cat(self._parts, 1) if self._parts else None
        ids: list[Any] = list(self._seen)
        if share()[1] > 1:
            boxes: list[Any] = [None] * share()[1]
            torch.distributed.all_gather_object(boxes, (ids, values))
            ids = [i for part, _ in boxes for i in part]
            tensors = [v for _, v in boxes if v is not None]
            values = torch.cat(tensors, 1) if tensors else None
            first = [place for i, place in {i: n for n, i in reversed(list(enumerate(ids)))}.items()]
            first.sort()
            ids, values = [ids[n] for n in first], None if values is None else values[:, first]
        if values is None:
            raise StateError("nothing was scored: run the loop with `with scoring(data_id=...):` first.")
        by_layer = values.transpose(1, 2).numpy()
        curved = self._curvature.method != "dot"
        relative = curved and self._curvature.damping_abs is None
        return Scores(
            values=np.ascontiguousarray(by_layer.sum(0)),
            query_ids=self._query.data_ids,
            data_ids=ids,
            places=None,
            by_layer=np.ascontiguousarray(by_layer) if self._per_layer else None,
            layers=self._fit.layers,
            method=f"{self._query.direction or self._curvature.method} (whole gradients)",
            normalize=None,
            damping=self._curvature.damping if relative else None,
            damping_abs=self._curvature.damping_abs if curved else None,
            fingerprint=self._query.fingerprint,
            log=str(self._fit.path),
        )


def low_rank(matrices_QOI: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Best approximation of a rank: left (Q, O, r), right (Q, r, I), and the largest share of a squared norm lost."""
    u, s, v = torch.linalg.svd(matrices_QOI, full_matrices=False)
    total = s.square().sum(1)
    lost = s[:, rank:].square().sum(1) / torch.where(total > 0, total, torch.ones_like(total))
    root = s[:, None, :rank].sqrt()
    return u[:, :, :rank] * root, v[:, :rank] * root.transpose(1, 2), float(lost.max())
