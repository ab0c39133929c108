"""From a method's name to solvers for every layer, fitted on the log in as few scans as memory allows."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from loghook.arguments import choose, positive
from loghook.errors import ConfigError
from loghook.factors import Eigenbasis, eigenbasis
from loghook.influence.solvers import Dense, Diagonal, Identity, LowRank, Solver, nonzero, unseen_directions
from loghook.log.format import LayerSpec
from loghook.log.source import Source
from loghook.processes import all_gather, all_reduce, rank_and_size
from loghook.progress import bar

METHODS = ("dot", "cosine", "fisher", "kfac", "ekfac", "shampoo")
PLAIN = ("dot", "cosine")  # those without curvature
NORMALIZE = (None, "unit", "relatif")
FIT_BYTES = 2**30  # what dense curvature of a group of layers may take at a time


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How two gradients are compared: by which curvature, how it is damped, and what scores are divided by."""

    method: str  # one of METHODS
    damping: float = 0.1  # times the layer's mean eigenvalue
    damping_abs: float | None = None  # added as it is, instead
    normalize: str | None = None  # one of NORMALIZE; "cosine" is "dot" with "unit", unless another is asked for

    def __post_init__(self) -> None:
        choose("method", self.method, METHODS)
        choose("normalize", self.normalize, NORMALIZE)
        used = "damping" if self.damping_abs is None else "damping_abs"
        amount = positive(used, getattr(self, used), hint="; 0.1 of the mean eigenvalue is usual")
        object.__setattr__(self, used, amount)
        if self.method == "cosine" and self.normalize is None:
            object.__setattr__(self, "normalize", "unit")

    def require_fit_for(self, direction: str | None) -> None:
        """Raise where it would precondition, or normalise, questions that are preconditioned already."""
        if direction is not None and (self.method != "dot" or self.normalize):
            raise ConfigError(
                f"this query is preconditioned already ({direction}): score it with method='dot' and without "
                "normalize, since what its curvature says of samples is not known."
            )

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> tuple["Metric", dict[str, Any]]:
        """From arguments of ``Log.influence``: the metric, and the other arguments."""
        names = {field.name for field in fields(cls)}
        metric = cls(**{name: value for name, value in arguments.items() if name in names})
        return metric, {name: value for name, value in arguments.items() if name not in names}

    @property
    def plain(self) -> bool:
        """Whether there is no curvature, but plain inner products."""
        return self.method in PLAIN

    @property
    def stated(self) -> dict[str, Any]:
        """Damping as results state it: of the two kinds the one that counts, and neither without curvature."""
        relative = None if self.plain or self.damping_abs is not None else self.damping
        return {"damping": relative, "damping_abs": None if self.plain else self.damping_abs}

    def amount(self, mean_eigenvalue: float) -> float:
        """What is added to a layer's eigenvalues."""
        return self.damping * mean_eigenvalue if self.damping_abs is None else self.damping_abs


def working_dtype(reader: Source) -> torch.dtype:
    """The dtype in which rows are multiplied: float64 for a float64 log, else float32."""
    return torch.float64 if reader.dtype == torch.float64 else torch.float32


