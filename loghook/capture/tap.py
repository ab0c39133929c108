"""The tap: an identity in the graph whose backward delivers a sample's row as the gradient of a leaf.

``slot`` is a leaf tensor that nobody reads. Because the row arrives as *its gradient*, autograd itself does the
bookkeeping: a layer called twice accumulates, a recomputed forward counts once, frozen parameters still build a
graph from the first tap on, and ``torch.compile`` traces it without a break.

Shape suffixes as in ``loghook.project.outer``.
"""

import contextlib
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


class Tap(torch.autograd.Function):
    """Identity on a layer's output; see ``forward`` for what its backward delivers."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        weight_BS: Tensor | None,
        p_out_kO: Tensor | None,
        activations: Tensor | None,
        documents_DL: Tensor | None,
        channel_dim: int,
        batch_dim: int,
        row_slot: Tensor,
        moment_slot: Tensor | None,
        activation_slot: Tensor | None,
        output_slot: Tensor | None,
    ) -> Tensor:
        """Return ``y`` unchanged and remember what the row needs.

        Args:
            ctx: autograd's context.
            y: the layer's output.
            x: projected inputs (B, S, k_in) or, in groups, (B, S, G, k_in).
            weight_BS: how much each token counts in the moments; None counts each once. Rows never use it.
            p_out_kO: the output side's projection, or None.
            activations: what to deliver to ``activation_slot``, or None.
            documents_DL: which tokens make a row (see ``gather_tokens``), or None: those of a sample. With it, the
                leaves have D entries instead of B.
            channel_dim: axis of features in ``y``.
            batch_dim: axis of samples in ``y``.
            row_slot: leaf (B, k_out, k_in) whose gradient is the row.
            moment_slot: leaf whose gradient is [sum of x x^T, sum of g g^T, tokens], flat; or None.
            activation_slot: leaf (B, channels + 1): the last value counts tokens; or None.
            output_slot: leaf (B, O + 1) for the output gradients summed over tokens, the last value as above; or None.
        """
        ctx.save_for_backward(x, weight_BS, p_out_kO, activations, documents_DL)
        ctx.channel_dim, ctx.batch_dim, ctx.wide = channel_dim, batch_dim, row_slot.dtype
        return alias(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Pass the output gradient on and deliver the row and the moments."""
        (g,) = grads
        x, weight_BS, p_out_kO, activations, documents_DL = ctx.saved_tensors
        need_moments, need_activations, need_outputs = ctx.needs_input_grad[9:]
        wide = ctx.wide
        # Sums over tokens run in float32 or wider, also where the user calls backward() under autocast.
        with wide_context(g.device.type):
            g_BSO = output_gradient(ctx, g, x)
            x = x.to(wide)
            moments = outputs = None
            groups = 1 if x.dim() == 3 else x.shape[2]
            if groups == 1:
                g_BSk = project_output(g_BSO, p_out_kO).to(wide)
                rows = outer(*by_document(documents_DL, g_BSk, x))
            else:
                g_BSO = g_BSO.to(wide)
                g_DLO, x_DLGk = by_document(documents_DL, g_BSO, x)
                rows = outer_grouped(g_DLO, x_DLGk, p_out_kO)
            if need_moments:
                weight = None if weight_BS is None else weight_BS.reshape(-1).to(wide)
                if groups == 1:
                    moment_out = second_moment(g_BSk.flatten(0, 1), weight)
                else:
                    moment_out = second_moment_grouped(g_BSO, groups, p_out_kO, weight)
                    weight = None if weight is None else weight.repeat_interleave(groups)
                x_Nk = x.flatten(0, -2)
                tokens = x.new_full((1,), x_Nk.shape[0]) if weight is None else weight.sum().reshape(1)
                moments = torch.cat([second_moment(x_Nk, weight).flatten(), moment_out.flatten(), tokens])
            if need_outputs:
                outputs = sum_tokens(g_BSO.to(wide), weight_BS, documents_DL)
        return (
            g, None, None, None, None, None, None, None,
            rows, moments, activations if need_activations else None, outputs,
        )  # fmt: skip


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


def output_gradient(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
    """Arrange a tap's output gradient as (B, S, O), given its inputs (B, S, ...)."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UnsupportedError(
            "backward ran with create_graph=True (a gradient penalty, a Hessian product): the second-order part of a "
            "gradient does not pass a layer's output, so rows would miss it. Take that term out of the logged loss."
        )
    g_BSO = as_tokens(g.movedim(ctx.batch_dim, 0) if ctx.batch_dim else g, ctx.channel_dim)
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
