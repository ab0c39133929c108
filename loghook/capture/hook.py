"""The forward hook of a watched layer: inert while no block is open, else it puts a tap into the layer's output."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loghook.capture.compiling import BLOCKS
from loghook.capture.experts import ExpertProjection
from loghook.capture.jobs import Shared
from loghook.capture.layers import Layer, Slots
from loghook.capture.tap import CompiledTap, Misfit, apply_tap
from loghook.capture.work import sum_tokens
from loghook.errors import BatchError, UnsupportedError


class Hook:
    """A hook of ours; copies and pickles of a model get one that does nothing."""

    def __init__(self, call: Callable[..., Any], *bound: Any) -> None:
        self._call, self._bound = call, bound

    def __call__(self, *args: Any) -> Any:
        return self._call(*self._bound, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, (RemovableHandle.next_id,)


def _inert(taken: int) -> Hook:
    """Make the hook of a module that nobody watches, in a process that has yet to learn which ids hooks have."""
    RemovableHandle.next_id = max(RemovableHandle.next_id, taken)
    return Hook(do_nothing)


def do_nothing(*_: Any) -> None:
    """The hook of an unwatched layer, by which the compiler tells it from a watched one (see ``compiling``)."""


def make_hook(layer: Layer) -> Hook:
    """Return the forward hook of a layer, which puts a tap into its output while a block is open."""
    first = list(inspect.signature(type(layer.module).forward).parameters)[1]  # after self
    return Hook(_put_tap, layer, first)


def _put_tap(
    layer: Layer, first: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
) -> Tensor | None:
    slots = layer.slots if BLOCKS.any else None
    if slots is None or module is not layer.module:  # a shallow copy has the same hooks
        return None
    compiling = torch.compiler.is_compiling()
    if not torch.is_grad_enabled():
        # A reentrant checkpoint's first forward has no graph; its recomputation comes here again with one.
        if not compiling:
            slots.run(graph=False)
        return None
    if not compiling:
        _require_backward(layer)
    x: Any = args[0] if args else kwargs.get(first)
    if type(x) is not Tensor or type(y) is not Tensor:
        _require_tensors(layer, x, y)
    early = None if compiling else slots.early
    try:
        if early is not None and early[0] is x and early[1] == x._version:
            projected = early[2]
        else:
            projected = _projected(layer, slots, module, x)
        documents, weight = _tokens(layer, slots, projected)
    except BatchError as error:
        if compiling:
            raise
        # A call on something else than the batch does no harm where the loss does not depend on it: DoRA multiplies
        # an adapter's matrices by calling them on an identity, and detaches the product.
        slots.misfit = error.with_traceback(None)  # whose frames would hold the activations of all that called
        return Misfit.apply(y, slots.place.anchor, slots.misfit)
    summed = slots.leaves.activations is not None
    activations = _sum_inputs(layer, slots, x, projected, documents, weight) if summed else None
    if compiling:
        how = slots.place.block.job.kind, layer.adapter.channel_dim, layer.batch_dim
        return CompiledTap.apply(y, projected, weight, documents, activations, how, *slots.leaves, *slots.held)
    layer.fired, layer.computes_in, slots.early = True, y.dtype, None
    slots.run(graph=True)
    return apply_tap(y, slots.place.anchor, slots, projected, weight, documents, activations)


def _require_tensors(layer: Layer, *tensors: Any) -> None:
    """Raise where a layer takes or returns no tensors, or such as ranks share, whatever their mesh is called.

    FSDP gathers weights only.
    """
    for t in tensors:
        if not isinstance(t, Tensor):
            kind = type(t).__name__
            raise UnsupportedError(f"layer {layer.name!r} takes or returns a {kind}, no tensor: exclude it.")
        if type(t).__name__ == "DTensor":
            raise UnsupportedError(
                f"layer {layer.name!r} takes or returns a DTensor, as under tensor or sequence parallelism, and a "
                "rank's rows would be partial: use data parallelism (DDP or FSDP) for the logging pass."
            )


def _projected(layer: Layer, slots: Slots, module: nn.Module, x: Tensor) -> Tensor:
    """The layer's input in projected space, (B, S, k_in) or, in groups, (B, S, G, k_in)."""
    if slots.place.device.type != "cpu" and not torch.compiler.is_compiling() and _may_share(layer, slots, x):
        return _regrouped(layer, slots, _project_once(layer, slots, module, x))
    with torch.no_grad():  # an adapter may read the module's parameters
        projected = layer.adapter.project(module, _batch_first(layer, slots, x), slots.input_side, layer.spec.bias)
    projected = _regrouped(layer, slots, projected)
    if slots.input_side.matrix is None and not x.requires_grad and _is_part_of(projected, x):
        return projected.clone()  # autograd keeps it not: the program may write its next batch there
    return projected


