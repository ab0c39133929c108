"""One ``with run(...)`` block: leaves in, hooks live, one delivery of every watched layer checked on the way out."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loghook.capture.compiling import BLOCKS
from loghook.capture.jobs import Block, Place
from loghook.capture.layers import Layer, Slots
from loghook.capture.rows import Updates
from loghook.capture.segments import Documents, Tokens, count
from loghook.capture.select import HEAD
from loghook.errors import BatchError, DeliveryError, UnsupportedError
from loghook.log.format import listed, patterns


def prepare(
    layers: Sequence[Layer],
    size: int,  # how many rows
    common: Block,
    masks: Mapping[str, Tensor],  # {layer: (B, S) or (B,), which tokens count in moments and means}; else all do
    documents: Mapping[str, Documents],  # {layer: which tokens make a row}; else those of a sample
) -> list[Slots]:
    """Make fresh leaves for every layer, and what its hook needs besides."""
    job, keep = common.job, common.kept
    weights: dict[tuple[int, int], Tensor | None] = {}
    places: dict[tuple[torch.device, torch.dtype], Place] = {}
    tokens: dict[tuple[int, int, Place], tuple[Any, ...]] = {}
    prepared: list[Slots] = []
    for layer in layers:
        where = layer.device_and_dtype()
        if where not in places:
            places[where] = Place(common, *where)
        place = places[where]
        mask, mine = masks.get(layer.name), documents.get(layer.name)
        given = id(mask), id(mine)
        if given not in weights:
            weights[given] = count(mask, keep, mine)
        weight = weights[given]
        key = *given, place
        if key not in tokens:  # most layers share them
            tokens[key] = (
                place.zero.expand(size),
                None if mine is None else Documents(*(place.to(t) for t in mine)),
                None if weight is None else place.to(weight, place.dtype),
                None if keep is None or mine is not None else place.to(keep, place.dtype),
            )
        inputs, held = job.open(layer, place)
        slots = Slots(layer, place, job.leaves(layer, size, place.leaf), inputs, held, Tokens(*tokens[key]))
        # What register_post_accumulate_grad_hook does, whose handle takes longer than all else of a leaf.
        slots.leaves.main._post_accumulate_grad_hooks = {0: slots.count}
        layer.fired = False
        prepared.append(slots)
    return prepared


@contextmanager
def block(opened: Sequence[Slots], masks: Mapping[str, Tensor]) -> Iterator[list[Any]]:
    """Make the layers' hooks live; the list holds the job's result once the context ends without an error."""
    result: list[Any] = []
    common, places = opened[0].place.block, dict.fromkeys(s.place for s in opened)
    for s in opened:
        s.layer.slots = s
    BLOCKS.open()
    try:
        yield result
        _check(opened, masks)
        _require_one_call(opened)
        for place in places:
            place.form()
        result.append(common.job.collect(opened, common.scale))
    except BatchError as error:
        misfits = [s.layer.name for s in opened if s.misfit is not None]
        if len(misfits) > 1 and any(error is s.misfit for s in opened):
            such = ", ".join(patterns(misfits, [s.layer.name for s in opened]))
            raise BatchError(f"{error} There are {len(misfits)} such layers: {such}.") from None
        raise
    finally:
        BLOCKS.close()
        for s in opened:
            s.layer.slots = None
            s.close()
        for place in places:
            place.close()


def _check(opened: Sequence[Slots], masks: Mapping[str, Tensor]) -> None:
    """Check that each layer delivered once, and that each mask fitted one."""
    silent = [s for s in opened if not s.delivered]
    awake = [s for s in silent if not s.layer.spec.may_sleep]
    for s in awake:
        if s.misfit is not None:
            raise s.misfit
    if awake and len(silent) == len(opened):
        raise DeliveryError(nothing_delivered([s.layer for s in opened]))
    if awake:
        quiet = {s.layer.name for s in awake if s.quiet}
        why = partly_delivered([s.layer for s in awake], [s.layer.name for s in opened], quiet)
        raise DeliveryError(f"{why} Nothing of this batch was written.")
    if stale := [s.layer.name for s in opened if s.stale]:
        raise DeliveryError(
            f"backward went through layer {stale[0]!r} as it ran in an earlier block, whose rows are written already: "
            "detach what is carried on, or compute all in one block. Nothing of this batch was written."
        )
    common = opened[0].place.block
    if any(len(s.passes) > 1 for s in opened) or (common.restarted and len(common.passes) > 1):
        raise DeliveryError(
            "two backward passes ran in this block, so rows would add up two losses: open one block for each "
            "backward pass, or add the losses and call backward() once. Nothing of this batch was written."
        )
    for mask in {id(mask): mask for mask in masks.values() if mask.dim() > 1 and mask.shape[1] > 1}.values():
        served = [s for s in opened if masks.get(s.layer.name) is mask and s.delivered]
        # Compiled layers leave no word of what they saw.
        if served and all(s.layer.fired and not s.tokens.fitted for s in served):
            raise BatchError(
                f"mask of shape {tuple(mask.shape)} fits no layer that it is for: none has {mask.shape[1]} tokens "
                "a sample. Pass the mask with the shape (batch, tokens) that the watched layers see, or none."
            )


def _require_one_call(opened: Sequence[Slots]) -> None:
    """Raise where a gradient came in parts, and what is asked for is no sum of what would be made of the parts."""
    counted = [(s, s.leaves.calls.grad) for s in opened if s.leaves.calls is not None]
    counts = {s: count.to(opened[0].leaves.main.device) for s, count in counted if count is not None}
    numbers = dict(zip(counts, torch.cat(list(counts.values())).cpu().tolist() if counts else [], strict=True))
    for s, _ in counted:
        at_once = numbers.get(s, 0) + s.delivered_calls
        if at_once and at_once + s.waited > 1:
            adam = isinstance(s.place.block.job, Updates)
            remedy = "log gradient='normalized' or 'plain'" if adam else "use the model without torch.compile here"
            raise UnsupportedError(
                f"layer {s.layer.name!r} was called several times in this block{'' if adam else ', compiled'}, and "
                f"what is made of the gradient of all calls is no sum over them: {remedy}, or exclude it."
            )


def nothing_delivered(layers: Sequence[Layer]) -> str:
    """Say why a block without a single row may have none."""
    if not any(layer.fired for layer in layers):
        return (
            "no watched layer ran in this block, or its hooks never fired. Run forward and backward inside the block, "
            "of the very model that watch() was given (not one made again since), with gradients enabled (no "
            "torch.no_grad, torch.inference_mode, merged or disabled adapter); if it was compiled before watch(), or "
            "another of its kind before the first block, call torch._dynamo.reset()."
        )
    return (
        "no backward pass reached a watched layer in this block: call loss.backward() inside it, without inputs= (and "
        "not torch.autograd.grad), on a loss that depends on the model's output. Where a framework calls it, as "
        "Lightning does after training_step, docs/trainer.md says how."
    )


def partly_delivered(missing: Sequence[Layer], opened: Sequence[str], quiet: Collection[str] = ()) -> str:
    """Say why some of the layers may have no rows; ``quiet``: those that ran without gradients."""
    checkpoint = "a reentrant checkpoint whose input needs no gradient (use loghook.frozen, or use_reentrant=False)"
    causes: dict[str, list[str]] = {}
    for layer in missing:
        if layer.name in quiet:
            cause = f"ran without gradients: under torch.no_grad or torch.inference_mode, or in {checkpoint}"
        elif layer.fired:
            cause = f"ran, but no gradient came back: the loss does not depend on it, it was detached, or {checkpoint}"
        else:
            cause = (
                "never ran: a branch not taken, an adapter that is merged or disabled, a model compiled before watch()"
                ", or a fused kernel that reads the weight without calling the module, as fused losses do with lm_head"
            )
        causes.setdefault(cause, []).append(layer.name)
    said = "; ".join(f"{listed(names)} {cause}" for cause, names in causes.items())
    exclude = [HEAD, *patterns([layer.name for layer in missing], opened)]
    return (
        f"{len(missing)} of {len(opened)} watched layers delivered no rows: {said}. "
        f"Exclude such layers, {exclude=} (in place of the default, {HEAD!r}), or name those in watch(..., may_sleep=) "
        "that may rightly stay silent."
    )
