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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from loghook.errors import NotFiniteError, StateError, WriteError, some
from loghook.log.disk import lock, lock_name, sync, sync_folder, write_all, writing
from loghook.log.files import load_moments, save_moments
from loghook.log.folder import recover, require_current
from loghook.log.format import Layout, Manifest, shard_name, statistics_name
from loghook.log.records import encode_record, last_change, told
from loghook.log.shard import ShardFile
from loghook.log.signals import guard, release

QUEUE = 8  # blocks under way between the loop and the disk
WAITING = 2**30  # bytes that they may have; of larger blocks none waits for another
LONGEST = 1e6  # seconds; a queue cannot be waited for much longer
GRACE = 30.0  # seconds that a process which was told to end waits for the commit
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


def finite_rows(rows: Tensor) -> Tensor:
    """Which rows (B, width) hold neither infinities nor not-a-numbers: (B,) bool, on the rows' device.

    A sum is finite only if its terms are, and takes one pass. On the CPU a suspect sum is looked at closely, since it
    may have overflowed by itself.
    """
    finite = torch.isfinite(rows.sum(1, dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32))
    if rows.device.type == "cpu" and not finite.all():
        finite = torch.isfinite(rows).all(1)
    return finite


def not_finite(ids: Sequence[int | str], rows: Tensor, *, late: bool = False) -> NotFiniteError:
    """Return the error for rows (B, width) that must not be written; ``late``: found after their block had ended."""
    odd = [i for i, good in zip(ids, torch.isfinite(rows).all(1).tolist(), strict=True) if not good]
    consequence = "nothing of this batch was written"
    if late:
        consequence = (
            f"nothing of their batch of {len(ids)} was written. This was found in the background: log the samples in "
            "the error's ids again, and the batch of the block that raises it now, which was not written either"
        )
    return NotFiniteError(
        f"the rows of {len(odd)} samples are not finite (data_id {some(odd, 5)}), so {consequence}. Look at the loss "
        "of these samples; if the storage dtype is too narrow for them choose bfloat16 or float32; under a GradScaler "
        "pass run(..., scaler=scaler), which flags such rows and leaves them out.",
        ids,
    )


