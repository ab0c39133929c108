"""A run's folder: claimed at the start, brought back to what is committed after a kill, sealed at the end.

A kill may come at any point, also while a folder is being recovered.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loghook.errors import (
    BatchError,
    ConfigError,
    CorruptLogError,
    LogExistsError,
    LogLockedError,
    MismatchError,
    StateError,
    some,
    warn,
)
from loghook.log.disk import lock, lock_name, sync, sync_folder, writing
from loghook.log.files import KEPT, PROJECTION, holds_factors
from loghook.log.format import MANIFEST, OVERWRITTEN, WRITTEN, Manifest
from loghook.log.records import REPAIR, Commits, all_commits, ids_of, last_change, read_commits, sum_up, told, unnamed
from loghook.log.shard import SHARD_HEADER, close_shard

# Arguments of ``init`` that make rows what they are.
ARGUMENTS = ("projection", "rank", "seed", "whitening", "dtype", "gradient")
SAME = (*ARGUMENTS, "id_type", "layers", "fitted")  # of all who write to one run
SEAL_TIMEOUT = 600.0  # seconds that rank 0 waits for the others
TELLING = 10.0  # after which it says so
FIRST_ROWS = 1000  # of each rank, whose ids are compared
_OURS = (*WRITTEN, "lock-*", MANIFEST, OVERWRITTEN, PROJECTION, KEPT)


def claim(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the run's folder, or say why it cannot be used."""
    if resume and overwrite:
        raise ConfigError("resume=True and overwrite=True exclude each other: keep one.")
    if path.exists() and not path.is_dir():
        raise LogExistsError(f"{path} is a file: choose another path for the run.")
    if factors := holds_factors(path):
        raise LogExistsError(f"{factors}: choose another path for the run.")
    present = [file for file in path.glob("*") if any(file.match(k) or file.match(f"{k}.tmp") for k in _OURS)]
    if any(not file.name.startswith("lock-") for file in present) and not resume and not overwrite:
        raise LogExistsError(
            f"{path} holds a run already: pass resume=True to go on with it (if it is finished, after loghook append; "
            "loghook.load asks it), overwrite=True or another path."
        )
    # Rank 0 commits nothing before it has written the manifest; other ranks may.
    committed = any(file.match("commits-00000*.jsonl") and file.stat().st_size for file in present)
    begun = (path / MANIFEST).exists()
    if committed and not overwrite and not begun and not (path / OVERWRITTEN).exists():
        raise CorruptLogError(f"{path} holds committed rows, but {MANIFEST} is gone: restore it from a copy.")
    # Other files without a manifest are of a run that was killed before its first block was done.
    if overwrite or not begun:
        # Nobody may be writing what goes away.
        locks = [lock(file) for file in present if file.name.startswith("lock-")]
        # After a kill on the way nothing is taken for a run, and commits without a manifest not for lost ones.
        with writing(path, "Nothing was overwritten that is still there: mend the folder, or choose another path."):
            if begun:
                (path / MANIFEST).replace(path / OVERWRITTEN)
                sync_folder(path)
            for file in present:
                if not file.name.startswith("lock-") and file.name not in (MANIFEST, OVERWRITTEN):
                    file.unlink()
            (path / OVERWRITTEN).unlink(missing_ok=True)
        for handle in locks:
            handle.close()
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def check_same(old: Manifest, new: Any, names: Sequence[str] = SAME) -> None:
    """Raise unless a resumed run has the arguments and layers of the first one, or such of them as ``new`` has."""
    for name in names:
        first, now = getattr(old, name), getattr(new, name)
        if first != now:
            text = "other layers or widths than in the log" if name == "layers" else f"{first!r} there and {now!r} now"
            raise MismatchError(f"cannot resume: {name} is {text}. Use the arguments and the model of the first run.")


def require_current(path: Path, manifest: Manifest) -> None:
    """Raise if the run is not the one any more that ``manifest`` was read of; nobody else may be writing it."""
    if not (path / MANIFEST).exists():
        return  # a new one, whose rank 0 will write it
    current = Manifest.load(path)
    if current.run_id != manifest.run_id:
        raise LogExistsError(f"{path} was taken by another run meanwhile: choose another path.")
    if (current.generation, current.sealed) != (manifest.generation, manifest.sealed):
        raise StateError(f"another process went on with {path} meanwhile, or changed it: start again with resume=True.")


