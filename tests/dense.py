"""Dense references of influence from plain arrays: numpy, float64, matrices built whole and solved.

Imports nothing of loghook.

A layer's training side is a dict (`Layer`): rows `G` (N, k_o, k_i) and, where a method needs them, the
factors `A` (k_i, k_i) = mean over tokens of x x^T and `S` (k_o, k_o) = mean over tokens of g g^T, both
projected like the rows. A layer's query side is an array `Q` (M, k_o, k_i). Both come as one sequence each,
in the same order of layers.

Convention: vec is numpy's `reshape(-1)`, row by row, so `vec(B X C^T) = kron(B, C) vec(X)` and the
Kronecker-factored H is `kron(S, A)`, the output side first.

Sign: positive means a proponent, the training row lowers the query's loss.
A layer whose rows and damped H are all zero (an expert that slept throughout) contributes zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]  # float64 throughout
Layer = Mapping[str, Any]  # "G", "A", "S" to arrays or CPU tensors


class Scores(NamedTuple):
    """total (M, N), the sum over layers of layers (L, M, N)."""

    total: Array
    layers: Array


def influence(
    method: str,
    rows: Sequence[Layer],
    queries: Sequence[ArrayLike],
    damping: float = 0.1,
    damping_abs: float | None = None,
) -> Scores:
    """<H^-1 Q, G>, H being a method's matrix plus damping * (its mean eigenvalue), or plus `damping_abs`.

    rows: L layers of N rows; queries: L arrays (M, k_o, k_i). "dot" has no H.
    Where A or S has repeated eigenvalues its eigenvectors are not unique and neither is "ekfac": compare on factors
    whose eigenvalues are distinct (a null space that no row touches does no harm).
    """
    if len(rows) != len(queries) or not rows:
        raise ValueError(f"{len(rows)} layers of rows and {len(queries)} layers of queries")
    per_layer = []
    for layer, query in zip(rows, queries, strict=True):
        G, Q = _array(layer["G"]), _array(query)
        preconditioned = _precondition(method, layer, Q, damping, damping_abs)
        per_layer.append(np.array([[np.sum(q * g) for g in G] for q in preconditioned]))
    layers = np.array(per_layer)
    return Scores(layers.sum(axis=0), layers)


def self_influence(
    method: str,
    rows: Sequence[Layer],
    queries: Sequence[ArrayLike] | None = None,
    damping: float = 0.1,
    damping_abs: float | None = None,
) -> Array:
    """<H^-1 G_i, G_i> summed over layers, (N,); for "dot" the squared norm.

    With `queries`: the same of the queries, <H^-1 Q, Q>, (M,), where H is still the rows'.
    """
    per_layer = []
    for layer, asked in zip(rows, queries or [layer["G"] for layer in rows], strict=True):
        X = _array(asked)
        preconditioned = _precondition(method, layer, X, damping, damping_abs)
        per_layer.append([np.sum(p * x) for p, x in zip(preconditioned, X, strict=True)])
    return np.sum(per_layer, axis=0)


def cosine(
    scores: ArrayLike, query_self: ArrayLike, row_self: ArrayLike, kind: Literal["unit", "relatif"] = "unit"
) -> Array:
    """Scores with the size of a row taken out, (M, N).

    scores: (M, N), total over layers; query_self: (M,); row_self: (N,).
    "unit": scores / sqrt(query_self row_self), both sides at unit norm.
    "relatif": scores / sqrt(row_self), the training side only.
    The self values are the scores' own method's self-influence, summed over layers (for dot: squared norms).
    Where a self value is zero the gradient itself is zero: the result is 0.
    """
    if kind not in ("unit", "relatif"):
        raise ValueError(f"kind must be 'unit' or 'relatif', not {kind!r}")
    scores, query_self, row_self = _array(scores), _array(query_self), _array(row_self)
    size = np.sqrt(query_self)[:, None] * np.sqrt(row_self) if kind == "unit" else np.sqrt(row_self)[None]
    return np.divide(scores, size, out=np.zeros_like(scores), where=size != 0)


def lds(scores: ArrayLike, masks: ArrayLike, outputs: ArrayLike) -> float:
    """Linear datamodelling score: mean over queries of a Spearman correlation over subsets.

    scores: (M, N); masks: (m, N) bool, which rows are in each subset; outputs: (m, M), the *loss* of each
    query under a model retrained on each subset.
    A positive score says that the row lowers the query's loss, so the summed scores of a subset's members
    are correlated with *minus* the loss. Hand over the negative of an output that is better when larger (a
    margin, a log-probability).
    A query whose predictions or losses are all equal counts as 0. Ties share their mean rank.
    """
    scores, outputs = _array(scores), _array(outputs)
    members = np.asarray(masks, dtype=bool)
    if members.shape[1] != scores.shape[1] or outputs.shape != (members.shape[0], scores.shape[0]):
        shapes = f"scores {scores.shape}, masks {members.shape}, outputs {outputs.shape}"
        raise ValueError(f"shapes do not fit: {shapes}")
    correlations = []
    for query in range(scores.shape[0]):
        predicted = np.array([scores[query, subset].sum() for subset in members])
        correlations.append(spearman(predicted, -outputs[:, query]))
    return float(np.mean(correlations))


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson correlation of the ranks, ties at their mean rank; 0 where one side is constant. a, b: (n,)."""
    ranks_a, ranks_b = _ranks(_array(a)), _ranks(_array(b))
    centred_a, centred_b = ranks_a - ranks_a.mean(), ranks_b - ranks_b.mean()
    size = np.sqrt((centred_a**2).sum() * (centred_b**2).sum())
    return 0.0 if size == 0 else float((centred_a * centred_b).sum() / size)


