"""Log-only passes: no weight gradient is computed, and the graph starts at the first tap."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loghook.capture.tap import alias
from loghook.errors import UnsupportedError


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Switch off every weight gradient for the length of a log-only pass.

    The rows are the same; the pass costs about a forward and the input part of a backward. Parameters get their
    ``requires_grad`` back at the end, whatever happens inside. Under gradient checkpointing as transformers sets it
    up, embeddings' outputs require grad meanwhile, without which reentrant checkpoints would deliver nothing. The model
    may be wrapped, and is yielded as it is.

    Raises:
        UnsupportedError: a wrapper whose training afterwards would be another one: DDP with a static graph that has had
            no iteration yet, FSDP1 without shards, or with gradients that wait for a step, DeepSpeed's ZeRO.
    """
    hooks, fresh = [], [(state, group) for state, group in sharded_groups(model) if state._is_root is None]
    _require_harmless(model)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        hooks = [m.register_forward_hook(_require_grad) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        with requiring_grad(model.parameters(), False):
            yield model
    finally:
        for hook in hooks:
            hook.remove()
        for state, group in fresh:
            if state._is_root is not None:  # it ran
                group.lazy_init()


@contextmanager
def requiring_grad(parameters: Iterable[Tensor], wanted: bool) -> Iterator[None]:
    """Switch gradients of parameters on or off; each gets its own ``requires_grad`` back."""
    before = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in before:
            p.requires_grad_(wanted)
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


def fsdp1_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "FullyShardedDataParallel"]


def sharded_groups(model: nn.Module) -> list[tuple[Any, Any]]:
    """FSDP2's groups of parameters, each with the state of its module.

    A group chooses a dtype of gradients when it first runs, and none if it is frozen then; ``lazy_init`` chooses anew.
    """
    pairs = []
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            state: Any = module._get_fsdp_state()  # type: ignore[operator]
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            pairs += [(state, group) for group in groups if group is not None]
    return pairs


def under_zero(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO takes gradients away as they come; it notes on parameters what it does with them."""
    return any(hasattr(p, mark) for p in model.parameters() for mark in ("ds_id", "_hp_mapping"))


def _require_harmless(model: nn.Module) -> None:
    if under_zero(model):
        raise UnsupportedError(
            "a pass without weight gradients fails under DeepSpeed's ZeRO, or changes the training that follows: log "
            "inside training, or before deepspeed.initialize()."
        )
    for module in model.modules():
        waits = not getattr(module, "_static_graph_delay_allreduce_enqueued", True)
        if waits and getattr(module, "static_graph", False):
            raise UnsupportedError(
                "DistributedDataParallel(static_graph=True) would take this pass for the pattern of all that follow, "
                "and reduce no gradients: go through model.module, or freeze it after a step."
            )
    for module in fsdp1_modules(model):
        if "NO_SHARD" in str(module.sharding_strategy):
            raise UnsupportedError(
                "FSDP1 without shards (NO_SHARD, or a single process) trains otherwise after a pass without weight "
                "gradients: wrap the model afterwards, or use FSDP2."
            )
        if any(p.grad is not None for p in module.parameters()):
            raise UnsupportedError(
                "FSDP1 drops the gradients that its parameters have: freeze the model after zero_grad()."
            )


def _require_grad(module: nn.Module, args: object, y: Tensor) -> Tensor | None:
    if y.requires_grad:
        return None
    with torch.enable_grad():
        return alias(y.requires_grad_(True))  # the leaf itself could not be changed in place
