"""The result of a question: scores with ids, axes, sign and provenance."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from loghook.arguments import plain, whole
from loghook.errors import ConfigError, MismatchError
from loghook.log.files import loading, save_checked, write_file

if TYPE_CHECKING:
    import pandas

    from loghook.page import Texts


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
        method: "dot", "cosine", "fisher", "kfac", "ekfac" or "shampoo", with a note where rows or questions were of
            another kind: "dot (whitened, 1-bit questions)", "ekfac (whole gradients)"; the solver of refined questions;
            "ensemble of ..." where ``combine`` made it.
        normalize: None, "unit" or "relatif".
        damping: relative to each layer's mean eigenvalue, or None.
        damping_abs: absolute damping, or None.
        fingerprint: of the log and the query.
        log: where the log was.
        weights: None, or what each of the combined scores was multiplied by.
        fidelity: None, or the correlation with whole EK-FAC that ``loghook.tune`` measured for just this scoring.
    """

    values: np.ndarray
    query_ids: Sequence[int] | Sequence[str]
    data_ids: Sequence[int] | Sequence[str]
    places: np.ndarray | None = None
    by_layer: np.ndarray | None = None
    layers: tuple[str, ...] = ()
    method: str
    normalize: str | None = None
    damping: float | None = None
    damping_abs: float | None = None
    fingerprint: str
    log: str
    weights: tuple[float, ...] | None = None
    fidelity: float | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Let functions on plain arrays, as those of ``loghook.evaluate``, take scores of all rows."""
        return np.array(self._of_all_rows(), dtype=dtype, copy=copy is not False)

    @property
    def sign(self) -> str:
        """What a positive score means."""
        return "positive: training on the row lowers the query's loss (proponent)"

    def top(self, k: int = 10) -> list[list[Record]]:
        """The k strongest proponents of each question, best first."""
        return self._ranked(k, best=True)

    def bottom(self, k: int = 10) -> list[list[Record]]:
        """The k strongest opponents of each question, strongest first.

        Raises:
            ConfigError: if only the best were kept.
        """
        self._of_all_rows()
        return self._ranked(k, best=False)

    def distinct(self, k: int) -> list[list[int | str]]:
        """The ids of each question's strongest proponents, each once: k, or as many as every question has."""
        k = whole("k", k)
        rankings = []
        for values, places in zip(self.values, self._all_places(), strict=True):
            ids: dict[int | str, None] = {}
            for i in np.argsort(-values, kind="stable"):
                if len(ids) == k:
                    break
                ids[self.data_ids[places[i]]] = None
            rankings.append(list(ids))
        return [ids[: min(map(len, rankings))] for ids in rankings]

    def align(
        self, data_ids: Sequence[int | str] | None = None, query_ids: Sequence[int | str] | None = None
    ) -> "Scores":
        """The same scores in the order of these ids, of rows and of questions, and of no others; None: as they are.

        A log has the order of its loop; a data set's own is often handier.

        Raises:
            ConfigError: of rows, if only the best were kept.
            MismatchError: for an id that was not scored, or more than once.
        """
        if data_ids is not None:
            self._of_all_rows()
        ids_of_queries, queries = _order("query_id", self.query_ids, query_ids)
        ids_of_rows, rows = _order("data_id", self.data_ids, data_ids)
        return dataclasses.replace(
            self,
            values=self.values[queries][:, rows],
            query_ids=ids_of_queries,
            data_ids=ids_of_rows,
            places=None if self.places is None else self.places[queries],
            by_layer=None if self.by_layer is None else self.by_layer[:, queries][:, :, rows],
        )

    def among(self, candidates: Sequence[Sequence[int | str]]) -> "Scores":
        """Only some rows of each question (as many for each), best first.

        Raises:
            ConfigError: if one of them was not scored, or names several rows.
        """
        if len(candidates) != len(self.query_ids) or len({len(ids) for ids in candidates}) > 1:
            raise ConfigError(
                f"{len(candidates)} lists of {sorted({len(ids) for ids in candidates})} candidates for "
                f"{len(self.query_ids)} questions: pass one for each, all equally long."
            )
        row_of = {data_id: row for row, data_id in enumerate(self.data_ids)}
        if missing := [i for ids in candidates for i in ids if i not in row_of]:
            raise ConfigError(f"{missing[0]!r} was not scored for every question: score all of them.")
        counts = Counter(self.data_ids) if len(row_of) < len(self.data_ids) else {}
        if several := [i for ids in candidates for i in ids if counts.get(i, 1) > 1]:
            raise ConfigError(f"{several[0]!r} names several rows: log each id once, or take the rows by their places.")
        rows = np.array([[row_of[i] for i in ids] for ids in candidates], dtype=np.int64)
        values = np.take_along_axis(self._of_all_rows(), rows, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        ranked, places = (np.take_along_axis(of_rows, order, axis=1) for of_rows in (values, rows))
        return dataclasses.replace(self, values=ranked, places=places, by_layer=None)

    def to_pandas(self) -> "pandas.DataFrame":
        """A table with a row for each pair: query_id, data_id, score (needs the pandas extra)."""
        try:
            import pandas
        except ImportError as error:
            raise ConfigError("to_pandas needs pandas: pip install 'loghook[pandas]'.") from error
        query_ids, data_ids = (np.asarray(ids, dtype=object) for ids in (self.query_ids, self.data_ids))
        columns = {
            "query_id": np.repeat(query_ids, self.values.shape[1]),
            "data_id": data_ids[self._all_places()].reshape(-1),
            "score": self.values.reshape(-1),
        }
        return pandas.DataFrame(columns)

    def report(
        self,
        path: str | Path,
        *,
        texts: "Texts | None" = None,
        questions: "Texts | None" = None,
        top: int = 10,
        bottom: int | None = None,
    ) -> None:
        """Write an HTML page that shows each question with its strongest proponents and opponents.

        Args:
            path: the page; it loads nothing from elsewhere.
            texts: a mapping or function that gives the text of a training sample by its id; None shows ids alone.
            questions: the same for the questions.
            top: proponents shown for each question.
            bottom: opponents, by default 5, or none where only the best rows were kept.

        Raises:
            ConfigError: if the text of an id that is shown is missing, or opponents are asked for that were not kept.
        """
        from loghook.page import render_scores

        bottom = (0 if self.places is not None else 5) if bottom is None else bottom
        write_file(path, render_scores(self, texts, questions, top, bottom).encode(errors="replace"))

    @staticmethod
    def combine(
        scores: Sequence["Scores"], weights: Sequence[float] | None = None, *, standardize: bool = False
    ) -> "Scores":
        """Add up what several logs say of the same pairs: checkpoints of one training, or models of several.

        With the checkpoints' learning rates as weights, sums of dot products are TracIn (Pruthi et al. 2020); the
        plain mean over models is the ensemble of TRAK (Park et al. 2023). Pairs are matched by their ids; the order
        is that of the first.

        Args:
            scores: with all rows (not ``top=``), each with the same ids in any order.
            weights: one finite number for each, by default 1 / n: the mean.
            standardize: divide each question's scores by their standard deviation over rows first, so that no model
                speaks louder than another.

        Returns:
            Scores, with the method "ensemble of n: ..." and ``weights``.

        Raises:
            ConfigError: nothing to combine, scores of top rows only, weights that do not fit, or sums beyond float32.
            MismatchError: ids that repeat, or that one has and another has not.
        """
        scores = [] if isinstance(scores, Scores) else list(scores)
        if not scores:
            raise ConfigError("Scores.combine got no list of scores: pass at least one.")
        weights = tuple(float(w) for w in ([1 / len(scores)] * len(scores) if weights is None else weights))
        if len(weights) != len(scores) or not np.isfinite(weights).all():
            raise ConfigError(f"weights={weights} must be {len(scores)} finite numbers, one for each of the scores.")
        first = scores[0]
        values = np.zeros(first.values.shape)
        same_layers = all(each.by_layer is not None and each.layers == first.layers for each in scores)
        by_layer = np.zeros(first.by_layer.shape) if same_layers and first.by_layer is not None else None
        for each, weight in zip(scores, weights, strict=True):
            terms = each._of_all_rows()
            queries = _places("query_id", each.query_ids, first.query_ids, all_of_them=True)
            rows = _places("data_id", each.data_ids, first.data_ids, all_of_them=True)
            size = terms.std(axis=1, dtype=np.float64, keepdims=True) if standardize else np.ones((1, 1))
            factor = weight / np.where(size > 0, size, 1)
            values += (terms * factor)[queries][:, rows]
            if by_layer is not None and each.by_layer is not None:
                by_layer += (each.by_layer * factor)[:, queries][:, :, rows]
        if not (np.abs(values) <= np.finfo(np.float32).max).all():
            raise ConfigError(
                f"the weighted sum of these scores does not fit in float32: weights={weights} are too large."
            )
        return Scores(
            values=values.astype(np.float32),
            query_ids=first.query_ids,
            data_ids=first.data_ids,
            by_layer=None if by_layer is None else by_layer.astype(np.float32),
            layers=tuple(dict.fromkeys(name for each in scores for name in each.layers)),
            method=f"ensemble of {len(scores)}{', standardized' if standardize else ''}: {_joined(scores, 'method')}",
            fingerprint=_joined(scores, "fingerprint"),
            log=_joined(scores, "log"),
            weights=weights,
            **{key: _same(scores, key) for key in ("normalize", "damping", "damping_abs")},
        )

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        header = {key: getattr(self, key) for key in _HEADER}
        ids = bytearray(json.dumps(list(self.data_ids)).encode())  # a header takes 100 MB at most
        tensors = {"data_ids": torch.frombuffer(ids, dtype=torch.uint8)} | {
            key: torch.from_numpy(np.array(array, order="C"))
            for key in _ARRAYS
            if (array := getattr(self, key)) is not None
        }
        save_checked(path, "scores", header, tensors)

    @staticmethod
    def load(path: str | Path) -> "Scores":
        """Read what ``save`` wrote.

        Raises:
            ConfigError: if the file is of another kind, such as a query.
            CorruptLogError: if it is none of ours, or damaged.
        """
        with loading(path, "scores") as (header, tensors):
            header["data_ids"] = json.loads(tensors["data_ids"].numpy().tobytes())
            if header.keys() != {"data_ids", *_HEADER}:
                raise ValueError(f"its header has {sorted(header)}")
            header |= {key: tuple(header[key]) for key in ("layers", "weights") if header[key] is not None}
            return Scores(**header | {key: tensors[key].numpy().copy() for key in _ARRAYS if key in tensors})

    def __repr__(self) -> str:
        kind = self.method + (f" ({self.normalize})" if self.normalize else "")
        best = "" if self.places is None else f"best {self.values.shape[1]} of "
        size = f"{self.values.shape[0]} queries x {best}{len(self.data_ids)} rows"
        tuned = "" if self.fidelity is None else f"fidelity={self.fidelity}, "
        return f"Scores({size}, {kind}, damping={self.damping or self.damping_abs}, {tuned}log={self.log!r})"

    def _of_all_rows(self) -> np.ndarray:
        if self.places is not None:
            raise ConfigError("these scores keep only the best rows (top=...): score again without top.")
        return self.values

    def _all_places(self) -> np.ndarray:
        if self.places is not None:
            return self.places
        return np.broadcast_to(np.arange(self.values.shape[1]), self.values.shape)

    def _ranked(self, k: int, *, best: bool) -> list[list[Record]]:
        k = whole("k", k)
        rankings = []
        for values, places in zip(self.values, self._all_places(), strict=True):
            order = strongest(values if best else -values, k)
            rankings.append([Record(self.data_ids[places[i]], float(values[i])) for i in order])
        return rankings


def strongest(values: np.ndarray, k: int) -> np.ndarray:
    """Places of the k largest, the largest first and ties in their order: (N,) -> (k,)."""
    if k < len(values):  # sorting all of a long log would take most of the time
        near = np.flatnonzero(values >= np.partition(values, -k)[-k])
        return near[np.argsort(-values[near], kind="stable")][:k]
    return np.argsort(-values, kind="stable")


def _order(kind: str, scored: Sequence[Any], wanted: Any) -> tuple[Any, np.ndarray | slice]:
    """The wanted ids as a list and their places; None: all that are scored, as they are."""
    if wanted is None:
        return scored, slice(None)
    ids = wanted.tolist() if hasattr(wanted, "tolist") else [plain(name) for name in wanted]
    return ids, _places(kind, scored, ids)


def _places(
    kind: str, scored: Sequence[Any], wanted: Sequence[Any], *, all_of_them: bool = False
) -> np.ndarray | slice:
    """Where each wanted id is among those scored; ``all_of_them``: none may be on one side only."""
    if list(scored) == list(wanted) and len(set(wanted)) == len(wanted):
        return slice(None)  # of a long log the dictionaries below would take longer than all that is added up
    counts, asked = Counter(scored), Counter(wanted)
    remedy = "ask each question once, or give each an id of its own"
    if kind == "data_id":
        remedy = "log each id once (inside run.passes(), or with on_repeat='first'), or take one epoch's by log.keys"
    for name, n in asked.items():
        if n > 1 and not all_of_them:
            raise MismatchError(f"{kind} {name!r} is asked for more than once: name each id once.")
        if max(n, counts[name]) > 1:
            raise MismatchError(
                f"{kind} {name!r} is there more than once, so that its scores cannot be matched: {remedy}."
            )
        if name not in counts:
            raise MismatchError(f"{kind} {name!r} was not scored: these scores have no such id (of this type).")
    if all_of_them and len(counts) > len(asked):
        one = next(name for name in counts if name not in asked)
        raise MismatchError(f"{kind} {one!r} is in some of the scores only: score the same ids with every log.")
    places = {name: place for place, name in enumerate(scored)}
    return np.array([places[name] for name in wanted], dtype=np.int64)


def _same(scores: Sequence[Scores], key: str) -> Any:
    """What all have in common, or None."""
    values = {getattr(each, key) for each in scores}
    return values.pop() if len(values) == 1 else None


def _joined(scores: Sequence[Scores], key: str) -> str:
    return ", ".join(dict.fromkeys(getattr(each, key) for each in scores))


_ARRAYS = ("values", "places", "by_layer")
_HEADER = [field.name for field in dataclasses.fields(Scores) if field.name not in ("data_ids", *_ARRAYS)]
