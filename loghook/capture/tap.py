"""The tap: an identity in the graph whose backward delivers a sample's row as the gradient of a leaf.

``slot`` is a leaf tensor that nobody reads. Because the row arrives as *its gradient*, autograd itself does the
bookkeeping: a layer called twice accumulates, a recomputed forward counts once, frozen parameters still build a
graph from the first tap on, and ``torch.compile`` traces it without a break. Where nothing is compiled, ordinary layers
go through ``loghook.capture.pending.PendingTap`` instead, which keeps to the same bookkeeping.

Shape suffixes as in ``loghook.project.outer``.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loghook.capture.adapters import as_tokens
from loghook.errors import UnsupportedError
from loghook.project.outer import (
    gather_tokens,
    outer,
    outer_grouped,
    project_output,
    second_moment,
    second_moment_grouped,
)
from loghook.project.update import update_rows


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
        """Return ``y`` unchanged and remember what the row needs."""
        ctx.save_for_backward(x, weight_BS, p_out_kO, activations, documents_DL, *update)
        ctx.dims, ctx.wide = (channel_dim, batch_dim), row_slot.dtype
        return alias(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Pass the output gradient on and deliver the row and the moments."""
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
    """Return a tensor as it is, for a tap to return.

    Autograd does not track this alias as a view: in-place code after the layer stays legal (with a view it raises, with
    a tensor hook it silently loses the gradient), and nothing is copied.
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
