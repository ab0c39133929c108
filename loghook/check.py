"""``loghook.check``: proves the rows on a user's own model against one-sample-at-a-time autograd."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from loghook.capture.batch import Segments
from loghook.capture.block import nothing_delivered, partly_delivered
from loghook.capture.models import describe_coverage, unwrap
from loghook.capture.probe import LossFunction, Probe, left_alone
from loghook.capture.select import HEAD, Watch, matches
from loghook.comparison import TF32, TOLERANCE, Comparison, Rows, differ, finite_samples, in_words, largest, only
from loghook.errors import BatchError, ConfigError, DeliveryError, UnsupportedError, some
from loghook.processes import all_gather


@dataclass
class CheckReport:
    """What ``check`` found; true if all is well.

    Attributes:
        errors: {layer: largest relative error over the samples}, for layers that ran; 0 where a gradient is nothing but
            the rounding of the largest layer's. Samples whose rows are not finite are left out, and named in a problem.
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
        width = max(map(len, ["layer", *self.errors]))
        lines = [describe_coverage(self.watched, self.coverage)]
        lines.append(f"{'layer':<{width}}  largest relative error (up to {self.tolerance:.0e} is rounding)")
        for name, error in self.errors.items():
            note = f"  (rounding alone moves it by {self.rounding[name]:.1e})" if name in self.rounding else ""
            note += "  <-- wrong" if name in self.wrong else ""
            lines.append(f"{name:<{width}}  {error:.1e}{note}")
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        largest_error = max(self.errors.values(), default=0.0)
        verdict = f"all rows are exact, up to rounding ({largest_error:.0e})."
        if self.not_compared:
            lines.append(
                f"Autograd has no gradient of its own for {len(self.not_compared)} layers ({some(self.not_compared)}: "
                "sharded, quantised, parametrised or tied weights): samples were compared with themselves alone."
            )
            verdict = f"nothing is wrong, up to rounding ({largest_error:.0e}), as far as could be compared."
        lines.append("loghook.check: " + (verdict if self else f"{len(self.problems)} problem(s)."))
        return "\n".join(lines)


