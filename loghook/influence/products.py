"""Inner products of questions with a block of rows: on floats, or on coded rows without decoding them.

For low-bit rows the question is written as ``t (d0 + d1 / 254 + ...)`` with whole numbers of 8 bits and a t for each
layer. These digits meet the rows' whole numbers in integer products, which are exact. With two digits the error is at
most 1/64,516 of the layer's largest value. Where three cost no more they are taken: for two to five questions.
Where integer products are not quick, and for layers too wide for them, 1-bit rows are looked up, a byte at a time,
among the questions' sums of eight values for each of the 256 choices of signs. Rows of more bits, or where such sums
would take too much memory, are multiplied as floats.
"""

import itertools
import timeit
from collections.abc import Callable, Sequence
from functools import cache, reduce

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from loghook.log.codec.base import Alike
from loghook.log.codec.lowbit import AFFINE, LowBitCodec, unpack
from loghook.log.codec.lowrank import LowRankCodec
from loghook.log.format import LayerSpec
from loghook.log.shard import BLOCK_BYTES
from loghook.log.source import Source
from loghook.project.linear import inner

UNPACKED = 2**20  # values of a layer that are unpacked at a time, one byte each: they stay in the cache
WIDENED = 2**12  # columns at least that are widened at a time; with few there are rows enough for a product
LEAST_ROWS = 256  # fewer would not be worth a product
WIDEST = 2**17  # more products of two bytes may not fit in a sum of 32 bits
BASE = 254  # of the digits, which are -127 to 127
COLUMNS = 16  # an integer product with fewer costs as much or more, but for a single one
TERMS = 64  # questions times terms of low-rank rows; with more it is quicker to decode a block and multiply once
TABLES = 2**28  # bytes that sums to be looked up may take
LOOKED_UP = 2**19  # bytes of a layer's signs at a time; their places, four bytes each, stay in the cache
LANES = 8  # of a processor's vectors: lookups of fewer questions, but for a single one, cost more
FEW = 8  # 1-bit questions; for more, integer products are quicker than counts
COMPARED = 2**21  # bytes of 1-bit rows that are compared at a time: what is made of them stays in the cache

Product = Callable[[Tensor], Tensor]  # a block of rows (n, columns) -> inner products (Q, n)


def products(
    reader: Source, matrix: Tensor, chosen: Sequence[LayerSpec], query_dtype: str | None = None
) -> tuple[Product, bool]:
    """Make questions (Q, gradient_width) ready for the layers of a log that are chosen, in row order.

    With ``query_dtype`` "int1", for a log of that dtype, only the questions' signs meet those of the rows. Also says
    whether blocks are to come as they are stored, or else in the working dtype.
    """
    codec, numbers = reader.codec, [reader.layers.index(spec.name) for spec in chosen]
    if isinstance(codec, LowBitCodec):
        if query_dtype is not None:
            signs = codec.encode(F.pad(matrix, (0, codec.width - matrix.shape[1])))
            if len(matrix) <= FEW:
                return _signs(codec, signs, numbers), True
            matrix = codec.decode(signs)
        exact = max(spec.width for spec in chosen) <= WIDEST and has_integer_products()
        if codec.bits == 1 and not exact:
            sums = 256 * sum(group.size * (group.layers.stop - group.layers.start) for group in codec.alike(numbers))
            if 4 * sums * (len(matrix) + _spare(len(matrix))) <= TABLES:
                return _tables(codec, matrix, numbers), True
        return _codes(codec, matrix, numbers, len(reader.layers), exact=exact), True
    if isinstance(codec, LowRankCodec) and len(matrix) * codec.terms <= TERMS:
        return _bilinear(codec, matrix, numbers), True
    return _floats(reader, matrix, chosen), not codec.coded


