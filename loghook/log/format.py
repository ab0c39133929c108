"""The log's format, version 3: what the files say and how they are checked (docs/format.md is the specification)."""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from loghook.errors import CorruptLogError, VersionError
from loghook.log.codec import DTYPES, Codec, make_codec
from loghook.log.disk import write_atomically
from loghook.log.kinds import no_log
from loghook.project.outer import GRADIENTS

VERSION = 3  # logs of earlier ones are the same, but for 1-bit rows
MANIFEST = "loghook.json"
SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8",
}  # fmt: skip
SHARD_HEADER = 512  # bytes before the first row, length prefix included: constant, so that a shard can grow


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, so that equal values have equal checksums."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object from a file that anybody may have written.

    Raises:
        ValueError: for anything but an object; also where it is nested too deeply or repeats a key.
    """
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("it repeats a key")
    return dict(pairs)


def checksum(data: bytes | memoryview) -> str:
    """Return the 128-bit XXH3 of some bytes as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What the log knows of a layer."""

    name: str  # canonical module name (wrapper prefixes removed)
    type: str  # the adapter's class name
    in_features: int  # columns of the full gradient without the bias
    out_features: int  # rows of the full gradient
    groups: int  # groups of outputs with inputs of their own
    channels: int  # features of the module's input
    bias: bool  # whether a bias is the last column of the full gradient
    k_in: int  # columns of a logged row
    k_out: int  # rows of a logged row
    activations: str | None = None  # None, or how inputs are reduced over tokens ("mean" or "sum")
    output_gradients: str | None = None  # None, or how output gradients are reduced over tokens
    batch_dim: int = 0  # axis of samples in the module's input
    may_sleep: bool = False  # whether the layer may deliver nothing in a batch
    flattened: bool = False  # whether the module's input has batch and tokens in one axis, batch first

    @property
    def width(self) -> int:
        """Values of this layer's gradient in a row."""
        return self.k_in * self.k_out


def listed(names: Iterable[str], most: int = 8) -> str:
    """Join layers' names for a message: where they are many, alike ones as one pattern."""
    names = list(names)
    if len(names) > most:
        names = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


class Layout:
    """Where each layer's values are in a row, and its moments in the vector of statistics.

    A row is all layers' gradients, one after the other, then activations, then output gradients, so that scoring
    reads one contiguous range. The statistics are, for each layer, the sum of ``x x^T`` (k_in, k_in), the sum of
    ``g g^T`` (k_out, k_out) and the number of tokens summed over.
    """

    def __init__(self, layers: Iterable[LayerSpec]) -> None:
        self.layers = tuple(layers)
        widths = {
            "gradients": {s.name: s.width for s in self.layers},
            "activations": {s.name: s.channels for s in self.layers if s.activations},
            "output_gradients": {s.name: s.out_features for s in self.layers if s.output_gradients},
        }
        end = 0
        self.kinds: dict[str, dict[str, slice]] = {}  # of a row: {kind: {layer name: columns}}
        for kind, sizes in widths.items():
            self.kinds[kind] = {}
            for name, width in sizes.items():
                self.kinds[kind][name] = slice(end, end + width)
                end += width
        self.width = end  # values of a row
        self.gradient_width = sum(widths["gradients"].values())  # those that are gradients: the first ones
        end = 0
        # Of the statistics: {layer name: (the input moment, the output moment, index of the count)}.
        self.moments: dict[str, tuple[slice, slice, int]] = {}
        for spec in self.layers:
            middle, last = end + spec.k_in**2, end + spec.k_in**2 + spec.k_out**2
            self.moments[spec.name] = (slice(end, middle), slice(middle, last), last)
            end = last + 1
        self.moments_width = end

    def codec(self, dtype: str) -> Codec:
        """Return how such rows are stored in a dtype of ``DTYPES``."""
        return make_codec(dtype, [(s.k_out, s.k_in) for s in self.layers], self.width - self.gradient_width)


@dataclass(frozen=True)
class Made:
    """What rows were made with."""

    layers: tuple[LayerSpec, ...]  # in row order
    projection: str
    seed: int
    fitted: str | None = None  # as in ``Manifest``, as is gradient
    gradient: str = "plain"

    @property
    def fingerprint(self) -> str:
        """Digest that a query and a log must share; what is stored beside the gradients plays no part."""
        keys = ("name", "type", "in_features", "out_features", "groups", "bias", "k_in", "k_out")
        shape = [[getattr(layer, key) for key in keys] for layer in self.layers]
        seed = None if self.projection == "none" else self.seed
        body = {"layers": shape, "projection": self.projection, "seed": seed, "scheme": 1}
        if self.fitted is not None:
            body["fitted"] = self.fitted
        if self.gradient != "plain":
            body["gradient"] = self.gradient
        return checksum(json.dumps(body).encode())


