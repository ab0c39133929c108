"""EK-FAC on whole gradients, slowly: float64, one sample at a time, no code shared with loghook or a peer.

The conventions are the parameters. With those of the defaults Kronfluence, Bergson and dattri-llm agree (README.md).
"""

import copy

import numpy as np
import torch
from torch import Tensor

from peers.exchange import Batch, Exchange, Rows, linears

Pair = tuple[Tensor, Tensor]  # inputs (T, I), with a column of ones where the layer has a bias; output gradients (T, O)


def ekfac(
    exchange: Exchange,
    damping: float,
    *,
    absolute: bool = False,
    positions: str = "all",
    bias: bool = True,
    single: bool = False,
) -> np.ndarray:
    """Return scores (Q, N): over layers, the sum of <H^-1 G_q, G_i>, H = (Q_S x Q_A) diag(lambda) (Q_S x Q_A)^T.

    A = mean of x x^T and S = mean of g g^T over the positions of all samples, lambda = mean over *samples* of
    (Q_S^T G Q_A)^2, where G sums g x^T over a sample's positions. To lambda is added ``damping``, or ``damping`` times
    its mean over the layer.

    Args:
        exchange: model and data; A, S and lambda come from ``fisher_data()``.
        damping: added to lambda.
        absolute: whether as it is, not as a share of lambda's mean.
        positions: "all", or "but last": A and S leave out the last, where a causal language model's g is zero
            (sequences only).
        bias: whether a bias counts as a weight to a constant input 1.
        single: whether the model itself runs in float32, as a peer's does; all after its gradients is float64 anyway.
            Where a loss is below about 1e-6, float32 rounds 1 - p, and the gradient with it.
    """
    model = copy.deepcopy(exchange.model).to(torch.float32 if single else torch.float64).requires_grad_(True)
    kept = slice(None) if positions == "all" else slice(None, -1)
    fisher, train, query = (
        [_pairs(exchange, model, side, i, bias) for i in range(len(Rows(side)))]
        for side in (exchange.fisher_data(), exchange.train, exchange.query)
    )
    scores = torch.zeros(len(query), len(train), dtype=torch.float64)
    for name in linears(model):
        x = torch.cat([sample[name][0][kept] for sample in fisher])
        g = torch.cat([sample[name][1][kept] for sample in fisher])
        q_a, q_s = (torch.from_numpy(np.linalg.eigh((v.T @ v / len(v)).numpy())[1]) for v in (x, g))
        gradients = [torch.stack([g.T @ x for x, g in (sample[name] for sample in side)]) for side in (query, train)]
        rotated = torch.stack([q_s.T @ sample[name][1].T @ sample[name][0] @ q_a for sample in fisher])
        eigenvalues = (rotated**2).mean(0)
        added = damping if absolute else damping * eigenvalues.mean()
        preconditioned = q_s @ ((q_s.T @ gradients[0] @ q_a) / (eigenvalues + added)) @ q_a.T
        scores += preconditioned.flatten(1) @ gradients[1].flatten(1).T
    return scores.numpy()


def agreement(scores: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return the Pearson correlation over training samples, query by query: its mean and its smallest."""
    a, b = (values - values.mean(1, keepdims=True) for values in (scores.astype(np.float64), other.astype(np.float64)))
    r = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return float(r.mean()), float(r.min())


def _pairs(exchange: Exchange, model: torch.nn.Module, side: Batch, i: int, bias: bool) -> dict[str, Pair]:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(layer, args, output):
            ones = [torch.ones_like(args[0][..., :1])] if bias and layer.bias is not None else []
            inputs[name] = torch.cat([args[0], *ones], -1).detach().flatten(0, -2)
            outputs[name] = output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in linears(model)]
    dtype, one = next(model.parameters()).dtype, Rows(side)[i : i + 1]
    one = {key: values.to(dtype) if values.is_floating_point() else values for key, values in one.items()}
    loss = exchange.loss(model, one)
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    found = zip(outputs, gradients, strict=True)
    return {name: (inputs[name].double(), g.flatten(0, -2).double()) for name, g in found}
