"""``Session``: a run's folder as one process writes it, from the claim on it to the seal.

``Repeats``: which samples it takes where an id comes again; ``pack``: how the writer gets them.
"""

import dataclasses
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loghook.capture.config import Config
from loghook.capture.rows import Captured
from loghook.errors import BatchError, CheckpointWarning, ConfigError, MismatchError, StateError, WriteError, warn
from loghook.log.disk import writing
from loghook.log.folder import SAME, Committed, check_same, claim, ranks_on_disk, read_back, seal, wait_for_seal
from loghook.log.format import MANIFEST, SEVERAL, Manifest, listed
from loghook.log.writer import Batch, Writer, finite_rows, not_finite
from loghook.processes import all_gather, broadcast, process_rank, rank_and_size, world_size

_AGAIN = "What was committed is kept: start all of them again with resume=True."
FAINT = 2.0**-18  # a row of smaller values is changed by some percent in float16, whose values lie 2**-24 apart there


class Repeats:
    """Ids that were met, by this process and by the run that it takes up again.

    The two are told apart: an id of an earlier process is skipped in silence, one that comes twice now is a repeat.
    """

    def __init__(self) -> None:
        self.committed = Committed()
        self._seen: set[int | str] = set()

    def keep(self, ids: Sequence[int | str], rule: str) -> tuple[np.ndarray, int]:
        """Which samples of a batch are logged, (B,) bool, and how many are left out as repeats.

        ``rule`` is "first", "all" or "error".
        """
        keep, repeats = np.ones(len(ids), dtype=bool), 0
        if rule == "all":
            return keep, repeats
        fresh: set[int | str] = set()
        for i, data_id in enumerate(ids):
            again = data_id in self._seen or data_id in fresh
            if again and rule == "error":
                raise BatchError(
                    f"data_id {data_id!r} was logged before and on_repeat='error': give each sample an id of its own, "
                    "or pass on_repeat='first' or 'all'."
                )
            keep[i] = not again and data_id not in self.committed.ids
            repeats += again
            fresh.add(data_id)
        return keep, repeats

    def pending(self, ids: Sequence[int | str], rule: str) -> list[int | str]:
        """Return those of some ids whose rows would be logged now, in their order."""
        keep, _ = self.keep(ids, "all" if rule == "all" else "first")
        return [data_id for data_id, kept in zip(ids, keep, strict=True) if kept]

    def met(self, ids: Sequence[int | str]) -> None:
        """Remember a batch that was handed to the writer."""
        self._seen.update(ids)

    def forget(self, ids: Sequence[int | str]) -> None:
        """Let a batch come again that the writer did not take."""
        self._seen.difference_update(ids)


