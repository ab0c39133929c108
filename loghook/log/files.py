"""Single safetensors files: saved queries, scores and indexes, and what stands beside a run's rows.

Those beside the rows are snapshots of the streamed statistics, one for each commit; a fitted projection, named and
checksummed by the manifest; and what was computed from the rows of a finished log, which may be deleted at any time.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from loghook.errors import ConfigError, CorruptLogError
from loghook.log.disk import (
    absolute,
    canonical_json,
    checksum,
    parse_object,
    sync_folder,
    write_atomically,
    write_flushed,
    writing,
)
from loghook.project.projection import Side

FACTORS = "factors.json"
KEPT = "kept.safetensors"
MOST = 8  # vectors that are kept; the oldest goes
PROJECTION = "projection.safetensors"
Sides = Mapping[str, tuple[Side, Side]]
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
    no_run = f"{path} holds no loghook.json, so it is no loghook run"
    if path.is_dir() and all(file.match("lock-*") for file in path.iterdir()):
        return f"{no_run} yet: check the path. If a run was killed here, start its script again with resume=True."
    return f"{no_run}: check the path."


def save_tensors(path: Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Write a file of a kind: contiguous tensors, and what is said of them as JSON; returns its checksum."""
    data = safetensors.torch.save(dict(tensors), {f"loghook_{kind}": json.dumps(header)})
    write_atomically(path, data)
    return checksum(data)


def save_checked(path: str | Path, kind: str, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file that has its checksum in itself, for ``loading``."""
    text = json.dumps(header | {"checksum": _digest(header, tensors)})
    write_file(path, safetensors.torch.save(dict(tensors), {f"loghook_{kind}": text}))


def place_of(path: str | Path) -> Path:
    """Where the user wants a file; ConfigError where there cannot be one."""
    path = absolute(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: it is a folder, or its folder is not there.")
    return path


def write_file(path: str | Path, data: bytes) -> None:
    path = place_of(path)
    with writing(path, "Make room, or name a file in another folder, and save again."):
        write_atomically(path, data)


def _digest(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Checksum of what is said, and of every tensor's name, dtype, shape and bytes."""
    parts = [
        [name, str(tensor.dtype), list(tensor.shape), checksum(tensor.reshape(-1).view(torch.uint8).numpy().data)]
        for name, tensor in sorted(tensors.items())
    ]
    return checksum(canonical_json([header, *parts]))


@contextlib.contextmanager
def loading(path: str | Path, kind: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Read what ``save_checked`` wrote, (header, tensors); what fails in the block means that the file is none."""
    path = absolute(path)
    if path.is_dir():
        folder = holds_factors(path) or f"{path} is a folder, which loghook.load opens if it is a log"
        raise ConfigError(f"{folder}: it is no {kind} file.")
    metadata: Mapping[str, str] = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata[f"loghook_{kind}"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if header.pop("checksum") != _digest(header, tensors):
                raise ValueError("it does not match its checksum")
            yield header, tensors
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        for key, description in _FILES.items():
            if key in metadata and kind not in key:
                raise ConfigError(f"{path} is {description}.") from error
        raise CorruptLogError(f"{path} is no {kind} file ({error}): save it again.") from error


@contextlib.contextmanager
def _reading(file: Path, expected: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Read (metadata, tensors) of a part of a run; what fails in the block means that it is damaged."""
    try:
        data = file.read_bytes()
        if checksum(data) != expected:
            raise ValueError("it does not match its checksum")
        yield _parsed(data)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CorruptLogError(f"{file} cannot be read ({error}): restore it from a copy.") from error


def _parsed(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = parse_object(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header["__metadata__"], safetensors.torch.load(data)


def save_moments(file: Path, moments: np.ndarray, run_id: str) -> dict[str, str]:
    """Write and flush a snapshot; returns what its record says of it: {"file", "checksum"}."""
    data = safetensors.torch.save({"moments": torch.from_numpy(moments)}, {"run_id": run_id})
    write_flushed(file, data)
    sync_folder(file.parent)
    return {"file": file.name, "checksum": checksum(data)}


def load_moments(path: Path, entry: dict[str, str], width: int) -> np.ndarray:
    """Read and check a statistics snapshot that a record names: (width,) float64."""
    with _reading(path / Path(entry["file"]).name, entry["checksum"]) as (_, tensors):
        moments = tensors["moments"].numpy()
        if moments.shape != (width,):
            raise ValueError(f"it holds {moments.shape} values where the layers need ({width},)")
        return moments


def save_sides(folder: Path, sides: Sides) -> str:
    """Write {layer: (input side, output side)}; equal matrices are stored once. Returns the file's checksum."""
    tensors: dict[str, Tensor] = {}
    header: dict[str, list[list[object]]] = {}  # {layer: [name of the tensor or None, width, gain] of each side}
    names: dict[str, str] = {}  # {checksum of a matrix: name of the tensor}
    for layer, pair in sides.items():
        header[layer] = []
        for kind, side in zip(("in", "out"), pair, strict=True):
            name = None
            if side.matrix is not None:
                matrix = side.matrix.float().contiguous()
                name = names.setdefault(checksum(matrix.numpy().tobytes()), f"{layer}/{kind}")
                tensors.setdefault(name, matrix)
            header[layer].append([name, side.width, side.gain])
    return save_tensors(folder / PROJECTION, "projection", header, tensors)


def load_sides(folder: Path, expected: str) -> dict[str, tuple[Side, Side]]:
    """Read what ``save_sides`` wrote; layers whose matrix is stored once share the ``Side``."""

    @cache
    def side(name: str | None, width: int, gain: float) -> Side:
        return Side(int(width), None if name is None else tensors[name].float(), float(gain))

    with _reading(folder / PROJECTION, expected) as (metadata, tensors):
        header = json.loads(metadata["loghook_projection"])
        return {str(layer): (side(*into), side(*out)) for layer, (into, out) in header.items()}


def load_kept(path: Path, seal: str) -> dict[str, np.ndarray]:
    """Read the vectors that belong to a seal, {name: vector}, the oldest first; nothing where anything is wrong."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError):
        metadata, tensors = _parsed((path / KEPT).read_bytes())
        header = parse_object(metadata["loghook_kept"].encode())
        if header["seal"] == seal:
            vectors = {name: tensors[name].numpy() for name in header["checksums"]}
            return {k: v for k, v in vectors.items() if checksum(v.tobytes()) == header["checksums"][k]}
    return {}


def save_kept(path: Path, seal: str, name: str, values: np.ndarray) -> None:
    """Add a vector to those of this seal; where the folder cannot be written nothing is kept."""
    vectors = load_kept(path, seal)
    vectors.pop(name, None)
    vectors = dict([*vectors.items(), (name, np.ascontiguousarray(values))][-MOST:])
    header = {"seal": seal, "checksums": {key: checksum(vector.tobytes()) for key, vector in vectors.items()}}
    with contextlib.suppress(OSError):
        save_tensors(path / KEPT, "kept", header, {key: torch.from_numpy(vector) for key, vector in vectors.items()})
