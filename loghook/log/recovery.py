"""What a kill leaves behind: read back what is committed, cut off what is not. It may itself be killed at any point."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from loghook.errors import CorruptLogError
from loghook.log.disk import sync_folder, write_all
from loghook.log.format import SHARD_HEADER, Manifest, shard_header, shard_name
from loghook.log.records import REMEDY, Commits, read_commits


@dataclass
class Committed:
    """What a resumed run has to know of what was logged before."""

    # data_ids whose rows are there (or were flagged) and that are not logged again
    ids: set[int | str] = field(default_factory=set)
    steps: dict[int, int] = field(default_factory=dict)  # {rank: number of the first step that is not committed}
    starts: dict[int, int] = field(default_factory=dict)  # {pass: its first step}
    done: set[int] = field(default_factory=set)  # passes that every writer has completed


def read_back(path: Path, manifest: Manifest, *, outside_too: bool) -> Committed:
    """Read back an interrupted run; ``outside_too``: ids logged outside ``passes()`` are not logged again either."""
    found = Committed()
    ended: list[set[int]] = []
    reopened: list[int] = next((e["records"] for e in reversed(manifest.history) if e["what"] == "append"), [])
    for rank in ranks_on_disk(path, manifest):
        log = read_commits(path, manifest, rank)
        # What ended before the log was opened for more data has to be gone through again.
        fresh = reopened[rank] if rank < len(reopened) else 0
        ended.append({r["pass_end"] for r in log.records if "pass_end" in r and r["n"] >= fresh})
        for record in log.records:
            place = 0
            for pass_index, step, rows in record.get("steps", ()):
                if outside_too or pass_index >= 0:
                    found.ids.update(record["ids"][place : place + rows])
                place += rows
                found.steps[rank] = max(found.steps.get(rank, 0), step + 1)
                found.starts[pass_index] = min(found.starts.get(pass_index, step), step)
            found.ids.update(record["flagged"])
    found.done = set.intersection(*ended)
    return found


def ranks_on_disk(path: Path, manifest: Manifest) -> range:
    """Ranks that have written, also if the run was killed before its manifest counted them."""
    stems = [file.stem.split("-") for file in path.glob("commits-*.jsonl")]
    found = [int(stem[1]) for stem in stems if len(stem) > 1 and stem[1].isdecimal() and len(stem[1]) < 8]
    return range(max([manifest.world_size, *(rank + 1 for rank in found)]))


def recover(path: Path, manifest: Manifest, rank: int, *, snapshots: int = 2) -> Commits:
    """Bring one writer's files to the state of its last record; its lock must be held.

    Cuts off an unfinished record and uncommitted rows, closes its shards, and deletes shards and snapshots that no
    record names; of the snapshots it keeps the last so many.

    Raises:
        CorruptLogError: if what is there does not match its records; nothing is changed then.
    """
    log, codec = read_commits(path, manifest, rank), manifest.codec
    ends = log.shard_ends
    for index, rows in ends.items():
        shard = path / shard_name(rank, index)
        if not shard.is_file() or shard.stat().st_size < SHARD_HEADER + rows * codec.row_bytes:
            raise CorruptLogError(f"{shard} is missing or shorter than its records say: {REMEDY}.")
    if log.torn:
        with open(log.file, "r+b") as handle:
            handle.truncate(len(log.data))
            os.fsync(handle.fileno())
    for index, rows in ends.items():
        header = shard_header(rows, codec, manifest.run_id)
        close_shard(path / shard_name(rank, index), header, rows * codec.row_bytes)
    named = [record["statistics"]["file"] for record in log.rows][-snapshots:]
    keep = {shard_name(rank, index) for index in ends} | set(named)
    for kind in ("rows", "statistics"):
        for file in path.glob(f"{kind}-{rank:05d}-*.safetensors"):
            if file.name not in keep:
                file.unlink()
    sync_folder(path)
    return log


def close_shard(shard: Path, header: bytes, size: int) -> bool:
    """Cut a shard to ``size`` bytes of rows and let its header state them; returns whether that was not so already."""
    if shard.stat().st_size == SHARD_HEADER + size:
        with open(shard, "rb") as handle:
            if handle.read(SHARD_HEADER) == header:
                return False
    descriptor = os.open(shard, os.O_RDWR)
    try:
        os.ftruncate(descriptor, SHARD_HEADER + size)
        write_all(descriptor, memoryview(header), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True
