"""What a batch is made of: each of its samples alone, or each document of packed rows."""

from collections.abc import Callable, Mapping
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from loghook.capture.segments import arrange
from loghook.errors import BatchError


def batch_size(batch: Any) -> int:
    """Number of samples of a batch: the common length of its tensors."""
    sizes = {len(t) for t in _tensors(batch)}
    if len(sizes) != 1:
        raise BatchError(
            f"the batch's tensors have first axes of {sorted(sizes)}: pass tensors (or a dict, list or tuple of them) "
            "with the samples along the first axis."
        )
    return sizes.pop()


def samples(batch: Any) -> list[Any]:
    """Return each sample as a batch of one."""
    return [_each(batch, itemgetter(slice(i, i + 1))) for i in range(batch_size(batch))]


def documents(batch: Any, segments: Any) -> list[Any]:
    """Return each document of packed rows as a batch of one row without padding.

    Args:
        batch: tensors of shape (B, S, ...), and masks of shape (B, heads or 1, S, S).
        segments: (B, S) integers, as in ``run(..., segments=)``.

    Raises:
        BatchError: segments that do not number documents, a document in several rows, or a tensor of another shape.
    """
    numbers = torch.as_tensor(segments)
    found = arrange(numbers, int(numbers.max()) + 1)
    return [_each(batch, partial(_document, found.number_BS == i)) for i in range(len(found.index_DL))]


def _document(mine_BS: Tensor, t: Tensor) -> Tensor:
    """Cut a document's tokens out of a tensor."""
    B, S = mine_BS.shape
    row = mine_BS.any(1).nonzero().flatten()
    if len(row) > 1:
        raise BatchError(
            f"a document has tokens in rows {row.tolist()} of the batch, so it cannot be compared with itself in a row "
            "of its own: number documents that end with their row."
        )
    row, tokens = (place.to(t.device) for place in (row, mine_BS[row[0]].nonzero().flatten()))
    if t.shape[:2] == (B, S):
        return t[row][:, tokens]
    if t.dim() == 4 and t.shape[0] == B and t.shape[2:] == (S, S):
        return t[row][:, :, tokens][..., tokens]
    raise BatchError(
        f"the batch has a tensor of shape {tuple(t.shape)} where segments has (batch, tokens) = {(B, S)}, so a "
        "document cannot be cut out of it: leave it out of the batch, or let loss_fn make it from what can be cut (the "
        "bounds of documents from position_ids)."
    )


def _each(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The batch with a function of each of its tensors, but numbers, in place of the tensor."""
    if isinstance(batch, Tensor):
        return function(batch) if batch.dim() else batch
    if isinstance(batch, Mapping):
        values = {key: _each(value, function) for key, value in batch.items()}
        try:
            return type(batch)(values)  # type: ignore[call-arg]  # keep what reads batch.labels working
        except TypeError:
            return values
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_each(value, function) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_each(value, function) for value in batch)
    return batch


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch] if batch.dim() else []
    if isinstance(batch, Mapping):
        return [t for value in batch.values() for t in _tensors(value)]
    if isinstance(batch, list | tuple):
        return [t for value in batch for t in _tensors(value)]
    return []
