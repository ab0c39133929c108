"""One ``with run(...)`` block: leaves in, hooks live, one delivery of every watched layer checked on the way out."""

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loghook.capture.experts import ExpertProjection
from loghook.capture.layers import Job, Layer, Shared, Slots
from loghook.capture.segments import Documents, list_tokens
from loghook.capture.tap import Tap, sum_tokens
from loghook.errors import BatchError, DeliveryError, UnsupportedError

# The leaves of open blocks by layer. They lie in a global of their own, because the compiler takes whatever it reaches
# through a module's hooks for fixed in size, and would compile the model anew for every batch size.
_OPEN: dict[int, Slots] = {}


@dataclass
class Captured:
    """What a block delivered.

    Attributes:
        rows: (B, width) in float32 or float64, on the device of the first layer; empty where a job took their place.
        moments: the vector of statistics (see ``Layout``) summed over the block's tokens, or None.
        asleep: names of layers that may sleep and did; their rows are zero.
        results: {layer name: what the block's job delivered}; sleeping layers are missing.
    """

    rows: Tensor
    moments: Tensor | None
    asleep: list[str]
    results: dict[str, Tensor] = field(default_factory=dict)


def make_hook(layer: Layer) -> Callable[..., Tensor | None]:
    """Return the forward hook of a layer: inert while no block is open."""
    key = layer.key
    first = list(inspect.signature(type(layer.module).forward).parameters)[1]  # after self

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        slots = _OPEN.get(key)
        if slots is None or module is not layer.module:  # a deep copy of the model has the same hooks
            return None
        if not torch.is_grad_enabled():
            # A reentrant checkpoint's first forward has no graph; its recomputation comes here again with one.
            if not torch.compiler.is_compiling():
                slots.quiet += 1
            return None
        x = args[0] if args else kwargs.get(first)
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise UnsupportedError(
                f"layer {layer.name!r} takes {type(x).__name__} and returns {type(y).__name__}: loghook watches "
                "modules "
                "from one tensor to one tensor. Exclude it."
            )
        x = x.detach()
        if layer.spec.flattened:
            x = _unflatten(layer, slots, x)
        elif layer.spec.batch_dim:
            x = x.movedim(layer.spec.batch_dim, 0)
        if slots.documents is None and not isinstance(module, ExpertProjection) and len(x) != slots.size:
            raise BatchError(
                f"layer {layer.name!r} got an input of shape {tuple(x.shape)} (batch first) in a block of "
                f"{slots.size} ids: its first axis must be the batch, one entry for each data_id. Pass one id "
                "for each sample; or watch(..., batch_dim=1) for sequence-first models; or name the layer in "
                "watch(..., flattened=...) if batch and tokens share that axis; or exclude the layer."
            )
        projected = _project(layer, slots, module, x)
        if isinstance(module, ExpertProjection):
            documents, weight = _routed_tokens(layer, slots, module)
        else:
            documents, weight = None, _token_weight(slots, projected)
            if slots.documents is not None:
                slots.documents.check(layer.name, (projected.shape[0], projected.shape[1]))
                documents = slots.documents.index_DL
        activations = None
        if slots.activations is not None:
            tokens = layer.adapter.tokens(x).to(slots.activations.dtype)
            same = tokens.shape[:2] == projected.shape[:2]  # not so for patches, which have positions of their own
            activations = sum_tokens(tokens, weight if same else _token_weight(slots, tokens), documents)
        if not torch.compiler.is_compiling():
            layer.fired, layer.computes_in = True, y.dtype
            if torch._C._current_graph_task_id() != -1:  # inside a backward pass: a checkpoint recomputes
                slots.recomputed += 1
            elif slots.shared.delivered:
                slots.shared.restarted = True
        if slots.job is not None:
            return slots.job.tap(layer, slots, y, projected, weight, documents)
        return Tap.apply(
            y,
            projected,
            weight,
            slots.output_side.matrix,
            activations,
            documents,
            layer.adapter.channel_dim,
            layer.spec.batch_dim,
            slots.leaf,
            slots.moments,
            slots.activations,
            slots.outputs,
        )

    return hook


