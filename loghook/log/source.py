"""What rows can be scored: those of a log, or anything else that offers the same."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loghook.log.codec import Codec
from loghook.log.format import Layout, Made, Manifest


class Source(ABC):
    """Rows with their ids, in blocks, and the statistics that go with them; ``loghook.api.Log`` says more."""

    path: Path
    manifest: Manifest
    layout: Layout  # where each layer's values are in a row
    data_ids: list[int] | list[str]
    codec: Codec  # how rows are stored

    def __init__(self) -> None:
        self.cache: dict[Any, Any] = {}  # what was computed from the rows, for as long as this is open
        self.warned = False  # whether a scoring has warned already that the run is not finished

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in row order."""
        return tuple(spec.name for spec in self.layout.layers)

    @property
    def made(self) -> Made:
        """What the rows were made with."""
        return self.manifest.made

    @property
    def fingerprint(self) -> str:
        """Digest of layers and projection; a query must have the same."""
        return self.made.fingerprint

    @property
    def finished(self) -> bool:
        """Whether the run was finalised; else more rows may come, and what is here are the rows so far."""
        return self.manifest.sealed is not None

    @property
    def seal(self) -> str | None:
        """What names the rows of a finished log for good, or None: what is computed from them may be kept under it."""
        return self.manifest.sealed["digest"] if self.manifest.sealed else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that are read: how they are stored, or float32 for low bits."""
        return self.codec.dtype

    def __len__(self) -> int:
        return len(self.data_ids)

    @abstractmethod
    def blocks(
        self, rows: int | None = None, share: tuple[int, int] = (0, 1), *, stored: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """Walk through the rows in blocks; see ``Reader``."""

    @abstractmethod
    def moments(self) -> np.ndarray:
        """The statistics of the rows' tokens: (moments_width,) float64; see ``Layout``."""
