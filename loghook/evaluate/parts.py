"""A log as a smaller rank would have made it: every projected side cut to some of its coordinates."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from loghook.log.format import LayerSpec, Layout, Made
from loghook.log.query import Query
from loghook.log.reader import Reader


def projected(spec: LayerSpec) -> tuple[bool, bool]:
    """Whether a layer's output side and its input side are projected; a side that is not has no seed."""
    return spec.k_out < spec.out_features, spec.k_in < spec.in_features + spec.bias


class Part(Reader):
    """One of several parts of a log's coordinates, which scores like a log; its curvature is fitted anew.

    The coordinates of a random projection are exchangeable, so that a part is a projection of a smaller rank, and
    disjoint parts are (nearly) independent ones. Values are scaled so that inner products keep their mean.
    """

    def __init__(self, whole: Reader, part: int, parts: int, seed: int = 0) -> None:
        """Take the ``part``-th of ``parts`` equal shares of every projected side; ``seed`` deals them out."""
        self.path, self.manifest, self.data_ids, self.cache = whole.path, whole.manifest, whole.data_ids, {}
        self._whole, self._sides, self.warned = whole, {}, True  # the whole log has said that it is not finished
        specs, columns, scale = [], [], []
        for spec in whole.layout.layers:
            start = whole.layout.kinds["gradients"][spec.name].start
            # Sides of equal width are dealt alike: layers that share an input projection keep sharing it.
            out, into = (
                np.sort(np.random.default_rng([seed, k]).permutation(k)[part::parts]) if cut else np.arange(k)
                for k, cut in zip((spec.k_out, spec.k_in), projected(spec), strict=True)
            )
            specs.append(replace(spec, k_out=len(out), k_in=len(into), activations=None, output_gradients=None))
            columns.append((start + out[:, None] * spec.k_in + into).reshape(-1))
            scale.append(np.full(len(columns[-1]), (spec.width / len(columns[-1])) ** 0.5))
            self._sides[spec.name] = out, into
        self.layout = Layout(specs)
        self.codec = self.layout.codec("float64" if whole.dtype == torch.float64 else "float32")  # blocks come decoded
        self._columns, self._scale = torch.from_numpy(np.concatenate(columns)), torch.from_numpy(np.concatenate(scale))

    @property
    def fingerprint(self) -> str:
        """Of the part's layers, so that only a query that was cut alike fits."""
        return self.query_like([]).fingerprint

    @property
    def seal(self) -> None:
        """No name: what is computed from a part is not kept with the log."""

    def query(self, query: Query) -> Query:
        """Cut a query alike."""
        return self.query_like(query.data_ids, self._cut(query.matrix))

    def query_like(self, ids: list[int] | list[str], rows: Tensor | None = None) -> Query:
        """Make a query of this part's layers from rows that are already cut."""
        made = Query(ids)
        rows = torch.zeros(0, self.layout.width) if rows is None else rows
        made.fill(rows, Made(self.layout.layers, "part", self.manifest.seed))
        return made

    def blocks(
        self, rows: int | None = None, share: tuple[int, int] = (0, 1), *, stored: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """As ``Reader.blocks``, cut; what is cut is never stored."""
        for place, block in self._whole.blocks(rows, share):
            yield place, self._cut(block)

    def moments(self) -> np.ndarray:
        """As ``Reader.moments``, cut."""
        theirs, mine = self._whole.moments(), np.zeros(self.layout.moments_width)
        for name, (out, into) in self._sides.items():
            whole, part = self._whole.layout.moments[name], self.layout.moments[name]
            for source, target, kept in ((whole[0], part[0], into), (whole[1], part[1], out)):
                k = round((source.stop - source.start) ** 0.5)
                mine[target] = theirs[source].reshape(k, k)[np.ix_(kept, kept)].reshape(-1)
            mine[part[2]] = theirs[whole[2]]
        return mine

    def _cut(self, rows: Tensor) -> Tensor:
        return rows[:, self._columns] * self._scale.to(rows.dtype)
