"""What a run will cost, before it runs: bytes, memory, arithmetic and, from a few blocks that write nothing, time."""

import bisect
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loghook.arguments import whole
from loghook.capture.config import Config, Recipe
from loghook.capture.layers import Layer
from loghook.capture.models import describe_coverage
from loghook.capture.select import HEAD, Watch, require_reduction, select
from loghook.errors import ConfigError
from loghook.log.codec import DTYPES
from loghook.log.format import Layout
from loghook.log.writer import QUEUE, WAITING
from loghook.processes import world_size
from loghook.project.blocks import square_size
from loghook.project.outer import CHUNK_BYTES
from loghook.project.projection import FITTED, describe_projection

_UNITS = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(kw_only=True)
class Plan:
    """The cost of logging some samples; ``print`` shows it. ``with`` measures time, see ``Run.plan``."""

    config: Config  # the arguments of the run
    layers: Sequence[Layer]  # with their projections, or place-holders of their shapes
    coverage: dict[str, Any]  # see ``Manifest.coverage``
    samples: int  # how many rows
    tokens: int = 1  # of a sample
    batch: int = 1  # samples of a block; the largest that was measured, once some were
    disk: float | None = None  # bytes that there are
    seconds: float | None = None  # for a sample on this process, once blocks were measured
    _run: Any = None
    _marks: list[tuple[float, int]] = field(default_factory=list)  # when blocks ended, and their samples

    def __post_init__(self) -> None:
        for name in ("samples", "tokens", "batch"):
            setattr(self, name, whole(name, getattr(self, name)))

    def layout(self, rank: int | None = None) -> Layout:
        """Return the layout of rows, also of another rank."""
        specs = [layer.spec for layer in self.layers]
        if rank:
            specs = [replace(s, k_in=min(rank, s.widths[1]), k_out=min(rank, s.widths[0])) for s in specs]
        return Layout(specs)

    def row_bytes(self, dtype: str | None = None, rank: int | None = None) -> int:
        """Bytes of a sample, also in another dtype or at another rank."""
        return self.layout(rank).codec(dtype or self.config.dtype).row_bytes

    def total_bytes(self, dtype: str | None = None, rank: int | None = None) -> int:
        """Bytes of all rows; ids, statistics and a fitted projection come on top, which do not grow with rank^2."""
        return self.samples * self.row_bytes(dtype, rank)

    def largest_rank(self, dtype: str | None = None) -> int:
        """The largest rank at which all rows fit on the disk, or 0; a rank above every width keeps whole gradients."""
        widest = max(side.width for layer in self.layers for side in layer.sides)
        return bisect.bisect_right(range(1, widest + 1), self.disk or 0, key=lambda k: self.total_bytes(dtype, k))

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that capture takes beside the model, by what they are for: at most, and not all at the same time."""
        layout, tokens = self.layout(), self.batch * self.tokens
        sides = {id(side): side for layer in self.layers for side in layer.sides}  # some are shared
        row = layout.codec(self.config.dtype).dtype.itemsize * layout.width
        fits = self.config.projection in FITTED and self.config.fitted is None
        moments = sum(square_size(side.width) for layer in self.layers for side in layer.sides) if fits else 0
        inputs = 0
        for x in self.layers:
            itemsize = next((p.element_size() for p in x.module.parameters()), 4)
            inputs += tokens * itemsize * x.spec.groups * (x.input_side.width if self._updates else x.spec.k_in)
        waiting = QUEUE * self.batch * row
        largest = max(4 * x.spec.out_features * x.input_side.width for x in self.layers)
        return {
            "projections": sum(4 * s.k * s.width for s in sides.values() if s.matrix is not None),
            "whole inputs" if self._updates else "projected inputs": inputs,
            "gradients of a few samples": 3 * max(CHUNK_BYTES, largest) * self._updates,
            "rows of a block": 2 * self.batch * 4 * layout.width,  # as delivered, and packed
            "waiting for the writer": (waiting if waiting <= WAITING else self.batch * row)
            + QUEUE * 4 * layout.moments_width,
            # As delivered, packed, and the writer's sums.
            "statistics": (4 + 4 + 8) * layout.moments_width * (not self._updates),
            "second moments, in the fitting pass": (4 + 8) * moments,  # as delivered, and their sums
        }

    @property
    def _updates(self) -> bool:
        """Whether whole gradients are formed, because rows are of an optimiser's update."""
        return self.config.gradient != "plain"

    @property
    def arithmetic(self) -> tuple[int, int]:
        """Multiply-adds a token: of capture, and of the watched layers' forward and backward with frozen weights.

        Siblings that read the same tensor project it once, so that capture takes less than is said here.
        """
        capture = model = 0
        for layer in self.layers:
            s, (inputs, outputs) = layer.spec, layer.sides
            dense = s.channels > 0  # an embedding looks its rows up
            model += 2 * s.in_features * s.out_features * dense
            if self._updates:  # the gradient token by token; what is done with it once a sample
                size = s.out_features * inputs.width
                capture += size + (size * s.k_in + s.k_out * s.out_features * s.k_in) // self.tokens
                continue
            capture += 0 if inputs.matrix is None else s.groups * inputs.width * s.k_in * dense
            capture += 0 if outputs.matrix is None else s.out_features * s.k_out
            capture += s.k_in * (s.k_out if s.groups == 1 else s.out_features) + s.groups * s.k_in**2 + s.k_out**2
        return capture, model

    def __enter__(self) -> "Plan":
        if self._run is None:
            raise ConfigError("this plan has no run to measure: take the one of run.plan(...).")
        self._run._rehearsal, self._marks = self, [(time.perf_counter(), 0)]
        return self

    def __exit__(self, *_: object) -> None:
        self._run._rehearsal = None
        marks = self._marks[1:] if len(self._marks) > 2 else self._marks  # the first block warms up
        if len(marks) > 1:
            self.seconds = (marks[-1][0] - marks[0][0]) / sum(n for _, n in marks[1:])

    def count(self, rows: Tensor) -> None:
        """Note the end of a block with these rows, which are brought off the device as for the writer."""
        rows.cpu()
        self._marks.append((time.perf_counter(), len(rows)))
        self.batch = max(self.batch, len(rows)) if len(self._marks) > 2 else len(rows)

    def __str__(self) -> str:
        c, (capture, model) = self.config, self.arithmetic
        lines = [
            describe_coverage(len(self.layers), self.coverage),
            f"{self.samples:,} samples of {self.tokens:,} tokens, {describe_projection(c.projection, c.rank)}: "
            f"{self.layout().width:,} values a sample",
            f"  {'dtype':<12}{'a sample':>12}{'in all':>12}" + (f"   fits in {_size(self.disk)}" if self.disk else ""),
        ]
        for dtype in DTYPES:
            name, each, total = dtype + " <-" * (dtype == c.dtype), self.row_bytes(dtype), self.total_bytes(dtype)
            fits = "" if not self.disk else "   yes" if total <= self.disk else "   no"
            if self.disk and c.projection != "none":
                fits += f"; largest rank {self.largest_rank(dtype):,}"
            lines.append(f"  {name:<12}{_size(each):>12}{_size(total):>12}{fits}")
        lines.append(f"  memory beside the model, {self.batch:,} samples a block, at most:")
        lines += [f"    {name:<36}{_size(n):>12}" for name, n in self.memory.items() if n]
        share = f"{capture / model:.1%} of" if model else "beside"
        lines.append(
            f"  capture adds {capture / 1e6:,.2f} million multiply-adds a token, {share} the {model / 1e6:,.2f} "
            "million of a frozen pass through its layers"
        )
        if self.seconds is not None:
            hours = self.seconds * self.samples / world_size() / 3600
            shown = f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 3600:,.1f} s"
            lines.append(f"  time of the logging pass: {shown} at {1 / self.seconds:,.1f} samples/s for each process")
        if c.projection in FITTED and c.fitted is None:
            lines.append("  one more pass over the data fits the projection, see run.passes()")
        return "\n".join(lines)


