"""Writing a log anew without some of its rows: new files beside the old ones, made to count by one manifest."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loghook.errors import CorruptLogError
from loghook.log.codec import Codec
from loghook.log.disk import sync_folder, write_flushed
from loghook.log.finite import finite_rows, not_finite
from loghook.log.folder import sum_up
from loghook.log.format import (
    SHARD_HEADER,
    Layout,
    Manifest,
    checksum,
    commits_name,
    shard_header,
    shard_name,
    statistics_name,
)
from loghook.log.kept import KEPT
from loghook.log.moments import load_moments, save_moments
from loghook.log.records import Commits, all_commits, encode_record

RECODED = 2**22  # values of rows that are written in another dtype at a time
GENERATION_STEP = 10**10  # snapshots of maintenance are numbered from here, out of the way of every writer's
Keep = Callable[[dict[str, Any], bytes], np.ndarray]


@dataclass(frozen=True)
class Changed:
    """What maintenance did."""

    rows: int  # rows that the log holds now
    dropped: int  # rows that were left out
    ids: list[int | str]  # their data_ids, as far as they are known, once each: after ``repair`` the ones to log again
    notes: list[str]  # what was found, a line each


def ids_of(logs: Sequence[Commits]) -> list[int | str]:
    """Ids of all rows, in order, repeats included."""
    return [i for log in logs for record in log.records for i in record.get("ids", ())]


def entry(what: str, **facts: Any) -> dict[str, Any]:
    """Make a line of the manifest's history."""
    return {"what": what, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | facts


def shard_of(path: Path, log: Commits, record: dict[str, Any]) -> Path:
    """File that holds a record's rows."""
    return path / shard_name(log.rank, record["shard"])


def read_rows(path: Path, log: Commits, record: dict[str, Any], row_bytes: int) -> bytes | None:
    """Bytes of a record's rows, or None if they are not what was committed."""
    file, size = shard_of(path, log, record), record["rows"] * row_bytes
    start = SHARD_HEADER + record["start"] * row_bytes
    if not file.is_file() or file.stat().st_size < start + size:  # before anything of that size is allocated
        return None
    with open(file, "rb") as handle:
        handle.seek(start)
        data = handle.read(size)
    return data if checksum(data) == record["checksum"] else None


def _recoded(stored: np.ndarray, ids: Sequence[int | str], old: Codec, new: Codec) -> bytes:
    """Bytes of rows (n, row_bytes) in another dtype, a few at a time."""
    if old.name == new.name:
        return stored.tobytes()
    parts, step = [], max(1, RECODED // old.width)
    for start in range(0, len(stored), step):
        chunk = torch.from_numpy(stored[start : start + step]).view(old.stored)
        rows = old.decode(chunk).to(new.dtype)
        if not finite_rows(rows).all():
            raise not_finite(ids[start : start + step], rows)
        parts.append(new.encode(rows).view(torch.uint8).numpy().tobytes())
    return b"".join(parts)


@dataclass
class _Copy:
    """The shards that rows are copied to, one after the other."""

    folder: Path
    rank: int
    codec: Codec
    run_id: str
    number: int = -1  # of the shard that is open
    rows: int = 0  # that it holds
    file: Any = None

    def append(self, number: int, data: bytes, rows: int) -> int:
        """Write rows to a shard, and return the place of the first; no earlier shard gets any more."""
        if number < self.number:
            raise CorruptLogError(f"{self.folder}: the commit log goes back from shard {self.number} to {number}.")
        if number != self.number:
            self.close()
            self.file = open(self.folder / shard_name(self.rank, number), "wb")  # noqa: SIM115
            self.file.write(shard_header(0, self.codec, self.run_id))
            self.number, self.rows = number, 0
        self.file.write(data)
        self.rows += rows
        return self.rows - rows

    def close(self) -> None:
        """Let the header of the open shard say how many rows it has, on the disk."""
        if self.file is not None:
            with self.file as file:
                file.seek(0)
                file.write(shard_header(self.rows, self.codec, self.run_id))
                file.flush()
                os.fsync(file.fileno())
            self.file = None


def copy_log(
    path: Path, old: Manifest, log: Commits, out: Path, new: Manifest, rank: int, keep: Keep, *,
    first_shard: int = 0, drop_ends: bool = False, gone: Set[int | str] = frozenset(),
) -> list[int | str]:  # fmt: skip
    """Write one writer's kept rows as new shards and a new commit log; returns the ids of rows left out."""
    layout = Layout(new.layers)
    coded, codec = old.codec, new.codec
    rows = log.rows
    number = new.generation * GENERATION_STEP + len(log.records)
    moments = np.zeros(layout.moments_width)
    if rows and new.no_statistics is None:
        moments = load_moments(path, rows[-1]["statistics"], layout.moments_width)
    statistics = save_moments(out / statistics_name(rank, number), moments, new.run_id) if rows else None
    # Where rows get smaller, several shards become one of about the same size.
    shards = {n: first_shard + i * codec.row_bytes // coded.row_bytes for i, n in enumerate(log.shard_ends)}
    copy = _Copy(out, rank, codec, new.run_id)
    lines, dropped = b"", []
    written = 0
    for record in log.records:
        if "pass_end" in record and drop_ends:
            continue
        fresh = record | {"n": written, "run": new.run_id}
        fresh["flagged"] = [i for i in record["flagged"] if i not in gone]
        if "shard" in record:
            data = read_rows(path, log, record, coded.row_bytes) or b""
            mask = keep(record, data)
            ids = [i for i, kept in zip(record["ids"], mask, strict=True) if kept]
            dropped += [i for i, kept in zip(record["ids"], mask, strict=True) if not kept]
            if not mask.any():
                continue
            kept_bytes = _recoded(np.frombuffer(data, np.uint8).reshape(len(mask), -1)[mask], ids, coded, codec)
            shard = shards[record["shard"]]
            start = copy.append(shard, kept_bytes, len(ids))
            fresh |= {
                "shard": shard, "start": start, "rows": len(ids), "checksum": checksum(kept_bytes),
                "ids": ids, "steps": _kept_steps(record["steps"], mask), "statistics": statistics,
            }  # fmt: skip
        lines += encode_record(fresh)
        written += 1
    copy.close()
    write_flushed(out / commits_name(rank, new.generation), lines)
    return dropped


def _kept_steps(steps: list[list[int]], mask: np.ndarray) -> list[list[int]]:
    ends = np.cumsum([n for *_, n in steps])
    return [[p, s, int(mask[end - n : end].sum())] for (p, s, n), end in zip(steps, ends, strict=True)]


def rewrite(
    path: Path, manifest: Manifest, logs: Sequence[Commits], keep: Keep, what: str, reason: str | None, *,
    notes: Sequence[str] = (), lost: Sequence[int | str] = (), drop_ends: bool = False,
    gone: Set[int | str] = frozenset(),
) -> Changed:  # fmt: skip
    """Write the next generation of a run beside this one, let it count, and delete what it does not name."""
    new = dataclasses.replace(manifest, generation=manifest.generation + 1, no_statistics=reason)
    ids: list[int | str] = list(lost)
    for log in logs:
        on_disk = [int(f.stem.rpartition("-")[2]) for f in path.glob(f"rows-{log.rank:05d}-*.safetensors")]
        free = max(on_disk, default=-1) + 1
        ids += copy_log(
            path, manifest, log, path, new, log.rank, keep, first_shard=free, drop_ends=drop_ends, gone=gone
        )
    sync_folder(path)
    written = all_commits(path, new)
    still = set(ids_of(written))
    seal = sum_up(written)
    new.sealed = seal if manifest.sealed is not None else None
    new.history = [*manifest.history, entry(what, rows=seal["rows"], dropped=len(ids), notes=list(notes))]
    new.save(path)
    clean(path, new, written)
    again = [i for i in dict.fromkeys(ids) if i not in still]
    return Changed(seal["rows"], len(ids), again, list(notes))


def clean(path: Path, manifest: Manifest, logs: Sequence[Commits]) -> None:
    """Delete what the manifest's commit logs do not name."""
    named = {log.file.name for log in logs}
    for log in logs:
        named |= {name for r in log.rows for name in (shard_of(path, log, r).name, r["statistics"]["file"])}
    for kind in ("rows-*.safetensors", "statistics-*.safetensors", "commits-*.jsonl"):
        for file in path.glob(kind):
            if file.name not in named:
                file.unlink()
    (path / KEPT).unlink(missing_ok=True)  # it speaks of rows that may be gone
    sync_folder(path)
