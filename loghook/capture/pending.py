"""Rows of several layers formed together: one product of many matrices in place of many small products.

A layer's own products are so small that waking the threads, or a launch on a GPU, costs more than the arithmetic. A
compiled backward has no use for this: it fuses by itself.

Shape suffixes as in ``loghook.project.outer``; n layers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from loghook.capture.tap import alias, output_gradient, wide_context
from loghook.project.outer import outer, project_output, second_moment

if TYPE_CHECKING:
    from loghook.capture.layers import Slots

BYTES = 8 * 2**20  # what may wait: as much as stays in a processor's cache, and little on a device


class Tokens(NamedTuple):
    """What one call of a layer leaves to be formed."""

    x_BSk: Tensor  # projected inputs
    g_BSk: Tensor  # projected output gradients
    weight_BS: Tensor | None  # as in ``Tap.forward``


class PendingTap(torch.autograd.Function):
    """Identity on a layer's output whose backward offers projected tokens; see ``loghook.capture.tap.Tap``.

    The gradient of its leaf says only that autograd took the offer, so that calls count as they do for other rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x_BSk: Tensor,
        weight_BS: Tensor | None,
        dims: tuple[int, int],  # channel_dim and batch_dim
        call_slot: Tensor,  # leaf (1,)
        slots: "Slots",
    ) -> Tensor:
        """Return ``y`` unchanged; the rest is as in ``Tap.forward``."""
        ctx.save_for_backward(x_BSk)  # which a checkpoint throws away and makes again
        ctx.held = weight_BS, dims, slots
        return alias(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Pass the output gradient on and offer the tokens."""
        (g,) = grads
        (x_BSk,) = ctx.saved_tensors
        weight_BS, dims, slots = ctx.held
        with wide_context(g.device.type):
            g_BSk = project_output(output_gradient(dims, g, x_BSk), slots.output_side.matrix)
        slots.offer(Tokens(x_BSk, g_BSk, weight_BS))
        return g, None, None, None, slots.samples.new_ones(1), None


class Pending:
    """Projected inputs and output gradients of the layers on one device, whose rows are yet to be formed."""

    def __init__(self, dtype: torch.dtype, moments: bool) -> None:
        """Nothing waits; rows are summed in ``dtype``, and ``moments`` asks for the statistics as well."""
        self._dtype, self._moments = dtype, moments
        self._waiting: list[tuple[Slots, Tokens]] = []
        self._bytes = 0

    def add(self, slots: "Slots", tokens: Tokens) -> None:
        """Let a layer's tokens wait for others, or form the rows of all that wait if they have become many."""
        self._waiting.append((slots, tokens))
        self._bytes += tokens.x_BSk.nbytes + tokens.g_BSk.nbytes
        if self._bytes >= BYTES:
            self.form()

    def form(self) -> None:
        """Form the rows and moments of all that wait and add them to their layers' own."""
        alike: dict[tuple[object, ...], list[tuple[Slots, Tokens]]] = {}
        for slots, tokens in self._waiting:
            key = tokens.x_BSk.shape, tokens.g_BSk.shape, tokens.x_BSk.dtype, tokens.g_BSk.dtype
            alike.setdefault(key, []).append((slots, tokens))
        self._waiting, self._bytes = [], 0
        for several in alike.values():
            with torch.no_grad(), wide_context(several[0][1].x_BSk.device.type):
                self._form(*zip(*several, strict=True))

    def _form(self, layers: "Sequence[Slots]", calls: Sequence[Tokens]) -> None:
        x_nBSk = torch.stack([call.x_BSk for call in calls]).to(self._dtype)
        g_nBSk = torch.stack([call.g_BSk for call in calls]).to(self._dtype)
        for slots, rows in zip(layers, outer(g_nBSk, x_nBSk), strict=True):
            slots.rows = rows if slots.rows is None else slots.rows + rows
        if not self._moments:
            return
        weights, weight_nN = [call.weight_BS for call in calls], None
        if any(weight is not None for weight in weights):
            ones = x_nBSk.new_ones(x_nBSk.shape[1:3])
            weight_nN = torch.stack([ones if w is None else w.to(ones.dtype).expand_as(ones) for w in weights])
            weight_nN = weight_nN.flatten(1)
        inputs = second_moment(x_nBSk.flatten(1, 2), weight_nN).flatten(1)
        outputs = second_moment(g_nBSk.flatten(1, 2), weight_nN).flatten(1)
        n, B, S, _ = x_nBSk.shape
        tokens = x_nBSk.new_full((n, 1), B * S) if weight_nN is None else weight_nN.sum(1, keepdim=True)
        for slots, sums in zip(layers, torch.cat([inputs, outputs, tokens], 1), strict=True):
            slots.moments = sums if slots.moments is None else slots.moments + sums
