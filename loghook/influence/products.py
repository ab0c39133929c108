"""Inner products of questions with a block of rows: on floats, or on low-bit rows without decoding them.

For low-bit rows the question is written as ``t (d0 + d1 / 254 + ...)`` with whole numbers of 8 bits and a t for each
layer. These digits meet the rows' whole numbers in integer products, which are exact. With two digits the error is at
most 1/64,516 of the layer's largest value; few questions get three, which cost no more and are as good as float32.
"""

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from loghook.influence.bilinear import MOST, Bilinear
from loghook.influence.signs import FEW, Signs
from loghook.log.codec.base import Alike
from loghook.log.codec.lowbit import AFFINE, LowBitCodec, unpack
from loghook.log.codec.lowrank import LowRankCodec
from loghook.log.format import LayerSpec
from loghook.log.reader import Reader

CHUNK = 2**20  # values of a layer that are unpacked at a time: one byte each, they stay in the cache
LEAST_ROWS = 256  # fewer would not be worth a product
WIDEST = 2**17  # more products of two bytes may not fit in a sum of 32 bits
BASE = 254  # of the digits, which are -127 to 127
COLUMNS = 16  # an integer product with fewer costs as much or more, but for a single one


class Products(Protocol):
    """Questions, ready to be multiplied with blocks of rows.

    Attributes:
        stored: whether it takes blocks as they are stored, or in the working dtype.
    """

    stored: bool

    def __call__(self, block: Tensor) -> Tensor:
        """Return the inner products with rows (n, columns): (Q, n)."""


def products(reader: Reader, matrix: Tensor, chosen: Sequence[LayerSpec], query_dtype: str | None = None) -> Products:
    """Make questions (Q, gradient_width) ready for the layers of a log that are chosen, in row order.

    With ``query_dtype`` "int1", for a log of that dtype, only the questions' signs meet those of the rows.
    """
    if query_dtype is not None:
        assert isinstance(reader.codec, LowBitCodec)
        stored = reader.codec.encode(F.pad(matrix, (0, reader.codec.width - matrix.shape[1])))
        if len(matrix) <= FEW:
            return Signs(reader, reader.codec, stored, chosen)
        matrix = reader.codec.decode(stored)
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
        single = len(matrix) == 1
        self._digits = 3 if 3 * len(matrix) <= COLUMNS else 2
        spare = 0 if single else -self._digits * len(matrix) % COLUMNS
        self._parts: list[tuple[Alike, list[tuple[list[Tensor], Tensor]]]] = []
        self._shifts = torch.zeros(len(reader.layers), self._digits * len(matrix) + spare)
        for part in self._codec.alike(numbers):
            fitted = []
            for i, q in enumerate(matrix[:, part.columns].float().split(part.width, 1), part.layers.start):
                q = self._codec.turned(q)
                digits, sizes = _in_digits(q.T, self._digits)
                digits = F.pad(digits, (0, spare, 0, part.size * 8 // self._bits - part.width))
                sizes = F.pad(sizes, (0, spare))
                columns = digits.to(torch.int8).split(1 if single else digits.shape[1], 1)
                fitted.append(([c.contiguous() for c in columns], sizes * slope))
                self._shifts[i] = digits.sum(0) * sizes * shift
            self._parts.append((part, fitted))
        self._step = max(LEAST_ROWS, CHUNK // max(part.width for part, _ in self._parts))

    def __call__(self, block: Tensor) -> Tensor:
        """Return the inner products with stored rows (n, codec.columns): (Q, n)."""
        out = torch.zeros(len(block), self._shifts.shape[1])
        for rows, sums in zip(block.split(self._step), out.split(self._step), strict=True):
            scales = self._codec.scales(rows)
            for part, fitted in self._parts:
                # Rows are read once, one after the other, and put in order of layers.
                by_layer = self._codec.packed(rows, part).transpose(0, 1).contiguous().numpy()
                for scale, packed, (digits, sizes) in zip(scales[:, part.layers].T, by_layer, fitted, strict=True):
                    numbers = unpack(packed, self._bits)
                    found = torch.cat([torch._int_mm(numbers, columns) for columns in digits], 1)
                    sums.addcmul_(found * sizes, scale[:, None])
            sums.addmm_(scales, self._shifts)
        return out[:, : self._digits * self._queries].unflatten(1, (self._digits, -1)).sum(1).T


def _in_digits(q: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Write questions, the columns of (width, Q), with whole numbers: (width, count * Q), and what each counts."""
    t = q.abs().amax(0) / 127
    rest, digits = q / torch.where(t > 0, t, 1), []
    for _ in range(count):
        digits.append(rest.round())
        rest = BASE * (rest - digits[-1])
    return torch.cat(digits, 1), torch.cat([t / BASE**place for place in range(count)])


@cache
def integer_products_are_exact() -> bool:
    """Whether ``torch._int_mm`` is exact here: on processors without integer dot products it may saturate."""
    a = torch.tensor([127, -127], dtype=torch.int8).repeat_interleave(64).repeat(64, 1)
    try:
        return all(
            torch.equal(torch._int_mm(a, b).long(), a.long() @ b.long())
            for b in (a.T[:, :COLUMNS].contiguous(), a.T[:, :1].contiguous())
        )
    except RuntimeError:
        return False
