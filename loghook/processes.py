"""Which of several processes this is, on what it runs, and what all of them found together."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import reprlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from loghook.errors import StateError, warn

P = ParamSpec("P")
R = TypeVar("R")


class _Said(NamedTuple):
    """What a process tells the others in loghook's own calls, told from what a program gathers besides."""

    value: Any


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_and_size() -> tuple[int, int]:
    """Rank and number of the processes that work together; (0, 1) without torch.distributed."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if _joined() else (0, 1)


def process_rank() -> int:
    """Rank of this process, also before torch.distributed is initialised."""
    return rank_and_size()[0] if _joined() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes, also before torch.distributed is initialised."""
    return rank_and_size()[1] if _joined() else int(os.environ.get("WORLD_SIZE", 1))


def broadcast(value: Any) -> Any:
    """Return rank 0's value on all ranks, once all have come: every rank calls it at the same point.

    torch's own broadcast lets rank 0 go on alone, and what it then writes a late rank would take for something older.
    """
    return all_gather(value, together=True)[0]


def all_gather(value: Any, *, together: bool = False) -> list[Any]:
    """The values of all processes, in the order of ranks; every rank calls it at the same point.

    ``together``: one that works alone is warned if it was started as one of several.
    """
    values = [value] * rank_and_size()[1]
    if together and world_size() > len(values):
        warn("several processes without torch.distributed: initialise it before the first block.")
    if len(values) == 1:
        return values
    torch.distributed.all_gather_object(values, _Said(value))
    for rank, said in enumerate(values):
        if not isinstance(said, _Said):
            raise StateError(
                f"rank {rank} gathered {reprlib.repr(said)} where others gather what loghook has to know of all ranks: "
                "every rank of torch.distributed calls init, watch and finalize, also those that log nothing, and "
                "gathers nothing that the others do not gather (docs/running.md, Several processes)."
            )
    return [said.value for said in values]


def all_reduce(values: Tensor) -> Tensor:
    """Add up, in place, the values of all processes (zero where one has nothing)."""
    if rank_and_size()[1] > 1:
        # nccl and its like alone, as accelerate starts them, know nothing of a processor's tensors.
        serves_cpu = "cpu:" in torch.distributed.get_backend_config()
        moved = values if serves_cpu else values.to(torch.accelerator.current_accelerator())
        torch.distributed.all_reduce(moved)
        values.copy_(moved)
    return values


def on_first(call: Callable[[], object]) -> None:
    """Let rank 0 do something for all: every rank makes the call, and returns, or raises, when it is done."""
    error = None
    if rank_and_size()[0] == 0:
        try:
            call()
        except Exception as raised:
            error = raised
    if (error := broadcast(error)) is not None:
        raise error


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """Let what a function makes lie on the CPU, where logs are, in float32, whatever the user's defaults are.

    Nor does autocast, which would round scores, and what is kept of them with the log.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        default = torch.get_default_dtype()
        as_it_is = torch.get_default_device().type == "cpu" and default == torch.float32
        if as_it_is and not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"), torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(default)

    return call


def time_of_now() -> str:
    """In UTC, as "2026-01-31T12:00:00Z"."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def provenance() -> dict[str, Any]:
    """When and with what a run was made, for people."""
    versions = {}
    for package in ("loghook", "torch", "transformers", "accelerate", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "created": time_of_now(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": versions,
    }
