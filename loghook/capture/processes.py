"""Which of several processes this is."""

import os
import uuid
import warnings

import torch


def process_rank() -> int:
    """Rank of this process, also before torch.distributed is initialised."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes, also before torch.distributed is initialised."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def shared_run_id() -> str:
    """A fresh id, the same on all ranks."""
    box = [uuid.uuid4().hex]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(box)
    elif world_size() > 1:
        warnings.warn(
            "several processes without torch.distributed: initialise it before the first block.", stacklevel=2
        )
    return box[0]
