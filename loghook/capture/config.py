"""``Config``: the arguments of ``loghook.init``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loghook.errors import ConfigError
from loghook.log.codec import DTYPES
from loghook.log.disk import plain
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
    """What ``loghook.init`` was given, checked at birth."""

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
        for name in ("seed", "whitening", "shard_bytes", "commit_seconds"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        rank = {k: plain(v) for k, v in self.rank.items()} if isinstance(self.rank, Mapping) else plain(self.rank)
        object.__setattr__(self, "rank", rank)
        ranks = list(self.rank.values()) if isinstance(self.rank, Mapping) else [self.rank]
        if not ranks or not all(type(rank) is int and rank >= 1 for rank in ranks):
            raise ConfigError(
                f"rank={self.rank!r} must be a whole number of at least 1, as rows are rank x rank; or a dict of such "
                "numbers by pattern of layer names."
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(map(repr, choices))}."
                )
        if not (self.whitening or 0) > 0 or (self.fitted is not None and self.projection not in FITTED):
            raise ConfigError(
                f"whitening={self.whitening} must be positive, and fitted={self.fitted} goes with projection='pca' or "
                f"'whitened', not {self.projection!r}."
            )
        if self.gradient != "plain" and (self.projection in FITTED or self.fidelity is not None):
            raise ConfigError(
                f"gradient={self.gradient!r} goes with projection='random' or 'none', and with no fidelity: a fitted "
                f"projection, here {self.projection!r}, and what tune measured are of plain gradients."
            )
        if self.shard_bytes < 1 or self.commit_seconds <= 0:
            raise ConfigError(f"shard_bytes={self.shard_bytes}, commit_seconds={self.commit_seconds} must be positive.")
        if self.projection != "whitened":
            object.__setattr__(self, "whitening", None)