@dataclass(kw_only=True)
class Manifest:
    """``loghook.json``: everything about a run but its rows."""

    run_id: str  # 32 hexadecimal digits drawn at birth; every shard and commit log names it
    projection: str  # "random", "pca", "whitened" or "none"
    rank: int | dict[str, int]  # the rank asked for, of all layers or by fnmatch pattern of names, the first that fits
    seed: int  # the projection's seed
    dtype: str  # how rows are stored
    layers: tuple[LayerSpec, ...]  # layers in row order
    # {"covered": parameters, "total": parameters, "not_covered": [{"name", "parameters", "reason"}]}
    coverage: dict[str, Any]
    id_type: str  # "int" or "str"
    # the rule for ids that come again: "error", "first", "all", or None: "first" for rows logged inside ``passes()``
    # and "all" for others
    on_repeat: str | None
    world_size: int  # number of commit logs
    # which commit logs count; maintenance (``repair``, ``delete``) writes new ones and then raises it
    generation: int = 0
    # what was done to the log since: [{"what", "when", ...}]
    history: list[dict[str, Any]] = field(default_factory=list)
    # None, or why the statistics are not those of the rows, so that kfac and ekfac refuse
    no_statistics: str | None = None
    # versions, time and machine, for people; nothing depends on it
    provenance: dict[str, Any] = field(default_factory=dict)
    # digests of sampled parameter values at the first block and at ``finalize``
    parameters: dict[str, str | None] = field(default_factory=dict)
    sealed: dict[str, Any] | None = None  # None while a run goes on; then {"rows", "digest"} over all commit logs
    fitted: str | None = None  # None, or the checksum of ``projection.safetensors``, which holds a fitted projection
    # None, or what ``loghook.tune`` measured: {"pearson", "reference", "samples", "queries", "scoring"}
    fidelity: dict[str, Any] | None = None
    gradient: str = "plain"  # what rows are of: "plain", "normalized" or "adam"
    version: int = VERSION  # the format's version

    @property
    def codec(self) -> Codec:
        """How rows lie in a shard."""
        return Layout(self.layers).codec(self.dtype)

    @property
    def made(self) -> Made:
        """What the rows were made with."""
        return Made(self.layers, self.projection, self.seed, self.fitted, self.gradient)

    @property
    def fingerprint(self) -> str:
        """Digest of what makes rows comparable: layers, k's and the projection; not the storage dtype."""
        return self.made.fingerprint

    def save(self, path: Path) -> None:
        """Replace the run's manifest atomically."""
        write_atomically(path / MANIFEST, self.encode())

    def encode(self) -> bytes:
        """Return the bytes of ``loghook.json``."""
        body = {"format": "loghook", "fingerprint": self.fingerprint} | dataclasses.asdict(self)
        # As in files that were written before there were these fields.
        for key, absent in (("fitted", None), ("fidelity", None), ("gradient", "plain")):
            if body[key] == absent:
                del body[key]
        body["checksum"] = checksum(canonical_json(body))
        return json.dumps(body, indent=1).encode()

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read and check a run's manifest.

        Raises:
            FileNotFoundError: if ``path`` holds no run.
            VersionError: if a later format wrote it.
            CorruptLogError: if it is not a manifest, or does not match its own checksum and fingerprint.
        """
        file = path / MANIFEST
        if not file.exists():
            if any(path.glob("rows-*.safetensors")):
                raise CorruptLogError(f"{file} is missing, though there are rows: restore it from a copy.")
            raise FileNotFoundError(no_log(path))
        try:
            data = file.read_bytes()
            body = parse_object(data)
            if body["format"] != "loghook":
                raise ValueError("its format is not 'loghook'")
            if type(body["version"]) is not int or body["version"] < 1:
                raise ValueError(f"its version is {body['version']!r:.100}")
            if body["version"] > VERSION:
                raise VersionError(f"{file}: version {body['version']}; this reads up to {VERSION}: upgrade loghook.")
            if body["version"] < VERSION and body.get("dtype") == "int1":
                raise VersionError(
                    f"{file}: 1-bit rows of version {body['version']} are not signs of the same values as now: make "
                    "them anew, with `loghook compress` from a log of more bits, or by logging."
                )
            fields = {k: v for k, v in body.items() if k not in ("format", "fingerprint", "checksum")}
            fields["layers"] = tuple(LayerSpec(**layer) for layer in body["layers"])
            manifest = cls(**fields)
            _check_manifest(manifest)
            # Byte for byte: also a space in the wrong place means that something wrote here that is not loghook.
            if manifest.encode() != data:
                raise ValueError("it does not match its own checksum or fingerprint")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise CorruptLogError(f"{file} is not a valid manifest ({error}): restore it from a copy.") from error
        return manifest


def _check_manifest(manifest: Manifest) -> None:
    """Raise ValueError unless every field has its type and a value that the format allows."""
    things: tuple[Manifest | LayerSpec, ...] = (manifest, *manifest.layers)
    for thing in things:
        for entry in dataclasses.fields(thing):
            value, stated = getattr(thing, entry.name), str(getattr(entry.type, "__name__", entry.type))
            allowed = [kind.strip().partition("[")[0] for kind in str(entry.type).split("|")]
            known = "None" if value is None else type(value).__name__
            if known not in allowed and known != stated:
                raise ValueError(f"{entry.name} is {value!r:.100}, which is no {stated}")
    m, coverage = manifest, manifest.coverage
    ranks = m.rank.values() if isinstance(m.rank, dict) else [m.rank]
    sealed = m.sealed is None or (type(m.sealed["rows"]) is int and type(m.sealed["digest"]) is str)
    counted = type(coverage["covered"]) is type(coverage["total"]) is int
    rules = (
        (re.fullmatch("[0-9a-f]{32}", m.run_id), f"run_id {m.run_id!r:.100} is not 32 hexadecimal digits"),
        (m.dtype in DTYPES, f"dtype {m.dtype!r:.100} is none of {', '.join(DTYPES)}"),
        (m.id_type in ("int", "str"), f"id_type {m.id_type!r:.100} is neither 'int' nor 'str'"),
        (m.on_repeat in (None, "first", "all", "error"), f"on_repeat {m.on_repeat!r:.100} is unknown"),
        (m.gradient in GRADIENTS, f"gradient {m.gradient!r:.100} is none of {', '.join(GRADIENTS)}"),
        (1 <= m.world_size <= 1_000_000, f"world_size {m.world_size} is out of range"),
        (0 <= m.generation < 1 << 40, f"generation {m.generation} is out of range"),
        (sealed, f"its seal is {m.sealed!r:.100}"),
        (all(type(k) is int for k in ranks), f"its rank is {m.rank!r:.100}"),
        (counted and type(coverage["not_covered"]) is list, f"its coverage is {coverage!r:.100}"),
        (all(isinstance(v, str | None) for v in m.parameters.values()), f"its parameters are {m.parameters!r:.100}"),
        (m.layers and len({x.name for x in m.layers}) == len(m.layers), "it has no layers, or two of the same name"),
    )
    for good, wrong in rules:
        if not good:
            raise ValueError(wrong)
    for layer in manifest.layers:
        sizes = (layer.in_features, layer.out_features, layer.groups, layer.k_in, layer.k_out)
        if not all(1 <= n < 1 << 40 for n in sizes) or not 0 <= layer.channels < 1 << 40:
            raise ValueError(f"layer {layer.name!r:.100} has sizes {sizes}")
        if layer.k_in > layer.in_features + layer.bias or layer.k_out > layer.out_features:
            raise ValueError(f"layer {layer.name!r:.100} has a rank above its width")


def shard_name(rank: int, index: int) -> str:
    """File name of a writer's shard."""
    return f"rows-{rank:05d}-{index:05d}.safetensors"


def commits_name(rank: int, generation: int = 0) -> str:
    """File name of a writer's commit log; maintenance writes a new generation beside the old one."""
    return f"commits-{rank:05d}.jsonl" if generation == 0 else f"commits-{rank:05d}-{generation:05d}.jsonl"


def statistics_name(rank: int, sequence: int) -> str:
    """File name of the statistics as they were at a commit."""
    return f"statistics-{rank:05d}-{sequence:08d}.safetensors"


def shard_header(rows: int, codec: Codec, run_id: str) -> bytes:
    """Return the padded safetensors header of a shard with so many rows: always SHARD_HEADER bytes."""
    entry = {
        "dtype": SAFETENSORS_DTYPES[codec.stored],
        "shape": [rows, codec.columns],
        "data_offsets": [0, rows * codec.row_bytes],
    }
    text = json.dumps({"__metadata__": {"run_id": run_id}, "rows": entry}).encode()
    return (SHARD_HEADER - 8).to_bytes(8, "little") + text.ljust(SHARD_HEADER - 8)
