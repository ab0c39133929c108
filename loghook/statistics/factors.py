"""Kronecker factors of one layer, from the moments in the log (Martens and Grosse 2015; George et al. 2018)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loghook.log.format import Layout


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvectors of a layer's two Kronecker factors, float64 unless moved."""

    q_in: Tensor  # (k_in, k_in), columns are eigenvectors of A = mean over tokens of x x^T
    q_out: Tensor  # (k_out, k_out), columns are eigenvectors of S = mean over tokens of g g^T
    products: Tensor  # (k_out, k_in) products of eigenvalues, those of S kron A (KFAC)

    def to(self, like: Tensor) -> "Eigenbasis":
        """Return a copy with the device and dtype of a tensor, for rows that are there many times."""
        return Eigenbasis(self.q_in.to(like), self.q_out.to(like), self.products.to(like))

    def rotate(self, rows: Tensor) -> Tensor:
        """Express rows (..., k_out, k_in) in the eigenbasis: ``Q_S^T G Q_A``."""
        return self.q_out.T.to(rows.dtype) @ rows @ self.q_in.to(rows.dtype)

    def rotate_back(self, rows: Tensor) -> Tensor:
        """Undo ``rotate``."""
        return self.q_out.to(rows.dtype) @ rows @ self.q_in.T.to(rows.dtype)


def eigenbasis(layout: Layout, moments: np.ndarray, layer: str) -> Eigenbasis:
    """Return the eigenbasis of a layer's factors, means over its tokens (one or more), by ``eigh`` in float64."""
    inputs, outputs, count = layout.moments[layer]
    found = []
    for part in (inputs, outputs):
        width = round((part.stop - part.start) ** 0.5)
        factor = torch.from_numpy(moments)[part].view(width, width) / float(moments[count])
        found.append(torch.linalg.eigh((factor + factor.T) / 2))
    (a_values, q_in), (s_values, q_out) = found
    products = s_values.clamp(min=0)[:, None] * a_values.clamp(min=0)[None, :]
    return Eigenbasis(q_in, q_out, products)