class Session:
    def __init__(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        self._config, self.path = config, config.path
        self._resume = resume
        resumed = resume and (config.path / MANIFEST).exists()  # there is a run to go on with
        if process_rank() == 0:
            claim(config.path, resume=resume, overwrite=overwrite)
        self.manifest: Manifest | None = None  # before the first block of a new run
        self.writer: Writer | None = None  # open from the first block on
        self._writers = 1  # how many processes torch.distributed had then
        self.repeats = Repeats()  # ids met, by this process and by the one that it takes up again
        self._looks = config.dtype == "float16"  # whether rows are looked at for underflow
        self.sealed = False  # finished, by this process or by an earlier one
        self.rule = config.on_repeat  # or None: as the loop at hand makes it
        if resumed:
            self.manifest = Manifest.load(self.path)
            self.sealed = self.manifest.sealed is not None
            self.rule = self.manifest.on_repeat or config.on_repeat  # a run that was begun with one keeps it
            if config.on_repeat not in (None, self.rule):
                raise MismatchError(
                    f"cannot resume: on_repeat is {self.rule!r} there and {config.on_repeat!r} now: leave it out."
                )
            self.repeats.committed = read_back(self.path, self.manifest, outside_too=self.rule is not None)
            if self.rule != self.manifest.on_repeat and not self.sealed and self.repeats.committed.repeated:
                raise MismatchError(
                    "cannot resume: ids have several rows by now, and the run was begun without a rule for them. Leave "
                    f"out on_repeat={self.rule!r}, or log anew with it."
                )

    def require_id_type(self, id_type: str) -> None:
        """Raise unless ids are of the type that the run has."""
        if self.manifest is not None and self.manifest.id_type != id_type:
            raise BatchError(f"data_id is {id_type} here, was {self.manifest.id_type}: use one type throughout.")

    def passes_done(self) -> set[int]:
        """Passes that are over, for rank 0 and so for all: loops may hold collectives."""
        if self._resume:  # which all ranks were told, whatever each of them found
            state = None if self.manifest is None else (self.manifest.run_id, self.manifest.sealed)
            (first, done), *others = all_gather((state, self.repeats.committed.done))
            if any(other != first for other, _ in others):
                raise StateError(
                    f"ranks found different runs in {self.path}, or only some did: give all of them one path."
                )
            self.repeats.committed.done = done
        return self.repeats.committed.done

    def _agree(self, fresh: Manifest, begun: bool) -> Manifest | None:
        """Return one manifest of a new run for all ranks, that of the first which has had a block; None if none has.

        It is seen before that they would write the same.
        """
        proposals = all_gather((self.path, begun, fresh), together=True)
        lead = next((rank for rank, (_, begun, _) in enumerate(proposals) if begun), None)
        if lead is None:
            return None
        path, _, first = proposals[lead]
        for rank, (other_path, begun, other) in enumerate(proposals):
            if other_path != path:
                raise ConfigError(
                    f"rank {rank} writes to {other_path} and rank {lead} to {path}: give the ranks of one job the same "
                    "path (loghook merge joins runs of separate jobs)."
                )
            for name in (*SAME, "on_repeat"):
                one, two = getattr(first, name), getattr(other, name)
                if one != two and (begun or name != "id_type"):
                    shown = f"{name} is {one!r} on rank {lead} and {two!r} on rank {rank}"
                    if name == "layers":
                        odd = listed(sorted({spec.name for spec in {*one} ^ {*two}}))
                        shown = f"ranks {lead} and {rank} watch other layers, or layers of other widths ({odd})"
                    raise MismatchError(f"{shown}: give all ranks of a job, which write one log, the same.")
        if len({manifest.parameters["first"] for _, begun, manifest in proposals if begun} - {None}) > 1:
            warn(
                "the ranks begin with different parameter values: load one checkpoint on all of them.",
                CheckpointWarning,
            )
        return first

    def open(self, fresh: Manifest, begun: bool) -> Writer | None:
        """Open the writer, and with it the manifest, which is ``fresh`` unless the run has one already.

        ``begun``: this rank has had a block, and so knows the type of ids. Where none has, nothing is opened.
        """
        if self.manifest is not None:
            check_same(self.manifest, fresh)
        elif (agreed := self._agree(fresh, begun)) is None:
            return None
        else:
            fresh = agreed
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            writer = Writer(
                self.path, self.manifest or fresh, process_rank(), shard_bytes=self._config.shard_bytes,
                commit_seconds=self._config.commit_seconds,
            )  # fmt: skip
            writer.on_reject = self.repeats.forget
            try:
                # Under the lock: whoever comes second must not put a manifest of its own in place of the first one's.
                read = self.repeats.committed.records.get(process_rank(), 0)
                if self.manifest is not None and writer.written != read:
                    raise StateError(
                        f"another process went on with {self.path} meanwhile: start again with resume=True."
                    )
                self.manifest = self._settle(fresh)
            except BaseException:
                writer.close()
                raise
        self.writer, self._writers = writer, rank_and_size()[1]
        return writer

    def _settle(self, fresh: Manifest) -> Manifest:
        """Return the run's manifest, written by rank 0 if it is new or more ranks write now than before."""
        old = dataclasses.replace(self.manifest or fresh, on_repeat=self.rule)
        if process_rank() != 0:
            return old
        writers = max(old.world_size, fresh.world_size, len(ranks_on_disk(self.path, fresh)))
        new = dataclasses.replace(old, world_size=writers)
        if new != self.manifest:
            new.save(self.path)
        return new

    def close(self) -> None:
        """Commit what was handed over, and let others write."""
        if self.writer is not None:
            writer, self.writer = self.writer, None
            try:
                writer.close()
            finally:
                self._know(writer)

    def _know(self, writer: Writer) -> None:
        """Remember how far this process itself has come, to tell whether another went on from there."""
        self.repeats.committed.records[process_rank()] = writer.written

    def end(self, digest: Callable[[], str | None] | None) -> None:
        """Commit, and return when rank 0 has sealed the run; ``digest`` gives that of the last parameter values."""
        writer, manifest = self.writer, self.manifest
        assert writer is not None and manifest is not None
        try:
            writer.settle()  # while this rank can still go on, and before the others are told that it ended
        except WriteError:
            self.close()  # which raises it again and lets others write
            raise
        if (now := rank_and_size()[1]) != self._writers:
            raise StateError(
                f"{self._writers} processes under torch.distributed began to log and {now} come to finalize(): call it "
                f"before destroy_process_group() or accelerate's end_training(). {_AGAIN}"
            )
        try:
            # New each time, so that the end of an interrupted run is not taken for this one.
            session = broadcast(uuid.uuid4().hex)
        except RuntimeError as error:
            raise StateError(f"another process is gone before it came to finalize() ({error}). {_AGAIN}") from error
        self.writer = None
        try:
            writer.record({"end": session})
            writer.close(keep_lock=True)
            with writing(self.path):
                if process_rank() != 0:
                    self.manifest = wait_for_seal(self.path, manifest.run_id)
                else:
                    if digest is not None and manifest.parameters.get("last") != SEVERAL:
                        manifest.parameters["last"] = digest()
                    manifest.sealed = seal(self.path, manifest, session, world_size())
                    manifest.save(self.path)
        finally:
            writer.unlock()
            self._know(writer)
        self.sealed = True

    def warn_of_underflow(self, rows: Tensor) -> None:
        """Warn once where float16 keeps next to nothing of a row of gradients (B, width) that is not zero.

        Another device than the CPU would have to be waited for: of it only the first block is looked at.
        """
        if not self._looks:
            return
        largest = torch.maximum(rows.amax(1), -rows.amin(1))
        faint = largest[(largest > 0) & (largest < FAINT)]
        self._looks = rows.device.type == "cpu" and not len(faint)
        if len(faint):
            warn(
                f"rows underflow in float16: the largest value of one is {float(faint.min()):.1e}. Log with scale=, if "
                "the loss is divided by samples or tokens, or with dtype='bfloat16'.",
            )


def pack(
    captured: Captured,
    ids: Any,
    keep: np.ndarray,  # (B,) bool, False for repeats
    *,
    dtype: torch.dtype,  # in which the writer takes rows: that of the storage, or float32 for low bits
    flag: bool,  # leave out rows that are not finite instead of raising
    **numbers: int,  # ``pass_index``, ``step`` and ``dropped`` as in ``Batch``
) -> Batch:
    """Turn what a block delivered into what the writer takes, starting the copy off the device."""
    rows, moments, flagged, finite = captured.rows, captured.moments, [], None
    if rows.device.type not in ("cpu", "cuda"):  # Apple's have no float64 and nothing to wait with in the background
        rows, moments = rows.cpu(), None if moments is None else moments.cpu()
    rows = rows.to(dtype)
    if flag or rows.device.type == "cpu":
        finite = finite_rows(rows).cpu().numpy()
        if not flag and not finite.all():
            raise not_finite(ids, rows)
        if not finite.all():
            flagged = [i for i, good, kept in zip(ids, finite, keep, strict=True) if kept and not good]
            moments = None  # they are sums over the whole block and hold its infinities too
            keep = keep & finite
    kept = [i for i, use in zip(ids, keep, strict=True) if use]
    if not keep.all():
        rows = rows[torch.from_numpy(keep).to(rows.device)]
    ready = None
    if rows.device.type == "cuda":
        with torch.cuda.device(rows.device):  # an event is of the current device's stream, and the copy of this one's
            rows, moments = _to_pinned(rows), None if moments is None else _to_pinned(moments)
            ready = torch.cuda.Event(blocking=True)  # the writer waits asleep, and takes no core from the loop
            ready.record()
    return Batch(
        rows=rows, ids=kept, moments=moments, flagged=flagged, asleep=captured.asleep, ready=ready,
        checked=finite is not None, **numbers,
    )  # fmt: skip


def _to_pinned(t: Tensor) -> Tensor:
    """Start copying to page-locked memory on the current stream, without waiting."""
    return torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True).copy_(t, non_blocking=True)
