"""What is made of a layer's inputs and output gradients: one function for each kind of job that a block may do.

Rows; rows of an optimiser's update; second moments of whole inputs and output gradients; EK-FAC's corrected
eigenvalues; inner products of every sample's gradient with preconditioned queries. The functions are pure, and the
compiler traces them.

Shape suffixes as in ``loghook.project.outer``; D documents, L tokens of one; Q queries, r their rank.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loghook.project.blocks import second_moment_blocks, take_blocks
from loghook.project.outer import (
    at_a_time,
    gather_tokens,
    gradients,
    outer,
    outer_grouped,
    project_output,
    second_moment,
    second_moment_grouped,
    update_rows,
)

CACHE_BYTES = 2**20  # of gradients at a time on a processor that are read once: they are squared where they were made

Held = Sequence[Tensor | None]  # what a job takes of a layer besides its calls


class Call(NamedTuple):
    """What one call of a layer gives."""

    g_BSO: Tensor  # output gradients; projected ones (B, S, k_out) where rows wait to be formed
    x: Tensor  # inputs (B, S, k_in) or, in groups, (B, S, G, k_in), projected if the job says so
    # how much each token counts in moments and means, or None: each once. Rows never use it
    weight_BS: Tensor | None = None
    documents_DL: Tensor | None = None  # which tokens make a row (see ``gather_tokens``); there are then D rows, not B
    activations: Tensor | None = None  # inputs summed over tokens, if they are logged


class Made(NamedTuple):
    """What is made of a call; the leaves of a layer have the same order."""

    main: Tensor | None  # rows (B, k_out, k_in), or what the job makes instead
    moments: Tensor | None = None  # see ``moments``
    activations: Tensor | None = None  # (B, channels + 1): the last value counts tokens
    outputs: Tensor | None = None  # (B, O + 1): output gradients summed over tokens, the last value as above


def make(kind: str, call: Call, held: Held, wide: torch.dtype, *, moments: bool = False, outputs: bool = False) -> Made:
    """Do a job's work on one call, in ``wide``; moments and summed outputs only where they are asked for."""
    main, summed = WORK[kind](call, held, wide, moments)
    total = sum_tokens(call.g_BSO.to(wide), call.weight_BS, call.documents_DL) if outputs else None
    return Made(main, summed, call.activations, total)


def _rows(call: Call, held: Held, wide: torch.dtype, with_moments: bool) -> tuple[Tensor, Tensor | None]:
    (p_out_kO,) = held
    x = call.x.to(wide)
    if x.dim() == 3:
        g = project_output(call.g_BSO, p_out_kO).to(wide)
        rows = outer(*by_document(call.documents_DL, g, x))
    else:
        g = call.g_BSO.to(wide)
        g_DLO, x_DLGk = by_document(call.documents_DL, g, x)
        rows = outer_grouped(g_DLO, x_DLGk, p_out_kO)
    return rows, moments(g, x, call.weight_BS, p_out_kO) if with_moments else None


def _update_rows(call: Call, held: Held, wide: torch.dtype, _: bool) -> tuple[Tensor, None]:
    """Rows of an update; held is what ``update_rows`` takes besides output gradients and whole inputs."""
    return update_rows(*by_row(call, wide), *held), None


def _covariance(call: Call, held: Held, wide: torch.dtype, _: bool) -> tuple[Tensor, None]:
    g_BSO, x = call.g_BSO.to(wide), call.x.to(wide)
    return moments(g_BSO, x, call.weight_BS, None, take_blocks, second_moment_blocks), None


def _eigenvalues(call: Call, held: Held, wide: torch.dtype, _: bool) -> tuple[Tensor, None]:
    """Sum over samples, those that are kept, of the squares of their gradients: (O, I)."""
    (g_BSO, x), (p_out, keep_B) = by_row(call, wide), held
    small = g_BSO.device.type == "cpu" and not torch.compiler.is_compiling()  # the compiler unrolls the loop
    if x.dim() == 3:
        g_BSO, p_out = project_output(g_BSO, p_out), None
    total = None
    for part, rows in gradients(g_BSO, x, p_out, CACHE_BYTES if small else None):
        squares = rows.square_() if keep_B is None else rows.square_() * keep_B[part, None, None].to(rows.dtype)
        total = squares.sum(0) if total is None else total + squares.sum(0)
    assert total is not None
    return total, None


def _products(call: Call, held: Held, wide: torch.dtype, _: bool) -> tuple[Tensor, None]:
    """Inner products of each sample's gradient with each query: (B, Q), or (B, Q + 1) with the sample's own last.

    Inputs are (B, S, I), or (B, S, G, I) in groups. Held are p_out: None, or what rotates output gradients (inputs and
    queries are rotated already); inverse: None, or (O, I), with which a sample's own weights its gradient's squares;
    left and right: queries (Q, O, I) and None, or their halves (Q, O, r) and (Q, r, I).
    """
    (g_BSO, x), (p_out, inverse, left, right) = by_row(call, wide), held
    assert left is not None
    S, (Q, outputs, r), inputs = x.shape[1], left.shape, x.shape[-1]
    scores = x.new_empty(len(x), Q + (inverse is not None))
    if x.dim() == 3:
        g_BSO, p_out = project_output(g_BSO, p_out), None
        halves = outputs * inputs if right is None else r * (outputs + inputs)
        if inverse is None and S * Q * halves <= (S + Q) * outputs * inputs:
            # <sum_s g_s x_s^T, L R> = sum_s (g_s L) . (R x_s): where it is less arithmetic, no gradient is formed.
            left_OQr = left.transpose(0, 1).flatten(1)
            step = at_a_time(S * Q * r, x)
            for g_bSO, x_bSI, part in zip(g_BSO.split(step), x.split(step), scores.split(step), strict=True):
                gl_bSQr = (g_bSO @ left_OQr).unflatten(2, (Q, r))
                rx_bSQr = x_bSI[:, :, None] if right is None else (x_bSI @ right.flatten(0, 1).T).unflatten(2, (Q, r))
                part.copy_((gl_bSQr * rx_bSQr).sum((1, 3)))
            return scores, None
    queries = (left if right is None else left @ right).flatten(1)
    for place, rows in gradients(g_BSO, x, p_out):
        scores[place, :Q] = rows.flatten(1) @ queries.T
        if inverse is not None:
            scores[place, Q] = rows.square_().flatten(1) @ inverse.flatten()
    return scores, None


# By name, since a compiled backward can hold names and tensors only.
WORK: dict[str, Callable[[Call, Held, torch.dtype, bool], tuple[Tensor, Tensor | None]]] = {
    "rows": _rows,
    "update": _update_rows,
    "covariance": _covariance,
    "eigenvalues": _eigenvalues,
    "products": _products,
}


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
        x = x.transpose(1, 2)  # (B, G, S, k) is how patches lie in memory, so that they are not copied
        weight = None if weight_BS is None else weight_BS.to(x.dtype)[:, None].expand(x.shape[:3]).flatten()
    x_Nk = x.flatten(0, -2)
    tokens = x.new_full((1,), x_Nk.shape[0]) if weight is None else weight.sum().reshape(1)
    return torch.cat([second(x_Nk, weight), out, tokens])


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
    return contextlib.nullcontext()
