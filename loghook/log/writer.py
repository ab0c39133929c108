"""The writer: rows and statistics from a queue to shards, committed so that a kill loses only what was not committed.

Order of a commit: rows written and flushed, statistics snapshot written and flushed, then one appended record that
names both, flushed. A reader trusts records only. One background thread does all of it, off the training loop; a full
queue blocks the loop, it never drops.
"""

import contextlib
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from loghook.errors import NotFiniteError, WriteError
from loghook.log import rescue
from loghook.log.disk import lock, sync_folder, write_all
from loghook.log.finite import finite_rows, not_finite
from loghook.log.folder import recover
from loghook.log.format import SHARD_HEADER, Layout, Manifest, shard_header, shard_name, statistics_name
from loghook.log.moments import load_moments, save_moments
from loghook.log.records import encode_record

QUEUE = 8  # blocks under way between the loop and the disk
GRACE = 30.0  # seconds that a process which was told to end waits for the commit
CLOSE = {"close": True}
# OpenMP keeps a team of threads for each that asks, and once teams have more threads than there are cores, none waits
# for work awake any more: every operation of a training loop would first have to wake its own. Writers ask for none.
_TEAMS = "backend: OpenMP" in torch.__config__.parallel_info()
_starting = threading.Lock()  # while a writer's thread starts, the number that is set for new threads is its own


@dataclass(frozen=True)
class Batch:
    """What one block hands to the writer."""

    rows: Tensor  # (B, width) on the CPU, in the dtype that the codec takes; with ``ready``, still being copied there
    ids: list[int] | list[str]  # one for each row
    moments: Tensor | None  # statistics of the block, or None
    pass_index: int  # which pass it belongs to
    step: int  # which block of the run it is
    flagged: Sequence[int | str] = ()  # ids of samples left out because their rows were not finite
    dropped: int = 0  # how many repeats were left out
    asleep: Sequence[str] = ()  # layers that may sleep and delivered nothing; their rows are zero
    ready: Any = None  # CUDA event after which ``rows`` and ``moments`` may be read, or None
    checked: bool = True  # whether the rows are known to be finite; otherwise the writer looks


