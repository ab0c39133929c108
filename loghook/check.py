"""``loghook.check``: proves the rows on a user's own model against one-sample-at-a-time autograd."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loghook.capture.block import nothing_delivered
from loghook.capture.models import describe_coverage, mixing_modules, unwrap
from loghook.capture.probe import LossFunction, Probe, left_alone
from loghook.capture.select import HEAD, Watch, matches
from loghook.errors import BatchError, ConfigError, DeliveryError, UnsupportedError

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
_TIMES, _MOST = 5, 0.3  # how many times what rounding does to a gradient is let pass, and how much of the gradient
_NOTHING = 10  # how many times what rounding leaves of a layer's gradient may be of one that is zero by construction
_TF32 = 1e-2  # of float32 where a GPU rounds the factors of its products to 10 bits
# What mixes samples, or documents, in a model and in a loss.
_SUSPECTS = {
    "sample": ("batch statistics, padding that leaks, an attention kernel", "a contrastive term, in-batch negatives"),
    "document": (
        "attention that is not cut off between documents: transformers does it for position_ids that restart, without "
        "an attention_mask and with use_cache=False",
        "the label of a document's first token is what the document before it predicts: -100 leaves it out",
    ),
}


@dataclass
class CheckReport:
    """What ``check`` found; true if all is well.

    Attributes:
        errors: {layer: largest relative error over the samples}, for layers that ran.
        not_compared: layers of which autograd has no gradient to compare with (sharded, quantised or parametrised
            weights, weights tied to another module): their errors are between a batch and each sample alone.
        problems: one line for each thing that makes rows wrong or a log misleading, with what to do.
        tolerance: the error up to which a layer passes.
        rounding: {layer: how far autograd's own gradient of a sample moves if layers' outputs are rounded otherwise},
            where an error is above the tolerance. Up to five times that, and 0.3, a sample's error passes: of one that
            the model knows by heart little gradient is left, and few of its digits are certain.
        wrong: layers that do not pass.
        coverage: see ``Manifest.coverage``.
        watched: number of watched layers.
    """

    tolerance: float
    coverage: dict[str, Any]
    watched: int
    errors: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    not_compared: tuple[str, ...] = ()
    rounding: dict[str, float] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        width = max([len(name) for name in self.errors] + [5])
        lines = [describe_coverage(self.watched, self.coverage)]
        lines.append(f"{'layer':<{width}}  largest relative error (up to {self.tolerance:.0e} is rounding)")
        for name, error in self.errors.items():
            note = f"  (rounding alone moves it by {self.rounding[name]:.1e})" if name in self.rounding else ""
            note += "  <-- wrong" if name in self.wrong else ""
            lines.append(f"{name:<{width}}  {error:.1e}{note}")
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        worst = max(self.errors.values(), default=0.0)
        good = f"all rows are exact, up to rounding ({worst:.0e})."
        if self.not_compared:
            lines.append(
                f"Autograd has no gradient of its own for {len(self.not_compared)} layers ({_some(self.not_compared)}: "
                "sharded, quantised, parametrised or tied weights): samples were compared with themselves alone."
            )
            good = f"nothing is wrong, up to rounding ({worst:.0e}), as far as could be compared."
        lines.append("loghook.check: " + (good if self else f"{len(self.problems)} problem(s)."))
        return "\n".join(lines)


def check(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = HEAD,
    may_sleep: str | Sequence[str] = (),
    flattened: str | Sequence[str] = (),
    batch_dim: int = 0,
    segments: Tensor | Callable[[Any], Tensor] | None = None,
    scale: Callable[[Any], float | Tensor] | None = None,
    rank: int = 16,
) -> CheckReport:
    """Compare the rows that loghook would log with one-sample-at-a-time autograd, and print the result.

    Nothing is written, and the model's gradients, buffers and the random state are left as they were. Rows of
    ``gradient="normalized"`` and ``"adam"`` are made of the same gradients; their formula itself is not run here.

    Args:
        model: the user's model, in the mode (train or eval) in which it will be logged.
        loss_fn: ``loss_fn(model, batch)`` returns the loss that will be logged: a sum over samples.
        batch: a batch of at least two samples: a tensor, or a tuple, list or dict of tensors with the samples first.
        include: as in ``run.watch``, like the next four.
        exclude: patterns left out.
        may_sleep: patterns of layers that may rightly not run.
        flattened: patterns of layers with batch and tokens in one axis.
        batch_dim: axis of samples.
        segments: for packed batches, (B, S) as in ``run(..., segments=)``, or a function that makes it from the batch.
            A document is then compared with itself in a row of its own, cut out of the batch's tensors: those of
            shape (B, S, ...), and masks of shape (B, heads or 1, S, S). Pairs, (B, 1), are whole entries of the batch,
            or of what the loss makes of a batch with one entry for each pair.
        scale: where the loss is a mean, ``scale(batch)`` returns what you pass as ``run(..., scale=...)``: the number
            of items that the mean runs over.
        rank: of the projection that rows are compared in.

    Returns:
        A CheckReport, true if every row is exact.

    Raises:
        BatchError: if the batch has fewer than two samples or documents, its tensors differ in length, or a document
            cannot be cut out of one of them.
    """
    if scale is not None and not callable(scale):
        raise ConfigError(
            f"scale={scale!r} must be a function here, batch -> number of items, since samples also run one by one."
        )
    summed = loss_fn if scale is None else lambda model, batch: loss_fn(model, batch) * scale(batch)
    watch = Watch(include, exclude, may_sleep="*", flattened=flattened, batch_dim=batch_dim, activations="sum")
    probe = Probe(model, watch, rank, summed, batch, segments(batch) if callable(segments) else segments)
    report = CheckReport(tolerance=_TOLERANCE[torch.float32], coverage=probe.coverage, watched=len(probe.layers))
    try:
        with left_alone(model):
            _examine(probe, report, may_sleep)
    finally:
        probe.close()
    print(report)
    return report


def _examine(probe: Probe, report: CheckReport, may_sleep: str | Sequence[str]) -> None:
    training = [name for name, m in mixing_modules(probe.model) if m.training or m.running_mean is None]
    if training:
        report.problems.append(
            f"BatchNorm that uses the batch's own statistics ({', '.join(training[:3])}) mixes the samples of a batch, "
            "so a gradient per sample does not exist: call eval() on it for logging, or use GroupNorm or LayerNorm."
        )
        return
    try:
        together, _, loss, silent = probe.together()
        again = probe.together(advance=True).rows
    except (DeliveryError, UnsupportedError, BatchError) as error:
        report.problems.append(str(error))
        return
    if not any(layer.computes_in for layer in probe.watched):  # compiled: hooks leave no word of what they saw
        with torch.compiler.set_stance("force_eager"):
            probe.together()
    # The narrowest dtype that a layer computed in decides what is rounding, also under autocast inside loss_fn.
    report.tolerance = max(_TOLERANCE.get(layer.computes_in or torch.float64, 3e-2) for layer in probe.watched)
    if report.tolerance == _TOLERANCE[torch.float32] and _computes_in_tf32(probe.model):
        report.tolerance = _TF32
    if len(silent) == len(probe.watched):
        report.problems.append(nothing_delivered(probe.watched))
        return
    patterns = (may_sleep,) if isinstance(may_sleep, str) else may_sleep
    unexpected = {name for name in silent if not matches(name, patterns)}
    if unexpected:
        never = sorted(layer.name for layer in probe.watched if layer.name in unexpected and not layer.fired)
        unreached = sorted(unexpected - set(never))
        parts = [f"never ran: {_some(never)}"] if never else []
        parts += [f"ran, but no gradient reached them: {_some(unreached)}"] if unreached else []
        report.problems.append(
            f"{len(unexpected)} layers delivered nothing ({'; '.join(parts)}): exclude them, or name them in "
            "watch(..., may_sleep=...) if they may rightly stay silent."
        )
    compared = [name for name in together if name not in silent]
    finite = _finite(together)
    if not finite.all():
        off = [name for name in compared if not together[name].isfinite().all()]
        report.problems.append(
            f"the rows of {probe.unit}s {_places(~finite)} are not finite, in {len(off)} layers ({_some(off)}), and a "
            "run refuses them: look for a division by zero, a mean over nothing, attention whose keys are all masked, "
            "an overflow. What follows is about the others."
        )
        together, again = ({name: _only(rows, finite) for name, rows in of.items()} for of in (together, again))
    nothing = _nothing(together, report.tolerance)
    if not all(_errors(again[name], together[name], nothing).max() <= report.tolerance for name in compared):
        dropouts = [n for n, m in unwrap(probe.model).named_modules() if "Dropout" in type(m).__name__ and m.training]
        cause = f"dropout in training mode ({_some(dropouts)})" if dropouts else "something random in the forward pass"
        report.problems.append(
            f"two runs over the same batch give different rows: {cause} differs between runs. Rows are those of the "
            "masks that were drawn; call model.eval() for reproducible rows (training-mode logging is legitimate, but "
            "this check cannot compare it)."
        )
        return
    try:
        alone = probe.gradients_alone()
    except (DeliveryError, BatchError) as error:
        report.problems.append(f"a {probe.unit} alone does not run as the batch does: {error}")
        return
    lost = finite & ~_finite(alone.rows)
    if lost.any():
        report.problems.append(
            f"{probe.unit}s {_places(lost)} have rows in the batch, but alone they are not finite, as where a mean "
            "runs over no label: check a batch without them."
        )
        finite &= ~lost
        together = {name: _only(rows, finite) for name, rows in together.items()}
    alone = alone._replace(
        rows={name: _only(rows, finite) for name, rows in alone.rows.items()},
        hooked={name: _only(rows, finite) for name, rows in alone.hooked.items()},
    )
    nothing = _nothing(alone.rows, report.tolerance)
    errors = {name: _errors(together[name], alone.rows[name], nothing) for name in compared}
    report.errors = {name: float(each.max()) for name, each in errors.items()}
    report.not_compared = tuple(name for name in compared if name in alone.captured)
    wrong = [name for name in compared if not report.errors[name] <= report.tolerance]
    if not wrong and not probe.sharded:  # whose gathering all processes do together, whatever each of them finds
        return
    with probe.rounded_otherwise():
        moved = {name: _only(rows, finite) for name, rows in probe.gradients_alone().rows.items()}
    rounding = {name: _errors(moved[name], alone.rows[name], nothing) for name in compared}
    report.rounding = {name: float(rounding[name].max()) for name in wrong}
    limits = {name: (_TIMES * each).clamp(report.tolerance, _MOST) for name, each in rounding.items()}
    wrong = [name for name in wrong if not (errors[name] <= limits[name]).all()]
    report.wrong = tuple(wrong)
    if not wrong:
        return
    factors = _factors([together[name] for name in compared], [alone.rows[name] for name in compared])
    rescaled = {name: _errors(together[name], alone.rows[name] * factors[:, None, None], nothing) for name in compared}
    residual = max(float(each.max()) for each in rescaled.values())
    explained = all((each <= limits[name].clamp(min=1e-3)).all() for name, each in rescaled.items())
    if explained and (factors - 1).abs().max() > 2 * residual:  # else factors leave as much unexplained as they explain
        moved_at_all = torch.stack([rows.flatten(1).any(1) for rows in alone.rows.values()]).any(0)
        report.problems.append(_mean_message(loss, alone.losses, factors[moved_at_all], probe.unit))
        report.errors = {name: float(each.max()) for name, each in rescaled.items()}
        return
    other = [n for n in wrong if not (_errors(alone.hooked[n], alone.rows[n], nothing) <= limits[n]).all()]
    drowned = [n for n in wrong if (errors[n] <= _TIMES * rounding[n]).all()]
    if other:
        report.problems.append(
            f"the rows of {len(other)} layers ({_some(other)}) are not their gradients for a {probe.unit} alone "
            "either: they compute something else than their adapter says (a forward replaced on the object, a hook "
            "that changes what goes in or comes out), or a weight is read without calling its module. Exclude them, or "
            "write an adapter (docs/adapters.md)."
        )
    elif len(drowned) == len(wrong):
        wider = "float32" if report.tolerance > _TF32 else "float64" if report.tolerance > 1e-9 else None
        report.problems.append(
            f"rounding alone moves the gradients of {len(drowned)} layers ({_some(drowned)}) by up to "
            f"{max(report.rounding.values()):.1g} of their size, so nothing can be compared: "
            f"{f'check in {wider}' if wider else 'leave out samples with next to no gradient, or exclude the layers'}."
        )
    else:
        report.problems.append(_influence_message(probe, wrong, finite))


def _computes_in_tf32(model: nn.Module) -> bool:
    """Whether a GPU may compute this model in TF32, as it does convolutions unless it is told otherwise."""
    if not any(p.is_cuda for p in model.parameters()):
        return False
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" in (torch.backends.cuda.matmul.fp32_precision, conv.fp32_precision if convolves else None)


def _factors(together: list[Tensor], alone: list[Tensor]) -> Tensor:
    """By how much each sample's row in the batch is its row alone, in the least-squares sense: (B,)."""
    a = torch.cat([rows.flatten(1) for rows in together], 1)
    b = torch.cat([rows.flatten(1) for rows in alone], 1)
    norm = b.square().sum(1)
    return torch.where(norm > 0, (a * b).sum(1) / norm.clamp(min=1e-300), torch.ones_like(norm))


