"""Inner products of questions with a block of rows: on floats, or on low-bit rows without decoding them.

For low-bit rows the question is written as ``t (hi + lo / 254)`` with whole numbers hi and lo of 8 bits and a t for
each layer, so that its error is at most 1/64,516 of the layer's largest value. Both halves meet the rows' whole
numbers in one integer product, which is exact.
"""

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from loghook.influence.bilinear import MOST, Bilinear
from loghook.log.codec.base import Alike
from loghook.log.codec.lowbit import AFFINE, LowBitCodec, unpack
from loghook.log.codec.lowrank import LowRankCodec
from loghook.log.format import LayerSpec
from loghook.log.reader import Reader

CHUNK = 2**20  # values of a layer that are unpacked at a time: one byte each, they stay in the cache
LEAST_ROWS = 256  # fewer would not be worth a product
WIDEST = 2**17  # more products of two bytes may not fit in a sum of 32 bits


class Products(Protocol):
    """Questions, ready to be multiplied with blocks of rows.

    Attributes:
        stored: whether it takes blocks as they are stored, or in the working dtype.
    """

    stored: bool

    def __call__(self, block: Tensor) -> Tensor:
        """Return the inner products with rows (n, columns): (Q, n)."""


def products(reader: Reader, matrix: Tensor, chosen: Sequence[LayerSpec]) -> Products:
    """Make questions (Q, gradient_width) ready for the layers of a log that are chosen, in row order."""
    low_bit = isinstance(reader.codec, LowBitCodec) and max(spec.width for spec in chosen) <= WIDEST
    if low_bit and integer_products_are_exact():
        return LowBit(reader, matrix, chosen)
    if isinstance(reader.codec, LowRankCodec) and len(matrix) * reader.codec.terms <= MOST:
        return Bilinear(reader, reader.codec, matrix, chosen)
    return Floats(reader, matrix, chosen)


class Floats:
    """One matrix product for each contiguous range of columns."""

    def __init__(self, reader: Reader, matrix: Tensor, chosen: Sequence[LayerSpec]) -> None:
        """Find the ranges."""
        self._matrix, self.stored = matrix, not reader.codec.coded
        # Narrow floats are widened here, always into the same memory: new memory for every block costs more.
        rows = 0 if reader.dtype == matrix.dtype else max(LEAST_ROWS // 4, CHUNK // reader.codec.width)
        self._wide = torch.empty(rows, reader.codec.width, dtype=matrix.dtype)
        self._runs: list[slice] = []
        for spec in chosen:
            part = reader.layout.kinds["gradients"][spec.name]
            if self._runs and self._runs[-1].stop == part.start:
                self._runs[-1] = slice(self._runs[-1].start, part.stop)
            else:
                self._runs.append(part)

    def __call__(self, block: Tensor) -> Tensor:
        """Return the inner products with float rows (n, width): (Q, n)."""
        if block.dtype == self._matrix.dtype:
            return self._multiply(block)
        parts = block.split(len(self._wide))
        return torch.cat([self._multiply(self._wide[: len(part)].copy_(part)) for part in parts], 1)

    def _multiply(self, block: Tensor) -> Tensor:
        scores = sum(self._matrix[:, run] @ block[:, run].T for run in self._runs)
        assert isinstance(scores, Tensor)
        return scores


class LowBit:
    """Integer products, layer by layer, on codes that are unpacked a chunk at a time."""

    stored = True

    def __init__(self, reader: Reader, matrix: Tensor, chosen: Sequence[LayerSpec]) -> None:
        """Write the questions with whole numbers."""
        assert isinstance(reader.codec, LowBitCodec)
        self._codec, self._bits, self._queries = reader.codec, reader.codec.bits, len(matrix)
        slope, shift = AFFINE[self._bits]
        numbers = [reader.layers.index(spec.name) for spec in chosen]
        self._parts: list[tuple[Alike, list[tuple[Tensor, Tensor]]]] = []
        self._shifts = torch.zeros(len(reader.layers), len(matrix))
        for part in self._codec.alike(numbers):
            fitted = []
            for i, q in enumerate(matrix[:, part.columns].float().split(part.width, 1), part.layers.start):
                t = q.abs().amax(1, keepdim=True) / 127
                unit = q / torch.where(t > 0, t, 1)
                halves = torch.cat([unit.round(), ((unit - unit.round()) * 254).round()])
                padded = torch.zeros(part.size * 8 // self._bits, len(halves), dtype=torch.int8)
                padded[: part.width] = halves.T
                sizes = torch.cat([t, t / 254])
                fitted.append((padded, sizes.T * slope))
                self._shifts[i] = (halves.sum(1, keepdim=True) * sizes * shift).view(2, -1).sum(0)
            self._parts.append((part, fitted))
        self._step = max(LEAST_ROWS, CHUNK // max(part.width for part, _ in self._parts))

    def __call__(self, block: Tensor) -> Tensor:
        """Return the inner products with stored rows (n, codec.columns): (Q, n)."""
        out = torch.zeros(len(block), self._queries)
        for rows, sums in zip(block.split(self._step), out.split(self._step), strict=True):
            scales = self._codec.scales(rows)
            for part, fitted in self._parts:
                # Rows are read once, one after the other, and put in order of layers.
                by_layer = np.ascontiguousarray(self._codec.packed(rows, part).transpose(1, 0, 2))
                for scale, packed, (halves, t) in zip(scales[:, part.layers].T, by_layer, fitted, strict=True):
                    both = torch._int_mm(unpack(packed, self._bits), halves) * t
                    sums.addcmul_(both[:, : self._queries].add_(both[:, self._queries :]), scale[:, None])
            sums.addmm_(scales, self._shifts)
        return out.T


@cache
def integer_products_are_exact() -> bool:
    """Whether ``torch._int_mm`` is exact here: on processors without integer dot products it may saturate."""
    a = torch.tensor([127, -127], dtype=torch.int8).repeat_interleave(64).repeat(64, 1)
    b = a.T[:, :16].contiguous()
    try:
        return torch.equal(torch._int_mm(a, b).long(), a.long() @ b.long())
    except RuntimeError:
        return False
