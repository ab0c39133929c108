"""Per-sample gradients as outer products of output gradients and inputs: straight in projected space, or whole.

Shape suffixes: B samples, S tokens (positions), G groups, I inputs of one group, O outputs of all groups,
o outputs of one group, k any width after projection. A layer without groups has no G axis.
The row of a sample is ``P_out (sum_t g_t x_t^T) P_in^T``: (k_out, k_in), never the full (O, I). Only rows of what an
optimiser makes of a gradient, elementwise on the whole one, need that: gradients of a few samples at a time are formed,
changed, projected on both sides and dropped. docs/methods.md has the formulas and their sources.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from loghook.project.linear import cast, gram, linear, products

GRADIENTS = ("plain", "normalized", "adam")  # what rows can be of
CHUNK_BYTES = 64 * 2**20  # what the gradients of some samples of one layer may take at a time


def project_input(x: Tensor, matrix_kI: Tensor | None, bias: bool) -> Tensor:
    """Project inputs (..., I) to (..., k_in); with ``bias`` a 1 is appended first, and the bias is the last column."""
    if matrix_kI is None:
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1) if bias else x
    matrix_kI = cast(matrix_kI, x.dtype)
    return linear(x, matrix_kI[:, :-1], matrix_kI[:, -1]) if bias else linear(x, matrix_kI)


def project_output(g_BSO: Tensor, matrix_kO: Tensor | None) -> Tensor:
    """Project output gradients to k_out values a token: (B, S, k_out); None keeps every output."""
    return g_BSO if matrix_kO is None else linear(g_BSO, cast(matrix_kO, g_BSO.dtype))


def gather_tokens(t: Tensor, index_DL: Tensor) -> Tensor:
    """Arrange tokens by document, (B, S, ...) to (D, L, ...): place B * S stands for padding and gives zeros."""
    flat = t.flatten(0, 1)
    return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[index_DL]


def outer(g_BSk: Tensor, x_BSk: Tensor) -> Tensor:
    """Sum over tokens of the outer products of projected gradients and inputs: (..., B, k_out, k_in).

    In the dtype that they are in, or in float32 where that is half of it (see ``widened``).
    """
    if g_BSk.itemsize > 2 and g_BSk.dim() == 3 and len(g_BSk) == 1:  # for which there is a quicker way
        return gram(g_BSk[0], x_BSk[0])[None]
    return products(g_BSk.mT, x_BSk)


def outer_grouped(g_BSO: Tensor, x_BSGk: Tensor, matrix_kO: Tensor | None) -> Tensor:
    """Rows of a layer whose groups of outputs see inputs of their own (grouped convolutions).

    Groups come one after the other along O. Tokens are contracted before the output side is projected, since one group
    has few outputs: at no time is there more than (B, O, k_in).
    """
    B, S, G, _ = x_BSGk.shape
    g_BSGo = g_BSO.reshape(B, S, G, -1)
    rows_BOk = torch.einsum("bsgo,bsgi->bgoi", g_BSGo, x_BSGk).flatten(1, 2)
    return rows_BOk if matrix_kO is None else matrix_kO.to(rows_BOk.dtype) @ rows_BOk


def gradients(
    g_BSO: Tensor, x: Tensor, matrix_kO: Tensor | None = None, limit: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Form gradients (b, O, I) of a few samples at a time; with ``matrix_kO`` the output side is projected."""
    width_out = g_BSO.shape[2] if matrix_kO is None else matrix_kO.shape[0]
    step = at_a_time(width_out * x.shape[-1], x, limit)
    # The compiler takes the number of samples for fixed where it is cut, but not where it is only compared.
    starts = range(0, len(x), step) if len(x) > step else (0,)
    for start in starts:
        part = slice(start, min(start + step, len(x)))
        if x.dim() == 3:
            yield part, outer(project_output(g_BSO[part], matrix_kO), x[part])
        else:
            yield part, outer_grouped(g_BSO[part], x[part], matrix_kO)


