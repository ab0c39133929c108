"""Rows of low rank: of each layer's gradient G (k_out, k_in) the best approximation ``sum_j u_j v_j^T`` of c terms.

After LoRIF (Li et al. 2026), which keeps such factors of projected gradients: c (k_out + k_in) values instead of
k_out k_in. Factors are bfloat16. A layer that they would not make smaller is stored whole, in bfloat16.
The bytes are in docs/format.md.
"""

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from loghook.log.codec.base import TINY, Alike, LayerCodec

TERMS = {"lowrank1": 1, "lowrank2": 2, "lowrank4": 4, "lowrank8": 8}  # of a layer
NUMBER = torch.bfloat16
MORE = 12  # vectors that the iteration carries besides those that are kept
STEPS = 3  # of the iteration: no spectrum that was tried is more than 1 % off the optimum, gradients are within 0.01 %


class LowRankCodec(LayerCodec):
    def __init__(self, name: str, shapes: Sequence[tuple[int, int]], rest: int) -> None:
        self.terms = TERMS[name]
        sizes = [NUMBER.itemsize * (prod(s) if self.whole(s) else self.terms * sum(s)) for s in shapes]
        super().__init__(name, shapes, rest, sizes)

    def whole(self, shape: tuple[int, int]) -> bool:
        """Whether gradients of this shape are stored as they are: factors would not be smaller."""
        return self.terms * sum(shape) >= prod(shape)

    def factors(self, stored: Tensor, group: Alike) -> tuple[Tensor, Tensor]:
        """Views of the factors of some layers: (n, layers, c, k_out) and (n, layers, c, k_in) bfloat16."""
        sides = self._numbers(stored, group).split([self.terms * k for k in group.shape], -1)
        left, right = (side.unflatten(-1, (self.terms, -1)) for side in sides)
        return left, right

    def _numbers(self, stored: Tensor, group: Alike) -> Tensor:
        return stored[:, group.codes].unflatten(1, (-1, group.size)).view(NUMBER)

    def _write(self, values: Tensor, stored: Tensor, group: Alike) -> None:
        numbers = self._numbers(stored, group)
        if self.whole(group.shape):
            numbers.copy_(values)
            return
        for row, target in zip(values.unflatten(-1, group.shape), numbers, strict=True):
            target.copy_(torch.cat([side.flatten(1) for side in best_factors(row, self.terms)], 1))

    def _read(self, stored: Tensor, group: Alike, values: Tensor) -> None:
        if self.whole(group.shape):
            values.copy_(self._numbers(stored, group))
            return
        left, right = (side.float() for side in self.factors(stored, group))
        out = values.unflatten(-1, group.shape).zero_()
        for j in range(self.terms):  # in this order: a value is the same wherever it is read
            out.addcmul_(left[:, :, j, :, None], right[:, :, j, None, :])


def best_factors(x: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """Find (nearly) the best approximations of rank c by block power iteration (Halko et al. 2011, algorithm 4.4).

    Of matrices x (L, k_out, k_in), float32, these are (L, c, k_out), which carry the size, and (L, c, k_in),
    orthonormal; the strongest term first. They depend on x alone: the start is always the same.
    """
    size = x.abs().amax((1, 2), keepdim=True)
    size = size.masked_fill(size < TINY, 0)
    x = x / size.masked_fill(size <= 0, 1)  # squares neither overflow nor vanish
    basis = _start(x.shape[2], min(c + MORE, *x.shape[1:]))
    for _ in range(STEPS):
        basis = torch.linalg.qr(x.mT @ (x @ basis)).Q
    left = x @ basis
    strongest = torch.linalg.eigh(left.mT @ left).eigenvectors[..., -c:]
    sides = left @ strongest, basis @ strongest
    # Squares in float32 do not tell the weakest terms apart, which are put in order by what they are.
    order = sides[0].norm(dim=1).argsort(1, descending=True)[:, None]
    left, right = (side.gather(2, order.expand(-1, side.shape[1], -1)).mT for side in sides)
    return left * size, right


@cache
def _start(width: int, vectors: int) -> Tensor:
    return torch.randn(width, vectors, generator=torch.Generator().manual_seed(0), device="cpu")
