"""The log's format, version 3: what the files say and how they are checked (docs/format.md is the specification)."""

import dataclasses
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from loghook.arguments import choose
from loghook.errors import ConfigError, CorruptLogError, LoghookError, VersionError
from loghook.log.codec import DTYPES, Codec, make_codec
from loghook.log.disk import canonical_json, checksum, parse_object, write_atomically
from loghook.log.files import Sides, no_log
from loghook.project.outer import GRADIENTS
from loghook.project.projection import Side, draw_side, shared_input_name

VERSION = 3
ON_REPEAT = (None, "error", "first", "all")  # what happens to a data_id that comes again
MANIFEST = "loghook.json"
OVERWRITTEN = f"{MANIFEST}.old"  # that of a run which is being deleted


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
    def widths(self) -> tuple[int, int]:
        """Rows and columns of the full gradient, of which k_out and k_in are what is left."""
        return self.out_features, self.in_features + self.bias

    @property
    def width(self) -> int:
        """Values of its gradient in a row."""
        return self.k_in * self.k_out


def fits(name: str, pattern: str) -> bool:
    """Whether a layer is meant by a name or an fnmatch pattern; a name may hold ``[`` and mean itself."""
    return name == pattern or fnmatchcase(name, pattern)


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Layers whose names differ in numbers only: {pattern: names}."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return groups


