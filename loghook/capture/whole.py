"""Jobs on whole gradients: their statistics and scores, and no gradient kept.

Shape suffixes as in ``loghook.project.outer``; Q queries, r their rank.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loghook.capture.jobs import Job, Place, scale_for
from loghook.capture.layers import Layer, Leaves, Slots, arrived, deliver
from loghook.capture.work import Call, Held, by_document, by_row, sum_moments
from loghook.project.blocks import each_block, second_moment_blocks, square_size, take_blocks
from loghook.project.linear import linear, widened
from loghook.project.outer import at_a_time, gradients
from loghook.project.projection import Side

FEW = 4  # queries that are quicker one by one than as a batch of small products
CACHE_BYTES = 2**20  # of gradients at a time on a processor that are read once: they are squared where they were made


class Whole(Job[dict[str, Tensor]]):
    """A job on whole gradients; its result is {layer name: what was delivered}, without layers that sleep."""

    def shape(self, layer: Layer, size: int) -> tuple[int, ...]:
        """Shape of what the layer delivers in a block of ``size`` rows."""
        raise NotImplementedError

    def leaves(self, layer: Layer, size: int, leaf: Callable[..., Tensor]) -> Leaves:
        return Leaves(leaf(*self.shape(layer, size)), calls=leaf(1) if self.at_once else None)

    def finish(self, layer: Layer, delivered: Tensor, scale: float | Tensor) -> Tensor:
        """Multiply what was delivered as it follows from the gradients' scale."""
        raise NotImplementedError

    def defer(self, slots: Slots, call: Call) -> tuple[Hashable, Call] | None:
        """A layer's calls wait for one another where the work needs all and there may be several.

        A pass without gradients counts as one that may come again in a checkpoint.
        """
        if not self.at_once or not slots.several_calls:
            return None
        g_BSO, x = by_row(call, slots.place.dtype)
        return id(slots), Call(g_BSO.clone(), x.clone())  # the user may change what these are views of

    def form(self, group: Sequence[tuple[Slots, Call]]) -> None:
        """Take the tokens of a sample's calls for tokens of one call."""
        slots, calls = group[0][0], [call for _, call in group]
        together = Call(torch.cat([c.g_BSO for c in calls], 1), torch.cat([c.x for c in calls], 1))
        deliver(slots.leaves.main, self.work(together, slots.held, slots.place.dtype, False)[0])

    def collect(self, opened: Sequence[Slots], scale: float | Tensor) -> dict[str, Tensor]:
        delivered = {s.layer: arrived(s.leaves.main) for s in opened if s.delivered}
        return {layer.name: self.finish(layer, t, scale_for(t, scale)) for layer, t in delivered.items()}


class Covariance(Whole):
    """Second moments of every layer's inputs (with the bias column) and output gradients, by blocks where wide."""

    kind = "covariance"

    @staticmethod
    def work(call: Call, held: Held, wide: torch.dtype, moments: bool) -> tuple[Tensor, None]:
        (g_BSO,), (x,) = widened(wide, call.g_BSO), widened(wide, call.x)
        if x.dim() > 3:
            g_BSO, x = g_BSO.to(wide), x.to(wide)
        return sum_moments(g_BSO, x, call.weight_BS, None, wide, take_blocks, second_moment_blocks), None

    def shape(self, layer: Layer, size: int) -> tuple[int, ...]:
        return (sum(square_size(side.width) for side in layer.sides) + 1,)  # blocks of both, and the number of tokens

    def finish(self, layer: Layer, delivered: Tensor, scale: float | Tensor) -> Tensor:
        delivered[square_size(layer.input_side.width) : -1] *= scale**2  # output gradients alone have it
        return delivered


class Rotation(NamedTuple):
    """What rotates a layer's inputs and output gradients into its eigenbasis: Q_A^T and Q_S^T, wide ones in blocks."""

    inputs: Side  # Q_A^T where it is of one block; then layers that read the same input share the product
    blocks: Sequence[Side]  # those of Q_S^T, and of Q_A^T where there are several

    def held(self, device: torch.device) -> list[Tensor | None]:
        return [side.to(device).matrix for side in self.blocks]


def rotated(g_BSO: Tensor, x: Tensor, held: Held) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rotate tokens by what a ``Rotation`` holds; and Q_S^T where gradients are to be rotated, as in groups."""
    blocks = [block for block in held if block is not None]
    count, width = 0, 0
    while width < g_BSO.shape[-1] and blocks:
        count, width = count + 1, width + len(blocks[count])
    outputs, inputs = blocks[:count], blocks[count:]
    if inputs:
        x = each_block(linear, x, inputs, -1)
    if not outputs:
        return g_BSO, x, None
    if x.dim() > 3:
        return g_BSO, x, torch.block_diag(*outputs)
    return each_block(linear, g_BSO, outputs, -1), x, None


@dataclass(frozen=True)
class Eigenvalues(Whole):
    """EK-FAC's corrected eigenvalues: sums over samples of ``(Q_S^T G Q_A)^2`` (George et al. 2018)."""

    kind, at_once = "eigenvalues", True
    bases: Mapping[str, Rotation]

    @staticmethod
    def work(call: Call, held: Held, wide: torch.dtype, moments: bool) -> tuple[Tensor, None]:
        """Sum over samples, those that are kept, of the squares of their gradients: (O, I)."""
        (g_BSO, x), (keep_B, *basis) = by_row(call, wide), held
        g_BSO, x, p_out = rotated(g_BSO, x, basis)
        small = g_BSO.device.type == "cpu" and not torch.compiler.is_compiling()  # the compiler unrolls the loop
        total = None
        for part, rows in gradients(g_BSO, x, p_out, CACHE_BYTES if small else None):
            squares = rows.square_() if keep_B is None else rows.square_() * keep_B[part, None, None].to(rows.dtype)
            total = squares.sum(0) if total is None else total + squares.sum(0)
        assert total is not None
        return total, None

    def open(self, layer: Layer, place: Place) -> tuple[Side, Held]:
        kept, rotation = place.block.kept, self.bases[layer.name]
        keep = None if kept is None else place.to(kept, place.dtype)
        return rotation.inputs.to(place.device), (keep, *rotation.held(place.device))

    def shape(self, layer: Layer, size: int) -> tuple[int, ...]:
        return layer.output_side.width, layer.input_side.width

    def finish(self, layer: Layer, delivered: Tensor, scale: float | Tensor) -> Tensor:
        return delivered.mul_(scale**2)


