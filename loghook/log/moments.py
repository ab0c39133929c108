"""Snapshots of the streamed statistics: one small safetensors file for each commit."""

from pathlib import Path

import numpy as np
import safetensors.numpy

from loghook.errors import CorruptLogError
from loghook.log.disk import sync_folder, write_flushed
from loghook.log.format import checksum


def save_moments(file: Path, moments: np.ndarray, run_id: str) -> dict[str, str]:
    """Write and flush a snapshot; returns what its record says of it: {"file", "checksum"}."""
    data = safetensors.numpy.save({"moments": moments}, {"run_id": run_id})
    write_flushed(file, data)
    sync_folder(file.parent)
    return {"file": file.name, "checksum": checksum(data)}


def load_moments(path: Path, entry: dict[str, str], width: int) -> np.ndarray:
    """Read and check a statistics snapshot that a record names: (width,) float64."""
    file = path / Path(entry["file"]).name
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CorruptLogError(f"{file} cannot be read ({error}): restore it from a copy.") from error
    if checksum(data) != entry["checksum"]:
        raise CorruptLogError(f"{file} does not match the checksum in its record: restore it from a copy.")
    moments = safetensors.numpy.load(data)["moments"]
    if moments.shape != (width,):
        raise CorruptLogError(f"{file} holds {moments.shape} values where the layers need ({width},).")
    return moments.copy()
