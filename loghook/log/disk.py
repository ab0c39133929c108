"""What a log needs of the operating system, write all or say so, flush, replace, lock; and how files are checked."""

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

import xxhash

from loghook.errors import ConfigError, LoghookError, LogLockedError, WriteError
from loghook.processes import process_rank

READ_BYTES = 2**20  # what is read and checked at a time: it stays in the processor's cache


def absolute(path: str | Path) -> Path:
    """A path that a user gave, with its ``~``; absolute, since a program may change its folder."""
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ConfigError(f"path={path!r} names no folder: pass a str or a Path.")
    return Path(path).expanduser().absolute()


def checksum(data: bytes | memoryview) -> str:
    """128-bit XXH3, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def checksum_next(file: FileIO, size: int) -> str:
    """Checksum of the next bytes of a file, with flat memory; both calls in the loop let other threads run."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(size, READ_BYTES)))
    while size and (n := file.readinto(buffer[:size])):
        digest.update(buffer[:n])
        size -= n
    return digest.hexdigest()


def checksum_of(file: Path) -> str:
    """Checksum of a whole file."""
    with open(file, "rb", buffering=0) as handle:
        return checksum_next(handle, file.stat().st_size)


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, so that equal values have equal checksums."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object from a file that anybody may have written; ValueError for anything else."""
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("it repeats a key")
    return dict(pairs)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield where to write a file so that a reader sees the old one or the new one, also after a power cut."""
    rank = process_rank()  # all processes may save the same scores to one place
    temporary = file.with_name(f"{file.name}.{rank}.tmp" if rank else f"{file.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's umask has it; safetensors lets nobody else read its files
        yield temporary
        if temporary.stat().st_mode != mode:
            with suppress(OSError):  # some network file systems know no modes
                temporary.chmod(mode)
        with open(temporary, "rb") as handle:
            sync(handle.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)  # it would keep a full disk full
        raise
    sync_folder(file.parent)


def write_atomically(file: Path, data: bytes) -> None:
    with replacing(file) as temporary:
        temporary.write_bytes(data)


def write_flushed(file: Path, data: bytes) -> None:
    with open(file, "wb") as handle:
        handle.write(data)
        handle.flush()
        sync(handle.fileno())


def sync(descriptor: int) -> None:
    """Return once what was written is on the disk. On macOS fsync leaves it in the disk's own cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # network file systems do not know it
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write at an offset; a full disk is an OSError here, where a sparse memory map would be killed by SIGBUS."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


LOGGED = (
    "What was committed is intact, what came after it is lost. Make room or mend the folder, then start again with "
    "resume=True."
)


@contextmanager
def writing(path: Path, remedy: str = LOGGED) -> Iterator[None]:
    """Turn errors of the operating system into a WriteError that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LoghookError):
            raise
        raise WriteError(f"writing to {path} failed ({error}). {remedy}") from error


_locks: "weakref.WeakSet[IO[str]]" = weakref.WeakSet()


def lock_name(rank: int) -> str:
    return f"lock-{rank:05d}"


def lock(file: Path, wait: float = 0.5) -> Any:
    """Take a rank's lock for as long as the returned handle is open; the system frees it if the process dies.

    It waits for so many seconds: other ranks let go of a run a moment after rank 0 has sealed it.
    """
    handle, until = open(file, "a+", errors="replace"), time.monotonic() + wait  # noqa: SIM115
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                handle.close()
                raise WriteError(
                    f"{file} cannot be locked ({error}): write to a file system that has locks."
                ) from error
            if time.monotonic() >= until:
                raise _locked(handle) from error
            time.sleep(0.02)
    handle.truncate(0)
    handle.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
    handle.flush()
    _locks.add(handle)
    return handle


def _locked(handle: IO[str]) -> LogLockedError:
    """Say who holds a lock; lets go of the file."""
    with handle:
        handle.seek(0)
        content = handle.read()
    owner, remedy = "an unknown process", "wait until it ends, or write to another path"
    with suppress(ValueError, KeyError, TypeError):  # it may be being written
        holder = json.loads(content)
        owner = "process {process} on {host}".format(**holder)
        if (holder["process"], holder["host"]) == (os.getpid(), socket.gethostname()):
            owner, remedy = "this process", "run.finalize() or run.close() ends the run that an earlier call began"
    return LogLockedError(f"{Path(handle.name).parent} is written by {owner}: {remedy}.")


def _forked() -> None:
    """Let a child, such as a loader's worker, hold no lock: a killed parent's would outlive it."""
    for handle in _locks:
        handle.close()  # which does not unlock: the parent still has it open


os.register_at_fork(after_in_child=_forked)
