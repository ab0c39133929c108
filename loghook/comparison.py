"""Rows of a batch beside those of its samples (or documents) alone: how far they are apart, and what explains it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loghook.capture.probe import Alone, Probe
from loghook.errors import some

Rows = dict[str, Tensor]  # by layer

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
TF32 = 1e-2  # of float32 where a GPU rounds the factors of its products to 10 bits
_TIMES, _MOST = 5, 0.3  # how many times what rounding does to a gradient is let pass, and how much of the gradient
_NOTHING = 10  # how many times the rounding of the largest layer's gradient may be a gradient that is zero
# What mixes samples, or documents, in a model and in a loss.
_SUSPECTS = {
    "sample": ("batch statistics, padding that leaks, an attention kernel", "a contrastive term, in-batch negatives"),
    "document": (
        "attention that is not cut off between documents: transformers does it for position_ids that restart, without "
        "an attention_mask and with use_cache=False",
        "the label of a document's first token is what the document before it predicts: -100 leaves it out",
    ),
}


class Comparison:
    """Rows by layer, with zeros for samples that are not ``chosen``, and errors of each sample, (B,)."""

    def __init__(
        self, probe: Probe, tolerance: float, together: Rows, batch_loss: float, alone: Alone, chosen: Tensor
    ) -> None:
        """Compare the layers that delivered, and let errors pass that rounding makes."""
        self.probe, self.tolerance, self.chosen = probe, tolerance, chosen
        self.batch_loss, self.losses = batch_loss, alone.losses
        self.together = only(together, chosen)
        self.alone = only({name: alone.rows[name] for name in together}, chosen)  # by autograd
        self.hooked = only({name: alone.hooked[name] for name in together}, chosen)  # alone as well
        self.nothing = rounding_alone(self.alone, tolerance)
        self.errors, moved = relative_errors(self.together, self.alone, self.nothing), Rows()
        above = [name for name, error in largest(self.errors).items() if not error <= tolerance]
        if above or probe.sharded:  # whose gathering all processes do together, whatever each of them finds
            with probe.rounded_otherwise():
                otherwise = only(probe.gradients_alone().rows, chosen)
            moved = relative_errors(otherwise, self.alone, self.nothing)
        self.rounding = {name: moved[name] for name in above}  # how far rounding moves ``alone``
        self.limits = {name: (_TIMES * size).clamp(tolerance, _MOST) for name, size in moved.items()}  # of what passes
        self.wrong = tuple(name for name in above if not (self.errors[name] <= self.limits[name]).all())

    def explain(self) -> str:
        """Say what makes layers wrong: the first explanation that fits."""
        explanations = (_scaled, _other_layers, _drowned, _misplaced, _mixed)
        return next(filter(None, (explanation(self) for explanation in explanations)))


def _scaled(comparison: Comparison) -> str | None:
    """Whether rows in the batch are multiples of those alone, as where the loss is a mean."""
    together = torch.cat([rows.flatten(1) for rows in comparison.together.values()], 1)
    alone = torch.cat([rows.flatten(1) for rows in comparison.alone.values()], 1)
    norm = alone.square().sum(1)
    factors = torch.where(norm > 0, (together * alone).sum(1) / norm.clamp(min=1e-300), 1.0)  # by least squares
    rescaled = {name: rows * factors[:, None, None] for name, rows in comparison.alone.items()}
    errors = relative_errors(comparison.together, rescaled, comparison.nothing)
    close = all((error <= comparison.limits[name].clamp(min=1e-3)).all() for name, error in errors.items())
    # Else factors leave as much unexplained as they explain.
    if not close or not (factors - 1).abs().max() > 2 * max(largest(errors).values()):
        return None
    losses, unit = comparison.losses, comparison.probe.unit
    factors, size = factors[norm > 0], len(losses)
    if (factors * size - 1).abs().max() < 1e-2:
        remedy = (
            f"It is a mean over the {size} {unit}s: sum the loss, or pass run(..., scale={size}) and "
            f"check(..., scale=lambda batch: {size})."
        )
    elif factors.min() <= 0 or (comparison.probe.scale is None and float(factors.sum()) > 1.01):
        remedy = (  # parts of a mean are positive and add up to 1 at most
            f"No number of items explains that: the loss weighs a {unit} by what else is in its batch, as where (B, 1) "
            f"meets (B,), in a root or a ratio of sums, or of the hardest {unit}s alone. Make it a sum in which each "
            f"{unit} has a loss of its own."
        )
    else:
        remedy = (
            "Each sample's factor differs, as in a mean over tokens: sum the loss over tokens (reduction='sum'), or "
            "pass run(..., scale=n), and check(..., scale=lambda batch: n), with the number n of items that the mean "
            "runs over. If check was given a scale=, it is not this n; where no n helps, the loss weighs a sample by "
            "the others of its batch (a root, a ratio)."
        )
    return (
        f"the loss is no sum over {unit}s: rows in the batch are {factors.min():.6g} to {factors.max():.6g} times "
        f"those of each alone (loss of the batch {comparison.batch_loss:.4g}; sum of its {unit}s' losses "
        f"{sum(losses):.4g}). {remedy}"
    )


def _other_layers(comparison: Comparison) -> str | None:
    """Whether layers' rows alone are wrong as well."""
    hooked = relative_errors(comparison.hooked, comparison.alone, comparison.nothing)
    wrong_alone = [name for name in comparison.wrong if not (hooked[name] <= comparison.limits[name]).all()]
    if not wrong_alone:
        return None
    missing = {name: comparison.alone[name] - comparison.hooked[name] for name in wrong_alone}
    alike = {name: rows[:1].expand_as(rows) for name, rows in missing.items()}
    if comparison.chosen.all() and all(float(e.max()) <= 1e-2 for e in relative_errors(alike, missing).values()):
        return (
            f"the gradients of {in_words(wrong_alone)} have a part that is equal for all {comparison.probe.unit}s, as "
            "of a penalty on the weights: no row holds it. Leave it out of the loss that is logged."
        )
    return (
        f"the rows of {in_words(wrong_alone)} are not their gradients for a {comparison.probe.unit} alone either: they "
        "compute something else than their adapter says (a forward replaced on the object, a hook that changes what "
        "goes in or comes out), or a weight is read without calling its module. Exclude them, or write an adapter "
        "(docs/adapters.md)."
    )