def _floats(reader: Source, matrix: Tensor, chosen: Sequence[LayerSpec]) -> Product:
    """One matrix product for each contiguous range of columns."""
    runs: list[slice] = []
    for spec in chosen:
        columns = reader.layout.columns[spec.name]
        start = runs.pop().start if runs and runs[-1].stop == columns.start else columns.start
        runs.append(slice(start, columns.stop))
    # There is a product for each layer where scores are asked for by layer: of its own columns alone.
    if reader.dtype == matrix.dtype:
        return lambda block: reduce(torch.add, [inner(matrix[:, run], block[:, run]) for run in runs])
    # Narrow floats are widened a piece at a time, always into the same memory, which stays in the cache: of WIDENED
    # columns, or of more where rows are so long that a block has few of them.
    share = UNPACKED // 2 * max(1, torch.get_num_threads() // 2)  # of a cache, for all threads
    length = max(WIDENED, share // max(1, BLOCK_BYTES // (reader.dtype.itemsize * reader.codec.width)))
    pieces = [slice(at, min(at + length, run.stop)) for run in runs for at in range(run.start, run.stop, length)]
    questions = [matrix[:, piece].contiguous() for piece in pieces]
    most = max(question.shape[1] for question in questions)
    step = share // most

    def multiply(block: Tensor) -> Tensor:
        # For one block alone: there may be as many products as layers.
        wide = torch.empty(min(step, len(block)) * most, dtype=matrix.dtype)
        out = matrix.new_zeros(len(matrix), len(block))
        for rows, sums in zip(block.split(step), out.split(step, 1), strict=True):
            for piece, question in zip(pieces, questions, strict=True):
                part = rows[:, piece]
                sums += inner(question, _widened(part, wide))
        return out

    return multiply


def _widened(part: Tensor, wide: Tensor) -> Tensor:
    """Copy into the beginning of a buffer of another dtype, which is quicker than to ask for memory each time."""
    return wide[: part.numel()].view(part.shape).copy_(part)


def _codes(codec: LowBitCodec, matrix: Tensor, numbers: Sequence[int], layers: int, *, exact: bool) -> Product:
    """Products with whole numbers, layer by layer: of integers where they are ``exact``, or else in float32.

    Rows are not decoded, which for one bit would be to rotate them back: the questions are rotated instead.
    """
    slope, shift = AFFINE[codec.bits]
    queries, single = len(matrix), len(matrix) == 1
    count = 1 if not exact else 3 if 1 < queries <= COLUMNS // 3 else 2  # digits of a question
    spare = -count * queries % COLUMNS if exact and not single else 0
    groups: list[tuple[Alike, list[tuple[list[Tensor], Tensor]]]] = []
    shifts = torch.zeros(layers, count * queries + spare)
    for group in codec.alike(numbers):
        fitted = []
        for i, values in enumerate(matrix[:, group.columns].float().split(group.width, 1), group.layers.start):
            q = codec.turned(values).T
            digits, sizes = _in_digits(q, count) if exact else (q, torch.ones(queries))
            digits = F.pad(digits, (0, spare, 0, group.size * 8 // codec.bits - group.width))
            sizes = F.pad(sizes, (0, spare))
            columns = digits.to(torch.int8).split(1 if single else digits.shape[1], 1) if exact else (digits.T,)
            fitted.append(([c.contiguous() for c in columns], sizes * slope))
            shifts[i] = digits.sum(0) * sizes * shift
        groups.append((group, fitted))
    step = max(LEAST_ROWS, UNPACKED // (1 if exact else 4) // max(group.width for group, _ in groups))
    most = 0 if exact else max(group.size * 8 // codec.bits for group, _ in groups)

    def multiply(block: Tensor) -> Tensor:
        wide = torch.empty(min(step, len(block)) * most)
        out = torch.zeros(len(block), shifts.shape[1])
        for rows, sums in zip(block.split(step), out.split(step), strict=True):
            scales = codec.scales(rows)
            for group, fitted in groups:
                by_layer = codec.packed(rows, group).transpose(0, 1)
                if exact or codec.bits < 8:  # rows are read once, one after the other, and put in order of layers
                    by_layer = by_layer.contiguous()
                for scale, packed, (digits, sizes) in zip(scales[:, group.layers].T, by_layer, fitted, strict=True):
                    codes = unpack(packed.numpy(), codec.bits)
                    if exact:
                        dots = torch.cat([torch._int_mm(codes, columns) for columns in digits], 1)
                    else:
                        dots = inner(digits[0], _widened(codes, wide)).T
                    sums.addcmul_(dots * sizes, scale[:, None])
            sums.addmm_(scales, shifts)
        return out[:, : count * queries].unflatten(1, (count, -1)).sum(1).T

    return multiply


def _tables(codec: LowBitCodec, matrix: Tensor, numbers: Sequence[int]) -> Product:
    """1-bit rows: for each byte of a layer, what the eight values of each question sum to with its signs."""
    queries = len(matrix)
    spare = _spare(queries)
    signs_cj = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4))).flip(1)  # of half a byte, the lowest first
    groups = []
    for group in codec.alike(numbers):
        tables = []
        for values in matrix[:, group.columns].float().split(group.width, 1):
            q = F.pad(codec.turned(values), (0, 8 * group.size - group.width, 0, spare))
            low, high = signs_cj @ q.unflatten(1, (-1, 2, 4)).permute(2, 1, 3, 0)  # (size, 16, Q)
            tables.append((high[:, :, None] + low[:, None]).flatten(0, 2))  # (size 256, Q)
        groups.append((group, tables, 256 * torch.arange(group.size, dtype=torch.int32)))
    step = max(LEAST_ROWS, LOOKED_UP // max(group.size for group, *_ in groups))

    def multiply(block: Tensor) -> Tensor:
        out = torch.zeros(len(block), queries + spare)
        for rows, sums in zip(block.split(step), out.split(step), strict=True):
            scales = codec.scales(rows)
            for group, tables, starts in groups:
                by_layer = codec.packed(rows, group).transpose(0, 1).contiguous()
                for scale, packed, table in zip(scales[:, group.layers].T, by_layer, tables, strict=True):
                    sums.addcmul_(F.embedding_bag(packed + starts, table, mode="sum"), scale[:, None])
        return out[:, :queries].T

    return multiply


def _spare(queries: int) -> int:
    """Questions of zeros that lookups take besides, so that they fill vectors."""
    return -queries % LANES if queries > 1 else 0


def _in_digits(q: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Write questions, the columns of (width, Q), with whole numbers: (width, count * Q), and what each counts."""
    t = q.abs().amax(0) / 127
    rest, digits = q / torch.where(t > 0, t, 1), []
    for _ in range(count):
        digits.append(rest.round())
        rest = BASE * (rest - digits[-1])
    return torch.cat(digits, 1), torch.cat([t / BASE**place for place in range(count)])


@cache
def has_integer_products() -> bool:
    """Whether ``torch._int_mm`` is quick here, and exact.

    That it is quick is measured: what oneDNN has no kernel for takes plain loops, as on ARM, and on x86 without
    dot products of bytes (VNNI), where products of floats are many times as quick.
    """
    codes = torch.ones(LEAST_ROWS, UNPACKED // 4 // LEAST_ROWS, dtype=torch.int8)
    columns = torch.ones(codes.shape[1], COLUMNS, dtype=torch.int8)
    floats = columns.float()
    return exact_integers() and _seconds(lambda: torch._int_mm(codes, columns)) <= _seconds(
        lambda: codes.float() @ floats
    )


def exact_integers() -> bool:
    """Whether ``torch._int_mm`` gives what the formula says; some processors saturate sums of two products."""
    a = torch.tensor([127, -127], dtype=torch.int8).repeat_interleave(64).repeat(64, 1)
    try:
        return all(
            torch.equal(torch._int_mm(a, b).long(), a.long() @ b.long())
            for b in (a.T[:, :COLUMNS].contiguous(), a.T[:, :1].contiguous())
        )
    except RuntimeError:
        return False


def _seconds(work: Callable[[], object]) -> float:
    """Of the quickest of a few tries: the first pays for what is made once."""
    return min(timeit.repeat(work, number=1, repeat=6))


def _bilinear(codec: LowRankCodec, matrix: Tensor, numbers: Sequence[int]) -> Product:
    """Few questions with rows of low rank, without decoding them: ``<Q, u v^T> = u^T Q v``."""
    groups = codec.alike(numbers)

    def multiply(block: Tensor) -> Tensor:
        out = torch.zeros(len(matrix), len(block))
        for group in groups:
            questions = matrix[:, group.columns]
            if codec.whole(group.shape):
                out += questions @ codec.decode(block, group.columns).T
                continue
            # By layer: (n c, k_out), (n c, k_in) and (Q, k_out, k_in).
            factors = [side.float().transpose(0, 1).flatten(1, 2) for side in codec.factors(block, group)]
            by_layer = questions.unflatten(1, (-1, *group.shape)).transpose(0, 1)
            for left, right, layer in zip(*factors, by_layer, strict=True):
                for total, question in zip(out, layer, strict=True):
                    total += ((left @ question) * right).view(len(block), -1).sum(1)
        return out

    return multiply


def _signs(codec: LowBitCodec, stored: Tensor, numbers: Sequence[int]) -> Product:
    """1-bit questions, as rows are stored: ``s_row s_question (width - 2 popcount(row XOR question))``."""

    def words(rows: Tensor, group: Alike) -> np.ndarray:
        """Signs of some layers, 64 in a word, rows side by side: (layers, words, n) uint64."""
        packed = codec.packed(rows, group).numpy()
        if short := -group.size % 8:  # equal on both sides, so that it does not count
            packed = np.pad(packed, ((0, 0), (0, 0), (0, short)))
        return np.ascontiguousarray(packed.view(np.uint64).transpose(1, 2, 0))

    scales = codec.scales(stored)
    groups = [(group, words(stored, group), scales[:, group.layers]) for group in codec.alike(numbers)]
    step = max(1, COMPARED // codec.row_bytes)

    def multiply(block: Tensor) -> Tensor:
        out = torch.zeros(len(stored), len(block))
        for rows, sums in zip(block.split(step), out.split(step, 1), strict=True):
            scales = codec.scales(rows).T.contiguous()
            for group, questions, sizes in groups:
                signs, dtype = words(rows, group), np.uint16 if group.width < 2**16 else np.int32
                for q, size in enumerate(sizes):
                    unequal = np.bitwise_count(signs ^ questions[:, :, q, None]).sum(1, dtype=dtype)
                    dots = torch.from_numpy(unequal.astype(np.float32)).mul_(-2).add_(group.width)
                    sums[q] += size @ dots.mul_(scales[group.layers])
        return out

    return multiply
