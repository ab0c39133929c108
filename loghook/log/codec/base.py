"""What every codec offers, rows that are stored as they are, and the frame of those that are coded layer by layer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT_BYTES = 4  # of a float32: a scale, or a value that is not coded
CHUNK = 2**18  # values that are coded at a time: they stay in the cache
TINY = float(np.finfo(np.float32).tiny)  # the smallest normal float32


class Codec(ABC):
    """From rows (n, width) to what a shard holds, (n, columns) of ``stored``, and back; see ``make_codec``."""

    coded: ClassVar[bool]  # whether rows have to be decoded, so that they are no views of the shard
    dtype: torch.dtype  # of rows once decoded
    stored: torch.dtype  # of a shard's tensor
    columns: int  # of a stored row

    def __init__(self, name: str, shapes: Sequence[tuple[int, int]], rest: int) -> None:
        self.name, self.width = name, sum(map(prod, shapes)) + rest

    @property
    def row_bytes(self) -> int:
        return self.columns * self.stored.itemsize

    @abstractmethod
    def encode(self, rows: Tensor) -> Tensor:
        """Store rows (n, width), finite and on the CPU: each by itself, so that batches do not matter."""

    @abstractmethod
    def decode(self, stored: Tensor, columns: slice = slice(None)) -> Tensor:
        """Return rows (n, width), or some columns of them that contain whole layers."""


class FloatCodec(Codec):
    """Values as they are."""

    coded = False

    def __init__(self, name: str, shapes: Sequence[tuple[int, int]], rest: int) -> None:
        super().__init__(name, shapes, rest)
        self.dtype = self.stored = FLOATS[name]
        self.columns = self.width

    def encode(self, rows: Tensor) -> Tensor:
        return rows.to(self.stored).contiguous()

    def decode(self, stored: Tensor, columns: slice = slice(None)) -> Tensor:
        return stored[:, columns]


@dataclass(frozen=True)
class Alike:
    """Neighbouring layers of one shape, which are coded together."""

    layers: slice  # their numbers
    shape: tuple[int, int]  # (k_out, k_in) of each
    size: int  # bytes that the codes of each take
    columns: slice  # their values in a row
    codes: slice  # their codes in a stored row

    @property
    def width(self) -> int:
        return prod(self.shape)


class LayerCodec(Codec):
    """Gradients as bytes, layer by layer; the codes of each take ``sizes`` bytes.

    A stored row is ``head`` float32 values for each layer, the values that are no gradients in float32 (floats first:
    they are aligned then, and so is every row), the codes of every layer, and zeros up to a multiple of 4 bytes.
    """

    coded = True
    dtype = torch.float32
    stored = torch.uint8

    def __init__(
        self, name: str, shapes: Sequence[tuple[int, int]], rest: int, sizes: Sequence[int], head: int = 0
    ) -> None:
        super().__init__(name, shapes, rest)
        self._shapes = list(shapes)
        self._value_ends = np.cumsum([0, *map(prod, shapes)])
        self._head = slice(0, FLOAT_BYTES * head * len(shapes))
        self._rest = slice(self._head.stop, self._head.stop + FLOAT_BYTES * rest)
        self._code_ends = self._rest.stop + np.cumsum([0, *sizes])
        self.columns = -(-int(self._code_ends[-1]) // FLOAT_BYTES) * FLOAT_BYTES

    @abstractmethod
    def _write(self, values: Tensor, stored: Tensor, group: Alike) -> None:
        """Code some layers, (n, layers, width) float32, into their place in stored rows of zeros."""

    @abstractmethod
    def _read(self, stored: Tensor, group: Alike, values: Tensor) -> None:
        """Decode some layers of stored rows into (n, layers, width)."""

    def encode(self, rows: Tensor) -> Tensor:
        values = rows.float()
        stored = torch.zeros(len(values), self.columns, dtype=torch.uint8, device=values.device)
        for chunk, group in self._chunks(len(values), range(len(self._shapes))):
            self._write(values[chunk, group.columns].unflatten(1, (-1, group.width)), stored[chunk], group)
        stored[:, self._rest].view(torch.float32)[:] = values[:, self._value_ends[-1] :]
        return stored

    def decode(self, stored: Tensor, columns: slice = slice(None)) -> Tensor:
        start, stop, _ = columns.indices(self.width)
        out = torch.empty(len(stored), stop - start, device=stored.device)
        first, last = np.searchsorted(self._value_ends, [start, stop])
        for chunk, group in self._chunks(len(out), range(first, min(last, len(self._shapes)))):
            place = slice(group.columns.start - start, group.columns.stop - start)
            self._read(stored[chunk], group, out[chunk, place].unflatten(1, (-1, group.width)))
        end = int(self._value_ends[-1])
        if stop > (kept := max(start, end)):
            out[:, kept - start :] = stored[:, self._rest].view(torch.float32)[:, kept - end : stop - end]
        return out

    def alike(self, layers: Iterable[int]) -> list[Alike]:
        """Group some layers, given by number and in order, into neighbours of one shape."""
        groups: list[Alike] = []
        for i in layers:
            columns, codes = (slice(int(ends[i]), int(ends[i + 1])) for ends in (self._value_ends, self._code_ends))
            size, first = codes.stop - codes.start, i
            if groups and groups[-1].layers.stop == i and groups[-1].shape == self._shapes[i]:
                last = groups.pop()
                first, columns = last.layers.start, slice(last.columns.start, columns.stop)
                codes = slice(last.codes.start, codes.stop)
            groups.append(Alike(slice(first, i + 1), self._shapes[i], size, columns, codes))
        return groups

    def _chunks(self, rows: int, layers: Iterable[int]) -> Iterator[tuple[slice, Alike]]:
        for group in self.alike(layers):
            step = max(1, CHUNK // (group.columns.stop - group.columns.start))
            yield from ((slice(start, start + step), group) for start in range(0, rows, step))