def seal(path: Path, manifest: Manifest, session: str, active: int) -> dict[str, Any]:
    """Wait until each of ``active`` ranks has ended this ``session``, then sum up all commit logs.

    A resumed run may count more ranks than write now, and the end that an interrupted run came to does not count.
    """
    for rank in range(active, manifest.world_size):
        with lock(path / lock_name(rank)):  # one that does not write now
            recover(path, manifest, rank, snapshots=1)
    begun, warned = time.monotonic(), False
    while True:
        logs = all_commits(path, manifest)
        missing = [r for r in range(active) if not (logs[r].records and logs[r].records[-1].get("end") == session)]
        if not missing:
            _require_once(path, manifest, logs)
            _warn_of_parts(logs)
            if not manifest.history and not any(r.get("rows") or r["flagged"] for log in logs for r in log.records):
                raise StateError("nothing was logged, so nothing is to finalise: no block came to its end.")
            return sum_up(logs)
        if time.monotonic() - begun > TELLING and not warned:
            warned = True
            warn(f"waiting for ranks {missing}: every rank has to call run.finalize().")
        if time.monotonic() - begun > SEAL_TIMEOUT:
            raise StateError(
                f"ranks {missing} did not call finalize() within {SEAL_TIMEOUT:.0f} s: start again with resume=True."
            )
        time.sleep(0.1)


def _require_once(path: Path, manifest: Manifest, logs: Sequence[Commits]) -> None:
    """Raise under on_repeat="error" if two ranks logged one id, which neither of them could see."""
    if manifest.on_repeat != "error":
        return
    counts = Counter(ids_of(logs))
    if twice := [i for i, count in counts.items() if count > 1]:
        raise BatchError(
            f"several ranks logged data_id {some(twice, 5)} ({len(twice):,} in all) and on_repeat='error': each "
            f"sample belongs to one rank. Finalise with resume=True after `loghook delete {path}`, which takes out all "
            "of their rows; or log anew with on_repeat='first', which keeps one of each."
        )


def _warn_of_parts(logs: Sequence[Commits]) -> None:
    """Warn where ranks logged the same samples in the same steps: parts of their gradients, as nobody else can see.

    The beginning of a log tells. A rank's last step may be filled up with samples of other ranks.
    """
    met: Counter[tuple[int, int, int | str]] = Counter()
    for log in logs:
        mine: list[tuple[int, int, int | str]] = []
        for pass_index, step, ids in log.blocks():
            mine += [(pass_index, step, i) for i in ids]
            if len(mine) - len(ids) > FIRST_ROWS:
                break
        met.update(list(dict.fromkeys(row for row in mine if row[:2] != mine[-1][:2])))
    shared = [row for row, ranks in met.items() if ranks > 1]
    if 2 * len(shared) > len(met):
        warn(
            f"ranks logged the same samples in the same steps, such as {shared[0][2]!r}. If each has a part of them or "
            "of the layers (sequence, context or tensor parallelism), their rows are wrong: log whole samples. If each "
            "goes through all of the data, give each a share."
        )


def wait_for_seal(path: Path, run_id: str) -> Manifest:
    """Wait, on other ranks than 0, until rank 0 has sealed the run; return the manifest that says so."""
    begun = time.monotonic()
    while True:
        in_vain = time.monotonic() - begun > 2 * SEAL_TIMEOUT  # rank 0 itself may wait so long for the slowest
        # Rank 0 keeps its lock until it has sealed the run, has failed or has died: which, the manifest then says.
        with suppress(LogLockedError), lock(path / lock_name(0), wait=0):
            in_vain = True
        manifest = Manifest.load(path)
        if manifest.sealed is not None and manifest.run_id == run_id:
            return manifest
        if in_vain:
            raise StateError(
                f"rank 0 failed (see its own error), died or took too long, and did not seal {path}: start all ranks "
                "again with resume=True."
            )
        time.sleep(0.1)


@dataclass
class Committed:
    """What a resumed run has to know of what was logged before."""

    # data_ids whose rows are there (or were flagged) and that are not logged again
    ids: set[int | str] = field(default_factory=set)
    steps: dict[int, int] = field(default_factory=dict)  # {rank: number of the first step that is not committed}
    starts: dict[int, int] = field(default_factory=dict)  # {pass: its first step}
    done: set[int] = field(default_factory=set)  # passes that every writer has completed
    repeated: bool = False  # whether an id has several rows
    records: dict[int, int] = field(default_factory=dict)  # {rank: how many}


