"""Sums that jobs deliver over the blocks of a pass: added up, brought together from all processes, decomposed."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loghook.capture.config import Config
from loghook.capture.layers import Layer
from loghook.capture.select import rank_of
from loghook.errors import MismatchError, StateError
from loghook.processes import combine, everyone, share
from loghook.project.blocks import Factor, cut, square_size
from loghook.project.projection import Side, fit_side, shared_input_name


class Sums:
    """What a job delivered, by layer, added up over the blocks of a pass."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.samples = 0

    def add(self, results: Mapping[str, Tensor], samples: int) -> None:
        """Add a block: float64 on the CPU, float32 on a device."""
        for name, value in results.items():
            wide = value.double() if value.device.type == "cpu" else value
            self.totals[name] = self.totals[name].add_(wide) if name in self.totals else wide.clone()
        self.samples += samples

    def reduce(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Sum over processes, at the same point on all of them; a layer that slept here counts zero."""
        if share()[1] > 1:
            for name, shape in shapes.items():
                total = self.totals.get(name)
                self.totals[name] = combine(
                    torch.zeros(*shape, dtype=torch.float64, device="cpu") if total is None else total.double().cpu()
                )
            self.samples = int(combine(torch.tensor(self.samples)))
        if not self.samples:
            raise StateError("this pass saw no samples: run the whole loop inside `for _ in run.passes():`.")

    def error(self, layers: Sequence[Layer]) -> float:
        """Expected relative error of the worst second moment, infinite before the first block.

        For n independent Gaussian vectors the squared Frobenius error is ``((tr M)^2 + |M|^2) / n`` (Isserlis 1918).
        n counts samples, not tokens: tokens of one sample are not independent.
        """
        worst = 0.0
        for layer in layers:
            if layer.name in self.totals:
                for flat, width in zip(split(layer, self.totals[layer.name])[:2], widths(layer), strict=True):
                    trace, norm = _trace(flat, width), float(flat.square().sum())
                    worst = max(worst, math.sqrt((trace**2 / norm + 1) / self.samples) if norm > 0 else 0.0)
        return worst or math.inf


def widths(layer: Layer) -> tuple[int, int]:
    """Full widths of a layer's inputs (with the bias column) and output gradients."""
    return layer.input_side.width, layer.output_side.width


def split(layer: Layer, total: Tensor) -> tuple[Tensor, Tensor, float]:
    """Take apart what the covariance job delivers: blocks of inputs, blocks of output gradients, tokens."""
    w_in, w_out = widths(layer)
    inputs, outputs, tokens = total.split([square_size(w_in), square_size(w_out), 1])
    return inputs, outputs, float(tokens)


def decompose(layers: Sequence[Layer], sums: Sums) -> dict[str, tuple[Factor, Factor]]:
    """Eigendecompose every layer's mean second moments; each process takes its share of the layers.

    Layers that read the same input, and so have equal sums, share the decomposition. A layer of which no token was
    counted has zero factors. Factors lie on the CPU, and the sums are let go of on the way: those of a large model
    would fill a device. For the same reason processes exchange a layer each at a time.
    """
    rank, world = share()
    inputs: dict[tuple[int, torch.device], list[tuple[Tensor, Factor]]] = {}
    found: dict[str, tuple[Factor, Factor]] = {}
    for start in range(0, len(layers), world):
        mine: dict[str, tuple[Factor, Factor]] = {}
        for place, layer in enumerate(layers[start : start + world]):
            w_in, w_out = widths(layer)
            total = sums.totals.pop(layer.name, None)
            if place != rank:
                continue
            if total is None:
                total = torch.zeros(square_size(w_in) + square_size(w_out) + 1, dtype=torch.float64, device="cpu")
            flat_in, flat_out, tokens = split(layer, total.to(layer.device_and_dtype()[0]))
            flat_in, flat_out = flat_in / max(tokens, 1.0), flat_out / max(tokens, 1.0)
            same = inputs.setdefault((w_in, flat_in.device), [])
            factor = next((known for flat, known in same if torch.equal(flat, flat_in)), None)
            if factor is None:
                factor = _on_cpu(Factor.of(flat_in, w_in))
                same[:] = [*same, (flat_in, factor)][-2:]  # siblings come one after the other
            mine[layer.name] = factor, _on_cpu(Factor.of(flat_out, w_out))
        for part in everyone(mine):
            found.update(part)
    return found


def _on_cpu(factor: Factor) -> Factor:
    return Factor(factor.values.cpu(), [v.cpu() for v in factor.vectors])


def _trace(flat: Tensor, width: int) -> float:
    trace, start = 0.0, 0
    for part in cut(width):
        n = part.stop - part.start
        trace += float(flat[start : start + n * n].view(n, n).diagonal().sum())
        start += n * n
    return trace


def fit_sides(
    layers: Sequence[Layer], found: Mapping[str, tuple[Factor, Factor]], config: Config
) -> dict[str, tuple[Side, Side]]:
    """Make a fitted projection from the factors of second moments."""
    sides = {}
    for layer in layers:
        if layer.name not in found:
            raise MismatchError(f"layer {layer.name!r} has no factors: fit them with the same watch(...) patterns.")
        kind, seed, damping = config.projection, config.seed, config.whitening
        rank = rank_of(layer.name, config.rank)
        group, (first, second) = shared_input_name(layer.name), found[layer.name]
        sides[layer.name] = (
            fit_side(kind, first, seed=seed, name=group, side="in", rank=rank, damping=damping),
            fit_side(kind, second, seed=seed, name=layer.name, side="out", rank=rank, damping=damping),
        )
    return sides