class Writer:
    """Appends to one rank's shards and commit log."""

    def __init__(self, path: Path, manifest: Manifest, rank: int, *, shard_bytes: int, commit_seconds: float) -> None:
        """Open the rank's files, cut off a torn tail, and start the thread."""
        self._path, self._run_id, self._rank, self._codec = path, manifest.run_id, rank, manifest.codec
        self.dtype = self._codec.dtype  # of the rows that it takes
        self._capacity = max(1, shard_bytes // self._codec.row_bytes)
        self._commit_seconds, self._measures = commit_seconds, manifest.no_statistics is None
        self._lock = lock(path / f"lock-{rank:05d}")
        self.moments = np.zeros(Layout(manifest.layers).moments_width)
        try:
            log = recover(path, manifest, rank)
            if log.rows:
                self.moments = load_moments(path, log.rows[-1]["statistics"], len(self.moments))
            self._commits = open(log.file, "ab", buffering=0)  # noqa: SIM115
            sync_folder(path)
        except BaseException:
            self._lock.close()
            raise
        self.records = log.records
        self._shard: int | None = None  # descriptor of the open shard
        self._shard_index = max(log.shard_ends, default=-1)
        self._shard_rows = 0
        self._start_record()
        self._committed_at = time.monotonic()
        # Two queues whose put and get are single operations: a signal handler in the loop's thread can always ask for
        # a commit (see rescue.py). A block takes a ticket from `_room`, which the thread gives back.
        self._inbox: queue.SimpleQueue[Batch | dict[str, Any]] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(QUEUE):
            self._room.put(None)
        self._rejected: queue.SimpleQueue[NotFiniteError] = queue.SimpleQueue()
        self.on_reject: Callable[[Sequence[int | str]], None] = lambda ids: None  # is told whose rows can come again
        self._broken: Exception | None = None  # an operating system error: nothing is written after it
        self._thread = threading.Thread(target=self._work, name="loghook-writer", daemon=True)
        self._alone = threading.Event()
        with _starting:
            threads = torch.get_num_threads()
            try:
                self._thread.start()
                self._alone.wait()
            finally:
                if _TEAMS:
                    torch.set_num_threads(threads)  # for the threads that come after that one
        rescue.guard(self)

    def put(self, item: Batch | dict[str, Any]) -> None:
        """Queue a block's rows, or a record of the run's own (the end of a pass); raise what went wrong before."""
        self.check()
        self._room.get()
        self._inbox.put(item)

    def commit_now(self, seconds: float = GRACE) -> None:
        """Commit what was put, and wait for it at most so long; may be called from a signal handler."""
        done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._inbox.put({"commit": done})
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                return done.get(timeout=0.1)

    def settle(self) -> None:
        """Wait until all that was put is committed, and raise what went wrong with it."""
        self.commit_now(math.inf)
        self.check()

    def check(self) -> None:
        """Raise what the thread met, if anything: batches that it rejected once, a broken disk always."""
        if self._broken is not None:
            raise self._broken
        met = []
        with contextlib.suppress(queue.Empty):
            while True:
                met.append(self._rejected.get_nowait())
        if met:
            ids = [i for error in met for i in error.ids]
            self.on_reject(ids)
            raise NotFiniteError("\n".join(map(str, met)), ids)

    def close(self, *, keep_lock: bool = False) -> None:
        """Commit, close the shard and, unless ``keep_lock``, let others write."""
        try:
            if self._thread.is_alive():
                self._inbox.put(CLOSE)
                self._thread.join()
            rescue.release(self)
            self.check()
        finally:
            if not self._thread.is_alive():  # otherwise Ctrl-C came while it works; close() is called again at exit
                self._commits.close()
                if not keep_lock:
                    self.unlock()

    def unlock(self) -> None:
        """Let others write; called after ``close``."""
        self._lock.close()

    # Everything below runs in the thread, but for recovery.

    def _work(self) -> None:
        if _TEAMS:
            torch.get_num_threads()  # the first look takes what is set for all
            torch.set_num_threads(1)
        self._alone.set()
        while True:
            item: Batch | dict[str, Any] | None = None
            with contextlib.suppress(queue.Empty):  # none for so long: time for a commit
                item = self._inbox.get(timeout=self._commit_seconds)
            try:
                if self._broken is None:
                    self._handle(item)
            except NotFiniteError as error:
                self._rejected.put(error)
            except Exception as error:
                self._broken = self._explain(error) if isinstance(error, OSError) else error
            if isinstance(item, dict) and "commit" in item:
                item["commit"].put(None)
            elif item is CLOSE:
                return
            elif item is not None:
                self._room.put(None)

    def _explain(self, error: OSError) -> WriteError:
        return WriteError(
            f"writing to {self._path} failed ({error}). What was committed is intact; the rows since the last commit "
            "are lost. Make room or mend the folder, then start again with resume=True."
        )

    def _handle(self, item: Batch | dict[str, Any] | None) -> None:
        if isinstance(item, Batch):
            self._write(item)
            if time.monotonic() - self._committed_at > self._commit_seconds:
                self._commit()
            return
        self._commit()
        if item is CLOSE:
            self._close_shard()
            self._forget_statistics(keep=1)
        elif item is not None and "commit" not in item:
            self._append(item | self._counts())
            self._start_record()

    def _write(self, batch: Batch) -> None:
        if batch.ready is not None:
            batch.ready.synchronize()
        if not batch.checked and not bool(finite_rows(batch.rows).all()):
            raise not_finite(batch.ids, batch.rows, late=True)
        n = len(batch.ids)
        # A batch is never split: its rows, moments and counts are committed together or not at all.
        if n and (self._shard is None or (self._shard_rows and self._shard_rows + n > self._capacity)):
            self._commit()
            self._open_shard()
        self._flagged += batch.flagged
        self._dropped += batch.dropped
        if not n:
            # Its repeats are counted in the next record; so that they are not counted again after a kill, so is it.
            self._steps.append([batch.pass_index, batch.step, 0])
            return
        self._unmeasured += n if batch.moments is None and self._measures else 0
        for name in batch.asleep:
            self._asleep[name] = self._asleep.get(name, 0) + n
        assert self._shard is not None
        data = self._codec.encode(batch.rows).view(torch.uint8).numpy().data.cast("B")
        write_all(self._shard, data, SHARD_HEADER + self._shard_rows * self._codec.row_bytes)
        self._shard_rows += n
        self._hash.update(data)
        self._ids += batch.ids
        self._steps.append([batch.pass_index, batch.step, n])
        if batch.moments is not None:
            self.moments += batch.moments.to(torch.float64).numpy()

    def _commit(self) -> None:
        self._committed_at = time.monotonic()
        if not self._ids:
            return
        assert self._shard is not None
        os.fsync(self._shard)
        snapshot = self._path / statistics_name(self._rank, len(self.records))
        # One snapshot for each record: a resumed run starts from statistics that match its rows exactly.
        record = {
            "shard": self._shard_index, "start": self._shard_rows - len(self._ids), "rows": len(self._ids),
            "checksum": self._hash.hexdigest(), "ids": self._ids, "steps": self._steps,
            "statistics": save_moments(snapshot, self.moments, self._run_id),
        }  # fmt: skip
        self._append(record | self._counts())
        self._start_record()
        self._forget_statistics()

    def _counts(self) -> dict[str, Any]:
        """What every record says of the samples since the last one."""
        return {
            "flagged": self._flagged, "dropped": self._dropped, "unmeasured": self._unmeasured, "asleep": self._asleep
        }  # fmt: skip

    def _start_record(self) -> None:
        self._ids: list[int | str] = []
        self._steps: list[list[int]] = []
        self._flagged: list[int | str] = []
        self._dropped = 0
        self._unmeasured = 0
        self._asleep: dict[str, int] = {}
        self._hash = xxhash.xxh3_128()

    def _append(self, record: dict[str, Any]) -> None:
        record = {"n": len(self.records), "run": self._run_id} | record
        position = self._commits.seek(0, os.SEEK_END)
        try:
            write_all(self._commits.fileno(), memoryview(encode_record(record)), position)
            os.fsync(self._commits.fileno())
        except OSError:
            os.ftruncate(self._commits.fileno(), position)
            raise
        self.records.append({key: value for key, value in record.items() if key != "ids"})

    def _forget_statistics(self, keep: int = 2) -> None:
        """Delete old snapshots; a reader that has just read the previous record still finds its own."""
        named = [record["statistics"]["file"] for record in self.records if "statistics" in record]
        for name in named[-keep - 3 : -keep]:
            (self._path / name).unlink(missing_ok=True)

    def _open_shard(self) -> None:
        self._close_shard()
        self._shard_index += 1
        file = self._path / shard_name(self._rank, self._shard_index)
        self._shard = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        write_all(self._shard, memoryview(shard_header(0, self._codec, self._run_id)), 0)
        self._shard_rows = 0
        sync_folder(self._path)

    def _close_shard(self) -> None:
        """Make the file a valid safetensors file of the committed rows."""
        if self._shard is None:
            return
        header = shard_header(self._shard_rows, self._codec, self._run_id)
        write_all(self._shard, memoryview(header), 0)
        os.ftruncate(self._shard, SHARD_HEADER + self._shard_rows * self._codec.row_bytes)
        os.fsync(self._shard)
        os.close(self._shard)
        self._shard = None
