"""Inner products of few questions with rows of low rank, without decoding them: ``<Q, u v^T> = u^T Q v``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loghook.log.codec.lowrank import LowRankCodec
from loghook.log.format import LayerSpec
from loghook.log.reader import Reader

MOST = 64  # questions times terms; with more it is quicker to decode a block and multiply once


class Bilinear:
    """One small product for each question and layer, with the factors of all rows of a block."""

    stored = True

    def __init__(self, reader: Reader, codec: LowRankCodec, matrix: Tensor, chosen: Sequence[LayerSpec]) -> None:
        """Take questions (Q, gradient_width) and the layers that count."""
        self._codec, self._matrix = codec, matrix
        self._parts = codec.alike(reader.layers.index(spec.name) for spec in chosen)

    def __call__(self, block: Tensor) -> Tensor:
        """Return the inner products with stored rows (n, codec.columns): (Q, n)."""
        out = torch.zeros(len(self._matrix), len(block))
        for part in self._parts:
            questions = self._matrix[:, part.columns]
            if self._codec.whole(part.shape):
                out += questions @ self._codec.decode(block, part.columns).T
                continue
            # By layer: (n c, k_out), (n c, k_in) and (Q, k_out, k_in).
            factors = [side.float().transpose(0, 1).flatten(1, 2) for side in self._codec.factors(block, part)]
            by_layer = questions.unflatten(1, (-1, *part.shape)).transpose(0, 1)
            for left, right, layer in zip(*factors, by_layer, strict=True):
                for total, question in zip(out, layer, strict=True):
                    total += ((left @ question) * right).view(len(block), -1).sum(1)
        return out
