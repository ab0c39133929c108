"""Jobs on whole gradients: their statistics and scores, and no gradient kept."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loghook.capture.jobs import Job, Place, scale_for
from loghook.capture.layers import Layer, Leaves, Slots, arrived, deliver
from loghook.capture.work import Call, Held, by_row, make
from loghook.project.blocks import square_size
from loghook.project.projection import Side


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
        one = Call(torch.cat([c.g_BSO for c in calls], 1), torch.cat([c.x for c in calls], 1))
        made = make(self.kind, one, slots.held, slots.place.dtype).main
        assert made is not None
        deliver(slots.leaves.main, made)

    def collect(self, opened: Sequence[Slots], scale: float | Tensor) -> dict[str, Tensor]:
        there = {s.layer: arrived(s.leaves.main) for s in opened if s.delivered}
        return {layer.name: self.finish(layer, found, scale_for(found, scale)) for layer, found in there.items()}


class Covariance(Whole):
    """Second moments of every layer's inputs (with the bias column) and output gradients, by blocks where wide."""

    kind = "covariance"

    def shape(self, layer: Layer, size: int) -> tuple[int, ...]:
        return (sum(square_size(side.width) for side in layer.sides) + 1,)  # blocks of both, and the number of tokens

    def finish(self, layer: Layer, delivered: Tensor, scale: float | Tensor) -> Tensor:
        delivered[square_size(layer.input_side.width) : -1] *= scale**2  # output gradients alone have it
        return delivered


@dataclass(frozen=True)
class Eigenvalues(Whole):
    """EK-FAC's corrected eigenvalues: sums over samples of ``(Q_S^T G Q_A)^2`` (George et al. 2018)."""

    kind, at_once = "eigenvalues", True
    bases: Mapping[str, tuple[Side, Side]]  # {layer: (Q_A^T as the input side, Q_S^T as the output side)}

    def open(self, layer: Layer, place: Place) -> tuple[Side, Held]:
        inputs, outputs = (side.to(place.device) for side in self.bases[layer.name])
        return inputs, (outputs.matrix, None if place.kept is None else place.to(place.kept, place.dtype))

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
    bases: Mapping[str, tuple[Side, Side]] | None = None  # rotations into the basis that queries and inverse are in

    @property
    def at_once(self) -> bool:  # type: ignore[override]
        return self.inverse is not None  # scores add up over calls; a sample's own does not

    def open(self, layer: Layer, place: Place) -> tuple[Side, Held]:
        name, (inputs, _), outputs = layer.name, super().open(layer, place), None
        if self.bases is not None:
            inputs, rotation = (side.to(place.device) for side in self.bases[name])
            outputs = rotation.matrix
        inverse = None if self.inverse is None else self.inverse[name]
        held = outputs, inverse, *self.queries[name]
        return inputs, [None if one is None else one.to(place.device, place.dtype) for one in held]

    def shape(self, layer: Layer, size: int) -> tuple[int, ...]:
        return size, self.count + (self.inverse is not None)

    def finish(self, layer: Layer, delivered: Tensor, scale: float | Tensor) -> Tensor:
        delivered[:, self.count :].mul_(scale)  # a sample's own is of its gradient twice
        return delivered.mul_(scale)
