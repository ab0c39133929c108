"""How a row lies in a shard: as it is, or with few bits a value and one scale for each layer. Pure, on tensors.

A low-bit row stores layer l's gradient x as a scale s_l and whole numbers c with ``x ~ s_l * c``:

========  =====================  =============================================
int8      s = max |x| / 127      c = round(x / s)
int4      s = max |x| / 7        c = round(x / s)
int1      s = mean |x|           c = 1 where x > 0, else -1
========  =====================  =============================================

For signs the mean is the scale of the least-squares fit. A layer whose scale is below the smallest normal float32 is
stored as zeros. The bytes are in docs/format.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {"int8": 8, "int4": 4, "int1": 1}
DTYPES = (*FLOATS, *BITS)
TINY = np.finfo(np.float32).tiny
FLOAT_BYTES = 4  # of a scale, and of a value that is not quantised
CHUNK = 2**18  # values that are coded at a time: they stay in the cache


@dataclass(frozen=True)
class Alike:
    """Neighbouring layers of one width, which are coded together."""

    layers: slice  # their numbers
    width: int  # values of each
    size: int  # bytes that the codes of each take
    columns: slice  # their values in a row
    codes: slice  # their codes in a stored row


class Codec:
    """From rows (n, width) to what a shard holds, (n, columns) of ``stored``, and back."""

    def __init__(self, name: str, widths: Sequence[int], rest: int) -> None:
        """Lay out rows with gradients of these widths, one a layer, and ``rest`` other values, never quantised."""
        self.name, self.bits = name, BITS.get(name)
        self.width = sum(widths) + rest  # values of a row
        self.dtype = FLOATS.get(name, torch.float32)  # of rows once decoded
        self.stored = torch.uint8 if self.bits else self.dtype  # of a shard's tensor
        sizes = [-(-w * (self.bits or 0) // 8) for w in widths]
        # Scales and values that are no gradients first: they are aligned then, and so is every row.
        self._scales = slice(0, FLOAT_BYTES * len(widths))
        self._rest = slice(self._scales.stop, self._scales.stop + FLOAT_BYTES * rest)
        self._layers = len(widths)
        self._value_ends = np.cumsum([0, *widths])
        self._code_ends = self._rest.stop + np.cumsum([0, *sizes])
        self.columns = -(-int(self._code_ends[-1]) // FLOAT_BYTES) * FLOAT_BYTES if self.bits else self.width
        self.row_bytes = self.columns * self.stored.itemsize  # of a stored row

    def encode(self, rows: Tensor) -> Tensor:
        """Store rows (n, width), finite and on the CPU: each by itself, so that batches do not matter."""
        if not self.bits:
            return rows.to(self.stored).contiguous()
        values = rows.float().numpy()
        stored = np.zeros((len(values), self.columns), np.uint8)
        scales = stored[:, self._scales].view(np.float32)
        for chunk, part in self._chunks(len(values), self.alike(range(self._layers))):
            x = values[chunk, part.columns]
            s, codes = _quantise(x.reshape(len(x), -1, part.width), self.bits)
            scales[chunk, part.layers] = s
            stored[chunk, part.codes] = codes.reshape(len(x), -1)
        stored[:, self._rest].view(np.float32)[:] = values[:, self._value_ends[-1] :]
        return torch.from_numpy(stored)

    def decode(self, stored: Tensor, columns: slice = slice(None)) -> Tensor:
        """Return rows (n, width), or some columns of them that contain whole layers; a view where nothing is coded."""
        if not self.bits:
            return stored[:, columns]
        start, stop, _ = columns.indices(self.width)
        out = torch.empty(len(stored), stop - start)
        first, last = np.searchsorted(self._value_ends, [start, stop])
        parts = self.alike(range(first, min(last, self._layers)))
        slope, shift = AFFINE[self.bits]
        for chunk, part in self._chunks(len(out), parts):
            codes = unpack(self.packed(stored[chunk], part).numpy(), self.bits)[..., : part.width]
            values = out[chunk, part.columns.start - start : part.columns.stop - start].unflatten(1, codes.shape[1:])
            values.copy_(codes)
            if shift:
                values.mul_(slope).add_(shift)
            values.mul_(self.scales(stored)[chunk, part.layers, None])
        kept = max(start, int(self._value_ends[-1]))
        if stop > kept:
            rest = stored[:, self._rest].view(torch.float32)
            out[:, kept - start :] = rest[:, kept - int(self._value_ends[-1]) : stop - int(self._value_ends[-1])]
        return out

    def scales(self, stored: Tensor) -> Tensor:
        """Return the scale of every layer of low-bit rows: (n, layers) float32."""
        return stored[:, self._scales].view(torch.float32)

    def packed(self, stored: Tensor, part: Alike) -> Tensor:
        """Return the codes of some layers of low-bit rows as they lie: (n, layers, size) uint8, for ``unpack``."""
        return stored[:, part.codes].unflatten(1, (-1, part.size))

    def alike(self, layers: Iterable[int]) -> list[Alike]:
        """Group some layers, given by number and in order, into neighbours of one width."""
        parts: list[Alike] = []
        for i in layers:
            columns, codes = (slice(int(ends[i]), int(ends[i + 1])) for ends in (self._value_ends, self._code_ends))
            width, size, first = columns.stop - columns.start, codes.stop - codes.start, i
            if parts and parts[-1].layers.stop == i and parts[-1].width == width:
                last = parts.pop()
                first, columns = last.layers.start, slice(last.columns.start, columns.stop)
                codes = slice(last.codes.start, codes.stop)
            parts.append(Alike(slice(first, i + 1), width, size, columns, codes))
        return parts

    def _chunks(self, rows: int, parts: Sequence[Alike]) -> Iterator[tuple[slice, Alike]]:
        for part in parts:
            step = max(1, CHUNK // (part.columns.stop - part.columns.start))
            yield from ((slice(start, start + step), part) for start in range(0, rows, step))


AFFINE = {8: (1.0, 0.0), 4: (1.0, -8.0), 1: (2.0, -1.0)}


def _quantise(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales (n, layers) and packed codes (n, layers, size) of values (n, layers, width)."""
    if bits == 1:
        s = np.abs(x).mean(-1, dtype=np.float64).astype(np.float32)
        return np.where(s < TINY, np.float32(0), s), np.packbits(x > 0, axis=-1, bitorder="little")
    top = np.float32(2 ** (bits - 1) - 1)
    s = np.maximum(x.max(-1), -x.min(-1)) / top
    s = np.where(s < TINY, np.float32(0), s)
    inverse = np.divide(1, s, out=np.zeros_like(s), where=s > 0)
    codes = x * inverse[..., None]
    codes = np.rint(codes, out=codes).astype(np.int8)
    if bits == 8:
        return s, codes.view(np.uint8)
    # The first half of the values are the low nibbles: halves are unpacked without shuffling.
    shifted = (codes + 8).view(np.uint8)
    half = -(-shifted.shape[-1] // 2)
    packed = shifted[..., :half].copy()
    packed[..., : shifted.shape[-1] - half] |= shifted[..., half:] << 4
    return s, packed


def unpack(packed: np.ndarray, bits: int) -> Tensor:
    """Return the whole numbers u of packed codes (..., size), with ``c = slope * u + shift`` (see ``AFFINE``).

    Returns:
        (..., at least width) int8; what is beyond the width means nothing.
    """
    if bits == 1:  # flat, since short rows would be unpacked one by one
        values = np.unpackbits(packed.ravel(), bitorder="little").reshape(*packed.shape[:-1], -1)
    elif bits == 4:
        halves = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), np.uint8)
        np.bitwise_and(packed, 15, out=halves[..., 0, :])
        np.right_shift(packed, 4, out=halves[..., 1, :])
        values = halves.reshape(*packed.shape[:-1], -1)
    else:
        values = packed
    return torch.from_numpy(values.view(np.int8))
