"""``loghook.check``: proves the rows on a user's own model against one-sample-at-a-time autograd."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loghook.capture.batch import Given, batch_size, one_sample
from loghook.capture.coverage import describe_coverage
from loghook.capture.hooked import Hooked
from loghook.capture.layers import Layer
from loghook.capture.models import mixing_modules, unwrap
from loghook.capture.select import Watch
from loghook.capture.silence import nothing_delivered
from loghook.errors import BatchError, DeliveryError, UnsupportedError

LossFunction = Callable[[nn.Module, Any], Tensor]
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}


@dataclass
class CheckReport:
    """What ``check`` found; true if all is well.

    Attributes:
        errors: {layer: largest relative error over the samples}, for layers that ran.
        problems: one line for each thing that makes rows wrong or a log misleading, with what to do.
        notes: what is fine but worth knowing.
        tolerance: the error up to which a layer passes.
        coverage: see ``Manifest.coverage``.
        watched: number of watched layers.
    """

    tolerance: float
    coverage: dict[str, Any]
    watched: int
    errors: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        """The report as a table."""
        width = max([len(name) for name in self.errors] + [5])
        lines = [describe_coverage(self.watched, self.coverage)]
        lines.append(f"{'layer':<{width}}  largest relative error (up to {self.tolerance:.0e} is rounding)")
        for name, error in self.errors.items():
            lines.append(f"{name:<{width}}  {error:.1e}{'' if error <= self.tolerance else '  <-- wrong'}")
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        lines += [f"note: {note}" for note in self.notes]
        worst = max(self.errors.values(), default=0.0)
        good = f"all rows are exact, up to rounding ({worst:.0e})."
        lines.append("loghook.check: " + (good if self else f"{len(self.problems)} problem(s)."))
        return "\n".join(lines)


class _Probe(Hooked):
    """Hooks that only look: every layer may stay silent, and nothing is written."""

    def __init__(self, model: nn.Module, include: Any, exclude: Any, flattened: Any, batch_dim: int, rank: int) -> None:
        super().__init__("random", rank, seed=0)
        self.model = model
        watch = Watch(include, exclude, may_sleep="*", flattened=flattened, batch_dim=batch_dim, activations="sum")
        self.coverage = self._hook(model, watch)

    @property
    def watched(self) -> list[Layer]:
        return self._layers

    def rows(self, loss_fn: LossFunction, batch: Any, size: int) -> "_Found":
        """Run a batch through the hooks."""
        with self._capture(size, Given()) as captured:
            loss = loss_fn(self.model, batch)
            loss.backward()
        rows, kinds = captured[0].rows.double().cpu(), self._layout.kinds
        shapes = {layer.name: (layer.spec.k_out, layer.spec.k_in) for layer in self._layers}
        return _Found(
            {name: rows[:, kinds["gradients"][name]].unflatten(1, shape) for name, shape in shapes.items()},
            {name: rows[:, columns] for name, columns in kinds["activations"].items()},
            float(loss.detach()),
            set(captured[0].asleep),
        )


class _Found(NamedTuple):
    rows: dict[str, Tensor]  # by layer, (B, k_out, k_in) in float64
    inputs: dict[str, Tensor]  # by layer, summed over tokens: (B, channels) in float64
    loss: float
    silent: set[str]  # layers that delivered nothing


def check(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = "*lm_head",
    flattened: str | Sequence[str] = (),
    batch_dim: int = 0,
    scale: Callable[[Any], float | Tensor] | None = None,
    rank: int = 16,
) -> CheckReport:
    """Compare the rows that loghook would log with one-sample-at-a-time autograd, and print the result.

    Nothing is written and the model's gradients and random state are left as they were.

    Args:
        model: the user's model, in the mode (train or eval) in which it will be logged.
        loss_fn: ``loss_fn(model, batch)`` returns the loss that will be logged: a sum over samples.
        batch: a batch of at least two samples: a tensor, or a tuple, list or dict of tensors with the samples first.
        include: as in ``run.watch``.
        exclude: as in ``run.watch``.
        flattened: as in ``run.watch``.
        batch_dim: as in ``run.watch``.
        scale: where the loss is a mean, ``scale(batch)`` returns what you pass as ``run(..., scale=...)``: the number
            of items that the mean runs over.
        rank: of the projection that rows are compared in.

    Returns:
        A CheckReport, true if every row is exact.

    Raises:
        BatchError: if the batch has fewer than two samples, or its tensors differ in length.
    """
    loss_fn = loss_fn if scale is None else _summed(loss_fn, scale)
    size = batch_size(batch)
    if size < 2:
        raise BatchError(f"check got a batch of {size} sample: pass at least two, so that samples can be told apart.")
    probe = _Probe(model, include, exclude, flattened, batch_dim, rank)
    report = CheckReport(tolerance=_TOLERANCE[torch.float32], coverage=probe.coverage, watched=len(probe.layers))
    saved = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in saved:
        parameter.grad = None  # backward adds in place to what is there
    try:
        _examine(probe, loss_fn, batch, size, report)
    finally:
        probe.close()
        for parameter, gradient in saved:
            parameter.grad = gradient
    print(report)
    return report


def _summed(loss_fn: LossFunction, scale: Callable[[Any], float | Tensor]) -> LossFunction:
    return lambda model, batch: loss_fn(model, batch) * scale(batch)


def _examine(probe: _Probe, loss_fn: LossFunction, batch: Any, size: int, report: CheckReport) -> None:
    training = [name for name, m in mixing_modules(probe.model) if m.training or m.running_mean is None]
    if training:
        report.problems.append(
            f"BatchNorm that uses the batch's own statistics ({', '.join(training[:3])}) mixes the samples of a batch, "
            "so a gradient per sample does not exist: call eval() on it for logging, or use GroupNorm or LayerNorm."
        )
        return
    try:
        with _random_state():
            together, _, loss, silent = probe.rows(loss_fn, batch, size)
        with _random_state(advance=True):
            again = probe.rows(loss_fn, batch, size).rows
    except (DeliveryError, UnsupportedError, BatchError) as error:
        report.problems.append(str(error))
        return
    if not any(layer.computes_in for layer in probe.watched):  # compiled: hooks leave no word of what they saw
        with _random_state(), torch.compiler.set_stance("force_eager"):
            probe.rows(loss_fn, batch, size)
    # The narrowest dtype that a layer computed in decides what is rounding, also under autocast inside loss_fn.
    report.tolerance = max(_TOLERANCE.get(layer.computes_in or torch.float64, 3e-2) for layer in probe.watched)
    if len(silent) == len(probe.watched):
        report.problems.append(nothing_delivered(probe.watched))
        return
    if silent:
        never = sorted(layer.name for layer in probe.watched if layer.name in silent and not layer.fired)
        unreached = sorted(silent - set(never))
        parts = [f"never ran: {_some(never)}"] if never else []
        parts += [f"ran, but no gradient reached them: {_some(unreached)}"] if unreached else []
        report.problems.append(
            f"{len(silent)} layers delivered nothing ({'; '.join(parts)}): exclude them, or name them in "
            "watch(..., may_sleep=...) if they may rightly stay silent."
        )
    random = {name: _error(again[name], together[name]) for name in together if name not in silent}
    if max(random.values(), default=0.0) > report.tolerance:
        dropouts = [n for n, m in unwrap(probe.model).named_modules() if "Dropout" in type(m).__name__ and m.training]
        cause = f"dropout in training mode ({_some(dropouts)})" if dropouts else "something random in the forward pass"
        report.problems.append(
            f"two runs over the same batch give different rows: {cause} differs between runs. Rows are those of the "
            "masks that were drawn; call model.eval() for reproducible rows (training-mode logging is legitimate, but "
            "this check cannot compare it)."
        )
        return
    try:
        alone, single_losses = _one_at_a_time(probe, loss_fn, batch, size)
    except (DeliveryError, BatchError) as error:
        report.problems.append(f"a sample alone does not run as the batch does: {error}")
        return
    compared = [name for name in together if name not in silent]
    report.errors = {name: _error(together[name], alone[name]) for name in compared}
    wrong = [name for name in compared if report.errors[name] > report.tolerance]
    if not wrong:
        return
    factors = _factors([together[name] for name in compared], [alone[name] for name in compared])
    rescaled = {name: _error(together[name], alone[name] * factors[:, None, None]) for name in compared}
    if max(rescaled.values()) <= max(report.tolerance, 1e-3):
        report.problems.append(_mean_message(loss, single_losses, factors, size))
        report.errors = rescaled
    else:
        report.problems.append(_influence_message(probe, loss_fn, batch, size, wrong))


def _one_at_a_time(
    probe: _Probe, loss_fn: LossFunction, batch: Any, size: int
) -> tuple[dict[str, Tensor], list[float]]:
    """Projected gradients of each sample alone, from ``parameter.grad`` where autograd gives one."""
    rows: dict[str, list[Tensor]] = {layer.name: [] for layer in probe.watched}
    losses = []
    parameters = [p for layer in probe.watched for p in layer.module.parameters(recurse=False)]
    frozen = [(p, p.requires_grad) for p in parameters]
    # In how many modules a parameter is, watched or not.
    uses = Counter(id(p) for module in probe.model.modules() for p in module.parameters(recurse=False))
    try:
        for p in parameters:
            if p.is_floating_point():
                p.requires_grad_(True)
        for i in range(size):
            for p in probe.model.parameters():
                p.grad = None
            with _random_state(), _unsynchronised(probe.model):
                captured, _, loss, _ = probe.rows(loss_fn, one_sample(batch, i, size), 1)
            losses.append(loss)
            for layer in probe.watched:
                rows[layer.name].append(_from_parameters(layer, uses, captured[layer.name][0]))
    finally:
        for p, required in frozen:
            p.requires_grad_(required)
    return {name: torch.stack(values) for name, values in rows.items()}, losses


def _from_parameters(layer: Layer, uses: Counter[int], captured: Tensor) -> Tensor:
    """The row of one sample from autograd's own gradient: (k_out, k_in) in float64.

    Where autograd has none (quantised or sharded weights, weights tied to another module), what a batch of one
    captured is used instead, so that samples are at least compared with themselves alone.
    """
    module = layer.module
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None) if layer.spec.bias else None
    if not isinstance(weight, Tensor) or weight.grad is None or type(weight).__name__ == "DTensor":
        return captured
    if weight.dim() == 1 and layer.spec.in_features > 1 and layer.spec.out_features > 1:  # FSDP1's flat one
        return captured
    if uses[id(weight)] > 1 or weight.numel() != layer.spec.in_features * layer.spec.out_features:
        return captured
    gradient = layer.adapter.gradient(module, weight.grad.double(), None if bias is None else bias.grad.double()).cpu()
    for side, axis in ((layer.output_side, 0), (layer.input_side, 1)):
        if side.matrix is not None:
            matrix = side.matrix.double().cpu() * side.gain
            gradient = matrix @ gradient if axis == 0 else gradient @ matrix.T
    return gradient


def _factors(together: list[Tensor], alone: list[Tensor]) -> Tensor:
    """By how much each sample's row in the batch is its row alone, in the least-squares sense: (B,)."""
    a = torch.cat([rows.flatten(1) for rows in together], 1)
    b = torch.cat([rows.flatten(1) for rows in alone], 1)
    norm = b.square().sum(1)
    return torch.where(norm > 0, (a * b).sum(1) / norm.clamp(min=1e-300), torch.ones_like(norm))


