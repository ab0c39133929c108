"""Log-only passes: no weight gradient is computed, and the graph starts at the first tap."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Switch off every weight gradient for the length of a log-only pass.

    The rows are the same; the pass costs about a forward and the input part of a backward. Parameters get their
    ``requires_grad`` back at the end, whatever happens inside. Under gradient checkpointing as transformers sets it
    up, embeddings' outputs require grad meanwhile, without which reentrant checkpoints would deliver nothing. The model
    may be wrapped, and is yielded as it is.
    """
    before = [(p, p.requires_grad) for p in model.parameters()]
    hooks = []
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        hooks = [m.register_forward_hook(_require_grad) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
        for hook in hooks:
            hook.remove()


def _require_grad(module: nn.Module, args: object, y: Tensor) -> None:
    if not y.requires_grad:
        y.requires_grad_(True)