@dataclass(frozen=True)
class Products(Whole):
    """Inner products of each sample's gradient with queries and, on request, with itself."""

    kind, sums = "products", False
    queries: Mapping[str, tuple[Tensor, Tensor | None]]  # {layer: (left, right)}, see the work
    count: int  # how many queries there are, Q
    inverse: Mapping[str, Tensor] | None = None  # {layer: inverse eigenvalues (O, I)}: each sample's own is wanted too
    bases: Mapping[str, Rotation] | None = None  # into the basis that queries and inverse are in

    @staticmethod
    def work(call: Call, held: Held, wide: torch.dtype, moments: bool) -> tuple[Tensor, None]:
        """Inner products of each sample's gradient with each query: (B, Q), or (B, Q + 1) with the sample's own last.

        Inputs are (B, S, I), or (B, S, G, I) in groups. Held are inverse: None, or (O, I), with which a sample's own
        weights its gradient's squares; left and right: queries (Q, O, I) and None, or their halves (Q, O, r) and
        (Q, r, I); and what rotates tokens where queries are rotated.
        """
        (g_BSO, x), (inverse, left, right, *basis) = by_document(call.documents_DL, call.g_BSO, call.x), held
        assert left is not None
        S, (Q, outputs, r), inputs = x.shape[1], left.shape, x.shape[-1]
        scores = x.new_empty(len(x), Q if inverse is None else Q + 1, dtype=wide)
        g_BSO, x = widened(wide, g_BSO, x) if x.dim() == 3 and not basis else (g_BSO.to(wide), x.to(wide))
        g_BSO, x, p_out = rotated(g_BSO, x, basis)
        if x.dim() == 3:
            halves = outputs * inputs if right is None else r * (outputs + inputs)
            if inverse is None and S * Q * halves <= (S + Q) * outputs * inputs:
                # <sum_s g_s x_s^T, L R> = sum_s (g_s L) . (R x_s): where it is less arithmetic, no gradient is formed.
                step = at_a_time(S * Q * (outputs if right is None else r), x)
                for g_bSO, x_bSI, part in zip(g_BSO.split(step), x.split(step), scores.split(step), strict=True):
                    g_NO, x_NI = g_bSO.flatten(0, 1).to(wide), x_bSI.flatten(0, 1).to(wide)
                    by_token_QN = _by_token(left, right, g_NO, x_NI)
                    part.copy_(by_token_QN.unflatten(1, (-1, S)).sum(2).T)
                return scores, None
        queries = (left if right is None else left @ right).flatten(1)
        for place, rows in gradients(g_BSO, x, p_out):
            scores[place, :Q] = linear(rows.flatten(1), queries)
            if inverse is not None:
                scores[place, Q] = rows.square_().flatten(1) @ inverse.flatten()
        return scores, None

    @property
    def at_once(self) -> bool:  # type: ignore[override]
        return self.inverse is not None  # scores add up over calls; a sample's own does not

    def open(self, layer: Layer, place: Place) -> tuple[Side, Held]:
        name, (inputs, _) = layer.name, super().open(layer, place)
        held = [None if self.inverse is None else self.inverse[name], *self.queries[name]]
        if self.bases is not None:
            inputs = self.bases[name].inputs.to(place.device)
            held += self.bases[name].held(place.device)
        return inputs, [None if t is None else t.to(place.device, place.dtype) for t in held]

    def shape(self, layer: Layer, size: int) -> tuple[int, ...]:
        return size, self.count + (self.inverse is not None)

    def finish(self, layer: Layer, delivered: Tensor, scale: float | Tensor) -> Tensor:
        delivered[:, self.count :].mul_(scale)  # a sample's own is of its gradient twice
        return delivered.mul_(scale)


def _by_token(left: Tensor, right: Tensor | None, g_NO: Tensor, x_NI: Tensor) -> Tensor:
    """``g^T L R x`` for each query and token: (Q, N); whole queries, which may be large, are not copied."""
    if right is None and len(left) <= FEW:
        return torch.stack([(linear(x_NI, matrix) * g_NO).sum(1) for matrix in left])
    if right is None:
        rx_QON = torch.bmm(left, x_NI.T.expand(len(left), -1, -1))
        return (rx_QON * g_NO.T).sum(1)
    gl_NQr, rx_NQr = linear(g_NO, left.transpose(1, 2).flatten(0, 1)), linear(x_NI, right.flatten(0, 1))
    return (gl_NQr * rx_NQr).unflatten(1, (len(left), -1)).sum(2).T
