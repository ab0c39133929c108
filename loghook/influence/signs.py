"""Inner products of 1-bit questions with 1-bit rows: ``s_row s_question (width - 2 popcount(row XOR question))``."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loghook.log.codec.base import Alike
from loghook.log.codec.lowbit import LowBitCodec
from loghook.log.format import LayerSpec
from loghook.log.reader import Reader

FEW = 8  # questions; for more, integer products are quicker than counts
CHUNK = 2**21  # bytes of rows that are compared at a time: what is made of them stays in the cache


class Signs:
    """Unequal bits of a question and all rows of a block, counted layer by layer."""

    stored = True

    def __init__(self, reader: Reader, codec: LowBitCodec, questions: Tensor, chosen: Sequence[LayerSpec]) -> None:
        """Take questions as rows are stored, (Q, codec.columns), and the layers that count."""
        self._codec, self._queries = codec, len(questions)
        scales = self._codec.scales(questions)
        self._parts = [
            (part, self._words(questions, part), scales[:, part.layers])
            for part in self._codec.alike([reader.layers.index(spec.name) for spec in chosen])
        ]
        self._step = max(1, CHUNK // codec.row_bytes)

    def _words(self, stored: Tensor, part: Alike) -> np.ndarray:
        """Signs of some layers, 64 in a word, rows side by side: (layers, words, n) uint64."""
        packed = self._codec.packed(stored, part).numpy()
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
