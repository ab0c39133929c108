"""The log's format, version 1: what the files say and how they are checked (docs/format.md is the specification)."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from loghook.errors import CorruptLogError, VersionError
from loghook.log.disk import write_atomically

VERSION = 1
MANIFEST = "loghook.json"
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SAFETENSORS_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_HEADER = 512  # bytes before the first row, length prefix included: constant, so that a shard can grow


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, so that equal values have equal checksums."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def checksum(data: bytes | memoryview) -> str:
    """Return the 128-bit XXH3 of some bytes as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What the log knows of a layer.

    Attributes:
        name: canonical module name (wrapper prefixes removed).
        type: the adapter's class name.
        in_features: columns of the full gradient without the bias.
        out_features: rows of the full gradient.
        groups: groups of outputs with inputs of their own.
        channels: features of the module's input.
        bias: whether a bias is the last column of the full gradient.
        k_in: columns of a logged row.
        k_out: rows of a logged row.
        activations: None, or how inputs are reduced over tokens ("mean" or "sum").
        output_gradients: None, or how output gradients are reduced over tokens.
        batch_dim: axis of samples in the module's input.
        may_sleep: whether the layer may deliver nothing in a batch.
        flattened: whether the module's input has batch and tokens in one axis, batch first.
    """

    name: str
    type: str
    in_features: int
    out_features: int
    groups: int
    channels: int
    bias: bool
    k_in: int
    k_out: int
    activations: str | None = None
    output_gradients: str | None = None
    batch_dim: int = 0
    may_sleep: bool = False
    flattened: bool = False

    @property
    def width(self) -> int:
        """Values of this layer's gradient in a row."""
        return self.k_in * self.k_out


class Layout:
    """Where each layer's values are in a row, and its moments in the vector of statistics.

    A row is all layers' gradients, one after the other, then activations, then output gradients, so that scoring
    reads one contiguous range. The statistics are, for each layer, the sum of ``x x^T`` (k_in, k_in), the sum of
    ``g g^T`` (k_out, k_out) and the number of tokens summed over.

    Attributes:
        layers: the layers in order.
        kinds: {"gradients" | "activations" | "output_gradients": {layer name: slice of a row}}.
        gradient_width: values of a row that are gradients: the first ones.
        width: values of a row.
        moments: {layer name: (slice of the input moment, slice of the output moment, index of the count)}.
        moments_width: length of the vector of statistics.
    """

    def __init__(self, layers: Iterable[LayerSpec]) -> None:
        self.layers = tuple(layers)
        widths = {
            "gradients": {s.name: s.width for s in self.layers},
            "activations": {s.name: s.channels for s in self.layers if s.activations},
            "output_gradients": {s.name: s.out_features for s in self.layers if s.output_gradients},
        }
        end = 0
        self.kinds: dict[str, dict[str, slice]] = {}
        for kind, sizes in widths.items():
            self.kinds[kind] = {}
            for name, width in sizes.items():
                self.kinds[kind][name] = slice(end, end + width)
                end += width
        self.width = end
        self.gradient_width = sum(widths["gradients"].values())
        end = 0
        self.moments: dict[str, tuple[slice, slice, int]] = {}
        for spec in self.layers:
            middle, last = end + spec.k_in**2, end + spec.k_in**2 + spec.k_out**2
            self.moments[spec.name] = (slice(end, middle), slice(middle, last), last)
            end = last + 1
        self.moments_width = end


