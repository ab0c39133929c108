"""A run's folder: claimed at the start, sealed at the end."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from loghook.errors import ConfigError, LogExistsError, MismatchError, StateError
from loghook.log.disk import lock, writing
from loghook.log.fitted import PROJECTION
from loghook.log.format import MANIFEST, Manifest
from loghook.log.kept import KEPT
from loghook.log.records import Commits, all_commits
from loghook.log.recovery import recover

SEAL_TIMEOUT = 600.0  # seconds that rank 0 waits for the others


def claim(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the run's folder, or say why it cannot be used."""
    if resume and overwrite:
        raise ConfigError("resume=True and overwrite=True exclude each other: keep one.")
    if path.exists() and not path.is_dir():
        raise LogExistsError(f"{path} is a file: choose another path for the run.")
    old = [] if not path.exists() else [p for p in path.iterdir() if p.name == MANIFEST or _is_ours(p)]
    if old and not resume and not overwrite:
        raise LogExistsError(f"{path} holds a run already: pass resume=True, overwrite=True or another path.")
    # Files without a manifest are of a run that was killed before its first block was done: nothing refers to them.
    if overwrite or (old and not (path / MANIFEST).exists()):
        locks = [lock(file) for file in old if file.name.startswith("lock-")]  # nobody may be writing what goes away
        for file in old:
            if not file.name.startswith("lock-"):
                file.unlink()
        for held in locks:
            held.close()
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def _is_ours(file: Path) -> bool:
    kinds = ("rows-*.safetensors", "statistics-*.safetensors", "commits-*.jsonl", "lock-*", "*.tmp", PROJECTION, KEPT)
    return any(file.match(kind) for kind in kinds)


def check_same(old: Manifest, new: Manifest) -> None:
    """Raise unless a resumed run has the arguments and layers of the first one."""
    for name in ("projection", "rank", "seed", "dtype", "id_type", "layers", "fitted"):
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            shown = "other layers or widths than in the log" if name == "layers" else f"{was!r} there and {now!r} now"
            raise MismatchError(f"cannot resume: {name} is {shown}. Use the arguments and the model of the first run.")


def seal(path: Path, manifest: Manifest, session: str, active: int) -> dict[str, Any]:
    """Wait until each of ``active`` ranks has ended this ``session``, then sum up all commit logs.

    A resumed run may count more ranks than write now, and the end that an interrupted run came to does not count.
    """
    for rank in range(active, manifest.world_size):
        with lock(path / f"lock-{rank:05d}"):  # one that does not write now
            recover(path, manifest, rank, snapshots=1)
    deadline = time.monotonic() + SEAL_TIMEOUT
    while True:
        logs = all_commits(path, manifest)
        missing = [r for r in range(active) if not (logs[r].records and logs[r].records[-1].get("end") == session)]
        if not missing:
            return sum_up(logs)
        if time.monotonic() > deadline:
            raise StateError(
                f"ranks {missing} did not finish within {SEAL_TIMEOUT:.0f} s: every rank calls run.finalize(). Their "
                "committed rows are kept; start again with resume=True."
            )
        time.sleep(0.1)


def sum_up(logs: Sequence[Commits]) -> dict[str, Any]:
    """Make the seal of some commit logs, in the order of ranks: {"rows", "digest"}."""
    digest = xxhash.xxh3_128()
    for log in logs:
        digest.update(log.data)
    return {"rows": sum(r.get("rows", 0) for log in logs for r in log.records), "digest": digest.hexdigest()}