def _tokens(layer: Layer, slots: Slots, projected: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens make a row, and how much each counts; as in ``Call``."""
    seen = slots.place.block.seen
    if seen is not None:
        if isinstance(layer.module, ExpertProjection):
            return slots.tokens.routed(layer.name, layer.module.token_N, layer.module.total, seen.get(layer.part, ()))
        if not torch.compiler.is_compiling():
            seen.setdefault(layer.part, set()).add(projected.shape[:2].numel())
    return slots.tokens.places(layer.name, projected), slots.tokens.weight(projected)


def _sum_inputs(
    layer: Layer, slots: Slots, x: Tensor, projected: Tensor, documents: Tensor | None, weight: Tensor | None
) -> Tensor:
    """The layer's inputs summed over tokens: (B, channels + 1)."""
    assert slots.leaves.activations is not None
    tokens = _regrouped(layer, slots, layer.adapter.tokens(_batch_first(layer, slots, x)))
    tokens = tokens.to(slots.leaves.activations.dtype)
    if tokens.shape[:2] != projected.shape[:2]:  # patches have positions of their own
        weight = slots.tokens.weight(tokens)
    return sum_tokens(tokens, weight, documents)


def project_early(layer: Layer, module: nn.Module, args: tuple[Any, ...]) -> None:
    """The forward pre-hook of a layer: on a processor it projects an input that the cache still holds.

    The hook after the layer's forward takes the product if its input is still the same.
    """
    slots = None if torch.compiler.is_compiling() else layer.slots
    if slots is None or slots.place.device.type != "cpu":
        return
    if module is not layer.module or not args or not torch.is_grad_enabled():
        return
    _require_backward(layer)
    x = args[0]
    if not isinstance(x, Tensor):  # the program's own hooks may come after this one
        return
    if type(x) is not Tensor:
        _require_tensors(layer, x)
    if _may_share(layer, slots, x):
        with suppress(BatchError):  # which the other hook raises
            slots.early = x, x._version, _regrouped(layer, slots, _project_once(layer, slots, module, x))


def _may_share(layer: Layer, slots: Slots, x: Tensor) -> bool:
    """Whether layers that read the same input share its projection; in compiled code the compiler merges such products.

    They do where address and version tell an input from others. Not where it needs no gradient: the program may write
    its next batch there, which torch does not count if numpy does it. Tensors of inference mode have no version, and
    subclasses that wrap others all have the address 0.
    """
    if slots.input_side.matrix is None or not layer.adapter.shares_input or x.is_nested or x.is_inference():
        return False
    try:
        return x.data_ptr() != 0 and x.requires_grad
    except RuntimeError as error:
        raise UnsupportedError(
            f"layer {layer.name!r} got a tensor without memory of its own, as a sparse one: make it dense."
        ) from error


def _project_once(layer: Layer, slots: Slots, module: nn.Module, x: Tensor) -> Tensor:
    """Project an input, or take what another layer made of it."""
    place, side, adapter = slots.place, slots.input_side, layer.adapter
    device = place.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    x = _batch_first(layer, slots, x)
    if place.shared is None or not place.shared.serves(x, precision, adapter, side):
        projected = adapter.project(module, x, side, layer.spec.bias)
        place.shared = Shared(x, x._version, precision, adapter, side, projected)
    return place.shared.projected


def _is_part_of(t: Tensor, other: Tensor) -> bool:
    return torch.compiler.is_compiling() or torch._C._is_alias_of(t, other)  # type: ignore[attr-defined]


def _require_backward(layer: Layer) -> None:
    """Raise inside torch.func's transforms: they have no backward pass that a tap could be in."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            f"layer {layer.name!r} ran inside a transform of torch.func (grad, vmap): log a plain loss.backward()."
        )


def _batch_first(layer: Layer, slots: Slots, x: Tensor) -> Tensor:
    """Detach a layer's input and arrange it with the batch first; raise where it has not the block's samples."""
    if x.is_nested:
        raise UnsupportedError(
            f"layer {layer.name!r} got a nested tensor: give nn.TransformerEncoder enable_nested_tensor=False."
        )
    least = 2 if layer.spec.channels else 1  # indices need no axis for channels
    if x.dim() < least:
        raise BatchError(
            f"layer {layer.name!r} got an input of shape {tuple(x.shape)}, without a batch: make it (1, ...)."
        )
    x = x.detach().to(slots.place.device)  # accelerate's hooks move inputs after this hook was given them
    if layer.spec.flattened:
        return x
    moved = layer.batch_dim and x.dim() > least  # (B, features) has no axis of tokens
    if moved:
        x = x.movedim(layer.batch_dim, 0)
    ids, documents = slots.tokens.samples, slots.tokens.documents
    if documents is None and x.shape[0] != ids.shape[0] and not isinstance(layer.module, ExpertProjection):
        shape = tuple(x.movedim(0, layer.batch_dim).shape if moved else x.shape)
        raise BatchError(
            f"{len(x)} samples, {len(ids)} ids: layer {layer.name!r} got an input of shape {shape}, and its "
            f"{'second axis (batch_dim=1)' if moved else 'first axis'} must be the batch. Pass one id for each sample, "
            "segments= where a sample is several rows, segments={pattern: ...} where layers see other entries, watch("
            "..., batch_dim=1 or flattened=) for other axes; or exclude the layer if all samples share its input."
        )
    return x


def _regrouped(layer: Layer, slots: Slots, tokens: Tensor) -> Tensor:
    """Give tokens of a flattened layer, (B * T, S, ...), the batch's axis back: (B, T * S, ...)."""
    if not layer.spec.flattened:
        return tokens
    batch = slots.tokens.entries
    if len(tokens) % batch:
        raise BatchError(
            f"layer {layer.name!r} got {len(tokens)} entries for a batch of {batch}: take it out of flattened=."
        )
    return tokens.unflatten(0, (batch, -1)).flatten(1, 2)
