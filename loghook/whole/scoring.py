"""``Scoring``: one pass over training samples that scores each against preconditioned questions as it goes by."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loghook.capture.batch import Blocks, Given, Ids, check_ids
from loghook.capture.whole import Products, Rotation
from loghook.errors import CheckpointWarning, ConfigError, NotFiniteError, StateError, some, warn
from loghook.factors import Eigenbasis
from loghook.influence.precondition import Metric
from loghook.influence.scores import Scores
from loghook.influence.solvers import Diagonal, nonzero
from loghook.log.format import differ
from loghook.log.query import Query, require_one_query
from loghook.processes import all_gather
from loghook.project.projection import Side

if TYPE_CHECKING:
    from loghook.whole.fit import Fit

# What functions of a user's yield: ids and batch, and perhaps what the batch's blocks are opened with besides.
Walk = Iterable[tuple[Ids, Any] | tuple[Ids, Any, Mapping[str, Any]]]


def walked(name: str, walk: Walk, *, may_be_empty: bool = False) -> Iterator[tuple[Ids, Any, dict[str, Any]]]:
    """Yield ids, batch and arguments of a block of each batch; ``name`` is that of the function, for errors."""
    empty = True
    for item in walk:
        ids, batch, given = (*item, {})[:3] if isinstance(item, tuple | list) and len(item) in (2, 3) else (None,) * 3
        if not isinstance(given, Mapping) or given.keys() - {"mask", "scale", "segments"}:
            raise ConfigError(
                f"{name}() yields {item!r:.60}, where (ids, batch) is wanted, or (ids, batch, arguments of the block), "
                "which are mask, scale and segments, as in (ids, batch, {'mask': mask})."
            )
        yield ids, batch, dict(given)
        empty = False
    if empty and not may_be_empty:
        raise ConfigError(f"{name}() yields nothing: it is called several times, so make the loader anew in it.")


class Scoring(Blocks):
    """A scoring pass: call it around each batch's forward and backward, then take ``scores()``.

    Attributes:
        lost: with low-rank questions, the largest share of its squared norm that the approximation left out of any
            question in any layer; else None.
    """

    def __init__(
        self,
        fit: "Fit",
        query: Query | None,
        metric: Metric,
        *,
        rank: int | None = None,
        per_layer: bool = False,
    ) -> None:
        """Without a query each sample is scored against itself."""
        self._fit, self._query, self._metric, self._per_layer = fit, query, metric, per_layer
        self._normalize = None if query is None else metric.normalize
        # What the samples should be scored at; None for directions of SOURCE, which belong to other checkpoints.
        of_factors = None if metric.plain else fit._require_store().parameters
        self._parameters = of_factors if query is None else query.parameters
        self._ids: list[int | str] = []
        self._batches: list[Tensor] = []  # (layers or 1, samples, questions), each sample's own last where it is wanted
        self._job, self.lost, self._norms = _prepare(fit, query, metric, rank, self._normalize)

    @contextmanager
    def _block(self, data_id: Ids, given: Given) -> Iterator[None]:
        """Score the samples of one batch; of an id that comes again the first scores count."""
        ids = check_ids(data_id)
        if not self._batches and self._parameters and differ(self._fit.digest(), self._parameters):
            warn(
                "samples are scored with other parameter values than the questions (or factors) were made with: load "
                "that checkpoint first.",
                CheckpointWarning,
            )
        with self._fit._capture(len(ids), given, self._job) as captured:
            yield
        results = captured[0]
        device, _ = self._fit._layers[0].device_and_dtype()
        asleep = torch.zeros(self._job.shape(self._fit._layers[0], len(ids)), device=device)
        by_layer = [results.get(name, asleep).to(device, torch.float32) for name in self._fit.layers]
        scores = torch.stack(by_layer).cpu()
        if not self._per_layer:
            scores = scores.sum(0, keepdim=True)
        if not bool(torch.isfinite(scores).all()):
            odd = [ids[i] for i in (~torch.isfinite(scores.sum((0, 2)))).nonzero().flatten().tolist()]
            raise NotFiniteError(
                f"scores of {len(odd)} samples are not finite (data_id {some(odd, 5)}), and this batch was not "
                "kept: look at the loss of these samples; take a larger damping where there is next to no curvature.",
                odd,
            )
        self._ids += ids
        self._batches.append(scores)

    def scores(self) -> Scores:
        """The scores of all samples so far, of all processes: the same on each of them."""
        if self._query is not None:
            require_one_query(self._query, "the samples")
        processes = all_gather((self._ids, self._batches))
        batches = [scores for _, batches in processes for scores in batches]
        if not batches:
            raise StateError("nothing was scored: run the loop with `with scoring(data_id=...):` first.")
        places: dict[Any, int] = {}
        for place, data_id in enumerate(data_id for ids, _ in processes for data_id in ids):
            places.setdefault(data_id, place)
        by_layer = torch.cat(batches, 1)[:, list(places.values())].transpose(1, 2)
        if self._normalize is not None:  # without questions there is nothing but each sample's own
            by_layer, squares = by_layer[:, :-1], by_layer[:, -1:].sum(0)
            norms = squares.clamp(min=0).sqrt() * (1 if self._norms is None else self._norms[:, None])
            by_layer = by_layer / nonzero(norms)
        direction = None if self._query is None else self._query.direction
        return Scores(
            values=np.ascontiguousarray(by_layer.sum(0).numpy()),
            query_ids=["self"] if self._query is None else self._query.data_ids,
            data_ids=list(places),
            by_layer=np.ascontiguousarray(by_layer.numpy()) if self._per_layer else None,
            layers=self._fit.layers,
            method=f"{direction or self._metric.method} (whole gradients)",
            normalize=self._normalize,
            **self._metric.stated,
            fingerprint=self._fit.fingerprint,
            log=str(self._fit.path),
        )


def _prepare(
    fit: "Fit", query: Query | None, metric: Metric, rank: int | None, normalize: str | None
) -> tuple[Products, float | None, Tensor | None]:
    """What the taps compute, what low-rank questions lost, and for "unit" the roots of <q, H^-1 q>, (Q,) float32."""
    own = query is None or normalize is not None  # <G, H^-1 G> of each sample is wanted too
    count = 0 if query is None else len(query)
    solvers, columns = fit.solvers(metric), fit._layout.columns
    questions: dict[str, tuple[Tensor, Tensor | None]] = {}
    inverse: dict[str, Tensor] = {}
    lost: list[float] = []
    squares = torch.zeros(count, dtype=torch.float64, device="cpu")
    for layer in fit._layers:
        shape, (device, dtype) = (layer.spec.k_out, layer.spec.k_in), layer.device_and_dtype()
        rows = torch.empty(0, layer.spec.width, device="cpu") if query is None else query.matrix[:, columns[layer.name]]
        solver = solvers[layer.name]
        if device.type != "cpu" and isinstance(solver, Diagonal):
            # To rotate wide questions takes longer than a pass on a processor: they go where the layer computes.
            rows = rows.to(device)
            solver = solver.to(rows)
        if normalize == "unit":
            squares += solver.quadratic(rows).cpu()
        if own and isinstance(solver, Diagonal):  # gradients are squared in the eigenbasis: questions go there too
            matrices, inverse[layer.name] = solver.rotated(rows), solver.inverse.to(device, dtype)
        else:
            matrices = solver.apply(rows).unflatten(1, shape)
            if own:
                inverse[layer.name] = torch.ones(shape, device=device, dtype=dtype)
        left, right, error = (matrices, None, 0.0) if rank is None else low_rank(matrices, rank)
        questions[layer.name] = left.to(device, dtype), None if right is None else right.to(device, dtype)
        lost.append(error)
    bases = {name: solver.basis for name, solver in solvers.items() if isinstance(solver, Diagonal)}
    job = Products(questions, count, inverse, rotations(bases) or None) if own else Products(questions, count)
    norms = squares.clamp(min=0).sqrt().float() if normalize == "unit" else None
    return job, None if rank is None else max(lost), norms


def rotations(bases: Mapping[str, Eigenbasis]) -> dict[str, Rotation]:
    """What rotates inputs and output gradients into the eigenbases; layers of one input share theirs."""
    found: dict[str, Rotation] = {}
    recent: list[Side] = []
    for name, basis in bases.items():
        inputs, outputs = ([Side(len(q), q.T.float().contiguous()) for q in qs] for qs in (basis.inputs, basis.outputs))
        if len(inputs) > 1:
            found[name] = Rotation(Side(sum(side.width for side in inputs), None), [*outputs, *inputs])
            continue
        (own,) = inputs
        same = (s for s in recent if s.width == own.width and torch.equal(s.matrix, own.matrix))  # type: ignore[arg-type]
        own = next(same, own)
        recent = [*recent[-2:], own]
        found[name] = Rotation(own, outputs)
    return found


def low_rank(matrices_QOI: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Best approximation of a rank: left (Q, O, r), right (Q, r, I), and the largest share of a squared norm lost."""
    if matrices_QOI.device.type not in ("cpu", "cuda"):  # Apple's have no decompositions
        matrices_QOI = matrices_QOI.cpu()
    u, s, v = torch.linalg.svd(matrices_QOI, full_matrices=False)
    total = s.square().sum(1)
    lost = s[:, rank:].square().sum(1) / nonzero(total)
    root = s[:, None, :rank].sqrt()
    return u[:, :, :rank] * root, v[:, :rank] * root.transpose(1, 2), float(lost.max())
