"""``Config``: the arguments of ``loghook.init``."""

import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loghook.errors import ConfigError
from loghook.log.codec import DTYPES
from loghook.log.format import ON_REPEAT
from loghook.project.outer import GRADIENTS
from loghook.project.projection import FITTED

_CHOICES: dict[str, Sequence[str | None]] = {
    "projection": ("random", *FITTED, "none"),
    "dtype": DTYPES,
    "gradient": GRADIENTS,
    "on_repeat": ON_REPEAT,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What ``loghook.init`` was given, checked at birth; numbers of any kind become int and float, which JSON has."""

    path: Path
    rank: int | Mapping[str, int] = 64
    projection: str = "random"
    whitening: float | None = 0.1  # None once it is known to say nothing
    fitted: Path | None = None
    seed: int = 0
    dtype: str = "float32"
    on_repeat: str | None = None
    shard_bytes: int = 256 * 2**20
    commit_seconds: float = 30.0
    fidelity: dict[str, Any] | None = None
    gradient: str = "plain"

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {
            "rank": _ranks(self.rank),
            "seed": _whole(self.seed, -math.inf, f"seed={self.seed!r} must be a whole number: pass an int."),
            "shard_bytes": _whole(
                self.shard_bytes,
                1,
                f"shard_bytes={self.shard_bytes!r} must be a whole number of at least 1: pass an int.",
            ),
            "whitening": _positive("whitening", self.whitening),
            "commit_seconds": _positive("commit_seconds", self.commit_seconds),
        }
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(map(repr, choices))}."
                )
        if self.fitted is not None and self.projection not in FITTED:
            raise ConfigError(
                f"fitted={str(self.fitted)!r} goes with projection='pca' or 'whitened', not {self.projection!r}: leave "
                "it out, or take one of these."
            )
        if self.gradient != "plain" and (self.projection in FITTED or self.fidelity is not None):
            raise ConfigError(
                f"gradient={self.gradient!r} goes with projection='random' or 'none', and with no fidelity: a fitted "
                f"projection, here {self.projection!r}, and what tune measured are of plain gradients."
            )
        plain["fidelity"] = None if self.fidelity is None else _measured(self.fidelity)
        if self.projection != "whitened":
            plain["whitening"] = None
        for name, value in plain.items():
            object.__setattr__(self, name, value)


def _ranks(rank: Any) -> int | dict[str, int]:
    message = (
        f"rank={rank!r} must be a whole number of at least 1, as rows are rank x rank; or a dict of such numbers by "
        "pattern of layer names."
    )
    if not isinstance(rank, Mapping):
        return _whole(rank, 1, message)
    if not rank or not all(isinstance(pattern, str) for pattern in rank):
        raise ConfigError(message)
    return {pattern: _whole(number, 1, message) for pattern, number in rank.items()}


def _whole(value: Any, least: float, message: str) -> int:
    """Return a whole number of any type but bool as an int."""
    try:
        if not isinstance(value, bool) and (number := operator.index(value)) >= least:
            return number
    except TypeError:
        pass
    raise ConfigError(message)


def _positive(name: str, value: Any) -> float:
    """Return a positive number of any type but bool as a float."""
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"{name}={value!r} must be a positive, finite number: pass a float.")
    return number


def _measured(fidelity: Any) -> dict[str, Any]:
    """Return what ``loghook.tune`` measured as the manifest will say it."""
    try:
        found = json.loads(json.dumps(fidelity))
        if {"pearson", "reference", "scoring"} <= found.keys():
            return dict(found)
    except (TypeError, ValueError, AttributeError):
        pass
    raise ConfigError(
        f"fidelity={fidelity!r:.100} is nothing that loghook.tune measured: pass init(..., **tuned.arguments), which "
        "has it, or leave it out."
    )
