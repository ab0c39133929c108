"""Better inverses than EK-FAC, for the questions only: solve ``(GGN + damping) u = g`` through the user's own model.

GGN is the mean over samples of ``J^T H J``, J the derivative of a sample's outputs by the watched parameters and H the
second derivative of its loss by its outputs: the generalised Gauss-Newton matrix (Schraudolph 2002), which for
cross-entropy is the true Fisher. EK-FAC is the preconditioner: conjugate gradients (Hestenes and Stiefel 1952), or
stochastic steps (ASTRA, Wang et al. 2025).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from loghook.capture.alone import batch_size
from loghook.capture.layers import Layer
from loghook.errors import ConfigError, UnsupportedError
from loghook.influence.share import combine
from loghook.influence.solvers import Solver
from loghook.log.format import Layout

Outputs = Callable[[Any], Tensor]
OutputLoss = Callable[[Tensor, Any], Tensor]
SOLVERS = ("cg", "astra")
POWER_BATCHES, POWER_STEPS = 10, 4


@dataclass
class GaussNewton:
    """The generalised Gauss-Newton matrix of the watched parameters over some batches, as a product.

    Attributes:
        layers: the watched layers, in the order of the vectors' columns.
        layout: where each layer's values are.
        batches: batches of samples, gone through once for each product.
        outputs: batch -> the model's outputs, through the watched model.
        loss: (outputs, batch) -> summed loss, a convex function of the outputs.
        chunk: how many vectors are multiplied with a batch before its graph is built again.
    """

    layers: Sequence[Layer]
    layout: Layout
    batches: Sequence[Any]
    outputs: Outputs
    loss: OutputLoss

    def __post_init__(self) -> None:
        self._parameters: list[tuple[Layer, list[nn.Parameter]]] = []
        for layer in self.layers:
            found = [layer.module.weight, layer.module.bias if layer.spec.bias else None]
            parameters = [p for p in found if p is not None]
            if not all(type(p) is nn.Parameter and p.is_floating_point() and not p.is_meta for p in parameters):
                raise UnsupportedError(
                    f"layer {layer.name!r} holds no plain weight (quantised or sharded), and Gauss-Newton products "
                    "differentiate by it: refine on one process with an unquantised model."
                )
            self._parameters.append((layer, parameters))  # type: ignore[arg-type]

    def times(self, vectors: Tensor, batches: Sequence[Any] | None = None) -> Tensor:
        """Multiply (Q, width) vectors with the matrix: (Q, width) float32 or float64."""
        batches = self.batches if batches is None else batches
        parameters = [p for _, group in self._parameters for p in group]
        before = [p.requires_grad for p in parameters]
        out, samples = torch.zeros_like(vectors), 0
        try:
            for p in parameters:
                p.requires_grad_(True)
            # Fused attention kernels have no second derivative.
            with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
                for batch in batches:
                    self._add(vectors, batch, parameters, out)
                    samples += batch_size(batch)
        finally:
            for p, was in zip(parameters, before, strict=True):
                p.requires_grad_(was)
        counted = combine(torch.tensor(samples, dtype=torch.float64))
        return combine(out) / float(counted)

    def _add(self, vectors: Tensor, batch: Any, parameters: Sequence[Tensor], out: Tensor) -> None:
        y = self.outputs(batch)
        dummy = torch.zeros_like(y, requires_grad=True)
        # Linear in the dummy, so that its derivative by it is J itself.
        back = torch.autograd.grad(y, parameters, dummy, create_graph=True, materialize_grads=True)
        leaf = y.detach().requires_grad_()
        slope = torch.autograd.grad(self.loss(leaf, batch), leaf, create_graph=True)[0]
        for q in range(len(vectors)):
            forward = torch.autograd.grad(back, dummy, self._split(vectors[q], parameters), retain_graph=True)[0]
            curved = torch.autograd.grad(slope, leaf, forward, retain_graph=True)[0]
            gradients = torch.autograd.grad(y, parameters, curved, retain_graph=True, materialize_grads=True)
            self._join(gradients, out[q])

    def _split(self, vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """A row as it is laid out in a log -> tensors shaped as the parameters."""
        values: list[Tensor] = []
        for layer, group in self._parameters:
            row = vector[self.layout.kinds["gradients"][layer.name]].view(layer.spec.k_out, layer.spec.k_in)
            values += self._transposed(layer, group, row)
        return [v.to(p.device, p.dtype) for v, p in zip(values, parameters, strict=True)]

    def _transposed(self, layer: Layer, group: Sequence[Tensor], row: Tensor) -> tuple[Tensor, ...]:
        """The adapter's arrangement of a gradient moves values about; its transpose puts them back."""
        blank = [torch.zeros_like(p, requires_grad=True) for p in group]
        arranged = layer.adapter.gradient(layer.module, blank[0], blank[1] if len(blank) > 1 else None)
        return torch.autograd.grad(arranged, blank, row.to(arranged.device, arranged.dtype))

    def _join(self, gradients: Sequence[Tensor], out: Tensor) -> None:
        place = iter(gradients)
        for layer, group in self._parameters:
            parts = [next(place) for _ in group]
            row = layer.adapter.gradient(layer.module, parts[0], parts[1] if len(parts) > 1 else None)
            out[self.layout.kinds["gradients"][layer.name]] += row.flatten().to(out.device, out.dtype)


