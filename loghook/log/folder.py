"""A run's folder: claimed at the start, sealed at the end."""

import time
from pathlib import Path
from typing import Any

from loghook.errors import ConfigError, LogExistsError, MismatchError, StateError
from loghook.log.disk import lock, writing
from loghook.log.format import MANIFEST, Manifest
from loghook.log.reader import sum_up

SEAL_TIMEOUT = 600.0  # seconds that rank 0 waits for the others


def claim(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the run's folder, or say why it cannot be used."""
    if resume and overwrite:
        raise ConfigError("resume=True and overwrite=True exclude each other: keep one.")
    if path.exists() and not path.is_dir():
        raise LogExistsError(f"{path} is a file: choose another path for the run.")
    old = [] if not path.exists() else [p for p in path.iterdir() if p.name == MANIFEST or _is_ours(p)]
    if old and not resume and not overwrite:
        raise LogExistsError(
            f"{path} holds a run already: pass resume=True to go on with it, overwrite=True to delete it, or another "
            "path."
        )
    if overwrite:
        locks = [lock(file) for file in old if file.name.startswith("lock-")]  # nobody may be writing what goes away
        for file in old:
            if not file.name.startswith("lock-"):
                file.unlink()
        for held in locks:
            held.close()
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def _is_ours(file: Path) -> bool:
    kinds = ("rows-*.safetensors", "statistics-*.safetensors", "commits-*.jsonl", "lock-*")
    return any(file.match(kind) for kind in kinds)


def check_same(old: Manifest, new: Manifest) -> None:
    """Raise unless a resumed run has the arguments and layers of the first one."""
    for name in ("projection", "rank", "seed", "dtype", "id_type", "layers"):
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            shown = (
                f"{was!r} in the log and {now!r} now" if name != "layers" else "other layers or widths than in the log"
            )
            raise MismatchError(f"cannot resume: {name} is {shown}. Use the arguments and the model of the first run.")


def seal(path: Path, logs: int, active: int) -> dict[str, Any]:
    """Wait for the last record of every active rank, then sum up all commit logs (a resumed run may have more)."""
    deadline = time.monotonic() + SEAL_TIMEOUT
    while True:
        sealed, missing = sum_up(path, logs, active)
        if sealed is not None:
            return sealed
        if time.monotonic() > deadline:
            raise StateError(
                f"ranks {missing} did not finish within {SEAL_TIMEOUT:.0f} s: every rank calls run.finalize(). Their "
                "committed rows are kept; start again with resume=True."
            )
        time.sleep(0.1)
