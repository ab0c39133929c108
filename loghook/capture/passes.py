"""``Pass``: one walk over the data, as ``passes()`` yields it; ``Gathering``: what one sums up instead of logging."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from loghook.capture.batch import Given
from loghook.capture.config import Config, rank_of
from loghook.capture.hooked import Hooked
from loghook.capture.layers import Layer
from loghook.capture.session import Repeats
from loghook.capture.whole import Whole
from loghook.errors import BatchError, MismatchError, NotFiniteError, StateError, warn
from loghook.processes import all_gather, all_reduce, process_rank, rank_and_size
from loghook.project.blocks import Factor, blocks_of, square_size
from loghook.project.projection import Side, fit_side, shared_input_name

DRAWN = 2**26  # logits that labels are drawn from at a time: of a large vocabulary they fill a device


class Gathering:
    """What a job delivers, by layer, summed over the blocks of a pass; ``rule`` says what ids do that come again."""

    def __init__(self, hooked: Hooked, job: Whole, rule: str = "first") -> None:
        self._hooked, self._job, self._rule = hooked, job, rule
        self.totals: dict[str, Tensor] = {}
        self.samples, self.repeats = 0, Repeats()

    @contextmanager
    def block(self, ids: list[int] | list[str], given: Given) -> Iterator[int]:
        """Capture one batch and add it; under a GradScaler one that overflowed is left out. Yields how many repeat."""
        keep, repeats = self.repeats.keep(ids, self._rule)
        with self._hooked._capture(len(ids), given, self._job, keep) as captured:
            yield repeats
        results = captured[0]
        if not _finite(results):
            if given.scaler is not None:
                return
            raise NotFiniteError(
                f"the statistics of a batch (data_id {ids[0]!r}, ...) are not finite, so nothing of it was added: look "
                "at the loss of its samples; under a GradScaler pass run(..., scaler=scaler).",
                ids,
            )
        for name, value in results.items():
            wide = value.double() if value.device.type == "cpu" else value  # float32 on a device
            self.totals[name] = self.totals[name].add_(wide) if name in self.totals else wide.clone()
        self.samples += int(keep.sum())
        self.repeats.met(ids)

    def take(self, layer: Layer) -> Tensor:
        """A layer's sum, which is let go of; zeros if it always slept."""
        total = self.totals.pop(layer.name, None)
        return torch.zeros(self._job.shape(layer, 0), dtype=torch.float64, device="cpu") if total is None else total

    def reduce(self) -> "Gathering":
        """Sum over processes, at the same point on all of them."""
        if rank_and_size()[1] > 1:
            for layer in self._hooked._layers:
                self.totals[layer.name] = all_reduce(self.take(layer).cpu().double())
            self.samples = int(all_reduce(torch.tensor(self.samples)))
        if not self.samples:
            raise StateError("this pass saw no samples: run the whole loop inside `for _ in run.passes():`.")
        return self

    def error(self) -> float:
        """Expected relative error of the worst second moment, infinite before the first block.

        For n independent Gaussian vectors the squared Frobenius error is ``((tr M)^2 + |M|^2) / n`` (Isserlis 1918).
        n counts samples, not tokens: tokens of one sample are not independent.
        """
        worst = 0.0
        for layer in self._hooked._layers:
            if layer.name in self.totals:
                for flat, side in zip(split(layer, self.totals[layer.name])[:2], layer.sides, strict=True):
                    trace = sum(float(block.trace()) for block in blocks_of(flat, side.width))
                    norm = float(flat.square().sum())
                    worst = max(worst, math.sqrt((trace**2 / norm + 1) / self.samples) if norm > 0 else 0.0)
        return worst or math.inf


def _finite(results: Mapping[str, Tensor]) -> bool:
    """Whether all values are finite; waits for each device once and not for each layer."""
    sums: dict[torch.device, list[Tensor]] = {}
    for value in results.values():
        sums.setdefault(value.device, []).append(value.sum())
    return all(bool(torch.isfinite(torch.stack(part)).all()) for part in sums.values())


