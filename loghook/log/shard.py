"""Files of rows: ``ShardFile`` writes one; ``Shard`` is its committed rows, mapped and verified on first touch."""

import errno
import json
import mmap
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from loghook.errors import CorruptLogError, StateError
from loghook.log.codec import Codec
from loghook.log.disk import checksum_next, sync, write_all
from loghook.log.format import Manifest

SHARD_HEADER = 512  # bytes before the first row, length prefix included: constant, so that a shard can grow
BLOCK_BYTES = 32 * 2**20  # what one step of a scan looks at
MAP_BYTES = 8 * BLOCK_BYTES  # what the thread that reads ahead hands over at a time
LOG_AGAIN = "restore it from a copy, or let `loghook repair` drop what is damaged and name the ids to log again"
CHANGED = "{} was changed since it was opened (append, delete, repair): load it again."
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8",
}  # fmt: skip


def shard_header(rows: int, codec: Codec, run_id: str) -> bytes:
    """Return the safetensors header of a shard with so many rows, padded to SHARD_HEADER bytes."""
    entry = {
        "dtype": _DTYPES[codec.stored],
        "shape": [rows, codec.columns],
        "data_offsets": [0, rows * codec.row_bytes],
    }
    text = json.dumps({"__metadata__": {"run_id": run_id}, "rows": entry}).encode()
    return (SHARD_HEADER - 8).to_bytes(8, "little") + text.ljust(SHARD_HEADER - 8)


class ShardFile:
    """A shard that grows: its header states no rows until ``close``."""

    def __init__(self, file: Path, codec: Codec, run_id: str, rows: int | None = None) -> None:
        """Begin a new file, or open one whose first ``rows`` are committed."""
        self.rows, self._codec, self._run_id = rows or 0, codec, run_id
        self._file = open(file, "w+b" if rows is None else "r+b", buffering=0)  # noqa: SIM115
        if rows is None:
            self._write(shard_header(0, codec, run_id), 0)

    def append(self, data: bytes | memoryview, rows: int) -> int:
        """Write rows behind the others; returns the place of the first."""
        self._write(data, SHARD_HEADER + self.rows * self._codec.row_bytes)
        self.rows += rows
        return self.rows - rows

    def sync(self) -> None:
        sync(self._file.fileno())

    def close(self) -> None:
        """Let the file end after its rows and its header state them, on the disk."""
        with self._file as file:
            self._write(shard_header(self.rows, self._codec, self._run_id), 0)
            file.truncate(SHARD_HEADER + self.rows * self._codec.row_bytes)
            self.sync()

    def let_go(self) -> None:
        """Close the descriptor alone: the next writer finds the file as a kill would have left it."""
        self._file.close()

    def _write(self, data: bytes | memoryview, place: int) -> None:
        write_all(self._file.fileno(), memoryview(data), place)


def close_shard(file: Path, rows: int, codec: Codec, run_id: str) -> bool:
    """Close a shard that may be closed already; returns whether it was not."""
    if file.stat().st_size == SHARD_HEADER + rows * codec.row_bytes:
        with open(file, "rb") as handle:
            if handle.read(SHARD_HEADER) == shard_header(rows, codec, run_id):
                return False
    ShardFile(file, codec, run_id, rows).close()
    return True


