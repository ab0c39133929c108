"""Inverse curvature of one layer, in the rows' own space; pure mathematics on tensors.

Each solver takes rows ``(n, k_out * k_in)``, flat, and offers ``apply`` (H^-1 G) and ``quadratic`` (<G, H^-1 G>).
"""

from typing import Protocol

import torch
from torch import Tensor

from loghook.errors import ConfigError
from loghook.statistics.factors import Eigenbasis


class Solver(Protocol):
    """The inverse of a layer's damped curvature."""

    def apply(self, rows: Tensor) -> Tensor:
        """Return H^-1 G for each row: (n, w)."""

    def quadratic(self, rows: Tensor) -> Tensor:
        """Return <G, H^-1 G> for each row: (n,)."""


class Identity:
    """No curvature: plain inner products."""

    def apply(self, rows: Tensor) -> Tensor:
        """Return the rows as they are."""
        return rows

    def quadratic(self, rows: Tensor) -> Tensor:
        """Return squared norms."""
        return rows.square().sum(1)


class Diagonal:
    """Curvature that is diagonal in a Kronecker eigenbasis: KFAC and EK-FAC."""

    def __init__(self, basis: Eigenbasis, eigenvalues: Tensor, damping: float) -> None:
        """Take eigenvalues (k_out, k_in) and the damping that is added to them."""
        self._basis = basis
        damped = eigenvalues + damping
        # A layer that never got a gradient has no curvature and no gradients either: it contributes nothing.
        self._inverse = torch.where(damped > 0, 1 / damped, torch.zeros_like(damped))

    def apply(self, rows: Tensor) -> Tensor:
        """Rotate, divide, rotate back."""
        rotated = self._basis.rotate(rows.unflatten(1, self._inverse.shape))
        return self._basis.rotate_back(rotated * self._inverse.to(rows.dtype)).flatten(1)

    def quadratic(self, rows: Tensor) -> Tensor:
        """Weight squared coordinates with inverse eigenvalues."""
        rotated = self._basis.rotate(rows.unflatten(1, self._inverse.shape))
        return (rotated.square() * self._inverse.to(rows.dtype)).sum((1, 2))


class Dense:
    """Curvature as a full matrix: the Fisher of rows, ``mean vec(G) vec(G)^T``."""

    def __init__(self, matrix: Tensor, damping: float) -> None:
        """Take the matrix (w, w) in float64 and factorise it with the damping on its diagonal."""
        eye = torch.eye(len(matrix), dtype=matrix.dtype)
        factor, failed = torch.linalg.cholesky_ex(matrix + damping * eye)
        if failed:
            raise ConfigError(f"damping={damping:.3g} leaves the Fisher singular: choose a larger one (0.1 is usual).")
        self._inverse_root = torch.linalg.solve_triangular(factor, eye, upper=False)

    def apply(self, rows: Tensor) -> Tensor:
        """Multiply with both halves of the inverse."""
        root = self._inverse_root.to(rows.dtype)
        return rows @ root.T @ root

    def quadratic(self, rows: Tensor) -> Tensor:
        """Squared norm after the inverse root."""
        return (rows @ self._inverse_root.T.to(rows.dtype)).square().sum(1)


class LowRank:
    """The Fisher of fewer rows than values, by the Woodbury identity: an N x N system instead of a w x w one.

    With R (N, w): (R^T R / N + d I)^-1 = (I - R^T (N d I + R R^T)^-1 R) / d.
    """

    def __init__(self, rows: Tensor, damping: float) -> None:
        """Take all rows of the layer (N, w) in float64, and a positive damping."""
        self._rows, self._damping = rows, damping
        gram = rows @ rows.T
        gram.diagonal().add_(len(rows) * damping)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise ConfigError(f"damping={damping:.3g} leaves the Fisher singular: choose a larger one (0.1 is usual).")
        # root = L^-1 R, so that R^T (L L^T)^-1 R = root^T root
        self._root = torch.linalg.solve_triangular(factor, rows, upper=False)

    def apply(self, rows: Tensor) -> Tensor:
        """Take away what the rows span, and divide by the damping."""
        root = self._root.to(rows.dtype)
        return (rows - rows @ root.T @ root) / self._damping

    def quadratic(self, rows: Tensor) -> Tensor:
        """The same as an inner product; the difference is taken in float64."""
        wide = rows.double()
        return ((wide.square().sum(1) - (wide @ self._root.T).square().sum(1)) / self._damping).to(rows.dtype)
