"""Log-only passes: no weight gradient is computed, and the graph starts at the first tap."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loghook.capture.tap import alias


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Switch off every weight gradient for the length of a log-only pass.

    The rows are the same; the pass costs about a forward and the input part of a backward. Parameters get their
    ``requires_grad`` back at the end, whatever happens inside. Under gradient checkpointing as transformers sets it
    up, embeddings' outputs require grad meanwhile, without which reentrant checkpoints would deliver nothing. The model
    may be wrapped, and is yielded as it is.
    """
    hooks = []
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        hooks = [m.register_forward_hook(_require_grad) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        with requiring_grad(model.parameters(), False):
            yield model
    finally:
        for hook in hooks:
            hook.remove()


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


def _require_grad(module: nn.Module, args: object, y: Tensor) -> Tensor | None:
    if y.requires_grad:
        return None
    with torch.enable_grad():
        return alias(y.requires_grad_(True))  # the leaf itself could not be changed in place