@dataclass(eq=False)
class Shard:
    """Committed rows of one file: ``rows`` of them, the first at row ``first`` of the log."""

    file: Path  # the safetensors file
    manifest: Manifest  # of its run
    codec: Codec  # how rows are stored
    first: int  # index in the log (before repeats are left out) of its first row
    rows: int = 0  # committed rows
    # (first row in the shard, rows, checksum) of every record
    records: list[tuple[int, int, str]] = field(default_factory=list)
    verified: bool = False  # whether every record was verified
    _whole: "weakref.ref[mmap.mmap] | None" = None  # the map of all rows, for as long as somebody looks at some

    def touch(self) -> Tensor:
        """All rows as they are stored (see ``Codec``), verified: views of one map, which holds one descriptor."""
        for _ in self.pieces():
            pass
        view = None if self._whole is None else self._whole()
        if view is None:
            view = self._map()
            self._whole = weakref.ref(view)
        return self._rows(view)

    def mapped(self, start: int, stop: int) -> tuple[Tensor, Callable[[int], None]]:
        """Some rows, of which only those that ``pieces`` yielded are verified; and what lets go of the first so many.

        The pages of what a scan lets go of remain in the page cache alone, so that its resident memory stays flat. The
        map goes with its last view: a log may have more shards than a process may open files.
        """
        view, row_bytes = self._map(), self.codec.row_bytes
        begin = (SHARD_HEADER + start * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE

        def release(rows: int) -> None:
            end = (SHARD_HEADER + (start + rows) * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > begin and hasattr(mmap, "MADV_DONTNEED"):
                view.madvise(mmap.MADV_DONTNEED, begin, end - begin)

        return self._rows(view)[start:stop], release

    def _map(self) -> mmap.mmap:
        with self._opened() as file:
            size = SHARD_HEADER + self.rows * self.codec.row_bytes
            view = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_SEQUENTIAL"):  # pages that have left the page cache since are read ahead
            view.madvise(mmap.MADV_SEQUENTIAL)
        return view

    def _rows(self, view: mmap.mmap) -> Tensor:
        with warnings.catch_warnings():  # which is not for threads, so that a scan calls this in its own
            warnings.simplefilter("ignore", UserWarning)  # the map is read-only and stays so
            flat = torch.frombuffer(view, dtype=self.codec.stored, offset=SHARD_HEADER)
        return flat.view(self.rows, self.codec.columns)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows, each once it is verified."""
        if self.verified:
            yield 0, self.rows
        else:
            yield from self.verify()

    def verify(self) -> Iterator[tuple[int, int]]:
        """Read the file against its size, header and checksums; yields good ranges, of records that make a block."""
        self.verified, first = False, 0
        with self._opened() as file:
            for start, rows, expected in self.records:
                if checksum_next(file, rows * self.codec.row_bytes) != expected:
                    rows_named = f"rows {start} to {start + rows - 1}"
                    raise CorruptLogError(f"{self.file}: {rows_named} do not match their checksum: {LOG_AGAIN}.")
                stop = start + rows
                if stop == self.rows or (stop - first) * self.codec.row_bytes >= BLOCK_BYTES:
                    yield first, stop
                    first = stop
        self.verified = True

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        """Open the file, whose size and header have to be right, at its first row."""
        end = SHARD_HEADER + self.rows * self.codec.row_bytes
        try:
            with open(self.file, "rb", buffering=0) as file:
                size = file.seek(0, 2)
                if size < end:
                    raise CorruptLogError(f"{self.file} has {size:,} bytes where {end:,} were committed: {LOG_AGAIN}.")
                file.seek(0)
                if not self._header_is_ours(file.read(SHARD_HEADER)):
                    raise CorruptLogError(f"{self.file} has a header that is not this run's: {LOG_AGAIN}.")
                if self.manifest.sealed is not None and size != end:
                    raise CorruptLogError(f"{self.file} has {size:,} bytes where {end:,} were sealed: {LOG_AGAIN}.")
                yield file
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # too many open files are no fault of this one
            if isinstance(error, FileNotFoundError) and self.manifest.superseded(self.file.parent):
                raise StateError(CHANGED.format(self.file.parent)) from error
            raise CorruptLogError(f"{self.file} cannot be read ({error}): {LOG_AGAIN}.") from error

    def _header_is_ours(self, header: bytes) -> bool:
        """Whether a header is what the writer writes: for no rows while the shard grows, for all once it is closed."""
        try:
            stated = json.loads(header[8:])["rows"]["shape"][0]
        except (ValueError, KeyError, TypeError, IndexError):
            return False
        expected = shard_header(stated, self.codec, self.manifest.run_id)
        return header == expected and (stated == 0 or stated >= self.rows)