def _project(layer: Layer, slots: Slots, module: nn.Module, x: Tensor) -> Tensor:
    side, bias = slots.input_side, layer.spec.bias
    with torch.no_grad():
        # Under torch.compile the compiler itself merges equal products of equal inputs.
        if not layer.adapter.shares_input or side.matrix is None or torch.compiler.is_compiling():
            return layer.adapter.project(module, x, side, bias)
        shared = slots.shared
        # Address and version identify a tensor for as long as `source` keeps it alive.
        key = (x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, side)
        if shared.key != key:
            shared.projected = layer.adapter.project(module, x, side, bias)
            shared.key, shared.source = key, x
        assert shared.projected is not None
        return shared.projected


def _unflatten(layer: Layer, slots: Slots, x: Tensor) -> Tensor:
    """Give (batch * tokens, ...) its batch axis back: (B, S, ...)."""
    batch = slots.size if slots.documents is None else slots.documents.number_BS.shape[0]
    if x.shape[0] % batch:
        raise BatchError(
            f"layer {layer.name!r} was declared flattened and got {x.shape[0]} entries for a batch of {batch}, which "
            "is no whole number of tokens each: take it out of watch(..., flattened=...)."
        )
    return x.unflatten(0, (batch, -1))


def _token_weight(slots: Slots, tokens: Tensor) -> Tensor | None:
    """What each token of a layer counts in sums over tokens: (B, S), or None where all count once.

    A mask speaks of the model's tokens. A layer with as many tokens uses it as it is, one with a single token
    (a pooled head) counts samples that have any, and one with its own positions (patches) counts all of them.
    """
    B, S = tokens.shape[:2]
    if slots.mask is not None and slots.mask.shape[1] == S:
        slots.masked = True
        return slots.mask
    if slots.mask is not None and S == 1:
        return slots.mask.amax(1, keepdim=True)
    return None if slots.keep is None else slots.keep[:, None].expand(B, S)


def _routed_tokens(layer: Layer, slots: Slots, module: ExpertProjection) -> tuple[Tensor, Tensor | None]:
    """For an expert, which has lost its tokens' batch rows: its tokens by sample (or document), and their weights."""
    token_N, size = module.token_N, slots.size
    if slots.documents is None:
        if module.total % size:
            raise BatchError(
                f"layer {layer.name!r} got {module.total} tokens in a block of {size} ids, which is no whole number "
                "for each: pass one id for each sample, or segments= for packed documents."
            )
        number_N = token_N // (module.total // size)
    else:
        number_N = slots.documents.number_BS.flatten()[token_N]
    mask = slots.mask
    if mask is not None and mask.numel() == module.total:
        slots.masked = True
        return list_tokens(number_N, size), mask.flatten()[token_N].unsqueeze(0)
    return list_tokens(number_N, size), None if slots.keep is None else slots.keep[number_N].unsqueeze(0)


