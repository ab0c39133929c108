"""``Shard``: the committed rows of one file, mapped read-only and verified on first touch."""

import errno
import json
import mmap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from loghook.errors import CorruptLogError
from loghook.log.codec import Codec
from loghook.log.format import SHARD_HEADER, Manifest, shard_header

BLOCK_BYTES = 32 * 2**20  # what one step of a scan looks at
READ_BYTES = 2**20  # what is read and checked at a time: it stays in the processor's cache
REMEDY = "restore it from a copy, or log its samples again"


@dataclass(eq=False)
class Shard:
    """Committed rows of one file: ``rows`` of them, the first at row ``first`` of the log."""

    file: Path  # the safetensors file
    manifest: Manifest  # of its run
    codec: Codec  # how rows are stored
    first: int  # index in the log (before repeats are left out) of its first row
    rows: int = 0  # committed rows
    # (first row in the shard, rows, checksum) of every record
    parts: list[tuple[int, int, str]] = field(default_factory=list)
    good: bool = False  # whether every record was verified
    map: mmap.mmap | None = None  # of the file, while rows are looked at

    def touch(self) -> Tensor:
        """Return the rows as they are stored (see ``Codec``), mapped and verified."""
        for _ in self.pieces():
            pass
        return self.mapped()

    def mapped(self) -> Tensor:
        """Return the rows as they are stored, a view of the map; only those that ``pieces`` yielded are verified."""
        if self.map is None:
            with self._opened() as file:
                self.map = mmap.mmap(file.fileno(), self._place(self.rows), access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_SEQUENTIAL"):  # pages that have left the page cache since are read ahead
                self.map.madvise(mmap.MADV_SEQUENTIAL)
        count = self.rows * self.codec.columns
        with warnings.catch_warnings():  # which is not for threads, so that a scan calls this in its own
            warnings.simplefilter("ignore", UserWarning)  # the map is read-only and stays so
            flat = torch.frombuffer(self.map, dtype=self.codec.stored, offset=SHARD_HEADER, count=count)
        return flat.view(self.rows, self.codec.columns)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of verified rows, one after the other: each once it is verified."""
        if self.good:
            yield 0, self.rows
        else:
            yield from self.verify()

    def verify(self) -> Iterator[tuple[int, int]]:
        """Read the file against its size, its header and the checksum of every record.

        Yields:
            Ranges of rows that are good: whole records, as many as make a block.
        """
        self.good, first = False, 0
        with self._opened() as file:
            for start, rows, expected in self.parts:
                if _checksum(file, rows * self.codec.row_bytes) != expected:
                    rows_named = f"rows {start} to {start + rows - 1}"
                    raise CorruptLogError(f"{self.file}: {rows_named} do not match their checksum: {REMEDY}.")
                stop = start + rows
                if stop == self.rows or (stop - first) * self.codec.row_bytes >= BLOCK_BYTES:
                    yield first, stop
                    first = stop
        self.good = True

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        """Open the file, whose size and header have to be right, at its first row."""
        end = self._place(self.rows)
        try:
            with open(self.file, "rb", buffering=0) as file:
                size = file.seek(0, 2)
                if size < end:
                    raise CorruptLogError(f"{self.file} has {size:,} bytes where {end:,} were committed: {REMEDY}.")
                file.seek(0)
                if not self._header_is_ours(file.read(SHARD_HEADER)):
                    raise CorruptLogError(f"{self.file} has a header that is not this run's: {REMEDY}.")
                if self.manifest.sealed is not None and size != end:
                    raise CorruptLogError(f"{self.file} has {size:,} bytes where {end:,} were sealed: {REMEDY}.")
                yield file
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # too many open files are no fault of this one
            raise CorruptLogError(f"{self.file} cannot be read ({error}): {REMEDY}.") from error

    def release(self, start: int, stop: int) -> None:
        """Let go of scanned pages, so that a scan's resident memory stays flat; they remain in the page cache."""
        if self.map is not None and hasattr(mmap, "MADV_DONTNEED"):
            first = self._place(start) // mmap.PAGESIZE * mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, first, self._place(stop) - first)

    def _place(self, row: int) -> int:
        """Where a row begins in the file."""
        return SHARD_HEADER + row * self.codec.row_bytes

    def _header_is_ours(self, header: bytes) -> bool:
        """Whether a header is what the writer writes: for no rows while the shard grows, for all once it is closed."""
        try:
            stated = json.loads(header[8:])["rows"]["shape"][0]
        except (ValueError, KeyError, TypeError, IndexError):
            return False
        expected = shard_header(stated, self.codec, self.manifest.run_id)
        return header == expected and (stated == 0 or stated >= self.rows)


def _checksum(file: FileIO, size: int) -> str:
    """Checksum of the next bytes of a file, with flat memory; both calls in the loop let other threads run."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(size, READ_BYTES)))
    while size and (n := file.readinto(buffer[:size])):
        digest.update(buffer[:n])
        size -= n
    return digest.hexdigest()
