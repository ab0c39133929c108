"""Kronecker factors of layers (Martens and Grosse 2015; George et al. 2018): their eigenbases, and factors on disk."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from loghook.errors import ConfigError, CorruptLogError, MismatchError, StateError, VersionError
from loghook.log.disk import checksum_of, parse_object, replacing, write_atomically
from loghook.log.files import FACTORS
from loghook.log.format import LayerSpec, Layout
from loghook.project.blocks import Factor, cut, each_block

FACTORS_VERSION = 1
_KEYS = ("fisher", "samples", "parameters", "files")  # of a store that are written as they are


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvectors of a layer's two Kronecker factors, float64 unless moved; of wide ones a matrix for each block."""

    inputs: Sequence[Tensor]  # columns are eigenvectors of A = mean over tokens of x x^T
    outputs: Sequence[Tensor]  # and of S = mean over tokens of g g^T
    products: Tensor  # (k_out, k_in) products of eigenvalues, those of S kron A (KFAC)

    @classmethod
    def of(cls, inputs: Factor, outputs: Factor) -> "Eigenbasis":
        return cls(inputs.vectors, outputs.vectors, outputs.values[:, None] * inputs.values)

    @classmethod
    def of_moments(cls, inputs: Tensor, outputs: Tensor) -> "Eigenbasis":
        """Decompose the factors (k_in, k_in) and (k_out, k_out) of a log, whole at any width."""
        return cls.of(*(Factor.of([m]) for m in (inputs, outputs)))

    def to(self, like: Tensor) -> "Eigenbasis":
        """A copy with the device and dtype of a tensor, for rows that are there many times."""
        inputs, outputs = ([q.to(like) for q in side] for side in (self.inputs, self.outputs))
        return Eigenbasis(inputs, outputs, self.products.to(like))

    def rotate(self, rows: Tensor) -> Tensor:
        """Rows (..., k_out, k_in) in the eigenbasis: ``Q_S^T G Q_A``."""
        return _times([q.T for q in self.outputs], rows, self.inputs)

    def rotate_back(self, rows: Tensor) -> Tensor:
        return _times(self.outputs, rows, [q.T for q in self.inputs])


def _times(left: Sequence[Tensor], rows: Tensor, right: Sequence[Tensor]) -> Tensor:
    """``L G R`` of rows (..., k_out, k_in), where L and R are block-diagonal."""
    rows = each_block(lambda part, block: block @ part, rows, left, -2)
    return each_block(torch.matmul, rows, right, -1)


def eigenbasis(layout: Layout, moments: np.ndarray, layer: str) -> Eigenbasis:
    """The eigenbasis of a layer's factors in a log, means over its tokens (one or more)."""
    *sides, count = layout.moments[layer]
    factors = []
    for place in sides:
        width = round((place.stop - place.start) ** 0.5)
        factors.append(torch.from_numpy(moments[place]).view(width, width) / float(moments[count]))
    return Eigenbasis.of_moments(*factors)


