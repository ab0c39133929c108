"""Block-diagonal symmetric matrices: how second moments of layers too wide for a full one are kept.

A width is cut into equal contiguous blocks of at most ``BLOCK``; what couples two blocks is left out.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loghook.project.linear import linear, products

BLOCK = 4096


def cut(width: int, limit: int = BLOCK) -> list[slice]:
    """Cut a width into as few contiguous slices of at most ``limit`` as it takes, of nearly equal length."""
    count = -(-width // limit)
    edges = [width * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def square_size(width: int) -> int:
    return sum((part.stop - part.start) ** 2 for part in cut(width))


def blocks_of(flat: Tensor, width: int) -> list[Tensor]:
    """Give the flattened blocks of a (width, width) matrix their shapes back."""
    sizes = [part.stop - part.start for part in cut(width)]
    return [block.view(n, n) for n, block in zip(sizes, flat.split([n * n for n in sizes]), strict=True)]


def second_moment_blocks(z_BSk: Tensor, weight_BS: Tensor | None) -> Tensor:
    """Sum over tokens of ``z z^T``, its diagonal blocks flattened one after the other."""
    z_Nk, weight_N = z_BSk.flatten(0, -2), None if weight_BS is None else weight_BS.flatten()
    if weight_N is None and z_Nk.dtype in (torch.bfloat16, torch.float16):  # see ``widened``
        return torch.cat([products(z.T, z).flatten() for z in (z_Nk[:, part] for part in cut(z_Nk.shape[1]))])
    z_kN = z_Nk.T.contiguous()  # quick products want their strips as rows
    weighted_kN = z_kN if weight_N is None else z_kN * weight_N
    return torch.cat([_symmetric(z_kN[part], weighted_kN[part]).flatten() for part in cut(len(z_kN))])


def _symmetric(z_kN: Tensor, weighted_kN: Tensor) -> Tensor:
    """``z (w z)^T`` in strips that end at the diagonal, and mirrored: little more than half of the arithmetic."""
    width = len(z_kN)
    lower = z_kN.new_zeros(width, width)
    for strip in cut(width, max(64 if z_kN.device.type == "cpu" else 1024, width // 8)):
        lower[strip, : strip.stop] = linear(z_kN[strip], weighted_kN[: strip.stop])
    lower = lower.tril()
    return lower + lower.tril(-1).T


def take_blocks(matrix_kk: Tensor) -> Tensor:
    return torch.cat([matrix_kk[part, part].flatten() for part in cut(len(matrix_kk))])


def each_block(product: Callable[[Tensor, Tensor], Tensor], t: Tensor, blocks: Sequence[Tensor], axis: int) -> Tensor:
    """``product`` of each block of a block-diagonal matrix with its part of a tensor, whose axis is as wide."""
    parts = t.split([len(block) for block in blocks], axis)
    products = [product(part, block.to(part.dtype)) for part, block in zip(parts, blocks, strict=True)]
    return products[0] if len(products) == 1 else torch.cat(products, axis)


def in_float64(t: Tensor) -> Tensor:
    """A tensor in float64, on the CPU where its own device has none, as Apple's."""
    try:
        return t.double()
    except (TypeError, RuntimeError):  # Apple's raise the one, Intel's without fp64 (and a full device) the other
        return t.cpu().double()


@dataclass(frozen=True)
class Factor:
    """Eigendecomposition of one side's mean second moment."""

    values: Tensor  # (width,) float64, not negative, ascending within each block
    vectors: Sequence[Tensor]  # for each block its eigenvectors as columns

    @classmethod
    def of(cls, blocks: Sequence[Tensor], kept: torch.dtype = torch.float64) -> "Factor":
        """Decompose the diagonal blocks of a mean second moment, in float64; eigenvectors are ``kept`` on the CPU."""
        values, vectors = [], []
        for block in map(in_float64, blocks):
            symmetric = (block + block.T) / 2
            try:
                w, v = torch.linalg.eigh(symmetric)
            except RuntimeError:  # a device without memory or solver for it must not cost the pass
                w, v = torch.linalg.eigh(symmetric.cpu())
            # Eigenvectors are free in sign; this choice survives other rounding, as of another number of processes.
            values.append(w.clamp(min=0).cpu())
            vectors.append((v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()).to(kept).cpu())
        return cls(torch.cat(values), vectors)

    @property
    def basis(self) -> Tensor:
        """All eigenvectors as columns of one matrix (width, width)."""
        return self.vectors[0] if len(self.vectors) == 1 else torch.block_diag(*self.vectors)

    def power(self, exponent: float, damping: float) -> Tensor:
        """(M + damping * mean eigenvalue)^exponent, (width, width); the identity where M is zero."""
        mean = float(self.values.mean())
        if mean <= 0:
            return torch.eye(len(self.values), dtype=torch.float64, device="cpu")
        scaled = (self.values + damping * mean) ** exponent
        parts = zip(cut(len(self.values)), self.vectors, strict=True)
        return torch.block_diag(*[(v * scaled[part]) @ v.T for part, v in parts])