def check(  # noqa: D417 - five arguments share a line
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = HEAD,
    may_sleep: str | Sequence[str] = (),
    flattened: str | Sequence[str] = (),
    batch_dim: int = 0,
    segments: Segments | Callable[[Any], Segments] | None = None,
    alone: Sequence[Any] | None = None,
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
        include, exclude, may_sleep, flattened, batch_dim: as in ``run.watch``.
        segments: for packed batches, (B, S) as in ``run(..., segments=)``, or a function that makes it from the batch.
            A document is then compared with itself in a row of its own, cut out of the batch's tensors: those of
            shape (B, S, ...), and masks of shape (B, heads or 1, S, S). Pairs, (B, 1), are whole entries of the batch,
            or of what the loss makes of a batch with one entry for each pair.
        alone: each sample as a batch of its own, where that is not the batch cut along the first axes of its tensors
            (images of several sizes). Then ``segments`` is a function, which is called for these as well.
        scale: where the loss is a mean, ``scale(batch)`` returns what you pass as ``run(..., scale=...)``: the number
            of items that the mean runs over, or one for each row, (B,).
        rank: of the projection that rows are compared in.

    Returns:
        A CheckReport, true if every row is exact.

    Raises:
        BatchError: if the batch has fewer than two samples or documents, its tensors differ in length, or a document
            cannot be cut out of one of them.
    """
    if scale is not None and not callable(scale):
        raise ConfigError(f"scale={scale!r} must be a function here, batch -> number of items, for samples alone.")
    watch = Watch(include, exclude, may_sleep, flattened=flattened, batch_dim=batch_dim, activations="sum")
    if segments is not None and not callable(segments) and (alone is not None or isinstance(segments, Mapping)):
        raise ConfigError(
            "segments by layer, or beside alone=, must be a function here, batch -> segments, for samples alone."
        )
    probe = Probe(
        model, replace(watch, may_sleep=(*watch.may_sleep, "*")), rank, loss_fn, batch, segments, alone, scale
    )
    report = CheckReport(tolerance=TOLERANCE[torch.float32], coverage=probe.coverage, watched=len(probe.layers))
    try:
        with left_alone(model):
            report.problems += _examine(probe, report, watch.may_sleep)
    finally:
        probe.close()
    print(report)
    return report


def _examine(probe: Probe, report: CheckReport, may_sleep: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong, until it leaves nothing to compare."""
    try:
        batch = probe.together()
        again = probe.together(advance=True).rows
    except (DeliveryError, UnsupportedError, BatchError) as error:
        yield str(error)
        return
    report.tolerance = _tolerance(probe)
    if len(batch.silent) == len(probe.watched):
        yield nothing_delivered(probe.watched)
        return
    if missing := [x for x in probe.watched if x.name in batch.silent and not matches(x.name, may_sleep)]:
        yield partly_delivered(missing, probe.layers)
    together = {name: rows for name, rows in batch.rows.items() if name not in batch.silent}
    finite = finite_samples(together)
    if not finite.all():
        yield _not_finite(probe.unit, together, finite)
    difference = _not_reproducible(probe, report.tolerance, only(together, finite), only(again, finite))
    # What ends the check of a sharded model on one process ends it on all, which run each sample together.
    differences = list(filter(None, all_gather(difference) if probe.sharded else [difference]))
    if differences:
        yield differences[0]
        return
    try:
        alone = probe.gradients_alone()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model says to a batch of one
        if probe.sharded and not isinstance(error, DeliveryError | BatchError):  # the other processes may wait in it
            raise
        yield f"a {probe.unit} alone does not run as the batch does: {error}"
        return
    chosen = finite & finite_samples({name: alone.rows[name] for name in together})
    if not torch.equal(chosen, finite):
        yield (
            f"{probe.unit}s {_places(finite & ~chosen)} have rows in the batch, but alone they are not finite, as "
            "where a mean runs over no label: check a batch without them."
        )
    comparison = Comparison(probe, report.tolerance, together, batch.loss, alone, chosen)
    if comparison.wrong:
        yield comparison.explain()
    report.errors, report.rounding = largest(comparison.errors), largest(comparison.rounding)
    report.not_compared = tuple(name for name in together if name in alone.captured)
    report.wrong = comparison.wrong


def _tolerance(probe: Probe) -> float:
    if not any(layer.computes_in for layer in probe.watched):  # compiled: hooks leave no word of what they saw
        with torch.compiler.set_stance("force_eager"):
            probe.together()
    # The narrowest dtype that a layer computed in decides what is rounding, also under autocast inside loss_fn.
    tolerance = max(TOLERANCE.get(layer.computes_in or torch.float64, 3e-2) for layer in probe.watched)
    return TF32 if tolerance == TOLERANCE[torch.float32] and _computes_in_tf32(probe.model) else tolerance


def _computes_in_tf32(model: nn.Module) -> bool:
    """Whether a GPU may compute this model in TF32, as it does convolutions unless it is told otherwise."""
    if not any(p.is_cuda for p in model.parameters()):
        return False
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" in (torch.backends.cuda.matmul.fp32_precision, conv.fp32_precision if convolves else None)


def _not_finite(unit: str, together: Rows, finite: Tensor) -> str:
    layers = [name for name, rows in together.items() if not rows.isfinite().all()]
    return (
        f"the rows of {unit}s {_places(~finite)} are not finite, in {in_words(layers)}, and a run refuses "
        "them: look for a division by zero, a mean over nothing, attention whose keys are all masked, an overflow. "
        "What follows is about the others."
    )


def _not_reproducible(probe: Probe, tolerance: float, together: Rows, again: Rows) -> str | None:
    if not differ(again, together, tolerance):
        return None
    dropouts = [n for n, m in unwrap(probe.model).named_modules() if "Dropout" in type(m).__name__ and m.training]
    cause = f"dropout in training mode ({some(dropouts)})" if dropouts else "something random in the forward pass"
    return (
        f"two runs over the same batch give different rows: {cause} differs between runs. Rows are those of the masks "
        "that were drawn; call model.eval() for reproducible rows (training-mode logging is legitimate, but this check "
        "cannot compare it)."
    )


def _places(chosen: Tensor) -> str:
    return f"[{some(chosen.nonzero().flatten().tolist(), 8)}]"
