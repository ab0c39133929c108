"""One ``with run(...)`` block: leaves in, hooks live, one delivery of every watched layer checked on the way out."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from loghook.capture.hook import OPEN
from loghook.capture.layers import Layer, Leaves, Shared, Slots
from loghook.capture.segments import Documents
from loghook.capture.tap import Pending
from loghook.capture.whole import Job, Together
from loghook.errors import BatchError, DeliveryError, UnsupportedError
from loghook.project.projection import Side


@dataclass
class Captured:
    # (B, width) in float32 or float64, on the device of the first layer; empty where a job took their place
    rows: Tensor
    moments: Tensor | None  # the vector of statistics (see ``Layout``) summed over the block's tokens, or None
    asleep: list[str]  # names of layers that may sleep and did; their rows are zero
    # {layer name: what the block's job delivered}; sleeping layers are missing
    results: dict[str, Tensor] = field(default_factory=dict)


class Block:
    """Opens the watched layers for one batch and collects what autograd delivers to their leaves."""

    def __init__(
        self,
        layers: Sequence[Layer],
        size: int,  # how many rows
        scale: float | Tensor,  # what gradients are multiplied by, see ``unscaled``
        moments: bool,  # whether the statistics are asked for as well
        updates: bool,  # rows are of the optimiser's update, which has no statistics
        job: Job | None,  # what is computed instead of rows
    ) -> None:
        self._layers, self._size, self._scale, self._job = layers, size, scale, job
        self._moments, self._updates = moments and not updates and job is None, updates
        # What is made once for each device and dtype: a zero, the scale for updates, and where tokens wait.
        self._places: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor | None, Pending | Together]] = {}

    def open(
        self,
        masks: Mapping[str, Tensor],  # {layer: (B, S) or (B,), which tokens count in moments and means}; else all do
        keep: Tensor | None,  # (B,) bool, which samples (or documents) count in them (repeats do not), or None for all
        documents: Documents | None = None,  # which tokens make a row, or None: those of a sample
    ) -> None:
        """Give every layer fresh leaves."""
        shared, kept, counted = Shared(), keep, None
        if documents is not None:
            # Repeats and tokens that belong to no document are told by token from here on.
            number = documents.number_BS
            counted = number >= 0 if keep is None else torch.cat([keep, keep.new_zeros(1)])[number]
            keep = None
        elif keep is not None:
            counted = keep[:, None]
        moved = _Moved()

        def count(mask: Tensor) -> Tensor:
            mask = mask[:, None] if mask.dim() == 1 else mask
            return mask if counted is None else mask * moved.to(counted, mask.device)

        given = {id(mask): count(mask) for mask in masks.values()}
        for layer in self._layers:
            mask = given[id(masks[layer.name])] if layer.name in masks else None if documents is None else counted
            spec, (device, dtype) = layer.spec, layer.device_and_dtype()
            there = device, dtype
            layer.fired = False
            job = self._job
            inputs, outputs = layer.sides if job is None else job.sides(layer)
            narrow = None if self._updates or job is not None else _narrow(layer)
            inputs, outputs = inputs.to(device, narrow), outputs.to(device, narrow)
            shape = (self._size, spec.k_out, spec.k_in) if job is None else job.shape(layer, self._size)

            # Nobody reads a leaf, so that one stored value serves for all of them.
            if there not in self._places:
                self._places[there] = (
                    torch.zeros((), device=device, dtype=dtype),
                    _filled(self._scale, device, dtype) if self._updates else None,
                    Pending(dtype, self._moments) if job is None else Together(),
                )
            zero, scale, pending = self._places[there]

            update: tuple[Tensor | None, ...] = ()
            parts_add_up = True
            if self._updates:
                assert layer.moments is not None
                update = (inputs.matrix, *layer.moments.read(layer, device, dtype), scale)
                inputs, parts_add_up = Side(inputs.width, None), layer.moments.linear

            def leaf(*shape: int, zero: Tensor = zero) -> Tensor:
                return zero.expand(shape).requires_grad_()

            means = spec.activations or spec.output_gradients
            if job is None:
                # A side without a projection may be the user's own tensor, which may change before rows are formed.
                copied = inputs.matrix is not None and outputs.matrix is not None
                later = copied and documents is None and not (self._updates or means)
            else:
                later, parts_add_up = job.at_once, not job.at_once
            leaves = Leaves(
                rows=leaf(*shape),
                moments=leaf(spec.k_in**2 + spec.k_out**2 + 1) if self._moments else None,
                activations=leaf(self._size, spec.channels + 1) if spec.activations and job is None else None,
                outputs=leaf(self._size, spec.out_features + 1) if spec.output_gradients and job is None else None,
                calls=leaf(1) if later or not parts_add_up else None,
            )
            OPEN[layer.key] = slots = Slots(
                leaves=leaves,
                samples=zero.expand(self._size),
                input_side=inputs,
                output_side=outputs,
                job=job,
                update=update,
                documents=None if documents is None else Documents(*(moved.to(t, device) for t in documents)),
                mask=None if mask is None else moved.to(mask, *there),
                keep=None if keep is None else moved.to(keep, *there),
                kept=None if kept is None else moved.to(kept, *there),
                shared=shared,
                pending=pending if later else None,
            )
            leaves.rows.register_post_accumulate_grad_hook(_calling(slots, Slots.count))
            if slots.pending is not None and leaves.calls is not None:
                leaves.calls.register_post_accumulate_grad_hook(_calling(slots, Slots.accept))

    def close(self) -> list[tuple[Layer, Slots]]:
        """Make every hook inert again and return what they filled."""
        found = [(layer, OPEN.pop(layer.key, None)) for layer in self._layers]
        return [(layer, slots) for layer, slots in found if slots is not None]

    def collect(self, opened: Sequence[tuple[Layer, Slots]], *, masks: Mapping[str, Tensor]) -> Captured:
        """Check that each layer delivered once into what was ``opened``, and pack the rows; masks as in ``open``."""
        silent = [(layer, s) for layer, s in opened if not s.deliveries.number]
        missing = [layer for layer, _ in silent if not layer.spec.may_sleep]
        for layer, s in silent:
            if s.misfit is not None and not layer.spec.may_sleep:
                raise s.misfit
        if missing and len(silent) == len(opened):
            raise DeliveryError(nothing_delivered(self._layers))
        if missing:
            quiet = all(s.deliveries.quiet for layer, s in silent if not layer.spec.may_sleep)
            raise DeliveryError(_partly_delivered(missing, quiet, len(opened)))
        if any(s.shared.restarted or s.deliveries.too_many for _, s in opened):
            raise DeliveryError(
                "two backward passes ran in this block, so rows would add up two losses: open one block for each "
                "backward pass, or add the losses and call backward() once. Nothing of this batch was written."
            )
        for mask in {id(mask): mask for mask in masks.values() if mask.dim() > 1 and mask.shape[1] > 1}.values():
            served = [(x, s) for x, s in opened if masks.get(x.name) is mask and s.deliveries.number]
            # Compiled layers leave no word of what they saw.
            if served and all(layer.fired and not s.masked for layer, s in served):
                raise BatchError(
                    f"mask of shape {tuple(mask.shape)} fits no layer that it is for: none has {mask.shape[1]} tokens "
                    "a sample. Pass the mask with the shape (batch, tokens) that the watched layers see, or none."
                )
        asleep = [layer.name for layer, _ in silent]
        self._require_one_call(opened)
        for _, _, pending in self._places.values():
            pending.form()
        if self._job is not None:
            results = {}
            for layer, s in opened:
                if s.deliveries.number:
                    found = _sum(s.rows, s.leaves.rows)
                    results[layer.name] = self._job.finish(layer, found, self._scale_of(found))
                    s.clear()
            return Captured(torch.empty(0), None, asleep, results)
        return self._pack(opened, asleep)

    def _require_one_call(self, opened: Sequence[tuple[Layer, Slots]]) -> None:
        """Raise where a gradient came in parts, and what is asked for is no sum of what would be made of the parts."""
        job = self._job
        if not self._updates and (job is None or not job.at_once):
            return
        counts: dict[str, Tensor] = {}
        for layer, s in opened:
            calls = None if s.leaves.calls is None else s.leaves.calls.grad
            if calls is not None and s.leaves.rows.grad is not None:
                # A job counts compiled calls only, so that a device is waited for only where there are any.
                counts[layer.name] = calls.to(opened[0][1].leaves.rows.device) + (
                    0 if job is None else s.deliveries.ran
                )
        if not counts:
            return
        found = torch.cat(list(counts.values())).tolist()
        several = next((name for name, count in zip(counts, found, strict=True) if count > 1), None)
        if several is None:
            return
        if job is None:
            raise UnsupportedError(
                f"layer {several!r} was called several times in this block, and gradient='adam' is of the gradient of "
                "all calls together, which is never formed: exclude it, or log gradient='normalized' or 'plain'."
            )
        raise UnsupportedError(
            f"layer {several!r} was called several times in this block, compiled, where each call's gradient comes "
            "alone, and eigenvalues and norms are of that of all calls together: use the model without torch.compile "
            "here, or exclude the layer."
        )

    def _scale_of(self, rows: Tensor) -> float | Tensor:
        """The scale for rows: a number of the CPU may multiply them anywhere, nothing else of another device may."""
        scale = self._scale
        if not isinstance(scale, Tensor) or (scale.device.type == "cpu" and not scale.dim()):
            return scale
        return scale[:, None].to(rows) if scale.dim() else scale.to(rows.device)

    def _pack(self, opened: Sequence[tuple[Layer, Slots]], asleep: list[str]) -> Captured:
        slots = [s for _, s in opened]
        device = slots[0].leaves.rows.device
        rows = torch.cat([_sum(s.rows, s.leaves.rows).flatten(1).to(device) for s in slots], 1)
        rows = _scaled(rows, [layer.gain for layer in self._layers], [layer.spec.width for layer in self._layers])
        scale = self._scale_of(rows)
        unscaled = isinstance(scale, float) and scale == 1.0
        if not unscaled and not self._updates:  # updates have it in them
            rows *= scale
        means: dict[str, list[Tensor]] = {"activations": [], "output_gradients": []}
        for layer, s in opened:
            for kind, leaf in (("activations", s.leaves.activations), ("output_gradients", s.leaves.outputs)):
                if leaf is not None:
                    factor = 1.0 if kind == "activations" else self._scale_of(leaf)
                    total, tokens = _delivered(leaf).split([leaf.shape[1] - 1, 1], 1)
                    mean = getattr(layer.spec, kind) == "mean"
                    value = total / tokens.masked_fill(tokens <= 0, 1) if mean else total
                    means[kind].append((value * factor).to(device))
        if any(means.values()):
            rows = torch.cat([rows, *means["activations"], *means["output_gradients"]], 1)
        moments = None
        if self._moments:
            moments = torch.cat(
                [_sum(s.moments, s.leaves.moments).to(device) for s in slots if s.leaves.moments is not None]
            )
            gains = [g for layer in self._layers for g in (layer.input_side.gain**2, layer.output_side.gain**2, 1.0)]
            sizes = [n for layer in self._layers for n in (layer.spec.k_in**2, layer.spec.k_out**2, 1)]
            moments = _scaled(moments, gains, sizes)
            if not unscaled:  # moments of output gradients by the square of the scale
                of_outputs = _spread((0.0, 1.0, 0.0) * len(slots), tuple(sizes), moments.dtype, moments.device) > 0
                moments = torch.where(of_outputs, moments * scale**2, moments)
        for s in slots:  # the user may keep the loss, and with it the graph and its leaves
            s.clear()
        return Captured(rows, moments, asleep)


class _Moved:
    """Tensors that a block's layers share, brought once to each of their devices, for which a device may be waited."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def to(self, t: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        key = id(t), device, dtype or t.dtype
        if key not in self._made:
            self._made[key] = t, t.to(device, dtype or t.dtype)  # the tensor as well, so that its id stays its own
        return self._made[key][1]


