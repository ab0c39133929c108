"""Jobs of a log: rows of gradients, or of what an optimiser makes of them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from loghook.capture.jobs import Job, Place, scale_for
from loghook.capture.layers import Layer, Leaves, Slots, arrived, deliver
from loghook.capture.work import Call, Held, by_document, by_row, sum_moments
from loghook.project.linear import widened
from loghook.project.outer import outer, outer_grouped, project_output, sum_of_squares, update_rows
from loghook.project.projection import Side


@dataclass
class Captured:
    rows: Tensor  # (B, width) in float32 or float64, on the device of the first layer
    moments: Tensor | None  # the vector of statistics (see ``Layout``) summed over the block's tokens, or None
    asleep: list[str]  # names of layers that may sleep and did; their rows are zero


class Rows(Job[Captured]):
    """Rows of gradients in projected space, and the statistics of a log on request."""

    kind, projects = "rows", True
    limit = 8 * 2**20  # as much as stays in a processor's cache, and little on a device

    @staticmethod
    def work(call: Call, held: Held, wide: torch.dtype, moments: bool) -> tuple[Tensor, Tensor | None]:
        (p_out_kO,) = held
        x = call.x
        if x.dim() == 3:
            g, x = widened(wide, project_output(call.g_BSO, p_out_kO), x)
            rows = outer(*by_document(call.documents_DL, g, x))
        else:
            g, x = call.g_BSO.to(wide), x.to(wide)
            g_DLO, x_DLGk = by_document(call.documents_DL, g, x)
            rows = outer_grouped(g_DLO, x_DLGk, p_out_kO)
        return rows.flatten(1), sum_moments(g, x, call.weight_BS, p_out_kO, wide) if moments else None

    def __init__(self, *, moments: bool) -> None:
        self._moments = self.sums = moments

    def open(self, layer: Layer, place: Place) -> tuple[Side, Held]:
        dtype = _narrow(layer)
        inputs = layer.input_side.to(place.device, dtype)
        if layer.spec.bias:
            inputs.part()
        return inputs, (layer.output_side.to(place.device, dtype).matrix,)

    def leaves(self, layer: Layer, size: int, leaf: Callable[..., Tensor]) -> Leaves:
        spec = layer.spec
        return Leaves(
            leaf(size, spec.width),
            leaf(spec.k_in**2 + spec.k_out**2 + 1) if self._moments else None,
            leaf(size, spec.channels + 1) if spec.activations else None,
            leaf(size, spec.out_features + 1) if spec.output_gradients else None,
            leaf(1) if self.at_once else None,
        )

    def defer(self, slots: Slots, call: Call) -> tuple[Hashable, Call] | None:
        """Ordinary layers wait for others of their shape, with output gradients projected.

        A side without a projection may be the user's own tensor, which may change before rows are formed.
        """
        (p_out_kO,), leaves = slots.held, slots.leaves
        copied = p_out_kO is not None and slots.input_side.matrix is not None
        alone = leaves.activations is None and leaves.outputs is None
        if not copied or not alone or call.documents_DL is not None or call.x.dim() != 3:
            return None
        g_BSk = project_output(call.g_BSO, p_out_kO)
        key = call.x.shape, g_BSk.shape, call.x.dtype, g_BSk.dtype, call.weight_BS is None
        return key, Call(g_BSk, call.x, call.weight_BS)

    def form(self, group: Sequence[tuple[Slots, Call]]) -> None:
        wide = group[0][0].place.dtype
        x_nBSk, g_nBSk = torch.stack([call.x for _, call in group]), torch.stack([call.g_BSO for _, call in group])
        x_nBSk, g_nBSk = widened(wide, x_nBSk, g_nBSk)
        sums: Sequence[Tensor | None] = [None] * len(group)
        if self._moments:
            weights = [call.weight_BS for _, call in group if call.weight_BS is not None]  # of all, or of none
            weight_nBS = torch.stack(weights).to(wide) if weights else None
            n, B, S, _ = x_nBSk.shape
            counted = (x_nBSk, g_nBSk) if weight_nBS is None else (x_nBSk.to(wide), g_nBSk.to(wide))
            inputs, outputs = (sum_of_squares(z, weight_nBS).flatten(1) for z in counted)
            tokens = inputs.new_full((n, 1), B * S) if weight_nBS is None else weight_nBS.sum((1, 2))[:, None]
            sums = torch.cat([inputs, outputs, tokens], 1).unbind()
        rows_nBw = outer(g_nBSk, x_nBSk).flatten(2)
        for (slots, _), rows, summed in zip(group, rows_nBw.unbind(), sums, strict=True):
            deliver(slots.leaves.main, rows)
            if summed is not None and slots.leaves.moments is not None:
                deliver(slots.leaves.moments, summed)

    def collect(self, opened: Sequence[Slots], scale: float | Tensor) -> Captured:
        layers, device = [s.layer for s in opened], opened[0].leaves.main.device
        rows = torch.cat([arrived(s.leaves.main).to(device) for s in opened], 1)
        rows = _scaled(rows, [layer.gain for layer in layers], [layer.spec.width for layer in layers])
        rows = self._scale_rows(rows, scale)
        inputs = [(s.leaves.activations, s.layer.spec.activations) for s in opened]
        outputs = [(s.leaves.outputs, s.layer.spec.output_gradients) for s in opened]
        beside = [_reduced(leaf, how) for leaf, how in inputs if leaf is not None]
        beside += [_reduced(leaf, how) * scale_for(leaf, scale) for leaf, how in outputs if leaf is not None]
        if beside:
            rows = torch.cat([rows, *(t.to(device) for t in beside)], 1)
        moments = None
        if self._moments:
            moments = torch.cat([arrived(s.leaves.moments).to(device) for s in opened if s.leaves.moments is not None])
            gains = [g for layer in layers for g in (layer.input_side.gain**2, layer.output_side.gain**2, 1.0)]
            sizes = [n for layer in layers for n in (layer.spec.k_in**2, layer.spec.k_out**2, 1)]
            moments = _scaled(moments, gains, sizes)
            if not _is_one(scale):  # moments of output gradients by the square of the scale
                of_outputs = _spread((0.0, 1.0, 0.0) * len(opened), tuple(sizes), moments.dtype, moments.device) > 0
                moments = torch.where(of_outputs, moments * scale_for(moments, scale) ** 2, moments)
        return Captured(rows, moments, [s.layer.name for s in opened if not s.delivered])

    def _scale_rows(self, rows: Tensor, scale: float | Tensor) -> Tensor:
        return rows if _is_one(scale) else rows.mul_(scale_for(rows, scale))


class Updates(Rows):
    """Rows of what an optimiser makes of a gradient, which have no statistics."""

    kind = "update"

    @staticmethod
    def work(call: Call, held: Held, wide: torch.dtype, moments: bool) -> tuple[Tensor, None]:
        """Rows of an update; held is what ``update_rows`` takes besides output gradients and whole inputs."""
        return update_rows(*by_row(call, wide), *held).flatten(1), None

    def __init__(self, *, linear: bool) -> None:
        super().__init__(moments=False)
        self.at_once = not linear

    def open(self, layer: Layer, place: Place) -> tuple[Side, Held]:
        assert layer.moments is not None
        inputs, outputs = (side.to(place.device) for side in layer.sides)
        moments = layer.moments.read(layer, place.device, place.dtype)
        return Side(inputs.width, None), (outputs.matrix, inputs.matrix, *moments, place.scale_here)

    def defer(self, slots: Slots, call: Call) -> None:
        return None

    def _scale_rows(self, rows: Tensor, scale: float | Tensor) -> Tensor:
        return rows  # updates have it in them


def _is_one(scale: float | Tensor) -> bool:
    return isinstance(scale, float) and scale == 1.0


def _reduced(leaf: Tensor, how: str | None) -> Tensor:
    """The sums over tokens that a leaf received, or means over those that count."""
    total, tokens = arrived(leaf).split([leaf.shape[1] - 1, 1], 1)
    return total / tokens.masked_fill(tokens <= 0, 1) if how == "mean" else total


def _narrow(layer: Layer) -> torch.dtype | None:
    """Half-precision dtype in which a linear layer holds its weights and computed last time, or None.

    Its projections are kept in it, instead of being cast at every call to what the layer's tensors are in.
    """
    if not layer.adapter.shares_input or layer.computes_in not in (torch.bfloat16, torch.float16):
        return None
    if is_parametrized(layer.module, "weight"):  # reading it would make it anew
        return None
    weight = getattr(layer.module, "weight", None)
    return layer.computes_in if weight is not None and weight.dtype == layer.computes_in else None


def _scaled(values: Tensor, gains: Sequence[float], sizes: Sequence[int]) -> Tensor:
    """Multiply, in place, as many values (..., sum of sizes) with each gain as its size says."""
    if any(gain != 1.0 for gain in gains):  # not where nothing is projected, and rows are widest
        values *= _spread(tuple(gains), tuple(sizes), values.dtype, values.device)
    return values


@lru_cache(maxsize=16)
def _spread(values: tuple[float, ...], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Repeat each value as often as its size says: (sum of sizes,); kept for the next block."""
    return torch.from_numpy(np.repeat(values, sizes)).to(device, dtype)
