"""Our single files, by kind, and what a folder or a file holds instead where something else of ours was looked for."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from loghook.errors import ConfigError, CorruptLogError, LoghookError
from loghook.log.disk import write_atomically

FACTORS = "factors.json"
_FILES = {  # by a key of the safetensors header
    "loghook_query": "a saved query: open it with loghook.Query.load",
    "loghook_scores": "saved scores: open them with loghook.Scores.load",
    "loghook_index": "a saved index: open it with log.load_index",
    "loghook_same": "a part of factors: open their folder with loghook.fit(folder, resume=True)",
    "run_id": "a part of a log: open its folder with loghook.load",
}


def holds_factors(path: Path) -> str | None:
    """Say so if a folder has factors, and how they are opened."""
    if not (path / FACTORS).exists():
        return None
    return f"{path} holds factors of loghook.fit, which loghook.fit({str(path)!r}, resume=True) opens"


def no_log(path: Path) -> str:
    """Say what a folder without a manifest and without rows is."""
    if factors := holds_factors(path):
        return f"{factors}: they are no log."
    nothing = f"{path} holds no loghook.json, so it is no loghook run"
    if path.is_dir() and all(file.match("lock-*") for file in path.iterdir()):
        return (
            f"{nothing} yet: check the path. If a run was killed here before its first commit, as in the pass that "
            "fits projection='pca' or 'whitened', start its script again with resume=True."
        )
    return f"{nothing}: check the path."


def save_tensors(path: str | Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file of a kind: tensors, contiguous, and what is said of them as JSON."""
    data = safetensors.torch.save(dict(tensors), {f"loghook_{kind}": json.dumps(header)})
    write_atomically(Path(path), data)


@contextmanager
def loading(path: str | Path, kind: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Read what ``save_tensors`` wrote, (header, tensors); what fails in the block means that the file is none."""
    if Path(path).is_dir():
        is_one = holds_factors(Path(path)) or f"{path} is a folder, which loghook.load opens if it is a log"
        raise ConfigError(f"{is_one}: it is no {kind} file.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[f"loghook_{kind}"])
            yield header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _not_a(kind, path, error) from error


def _not_a(wanted: str, file: str | Path, error: Exception) -> LoghookError:
    """Make the error to raise of a file that was read as ``wanted`` and is something else, or damaged."""
    with suppress(safetensors.SafetensorError):
        with safetensors.safe_open(file, framework="np") as opened:
            keys = opened.metadata() or {}
        for key, kind in _FILES.items():
            if key in keys and wanted not in key:
                return ConfigError(f"{file} is {kind}.")
    return CorruptLogError(f"{file} is no {wanted} file ({error}): save it again.")