def _influence_message(probe: Probe, wrong: Sequence[str], finite: Tensor) -> str:
    """Say where samples mix: the first layer whose *input* depends on the rest of the batch."""
    if probe.sharded:  # other processes may have found nothing wrong, and would not gather the weights
        return (
            f"{probe.unit}s influence each other: the rows of {len(wrong)} layers ({_some(wrong)}) depend on the rest "
            "of the batch; check the model before it is sharded to see where."
        )
    inputs = probe.together(synchronised=False).inputs
    names, first = list(inputs), len(inputs)
    for i, one in enumerate(probe.each_alone()):
        off = [names.index(n) for n, x in one.inputs.items() if not _errors(inputs[n][i : i + 1], x) <= 1e-3]
        first = min([first, *off]) if finite[i] else first
    before, after = _SUSPECTS[probe.unit]
    where = (
        f"the input of {names[first]!r} is the first that does so: look at what comes before it ({before})"
        if first < len(names)
        else f"inputs of layers do not, so look at the loss ({after}) and at weights read without calling their module"
    )
    return (
        f"{probe.unit}s influence each other: the rows of {len(wrong)} layers ({_some(wrong)}) depend on the rest of "
        f"the batch; {where}."
    )


def _mean_message(loss: float, singles: Sequence[float], factors: Tensor, unit: str) -> str:
    size = len(singles)
    if (factors * size - 1).abs().max() < 1e-2:
        remedy = (
            f"It is a mean over the {size} {unit}s: pass run(..., scale={size}), or sum the loss (and check it with "
            "check(..., scale=len of the batch))."
        )
    else:
        remedy = (
            "Each sample's factor differs, as in a mean over tokens: sum the loss over tokens (reduction='sum'), or "
            "pass run(..., scale=n) with the number n of items that the mean runs over."
        )
    return (
        f"the loss is no sum over {unit}s: rows in the batch are {factors.min():.6g} to {factors.max():.6g} times "
        f"those of each alone (loss of the batch {loss:.4g}; sum of its {unit}s' losses {sum(singles):.4g}). {remedy}"
    )


