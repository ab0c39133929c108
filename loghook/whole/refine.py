"""Better inverses than EK-FAC, for the questions only: solve ``(GGN + damping) u = g``.

EK-FAC is the preconditioner: block conjugate gradients (O'Leary 1980), or stochastic steps (ASTRA, Wang et al. 2025).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from loghook.errors import ConfigError
from loghook.influence.solvers import Diagonal, gram_basis, nonzero
from loghook.whole.gauss_newton import GaussNewton

SOLVERS = {"cg": 2, "astra": 300}  # {solver: iterations, where none are given}
POWER_STEPS = 4


@dataclass(frozen=True)
class Damped:
    """GGN + damping, and EK-FAC's inverse of the same as preconditioner."""

    matrix: GaussNewton
    damping: float
    solvers: Mapping[str, Diagonal]

    def times(self, u: Tensor, batches: Sequence[Any] | None = None) -> Tensor:
        """Multiply (Q, width) vectors with the damped matrix."""
        return self.matrix.times(u, batches) + self.damping * u

    def precondition(self, r: Tensor) -> Tensor:
        """Multiply with EK-FAC's damped inverse."""
        out = torch.empty_like(r)
        for name, solver in self.solvers.items():
            columns = self.matrix.layout.kinds["gradients"][name]
            out[:, columns] = solver.apply(r[:, columns])
        return out


def conjugate_gradients(system: Damped, g: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, list[float]]:
    """Preconditioned block conjugate gradients (O'Leary 1980): every row of g (Q, width) uses the directions of all.

    An iteration lowers ``u (GGN + damping) u / 2 - g u`` by a known amount. One that brings less than ``tolerance`` of
    what all have brought, mean over questions, is the last. Residuals are no guide: they may rise on the way.

    Returns:
        The solutions, and the mean over questions of |residual| / |g| before each iteration and after the last.
    """
    size = nonzero(g.norm(dim=1, keepdim=True))
    u, r, brought = torch.zeros_like(g), g / size, torch.zeros_like(size)
    p, residuals = system.precondition(r), [float(r.norm(dim=1).mean())]
    for _ in range(iterations):
        p, ap = _conjugate(p, system.times(p))
        along = r @ p.T
        u += along @ p
        r -= along @ ap
        gain = along.square().sum(1, keepdim=True)
        brought += gain
        residuals.append(float(r.norm(dim=1).mean()))
        if float((gain / nonzero(brought)).mean()) <= tolerance:
            break
        z = system.precondition(r)
        p = z - (z @ ap.T) @ p
    return u * size, residuals


def _conjugate(p: Tensor, ap: Tensor) -> tuple[Tensor, Tensor]:
    """Combine directions (Q, width) and their products to k <= Q that are orthonormal in the matrix."""
    gram = (p @ ap.T).double()
    scale = 1 / nonzero(gram.diagonal().clamp(min=0).sqrt())
    # Directions that are left out depend on the others, up to rounding.
    _, mix = gram_basis((gram + gram.T) / 2 * scale * scale[:, None], 100 * torch.finfo(p.dtype).eps)
    mix = (mix * scale[:, None]).T.to(p.dtype)
    return mix @ p, mix @ ap


def stochastic(system: Damped, g: Tensor, iterations: int, step: float, momentum: float) -> tuple[Tensor, list[float]]:
    """ASTRA: ``u <- u + step / l * v``, v a running mean of ``P (g - (GGN_batch + damping) u)``, a batch at each step.

    l is the largest eigenvalue of any batch's preconditioned matrix, by power iteration, with which no batch's step
    leads away from that batch's solution: EK-FAC leaves some directions a hundred times too small, and batches differ.
    Starts from EK-FAC's own answer; the step falls linearly to zero over the last half.
    """
    batches, largest = system.matrix.batches, 1.0
    start = torch.randn(1, g.shape[1], generator=torch.Generator().manual_seed(0), device="cpu").to(g)
    steps = batches[:iterations]  # those that there will be a step for
    for batch in tqdm(steps, "largest stable step", unit=" batches", delay=2, leave=False, disable=None):
        v = start
        for _ in range(POWER_STEPS):
            v = system.precondition(system.times(v / v.norm(), [batch]))
        largest = max(largest, float(v.norm()))
    u = system.precondition(g)
    velocity, residuals = torch.zeros_like(u), []
    for i in tqdm(range(iterations), "refining", unit=" steps", delay=2, leave=False, disable=None):
        r = g - system.times(u, [batches[i % len(batches)]])
        residuals.append(float((r.norm(dim=1) / nonzero(g.norm(dim=1))).mean()))
        velocity = momentum * velocity + (1 - momentum) * system.precondition(r)
        u = u + step / largest * min(1.0, 2 * (1 - i / iterations)) * velocity
    return u, residuals


def solve(
    system: Damped, g: Tensor, *, solver: str, iterations: int | None, tolerance: float, step: float, momentum: float
) -> tuple[Tensor, list[float]]:
    """Solve with one of ``SOLVERS``."""
    iterations = SOLVERS.get(solver, 0) if iterations is None else iterations
    if solver not in SOLVERS or iterations < 1:
        raise ConfigError(f"solver={solver!r} must be 'cg' or 'astra', and iterations={iterations} at least 1.")
    if solver == "cg":
        return conjugate_gradients(system, g, iterations, tolerance)
    return stochastic(system, g, iterations, step, momentum)


def listed(batches: Iterable[Any]) -> list[Any]:
    """Batches to be gone through many times."""
    found = list(batches)
    if not found:
        raise ConfigError("no batches to take the curvature from: pass some of the training data.")
    return found