def _filled(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number on a device, or one for each sample, (B, 1, 1).

    A number is filled there: to copy it from here would wait for what the device has to do.
    """
    if not isinstance(value, Tensor):
        return torch.full((), value, device=device, dtype=dtype)
    return (value[:, None, None] if value.dim() else value).to(device, dtype)


def _narrow(layer: Layer) -> torch.dtype | None:
    """Half-precision dtype in which a linear layer holds its weights and computed last time, or None.

    Its projections are kept in it, instead of being cast at every call to what the layer's tensors are in.
    """
    if not layer.adapter.shares_input or layer.computes_in not in (torch.bfloat16, torch.float16):
        return None
    if is_parametrized(layer.module, "weight"):  # reading it would make it anew
        return None
    weight = getattr(layer.module, "weight", None)
    return layer.computes_in if weight is not None and weight.dtype == layer.computes_in else None


def _sum(formed: Tensor | None, leaf: Tensor) -> Tensor:
    """Add what was formed with other layers and what autograd delivered; a layer seldom has both."""
    if formed is None:
        return _delivered(leaf)
    return formed if leaf.grad is None else formed + leaf.grad


def _delivered(leaf: Tensor) -> Tensor:
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if leaf.grad is None else leaf.grad


def _scaled(values: Tensor, gains: Sequence[float], sizes: Sequence[int]) -> Tensor:
    """Multiply, in place, as many values (..., sum of sizes) with each gain as its size says."""
    if any(gain != 1.0 for gain in gains):  # not where nothing is projected, and rows are widest
        values *= _spread(tuple(gains), tuple(sizes), values.dtype, values.device)
    return values


@lru_cache(maxsize=16)
def _spread(values: tuple[float, ...], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Repeat each value as often as its size says: (sum of sizes,); kept for the next block."""
    return torch.from_numpy(np.repeat(values, sizes)).to(device, dtype)


def _calling(slots: Slots, method: Callable[[Slots], None]) -> Callable[[Tensor], None]:
    """Return a hook that tells of a delivery; it must not hold the leaf, or their cycle would keep rows alive."""
    reference = weakref.ref(slots)

    def hook(_: Tensor) -> None:
        told = reference()
        if told is not None:
            method(told)

    return hook


def nothing_delivered(layers: Sequence[Layer]) -> str:
    """Say why a block without a single row may have none."""
    if not any(layer.fired for layer in layers):
        return (
            "no watched layer ran in this block, or its hooks never fired. Run forward and backward inside the block, "
            "of the very model that watch() was given (not one made again since), with gradients enabled (no "
            "torch.no_grad, torch.inference_mode, merged or disabled adapter); if it was compiled before watch(), call "
            "watch() first."
        )
    return (
        "no backward pass reached a watched layer in this block: call loss.backward() inside it, without inputs= (and "
        "not torch.autograd.grad), on a loss that depends on the model's output. Where a framework calls it, as "
        "Lightning does after training_step, docs/trainer.md says how."
    )


def _partly_delivered(missing: Sequence[Layer], quiet: bool, total: int) -> str:
    """Say why some of ``total`` layers may have no rows; ``quiet``: all of them ran without gradients."""
    names = ", ".join(repr(layer.name) for layer in missing[:5]) + (", ..." if len(missing) > 5 else "")
    if quiet:
        cause = (
            "it ran without gradients: under torch.no_grad or torch.inference_mode, or in a reentrant checkpoint whose "
            "input needs no gradient (use loghook.frozen, or use_reentrant=False)"
        )
    elif not any(layer.fired for layer in missing):
        cause = (
            "its forward never ran here: a branch not taken, an adapter that is merged or disabled, a module that was "
            "put in its place, a model compiled before watch(), or a fused kernel that reads the weight without "
            "calling the module (fused losses do that to lm_head)"
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
