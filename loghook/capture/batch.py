"""A batch and what comes with it (ids, mask, scale), checked before anything runs; and its samples, one by one."""

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from loghook.arguments import plain
from loghook.capture.segments import Documents, arrange
from loghook.errors import BatchError
from loghook.log.format import fits

T = TypeVar("T")
Ids = Sequence[int] | Sequence[str] | np.ndarray | Tensor
# Of all layers, or by fnmatch pattern of their names: the first that fits a layer is its own.
Mask = Tensor | Mapping[str, Tensor]
Segments = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Given:
    """What comes with the ids of a batch; see ``Blocks``."""

    mask: Mask | None = None
    scale: float | Tensor = 1.0
    scaler: Any = None
    segments: Segments | None = None


class Blocks:
    """What is opened around the forward and backward of each batch: ``with run(data_id=...):``."""

    def __call__(
        self,
        data_id: Ids,
        *,
        mask: Mask | None = None,
        scale: float | Tensor = 1.0,
        scaler: Any = None,
        segments: Segments | None = None,
    ) -> AbstractContextManager[None]:
        """Log, gather or score the samples of one batch: run its forward and backward inside.

        Args:
            data_id: one int or str for each sample of the batch: a list, an array or a 1-D tensor.
            mask: (B, S), which tokens count in the statistics and in activation means; never changes a row. Where
                layers see other tokens than others do (encoder and decoder), a dict {fnmatch pattern of names: mask};
                the first pattern that fits a layer is its own, and one that none fits counts all tokens.
            scale: what rows are multiplied by: n if the loss is a mean over n items, so that a row is the gradient
                of its own summed loss. Rows of ``gradient="adam"`` or ``"normalized"``, and samples that are scored,
                may have one each: (B,).
            scaler: the GradScaler that scaled the loss; its scale is divided out and, in a logging block, rows that
                are not finite are flagged and left out instead of raising.
            segments: (B, S) integers, for packed batches: each token's place in ``data_id``, -1 for none. A row is
                then a document (or whatever the numbers say) instead of a sample; ``loghook.segments`` makes it from
                ``position_ids`` or ``cu_seqlens``, or for single tokens. (B, 1) where a row is whole entries of the
                batch, as of pairs, whatever tokens a layer sees of them. Where only some layers see other entries than
                samples (images, or their patches), a dict {fnmatch pattern of names: segments}: what none fits sees
                samples, and a sample may have no entry there.

        Raises:
            BatchError: ids, mask or scale that do not fit the batch.
            DeliveryError: a watched layer delivered nothing, or two backward passes ran.
            NotFiniteError: rows with infinities; on a device they are found in the background, and a later block, the
                end of the pass or ``finalize`` raises it, once. Its ``ids`` can be logged again.
            StateError: after ``finalize``, or inside another block.
        """
        return self._block(data_id, Given(mask, scale, scaler, segments))

    def _block(self, data_id: Ids, given: Given) -> AbstractContextManager[None]:
        raise NotImplementedError


def check_ids(data_id: Ids) -> list[int] | list[str]:
    if isinstance(data_id, Tensor):
        if data_id.dim() != 1 or data_id.is_floating_point() or data_id.dtype == torch.bool:
            raise BatchError(f"data_id is {data_id.dtype} {tuple(data_id.shape)}: pass a 1-D integer tensor of ids.")
        values: list[Any] = data_id.tolist()
    elif isinstance(data_id, str | bytes) or not hasattr(data_id, "__iter__") or getattr(data_id, "ndim", 1) == 0:
        raise BatchError(f"data_id={data_id!r} is a single value: pass a list with one id a sample, as [{data_id!r}].")
    elif isinstance(data_id, Set | Mapping):
        raise BatchError(f"data_id is a {type(data_id).__name__}, which has no order: pass a list, one id a sample.")
    else:
        values = [plain(v) for v in data_id]
    if not values:
        raise BatchError("data_id is empty: pass one id for each sample of the batch.")
    kinds = {type(v) for v in values}
    if kinds != {int} and kinds != {str}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise BatchError(f"data_id holds {names}: ids are all int or all str; convert the others.")
    return values


