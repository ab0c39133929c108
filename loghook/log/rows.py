"""``Rows``: one layer's rows as a lazy array."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from loghook.log.reader import Reader


class Rows:
    """One layer's rows as a lazy array: indexing reads what it is asked for."""

    def __init__(self, reader: "Reader", columns: slice, shape: tuple[int, ...]) -> None:
        """Rows of ``reader`` in ``columns``, each of ``shape``."""
        self._reader, self._columns = reader, columns
        self.shape = (len(reader), *shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype that indexing gives."""
        stored = self._reader.dtype
        return torch.empty(0, dtype=torch.float32 if stored == torch.bfloat16 else stored).numpy().dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Index as numpy does; the first axis decides what is read."""
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) and key else (key, ())
        if first is Ellipsis:
            first, rest = slice(None), key if isinstance(key, tuple) else (key,)
            return self[first][rest]
        if isinstance(first, int | np.integer):
            if not -len(self) <= first < len(self):
                raise IndexError(f"row {first} of {len(self)}")
            place = int(first) % len(self)
            return self._read(place, place + 1)[0][rest]
        everything = (slice(None), *rest)
        if isinstance(first, slice):
            start, stop, step = first.indices(len(self))
            if step > 0:
                values = self._read(start, max(start, stop))[::step]
            else:
                values = self._gather(np.arange(start, stop, step))
            return values[everything]
        index = np.arange(len(self))[first]  # numpy's own rules for lists, masks and negative places
        if index.ndim != 1:
            return self[:][key]
        return self._gather(index)[everything]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read everything."""
        values = self[:]
        return np.array(values, dtype=dtype or values.dtype, copy=copy)

    def __repr__(self) -> str:
        """Say what it is without reading it."""
        return f"Rows(shape={self.shape}, dtype={self.dtype})"

    def _read(self, start: int, stop: int) -> np.ndarray:
        view = self._reader.view(start, stop)
        return self._gather(np.arange(start, stop)) if view is None else self._numpy(view[:, self._columns])

    def _gather(self, index: np.ndarray) -> np.ndarray:
        return self._numpy(self._reader.gather(index, self._columns))

    def _numpy(self, values: Tensor) -> np.ndarray:
        if values.dtype == torch.bfloat16:
            values = values.float()
        array = values.numpy().reshape(len(values), *self.shape[1:])
        array.flags.writeable = False
        return array
