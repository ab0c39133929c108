"""Fitted projections on disk: one safetensors file in a run's folder, named and checksummed by the manifest."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from loghook.errors import CorruptLogError
from loghook.log.disk import write_atomically
from loghook.log.format import checksum
from loghook.project.projection import Side

PROJECTION = "projection.safetensors"
Sides = Mapping[str, tuple[Side, Side]]


def save_sides(folder: Path, sides: Sides) -> str:
    """Write {layer: (input side, output side)}; equal matrices are stored once. Returns the file's checksum."""
    tensors: dict[str, Tensor] = {}
    places: dict[str, list[list[object]]] = {}
    known: dict[str, str] = {}
    for layer, pair in sides.items():
        places[layer] = []
        for kind, side in zip(("in", "out"), pair, strict=True):
            key = None
            if side.matrix is not None:
                values = side.matrix.float().contiguous()
                digest = checksum(values.numpy().tobytes())
                key = known.setdefault(digest, f"{layer}/{kind}")
                tensors.setdefault(key, values)
            places[layer].append([key, side.width, side.gain])
    data = safetensors.torch.save(tensors, {"loghook_projection": json.dumps(places, sort_keys=True)})
    write_atomically(folder / PROJECTION, data)
    return checksum(data)


def load_sides(folder: Path, expected: str) -> dict[str, tuple[Side, Side]]:
    """Read what ``save_sides`` wrote; layers whose matrix is stored once share the ``Side``."""
    file = folder / PROJECTION
    try:
        data = file.read_bytes()
        if checksum(data) != expected:
            raise ValueError("it does not match the checksum in the manifest")
        with safetensors.safe_open(os.fspath(file), framework="pt") as opened:
            places = json.loads(opened.metadata()["loghook_projection"])
        tensors = safetensors.torch.load(data)
        known: dict[tuple[object, ...], Side] = {}
        sides = {}
        for layer, pair in places.items():
            found = []
            for key, width, gain in pair:
                fresh = Side(int(width), None if key is None else tensors[key].to(torch.float32), float(gain))
                found.append(fresh if key is None else known.setdefault((key, width, gain), fresh))
            sides[str(layer)] = (found[0], found[1])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CorruptLogError(f"{file} cannot be used ({error}): restore it from a copy.") from error
    return sides
