"""What was computed from the rows of a finished log, kept beside them. It may be deleted at any time."""

import contextlib
import json
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from loghook.log.disk import write_atomically
from loghook.log.format import canonical_json, checksum, parse_object

KEPT = "kept.safetensors"
MOST = 8  # vectors that are kept; the oldest goes


def load_kept(path: Path, seal: str) -> dict[str, np.ndarray]:
    """Read the vectors that belong to a seal, {name: vector}, the oldest first; nothing where anything is wrong."""
    try:
        data = (path / KEPT).read_bytes()
        size = int.from_bytes(data[:8], "little")
        stated = parse_object(parse_object(data[8 : 8 + size])["__metadata__"]["loghook_kept"].encode())
        if stated["seal"] != seal:
            return {}
        found = safetensors.numpy.load(data)
        return {k: found[k] for k, digest in stated["checksums"].items() if checksum(found[k].tobytes()) == digest}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError):
        return {}


def save_kept(path: Path, seal: str, name: str, values: np.ndarray) -> None:
    """Add a vector to those of this seal; where the folder cannot be written nothing is kept."""
    found = load_kept(path, seal)
    found.pop(name, None)
    found[name] = np.ascontiguousarray(values)
    found = dict(list(found.items())[-MOST:])
    stated = {"seal": seal, "checksums": {key: checksum(vector.tobytes()) for key, vector in found.items()}}
    with contextlib.suppress(OSError):
        write_atomically(path / KEPT, safetensors.numpy.save(found, {"loghook_kept": json.dumps(stated)}))


def kept_name(**facts: object) -> str:
    """Name a vector by all that it depends on besides the rows."""
    return canonical_json(facts).decode()