class Writer:
    """Appends to one rank's shards and commit log, which it recovers first."""

    def __init__(self, path: Path, manifest: Manifest, rank: int, *, shard_bytes: int, commit_seconds: float) -> None:
        self._path, self._run_id, self._rank, self._codec = path, manifest.run_id, rank, manifest.codec
        self.dtype = self._codec.dtype  # of the rows that it takes
        self._capacity = max(1, shard_bytes // self._codec.row_bytes)
        self._commit_seconds, self._has_statistics = commit_seconds, manifest.no_statistics is None
        self._lock = lock(path / lock_name(rank))
        self._lock_file = os.fstat(self._lock.fileno())  # by which the folder is known again
        self.moments = np.zeros(Layout(manifest.layers).moments_width)
        try:
            require_current(path, manifest)  # recovery deletes what the commit log of this generation does not name
            log = recover(path, manifest, rank)
            if log.rows and self._has_statistics:
                self.moments = load_moments(path, log.rows[-1]["statistics"], len(self.moments))
            self._commits = open(log.file, "ab", buffering=0)  # noqa: SIM115
            sync_folder(path)
        except BaseException:
            self._lock.close()
            raise
        self.written = len(log.records)  # records in the commit log
        named = (record["statistics"]["file"] for record in log.rows[-2:])  # maintenance has one for all
        self._snapshots = list(dict.fromkeys(named))  # names of those that are there
        self._shard: ShardFile | None = None  # the open one
        self._shard_index = max([told(last_change(manifest), "shards", rank) - 1, *log.shard_ends])
        self._start_record()
        self._outside = False  # whether the last block was outside of passes
        self._committed_at = time.monotonic()
        # Two queues whose put and get are single operations: a signal handler in the loop's thread can always ask for
        # a commit. The inbox holds calls for the thread, each with a queue that is told when it is done. A block takes
        # a ticket from `_room`, which it gets back in this way.
        self._inbox: queue.SimpleQueue[tuple[Callable[[], None], queue.SimpleQueue[None]]] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(QUEUE):
            self._room.put(None)
        self._rejected: queue.SimpleQueue[NotFiniteError] = queue.SimpleQueue()
        self.on_reject: Callable[[Sequence[int | str]], None] = lambda ids: None  # is told whose rows can come again
        self._broken: Exception | None = None  # an operating system error: nothing is written after it
        self._thread = threading.Thread(target=self._work, name="loghook-writer", daemon=True)
        self._thread_is_set = threading.Event()
        self._start_thread()
        guard(self)

    def _start_thread(self) -> None:
        """Start the thread, which asks for no team, and leave the number that later threads get as it was."""
        with _starting:
            threads = torch.get_num_threads()
            try:
                self._thread.start()
                self._thread_is_set.wait()
            finally:
                if _TEAMS:
                    torch.set_num_threads(threads)

    def put(self, batch: Batch) -> None:
        """Queue a block's rows; raise what went wrong before."""
        if QUEUE * batch.rows.nbytes > WAITING:
            self._wait_for(lambda: None)  # and so for all blocks before
        self._queue(partial(self._take, batch))

    def record(self, facts: dict[str, Any]) -> None:
        """Queue a record of the run's own, {"pass_end": ...} or {"end": ...}, as ``put`` does."""
        self._queue(partial(self._conclude, facts))

    def _queue(self, call: Callable[[], None]) -> None:
        self.check()
        self._room.get()
        self._inbox.put((call, self._room))

    def commit_now(self, seconds: float = GRACE) -> None:
        """Commit what was put, and wait for it at most so long; may be called from a signal handler."""
        self._wait_for(self._commit, seconds)

    def _wait_for(self, call: Callable[[], None], seconds: float = math.inf) -> None:
        """Let the thread do something behind all that is queued, and wait for it at most so long."""
        done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._inbox.put((call, done))
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
        errors = []
        with contextlib.suppress(queue.Empty):
            while True:
                errors.append(self._rejected.get_nowait())
        if errors:
            ids = [i for error in errors for i in error.ids]
            self.on_reject(ids)
            raise NotFiniteError("\n".join(map(str, errors)), ids)

    def close(self, *, keep_lock: bool = False) -> None:
        """Commit, close the shard and, unless ``keep_lock``, let others write."""
        try:
            if self._thread.is_alive():
                self._wait_for(self._finish)
                self._thread.join()
            release(self)
            self.check()
        finally:
            if not self._thread.is_alive():  # otherwise Ctrl-C came while it works; close() is called again at exit
                self._commits.close()
                if self._shard is not None:  # the folder is not ours any more, or a write failed
                    self._shard.let_go()
                if not keep_lock:
                    self.unlock()

    def unlock(self) -> None:
        self._lock.close()

    def disown(self) -> None:
        """Refuse to write in a forked child: the thread is its parent's."""
        self._broken = StateError(
            "this process was forked from the one that logs, and cannot write to its run: log in the parent, or give "
            "each process a run of its own and join them with loghook merge."
        )

    # Everything below runs in the thread, but for recovery.

    def _work(self) -> None:
        if _TEAMS:
            torch.get_num_threads()  # the first look takes what is set for all
            torch.set_num_threads(1)
        self._thread_is_set.set()
        while True:
            call, done = self._commit, None  # where nothing comes for so long
            with contextlib.suppress(queue.Empty):
                call, done = self._inbox.get(timeout=min(self._commit_seconds, LONGEST))
            try:
                if self._broken is None:
                    with writing(self._path):
                        call()
            except NotFiniteError as error:
                self._rejected.put(error)
            except Exception as error:
                self._broken = error
            if done is not None:
                done.put(None)
            if call == self._finish:
                return

    def _take(self, batch: Batch) -> None:
        self._require_folder()
        self._write(batch)
        if time.monotonic() - self._committed_at > self._commit_seconds:
            self._commit()

    def _conclude(self, facts: dict[str, Any]) -> None:
        """Commit, and append a record of the run's own."""
        self._commit()
        if "end" in facts:
            # Before the record that lets rank 0 seal the run: a kill right after it leaves nothing undone.
            self._close_files()
        self._append(facts)

    def _finish(self) -> None:
        """Commit what is left; the thread's last call."""
        if self._ids or self._folder_is_ours():  # else nothing is lost
            self._commit()
            if self._outside and (self._counts["flagged"] or self._counts["dropped"]):  # a pass is gone through again
                self._append({"end": ""})
            self._close_files()

    def _close_files(self) -> None:
        self._close_shard()
        self._forget_statistics(keep=1)

    def _require_folder(self) -> None:
        if not self._folder_is_ours():
            raise WriteError(
                f"{self._path} was deleted, or replaced by another run, while this one wrote there: what it logged is "
                "gone. Close the run, which says this once more, and log again."
            )

    def _folder_is_ours(self) -> bool:
        """Whether the folder is still the one that was opened: in another nothing may be written, or deleted."""
        try:
            return os.path.samestat(os.stat(self._path / lock_name(self._rank)), self._lock_file)
        except OSError:
            return False

    def _write(self, batch: Batch) -> None:
        if batch.ready is not None:
            with torch.cuda.device(batch.ready.device):  # else the thread would take up memory on the first device
                batch.ready.synchronize()
        if not batch.checked and not bool(finite_rows(batch.rows).all()):
            raise not_finite(batch.ids, batch.rows, late=True)
        n = len(batch.ids)
        # A batch is never split: its rows, moments and counts are committed together or not at all.
        shard = self._shard
        if n and (shard is None or (shard.rows and shard.rows + n > self._capacity)):
            self._commit()
            shard = self._open_shard()
        self._outside = batch.pass_index < 0
        self._counts["flagged"] += batch.flagged
        self._counts["dropped"] += batch.dropped
        if not n or shard is None:
            # Its repeats are counted in the next record; so that they are not counted again after a kill, so is it.
            self._steps.append([batch.pass_index, batch.step, 0])
            return
        # Squares may overflow where rows do not. What is in the statistics once cannot be taken out again.
        measured = batch.moments is not None and bool(torch.isfinite(batch.moments).all())
        self._counts["unmeasured"] += n if self._has_statistics and not measured else 0
        for name in batch.asleep:
            self._counts["asleep"][name] = self._counts["asleep"].get(name, 0) + n
        data = self._codec.encode(batch.rows).view(torch.uint8).numpy().data.cast("B")
        shard.append(data, n)
        self._hash.update(data)
        self._ids += batch.ids
        self._steps.append([batch.pass_index, batch.step, n])
        if batch.moments is not None and measured:
            self.moments += batch.moments.to(torch.float64).numpy()

    def _commit(self) -> None:
        self._require_folder()
        self._committed_at = time.monotonic()
        if self._shard is None or not self._ids:
            return
        self._shard.sync()
        snapshot = self._path / statistics_name(self._rank, self.written)
        # One snapshot for each record: a resumed run starts from statistics that match its rows exactly.
        record = {
            "shard": self._shard_index, "start": self._shard.rows - len(self._ids), "rows": len(self._ids),
            "checksum": self._hash.hexdigest(), "ids": self._ids, "steps": self._steps,
            "statistics": save_moments(snapshot, self.moments, self._run_id),
        }  # fmt: skip
        self._append(record)
        self._snapshots.append(snapshot.name)
        self._forget_statistics(keep=2)  # a reader that has just read the previous record still finds its own

    def _start_record(self) -> None:
        self._ids: list[int | str] = []
        self._steps: list[list[int]] = []
        # What every record says of the samples since the last one.
        self._counts: dict[str, Any] = {"flagged": [], "dropped": 0, "unmeasured": 0, "asleep": {}}
        self._hash = xxhash.xxh3_128()

    def _append(self, record: dict[str, Any]) -> None:
        record = {"n": self.written, "run": self._run_id} | record | self._counts
        position = self._commits.seek(0, os.SEEK_END)
        try:
            write_all(self._commits.fileno(), memoryview(encode_record(record)), position)
            sync(self._commits.fileno())
        except OSError:
            os.ftruncate(self._commits.fileno(), position)
            raise
        self.written += 1
        self._start_record()

    def _forget_statistics(self, keep: int) -> None:
        while len(self._snapshots) > keep:
            (self._path / self._snapshots[0]).unlink(missing_ok=True)
            del self._snapshots[0]

    def _open_shard(self) -> ShardFile:
        self._close_shard()
        self._shard_index += 1
        self._shard = ShardFile(self._path / shard_name(self._rank, self._shard_index), self._codec, self._run_id)
        sync_folder(self._path)
        return self._shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None
