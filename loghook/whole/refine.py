"""Better inverses than EK-FAC, for the questions only: solve ``(GGN + damping) u = g``.

GGN is the generalised Gauss-Newton matrix (Schraudolph 2002): the mean over samples of ``J^T H J``, J the derivative of
a sample's outputs by the watched parameters and H the second derivative of its loss by its outputs; for cross-entropy
that is the true Fisher. A product with one vector costs about twice a forward and backward pass: J by differentiating
the backward pass, which is linear in the output's gradient, and J^T by going backwards once more.

EK-FAC is the preconditioner: block conjugate gradients (O'Leary 1980), or stochastic steps (ASTRA, Wang et al. 2025).
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from loghook.arguments import choose, positive, whole
from loghook.capture.batch import batch_size, samples
from loghook.capture.layers import Layer
from loghook.errors import ConfigError, UnsupportedError
from loghook.factors import FactorStore
from loghook.influence.solvers import Diagonal, gram_basis, nonzero
from loghook.log.format import Layout
from loghook.processes import all_gather, all_reduce
from loghook.progress import bar
from loghook.project.blocks import in_float64

Outputs = Callable[[Any], Tensor]
OutputLoss = Callable[[Tensor, Any], Tensor]
GRAPH_BYTES = 2**28  # what the saved activations of a batch may take, times the vectors that go through them together
SOLVERS = {"cg": 2, "astra": 300}  # {solver: iterations, where none are given}
POWER_STEPS = 4


@dataclass
class GaussNewton:
    """GGN of the watched parameters over some batches, as a product."""

    layers: Sequence[Layer]  # the watched ones, in the order of the vectors' columns
    layout: Layout
    batches: Sequence[Any]  # gone through once for each product
    outputs: Outputs  # batch -> the watched model's outputs
    loss: OutputLoss  # (outputs, batch) -> summed loss, a convex function of the outputs
    size: Callable[[Any], int] = batch_size  # batch -> how many samples it has

    def __post_init__(self) -> None:
        self._parameters: list[tuple[Layer, list[Tensor]]] = []
        self._proven = False  # whether the outputs can be differentiated twice
        for layer in self.layers:
            parameters = [layer.module._parameters.get(name) for name in _names(layer)]
            if not all(type(p) is nn.Parameter and p.is_floating_point() and not p.is_meta for p in parameters):
                raise UnsupportedError(
                    f"layer {layer.name!r} holds no plain weight (quantised, sharded, parametrised, a fused expert's) "
                    "for Gauss-Newton products to differentiate by: exclude it, or refine a model of plain weights on "
                    "one process."
                )
            self._parameters.append((layer, [p for p in parameters if p is not None]))

    @functools.cached_property
    def samples(self) -> float:
        """How many samples the batches of all processes have."""
        found = all_reduce(torch.tensor(sum(map(self.size, self.batches)), dtype=torch.float64, device="cpu"))
        if found <= 0:
            raise ConfigError(f"batches have {float(found):g} samples in all: let samples= count those of each batch.")
        return float(found)

    def times(self, vectors: Tensor) -> Tensor:
        """Multiply (Q, width) vectors with the matrix: (Q, width), where they are, float32 or float64."""
        return all_reduce(self._sum(vectors, bar(self.batches, "Gauss-Newton", "batches"))) / self.samples

    def estimate(self, vectors: Tensor, step: int) -> Tensor:
        """``times`` from one batch of each process, another at each step; right on average, of unequal ones too."""
        count = len(self.batches)
        return all_reduce(self._sum(vectors, [self.batches[step % count]]) * count) / self.samples

    def _sum(self, vectors: Tensor, batches: Iterable[Any]) -> Tensor:
        """Add up ``J^T H J v`` of the batches' samples."""
        out = torch.zeros_like(vectors)
        # Fused attention kernels have no second derivative, and compiled code frees what it would need.
        with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            with self._own_leaves() as parameters:
                for batch in batches:
                    self._add(vectors, batch, parameters, out)
        return out

    @contextmanager
    def _own_leaves(self) -> Iterator[list[Tensor]]:
        """Let each layer have parameters of its own: of tied weights its row is its own share of the gradient."""
        places = [(layer.module._parameters, name) for layer in self.layers for name in _names(layer)]
        before = [table[name] for table, name in places]
        leaves = [nn.Parameter(p.detach()) for p in before if p is not None]
        try:
            for (table, name), leaf in zip(places, leaves, strict=True):
                table[name] = leaf
            yield list(leaves)
        finally:
            for (table, name), parameter in zip(places, before, strict=True):
                table[name] = parameter

    def _add(self, vectors: Tensor, batch: Any, parameters: Sequence[Tensor], out: Tensor) -> None:
        """Add ``J^T H J v`` of a batch's samples."""
        y, saved = _with_size(self.outputs, batch)
        dummy = torch.zeros_like(y, requires_grad=True)
        # J^T dummy is linear in the dummy, so that going back through it multiplies with J.
        gradients = torch.autograd.grad(y, parameters, dummy, create_graph=True, allow_unused=True)
        if not self._proven:
            _require_two_derivatives(y, parameters, gradients, dummy)
            self._proven = True
        leaf = y.detach().requires_grad_()
        loss = self.loss(leaf, batch)
        one = loss.requires_grad and loss.numel() == 1
        slope = torch.autograd.grad(loss, leaf, create_graph=True)[0] if one else None
        if slope is None or not slope.requires_grad:
            raise ConfigError(
                "loss(outputs, batch) must be one number with a second derivative by the outputs: the batch's summed "
                "cross-entropy, squared error or the like, of the outputs that it is given."
            )
        step = max(1, GRAPH_BYTES // max(1, saved))
        for some_vectors, total in zip(vectors.split(step), out.split(step), strict=True):
            pairs = zip(gradients, self._split(some_vectors), strict=True)
            used = [(gradient, v) for gradient, v in pairs if gradient is not None]
            (jv,) = _pull([gradient for gradient, _ in used], [dummy], [v for _, v in used])
            (hjv,) = _pull([slope], [leaf], [jv])
            self._join(_pull([y], parameters, [hjv]), total)

    def _split(self, vectors: Tensor) -> list[Tensor]:
        """Rows as they are laid out in a log -> tensors shaped as the parameters, (q, ...)."""
        tensors: list[Tensor] = []
        for layer, parameters in self._parameters:
            rows = vectors[:, self.layout.columns[layer.name]].unflatten(1, (layer.spec.k_out, -1))
            # The adapter's arrangement of a gradient moves values about; its transpose puts them back.
            blank = [torch.zeros_like(p, requires_grad=True) for p in parameters]
            tensors += _pull([_arrange(layer, *blank)], blank, [rows.to(parameters[0])])
        return tensors

    def _join(self, gradients: Sequence[Tensor], out: Tensor) -> None:
        """Add gradients shaped as the parameters, (q, ...), to rows as they are laid out in a log."""
        remaining = iter(gradients)
        for layer, parameters in self._parameters:
            rows = torch.vmap(functools.partial(_arrange, layer))(*itertools.islice(remaining, len(parameters)))
            out[:, self.layout.columns[layer.name]] += rows.flatten(1).to(out)


def _names(layer: Layer) -> tuple[str, ...]:
    return ("weight", "bias")[: 1 + layer.spec.bias]


def _require_two_derivatives(
    y: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], dummy: Tensor
) -> None:
    """Raise where going backwards twice does not multiply with J: ``<J J^T w, w>`` is ``|J^T w|^2`` for any w.

    Backwards passes of custom functions may be no functions of autograd's, which then takes them for constants.
    """
    w = torch.randn(y.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(y)
    pulled = torch.autograd.grad(y, parameters, w, retain_graph=True, allow_unused=True)
    used = [(gradient, v) for gradient, v in zip(gradients, pulled, strict=True) if gradient is not None]
    if not used:
        raise ConfigError("outputs(batch) depends on no watched layer: return the outputs of the watched model itself.")
    wanted = sum(float(v.float().square().sum()) for _, v in used) ** 0.5
    try:
        graphs, unit = [gradient for gradient, _ in used], [v / (wanted or 1.0) for _, v in used]  # float16 overflows
        (jv,) = torch.autograd.grad(graphs, dummy, unit, retain_graph=True, allow_unused=True)
    except RuntimeError:
        jv = None
    found = 0.0 if jv is None else float((jv.float() * w.float()).sum())
    # The model may compute in half precision whatever its outputs are in; what is constant to autograd misses more.
    if not abs(found - wanted) <= 3e-2 * wanted:
        raise UnsupportedError(
            "the model cannot be differentiated twice, which Gauss-Newton products need: a custom autograd function or "
            "a fused kernel whose backward is not differentiable (once_differentiable, Triton, reentrant checkpoints). "
            "Refine with the plain modules in their place."
        )


def _arrange(layer: Layer, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return layer.adapter.gradient(layer.module, weight, bias)


def _with_size(outputs: Outputs, batch: Any) -> tuple[Tensor, int]:
    """The outputs of a batch, and how many bytes its graph saves for the backward pass."""
    saved = 0

    def count(t: Tensor) -> Tensor:
        nonlocal saved
        saved += t.nbytes
        return t.detach()  # an operation that saves its own output would hold itself, and its graph, for ever

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        y = outputs(batch)
    if not isinstance(y, Tensor) or not y.requires_grad:
        what = f"{y.dtype} without a graph" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ConfigError(
            f"outputs(batch) is {what}: return one tensor, as logits, of the watched model's forward with gradients."
        )
    return y, saved


def _pull(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Products of q vectors with a Jacobian's transpose: (q, ...) for each input, zero where it plays no part."""
    q = len(cotangents[0])
    if q == 1:  # also for operations that know no batches of vectors
        alone = torch.autograd.grad(outputs, inputs, [c[0] for c in cotangents], retain_graph=True, allow_unused=True)
        gradients = [None if gradient is None else gradient[None] for gradient in alone]
    else:
        pull = functools.partial(torch.autograd.grad, retain_graph=True, allow_unused=True, is_grads_batched=True)
        gradients = list(pull(outputs, inputs, cotangents))
    return [x.new_zeros(q, *x.shape) if v is None else v for v, x in zip(gradients, inputs, strict=True)]


@dataclass(frozen=True)
class Damped:
    """GGN + damping, and EK-FAC's inverse of the same as preconditioner."""

    matrix: GaussNewton
    damping: float
    solvers: Mapping[str, Diagonal]

    def times(self, u: Tensor) -> Tensor:
        return self.matrix.times(u) + self.damping * u

    def estimate(self, u: Tensor, step: int) -> Tensor:
        return self.matrix.estimate(u, step) + self.damping * u

    def precondition(self, r: Tensor) -> Tensor:
        out = torch.empty_like(r)
        for name, solver in self.solvers.items():
            columns = self.matrix.layout.columns[name]
            out[:, columns] = solver.apply(r[:, columns])
        return out


def conjugate_gradients(system: Damped, g: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, list[float]]:
    """Preconditioned block conjugate gradients (O'Leary 1980): every row of g (Q, width) uses the directions of all.

    An iteration lowers ``u (GGN + damping) u / 2 - g u`` by a known amount. One that brings less than ``tolerance`` of
    what all have brought, mean over questions, is the last. Residuals are no guide: they may rise on the way. Returns
    the solutions, and the mean over questions of |residual| / |g| before each iteration and after the last.
    """
    size = nonzero(g.norm(dim=1, keepdim=True))
    u, r, total_gain = torch.zeros_like(g), g / size, torch.zeros_like(size)
    p, residuals = system.precondition(r), [float(r.norm(dim=1).mean())]
    for _ in range(iterations):
        p, ap = _conjugate(p, system.times(p))
        steps = r @ p.T
        u += steps @ p
        r -= steps @ ap
        gain = steps.square().sum(1, keepdim=True)
        total_gain += gain
        residuals.append(float(r.norm(dim=1).mean()))
        if float((gain / nonzero(total_gain)).mean()) <= tolerance:
            break
        z = system.precondition(r)
        p = z - (z @ ap.T) @ p
    return u * size, residuals


def _conjugate(p: Tensor, ap: Tensor) -> tuple[Tensor, Tensor]:
    """Directions (Q, width) and their products, combined to k <= Q that are orthonormal in the matrix."""
    gram = in_float64(p @ ap.T)
    if bool((gram.diagonal() < -1e-3 * (p.norm(dim=1) * ap.norm(dim=1)).to(gram)).any()):
        raise ConfigError(
            "the damped curvature is negative along a question: loss(outputs, batch) must be convex in the outputs "
            "(cross-entropy of logits, squared error), or the damping larger."
        )
    scale = 1 / nonzero(gram.diagonal().clamp(min=0).sqrt())
    # Directions that are left out depend on the others, up to rounding.
    _, mix = gram_basis((gram + gram.T) / 2 * scale * scale[:, None], 100 * torch.finfo(p.dtype).eps)
    mix = (mix * scale[:, None]).T.to(p)
    return mix @ p, mix @ ap


def stochastic(system: Damped, g: Tensor, iterations: int, step: float, momentum: float) -> tuple[Tensor, float]:
    """ASTRA: ``u <- u + step / l * v``, v a running mean of ``P (g - (GGN_batch + damping) u)``, a batch at each step.

    l is the largest eigenvalue of any batch's preconditioned matrix, by power iteration, with which no batch's step
    leads away from that batch's solution: EK-FAC leaves some directions a hundred times too small, and batches differ.
    Starts from EK-FAC's own answer; the step falls linearly to zero over the last half. Returns the solutions, and the
    mean over questions of |residual| / |g|, for which all batches are gone through once.
    """
    largest = 1.0
    start = torch.randn(1, g.shape[1], generator=torch.Generator().manual_seed(0), device="cpu").to(g)
    # Those that there will be a step for; on the process with most of them, since all multiply together.
    steps = min(iterations, max(all_gather(len(system.matrix.batches))))
    for i in bar(range(steps), "largest stable step", "batches"):
        v = start
        for _ in range(POWER_STEPS):
            v = system.precondition(system.estimate(v / v.norm(), i))
        largest = max(largest, float(v.norm()))
    u = system.precondition(g)
    velocity = torch.zeros_like(u)
    for i in bar(range(iterations), "refining", "steps"):
        velocity = momentum * velocity + (1 - momentum) * system.precondition(g - system.estimate(u, i))
        u = u + step / largest * min(1.0, 2 * (1 - i / iterations)) * velocity
    return u, float(((g - system.times(u)).norm(dim=1) / nonzero(g.norm(dim=1))).mean())


def solve(
    system: Damped, g: Tensor, *, solver: str, iterations: int | None, tolerance: float, step: float, momentum: float
) -> tuple[Tensor, int, float]:
    """Solve for each row of g (Q, width): the solutions, the iterations that were taken, and the residual."""
    choose("solver", solver, tuple(SOLVERS))
    iterations = whole("iterations", SOLVERS[solver] if iterations is None else iterations)
    step, tolerance = positive("step", step), positive("tolerance", tolerance)
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum={momentum} must be at least 0 and less than 1.")
    if solver == "cg":
        u, residuals = conjugate_gradients(system, g, iterations, tolerance)
        return u, len(residuals) - 1, residuals[-1]
    u, residual = stochastic(system, g, iterations, step, momentum)
    return u, iterations, residual


def require_sum(matrix: GaussNewton) -> None:
    """Raise if the loss of a batch is not the sum of its samples' losses, where samples can be told apart."""
    batch = matrix.batches[0]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        y, again = matrix.outputs(batch), matrix.outputs(batch)
        if isinstance(y, Tensor) and not _alike(y, again):
            raise ConfigError("outputs(batch) differ from call to call: call model.eval(), so that dropout is off.")
        try:
            alone = samples(batch)
            whole = float(matrix.loss(y, batch))
            if len(alone) != len(y):
                return
            summed = sum(float(matrix.loss(y[i : i + 1], sample)) for i, sample in enumerate(alone))
        except Exception:  # a loss need not work on one sample
            return
    rounding = 4 * torch.finfo(y.dtype).eps if y.is_floating_point() else 0.0
    if abs(whole - summed) > max(1e-3, rounding) * abs(summed):
        raise ConfigError(
            f"the loss of a batch is {whole:.6g}, and that of its samples together {summed:.6g}: loss(outputs, batch) "
            "must be a sum over the batch."
        )


def _alike(y: Tensor, again: Tensor) -> bool:
    """Whether outputs are the same but for rounding; some may be infinite, as masked logits are."""
    finite = y.isfinite() & again.isfinite()
    y, again = y[finite].float(), again[finite].float()
    size = 1e-2 * y.std(correction=0) + 1e-3 * y.abs().mean()
    return not len(y) or bool((y - again).square().mean().sqrt() <= size)


def require_batches(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list; raise for none, or a function."""
    if callable(batches):
        raise ConfigError("batches= are batches here, such as list(loader)[:20], and no function that yields them.")
    batches = list(batches)
    if not min(counts := all_gather(len(batches))):  # on one process: the others would wait for its products
        each = f" (the processes have {counts})" if len(counts) > 1 else ""
        raise ConfigError(f"no batches to take the curvature from{each}: pass some of the training data on each.")
    return batches


def unrolled(rows: Tensor, store: FactorStore, columns: Mapping[str, slice], time: float) -> tuple[Tensor, Tensor]:
    """(1 - exp(-t H)) H^-1 q and exp(-t H) q of each question (Q, width), H the curvature in its eigenbasis."""
    directions, remaining = torch.empty_like(rows), torch.empty_like(rows)
    for name, eigenvalues in store.eigenvalues().items():
        basis, values = store.bases[name], eigenvalues.double()
        rotated = basis.rotate(rows[:, columns[name]].unflatten(1, values.shape))
        left = torch.exp(-time * values)
        moved = torch.where(values > 0, -torch.expm1(-time * values) / values, time)
        directions[:, columns[name]] = basis.rotate_back(rotated * moved.to(rotated.dtype)).flatten(1)
        remaining[:, columns[name]] = basis.rotate_back(rotated * left.to(rotated.dtype)).flatten(1)
    return directions, remaining