def progress(reader: Source, what: str, *, stored: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Scan this process's share of a log in the working dtype, with a bar once it takes more than two seconds.

    With ``stored`` rows come as they lie in the shard.
    """
    dtype = working_dtype(reader)
    with bar(None, what, "rows", len(reader)) as done:
        for place, block in reader.blocks(share=rank_and_size(), stored=stored):
            yield place, block if stored else block.to(dtype)
            done.update(len(block))


def solvers(reader: Source, metric: Metric, layers: Sequence[LayerSpec]) -> Iterator[dict[str, Solver]]:
    """Fit a solver for each layer: {name: solver}, in groups whose curvature fits in memory together.

    A layer without any gradient in the log, or with next to none, has none: it has nothing to say.
    """
    if metric.plain:
        yield {spec.name: Identity() for spec in layers}
    elif metric.method == "fisher":
        for group in in_memory(layers, len(reader)):
            yield _fit_fisher(reader, metric, group)
    else:
        yield _fit_diagonal(reader, metric, layers)


def _fit_diagonal(reader: Source, metric: Metric, layers: Sequence[LayerSpec]) -> dict[str, Solver]:
    shampoo, kfac = metric.method == "shampoo", metric.method == "kfac"
    bases = _row_bases(reader, layers) if shampoo else _token_bases(reader, layers)
    # Where the damping may be so small that what is divided by it is rounding. Float64 has next to none, and rows of
    # fewer bits have as much of it in the eigenvalues.
    small_damping = metric.damping_abs is not None or metric.damping < 1e-2
    leaves_out_unseen = small_damping and reader.dtype == torch.float32 and not reader.codec.coded
    kind = "shampoo" if shampoo else "ekfac"
    corrected = {} if kfac else _corrected_eigenvalues(reader, kind, bases)
    peaks = _peaks(reader, kind, bases) if leaves_out_unseen else {}
    fitted: dict[str, Solver] = {}
    for name, basis in bases.items():
        values = basis.products if kfac else corrected[name]
        if float(values.sum()) > _vanishing(reader):
            unseen = unseen_directions(peaks[name]) if leaves_out_unseen else None
            fitted[name] = Diagonal(basis, values, metric.amount(float(values.mean())), unseen)
    return fitted


def _vanishing(reader: Source) -> float:
    """The mean square of rows so small, 1e-35, that a question divided by it does not fit in float32."""
    return 0.0 if working_dtype(reader) == torch.float64 else 1e-70


def _token_bases(reader: Source, layers: Sequence[LayerSpec]) -> dict[str, Eigenbasis]:
    """Eigenbases from the streamed statistics of tokens, without the layers of which no token was counted."""
    moments = reader.moments()
    counted = [spec.name for spec in layers if moments[reader.layout.moments[spec.name][2]] > 0]
    if not counted:
        raise ConfigError(
            "no token was counted while logging (a mask that is all zero, or gradients whose squares do not fit in "
            "float32?), so there are no Kronecker factors: use method='shampoo', 'fisher', 'dot' or 'cosine'."
        )
    missing = [name for name in counted if ("basis", name) not in reader.cache]
    for name in bar(missing, "eigenbases", "layers"):
        reader.cache["basis", name] = eigenbasis(reader.layout, moments, name)
    return {name: reader.cache["basis", name] for name in counted}


def _row_bases(reader: Source, layers: Sequence[LayerSpec]) -> dict[str, Eigenbasis]:
    """Shampoo's eigenbases (Gupta et al. 2018): of the means over rows of ``G^T G`` and ``G G^T``."""
    missing = [spec for spec in layers if ("row basis", spec.name) not in reader.cache]
    if missing:
        columns = reader.layout.columns
        sums = {s.name: [torch.zeros(k, k, dtype=torch.float64) for k in (s.k_in, s.k_out)] for s in missing}
        for _, block in progress(reader, "row covariances"):
            for spec in missing:
                rows = block[:, columns[spec.name]].double().unflatten(1, (spec.k_out, spec.k_in))
                for total, side in zip(sums[spec.name], (rows.flatten(0, 1), rows.mT.flatten(0, 1)), strict=True):
                    total.addmm_(side.T, side)
        for name, sides in sums.items():
            reader.cache["row basis", name] = Eigenbasis.of_moments(*(all_reduce(side) / len(reader) for side in sides))
    return {spec.name: reader.cache["row basis", spec.name] for spec in layers}


def _corrected_eigenvalues(reader: Source, kind: str, bases: dict[str, Eigenbasis]) -> dict[str, Tensor]:
    """EK-FAC's eigenvalues, means over rows of ``(Q_S^T G Q_A)^2`` (George et al. 2018): (k_out, k_in) float64."""
    missing = {name: basis for name, basis in bases.items() if (kind, name) not in reader.cache}
    sums = {name: torch.zeros_like(basis.products) for name, basis in missing.items()}
    for name, squares in _squares(reader, missing, "eigenvalues"):
        sums[name] += squares.sum(0)
    for name, total in sums.items():
        reader.cache[kind, name] = all_reduce(total) / len(reader)
    return {name: reader.cache[kind, name] for name in bases}


def _peaks(reader: Source, kind: str, bases: dict[str, Eigenbasis]) -> dict[str, Tensor]:
    """The largest square that any row has, at unit norm, in each direction of a basis: (k_out, k_in) float64."""
    missing = {name: basis for name, basis in bases.items() if (kind, "peaks", name) not in reader.cache}
    peaks = {name: torch.zeros_like(basis.products) for name, basis in missing.items()}
    for name, squares in _squares(reader, missing, "directions"):
        squares /= nonzero(squares.sum((1, 2), keepdim=True))
        torch.maximum(peaks[name], squares.amax(0), out=peaks[name])
    for name, largest in peaks.items():
        reader.cache[kind, "peaks", name] = torch.stack(all_gather(largest)).amax(0)
    return {name: reader.cache[kind, "peaks", name] for name in bases}


def _squares(reader: Source, bases: dict[str, Eigenbasis], what: str) -> Iterator[tuple[str, Tensor]]:
    """Walk through the rows; of each block and layer the squares in its eigenbasis, (n, k_out, k_in) float64."""
    for _, block in progress(reader, what) if bases else ():
        for name, basis in bases.items():
            rows = block[:, reader.layout.columns[name]].unflatten(1, basis.products.shape)
            yield name, basis.rotate(rows).double().square_()  # in float32 those of 1e-23 are 0


def _fit_fisher(reader: Source, metric: Metric, group: Sequence[LayerSpec]) -> dict[str, Solver]:
    columns, few = reader.layout.columns, {spec.name for spec in group if len(reader) < spec.width}
    # All rows of a layer where they are few, else the sum of their outer products.
    sums = {s.name: torch.zeros(min(len(reader), s.width), s.width, dtype=torch.float64) for s in group}
    for place, block in progress(reader, "Fisher"):
        for name, total in sums.items():
            rows = block[:, columns[name]].double()
            if name in few:
                total[place] = rows
            else:
                total.addmm_(rows.T, rows)
    fitted: dict[str, Solver] = {}
    for spec in group:
        total = all_reduce(sums.pop(spec.name))
        # The mean squared norm of a row; the mean eigenvalue is this trace over the width.
        trace = float(total.square().sum() if spec.name in few else total.trace()) / len(reader)
        if trace <= _vanishing(reader):
            continue
        damping = metric.amount(trace / spec.width)
        fitted[spec.name] = LowRank(total, damping) if spec.name in few else Dense(total.div_(len(reader)), damping)
    return fitted


def in_memory(layers: Sequence[LayerSpec], rows: int) -> Iterator[list[LayerSpec]]:
    """Split layers so that a group's matrices, (min(w, N), w) in float64 and their factors, fit in FIT_BYTES."""
    group: list[LayerSpec] = []
    size = 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for spec in layers:
        need = 2 * 8 * spec.width * min(spec.width, rows)
        if need > memory:
            raise ConfigError(
                f"the Fisher of layer {spec.name!r} with {spec.width:,} values a row takes {need / 1e9:,.0f} GB, more "
                "than this machine has: use method='ekfac', leave the layer out with layers=, or log at a smaller rank."
            )
        if group and size + need > FIT_BYTES:
            yield group
            group, size = [], 0
        group.append(spec)
        size += need
    if group:
        yield group
