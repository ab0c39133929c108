"""``Shard``: the committed rows of one file, mapped read-only and verified on first touch."""

import json
import mmap
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from loghook.errors import CorruptLogError
from loghook.log.codec import Codec
from loghook.log.format import SHARD_HEADER, Manifest, shard_header

BLOCK_BYTES = 32 * 2**20  # what one step of a scan looks at
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
    data: Tensor | None = None  # the mapped rows, as they are stored (see ``Codec``), once touched
    map: mmap.mmap | None = None

    def touch(self) -> Tensor:
        """Return the rows as they are stored, mapped and verified."""
        if self.data is None:
            self.data = self.map_rows()
        return self.data

    def map_rows(self) -> Tensor:
        """Map the file after checking its size, its header and the checksum of every record."""
        end = self._place(self.rows)
        try:
            with open(self.file, "rb") as handle:
                size = handle.seek(0, 2)
                if size < end:
                    raise CorruptLogError(f"{self.file} has {size:,} bytes where {end:,} were committed: {REMEDY}.")
                self.map = mmap.mmap(handle.fileno(), end, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CorruptLogError(f"{self.file} cannot be read ({error}): {REMEDY}.") from error
        view = memoryview(self.map)
        if not self._header_is_ours(bytes(view[:SHARD_HEADER])):
            raise CorruptLogError(f"{self.file} has a header that is not this run's: {REMEDY}.")
        if self.manifest.sealed is not None and size != end:
            raise CorruptLogError(f"{self.file} has {size:,} bytes where {end:,} were sealed: {REMEDY}.")
        for start, rows, expected in self.parts:
            if self._checksum(view, start, start + rows) != expected:
                rows_named = f"rows {start} to {start + rows - 1}"
                raise CorruptLogError(f"{self.file}: {rows_named} do not match their checksum: {REMEDY}.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the map is read-only and stays so
            count = self.rows * self.codec.columns
            flat = torch.frombuffer(self.map, dtype=self.codec.stored, offset=SHARD_HEADER, count=count)
        return flat.view(self.rows, self.codec.columns)

    def release(self, start: int, stop: int) -> None:
        """Let go of scanned pages, so that a scan's resident memory stays flat; they remain in the page cache."""
        if self.map is not None and hasattr(mmap, "MADV_DONTNEED"):
            first = self._place(start) // mmap.PAGESIZE * mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, first, self._place(stop) - first)

    def _place(self, row: int) -> int:
        """Where a row begins in the file."""
        return SHARD_HEADER + row * self.codec.row_bytes

    def _checksum(self, view: memoryview, start: int, stop: int) -> str:
        """Checksum of some rows, a block at a time and with flat memory."""
        digest, step = xxhash.xxh3_128(), max(1, BLOCK_BYTES // self.codec.row_bytes)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            digest.update(view[self._place(first) : self._place(last)])
            self.release(first, last)
        return digest.hexdigest()

    def _header_is_ours(self, header: bytes) -> bool:
        """Whether a header is what the writer writes: for no rows while the shard grows, for all once it is closed."""
        try:
            stated = json.loads(header[8:])["rows"]["shape"][0]
        except (ValueError, KeyError, TypeError, IndexError):
            return False
        expected = shard_header(stated, self.codec, self.manifest.run_id)
        return header == expected and (stated == 0 or stated >= self.rows)