def parse_size(text: str | float, name: str = "disk") -> float:
    """Read "500 GB" (10^9), "1.5 TiB" (2^40) or a number of bytes."""
    match = re.fullmatch(r"(\d{1,3}(?:,\d{3})+(?:\.\d*)?|[\d_.]+(?:e[+-]?\d+)?)\s*([kKMGT]?i?)B?", str(text).strip())
    try:
        if match is not None and (size := float(match[1].replace(",", "")) * _UNITS[match[2]]) > 0:
            return size
    except (ValueError, KeyError):
        pass
    raise ConfigError(f"{name}={text!r} is no size: write a number of bytes, '500 GB' or '2 TiB'.")


def _size(n: float) -> str:
    unit = next((u for u in ("T", "G", "M", "k") if n >= _UNITS[u]), "")
    return f"{n / _UNITS[unit]:.3g} {unit}B"


def plan_config(
    model: str | Path, *, samples: int, tokens: int, rank: int = 64, dtype: str = "float32",
    projection: str = "random", batch: int = 1, disk: str | float | None = None,
    include: str | Sequence[str] = "*", exclude: str | Sequence[str] = HEAD,
) -> Plan:  # fmt: skip
    """Plan for a transformers model on the meta device: no weights are read or made.

    ``model`` is a folder with a ``config.json``, such a file, or a name that transformers knows; the other arguments
    are those of ``Run.plan``, ``loghook.init`` and ``run.watch``.

    Raises:
        ConfigError: for a configuration that transformers cannot use.
    """
    import transformers

    config = Config(path=Path(), rank=rank, projection=projection, dtype=dtype)
    size = None if disk is None else parse_size(disk)
    if str(model).endswith(".json") and not Path(model).is_file():  # the hub would be asked for it
        raise ConfigError(f"{str(model)!r} is no file: check the path.")
    try:
        described = transformers.AutoConfig.from_pretrained(model)
        kind = getattr(transformers, (described.architectures or ["AutoModelForCausalLM"])[0])
        with torch.device("meta"):
            empty = kind._from_config(described) if described.architectures else kind.from_config(described)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{str(model)!r} is no configuration of what transformers can build: {error}") from error
    with torch.device("meta"):  # place-holders serve: a random projection has the shape of a fitted one
        shape = "none" if projection == "none" else "pca"
        layers, coverage = select(empty, Watch(include, exclude), Recipe(projection=shape, rank=rank))
    require_reduction(layers, config)
    return Plan(
        config=config, layers=layers, coverage=coverage, samples=samples, tokens=tokens, batch=batch,
        disk=size,
    )  # fmt: skip
