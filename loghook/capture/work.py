"""What one call of a layer gives, and the sums over tokens that several kinds of job make of it.

The functions are pure, and the compiler traces them.

Shape suffixes as in ``loghook.project.outer``; D documents, L tokens of one.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loghook.project.outer import gather_tokens, second_moment_grouped, sum_of_squares

Held = Sequence[Tensor | None]  # what a job takes of a layer besides its calls
_AS_IT_IS = contextlib.nullcontext()


class Call(NamedTuple):
    """What one call of a layer gives."""

    g_BSO: Tensor  # output gradients; projected ones (B, S, k_out) where rows wait to be formed
    x: Tensor  # inputs (B, S, k_in) or, in groups, (B, S, G, k_in), projected if the job says so
    # how much each token counts in moments and means, or None: each once. Rows never use it
    weight_BS: Tensor | None = None
    documents_DL: Tensor | None = None  # which tokens make a row (see ``gather_tokens``); there are then D rows, not B


def sum_moments(
    g_BSk: Tensor,
    x: Tensor,
    weight_BS: Tensor | None,
    p_out_kO: Tensor | None,
    wide: torch.dtype,
    entries: Callable[[Tensor], Tensor] = torch.flatten,
    second: Callable[[Tensor, Tensor | None], Tensor] = sum_of_squares,
) -> Tensor:
    """Return [sum of x x^T, sum of g g^T, tokens], flat; in groups, outputs (B, S, O) are projected here.

    Of inputs and output gradients in half precision (see ``widened``) the sums are in ``wide`` all the same.
    """
    if weight_BS is not None:  # what tokens count need not be exact in half precision
        g_BSk, x, weight_BS = g_BSk.to(wide), x.to(wide), weight_BS.to(wide)
    if x.dim() == 3:
        out = second(g_BSk, weight_BS).flatten()
    else:
        out = entries(second_moment_grouped(g_BSk, x.shape[2], p_out_kO, weight_BS))
        groups = x.shape[2]
        x = x.transpose(1, 2).flatten(0, 1)  # (B, G, S, k) is how patches lie in memory, so that they are not copied
        weight_BS = None if weight_BS is None else weight_BS.repeat_interleave(groups, 0)
    inputs = second(x, weight_BS).flatten()
    tokens = inputs.new_full((1,), x.shape[0] * x.shape[1]) if weight_BS is None else weight_BS.sum().reshape(1)
    return torch.cat([inputs, out, tokens])


def sum_tokens(t_BSC: Tensor, weight_BS: Tensor | None, documents_DL: Tensor | None) -> Tensor:
    """Sum (B, S, C) over tokens, the number of tokens counted appended: (B, C + 1), or (D, C + 1) by document."""
    if weight_BS is None:
        weight_BS = t_BSC.new_ones(t_BSC.shape[:2])
    counted = torch.cat([t_BSC, t_BSC.new_ones(*t_BSC.shape[:2], 1)], 2) * weight_BS.to(t_BSC.dtype)[:, :, None]
    return by_document(documents_DL, counted)[0].sum(1)


def by_document(documents_DL: Tensor | None, *tokens: Tensor) -> tuple[Tensor, ...]:
    """Arrange tokens (B, S, ...) as (D, L, ...), or leave them as they are where each sample is a row."""
    return tokens if documents_DL is None else tuple(gather_tokens(t, documents_DL) for t in tokens)


def by_row(call: Call, wide: torch.dtype) -> tuple[Tensor, ...]:
    """Output gradients and inputs in the dtype of sums, by document where rows are not samples."""
    return by_document(call.documents_DL, call.g_BSO.to(wide), call.x.to(wide))


def wide_context(device: str) -> contextlib.AbstractContextManager[None]:
    """Switch autocast off; entering the context costs more than asking whether it is on."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _AS_IT_IS
