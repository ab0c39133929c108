"""What the operating system has to do for a log: write all or say so, flush, replace atomically, lock."""

import fcntl
import json
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from loghook.errors import LoghookError, LogLockedError, WriteError


def write_atomically(file: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old one or the new one, also after a power cut."""
    temporary = file.with_name(file.name + ".tmp")
    write_flushed(temporary, data)
    os.replace(temporary, file)
    sync_folder(file.parent)


def write_flushed(file: Path, data: bytes) -> None:
    """Write a small file to the disk."""
    with open(file, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write at an offset; a full disk is an OSError here, where a sparse memory map would be killed by SIGBUS."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into a WriteError that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LoghookError):
            raise
        raise WriteError(
            f"writing to {path} failed ({error}). What was committed is intact: make room or mend the folder, then "
            "start again with resume=True."
        ) from error


_locks: "weakref.WeakSet[IO[str]]" = weakref.WeakSet()


def lock(file: Path) -> Any:
    """Take a rank's lock for as long as the returned handle is open; the system frees it if the process dies."""
    handle = open(file, "a+")  # noqa: SIM115
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        written, owner = handle.read(), "an unknown process"
        remedy = "wait until it ends, or write to another path"
        handle.close()
        with suppress(ValueError, KeyError, TypeError):  # it may be being written
            one = json.loads(written)
            owner = "process {process} on {host}".format(**one)
            if (one["process"], one["host"]) == (os.getpid(), socket.gethostname()):
                owner, remedy = "this process", "run.finalize() or run.close() ends the run that an earlier call began"
        raise LogLockedError(f"{file.parent} is written by {owner}: {remedy}.") from error
    handle.truncate(0)
    handle.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
    handle.flush()
    _locks.add(handle)
    return handle


def _forked() -> None:
    """Let a child, such as a loader's worker, hold no lock: a killed parent's would outlive it."""
    for handle in _locks:
        handle.close()  # which does not unlock: the parent still has it open


os.register_at_fork(after_in_child=_forked)
