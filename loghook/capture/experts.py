"""Fused experts of transformers 5 (mixture of experts): each expert's projections as linear layers of their own.

An experts module holds ``gate_up_proj`` and ``down_proj`` as 3-D parameters and is no ``nn.Linear``; its tokens come
without their batch axis. While a block is open, the module's forward is the plain loop over experts below, each
projection a small module that hooks can watch, with the places of its tokens at hand. Outside blocks nothing changes.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from loghook.capture.adapters import Geometry, LinearAdapter, adapter

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_MADE: "weakref.WeakKeyDictionary[nn.Module, dict[str, ExpertProjection]]" = weakref.WeakKeyDictionary()
# {module: [how many blocks are open, the forward that was set on the module itself or None]}
_OPEN: "weakref.WeakKeyDictionary[nn.Module, list[Any]]" = weakref.WeakKeyDictionary()


class ExpertProjection(nn.Module):
    """One projection of one expert, as a module for hooks; its parameters stay where they are."""

    token_N: Tensor  # places of the tokens of the current call among all tokens of the batch
    total: int  # number of tokens of the batch

    def __init__(self, experts: nn.Module, projection: str, number: int) -> None:
        super().__init__()
        self._experts, self._projection, self._number = weakref.ref(experts), projection, number
        _, *shape = getattr(experts, projection).shape
        self.in_features, self.out_features = shape if experts.is_transposed else reversed(shape)

    @property
    def owner(self) -> Any:
        return self._experts()

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the fused parameters that this is a slice of."""
        for name in (self._projection, f"{self._projection}_bias"):
            parameter = getattr(self.owner, name, None)
            if parameter is not None:
                yield parameter

    @property
    def biased(self) -> bool:
        return bool(self.owner.has_bias)

    def forward(self, x_BNI: Tensor) -> Tensor:
        experts = self.owner
        weight = getattr(experts, self._projection)[self._number]
        y = x_BNI @ (weight if experts.is_transposed else weight.T)
        return y + getattr(experts, f"{self._projection}_bias")[self._number] if self.biased else y


@adapter(ExpertProjection)
class ExpertAdapter(LinearAdapter):
    """Projections of fused experts: logged where a pattern names them, since there are many."""

    default = False
    shares_input = False

    def geometry(self, module: nn.Module) -> Geometry:
        assert isinstance(module, ExpertProjection)
        return Geometry(in_features=module.in_features, out_features=module.out_features, bias=module.biased)


def projections(module: nn.Module) -> dict[str, ExpertProjection]:
    """The projections of a fused experts module by name (``gate_up_proj.0``, ...); none for any other module."""
    fused = hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "num_experts")
    if not fused or getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
        return {}
    if module not in _MADE:
        _MADE[module] = {
            f"{name}.{number}": ExpertProjection(module, name, number)
            for name in _PROJECTIONS
            if isinstance(getattr(module, name, None), nn.Parameter)
            for number in range(len(getattr(module, name)))
        }
    return _MADE[module]


def routed(experts: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What transformers' eager experts compute, expert by expert, through modules that hooks can watch."""
    # By place in the module's own signature: models name them differently, and may pass them by name in any order.
    _, hidden_NH, index_NK, weight_NK = inspect.signature(type(experts).forward).bind(experts, *args, **kwargs).args[:4]
    by_name = projections(experts)
    first = "gate_up_proj" if "gate_up_proj.0" in by_name else "up_proj"
    out_NH = torch.zeros_like(hidden_NH)

    def call(name: str, x: Tensor) -> Tensor:
        projection = by_name[name]
        projection.token_N, projection.total = token_N, len(hidden_NH)
        return projection(x.unsqueeze(0)).squeeze(0)

    for number in index_NK.unique().tolist():
        if number >= int(experts.num_experts):
            continue
        token_N, place_N = torch.where(index_NK == number)
        h = call(f"{first}.{number}", hidden_NH[token_N])
        h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
        h = call(f"down_proj.{number}", h) * weight_NK[token_N, place_N, None]
        out_NH.index_add_(0, token_N, h.to(out_NH.dtype))
    return out_NH


@cache
def _uncompiled() -> Callable[..., Tensor]:
    """``routed``, out of reach of torch.compile, which runs what it made of one layer's experts for another's."""
    return torch.compiler.disable(routed)


@contextmanager
def watched(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let experts run expert by expert for the length of a block; blocks of several runs may overlap."""
    experts = dict.fromkeys(modules)
    for module in experts:
        if module not in _OPEN:
            _OPEN[module] = [0, module.__dict__.get("forward")]
            module.forward = partial(_uncompiled(), module)
        _OPEN[module][0] += 1
    try:
        yield
    finally:
        for module in experts:
            _OPEN[module][0] -= 1
            if not _OPEN[module][0]:
                del module.forward
                _, before = _OPEN.pop(module)
                if before is not None:
                    module.forward = before
