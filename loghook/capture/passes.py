"""``Pass``: one walk over the data, as ``passes()`` yields it; ``Gathering``: what one sums up instead of logging."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loghook.capture.batch import Given
from loghook.capture.hooked import Hooked
from loghook.capture.repeats import Repeats
from loghook.capture.sums import Sums
from loghook.capture.whole import Job
from loghook.errors import NotFiniteError
from loghook.processes import process_rank


class Gathering:
    """What a job delivers, summed over the blocks of a pass; ids that come again are treated as ``rule`` says."""

    def __init__(self, hooked: Hooked, job: Job, rule: str = "first") -> None:
        """Nothing yet."""
        self._hooked, self._job, self._rule = hooked, job, rule
        self.sums, self.repeats = Sums(), Repeats()

    @contextmanager
    def block(self, ids: list[int] | list[str], given: Given) -> Iterator[None]:
        """Capture one batch and add it; under a GradScaler one that overflowed is left out."""
        keep, _ = self.repeats.keep(ids, self._rule)
        with self._hooked._capture(len(ids), given, keep=keep, job=self._job) as captured:
            yield
        results = captured[0].results
        if not _finite(results):
            if given.scaler is not None:
                return
            raise NotFiniteError(
                f"the statistics of a batch (data_id {ids[0]!r}, ...) are not finite, so nothing of it was added. Look "
                "at the loss of its samples; under a GradScaler pass run(..., scaler=scaler), which leaves it out.",
                ids,
            )
        self.sums.add(results, int(keep.sum()))
        self.repeats.met(ids)

    def error(self) -> float:
        """See ``Sums.error``."""
        return self.sums.error(self._hooked._layers)

    def reduce(self) -> Sums:
        """Bring the sums of all processes together, at the same point on all of them, and hand them over."""
        sums, self.sums = self.sums, Sums()
        sums.reduce({layer.name: self._job.shape(layer, 0) for layer in self._hooked._layers})
        return sums


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
    _gathering: Gathering | None = None
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Expected relative error of the second moments so far, from this rank's samples (Frobenius, worst layer).

        In a covariance pass, ``break`` out of the loop over batches once it is small enough: 0.1 is plenty.
        In other passes it is 0: they need every sample.
        """
        return self._gathering.error() if self._gathering and self.kind == "covariance" else 0.0

    def labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels for the loss of this pass: the given ones or, for the true Fisher, drawn from the model.

        Args:
            logits: (..., C) outputs for each label.
            labels: (...) integers; negative ones (as -100) are to be ignored, and stay.

        Returns:
            Labels of the same shape. The draws depend on nothing but the process and the order of calls: processes are
            taken to see different samples, as under data parallelism.
        """
        if self.fisher != "true":
            return labels
        device = logits.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.index + process_rank() * 2**32)
        chances = logits.detach().float().softmax(-1).flatten(0, -2)
        drawn = torch.multinomial(chances, 1, generator=self._generators[device]).view(labels.shape)
        return torch.where(labels < 0, labels, drawn.to(labels.dtype))
