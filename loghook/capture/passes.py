"""``Pass``: one walk over the data, as ``run.passes()`` yields it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


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
    _error: Callable[[], float] | None = None
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Expected relative error of the second moments so far, from this rank's samples (Frobenius, worst layer).

        In a covariance pass, ``break`` out of the loop over batches once it is small enough: 0.1 is plenty.
        In other passes it is 0: they need every sample.
        """
        return 0.0 if self._error is None else self._error()

    def labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels for the loss of this pass: the given ones or, for the true Fisher, drawn from the model.

        Args:
            logits: (..., C) outputs for each label.
            labels: (...) integers; negative ones (as -100) are to be ignored, and stay.

        Returns:
            Labels of the same shape. The draws depend on nothing but the order of calls.
        """
        if self.fisher != "true":
            return labels
        device = logits.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.index)
        chances = logits.detach().float().softmax(-1).flatten(0, -2)
        drawn = torch.multinomial(chances, 1, generator=self._generators[device]).view(labels.shape)
        return torch.where(labels < 0, labels, drawn.to(labels.dtype))