@dataclass(kw_only=True)
class FactorStore:
    """Whole-gradient factors in a folder: ``factors.json`` and two safetensors files, committed pass by pass."""

    path: Path  # the folder
    layers: tuple[LayerSpec, ...]  # the layers, whole: k_in and k_out are the full widths
    fisher: str  # "empirical" (the data's labels) or "true" (labels sampled from the model)
    samples: dict[str, int] = field(default_factory=dict)  # {pass: samples that it saw}
    # digest of sampled parameter values in the last pass, or None: they are sharded, or it saw several checkpoints
    parameters: str | None = None
    files: dict[str, str] = field(default_factory=dict)  # {file name: checksum}, for the passes that are done
    segmented: bool = False  # whether blocks had segments, so that a batch does not show how many samples it has

    def save(self) -> None:
        body = {
            "format": "loghook-factors",
            "version": FACTORS_VERSION,
            "layers": [dataclasses.asdict(s) for s in self.layers],
        }
        body |= {key: getattr(self, key) for key in (*_KEYS, "segmented")}
        write_atomically(self.path / FACTORS, json.dumps(body, indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> "FactorStore":
        file = path / FACTORS
        if not file.exists():
            raise FileNotFoundError(f"{path} holds no {FACTORS}: fit one with loghook.fit({str(path)!r}).")
        try:
            body = parse_object(file.read_bytes())
            if body["format"] != "loghook-factors":
                raise ValueError("its format is not 'loghook-factors'")
            if body["version"] != FACTORS_VERSION:
                raise VersionError(
                    f"{file} has version {body['version']!r:.20}, not {FACTORS_VERSION}: upgrade loghook."
                )
            layers = tuple(LayerSpec(**layer) for layer in body["layers"])
            segmented = body.get("segmented", False)  # which earlier ones did not say
            return cls(path=path, layers=layers, segmented=segmented, **{key: body[key] for key in _KEYS})
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
        return f"{kind}.safetensors" in self.files

    def commit(self, kind: str, tensors: Mapping[str, Tensor], samples: int) -> None:
        """Write what a pass found; it counts once ``factors.json`` names it. A tensor that comes twice is kept once."""
        file = self.path / f"{kind}.safetensors"
        first: dict[int, str] = {}
        owners = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
        distinct = {name: tensor.contiguous() for name, tensor in tensors.items() if owners[name] == name}
        with replacing(file) as temporary:
            safetensors.torch.save_file(distinct, temporary, {"loghook_same": json.dumps(owners)})
        self.files[file.name] = checksum_of(file)
        self.samples[kind] = samples
        self.save()

    def check(self, kind: str) -> Path:
        """A pass's file, once its checksum is verified."""
        file = self.path / f"{kind}.safetensors"
        if not self.done(kind):
            raise StateError(f"{self.path} has no {kind} yet: go through its passes() to their end.")
        if not file.is_file() or checksum_of(file) != self.files[file.name]:
            raise CorruptLogError(f"{file} does not match its checksum: restore it from a copy, or fit again.")
        return file

    def factors(self, *, wide: bool = True) -> dict[str, tuple[Factor, Factor]]:
        """Eigendecompositions of each layer's (input, output) second moments; vectors as on disk unless ``wide``."""
        with safetensors.safe_open(os.fspath(self.check("covariance")), framework="pt") as file:
            owners = json.loads(file.metadata()["loghook_same"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if wide:
            tensors = {name: tensor.double() for name, tensor in tensors.items()}

        def factor(name: str) -> Factor:
            values = tensors[owners[name]]
            return Factor(values, [tensors[owners[f"{name}/{i}"]] for i in range(len(cut(len(values))))])

        return {spec.name: (factor(f"{spec.name}/in"), factor(f"{spec.name}/out")) for spec in self.layers}

    @cached_property
    def bases(self) -> dict[str, Eigenbasis]:
        """Each layer's eigenbasis; a pass that is complete is never changed."""
        return {name: Eigenbasis.of(*pair) for name, pair in self.factors(wide=False).items()}

    def eigenvalues(self) -> dict[str, Tensor]:
        """EK-FAC's corrected eigenvalues of each layer, means over samples: (O, I) float32."""
        return safetensors.torch.load_file(self.check("eigenvalues"))


def pack_factors(factors: Mapping[str, tuple[Factor, Factor]]) -> dict[str, Tensor]:
    """Lay out factors for ``commit``, values and vectors as they are."""
    tensors = {}
    for name, pair in factors.items():
        for side, factor in zip(("in", "out"), pair, strict=True):
            tensors[f"{name}/{side}"] = factor.values
            for i, vectors in enumerate(factor.vectors):
                tensors[f"{name}/{side}/{i}"] = vectors
    return tensors


def in_float32(name: str, eigenvalues: Tensor) -> Tensor:
    """Eigenvalues as they are kept; raise where gradients are so large, or small, that none is left of them."""
    kept = eigenvalues.float()
    if not bool(torch.isfinite(kept).all()) or 0 < float(eigenvalues.max()) < 1e-35:
        raise ConfigError(
            f"the eigenvalues of layer {name!r}, up to {float(eigenvalues.max()):.1e}, do not fit in float32: open "
            "blocks with a scale= that brings gradients nearer to 1."
        )
    return kept