def check_segments(
    segments: Segments | None, size: int, layers: Sequence[str], modules: Callable[[], Sequence[str]]
) -> dict[str, Documents]:
    """Return {layer: which of its tokens make which of ``size`` rows}, for layers that do not see a sample an entry."""
    some = isinstance(segments, Mapping)  # layers see other entries than samples, of which a sample may have none
    return _by_layer("segments", segments, layers, modules, lambda value: arrange(value, size, all_present=not some))


def check_masks(
    mask: Mask | None,
    size: int,
    layers: Sequence[str],
    modules: Callable[[], Sequence[str]],
    documents: Mapping[str, Documents],
) -> dict[str, Tensor]:
    """Return {layer: its mask, (B,) or (B, S)}, for layers that have one, whose first axis is that of what it sees."""

    def checked(value: Any) -> Tensor:
        value = torch.as_tensor(value)
        if value.device.type == "cpu" and not bool((value >= 0).all()):  # on a device that would wait for it
            raise BatchError("mask holds negative numbers or nan: it says how much each token counts, mostly 0 or 1.")
        return value

    masks = _by_layer("mask", mask, layers, modules, checked)
    entries = {name: documents[name].entries if name in documents else size for name in masks}
    wrong = [name for name, value in masks.items() if value.dim() not in (1, 2) or len(value) != entries[name]]
    if wrong and (isinstance(mask, Mapping) or len(wrong) == len(masks)):
        raise BatchError(
            f"mask has shape {tuple(masks[wrong[0]].shape)} in a block of {size} ids, and layer {wrong[0]!r} sees "
            f"{entries[wrong[0]]} entries: pass (batch, tokens)."
        )
    return {name: value for name, value in masks.items() if name not in wrong}


def _by_layer(
    argument: str, given: Any, layers: Sequence[str], modules: Callable[[], Sequence[str]], check: Callable[[Any], T]
) -> dict[str, T]:
    """{layer: what was given for it, checked}: one for all, or one for each pattern, of which the first that fits.

    A pattern may fit nothing but modules that are not watched, as after ``tune`` has chosen among layers.
    """
    if given is None:
        return {}
    values = given if isinstance(given, Mapping) else {"*": given}
    fitting = {name: [pattern for pattern in values if fits(name, pattern)] for name in layers}
    used = {patterns[0] for patterns in fitting.values() if patterns}
    if unused := sorted(values.keys() - used):
        first = {name: next((p for p in values if fits(name, p)), None) for name in modules()}
        for pattern in unused:
            if pattern in first.values():  # it is for modules that are not watched
                continue
            if any(fits(name, pattern) for name in (*first, *fitting)):
                raise BatchError(
                    f"{argument}={{{pattern!r}: ...}} serves no layer: the first that fits a name is used."
                )
            raise BatchError(f"{argument}={{{pattern!r}: ...}} fits no layer of the model: look at the pattern.")
    checked = {pattern: check(values[pattern]) for pattern in values if pattern in used}
    return {name: checked[patterns[0]] for name, patterns in fitting.items() if patterns}


def _check_scale(scale: Any, size: int | None = None) -> float | Tensor:
    """Return the scale as a number, or as a tensor: of a device, or one of ``size`` rows each, (size,).

    Without a size there cannot be one each. On a device nobody looks whether it is finite and not 0, since that would
    wait for the device; rows that are not finite show later.
    """
    if isinstance(scale, Tensor):
        if scale.dim() and size is None:
            raise BatchError(
                f"scale is a tensor of shape {tuple(scale.shape)}, where statistics are sums over all samples: pass a "
                "number or a 0-d tensor."
            )
        if scale.dim() and scale.shape != (size,):
            raise BatchError(f"scale has shape {tuple(scale.shape)} in a block of {size} ids: pass a number, or (B,).")
        if scale.device.type != "cpu":
            return scale.detach()
    try:
        value = scale.detach() if isinstance(scale, Tensor) and scale.dim() else float(scale)
    except (TypeError, ValueError) as error:
        raise BatchError(f"scale={scale!r} is no number: pass n where the loss is a mean over n items.") from error
    good = bool((value.isfinite() & (value != 0)).all()) if isinstance(value, Tensor) else np.isfinite(value) and value
    if not good:
        raise BatchError(f"scale={scale!r} must be finite and not 0: pass n where the loss is a mean over n items.")
    return value