def listed(names: Iterable[str], most: int = 8) -> str:
    """Join layers' names for a message: where they are many, alike ones as one pattern."""
    names = list(names)
    if len(names) > most:
        names = list(grouped(names))
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def patterns(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Patterns that fit these of the layers ``among`` and no others: ``layers.*.fc1``, or ``layers.0.fc1``."""
    named = dict.fromkeys(names)
    pattern_of = {name: re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in (*named, *among)}
    shared = {pattern for name, pattern in pattern_of.items() if name not in named}
    return list(dict.fromkeys(name if pattern_of[name] in shared else pattern_of[name] for name in named))


def draw_sides(layers: Iterable[LayerSpec], kind: str, seed: int) -> Sides:
    """Draw layers' projections, {layer: (input side, output side)}; siblings that read one input share its side."""

    @cache
    def draw(name: str, side: str, width: int, k: int) -> Side:
        return draw_side(kind, seed=seed, name=name, side=side, width=width, rank=k)

    return {
        s.name: (draw(shared_input_name(s.name), "in", s.widths[1], s.k_in), draw(s.name, "out", s.widths[0], s.k_out))
        for s in layers
    }


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
        self.kinds: dict[str, dict[str, slice]] = {kind: {} for kind in widths}  # of a row: {layer name: columns}
        for kind, sizes in widths.items():
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

    @property
    def columns(self) -> dict[str, slice]:
        """Where each layer's gradient is in a row."""
        return self.kinds["gradients"]

    def find(self, layer: str, kind: str = "gradients") -> tuple[LayerSpec, slice]:
        """A layer's spec and its columns of a row, for one kind of rows."""
        choose("kind", kind, tuple(self.kinds))
        specs = {spec.name: spec for spec in self.layers}
        if layer not in specs:
            raise ConfigError(f"layer {layer!r} is not in the log; its layers are {listed(specs)}.")
        if layer not in self.kinds[kind]:
            raise ConfigError(f"layer {layer!r} was logged without {kind}: pass watch(..., {kind}='mean').")
        return specs[layer], self.kinds[kind][layer]

    def codec(self, dtype: str) -> Codec:
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


SEVERAL = "several"  # in place of a digest: rows of several parameter values, as of merged runs


def differ(one: str | None, other: str | None) -> bool:
    """Whether two digests are known to be of other parameter values, or of other moments where both name those."""
    return any(a != b for a, b in zip((one or "").split("-"), (other or "").split("-"), strict=False) if a and b)


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
    # digests of sampled parameter values, and moments, at the first block and at ``finalize``
    parameters: dict[str, str | None] = field(default_factory=dict)
    sealed: dict[str, Any] | None = None  # None while a run goes on; then {"rows", "digest"} over all commit logs
    fitted: str | None = None  # None, or the checksum of ``projection.safetensors``, which holds a fitted projection
    # None, or what ``loghook.tune`` measured: {"pearson", "reference", "samples", "queries", "scoring"}
    fidelity: dict[str, Any] | None = None
    gradient: str = "plain"  # what rows are of: "plain", "normalized" or "adam"
    whitening: float | None = None  # the damping of a whitened projection
    version: int = VERSION  # the format's version

    def superseded(self, path: Path) -> bool:
        """Whether the run at ``path`` is another one now, or maintenance has changed what this says of its rows."""
        with suppress(LoghookError, OSError):
            current = Manifest.load(path)
            same = (current.run_id, current.generation) == (self.run_id, self.generation)
            return not same or (self.sealed is not None and current.sealed != self.sealed)
        return False

    def __post_init__(self) -> None:
        """Check it, so that nothing is written that cannot be read; ValueError."""
        _check_types(self, *self.layers)
        _check_values(self)

    @property
    def codec(self) -> Codec:
        return Layout(self.layers).codec(self.dtype)

    @property
    def made(self) -> Made:
        return Made(self.layers, self.projection, self.seed, self.fitted, self.gradient)

    @property
    def fingerprint(self) -> str:
        """Of what makes rows comparable: layers, k's and the projection; not the storage dtype."""
        return self.made.fingerprint

    @property
    def values(self) -> str | None:
        """Digest of the sampled values that the rows ended with, if it is known; see ``differ``."""
        return self.parameters.get("last") or self.parameters.get("first")

    def save(self, path: Path) -> None:
        write_atomically(path / MANIFEST, self.encode())

    def encode(self) -> bytes:
        """Return the bytes of ``loghook.json``; it has the last fields only where they say something."""
        body = {"format": "loghook", "fingerprint": self.fingerprint} | dataclasses.asdict(self)
        for key, absent in (("fitted", None), ("fidelity", None), ("gradient", "plain"), ("whitening", None)):
            if body[key] == absent:
                del body[key]
        body["checksum"] = checksum(canonical_json(body))
        return json.dumps(body, indent=1).encode()

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read and check a run's manifest; FileNotFoundError if ``path`` holds no run."""
        file = path / MANIFEST
        if not file.exists():
            if (path / OVERWRITTEN).exists():
                raise FileNotFoundError(f"{path} holds no run: one was being overwritten, and none has begun since.")
            if any(path.glob("rows-*.safetensors")) and not file.exists():  # nor was it written in between
                raise CorruptLogError(f"{file} is missing, though there are rows: restore it from a copy.")
            raise FileNotFoundError(no_log(path))
        try:
            data = file.read_bytes()
            body = parse_object(data)
            if body["format"] != "loghook":
                raise ValueError("its format is not 'loghook'")
            if body["version"] != VERSION:
                raise VersionError(
                    f"{file} is of version {body['version']!r:.20} of the format, and this loghook reads version "
                    f"{VERSION}: upgrade loghook or, if the log is older, log the data again."
                )
            fields = {k: v for k, v in body.items() if k not in ("format", "fingerprint", "checksum")}
            fields["layers"] = tuple(LayerSpec(**layer) for layer in body["layers"])
            manifest = cls(**fields)
            # Byte for byte: also a space in the wrong place means that something wrote here that is not loghook.
            if manifest.encode() != data:
                raise ValueError("it does not match its own checksum or fingerprint")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise CorruptLogError(f"{file} is not a valid manifest ({error}): restore it from a copy.") from error
        return manifest


def _check_types(*records: Manifest | LayerSpec) -> None:
    """Raise ValueError unless every field has the type that it is annotated with; True is no int."""
    for record in records:
        for entry in dataclasses.fields(record):
            types = get_args(entry.type) if isinstance(entry.type, UnionType) else (entry.type,)
            value = getattr(record, entry.name)
            if type(value) not in [get_origin(t) or t for t in types]:
                raise ValueError(f"{entry.name} is {value!r:.100}")


def _check_values(m: Manifest) -> None:
    """Raise ValueError unless every field has a value that the format allows."""
    ranks = m.rank.values() if isinstance(m.rank, dict) else [m.rank]
    coverage = [type(m.coverage[key]) for key in ("covered", "total", "not_covered")]
    good = {
        "run_id": re.fullmatch("[0-9a-f]{32}", m.run_id),
        "dtype": m.dtype in DTYPES,
        "id_type": m.id_type in ("int", "str"),
        "on_repeat": m.on_repeat in ON_REPEAT,
        "gradient": m.gradient in GRADIENTS,
        "world_size": 1 <= m.world_size <= 1_000_000,
        "generation": 0 <= m.generation < 1 << 40,
        "sealed": m.sealed is None or (type(m.sealed["rows"]) is int and type(m.sealed["digest"]) is str),
        "rank": all(type(k) is int for k in ranks),
        "coverage": coverage == [int, int, list],
        "parameters": all(isinstance(v, str | None) for v in m.parameters.values()),
    }
    for key, is_good in good.items():
        if not is_good:
            raise ValueError(f"{key} is {getattr(m, key)!r:.100}")
    if not m.layers or len({layer.name for layer in m.layers}) < len(m.layers):
        raise ValueError("it has no layers, or two of the same name")
    for layer in m.layers:
        sizes = (layer.in_features, layer.out_features, layer.groups, layer.k_in, layer.k_out)
        if not all(1 <= n < 1 << 40 for n in sizes) or not 0 <= layer.channels < 1 << 40:
            raise ValueError(f"layer {layer.name!r:.100} has sizes {sizes}")
        if layer.k_out > layer.widths[0] or layer.k_in > layer.widths[1]:
            raise ValueError(f"layer {layer.name!r:.100} has a rank above its width")


# What writers make in a run's folder, by the three functions below.
WRITTEN = ("rows-*.safetensors", "statistics-*.safetensors", "commits-*.jsonl")


def run_files(path: Path) -> list[Path]:
    """Shards, snapshots and commit logs in a run's folder."""
    return [file for kind in WRITTEN for file in sorted(path.glob(kind))]


def shard_name(rank: int, index: int) -> str:
    return f"rows-{rank:05d}-{index:05d}.safetensors"


def commits_name(rank: int, generation: int) -> str:
    """Of a writer; maintenance writes a new generation beside the old one."""
    return f"commits-{rank:05d}.jsonl" if generation == 0 else f"commits-{rank:05d}-{generation:05d}.jsonl"


def statistics_name(rank: int, sequence: int) -> str:
    return f"statistics-{rank:05d}-{sequence:08d}.safetensors"