def read_back(path: Path, manifest: Manifest, *, outside_too: bool) -> Committed:
    """Read back an interrupted run; ``outside_too``: ids logged outside ``passes()`` are not logged again either."""
    committed = Committed()
    ended: list[set[int]] = []  # passes that each writer has completed
    met: list[int | str] = []
    for rank in ranks_on_disk(path, manifest):
        log = read_commits(path, manifest, rank)
        committed.records[rank] = len(log.records)
        oldest = reopened_at(manifest, rank)
        ended.append({r["pass_end"] for r in log.records if "pass_end" in r and r["n"] >= oldest})
        for record in log.records:
            inside = "pass_end" in record or any(pass_index >= 0 for pass_index, *_ in record.get("steps", ()))
            if outside_too or inside:
                committed.ids.update(record["flagged"])
        for pass_index, step, ids in log.blocks():
            met += ids
            if outside_too or pass_index >= 0:
                committed.ids.update(ids)
            committed.steps[rank] = max(committed.steps.get(rank, 0), step + 1)
            committed.starts[pass_index] = min(committed.starts.get(pass_index, step), step)
    committed.done = set.intersection(*ended)
    committed.repeated = len(set(met)) < len(met)
    return committed


def reopened_at(manifest: Manifest, rank: int) -> int:
    """Number of a writer's first record after the log was opened for more data, whose passes begin anew; or 0.

    Maintenance that writes new records leaves out the ends of passes that do not count any more.
    """
    last = last_change(manifest)
    return told(last, "records", rank) if last.get("what") == "append" else 0


def reached(path: Path, manifest: Manifest, logs: Sequence[Commits]) -> dict[str, list[int]]:
    """What a line of the history says of each writer: how many records it has, and the number of its next shard."""
    shards = [next_shard(path, manifest, log.rank) for log in logs]
    return {"records": [len(log.records) for log in logs], "shards": shards}


def next_shard(path: Path, manifest: Manifest, rank: int) -> int:
    """The first number that no shard of a writer ever had: a log that is still open knows shards by their names."""
    taken = [int(file.stem.rpartition("-")[2]) + 1 for file in path.glob(f"rows-{rank:05d}-*.safetensors")]
    return max([told(last_change(manifest), "shards", rank), *taken])


def ranks_on_disk(path: Path, manifest: Manifest) -> range:
    """Ranks that have written, also if the run was killed before its manifest counted them."""
    stems = [file.stem.split("-") for file in path.glob("commits-*.jsonl")]
    ranks = [int(stem[1]) for stem in stems if stem[1].isdecimal() and len(stem[1]) < 8]
    return range(max([manifest.world_size, *(rank + 1 for rank in ranks)]))


@contextmanager
def locked(path: Path, remedy: str) -> Iterator[Manifest]:
    """Let nobody else write to a run; yields its manifest as it then is, with all ranks that have written.

    Errors of the operating system then say ``remedy``.
    """
    Manifest.load(path)  # where there is none, nothing failed to be written
    held = 0
    with writing(path, remedy), ExitStack() as locks:
        while True:
            manifest = Manifest.load(path)
            if manifest.sealed is None:  # more ranks may have written than it counts yet
                manifest = replace(manifest, world_size=len(ranks_on_disk(path, manifest)))
            if held == manifest.world_size:
                break
            for rank in range(held, manifest.world_size):
                locks.enter_context(lock(path / lock_name(rank)))
            held = manifest.world_size
        yield manifest


def recover(path: Path, manifest: Manifest, rank: int, *, snapshots: int = 2) -> Commits:
    """Bring one writer's files to the state of its last record, where they match it; its lock must be held.

    Cuts off an unfinished record and uncommitted rows, closes its shards, and deletes shards and snapshots that no
    record names, and commit logs that a killed `delete` or `repair` left; of the snapshots it keeps the last so many.
    """
    log, codec = read_commits(path, manifest, rank), manifest.codec
    ends = {log.shard(number): rows for number, rows in log.shard_ends.items()}
    for shard, rows in ends.items():
        if not shard.is_file() or shard.stat().st_size < SHARD_HEADER + rows * codec.row_bytes:
            raise CorruptLogError(f"{shard} is missing or shorter than its records say: {REPAIR}.")
    if log.rest:
        with open(log.file, "r+b") as handle:
            handle.truncate(len(log.data))
            sync(handle.fileno())
    for shard, rows in ends.items():
        close_shard(shard, rows, codec, manifest.run_id)
    for file in unnamed(path, [log], snapshots):
        if file.stem.split("-")[1] == f"{rank:05d}":  # and not of another writer
            file.unlink()
    sync_folder(path)
    return log
