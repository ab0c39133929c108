"""The oracle: gradients of one sample at a time, by plain autograd. Slow and obvious on purpose.

Imports nothing of loghook.

What the caller sees to: a model in float64 (`model.double()`) where agreement to rounding is wanted, no
randomness (eval mode, or dropout at zero), no reentrant activation checkpointing (it forbids
`torch.autograd.grad`), and a loss that is a *sum* over samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def one_sample_gradients(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, names: Sequence[str]
) -> dict[str, Tensor]:
    """The gradient of every sample alone, for each named module, in loghook's layout.

    model: any module; its parameters, their `requires_grad` and `.grad` are left as they were.
    loss_fn: `loss_fn(model, batch_of_one)` -> scalar, the summed loss of that one sample.
    batch: a tensor, or tuples, lists and mappings of them; every tensor of one axis or more has the sample
    on its first axis.
    names: module names as in `model.named_modules()`.

    Returns {name: (B, O, I) or, where the module has a bias, (B, O, I + 1)} in float64, computed in the
    model's own dtype. Output features are rows, input features columns, the bias is the last column. (O, I):
      nn.Linear: (out, in); transformers' Conv1D: (out, in); nn.Embedding: (hidden, vocabulary);
      nn.Conv1d/2d/3d: (out, in / groups * kernel), as `weight.flatten(1)`.

    Each module gets its own contribution: two modules that share one weight are untied for the while, and a
    module that is called twice (or known under two names) sums over its calls. A use of `module.weight`
    outside of the module's own forward counts for that module. A module that receives no gradient gives
    zeros.
    """
    modules = {name: model.get_submodule(name) for name in names}
    for name, module in modules.items():
        _require_supported(name, module)
    size = batch_size(batch)
    samples: dict[str, list[Tensor]] = {name: [] for name in names}
    reached_once = False
    with _own_parameters(list(modules.values())) as own, torch.enable_grad():
        for i in range(size):
            loss = loss_fn(model, one_sample(batch, i))
            if loss.numel() != 1:
                raise ValueError(f"loss_fn must return one number, the sum; got shape {tuple(loss.shape)}")
            leaves = [leaf for parameters in own.values() for leaf in parameters.values()]
            found: Sequence[Tensor | None] = [None for _ in leaves]
            if loss.requires_grad:
                found = torch.autograd.grad(loss.reshape(()), leaves, allow_unused=True)
            reached_once = reached_once or any(gradient is not None for gradient in found)
            gradients = {id(leaf): gradient for leaf, gradient in zip(leaves, found, strict=True)}
            for name, module in modules.items():
                parameters = own[module]
                weight = _dense(gradients[id(parameters["weight"])], parameters["weight"])
                matrix = _as_matrix(module, weight)
                if "bias" in parameters:
                    bias = _dense(gradients[id(parameters["bias"])], parameters["bias"])
                    matrix = torch.cat([matrix, bias.reshape(-1, 1)], dim=1)
                samples[name].append(matrix)
    if names and not reached_once:
        raise ValueError("no sample's loss depends on any named module: nothing but zeros to compare with")
    return {name: torch.stack(matrices) for name, matrices in samples.items()}


def project(G: Tensor, p_out: Tensor | None, p_in: Tensor | None) -> Tensor:
    """`P_out G_i P_in^T` for each sample, in float64.

    G: (B, O, I[+1]); p_out: (k_out, O) or None for the identity; p_in: (k_in, I[+1]) or None for the
    identity.
    Returns (B, k_out, k_in).
    """
    rows = []
    for matrix in G.detach().double():
        if p_out is not None:
            matrix = p_out.detach().double() @ matrix
        if p_in is not None:
            matrix = matrix @ p_in.detach().double().T
        rows.append(matrix)
    return torch.stack(rows)


def relative_error(a: Tensor, b: Tensor, tiny: float = 1e-6, sizes: Tensor | None = None) -> float:
    """How far `a` is from the reference `b`: the worst sample's ||a_i - b_i|| / max(||b_i||, tiny * scale, size_i).

    a, b: (B, ...) of equal shape. `scale` is the largest ||b_j||, so a sample whose true gradient is zero
    is judged against the others' size and not against nothing. If every b_j is zero: 0 where `a` is zero
    too, else infinity.
    sizes: (B,) what each sample is judged by at least. A row of few values may come out small by cancellation; the
    rounding of its terms is that of the gradient before the projection.
    Infinity also where either holds a value that is not finite.
    """
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if len(b) == 0:
        raise ValueError("nothing to compare: no samples")
    a, b = a.detach().double(), b.detach().double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    scale = max(float(b_j.norm()) for b_j in b)
    worst = 0.0
    for i, (a_i, b_i) in enumerate(zip(a, b, strict=True)):
        difference = float((a_i - b_i).norm())
        if difference > 0:
            size = max(float(b_i.norm()), tiny * scale, 0.0 if sizes is None else float(sizes[i]))
            worst = max(worst, difference / size if size > 0 else float("inf"))
    return worst


def batch_size(batch: Any) -> int:
    """The length of the first axis that all tensors in `batch` (of one axis or more) share."""
    sizes = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0}
    if len(sizes) != 1:
        raise ValueError(f"the tensors of a batch must share one first axis; found lengths {sorted(sizes)}")
    return sizes.pop()


def one_sample(batch: Any, i: int) -> Any:
    """`batch` with every tensor cut to its sample `i`, first axis kept (length 1); the rest unchanged."""
    return tree_map(lambda leaf: leaf[i : i + 1] if isinstance(leaf, Tensor) and leaf.dim() > 0 else leaf, batch)


def _is_transposed_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _require_supported(name: str, module: nn.Module) -> None:
    known = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    if not isinstance(module, known) and not _is_transposed_linear(module):
        raise TypeError(f"{name}: the oracle has no layout for {type(module).__name__}")
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        raise TypeError(f"{name}: the oracle needs a plain floating-point parameter called weight")


@contextmanager
def _own_parameters(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, dict[str, nn.Parameter]]]:
    """For the while, give each module clones of its weight and bias that nobody else holds and that require
    a gradient.

    Untying and thawing in one: the real parameters are set aside, untouched, and put back afterwards.
    """
    unique = list(dict.fromkeys(modules))
    real: dict[nn.Module, dict[str, nn.Parameter]] = {}
    own: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for module in unique:
        held = {key: module._parameters.get(key) for key in ("weight", "bias")}
        real[module] = {key: value for key, value in held.items() if value is not None}
        own[module] = {key: nn.Parameter(value.detach().clone()) for key, value in real[module].items()}
    try:
        for module in unique:
            module._parameters.update(own[module])
        yield own
    finally:
        for module in unique:
            module._parameters.update(real[module])


def _dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    """The gradient in float64, zeros where autograd delivered none, dense where it was sparse."""
    if gradient is None:
        return torch.zeros_like(like, dtype=torch.float64, requires_grad=False)
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach().double()


def _as_matrix(module: nn.Module, weight_gradient: Tensor) -> Tensor:
    """The weight's gradient as (output features, input features)."""
    if isinstance(module, nn.Embedding):
        return weight_gradient.T  # (V, H) -> (H, V)
    if _is_transposed_linear(module):
        return weight_gradient.T  # (in, out) -> (out, in)
    return weight_gradient.flatten(1)  # Linear: unchanged; convolutions: (out, in / groups * kernel)
