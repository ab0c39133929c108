"""Rows of what an optimiser makes of a sample's gradient, elementwise on the whole gradient and then projected.

They cannot be had from projected inputs and output gradients: gradients of a few samples at a time are formed,
changed, projected on both sides and dropped. docs/methods.md has the formulas and their sources.

Shape suffixes as in ``loghook.project.outer``; I counts the bias column.
"""

import torch
from torch import Tensor

from loghook.project.outer import gradients

GRADIENTS = ("plain", "normalized", "adam")  # what rows can be of


def update_rows(
    g_BSO: Tensor,
    x: Tensor,
    matrix_kO: Tensor | None,
    matrix_kI: Tensor | None,
    mean_OI: Tensor | None,
    square_OI: Tensor,
    numbers_nI: Tensor,
    scale: Tensor,
) -> Tensor:
    """Form, change and project the gradients of a layer's samples.

    Args:
        g_BSO: output gradients.
        x: whole inputs (B, S, I), or (B, S, G, I) in groups.
        matrix_kO: projection of the output side, or None.
        matrix_kI: projection of the input side, or None.
        mean_OI: the optimiser's first moment, for ``adam``; None for ``normalized``.
        square_OI: its second moment.
        numbers_nI: what the formula takes besides, for each column.
        scale: what gradients are multiplied by first: a number, or (B, 1, 1).

    Returns:
        (B, k_out, k_in) in the dtype of ``x``.
    """
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
