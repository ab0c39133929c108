"""Statistics and scores of whole gradients, gathered in the backward pass like rows, and no gradient kept.

Three jobs that a block may do instead of logging rows: second moments of inputs and output gradients; EK-FAC's
corrected eigenvalues; and inner products of every sample's gradient with preconditioned queries. Each is what one leaf
of a layer receives as its gradient (see ``loghook.capture.tap``), so that they hold wherever rows do.

Shape suffixes as in ``loghook.project.outer``; Q queries, r their rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from loghook.capture.layers import Layer, Slots
from loghook.capture.tap import alias, by_document, moments, output_gradient, wide_context
from loghook.project.blocks import second_moment_blocks, square_size, take_blocks
from loghook.project.outer import at_a_time, gradients, project_output
from loghook.project.projection import Side

CACHE_BYTES = 2**20  # of gradients at a time on a processor that are read once: they are squared where they were made


class WholeTap(torch.autograd.Function):
    """Identity on a layer's output whose backward delivers what a job makes of inputs and output gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        kind: str,  # of job
        weight_BS: Tensor | None,  # like the next three as in ``Tap.forward``
        documents_DL: Tensor | None,
        channel_dim: int,
        batch_dim: int,
        leaf: Tensor,
        call_slot: Tensor | None,  # leaf (1,) of a job that needs all calls at once
        slots: Slots | None,  # to leave calls to, or None where the call is compiled
        *held: Tensor | None,  # what the job needs besides
    ) -> Tensor:
        ctx.save_for_backward(x, weight_BS, documents_DL, *held)
        ctx.kind, ctx.dims, ctx.wide, ctx.slots = kind, (channel_dim, batch_dim), leaf.dtype, slots
        return alias(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, weight_BS, documents_DL, *held = ctx.saved_tensors
        need_calls, delivered, told = ctx.needs_input_grad[8], None, None
        with wide_context(g.device.type):
            g_BSO = output_gradient(ctx.dims, g, x).to(ctx.wide)
            x = x.to(ctx.wide)
            if ctx.kind == "covariance":
                delivered = moments(g_BSO, x, weight_BS, None, take_blocks, second_moment_blocks)
            else:
                g_BSO, x = by_document(documents_DL, g_BSO, x)
                make = partial(_squares if ctx.kind == "eigenvalues" else _products, held=held)
                if need_calls and ctx.slots is not None and ctx.slots.deliveries.several_calls:
                    ctx.slots.offer(Call(make, g_BSO.clone(), x.clone()))  # the user may change what these are views of
                else:
                    delivered = make(g_BSO, x)
                if need_calls and (ctx.slots is None or delivered is None):
                    told = x.new_ones(1)
        return (g, None, None, None, None, None, None, delivered, told, None, *(None for _ in held))


class Call(NamedTuple):
    make: Callable[[Tensor, Tensor], Tensor]  # (output gradients, inputs) -> what the job makes of them
    g_BSO: Tensor
    x: Tensor


class Together:
    """Calls of layers that are called several times, until what is no sum over calls can be made of all of them."""

    def __init__(self) -> None:
        self._waiting: dict[Slots, list[Call]] = {}

    def add(self, slots: Slots, call: Call) -> None:
        self._waiting.setdefault(slots, []).append(call)

    def form(self) -> None:
        """Take the tokens of a sample's calls for tokens of one call."""
        for slots, calls in self._waiting.items():
            with torch.no_grad(), wide_context(calls[0].x.device.type):
                slots.rows = calls[0].make(torch.cat([c.g_BSO for c in calls], 1), torch.cat([c.x for c in calls], 1))
        self._waiting = {}


def _squares(g_BSO: Tensor, x: Tensor, held: Sequence[Tensor | None]) -> Tensor:
    """Sum over samples, those that are kept, of the squares of their gradients: (O, I)."""
    p_out, keep_B = held
    small = g_BSO.device.type == "cpu" and not torch.compiler.is_compiling()  # the compiler unrolls the loop
    if x.dim() == 3:
        g_BSO, p_out = project_output(g_BSO, p_out), None
    total = None
    for part, rows in gradients(g_BSO, x, p_out, CACHE_BYTES if small else None):
        squares = rows.square_() if keep_B is None else rows.square_() * keep_B[part, None, None].to(rows.dtype)
        total = squares.sum(0) if total is None else total + squares.sum(0)
    assert total is not None
    return total


def _products(g_BSO: Tensor, x: Tensor, held: Sequence[Tensor | None]) -> Tensor:
    """Inner products of each sample's gradient with each query: (B, Q), or (B, Q + 1) with the sample's own last.

    Inputs are (B, S, I), or (B, S, G, I) in groups. Held are p_out: None, or what rotates output gradients (inputs and
    queries are rotated already); inverse: None, or (O, I), with which a sample's own weights its gradient's squares;
    left and right: queries (Q, O, I) and None, or their halves (Q, O, r) and (Q, r, I).
    """
    p_out, inverse, left, right = held
    assert left is not None
    S, (Q, outputs, r), inputs = x.shape[1], left.shape, x.shape[-1]
    scores = x.new_empty(len(x), Q + (inverse is not None))
    if x.dim() == 3:
        g_BSO, p_out = project_output(g_BSO, p_out), None
        halves = outputs * inputs if right is None else r * (outputs + inputs)
        if inverse is None and S * Q * halves <= (S + Q) * outputs * inputs:
            # <sum_s g_s x_s^T, L R> = sum_s (g_s L) . (R x_s): where it is less arithmetic, no gradient is formed.
            wide = left.transpose(0, 1).flatten(1)
            step = at_a_time(S * Q * r, x)
            for g_bSO, x_bSI, part in zip(g_BSO.split(step), x.split(step), scores.split(step), strict=True):
                gl_bSQr = (g_bSO @ wide).unflatten(2, (Q, r))
                rx_bSQr = x_bSI[:, :, None] if right is None else (x_bSI @ right.flatten(0, 1).T).unflatten(2, (Q, r))
                part.copy_((gl_bSQr * rx_bSQr).sum((1, 3)))
            return scores
    queries = (left if right is None else left @ right).flatten(1)
    for place, rows in gradients(g_BSO, x, p_out):
        scores[place, :Q] = rows.flatten(1) @ queries.T
        if inverse is not None:
            scores[place, Q] = rows.square_().flatten(1) @ inverse.flatten()
    return scores


class Job:
    """What a block computes of each layer instead of rows; unless a job says so, nothing is projected."""

    kind: ClassVar[str]  # which of them it is, as ``WholeTap`` takes it
    at_once = False  # whether what it makes of a layer's gradient is no sum over the layer's calls
    sums = True  # whether it adds samples up

    def shape(self, layer: Layer, size: int) -> tuple[int, ...]:
        """Shape of what the layer delivers in a block of ``size`` rows."""
        raise NotImplementedError

    def finish(self, layer: Layer, delivered: Tensor, scale: float | Tensor) -> Tensor:
        """Multiply what was delivered as it follows from the gradients' scale."""
        raise NotImplementedError

    def sides(self, layer: Layer) -> tuple[Side, Side]:
        return Side(layer.input_side.width, None), Side(layer.output_side.width, None)

    def held(self, layer: Layer, slots: Slots) -> Sequence[Tensor | None]:
        """What the tap needs besides inputs and output gradients."""
        return ()

    def tap(
        self, layer: Layer, slots: Slots, y: Tensor, x: Tensor, weight: Tensor | None, documents: Tensor | None
    ) -> Tensor:
        dims, held, leaves = (layer.adapter.channel_dim, layer.batch_dim), self.held(layer, slots), slots.leaves
        to = None if torch.compiler.is_compiling() else slots
        return WholeTap.apply(y, x, self.kind, weight, documents, *dims, leaves.rows, leaves.calls, to, *held)


class Covariance(Job):
    """Second moments of every layer's inputs (with the bias column) and output gradients, by blocks where wide."""

    kind = "covariance"

    def shape(self, layer: Layer, size: int) -> tuple[int, ...]:
        return (sum(square_size(side.width) for side in layer.sides) + 1,)  # blocks of both, and the number of tokens

    def finish(self, layer: Layer, delivered: Tensor, scale: float | Tensor) -> Tensor:
        delivered[square_size(layer.input_side.width) : -1] *= scale**2  # output gradients alone have it
        return delivered


@dataclass(frozen=True)
class Eigenvalues(Job):
    """EK-FAC's corrected eigenvalues: sums over samples of ``(Q_S^T G Q_A)^2`` (George et al. 2018)."""

    kind, at_once = "eigenvalues", True
    bases: Mapping[str, tuple[Side, Side]]  # {layer: (Q_A^T as the input side, Q_S^T as the output side)}

    def sides(self, layer: Layer) -> tuple[Side, Side]:
        return self.bases[layer.name]

    def shape(self, layer: Layer, size: int) -> tuple[int, ...]:
        return layer.output_side.width, layer.input_side.width

    def held(self, layer: Layer, slots: Slots) -> Sequence[Tensor | None]:
        return slots.output_side.matrix, slots.kept

    def finish(self, layer: Layer, delivered: Tensor, scale: float | Tensor) -> Tensor:
        return delivered.mul_(scale**2)


@dataclass(frozen=True)
class Products(Job):
    """Inner products of each sample's gradient with queries and, on request, with itself."""

    kind, sums = "products", False
    queries: Mapping[str, tuple[Tensor, Tensor | None]]  # {layer: (left, right)}, see ``_products``
    count: int  # how many queries there are, Q
    inverse: Mapping[str, Tensor] | None = None  # {layer: inverse eigenvalues (O, I)}: each sample's own is wanted too
    bases: Mapping[str, tuple[Side, Side]] | None = None  # rotations into the basis that queries and inverse are in

    def sides(self, layer: Layer) -> tuple[Side, Side]:
        return super().sides(layer) if self.bases is None else self.bases[layer.name]

    @property
    def at_once(self) -> bool:  # type: ignore[override]
        return self.inverse is not None  # scores add up over calls; a sample's own does not

    def shape(self, layer: Layer, size: int) -> tuple[int, ...]:
        return size, self.count + (self.inverse is not None)

    def held(self, layer: Layer, slots: Slots) -> Sequence[Tensor | None]:
        inverse = None if self.inverse is None else self.inverse[layer.name]
        needed = (slots.output_side.matrix, inverse, *self.queries[layer.name])
        return [None if one is None else one.to(slots.leaves.rows) for one in needed]

    def finish(self, layer: Layer, delivered: Tensor, scale: float | Tensor) -> Tensor:
        delivered[:, self.count :].mul_(scale)  # a sample's own is of its gradient twice
        return delivered.mul_(scale)