def fisher_matrix(layer: Layer) -> Array:
    """mean_i vec(G_i) vec(G_i)^T, (w, w), undamped."""
    G = _array(layer["G"])
    H = np.zeros((G[0].size, G[0].size))
    for row in G:
        H += np.outer(row.reshape(-1), row.reshape(-1))
    return H / len(G)


def kfac_matrix(layer: Layer) -> Array:
    """kron(S, A), (w, w), undamped.

    S and A are means per *token*: the size of H, and with it the weight of a layer in the total, is per token as well.
    """
    return np.kron(_array(layer["S"]), _array(layer["A"]))


def ekfac_matrix(layer: Layer) -> Array:
    """U diag(lambda) U^T, (w, w), undamped: U = kron(Q_S, Q_A), the eigenvectors of S and A.

    lambda = mean_i (Q_S^T G_i Q_A)^2, elementwise.
    """
    G = _array(layer["G"])
    Q_A = np.linalg.eigh(_array(layer["A"])).eigenvectors
    Q_S = np.linalg.eigh(_array(layer["S"])).eigenvectors
    lambdas = np.mean([(Q_S.T @ row @ Q_A) ** 2 for row in G], axis=0)
    U = np.kron(Q_S, Q_A)
    return U @ np.diag(lambdas.reshape(-1)) @ U.T


def shampoo_matrix(layer: Layer) -> Array:
    """`ekfac_matrix` with sums of G^T G and G G^T for A and S; their scale plays no part."""
    G = _array(layer["G"])
    sides = {"A": sum(row.T @ row for row in G), "S": sum(row @ row.T for row in G)}
    return ekfac_matrix({"G": G, **sides})


_MATRICES: dict[str, Callable[[Layer], Array]] = {
    "fisher": fisher_matrix,
    "kfac": kfac_matrix,
    "ekfac": ekfac_matrix,
    "shampoo": shampoo_matrix,
}


def _precondition(method: str, layer: Layer, X: Array, damping: float, damping_abs: float | None) -> Array:
    """H^-1 applied to each of X (n, k_o, k_i), one dense solve. H's mean eigenvalue is trace / width."""
    if method == "dot":
        return X
    if method not in _MATRICES:
        raise ValueError(f"method must be 'dot' or one of {sorted(_MATRICES)}, not {method!r}")
    H = _MATRICES[method](layer)
    width = len(H)
    added = damping * np.trace(H) / width if damping_abs is None else damping_abs
    if added == 0 and not H.any() and not _array(layer["G"]).any():
        return np.zeros_like(X)
    damped = H + added * np.eye(width)
    return np.linalg.solve(damped, X.reshape(len(X), width).T).T.reshape(X.shape)


def _ranks(values: Array) -> Array:
    """Ranks from 1, ties at their mean. (n,) -> (n,)."""
    if np.isnan(values).any():
        raise ValueError("a value that is not a number has no rank")
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def _array(values: ArrayLike) -> Array:
    """Anything array-like (a CPU tensor without a graph too) in float64."""
    return np.asarray(values, dtype=np.float64)
