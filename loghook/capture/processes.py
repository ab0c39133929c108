"""Which of several processes this is, and on what it runs."""

import importlib.metadata
import os
import platform
import time
import uuid
import warnings
from typing import Any

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
    return shared(uuid.uuid4().hex)


def shared(value: Any) -> Any:
    """Return rank 0's value on all ranks; every rank calls it at the same point."""
    box = [value]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(box)
    elif world_size() > 1:
        warnings.warn(
            "several processes without torch.distributed: initialise it before the first block.", stacklevel=2
        )
    return box[0]


def provenance() -> dict[str, Any]:
    """When and with what a run was made, for people."""
    versions = {}
    for package in ("loghook", "torch", "transformers", "accelerate", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": versions,
    }