@dataclass(kw_only=True)
class Manifest:
    """``loghook.json``: everything about a run but its rows.

    Attributes:
        run_id: 32 hexadecimal digits drawn at birth; every shard and commit log names it.
        projection: "random" or "none".
        rank: the rank asked for.
        seed: the projection's seed.
        dtype: how rows are stored.
        layers: layers in row order.
        coverage: {"covered": parameters, "total": parameters, "not_covered": [{"name", "parameters", "reason"}]}.
        id_type: "int" or "str".
        on_repeat: the rule for ids that come again: "error", "first", "all", or None: "first" for rows logged inside
            ``passes()`` and "all" for others.
        world_size: number of commit logs.
        provenance: versions, time and machine, for people; nothing depends on it.
        parameters: digests of sampled parameter values at the first block and at ``finalize``.
        sealed: None while a run goes on; then {"rows", "digest"} over all commit logs.
        version: the format's version.
    """

    run_id: str
    projection: str
    rank: int
    seed: int
    dtype: str
    layers: tuple[LayerSpec, ...]
    coverage: dict[str, Any]
    id_type: str
    on_repeat: str | None
    world_size: int
    provenance: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, str | None] = field(default_factory=dict)
    sealed: dict[str, Any] | None = None
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        """Digest of what makes rows comparable: layers, k's and the projection; not the storage dtype."""
        return fingerprint(self.layers, self.projection, self.seed)

    def save(self, path: Path) -> None:
        """Replace the run's manifest atomically."""
        body = {"format": "loghook", "fingerprint": self.fingerprint} | dataclasses.asdict(self)
        body["checksum"] = checksum(canonical_json(body))
        write_atomically(path / MANIFEST, json.dumps(body, indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read and check a run's manifest.

        Raises:
            FileNotFoundError: if ``path`` holds no run.
            VersionError: if a later format wrote it.
            CorruptLogError: if it is not a manifest, or does not match its own fingerprint.
        """
        file = path / MANIFEST
        if not file.exists():
            raise FileNotFoundError(f"{path} holds no {MANIFEST}, so it is no loghook run: check the path.")
        try:
            body = json.loads(file.read_bytes())
            if body.pop("format") != "loghook":
                raise ValueError("its format is not 'loghook'")
            if body["version"] > VERSION:
                raise VersionError(
                    f"{file} has format version {body['version']}; this loghook reads up to {VERSION}: upgrade loghook."
                )
            stated = body.pop("checksum")
            if checksum(canonical_json({"format": "loghook"} | body)) != stated:
                raise ValueError(f"it does not match its own checksum {stated}")
            body.pop("fingerprint")
            body["layers"] = tuple(LayerSpec(**layer) for layer in body["layers"])
            manifest = cls(**body)
            _check_manifest(manifest)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptLogError(f"{file} is not a valid manifest ({error}): restore it from a copy.") from error
        return manifest


def _check_manifest(manifest: Manifest) -> None:
    if manifest.dtype not in DTYPES:
        raise ValueError(f"dtype {manifest.dtype!r} is none of {', '.join(DTYPES)}")
    if manifest.id_type not in ("int", "str"):
        raise ValueError(f"id_type {manifest.id_type!r} is neither 'int' nor 'str'")
    if not 1 <= manifest.world_size <= 1_000_000:
        raise ValueError(f"world_size {manifest.world_size} is out of range")
    for layer in manifest.layers:
        sizes = (layer.in_features, layer.out_features, layer.groups, layer.k_in, layer.k_out)
        if not all(isinstance(n, int) and 1 <= n < 1 << 40 for n in sizes):
            raise ValueError(f"layer {layer.name!r} has sizes {sizes}")
        if layer.k_in > layer.in_features + layer.bias or layer.k_out > layer.out_features:
            raise ValueError(f"layer {layer.name!r} has a rank above its width")


def fingerprint(layers: Sequence[LayerSpec], projection: str, seed: int) -> str:
    """Digest that a query and a log must share; what is stored beside the gradients plays no part."""
    keys = ("name", "type", "in_features", "out_features", "groups", "bias", "k_in", "k_out")
    shape = [[getattr(layer, key) for key in keys] for layer in layers]
    body = {"layers": shape, "projection": projection, "seed": None if projection == "none" else seed, "scheme": 1}
    return checksum(json.dumps(body).encode())


def shard_name(rank: int, index: int) -> str:
    """File name of a writer's shard."""
    return f"rows-{rank:05d}-{index:05d}.safetensors"


def commits_name(rank: int) -> str:
    """File name of a writer's commit log."""
    return f"commits-{rank:05d}.jsonl"


def statistics_name(rank: int, sequence: int) -> str:
    """File name of the statistics as they were at a commit."""
    return f"statistics-{rank:05d}-{sequence:08d}.safetensors"


def shard_header(rows: int, width: int, dtype: str, run_id: str) -> bytes:
    """Return the padded safetensors header of a shard with so many rows: always SHARD_HEADER bytes."""
    size = rows * width * DTYPES[dtype].itemsize
    entry = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": [rows, width], "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {"run_id": run_id}, "rows": entry}).encode()
    return (SHARD_HEADER - 8).to_bytes(8, "little") + text.ljust(SHARD_HEADER - 8)


def encode_record(record: dict[str, Any]) -> bytes:
    """One line of a commit log: length, checksum, JSON. A line that does not match both is not committed."""
    body = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s %s\n" % (len(body), checksum(body).encode(), body)


def decode_records(data: bytes) -> tuple[list[dict[str, Any]], int, str | None]:
    """Read the lines of a commit log.

    Returns:
        The records, the number of bytes they take, and what is wrong with the bytes after them: None if nothing
        follows, "torn" for an incomplete last line, or a description of a damaged line.
    """
    records: list[dict[str, Any]] = []
    position = 0
    while position < len(data):
        end = data.find(b"\n", position)
        if end < 0:
            return records, position, "torn"
        line = data[position:end]
        body = line[42:]
        if line[:42] != b"%08x %s " % (len(body), checksum(body).encode()):
            return records, position, f"record {len(records)} is damaged"
        record = json.loads(body)
        if record.get("n") != len(records):
            return records, position, f"record {len(records)} is missing"
        records.append(record)
        position = end + 1
    return records, position, None
