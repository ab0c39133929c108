"""What a folder or a file holds instead, where something else of ours was looked for."""

import contextlib
from pathlib import Path

import safetensors

from loghook.errors import ConfigError, CorruptLogError, LoghookError

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


def not_a(wanted: str, file: str | Path, error: Exception) -> LoghookError:
    """Make the error to raise of a file that was read as ``wanted`` and is something else, or damaged."""
    with contextlib.suppress(safetensors.SafetensorError):
        with safetensors.safe_open(file, framework="np") as opened:
            keys = opened.metadata() or {}
        for key, kind in _FILES.items():
            if key in keys and wanted not in key:
                return ConfigError(f"{file} is {kind}.")
    return CorruptLogError(f"{file} is no {wanted} file ({error}): save it again.")
