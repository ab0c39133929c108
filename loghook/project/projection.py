"""Projections: for each side of a layer a matrix, or nothing where the side is no wider than the rank.

The random projection is a subsampled randomised Hadamard transform (Ailon and Chazelle 2006; Tropp 2011):
``k`` distinct rows of a Hadamard matrix with random column signs. Against Gaussian entries it has three merits:
inner products are unbiased with less variance, because rows are orthogonal where the width is a power of two; the
entries are plus or minus one power of two, hence *exact* in every dtype down to bfloat16; and they come from
integers alone, so the same seed gives the same bits on every machine.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from loghook.project.blocks import Factor
from loghook.project.linear import cast, linear
from loghook.project.outer import project_input

FITTED = ("pca", "whitened")  # kinds that depend on the data
KINDS = ("random", *FITTED, "none")


def describe_projection(kind: str, rank: int | Mapping[str, int]) -> str:
    return "whole gradients" if kind == "none" else f"{kind} projection, rank {rank}"


@dataclass(eq=False)
class Side:
    """One side of a layer's projection."""

    width: int  # values a token before the projection (with the bias column, where there is one)
    matrix: Tensor | None  # (k, width), or None for identity
    # what rows are multiplied by afterwards, so that ``gain * matrix`` preserves inner products on average
    gain: float = 1.0
    _moved: "dict[tuple[torch.device, torch.dtype], Side]" = field(default_factory=dict)
    # The matrix without its last column, and that, each in one piece, which products read quickest.
    _parts: "tuple[Tensor, Tensor] | None" = None

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Side":
        """The side on a device, and in a dtype; made once, so that layers which share it share the copy."""
        if self.matrix is None:
            return self
        target = device, dtype or self.matrix.dtype
        if target == (self.matrix.device, self.matrix.dtype):
            return self
        if target not in self._moved:
            self._moved[target] = Side(self.width, self.matrix.to(*target), self.gain)
        return self._moved[target]

    def part(self) -> None:
        """Keep the bias's column apart from now on."""
        if self.matrix is not None and self._parts is None:
            self._parts = self.matrix[:, :-1].contiguous(), self.matrix[:, -1].contiguous()

    def project(self, x: Tensor, bias: bool) -> Tensor:
        """Project inputs (..., I) to (..., k), as ``project_input``."""
        if not bias or self._parts is None:
            return project_input(x, self.matrix, bias)
        return linear(x, *(cast(part, x.dtype) for part in self._parts))

    @property
    def k(self) -> int:  # values a token after the projection
        return self.width if self.matrix is None else self.matrix.shape[0]


def shared_input_name(name: str) -> str:
    """Name under which the input side is drawn: siblings share one, so that q, k and v project their input once.

    A numbered module (``layers.3``) is a step of a sequence, not one of several readers of the same input, and
    keeps a projection of its own: the noise of separate projections averages out over layers.
    """
    parent, _, leaf = name.rpartition(".")
    return name if leaf.isdigit() or not parent else parent


def draw_side(kind: str, *, seed: int, name: str, side: str, width: int, rank: int) -> Side:
    """Make the side ("in" or "out") of a projection that takes ``width`` values a token to ``rank``.

    A side no wider than that is kept whole; a fitted kind gets a place-holder until it is fitted. The matrix depends on
    seed, name, side, width and rank alone.
    """
    if kind == "none" or width <= rank:
        return Side(width, None)
    if kind in FITTED:
        return Side(width, torch.zeros(rank, width, device="cpu"))
    return Side(width, *_hadamard(f"{seed}/{name}/{side}/{width}", width, rank))


def fit_side(kind: str, factor: Factor, *, seed: int, name: str, side: str, rank: int, damping: float) -> Side:
    """Make one side of a fitted projection from the eigendecomposition of the side's mean second moment M.

    "pca": the eigenvectors of M with the ``rank`` largest eigenvalues; a side no wider is kept whole. "whitened":
    ``R (M + d I)^-1/2`` with the random R that ``draw_side`` draws (a side no wider than the rank is only whitened) and
    d the damping times M's mean eigenvalue, so that plain inner products of rows are K-FAC's preconditioned ones.
    """
    width = len(factor.values)
    if kind == "pca":
        if width <= rank:
            return Side(width, None)
        order = factor.values.argsort(descending=True, stable=True)[:rank]
        return Side(width, factor.basis[:, order].T.float().contiguous())
    matrix, gain = factor.power(-0.5, damping), 1.0
    if width > rank:
        random = draw_side("random", seed=seed, name=name, side=side, width=width, rank=rank)
        assert random.matrix is not None
        matrix, gain = random.matrix.double() @ matrix, random.gain
    # Scaled by a power of two to entries near 1/sqrt(width), so that float16 products stay near the size of the inputs.
    scale = 2.0 ** round(math.log2(float(matrix.square().mean().sqrt()) * math.sqrt(width)))
    return Side(width, (matrix / scale).float(), gain * scale)


def _hadamard(key: str, width: int, k: int) -> tuple[Tensor, float]:
    n = 1 << (width - 1).bit_length()
    # Raw Philox output is part of numpy's stability promise; the methods of Generator are not.
    stream = np.random.Philox(key=int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little"))
    rows = np.argsort(stream.random_raw(n), kind="stable")[:k].astype(np.uint64)
    flips = (stream.random_raw(width) >> np.uint64(63)).astype(np.uint8)
    parity = (np.bitwise_count(rows[:, None] & np.arange(width, dtype=np.uint64)) & 1) ^ flips
    # Entries near 1/sqrt(width), as an exact power of two: float16 products stay near the size of the inputs.
    exponent = math.ceil(math.log2(width) / 2)
    matrix = torch.from_numpy(1.0 - 2.0 * parity.astype(np.float32)) * 2.0**-exponent
    return matrix, 2.0**exponent / math.sqrt(k)
