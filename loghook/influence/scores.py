"""The result of a question: scores with ids, axes, sign and provenance."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from loghook.errors import ConfigError, CorruptLogError
from loghook.log.disk import write_atomically

if TYPE_CHECKING:
    import pandas

SIGN = "positive: training on the row lowers the query's loss (proponent)"


class Record(NamedTuple):
    """One training sample in a ranking.

    Attributes:
        data_id: the id it was logged with.
        score: its influence on the question.
    """

    data_id: int | str
    score: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Influence of training rows on questions. A positive score is a proponent: training on it lowers the loss.

    Attributes:
        values: float32 (queries, rows), or (queries, k) best first where only the top k were kept.
        query_ids: one id for each question.
        data_ids: one id for each row of the log.
        places: None, or (queries, k) int64: which row each value belongs to.
        by_layer: None, or float32 (layers, queries, rows), which sums to ``values``.
        layers: names of the layers that were scored.
        method: "dot", "cosine", "fisher", "kfac" or "ekfac".
        normalize: None, "unit" or "relatif".
        damping: relative to each layer's mean eigenvalue, or None.
        damping_abs: absolute damping, or None.
        fingerprint: of the log and the query.
        log: where the log was.
    """

    values: np.ndarray
    query_ids: Sequence[int] | Sequence[str]
    data_ids: Sequence[int] | Sequence[str]
    places: np.ndarray | None
    by_layer: np.ndarray | None
    layers: tuple[str, ...]
    method: str
    normalize: str | None
    damping: float | None
    damping_abs: float | None
    fingerprint: str
    log: str

    @property
    def sign(self) -> str:
        """What a positive score means."""
        return SIGN

    def top(self, k: int = 10) -> list[list[Record]]:
        """The k strongest proponents of each question, best first."""
        return self._ranked(k, best=True)

    def bottom(self, k: int = 10) -> list[list[Record]]:
        """The k strongest opponents of each question, strongest first.

        Raises:
            ConfigError: if only the best were kept.
        """
        if self.places is not None:
            raise ConfigError(
                "these scores keep only the best rows (top=...): score again without top to see opponents."
            )
        return self._ranked(k, best=False)

    def among(self, candidates: Sequence[Sequence[int | str]]) -> "Scores":
        """Only some rows of each question (as many for each), best first.

        Raises:
            ConfigError: if one of them was not scored.
        """
        where = {data_id: place for place, data_id in enumerate(self.data_ids)}
        missing = [i for ids in candidates for i in ids if i not in where]
        if missing or self.places is not None:
            raise ConfigError(
                f"{missing[:1] or 'a top-k result'} was not scored for every question: score all of them."
            )
        values, places = [], []
        for row, ids in zip(self.values, candidates, strict=True):
            chosen = np.array([where[i] for i in ids], dtype=np.int64)
            order = np.argsort(-row[chosen], kind="stable")
            places.append(chosen[order])
            values.append(row[chosen[order]])
        return dataclasses.replace(self, values=np.stack(values), places=np.stack(places), by_layer=None)

    def to_pandas(self) -> "pandas.DataFrame":
        """A table with a row for each pair: query_id, data_id, score (needs the pandas extra)."""
        try:
            import pandas
        except ImportError as error:
            raise ConfigError("to_pandas needs pandas: pip install 'loghook[pandas]'.") from error
        places = self._all_places()
        n = self.values.shape[1]
        ids = np.asarray(self.data_ids, dtype=object)
        return pandas.DataFrame(
            {
                "query_id": np.repeat(np.asarray(self.query_ids, dtype=object), n),
                "data_id": ids[places].reshape(-1),
                "score": self.values.reshape(-1),
            }
        )

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        header = {key: getattr(self, key) for key in _HEADER}
        tensors = {key: np.ascontiguousarray(v) for key in _ARRAYS if (v := getattr(self, key)) is not None}
        write_atomically(Path(path), safetensors.numpy.save(tensors, {"loghook_scores": json.dumps(header)}))

    @staticmethod
    def load(path: str | Path) -> "Scores":
        """Read what ``save`` wrote.

        Raises:
            CorruptLogError: if the file is something else.
        """
        try:
            with safetensors.safe_open(path, framework="np") as file:
                header: dict[str, Any] = json.loads(file.metadata()["loghook_scores"])
                tensors = {key: file.get_tensor(key) if key in file.keys() else None for key in _ARRAYS}  # noqa: SIM118
            if set(header) != set(_HEADER):
                raise ValueError(f"its header has {sorted(header)}")
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptLogError(f"{path} is no scores file ({error}): save it again.") from error
        return Scores(**(header | {"layers": tuple(header["layers"])}), **tensors)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        """Say what was scored, and how."""
        kind = self.method + (f" ({self.normalize})" if self.normalize else "")
        size = f"{self.values.shape[0]} queries x {len(self.data_ids)} rows"
        return f"Scores({size}, {kind}, damping={self.damping or self.damping_abs}, log={self.log!r})"

    def _all_places(self) -> np.ndarray:
        return (
            np.broadcast_to(np.arange(self.values.shape[1]), self.values.shape) if self.places is None else self.places
        )

    def _ranked(self, k: int, *, best: bool) -> list[list[Record]]:
        if k < 1:
            raise ConfigError(f"k={k} must be at least 1.")
        places, ranked = self._all_places(), []
        for values, where in zip(self.values, places, strict=True):
            order = np.argsort(-values if best else values, kind="stable")[:k]
            ranked.append([Record(self.data_ids[where[i]], float(values[i])) for i in order])
        return ranked


_ARRAYS = ("values", "places", "by_layer")
_HEADER = (
    "query_ids", "data_ids", "layers", "method", "normalize", "damping", "damping_abs", "fingerprint", "log",
)  # fmt: skip
