"""``Config``: the arguments of ``loghook.init``; ``Recipe``: those of them that make rows what they are."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loghook.arguments import choose, positive, whole
from loghook.errors import ConfigError
from loghook.log.codec import DTYPES
from loghook.log.format import ON_REPEAT, fits
from loghook.project.outer import GRADIENTS
from loghook.project.projection import FITTED, KINDS

Rank = int | Mapping[str, int]  # of all layers, or by fnmatch pattern: the first that fits a layer is its own


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What rows are made with, checked at birth; numbers of any kind become int and float, which JSON has."""

    projection: str = "random"
    rank: Rank = 64
    seed: int = 0
    gradient: str = "plain"  # what rows are of

    def __post_init__(self) -> None:
        choose("projection", self.projection, KINDS)
        choose("gradient", self.gradient, GRADIENTS)
        _settle(self, rank=_ranks(self.rank), seed=whole("seed", self.seed, -math.inf))
        if self.gradient != "plain" and self.projection in FITTED:
            raise ConfigError(
                f"gradient={self.gradient!r} goes with projection='random' or 'none', not {self.projection!r}."
            )


@dataclass(frozen=True, kw_only=True)
class Config(Recipe):
    """What ``loghook.init`` was given."""

    path: Path
    whitening: float | None = 0.1  # None once it is known to say nothing
    fitted: Path | None = None
    dtype: str = "float32"
    on_repeat: str | None = None
    shard_bytes: int = 256 * 2**20
    commit_seconds: float = 30.0
    fidelity: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("dtype", self.dtype, DTYPES)
        choose("on_repeat", self.on_repeat, ON_REPEAT)
        if self.fitted is not None and self.projection not in FITTED:
            raise ConfigError(
                f"fitted={str(self.fitted)!r} goes with projection='pca' or 'whitened', not {self.projection!r}."
            )
        if self.gradient != "plain" and self.fidelity is not None:
            raise ConfigError(f"fidelity goes with gradient='plain', not {self.gradient!r}: leave it out.")
        whitening = positive("whitening", self.whitening)
        _settle(
            self,
            whitening=whitening if self.projection == "whitened" else None,
            shard_bytes=whole("shard_bytes", self.shard_bytes),
            commit_seconds=positive("commit_seconds", self.commit_seconds),
            fidelity=None if self.fidelity is None else _measured(self.fidelity),
        )


def rank_of(name: str, rank: Rank) -> int:
    """The rank of the layer of this name."""
    if not isinstance(rank, Mapping):
        return rank
    for pattern, value in rank.items():
        if fits(name, pattern):
            return value
    raise ConfigError(f"rank={dict(rank)} has no pattern that fits layer {name!r}: add one, such as '*': 32.")


def _settle(recipe: Recipe, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(recipe, name, value)


def _ranks(rank: Any) -> int | dict[str, int]:
    hint = ", as rows are rank x rank; or a dict of such numbers by pattern of layer names"
    if not isinstance(rank, Mapping):
        return whole("rank", rank, hint=hint)
    if not rank or not all(isinstance(pattern, str) for pattern in rank):
        raise ConfigError(f"rank={rank!r} must be a whole number of at least 1{hint}.")
    return {pattern: whole(f"rank[{pattern!r}]", number) for pattern, number in rank.items()}


def _measured(fidelity: Any) -> dict[str, Any]:
    """Return what ``loghook.tune`` measured as the manifest will say it."""
    try:
        measured = json.loads(json.dumps(fidelity))
        if {"pearson", "reference", "scoring"} <= measured.keys():
            return dict(measured)
    except (TypeError, ValueError, AttributeError):
        pass
    raise ConfigError(
        f"fidelity={fidelity!r:.100} is nothing that loghook.tune measured: pass init(..., **tuned.arguments)."
    )
