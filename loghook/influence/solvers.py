"""Inverse curvature of one layer, in the rows' own space; pure mathematics on tensors.

Each solver takes rows ``(n, k_out * k_in)``, flat, and offers ``apply`` (H^-1 G) and ``quadratic`` (<G, H^-1 G>).
"""

import copy

import torch
from torch import Tensor

from loghook.errors import ConfigError
from loghook.factors import Eigenbasis
from loghook.project.blocks import in_float64
from loghook.project.linear import linear

WIDENED = 2**16  # float32 values that are squared in float64 at a time: they stay in the cache


def nonzero(sizes: Tensor) -> Tensor:
    """Sizes to divide by: 1 for 0, so that what is nothing stays 0 and is not nan."""
    return sizes.masked_fill(~(sizes > 0), 1)


def gram_basis(gram: Tensor, rounding: float = 1e-12) -> tuple[Tensor, Tensor]:
    """From X X^T: eigenvalues above ``rounding`` times the largest, and M for which the rows of M^T X are orthonormal.

    Ascending eigenvalues (r,), and M (n, r).
    """
    values, vectors = torch.linalg.eigh(gram)
    real = values > rounding * values[-1]
    return values[real], vectors[:, real] / values[real].sqrt()


class Identity:
    """No curvature: plain inner products."""

    def apply(self, rows: Tensor) -> Tensor:
        return rows

    def quadratic(self, rows: Tensor) -> Tensor:
        # In float32 the squares of 1e-23 are 0.
        step = max(1, WIDENED // rows.shape[1])
        return torch.cat([in_float64(few).square().sum(1) for few in rows.split(step)])


def unseen_directions(peaks: Tensor) -> Tensor:
    """Directions of an eigenbasis in which no row has more than float32's rounding: (k_out, k_in) bool.

    ``peaks`` are the largest squares that any row has there, at unit norm, so that no small row is taken for the
    rounding of a large one. A direction is unseen where no row has 1e-5 of its norm: rotated into a basis that comes
    from sums in float32, rows have up to 5e-6 in directions that they lack.

    A question's part there scores zero; divided by a small damping, rounding would drown the scores. Say the question
    has 1 there, and a row 1e-6 where it should have 0: a damping of 1e-8 makes that 1 * 1e-6 / 1e-8 = 100, beside
    scores of about 1.
    """
    return peaks < 1e-10


class Diagonal:
    """Curvature that is diagonal in a Kronecker eigenbasis: KFAC, EK-FAC and Shampoo.

    ``apply`` leaves out the ``unseen`` directions, (k_out, k_in) bool. In ``quadratic`` they count: they are part of a
    question's own norm.
    """

    def __init__(self, basis: Eigenbasis, eigenvalues: Tensor, damping: float, unseen: Tensor | None = None) -> None:
        self.basis = basis
        damped = eigenvalues + damping
        # A layer that never got a gradient has no curvature and no gradients either: it contributes nothing.
        self.inverse = torch.where(damped > 0, 1 / damped, 0)
        self._inverse_seen = self.inverse if unseen is None else self.inverse.masked_fill(unseen, 0)

    def to(self, like: Tensor) -> "Diagonal":
        """A copy with the device and dtype of a tensor."""
        moved = copy.copy(self)
        moved.basis, moved.inverse = self.basis.to(like), self.inverse.to(like)
        moved._inverse_seen = self._inverse_seen.to(like)
        return moved

    def rotated(self, rows: Tensor) -> Tensor:
        """H^-1 G in the eigenbasis, for each row: (n, k_out, k_in)."""
        return self.basis.rotate(rows.unflatten(1, self.inverse.shape)) * self._inverse_seen.to(rows.dtype)

    def apply(self, rows: Tensor) -> Tensor:
        return self.basis.rotate_back(self.rotated(rows)).flatten(1)

    def quadratic(self, rows: Tensor) -> Tensor:
        # Roots: of a layer with gradients of 1e-20 the squares and their inverse do not fit in float32.
        rotated = self.basis.rotate(rows.unflatten(1, self.inverse.shape)) * self.inverse.sqrt().to(rows.dtype)
        return rotated.square().sum((1, 2))


class Dense:
    """Curvature as a full matrix (w, w), float64: the Fisher of rows, ``mean vec(G) vec(G)^T``."""

    def __init__(self, matrix: Tensor, damping: float) -> None:
        eye = torch.eye(len(matrix), dtype=matrix.dtype)
        factor, failed = torch.linalg.cholesky_ex(matrix + damping * eye)
        if failed:
            raise ConfigError(f"damping={damping:.3g} leaves the Fisher singular: choose a larger one (0.1 is usual).")
        self._inverse_root = torch.linalg.solve_triangular(factor, eye, upper=False)

    def apply(self, rows: Tensor) -> Tensor:
        root = self._inverse_root.to(rows.dtype)
        return linear(linear(rows, root), root.T)

    def quadratic(self, rows: Tensor) -> Tensor:
        return linear(rows, self._inverse_root.to(rows.dtype)).square().sum(1)


class LowRank:
    """The Fisher of fewer rows (N, w) than values, float64, in an orthonormal basis of what the rows span.

    ``apply`` leaves out the part of its argument outside that span: it is orthogonal to every row, scores zero against
    this log, and dividing it by a small damping would drown the scores in rounding.
    """

    def __init__(self, rows: Tensor, damping: float) -> None:
        # The span is that of rows at unit norm: of small rows nothing may be taken for rounding of the large ones.
        sizes = nonzero(rows.norm(dim=1, keepdim=True))
        self._rows = rows / sizes
        _, mix = gram_basis(self._rows @ self._rows.T)
        inside = rows @ self._rows.T @ mix
        values, turn = torch.linalg.eigh(inside.T @ inside / len(rows))
        # The basis is mix^T rows; questions are few, so that two products with the rows cost less than to form it.
        self._mix = mix @ turn
        self._inverse = 1 / (values.clamp(min=0) + damping)
        self._damping = damping

    def apply(self, rows: Tensor) -> Tensor:
        inside = self._coordinates(rows.double()) * self._inverse
        return (inside @ self._mix.T @ self._rows).to(rows.dtype)

    def quadratic(self, rows: Tensor) -> Tensor:
        """Here the part outside the span counts too, divided by the damping."""
        wide = rows.double()
        inside = self._coordinates(wide).square()
        outside = (wide.square().sum(1) - inside.sum(1)).clamp(min=0)
        return ((inside * self._inverse).sum(1) + outside / self._damping).to(rows.dtype)

    def _coordinates(self, rows: Tensor) -> Tensor:
        """In the basis: (n, w) -> (n, r)."""
        return rows @ self._rows.T @ self._mix


Solver = Identity | Diagonal | Dense | LowRank