@dataclass(frozen=True)
class Damped:
    """GGN + damping, and EK-FAC's inverse of the same as preconditioner."""

    matrix: GaussNewton
    damping: float
    solvers: dict[str, Solver]

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
    """Preconditioned conjugate gradients for each row of g (Q, width) at once.

    Returns:
        The solutions, and the mean over questions of |residual| / |g| before each iteration and after the last.
    """
    u = system.precondition(g)
    r = g - system.times(u)
    z = system.precondition(r)
    p, rz = z, (r * z).sum(1, keepdim=True)
    size, residuals = g.norm(dim=1), [float((r.norm(dim=1) / _safe(g.norm(dim=1))).mean())]
    for _ in tqdm(range(iterations), "refining", unit=" iterations", delay=2, leave=False, disable=None):
        if residuals[-1] <= tolerance:
            break
        q = system.times(p)
        alpha = rz / _safe((p * q).sum(1, keepdim=True))
        u = u + alpha * p
        r = r - alpha * q
        z = system.precondition(r)
        fresh = (r * z).sum(1, keepdim=True)
        p = z + fresh / _safe(rz) * p
        rz = fresh
        residuals.append(float((r.norm(dim=1) / _safe(size)).mean()))
    return u, residuals


def stochastic(system: Damped, g: Tensor, iterations: int, step: float, momentum: float) -> tuple[Tensor, list[float]]:
    """ASTRA: ``u <- u + step / l * P (g - (GGN_batch + damping) u)`` with momentum, a batch at each step.

    l is the largest eigenvalue of the preconditioned matrix, by power iteration over batches: EK-FAC leaves some
    directions many times too small, in which plain steps diverge. Starts from EK-FAC's own answer; the step falls
    linearly to zero over the last half.
    """
    batches, largest = system.matrix.batches, 1.0
    start = torch.randn(1, g.shape[1], generator=torch.Generator().manual_seed(0)).to(g.dtype)
    for batch in batches[:POWER_BATCHES]:
        v = start
        for _ in range(POWER_STEPS):
            v = system.precondition(system.times(v / v.norm(), [batch]))
        largest = max(largest, float(v.norm()))
    u = system.precondition(g)
    velocity, residuals = torch.zeros_like(u), []
    for i in tqdm(range(iterations), "refining", unit=" steps", delay=2, leave=False, disable=None):
        r = g - system.times(u, [batches[i % len(batches)]])
        residuals.append(float((r.norm(dim=1) / _safe(g.norm(dim=1))).mean()))
        velocity = momentum * velocity + system.precondition(r)
        u = u + step / largest * min(1.0, 2 * (1 - i / iterations)) * velocity
    return u, residuals


def solve(
    system: Damped, g: Tensor, *, solver: str, iterations: int, tolerance: float, step: float, momentum: float
) -> tuple[Tensor, list[float]]:
    """Solve with one of ``SOLVERS``."""
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


def _safe(t: Tensor) -> Tensor:
    return torch.where(t != 0, t, torch.ones_like(t))