def _influence_message(probe: _Probe, loss_fn: LossFunction, batch: Any, size: int, wrong: Sequence[str]) -> str:
    """Say where samples mix: the first layer whose *input* depends on the rest of the batch."""
    with _random_state():
        inputs = probe.rows(loss_fn, batch, size).inputs
    first = None
    for i in range(size):
        with _random_state():
            single = probe.rows(loss_fn, one_sample(batch, i, size), 1).inputs
        off = [n for n, x in single.items() if _error(inputs[n][i : i + 1], x) > 1e-3]
        names = list(inputs)
        first = min([first, *off] if first else off, key=names.index, default=first)
    where = (
        f"the input of {first!r} is the first that depends on the rest of the batch: look at what comes before it "
        "(batch statistics, padding that leaks, an attention kernel)"
        if first
        else "the inputs of all layers agree, so look at the loss (a contrastive term, in-batch negatives) and for "
        "weights that are read without calling their module"
    )
    return (
        f"samples influence each other: the rows of {len(wrong)} layers ({_some(wrong)}) differ from those of each "
        f"sample alone; {where}. Rows of such a model depend on how it was batched."
    )


def _mean_message(loss: float, singles: Sequence[float], factors: Tensor, size: int) -> str:
    shown = f"(loss of the batch {loss:.4g}; sum of its samples' losses {sum(singles):.4g})"
    if (factors * size - 1).abs().max() < 1e-2:
        remedy = (
            f"it is a mean over the {size} samples: pass run(..., scale={size}), or sum the loss (and check it with "
            "check(..., scale=len of the batch))"
        )
    else:
        remedy = (
            "each sample's factor differs, as in a mean over tokens: sum the loss over tokens (reduction='sum'), or "
            "pass run(..., scale=n) with the number n of items that the mean runs over"
        )
    low, high = float(factors.min()), float(factors.max())
    return (
        f"the loss is no sum over samples: rows in the batch are {low:.3g} to {high:.3g} times those of each sample "
        f"alone {shown}. {remedy[0].upper()}{remedy[1:]}."
    )


def _error(a: Tensor, b: Tensor) -> float:
    """Largest relative error over samples; a sample with almost no gradient is judged by the others' size."""
    norms = b.flatten(1).norm(dim=1)
    floor = float(norms.max()) * 1e-3
    if floor == 0:
        return float((a - b).abs().max() > 0)
    return float(((a - b).flatten(1).norm(dim=1) / norms.clamp(min=floor)).max())


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")


@contextmanager
def _unsynchronised(model: nn.Module) -> Iterator[None]:
    """Keep gradients of this process to itself: DDP would average them over all processes."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


@contextmanager
def _random_state(*, advance: bool = False) -> Iterator[None]:
    """Run something from the same random state each time, and leave the state as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if advance:
            torch.manual_seed(torch.initial_seed() + 1)
        yield