class Block:
    """Opens the watched layers for one batch and collects what autograd delivers to their leaves."""

    def __init__(self, layers: Sequence[Layer], size: int, *, moments: bool, job: Job | None = None) -> None:
        """Prepare a block of ``size`` samples; ``moments`` asks for the statistics as well, ``job`` replaces rows."""
        self._layers, self._size, self._moments, self._job = layers, size, moments and job is None, job

    def open(self, masks: Mapping[str, Tensor], keep: Tensor | None, documents: Documents | None = None) -> None:
        """Give every layer fresh leaves.

        Args:
            masks: {layer: (B, S) or (B,), which tokens count in moments and means}; all where it has none.
            keep: (B,) bool, which samples (or documents) count at all in them (repeats do not), or None for all.
            documents: which tokens make a row, or None: those of a sample.
        """
        shared, kept, counted = Shared(), keep, None
        if documents is not None:
            # Repeats and tokens that belong to no document are told by token from here on.
            number = documents.number_BS
            counted = number >= 0 if keep is None else torch.cat([keep, keep.new_zeros(1)])[number]
            keep = None
        elif keep is not None:
            counted = keep[:, None]
        zeros: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for layer in self._layers:
            mask = masks.get(layer.name)
            if mask is not None:
                mask = mask[:, None] if mask.dim() == 1 else mask
                mask = mask if counted is None else mask * counted.to(mask.device)
            elif documents is not None:
                mask = counted
            spec, (device, dtype) = layer.spec, layer.device_and_dtype()
            layer.place(device)
            layer.fired = False
            job = self._job
            sides = layer.sides if job is None else job.sides(layer)
            if job is None and (narrow := _narrow(layer)) is not None:
                sides = (sides[0].cast(narrow), sides[1].cast(narrow))
            shape = (self._size, spec.k_out, spec.k_in) if job is None else job.shape(layer, self._size)

            # Nobody reads a leaf, so that one stored value serves for all of them.
            if (device, dtype) not in zeros:
                zeros[device, dtype] = torch.zeros((), device=device, dtype=dtype)
            zero = zeros[device, dtype]

            def leaf(*shape: int, zero: Tensor = zero) -> Tensor:
                return zero.expand(shape).requires_grad_()

            _OPEN[layer.key] = slots = Slots(
                size=self._size,
                input_side=sides[0].to(device),
                output_side=sides[1].to(device),
                leaf=leaf(*shape),
                job=job,
                moments=leaf(spec.k_in**2 + spec.k_out**2 + 1) if self._moments else None,
                activations=leaf(self._size, spec.channels + 1) if spec.activations and job is None else None,
                outputs=leaf(self._size, spec.out_features + 1) if spec.output_gradients and job is None else None,
                documents=None if documents is None else documents.to(device),
                mask=None if mask is None else mask.to(device, dtype),
                keep=None if keep is None else keep.to(device, dtype),
                kept=None if kept is None else kept.to(device, dtype),
                shared=shared,
            )
            slots.leaf.register_post_accumulate_grad_hook(_count(slots))

    def close(self) -> list[Slots | None]:
        """Make every hook inert again and return the leaves."""
        return [_OPEN.pop(layer.key, None) for layer in self._layers]

    def collect(
        self, leaves: Sequence[Slots | None], *, scale: float | Tensor, masks: Mapping[str, Tensor]
    ) -> Captured:
        """Check that each layer delivered once and pack the rows.

        Args:
            leaves: what ``close`` returned.
            scale: what rows are multiplied by (moments of output gradients by its square).
            masks: what ``open`` was given.

        Raises:
            DeliveryError: if a layer that may not sleep delivered nothing, or two backward passes delivered.
            BatchError: if no layer of a mask has as many tokens as it.
        """
        slots = [leaf for leaf in leaves if leaf is not None]
        silent = [(layer, s) for layer, s in zip(self._layers, slots, strict=True) if s.leaf.grad is None]
        missing = [layer for layer, _ in silent if not layer.spec.may_sleep]
        quiet = all(s.quiet for layer, s in silent if not layer.spec.may_sleep)
        if missing and len(silent) == len(slots):
            raise DeliveryError(nothing_delivered(self._layers))
        if missing:
            raise DeliveryError(_partial(missing, quiet, len(slots)))
        # A layer shared by several reentrant checkpoints delivers once for each of them.
        if slots[0].shared.restarted or any(s.deliveries > max(1, min(s.quiet, s.recomputed)) for s in slots):
            raise DeliveryError(
                "two backward passes ran in this block, so rows would add up two losses: open one block for each "
                "backward pass, or add the losses and call backward() once. Nothing of this batch was written."
            )
        for mask in {id(mask): mask for mask in masks.values() if mask.dim() > 1 and mask.shape[1] > 1}.values():
            served = [(layer, s) for layer, s in zip(self._layers, slots, strict=True) if masks.get(layer.name) is mask]
            if any(layer.fired for layer, _ in served) and not any(s.masked for _, s in served):
                raise BatchError(
                    f"mask of shape {tuple(mask.shape)} fits no layer that it is for: none has {mask.shape[1]} tokens "
                    "a sample. Pass the mask with the shape (batch, tokens) that the watched layers see, or none."
                )
        asleep = [layer.name for layer, _ in silent]
        if self._job is not None:
            results = {}
            for layer, s in zip(self._layers, slots, strict=True):
                if s.leaf.grad is not None:
                    results[layer.name] = self._job.finish(layer, s.leaf.grad, scale)
                    s.leaf.grad = None
            return Captured(torch.empty(0), None, asleep, results)
        return self._pack(slots, scale, asleep)

    def _pack(self, slots: Sequence[Slots], scale: float | Tensor, asleep: list[str]) -> Captured:
        device = slots[0].leaf.device
        gradients = [_delivered(s.leaf).flatten(1) for s in slots]
        _multiply(gradients, [layer.gain for layer in self._layers])
        activations: list[Tensor] = []
        outputs: list[Tensor] = []
        moments: list[Tensor] = []
        for layer, s in zip(self._layers, slots, strict=True):
            for leaf, reduction, out, factor in (
                (s.activations, layer.spec.activations, activations, 1.0),
                (s.outputs, layer.spec.output_gradients, outputs, scale),
            ):
                if leaf is not None:
                    total, tokens = _delivered(leaf).split([leaf.shape[1] - 1, 1], 1)
                    value = total / torch.where(tokens > 0, tokens, 1) if reduction == "mean" else total
                    out.append((value * factor).to(device))
            if s.moments is not None:
                moments += _delivered(s.moments).split([layer.spec.k_in**2, layer.spec.k_out**2, 1])
        if moments:  # inputs', output gradients' and tokens of each layer in turn
            _multiply(moments[0::3], [layer.input_side.gain**2 for layer in self._layers])
            _multiply(moments[1::3], [layer.output_side.gain**2 for layer in self._layers])
            _multiply(moments[1::3], scale**2)
            moments = [part.to(device) for part in moments]
        rows = torch.cat([part.to(device) for part in gradients], 1)
        if not isinstance(scale, float) or scale != 1.0:
            rows.mul_(scale)
        if activations or outputs:
            rows = torch.cat([rows, *activations, *outputs], 1)
        for s in slots:  # the user may keep the loss, and with it the graph and its leaves
            for leaf in (s.leaf, s.moments, s.activations, s.outputs):
                if leaf is not None:
                    leaf.grad = None
        return Captured(rows, torch.cat(moments) if moments else None, asleep)


