"""Rows of few bits: whole numbers of 8, 4 or 1 bits a value, and one scale for each layer.

A low-bit row stores layer l's gradient x as a scale s_l and whole numbers c with ``x ~ s_l * c``:

========  =====================  =============================================
int8      s = max |x| / 127      c = round(x / s)
int4      s = max |x| / 7        c = round(x / s)
int1      s = mean |y|           c = 1 where y > 0, else -1,  y = R x
========  =====================  =============================================

For signs the mean is the scale of the least-squares fit. They are taken after a rotation R, a randomised Hadamard
transform: gradients of few tokens have a few large values, of which signs say nothing, and rotated all are of about the
same size. So ``x ~ R^T (s c)``. A layer whose scale is below the smallest normal float32 is stored as zeros.
The bytes are in docs/format.md.
"""

from collections.abc import Sequence
from functools import cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from loghook.log.codec.base import TINY, Alike, LayerCodec

BITS = {"int8": 8, "int4": 4, "int1": 1}
AFFINE = {8: (1.0, 0.0), 4: (1.0, -8.0), 1: (2.0, -1.0)}
MIXED = 4096  # values that the rotation mixes with each other, at most


class LowBitCodec(LayerCodec):
    """Dtypes int8, int4 and int1: the scales of all layers first, then their codes."""

    def __init__(self, name: str, shapes: Sequence[tuple[int, int]], rest: int) -> None:
        self.bits = BITS[name]
        super().__init__(name, shapes, rest, [-(-prod(shape) * self.bits // 8) for shape in shapes], head=1)

    def scales(self, stored: Tensor) -> Tensor:
        """(n, layers) float32."""
        return stored[:, self._head].view(torch.float32)

    def packed(self, stored: Tensor, group: Alike) -> Tensor:
        """The codes of some layers as they lie: (n, layers, size) uint8, for ``unpack``."""
        return stored[:, group.codes].unflatten(1, (-1, group.size))

    def turned(self, values: Tensor) -> Tensor:
        """A layer's values (..., width) as they are coded; their inner products are the same."""
        return rotate(values) if self.bits == 1 else values

    def _write(self, values: Tensor, stored: Tensor, group: Alike) -> None:
        s, codes = _quantise(values.numpy(), self.bits) if self.bits > 1 else _signs(values)
        self.scales(stored)[:, group.layers] = torch.from_numpy(s)
        stored[:, group.codes] = torch.from_numpy(codes).flatten(1)

    def _read(self, stored: Tensor, group: Alike, values: Tensor) -> None:
        slope, shift = AFFINE[self.bits]
        values.copy_(unpack(self.packed(stored, group).numpy(), self.bits)[..., : group.width])
        if shift:
            values.mul_(slope).add_(shift)
        if self.bits == 1:
            values.copy_(rotate(values, back=True))
        values.mul_(self.scales(stored)[:, group.layers, None])


def rotate(values: Tensor, *, back: bool = False) -> Tensor:
    """Return R x of values (..., width), or ``back`` R^T x.

    Random signs and a Hadamard matrix mix as many values from the first as are whole blocks of a power of two. Where
    some are left over, the same then mixes as many up to the last.
    """
    width = values.shape[-1]
    mixed = min(1 << (width.bit_length() - 1), MIXED)
    whole = width // mixed * mixed
    spans = [slice(0, whole), slice(width - whole, width)][: 1 + (whole < width)]
    signs, out = _flips(whole), values.clone()
    for span in reversed(spans) if back else spans:
        blocks = out[..., span]
        blocks.copy_(_hadamard(blocks, mixed) * signs if back else _hadamard(blocks * signs, mixed))
    return out


def _hadamard(values: Tensor, mixed: int) -> Tensor:
    """Multiply each ``mixed`` neighbouring values (..., width) with H.

    H is symmetric and orthonormal, in Sylvester's order. Additions in a fixed order: the same bits on every machine.
    """
    y, half = values.reshape(-1, mixed).T.contiguous(), 1  # additions are then of long rows
    target = torch.empty_like(y)
    while half < mixed:
        (a, b), (sums, differences) = (t.view(mixed // (2 * half), 2, half, -1).unbind(1) for t in (y, target))
        torch.add(a, b, out=sums)
        torch.sub(a, b, out=differences)
        y, target, half = target, y, 2 * half
    return y.T.mul(mixed**-0.5).reshape(values.shape)


@cache
def _flips(width: int) -> Tensor:
    """Random signs that are always the same: (width,) float32."""
    bits = np.random.Philox(key=0).random_raw(width) >> np.uint64(63)
    return torch.from_numpy(1 - 2 * bits.astype(np.float32))


def _signs(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """As ``_quantise``, of values that are rotated first."""
    size = values.abs().amax(-1)  # the sum of the largest floats would be none
    y = rotate(values / size.masked_fill(size <= 0, 1)[..., None]).numpy()
    s = np.abs(y).mean(-1, dtype=np.float64).astype(np.float32) * size.numpy()
    return np.where(s < TINY, np.float32(0), s), np.packbits(y > 0, axis=-1, bitorder="little")


def _quantise(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales (n, layers) and packed codes (n, layers, size) of values (n, layers, width)."""
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

    They are (..., at least width) int8; what is beyond the width means nothing.
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