def at_a_time(values: int, like: Tensor, limit: int | None = None) -> int:
    """How many samples with so many values each take no more than ``limit`` bytes, in ``like``'s dtype or float32."""
    return max(1, (limit or CHUNK_BYTES) // (values * max(4, like.element_size())))


def second_moment(z_Nk: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """Sum over tokens of ``z z^T``, each token counted with its weight: (..., k, k)."""
    return products(z_Nk.mT, z_Nk if weight_N is None else z_Nk * weight_N[..., None])


def sum_of_squares(z_BSk: Tensor, weight_BS: Tensor | None = None) -> Tensor:
    """``second_moment`` of all samples' tokens together: (..., k, k) of (..., B, S, k)."""
    if z_BSk.device.type == "cpu" or z_BSk.shape[-2] < z_BSk.shape[-1]:
        return second_moment(z_BSk.flatten(-3, -2), None if weight_BS is None else weight_BS.flatten(-2))
    # A sample at a time, since a few small products of long operands would keep few of a GPU's units busy; not where
    # these squares would take more memory than the tokens.
    return second_moment(z_BSk, weight_BS).sum(-3)


def second_moment_grouped(g_BSO: Tensor, groups: int, matrix_kO: Tensor | None, weight_BS: Tensor | None) -> Tensor:
    """Sum over tokens and groups of ``(P g)(P g)^T`` where a token of one group has no other outputs: (k, k)."""
    g_GNo = g_BSO.reshape(-1, groups, g_BSO.shape[-1] // groups).movedim(1, 0)
    weighted = g_GNo if weight_BS is None else g_GNo * weight_BS.reshape(-1, 1)
    blocks_Goo = g_GNo.transpose(1, 2) @ weighted
    if matrix_kO is None:
        return torch.block_diag(*blocks_Goo)
    matrix_Gko = matrix_kO.to(g_BSO.dtype).reshape(matrix_kO.shape[0], groups, -1).movedim(1, 0)
    return (matrix_Gko @ blocks_Goo @ matrix_Gko.transpose(1, 2)).sum(0)


def update_rows(
    g_BSO: Tensor,
    x: Tensor,
    matrix_kO: Tensor | None,
    matrix_kI: Tensor | None,
    mean_OI: Tensor | None,  # the optimiser's first moment, for `adam`; None for `normalized`
    square_OI: Tensor,  # its second moment
    numbers_nI: Tensor,  # what the formula takes besides, for each column (I counts the bias column)
    scale: Tensor,  # what gradients are multiplied by first: a number, or (B, 1, 1)
) -> Tensor:
    """Form the gradients of whole inputs (B, S, I) or (B, S, G, I), change and project them: (B, k_out, k_in)."""
    rows = []
    for _, G_bOI in gradients(g_BSO * scale, x):
        if mean_OI is None:
            changed = normalized(G_bOI, square_OI, numbers_nI)
        else:
            changed = adam(G_bOI, mean_OI, square_OI, numbers_nI)
        if matrix_kI is not None:
            changed = changed @ matrix_kI.to(x.dtype).T
        rows.append(changed if matrix_kO is None else matrix_kO.to(x.dtype) @ changed)
    return torch.cat(rows)


def normalized(G_BOI: Tensor, square_OI: Tensor, numbers_2I: Tensor) -> Tensor:
    """Divide by Adam's root: ``G / (sqrt(v / c) + eps)``, with the correction c and eps in ``numbers_2I``; in place."""
    correction_I, eps_I = numbers_2I
    return G_BOI.div_((square_OI / correction_I).sqrt_().add_(eps_I))


def adam(G_BOI: Tensor, mean_OI: Tensor, square_OI: Tensor, numbers_3I: Tensor) -> Tensor:
    """Adam's direction if G were the step's gradient, without bias correction: ``m / sqrt(v + eps)``; consumes G.

    ``numbers_3I`` holds 1 - beta1, 1 - beta2 and eps.
    """
    fresh1_I, fresh2_I, eps_I = numbers_3I
    mean = mean_OI.lerp(G_BOI, fresh1_I)
    return mean.div_(square_OI.lerp(G_BOI.square_(), fresh2_I).add_(eps_I).sqrt_())