@dataclass
class Pass:
    """One pass over the data.

    Attributes:
        index: 0, 1, ...
        kind: "covariance": second moments are gathered; "eigenvalues": EK-FAC's corrected eigenvalues; "log": rows.
        fisher: "empirical", or "true": see ``labels``.
    """

    index: int
    kind: str
    fisher: str = "empirical"
    _gathering: Gathering | None = field(default=None, repr=False)
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict, repr=False)
    _kept: int = 0  # samples that were logged
    _repeated: int = 0  # samples that were left out, as their ids came before
    _largest: int = 0  # samples of the largest block; 0 before any
    _drew: bool = False  # whether ``labels`` was asked

    @property
    def error(self) -> float:
        """Expected relative error of the second moments so far, from this rank's samples (Frobenius, worst layer).

        In a covariance pass, ``break`` out of the loop over batches once it is small enough: 0.1 is plenty.
        In other passes it is infinite: they need every sample.
        """
        return self._gathering.error() if self._gathering and self.kind == "covariance" else math.inf

    @contextmanager
    def _gather(self, ids: list[int] | list[str], given: Given) -> Iterator[None]:
        """Add a batch to what the pass gathers."""
        assert self._gathering is not None
        with self._gathering.block(ids, given) as repeats:
            yield
        self._count(len(ids), repeats)

    def _count(self, size: int, repeats: int) -> None:
        """Note a block of so many samples."""
        self._kept, self._repeated = self._kept + size - repeats, self._repeated + repeats
        self._largest = max(self._largest, size)

    def _warn_at_end(self) -> None:
        """Notice ids that name the place in a batch and not the sample, or one sample at several checkpoints.

        And a true Fisher without drawn labels.
        """
        if self.fisher == "true" and self._largest and not self._drew:
            warn("fisher='true', and no labels were drawn: the loss of a pass takes this_pass.labels(logits, labels).")
        if self._repeated > self._kept and self._kept <= self._largest:  # no more than one batch: no second epoch
            warn(
                f"{self._repeated:,} samples of this pass had ids that came before, and only {self._kept:,} were kept: "
                "a data_id names a sample, not its place in the batch.",
            )
        elif self._gathering is not None and self._repeated >= self._kept > 0:
            warn(
                f"{self._repeated:,} samples of this {self.kind} pass had ids that came before and were left out, "
                f"{self._kept:,} were kept: an id counts once. Samples at another checkpoint take ids of their own.",
            )

    def labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels for the loss of this pass: the given ones or, for the true Fisher, drawn from the model.

        Args:
            logits: (..., C) outputs for each label: of a causal language model ``logits[:, :-1]``, with
                ``labels[:, 1:]``, whose loss must then not shift them once more.
            labels: (...) integers; negative ones (as -100) are to be ignored, and stay.

        Returns:
            Labels of the same shape. The draws depend on nothing but the process and the order of calls: processes are
            taken to see different samples, as under data parallelism.
        """
        if self.fisher != "true":
            return labels
        if logits.shape[:-1] != labels.shape or labels.is_floating_point():
            raise BatchError(
                f"labels {tuple(labels.shape)} of {labels.dtype} must be one class for each vector of logits "
                f"{tuple(logits.shape)}, whose last axis are the classes; other losses have fisher='empirical'."
            )
        self._drew, device = True, logits.device
        if device not in self._generators:
            seed = (self.index + process_rank() * 0x9E3779B1) % 2**32  # of a processor's generator more bits are lost
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        parts = logits.detach().flatten(0, -2).split(max(1, DRAWN // logits.shape[-1]))
        draw = partial(torch.multinomial, num_samples=1, generator=self._generators[device])
        drawn = torch.cat([draw(part.float().softmax(-1)) for part in parts]).view(labels.shape)
        return torch.where(labels < 0, labels, drawn.to(labels.dtype))


def split(layer: Layer, total: Tensor) -> tuple[Tensor, Tensor, float]:
    """Take apart what the covariance job delivers: blocks of inputs, blocks of output gradients, tokens."""
    inputs, outputs, tokens = total.split([*(square_size(side.width) for side in layer.sides), 1])
    return inputs, outputs, float(tokens)


def decompose(
    layers: Sequence[Layer], sums: Gathering, kept: torch.dtype = torch.float64
) -> dict[str, tuple[Factor, Factor]]:
    """Eigendecompose every layer's mean second moments; each process takes its share of the layers.

    Layers that read the same input, and so have equal sums, share the decomposition. A layer of which no token was
    counted has zero factors. Factors lie on the CPU, and the sums are let go of on the way: those of a large model
    would fill a device. For the same reason processes exchange a layer each at a time.
    """
    rank, world = rank_and_size()
    inputs: dict[tuple[int, torch.device], list[tuple[Tensor, Factor]]] = {}
    factors: dict[str, tuple[Factor, Factor]] = {}
    for start in range(0, len(layers), world):
        mine: dict[str, tuple[Factor, Factor]] = {}
        for place, layer in enumerate(layers[start : start + world]):
            total = sums.take(layer)
            if place != rank:
                continue
            w_in, w_out = (side.width for side in layer.sides)
            flat_in, flat_out, tokens = split(layer, total.to(layer.device_and_dtype()[0]))
            flat_in, flat_out = flat_in / max(tokens, 1.0), flat_out / max(tokens, 1.0)
            decomposed = inputs.setdefault((w_in, flat_in.device), [])
            factor = next((factor for flat, factor in decomposed if torch.equal(flat, flat_in)), None)
            if factor is None:
                factor = Factor.of(blocks_of(flat_in, w_in), kept)
                decomposed[:] = [*decomposed, (flat_in, factor)][-2:]  # siblings come one after the other
            mine[layer.name] = factor, Factor.of(blocks_of(flat_out, w_out), kept)
        for share in all_gather(mine):
            factors.update(share)
    return factors


def fit_sides(
    layers: Sequence[Layer], factors: Mapping[str, tuple[Factor, Factor]], config: Config
) -> dict[str, tuple[Side, Side]]:
    """Make a fitted projection from the factors of second moments."""
    sides = {}
    for layer in layers:
        if layer.name not in factors:
            raise MismatchError(f"layer {layer.name!r} has no factors: fit them with the same watch(...) patterns.")
        name, (inputs, outputs) = layer.name, factors[layer.name]
        fit = partial(
            fit_side, config.projection, seed=config.seed, rank=rank_of(name, config.rank),
            damping=config.whitening or 0.0,
        )  # fmt: skip
        sides[name] = fit(inputs, name=shared_input_name(name), side="in"), fit(outputs, name=name, side="out")
    return sides