def _finite(rows: dict[str, Tensor]) -> Tensor:
    """Which samples have finite rows in all layers, (B,)."""
    return torch.stack([of.flatten(1).isfinite().all(1) for of in rows.values()]).all(0)


def _only(rows: Tensor, chosen: Tensor) -> Tensor:
    """Rows with zeros for samples that are not compared; nan would make each comparison, and each maximum, void."""
    return rows.where(chosen[:, None, None], 0.0)


def _places(chosen: Tensor) -> str:
    places = chosen.nonzero().flatten().tolist()
    return f"{str(places[:8])[:-1]}{', ...' if len(places) > 8 else ''}]"


def _nothing(rows: dict[str, Tensor], tolerance: float) -> Tensor:
    """How large a row of each sample may be that is all rounding, (B,), as of a layer whose gradient is zero.

    Rounding is a share of the largest layer's row: queries of attention over a single key are their own differences.
    """
    eps = torch.finfo(torch.float64 if tolerance <= _TOLERANCE[torch.float64] else torch.float32).eps
    return _NOTHING * eps * torch.stack([of.flatten(1).norm(dim=1) for of in rows.values()]).amax(0)


def _errors(a: Tensor, b: Tensor, nothing: Tensor | float = 0.0) -> Tensor:
    """Relative error of each sample, (B,); one with almost no gradient is judged by the others' size.

    Rows that are both ``nothing`` are equal.
    """
    norms, off = b.flatten(1).norm(dim=1), (a - b).flatten(1).norm(dim=1)
    off = off.masked_fill((norms <= nothing) & (off <= nothing), 0.0)
    floor = float(norms.max()) * 1e-3
    return off / norms.clamp(min=floor) if floor else (off > 0).to(off)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")