def _narrow(layer: Layer) -> torch.dtype | None:
    """Half-precision dtype in which a linear layer holds its weights and computed last time, or None.

    Its projections are kept in it, instead of being cast at every call to what the layer's tensors are in.
    """
    weight = getattr(layer.module, "weight", None)
    if layer.adapter.shares_input and layer.computes_in in (torch.bfloat16, torch.float16) and weight is not None:
        return layer.computes_in if weight.dtype == layer.computes_in else None
    return None


def _delivered(leaf: Tensor) -> Tensor:
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if leaf.grad is None else leaf.grad


def _multiply(parts: Sequence[Tensor], factors: Sequence[float] | float | Tensor) -> None:
    """Multiply tensors in place, on a GPU with few kernels for all layers instead of one for each."""
    if isinstance(factors, Tensor):
        for part in parts:
            part.mul_(factors)
    elif factors != 1.0:
        torch._foreach_mul_(list(parts), factors if isinstance(factors, float) else list(factors))


def _count(slots: Slots) -> Callable[[Tensor], None]:
    """Return a hook that counts deliveries; it must not hold the leaf, or their cycle would keep rows alive."""
    reference = weakref.ref(slots)

    def counted(_: Tensor) -> None:
        counting = reference()
        if counting is not None:
            counting.deliveries += 1
            counting.shared.delivered = True

    return counted


def nothing_delivered(layers: Sequence[Layer]) -> str:
    """Say why a block without a single row may have none."""
    if not any(layer.fired for layer in layers):
        return (
            "no watched layer ran in this block, or its hooks never fired. Run the model's forward and backward inside "
            "the block, with gradients enabled (no torch.no_grad, torch.inference_mode, merged or disabled adapter); "
            "if the model was compiled before watch(), call watch() first."
        )
    return (
        "no backward pass reached a watched layer in this block: call loss.backward() inside it, on a loss that "
        "depends on the model's output."
    )


def _partial(missing: Sequence[Layer], quiet: bool, total: int) -> str:
    names = ", ".join(repr(layer.name) for layer in missing[:5]) + (", ..." if len(missing) > 5 else "")
    if quiet:
        cause = (
            "it ran without gradients: under torch.no_grad or torch.inference_mode, or in a reentrant checkpoint whose "
            "input needs no gradient (use loghook.frozen, or use_reentrant=False)"
        )
    elif not any(layer.fired for layer in missing):
        cause = (
            "its forward never ran here: a branch not taken, an adapter that is merged or "
            "disabled, a model compiled before watch(), or a fused kernel that reads the weight without calling the "
            "module (fused losses do that to lm_head)"
        )
    elif all(layer.fired for layer in missing):
        cause = (
            "it ran, but no gradient came back: the loss does not depend on it, its output was detached, or a "
            "reentrant checkpoint got an input that needs no gradient (use loghook.frozen, or use_reentrant=False)"
        )
    else:
        cause = "some never ran, some got no gradient"
    return (
        f"{len(missing)} of {total} watched layers delivered no rows in this block: {names}. Likely cause: {cause}. "
        "Nothing of this batch was written. Exclude such layers, or name them in watch(..., may_sleep=...) if they may "
        "rightly stay silent."
    )