def _drowned(comparison: Comparison) -> str | None:
    """Whether rounding does as much."""
    if not all((comparison.errors[name] <= _TIMES * comparison.rounding[name]).all() for name in comparison.wrong):
        return None
    wider = "float32" if comparison.tolerance > TF32 else "float64" if comparison.tolerance > 1e-9 else None
    return (
        f"rounding alone moves the gradients of {in_words(comparison.wrong)} by up to "
        f"{max(largest(comparison.rounding).values()):.1g} of their size, so nothing can be compared: "
        f"{f'check in {wider}' if wider else 'leave out samples with next to no gradient, or exclude the layers'}."
    )


def _misplaced(comparison: Comparison) -> str | None:
    """Whether rows are right together, so that only whose they are is wrong."""
    together = {name: comparison.together[name].sum(0, keepdim=True) for name in comparison.wrong}
    alone = {name: comparison.alone[name].sum(0, keepdim=True) for name in comparison.wrong}
    errors = largest(relative_errors(together, alone))
    if not all(errors[name] <= 1e-2 * comparison.errors[name].max() for name in errors):
        return None
    return (
        f"the rows of {in_words(comparison.wrong)} are wrong one by one and right in their sum: their tokens are not "
        f"in the order of {comparison.probe.unit}s that is assumed (time before batch in a layer that is declared "
        "flattened, a batch_dim that is another, segments of other tokens). Mend that, or exclude them."
    )


def _mixed(comparison: Comparison) -> str:
    """Where samples mix: the first layer whose *input* depends on the rest of the batch."""
    probe = comparison.probe
    statement = f"{probe.unit}s influence each other: the rows of {in_words(comparison.wrong)}"
    if probe.sharded:  # other processes may have found nothing wrong, and would not gather the weights
        return f"{statement} depend on the rest of the batch; check the model before it is sharded to see where."
    inputs = probe.together(synchronised=False).inputs
    names, first = list(inputs), len(inputs)
    for i, alone in enumerate(probe.each_alone()):
        if comparison.chosen[i]:
            errors = largest(relative_errors({name: rows[i : i + 1] for name, rows in inputs.items()}, alone.inputs))
            first = min([first, *(names.index(name) for name, error in errors.items() if not error <= 1e-3)])
    before, after = _SUSPECTS[probe.unit]
    where = (
        f"the input of {names[first]!r} is the first that does so: look at what comes before it ({before})"
        if first < len(names)
        else f"inputs of layers do not, so look at the loss ({after}) and at weights read without calling their module"
    )
    return f"{statement} depend on the rest of the batch; {where}."


def finite_samples(rows: Rows) -> Tensor:
    """Which samples have finite rows in all layers, (B,)."""
    return torch.stack([layer.flatten(1).isfinite().all(1) for layer in rows.values()]).all(0)


def only(rows: Rows, chosen: Tensor) -> Rows:
    """Rows with zeros for samples that are not compared; nan would make each comparison, and each maximum, void."""
    return {name: layer.where(chosen[:, None, None], 0.0) for name, layer in rows.items()}


def rounding_alone(rows: Rows, tolerance: float) -> Tensor:
    """How large a row of each sample may be that is all rounding, (B,), as of a layer whose gradient is zero.

    Rounding is a share of the largest layer's row: queries of attention over a single key are their own differences.
    """
    eps = torch.finfo(torch.float64 if tolerance <= TOLERANCE[torch.float64] else torch.float32).eps
    return _NOTHING * eps * torch.stack([layer.flatten(1).norm(dim=1) for layer in rows.values()]).amax(0)


def relative_errors(a: Rows, b: Rows, nothing: Tensor | float = 0.0) -> Rows:
    """Relative error of each sample by layer, (B,); one with almost no gradient is judged by the others' size.

    Rows that are both ``nothing`` are equal.
    """
    errors = {}
    for name, rows in b.items():
        norms, distances = rows.flatten(1).norm(dim=1), (a[name] - rows).flatten(1).norm(dim=1)
        distances = distances.masked_fill((norms <= nothing) & (distances <= nothing), 0.0)
        floor = float(norms.max()) * 1e-3
        errors[name] = distances / norms.clamp(min=floor) if floor else (distances > 0).to(distances)
    return errors


def differ(a: Rows, b: Rows, tolerance: float) -> bool:
    errors = largest(relative_errors(a, b, rounding_alone(b, tolerance)))
    return not all(error <= tolerance for error in errors.values())


def largest(errors: Rows) -> dict[str, float]:
    return {name: float(error.max()) for name, error in errors.items()}


def in_words(layers: Sequence[str]) -> str:
    return f"{len(layers)} layers ({some(layers)})"
