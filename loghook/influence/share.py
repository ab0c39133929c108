"""Scoring on many processes: each reads its share of the shards, and sums bring the parts together."""

import torch
from torch import Tensor


def share() -> tuple[int, int]:
    """Rank and number of the processes that score together; (0, 1) without torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def combine(part: Tensor) -> Tensor:
    """Add up, in place, what the processes found in their shares (zero where they read nothing); needs gloo."""
    if share()[1] > 1:
        torch.distributed.all_reduce(part)
    return part


def gather(part: Tensor, dim: int) -> Tensor:
    """Join the processes' parts along an axis on which they may differ in length, in the order of ranks."""
    if share()[1] == 1:
        return part
    parts: list[Tensor | None] = [None] * share()[1]
    torch.distributed.all_gather_object(parts, part)
    return torch.cat([p for p in parts if p is not None], dim)
