"""The tap: an identity in the graph whose backward delivers a sample's row as the gradient of a leaf.

``slot`` is a leaf tensor that nobody reads. Because the row arrives as *its gradient*, autograd itself does the
bookkeeping: a layer called twice accumulates, a recomputed forward counts once, frozen parameters still build a
graph from the first tap on, and ``torch.compile`` traces it without a break.

Where nothing is compiled, ordinary layers go through ``PendingTap`` instead, which keeps to the same bookkeeping, and
rows of several layers are formed together: one product of many matrices in place of many small products. A layer's own
are so small that waking the threads, or a launch on a GPU, costs more than the arithmetic. A compiled backward has no
use for this: it fuses by itself.

Shape suffixes as in ``loghook.project.outer``; n layers.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loghook.capture.adapters import as_tokens
from loghook.capture.layers import Slots
from loghook.errors import UnsupportedError
from loghook.project.outer import (
    gather_tokens,
    outer,
    outer_grouped,
    project_output,
    second_moment,
    second_moment_grouped,
    update_rows,
)

BYTES = 8 * 2**20  # what may wait: as much as stays in a processor's cache, and little on a device


class Tap(torch.autograd.Function):
    """Identity on a layer's output; see ``forward`` for what its backward delivers."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # the layer's output
        x: Tensor,  # projected inputs (B, S, k_in) or, in groups, (B, S, G, k_in); whole ones where there is an update
        weight_BS: Tensor | None,  # how much each token counts in the moments, or None: each once. Rows never use it
        p_out_kO: Tensor | None,  # the output side's projection
        activations: Tensor | None,  # what to deliver to `activation_slot`
        documents_DL: Tensor | None,  # which tokens make a row (see `gather_tokens`); leaves then have D entries, not B
        channel_dim: int,  # axis of features in `y`
        batch_dim: int,  # axis of samples in `y`
        row_slot: Tensor,  # leaf (B, k_out, k_in) whose gradient is the row
        moment_slot: Tensor | None,  # leaf whose gradient is what `moments` returns
        activation_slot: Tensor | None,  # leaf (B, channels + 1): the last value counts tokens
        output_slot: Tensor | None,  # leaf (B, O + 1): output gradients summed over tokens, the last value as above
        call_slot: Tensor | None,  # leaf (1,) that counts calls, for rows that need the gradient of all of them at once
        *update: Tensor | None,  # nothing, or what `update_rows` takes after p_out_kO: rows are then of an update
    ) -> Tensor:
        ctx.save_for_backward(x, weight_BS, p_out_kO, activations, documents_DL, *update)
        ctx.dims, ctx.wide = (channel_dim, batch_dim), row_slot.dtype
        return alias(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, weight_BS, p_out_kO, activations, documents_DL, *update = ctx.saved_tensors
        need_moments, need_activations, need_outputs, need_calls = ctx.needs_input_grad[9:13]
        wide = ctx.wide
        # Sums over tokens run in float32 or wider, also where the user calls backward() under autocast.
        with wide_context(g.device.type):
            g_BSO = output_gradient(ctx.dims, g, x)
            x = x.to(wide)
            summed = outputs = None
            if update:
                g_DLO, x_DLI = by_document(documents_DL, g_BSO.to(wide), x)
                rows = update_rows(g_DLO, x_DLI, p_out_kO, *update)
            elif x.dim() == 3:
                g_moments = g_BSk = project_output(g_BSO, p_out_kO).to(wide)
                rows = outer(*by_document(documents_DL, g_BSk, x))
            else:
                g_moments = g_BSO = g_BSO.to(wide)
                g_DLO, x_DLGk = by_document(documents_DL, g_BSO, x)
                rows = outer_grouped(g_DLO, x_DLGk, p_out_kO)
            if need_moments:
                summed = moments(g_moments, x, weight_BS, p_out_kO)
            if need_outputs:
                outputs = sum_tokens(g_BSO.to(wide), weight_BS, documents_DL)
        return (
            g, None, None, None, None, None, None, None,
            rows, summed, activations if need_activations else None, outputs, x.new_ones(1) if need_calls else None,
            *(None for _ in update),
        )  # fmt: skip


class Tokens(NamedTuple):
    x_BSk: Tensor  # projected inputs
    g_BSk: Tensor  # projected output gradients
    weight_BS: Tensor | None  # as in ``Tap.forward``


class PendingTap(torch.autograd.Function):
    """Identity on a layer's output whose backward offers projected tokens.

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
        slots: Slots,
    ) -> Tensor:
        ctx.save_for_backward(x_BSk)  # which a checkpoint throws away and makes again
        ctx.held = weight_BS, dims, slots
        return alias(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        (x_BSk,) = ctx.saved_tensors
        weight_BS, dims, slots = ctx.held
        with wide_context(g.device.type):
            g_BSk = project_output(output_gradient(dims, g, x_BSk), slots.output_side.matrix)
        slots.offer(Tokens(x_BSk, g_BSk, weight_BS))
        return g, None, None, None, slots.samples.new_ones(1), None


class Misfit(torch.autograd.Function):
    """Identity on the output of a call that has no rows, which raises if a gradient comes for it all the same."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, slot: Tensor, error: Exception) -> Tensor:
        """The leaf is there for a graph also where the model is frozen."""
        ctx.error = error
        return alias(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ctx.error


class Pending:
    """Tokens of the layers on one device, whose rows are yet to be formed."""

    def __init__(self, dtype: torch.dtype, moments: bool) -> None:
        self._dtype, self._moments = dtype, moments  # in which rows are summed; whether statistics are asked for
        self._waiting: list[tuple[Slots, Tokens]] = []
        self._bytes = 0

    def add(self, slots: Slots, tokens: Tokens) -> None:
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

    def _form(self, layers: Sequence[Slots], calls: Sequence[Tokens]) -> None:
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


def moments(
    g_BSk: Tensor,
    x: Tensor,
    weight_BS: Tensor | None,
    p_out_kO: Tensor | None = None,
    entries: Callable[[Tensor], Tensor] = torch.flatten,
    second: Callable[[Tensor, Tensor | None], Tensor] = lambda t_Nk, weight: second_moment(t_Nk, weight).flatten(),
) -> Tensor:
    """Return [sum of x x^T, sum of g g^T, tokens], flat; in groups, outputs (B, S, O) are projected here."""
    weight = None if weight_BS is None else weight_BS.reshape(-1).to(x.dtype)
    if x.dim() == 3:
        out = second(g_BSk.flatten(0, 1), weight)
    else:
        out = entries(second_moment_grouped(g_BSk, x.shape[2], p_out_kO, weight))
        weight = None if weight is None else weight.repeat_interleave(x.shape[2])
    x_Nk = x.flatten(0, -2)
    tokens = x.new_full((1,), x_Nk.shape[0]) if weight is None else weight.sum().reshape(1)
    return torch.cat([second(x_Nk, weight), out, tokens])


def alias(y: Tensor) -> Tensor:
    """Return a tensor as it is, without a copy, for a tap to return.

    Autograd does not track this alias as a view: in-place code after the layer stays legal (with a view it raises, with
    a tensor hook it silently loses the gradient).
    """
    return torch.ops.aten._unsafe_view.default(y, y.shape)


def wide_context(device: str) -> contextlib.AbstractContextManager[None]:
    """Switch autocast off; entering the context costs more than asking whether it is on."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def output_gradient(dims: tuple[int, int], g: Tensor, x: Tensor) -> Tensor:
    """Arrange an output gradient with these axes of channels and batch as (B, S, O), given inputs (B, S, ...)."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UnsupportedError(
            "backward ran with create_graph=True (a gradient penalty, a Hessian product): the second-order part of a "
            "gradient does not pass a layer's output, so rows would miss it. Take that term out of the logged loss."
        )
    channel_dim, batch_dim = dims
    if g.dim() == 3 and not batch_dim and channel_dim == -1 and g.shape[:2] == x.shape[:2]:
        return g  # as it is nearly always
    g_BSO = as_tokens(g.movedim(batch_dim, 0) if batch_dim and g.dim() > 2 else g, channel_dim)
    return g_BSO.reshape(*x.shape[:2], g_BSO.shape[-1])  # batch and tokens may share an axis in the module


def by_document(documents_DL: Tensor | None, *tokens: Tensor) -> tuple[Tensor, ...]:
    """Arrange tokens (B, S, ...) as (D, L, ...), or leave them as they are where each sample is a row."""
    return tokens if documents_DL is None else tuple(gather_tokens(t, documents_DL) for t in tokens)


def sum_tokens(t_BSC: Tensor, weight_BS: Tensor | None, documents_DL: Tensor | None) -> Tensor:
    """Sum (B, S, C) over tokens, the number of tokens counted appended: (B, C + 1), or (D, C + 1) by document."""
    if weight_BS is None:
        weight_BS = t_BSC.new_ones(t_BSC.shape[:2])
    counted = torch.cat([t_BSC, t_BSC.new_ones(*t_BSC.shape[:2], 1)], 2) * weight_BS.to(t_BSC.dtype)[:, :, None]
    return by_document(documents_DL, counted)[0].sum(1)
