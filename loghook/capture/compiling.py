"""What torch.compile has to know of open blocks.

Hooks find what waits for their rows at their layer, and not in a table by a number: layers of equal parts of a model
that are compiled one by one, as the blocks of a transformer, then share their code. But of what the compiler reaches
through the hooks of torch's own modules it takes some things for granted, which do not hold here.
"""

import re
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from loghook.capture.layers import Layer

# A module without hooks has none: the code of such a layer would serve for an equal one that is watched.
_NO_HOOKS = "skip_nnmodule_hook_guards"
_ASSUMPTIONS = (
    # Tensors there are of fixed size: it would compile anew for each size of a batch.
    "force_nn_module_property_static_shapes",
    # What hooks hold does not change: versions before torch 2.13 do not look at it again.
    "use_recursive_dict_tags_for_guards",
    _NO_HOOKS,
)


class OpenBlocks:
    """How many blocks are open; in the threads that opened them the compiler assumes nothing of what layers hold.

    That modules have no hooks it does not assume while a model is watched: code of an equal model, compiled between two
    blocks, would serve in the second. From torch 2.13 on its settings are each thread's own. In autograd's threads,
    which recompute what a reentrant checkpoint on a GPU ran, they stay as they are.

    Attributes:
        any: whether any is: in a global, at which compiled code always looks, also if it was compiled without a block.
    """

    def __init__(self) -> None:
        self.any = False
        self._count, self._watched, self._lock, self._here = 0, 0, threading.Lock(), _Here()
        self._assumed: dict[str, bool] = {}  # before the first was opened

    def watch(self) -> None:
        """Note that a model is watched, until ``unwatch``."""
        with self._lock:
            self._watched += 1
            self._doubt(_NO_HOOKS)

    def unwatch(self) -> None:
        with self._lock:
            self._watched -= 1
            self._assume_again()

    def open(self) -> None:
        with self._lock:
            self._count, self._here.count = self._count + 1, self._here.count + 1
            self.any = True
            self._doubt(*_ASSUMPTIONS)

    def close(self) -> None:
        with self._lock:
            self._count, self._here.count = self._count - 1, self._here.count - 1
            self.any = self._count > 0
            self._assume_again()

    def _doubt(self, *assumptions: str) -> None:
        config: Any = sys.modules.get("torch._dynamo.config")  # there once something is compiled; it takes seconds
        for name in assumptions:
            if name not in self._here.before and hasattr(config, name):
                self._here.before[name] = self._assumed.setdefault(name, getattr(config, name))
                setattr(config, name, False)

    def _assume_again(self) -> None:
        """Let the compiler assume in this thread, and forget of all of them, what it may now."""
        still = {_NO_HOOKS} if self._watched else set()
        for name in self._here.before.keys() - still if not self._here.count else ():
            setattr(sys.modules["torch._dynamo.config"], name, self._here.before.pop(name))
        for name in self._assumed.keys() - still if not self.any else ():
            del self._assumed[name]


class _Here(threading.local):
    """Of a thread: how many blocks it has open, and what the compiler assumed in it before."""

    def __init__(self) -> None:
        self.count = 0
        self.before: dict[str, bool] = {}


BLOCKS = OpenBlocks()


def unwatched_twins(model: nn.Module, layers: Sequence[Layer]) -> Iterator[nn.Module]:
    """Modules that may have the place in one part of the model which a watched layer has in an equal part.

    Before the first block the compiler may not look yet whether a module without hooks has got some, if it was loaded
    after ``watch``: what it made of a part that is not watched would serve for one that is, unless the unwatched layers
    have hooks too, which do nothing.
    """

    def kind(name: str, module: nn.Module) -> tuple[type, str]:
        return type(module), re.sub(r"\d+", "#", name.rpartition(".")[2])

    watched, kinds = {layer.module for layer in layers}, {kind(layer.name, layer.module) for layer in layers}
    yield from (m for name, m in model.named_modules() if m not in watched and kind(name, m) in kinds)
