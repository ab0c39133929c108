"""Makes ``segments`` of what packed batches carry: of each token of the batch the place of its document in ``data_id``.

``run(data_id=..., segments=...)`` takes them, where a row is not a sample but a document, an image or a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["from_counts", "from_cu_seqlens", "from_position_ids", "per_token"]


def from_position_ids(position_ids: Tensor) -> Tensor:
    """Number the documents of packed rows by their positions: a new one starts wherever a position does not grow.

    Args:
        position_ids: (B, S) int, restarting with each document; every row of the batch starts a new one.

    Returns:
        (B, S) int64: 0, 1, ... through the batch, row after row.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    return (starts.flatten().cumsum(0) - 1).view(position_ids.shape)


def from_cu_seqlens(cu_seqlens: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
    """Number the documents of a batch by their ends, as variable-length attention kernels take them.

    Args:
        cu_seqlens: (D + 1,) int, 0 and then the end of each document among all tokens of the batch.
        shape: (B, S) of the batch; by default one row.

    Returns:
        (B, S) int64; tokens after the last end belong to no document and are -1.
    """
    total = int(cu_seqlens[-1])
    shape = shape or (1, total)
    places = torch.arange(shape[0] * shape[1], device=cu_seqlens.device)
    numbers = torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)
    return numbers.masked_fill(places >= total, -1).view(shape)


def from_counts(counts: Tensor | Sequence[int]) -> Tensor:
    """Number the entries of a batch, such as images or their patches, of which each sample brought some, in order.

    Args:
        counts: (B,) int, how many entries each sample has; 0 for none.

    Returns:
        (entries, 1) int64: each entry's sample.
    """
    counts = torch.as_tensor(counts)
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)[:, None]


def per_token(batch: int, tokens: int) -> Tensor:
    """Every token its own row: (batch, tokens) int64 that counts through, row after row.

    A row is what the weights did at its token, for the loss of all tokens; not the gradient of the token's own loss.
    """
    return torch.arange(batch * tokens).view(batch, tokens)
