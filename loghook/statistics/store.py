"""Whole-gradient EK-FAC factors on disk: ``factors.json`` and two safetensors files, committed pass by pass."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import xxhash
from torch import Tensor

from loghook.errors import CorruptLogError, MismatchError, StateError, VersionError
from loghook.log.disk import sync_folder, write_atomically
from loghook.log.files import FACTORS
from loghook.log.format import LayerSpec, parse_object
from loghook.project.blocks import Factor, cut

VERSION = 1


@dataclass(kw_only=True)
class FactorStore:
    """What was fitted in a folder."""

    path: Path  # the folder
    layers: tuple[LayerSpec, ...]  # the layers, whole: k_in and k_out are the full widths
    fisher: str  # "empirical" (the data's labels) or "true" (labels sampled from the model)
    samples: dict[str, int] = field(default_factory=dict)  # {pass: samples that it saw}
    # digest of sampled parameter values in the last pass, or None: they are sharded, or it saw several checkpoints
    parameters: str | None = None
    files: dict[str, str] = field(default_factory=dict)  # {file name: checksum}, for the passes that are done

    def save(self) -> None:
        """Replace ``factors.json`` atomically."""
        body = {"format": "loghook-factors", "version": VERSION, "layers": [dataclasses.asdict(s) for s in self.layers]}
        body |= {key: getattr(self, key) for key in ("fisher", "samples", "parameters", "files")}
        write_atomically(self.path / FACTORS, json.dumps(body, indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> "FactorStore":
        """Read a folder."""
        file = path / FACTORS
        if not file.exists():
            raise FileNotFoundError(f"{path} holds no {FACTORS}: fit one with loghook.fit({str(path)!r}).")
        try:
            body = parse_object(file.read_bytes())
            if body["format"] != "loghook-factors":
                raise ValueError("its format is not 'loghook-factors'")
            if body["version"] != VERSION:
                raise VersionError(f"{file} has version {body['version']!r:.20}, not {VERSION}: upgrade loghook.")
            layers = tuple(LayerSpec(**layer) for layer in body["layers"])
            keys = ("fisher", "samples", "parameters", "files")
            return cls(path=path, layers=layers, **{key: body[key] for key in keys})
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptLogError(f"{file} is no description of factors ({error}): fit again.") from error

    def check_same(self, layers: tuple[LayerSpec, ...], fisher: str) -> None:
        """Raise unless a resumed fit has the layers and the Fisher of the first one."""
        if (self.layers, self.fisher) != (layers, fisher):
            what = "layers or widths" if self.layers != layers else f"a Fisher ({self.fisher!r})"
            raise MismatchError(
                f"{self.path} was fitted with {what} other than these: use the model and arguments of the first run, "
                "or pass overwrite=True."
            )

    def done(self, kind: str) -> bool:
        """Whether a pass is complete."""
        return f"{kind}.safetensors" in self.files

    def commit(self, kind: str, tensors: Mapping[str, Tensor], samples: int) -> None:
        """Write what a pass found; it counts once ``factors.json`` names it. A tensor that comes twice is kept once."""
        file = self.path / f"{kind}.safetensors"
        temporary = file.with_suffix(".tmp")
        owners: dict[int, str] = {}
        same = {name: owners.setdefault(id(tensor), name) for name, tensor in tensors.items()}
        kept = {name: tensor.contiguous() for name, tensor in tensors.items() if same[name] == name}
        safetensors.torch.save_file(kept, temporary, {"loghook_same": json.dumps(same)})
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
        sync_folder(self.path)
        self.files[file.name] = _checksum(file)
        self.samples[kind] = samples
        self.save()

    def check(self, kind: str) -> Path:
        """Return a pass's file once its checksum is verified."""
        file = self.path / f"{kind}.safetensors"
        if not self.done(kind):
            raise StateError(f"{self.path} has no {kind} yet: go through run.passes() first.")
        if not file.is_file() or _checksum(file) != self.files[file.name]:
            raise CorruptLogError(f"{file} does not match its checksum: restore it from a copy, or fit again.")
        return file

    def factors(self) -> dict[str, tuple[Factor, Factor]]:
        """Eigendecompositions of each layer's (input, output) second moments."""
        found = {}
        with safetensors.safe_open(os.fspath(self.check("covariance")), framework="pt") as file:
            same = json.loads(file.metadata()["loghook_same"])
            kept: dict[str, Tensor] = {}

            def take(name: str) -> Tensor:
                owner = same[name]
                if owner not in kept:
                    kept[owner] = file.get_tensor(owner).double()
                return kept[owner]

            for spec in self.layers:
                pair = []
                for side in ("in", "out"):
                    values = take(f"{spec.name}/{side}")
                    parts = [take(f"{spec.name}/{side}/{i}") for i in range(len(cut(len(values))))]
                    pair.append(Factor(values, parts))
                found[spec.name] = (pair[0], pair[1])
        return found

    def eigenvalues(self) -> dict[str, Tensor]:
        """EK-FAC's corrected eigenvalues of each layer, means over samples: (O, I) float32."""
        return safetensors.torch.load_file(self.check("eigenvalues"))


def pack_factors(factors: Mapping[str, tuple[Factor, Factor]]) -> dict[str, Tensor]:
    """Lay out factors for ``commit``: values in float64, vectors in float32, shared ones once."""
    tensors = {}
    narrow: dict[int, Tensor] = {}
    for name, pair in factors.items():
        for side, factor in zip(("in", "out"), pair, strict=True):
            tensors[f"{name}/{side}"] = factor.values
            for i, vectors in enumerate(factor.vectors):
                tensors[f"{name}/{side}/{i}"] = narrow.setdefault(id(vectors), vectors.float())
    return tensors


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as handle:
        while data := handle.read(1 << 24):
            digest.update(data)
    return digest.hexdigest()
