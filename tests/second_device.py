"""A second device that every machine has: importing this file gives the process "second:0", which computes on the CPU.

To torch it is a device like any other. Autograd runs its part of a graph in a thread of its own and takes no gradient
from elsewhere, and an operation on tensors of two devices raises, as it does on a GPU. Its tensors have no address and,
as on Apple's GPUs, there is neither float64 nor a decomposition of a matrix. It is there for good, has to be there
before the first backward pass, and then counts as the machine's accelerator: import this in a process of its own, as
`pytest -m second` does.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("second")
torch.get_device_module("second").get_amp_supported_dtype = lambda: [torch.bfloat16]  # checkpoints ask for it
SECOND = torch.device("second:0")
DECOMPOSITIONS = tuple(f"aten.{name}" for name in ("_linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_cholesky_ex"))


class OnSecond(Tensor):
    """A tensor on the second device; `held` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> Tensor:
        if held.is_meta:  # accelerate takes a parameter's class to put it on the meta device
            return torch.nn.Parameter(held, requires_grad)
        if held.dtype == torch.float64:
            raise TypeError(f"{SECOND} has no float64.")
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, device=SECOND, **layout)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(op, *args, **(kwargs or {}))


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation that takes a tensor on the second device, or makes one there."""
    if str(op).startswith(DECOMPOSITIONS):
        raise NotImplementedError(f"{op} is not implemented for {SECOND}.")
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    # Copies go from one device to another; a list of tensors is worked on one by one; a number may lie on the CPU.
    across = op in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default) or "_foreach_" in str(op)
    if not across and len({t.device for t in given if t.dim() or isinstance(t, OnSecond)}) > 1:
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, but found cpu and {SECOND}.")

    def on_cpu(value: Any) -> Any:
        return value.held if isinstance(value, OnSecond) else torch.device("cpu") if value == SECOND else value

    known = {id(on_cpu(t)): t for t in given}  # what works in place returns what it was given
    made_here = kwargs.get("device") in (None, SECOND)

    def placed(value: Any) -> Any:
        new = isinstance(value, Tensor) and id(value) not in known
        return OnSecond(value) if new and made_here else known.get(id(value), value)

    return tree_map(placed, op(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs)))


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy where torch steps past `__torch_dispatch__`, as in torch.tensor(..., device=...)."""
    getattr(target, "held", target).copy_(getattr(source, "held", source))
    return target


# Operations without a tensor among their arguments, such as torch.empty, come through the fallback.
_LIBRARIES = (torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL"))
_LIBRARIES[0].fallback(compute, "PrivateUse1")
_LIBRARIES[1].impl("_copy_from", copy_from, "PrivateUse1")
