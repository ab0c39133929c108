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

from loghook.log.codec import AFFINE, Alike, unpack
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


FEW = 8  # questions for which one look-up costs what it costs for a single one
TABLE_BYTES = 2**28  # what look-up tables may take: 128 bytes for each value of the questions
LOOK_UPS = 2**17  # done at a time: their places stay in the cache


def products(reader: Reader, matrix: Tensor, chosen: Sequence[LayerSpec], query_dtype: str | None = None) -> Products:
    """Make questions (Q, gradient_width) ready for the layers of a log that are chosen, in row order.

    With ``query_dtype`` "int1", for a log of that dtype, only the questions' signs meet those of the rows.
    """
    if query_dtype is not None:
        return Signs(reader, matrix, chosen)
    if reader.codec.bits == 1 and len(matrix) <= FEW and 128 * matrix.numel() <= TABLE_BYTES:
        return Tables(reader, matrix, chosen)
    if reader.codec.bits and max(spec.width for spec in chosen) <= WIDEST and integer_products_are_exact():
        return LowBit(reader, matrix, chosen)
    return Floats(reader, matrix, chosen)


class Floats:
    """One matrix product for each contiguous range of columns."""

    def __init__(self, reader: Reader, matrix: Tensor, chosen: Sequence[LayerSpec]) -> None:
        """Find the ranges."""
        self._matrix, self.stored = matrix, reader.codec.bits is None
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


class Tables:
    """Look-ups of partial sums for signs: a byte of a row says which of a question's 256 sums of eight values it adds.

    For few questions; in float32, so that scores are those of the decoded rows but for rounding.
    """

    stored = True

    def __init__(self, reader: Reader, matrix: Tensor, chosen: Sequence[LayerSpec]) -> None:
        """Add up, for every byte of a layer and each of its 256 values, what it says of the questions."""
        self._codec, self._queries = reader.codec, len(matrix)
        signs = torch.where(unpack(np.arange(256, dtype=np.uint8)[:, None], 1) > 0, 1.0, -1.0)  # of a byte: (256, 8)
        self._parts: list[tuple[Alike, list[Tensor]]] = []
        for part in self._codec.alike([reader.layers.index(spec.name) for spec in chosen]):
            tables = []
            for q in matrix[:, part.columns].float().split(part.width, 1):
                padded = torch.nn.functional.pad(q, (0, 8 * part.size - part.width))
                sums = padded.unflatten(1, (part.size, 8)) @ signs.T
                tables.append(sums.permute(1, 2, 0).reshape(-1).view(-1, len(q)))  # (size * 256, Q)
            self._parts.append((part, tables))

    def __call__(self, block: Tensor) -> Tensor:
        """Return the inner products with stored rows (n, codec.columns): (Q, n)."""
        out = torch.zeros(len(block), self._queries)
        scales = self._codec.scales(block)
        for part, tables in self._parts:
            codes = block[:, part.codes].unflatten(1, (-1, part.size))
            first = 256 * torch.arange(part.size, dtype=torch.int32)
            step = max(1, LOOK_UPS // part.size)
            places = torch.empty(min(step, len(block)), part.size, dtype=torch.int32)
            for i, table in enumerate(tables):
                scale = scales[:, part.layers.start + i, None]
                # A layer's table is in the cache for all rows of the block.
                for bytes_, sums, s in zip(codes[:, i].split(step), out.split(step), scale.split(step), strict=True):
                    index = places[: len(sums)].copy_(bytes_).add_(first)
                    sums.addcmul_(torch.nn.functional.embedding_bag(index, table, mode="sum"), s)
        return out.T


class LowBit:
    """Integer products, layer by layer, on codes that are unpacked a chunk at a time."""

    stored = True

    def __init__(self, reader: Reader, matrix: Tensor, chosen: Sequence[LayerSpec]) -> None:
        """Write the questions with whole numbers."""
        self._codec, self._bits, self._queries = reader.codec, reader.codec.bits or 0, len(matrix)
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


class Signs:
    """Questions of one bit: ``s_row s_question (width - 2 popcount(row XOR question))`` for each layer."""

    stored = True

    def __init__(self, reader: Reader, matrix: Tensor, chosen: Sequence[LayerSpec]) -> None:
        """Store the questions as the rows are stored."""
        self._codec, self._queries = reader.codec, len(matrix)
        rest = self._codec.width - matrix.shape[1]
        questions = self._codec.encode(torch.nn.functional.pad(matrix, (0, rest)))
        scales = self._codec.scales(questions)
        self._parts = [
            (part, self._words(questions, part), scales[:, part.layers])
            for part in self._codec.alike([reader.layers.index(spec.name) for spec in chosen])
        ]
        self._step = max(1, CHUNK // self._codec.row_bytes)

    def _words(self, stored: Tensor, part: Alike) -> np.ndarray:
        """Signs of some layers, 64 in a word, rows side by side: (layers, words, n) uint64."""
        packed = self._codec.packed(stored, part)
        if short := -part.size % 8:  # equal on both sides, so that it does not count
            packed = np.pad(packed, ((0, 0), (0, 0), (0, short)))
        return np.ascontiguousarray(packed.view(np.uint64).transpose(1, 2, 0))

    def __call__(self, block: Tensor) -> Tensor:
        """Return the inner products with stored rows (n, codec.columns): (Q, n)."""
        out = torch.zeros(self._queries, len(block))
        for rows, sums in zip(block.split(self._step), out.split(self._step, 1), strict=True):
            scales = self._codec.scales(rows).T
            for part, questions, sizes in self._parts:
                words = self._words(rows, part)
                for q, size in enumerate(sizes):
                    unequal = np.bitwise_count(words ^ questions[:, :, q, None]).sum(1, dtype=np.int32)
                    sums[q] += size @ (scales[part.layers] * torch.from_numpy(part.width - 2 * unequal))
        return out


@cache
def integer_products_are_exact() -> bool:
    """Whether ``torch._int_mm`` is exact here: on processors without integer dot products it may saturate."""
    a = torch.tensor([127, -127], dtype=torch.int8).repeat_interleave(64).repeat(64, 1)
    b = a.T[:, :16].contiguous()
    try:
        return torch.equal(torch._int_mm(a, b).long(), a.long() @ b.long())
    except RuntimeError:
        return False