def unscaled(scale: float | Tensor, scaler: Any, size: int | None) -> float | Tensor:
    """What rows are multiplied by: ``scale`` as ``_check_scale`` returns it, with a GradScaler's own divided out."""
    factor = _check_scale(scale, size)
    return factor if scaler is None else factor / _check_scale(scaler.get_scale())


def batch_size(batch: Any) -> int:
    """Number of samples of a batch: the common length of its tensors."""
    sizes = set()

    def note(t: Tensor) -> Tensor:
        sizes.add(len(t))
        return t

    _each(batch, note)
    if len(sizes) != 1:
        raise BatchError(
            f"the batch's tensors have first axes of {sorted(sizes)}: put the samples along the first axis of each, or "
            "pass each sample as a batch of its own, check(..., alone=[...])."
        )
    return sizes.pop()


def samples(batch: Any) -> list[Any]:
    """Each sample as a batch of one; arrays and lists of numbers or words are cut if they are as long as the batch."""
    size = batch_size(batch)

    def cut(values: Any, i: int) -> Any:
        return values[i : i + 1] if len(values) == size else values

    return [_each(batch, partial(cut, i=i), plain=True) for i in range(size)]


def documents(batch: Any, segments: Any) -> list[tuple[Any, Tensor | None]]:
    """Each document of packed rows, (B, S, ...) and masks (B, heads or 1, S, S), as a batch of one row, unpadded.

    Of whole entries of the batch (pairs) as a batch of those; where the loss itself joins them, the batch has one entry
    for each document.
    """
    numbers = torch.as_tensor(segments)
    arranged = arrange(numbers, int(numbers.max()) + 1)
    masks_BS = [arranged.number_BS == i for i in range(len(arranged.index_DL))]
    if numbers.shape[1] > 1:
        return [(_each(batch, partial(_document, mask)), None) for mask in masks_BS]
    entries, size = [mask[:, 0].nonzero().flatten() for mask in masks_BS], batch_size(batch)
    if size == len(numbers):
        alone = [_each(batch, partial(_entries, places)) for places in entries]
    elif size == len(entries):
        alone = samples(batch)
    else:
        raise BatchError(
            f"the batch has {size} entries, and segments {len(numbers)} of {len(entries)} documents: pass segments for "
            "the batch's own entries, or a batch with one entry a document."
        )
    return [(own, torch.zeros(len(places), 1, dtype=torch.long)) for own, places in zip(alone, entries, strict=True)]


def _entries(places: Tensor, t: Tensor) -> Tensor:
    return t[places.to(t.device)]


def _document(mine_BS: Tensor, t: Tensor) -> Tensor:
    B, S = mine_BS.shape
    row = mine_BS.any(1).nonzero().flatten()
    if len(row) > 1:
        raise BatchError(
            f"a document has tokens in rows {row.tolist()} of the batch: number documents that end with their row."
        )
    row, tokens = (place.to(t.device) for place in (row, mine_BS[row[0]].nonzero().flatten()))
    if t.shape[:2] == (B, S):
        return t[row][:, tokens]
    if t.dim() == 4 and t.shape[0] == B and t.shape[2:] == (S, S):
        return t[row][:, :, tokens][..., tokens]
    raise BatchError(
        f"the batch has a tensor of shape {tuple(t.shape)} where segments has (batch, tokens) = {(B, S)}, so a "
        "document cannot be cut out of it: let loss_fn make it from what can be cut (bounds from position_ids)."
    )


def _each(batch: Any, function: Callable[[Any], Any], plain: bool = False) -> Any:
    """The batch with a function of each of its tensors, but numbers, in place of the tensor.

    With ``plain`` arrays and lists of numbers or words count as tensors.
    """
    if isinstance(batch, Tensor) or (plain and isinstance(batch, np.ndarray)):
        return function(batch) if batch.ndim else batch
    if plain and isinstance(batch, list) and all(isinstance(value, int | float | str) for value in batch):
        return function(batch)
    if isinstance(batch, Mapping):
        values = {key: _each(value, function, plain) for key, value in batch.items()}
        try:
            return type(batch)(values)  # type: ignore[call-arg]  # keep what reads batch.labels working
        except TypeError:
            return values
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_each(value, function, plain) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_each(value, function, plain) for value in batch)
    return batch
