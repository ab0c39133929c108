"""Rows held in memory: what questions are made of."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loghook.errors import CheckpointWarning, ConfigError, MismatchError, StateError, warn
from loghook.log.files import loading, save_checked
from loghook.log.format import LayerSpec, Layout, Made, differ
from loghook.processes import all_gather

_NOTHING = Made((), "", 0)


@dataclass(eq=False, repr=False)
class Query:
    """Rows of one or many questions, in the layout of the log they will be scored against.

    Queries from several batches add up: ``a + b``, or ``Query.concat(queries)``.

    Attributes:
        data_ids: one id for each question.
        parameters: digest of the parameter values (and moments) that it was made with, or None where they are not
            known.
        direction: how the rows were preconditioned already, if they were.
    """

    data_ids: list[int] | list[str]
    _rows: Tensor | None = None  # none before the block that makes the query ends
    _made: Made = _NOTHING
    parameters: str | None = None
    direction: str | None = None

    def __post_init__(self) -> None:
        self.data_ids = list(self.data_ids)  # type: ignore[assignment]

    def fill(self, rows: Tensor, made: Made, parameters: str | None = None) -> "Query":
        """Take the rows, (Q, width), and what they were made with; returns the query."""
        self._rows, self._made, self.parameters = rows, made, parameters
        return self

    @property
    def matrix(self) -> Tensor:
        """The rows as they are laid out in a log: (Q, width), float32 or float64.

        Raises:
            StateError: while the block that makes the query is still open, or if it raised.
        """
        if self._rows is None:
            raise StateError("this query holds no rows: its block has not ended, or raised. Use it after the `with`.")
        return self._rows

    @property
    def made(self) -> Made:
        """What the rows were made with."""
        _ = self.matrix  # raises where there is none
        return self._made

    @property
    def layout(self) -> Layout:
        """Where each layer's values are in a row."""
        return Layout(self.made.layers)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in row order."""
        return tuple(spec.name for spec in self.made.layers)

    @property
    def fingerprint(self) -> str:
        """Digest of layers and projection; a log must have the same."""
        return self.made.fingerprint

    def __len__(self) -> int:
        return len(self.data_ids)

    def __repr__(self) -> str:
        if self._rows is None:
            return f"Query({len(self)} questions, no rows: its block has not ended, or raised)"
        refined = f", {self.direction}" if self.direction else ""
        return f"Query({len(self)} questions, {self._rows.shape[1]:,} values in {len(self.layers)} layers{refined})"

    def rows(self, layer: str, kind: str = "gradients") -> np.ndarray:
        """Rows of one layer: (Q, k_out, k_in) gradients, or (Q, features) of another kind; see ``Log.rows``."""
        spec, columns = self.layout.find(layer, kind)
        values = self.matrix[:, columns].numpy()
        return values.reshape(len(self), spec.k_out, spec.k_in) if kind == "gradients" else values

    def __add__(self, other: "Query") -> "Query":
        """Both queries' rows, one after the other."""
        return Query.concat([self, other])

    @staticmethod
    def concat(queries: Iterable["Query"]) -> "Query":
        """Join queries, for instance those of a loader's batches, or of several processes.

        Of an id that comes again with the same row, as where samplers fill up batches, the first one is kept.

        Raises:
            MismatchError: if they were made with different layers or projections, or ids of different types.
        """
        queries = list(queries)
        if not queries:
            raise ConfigError("Query.concat got no queries: pass at least one.")
        first = queries[0]
        for query in queries[1:]:
            if query.fingerprint != first.fingerprint or query.made.layers != first.made.layers:
                raise MismatchError("these queries come from different layers or projections and cannot be joined.")
            if query.direction != first.direction:
                raise MismatchError("some of these queries are preconditioned and some are not: join equal ones.")
            if type(query.data_ids[0]) is not type(first.data_ids[0]):
                raise MismatchError("these queries have ids of different types: use int or str throughout.")
        ids: list[Any] = [i for query in queries for i in query.data_ids]
        rows = torch.cat([query.matrix for query in queries])
        met: dict[Any, list[int]] = {}
        for place, data_id in enumerate(ids):
            same = met.setdefault(data_id, [])
            if not any((rows[place] - rows[other]).norm() <= 1e-2 * rows[other].norm() for other in same):
                same.append(place)
        kept = sorted(place for same in met.values() for place in same)
        if len(kept) < len(ids):
            ids, rows = [ids[place] for place in kept], rows[kept]
        alike = all(query.parameters == first.parameters for query in queries)
        if not alike:
            warn(
                "these queries were made with different parameter values: scoring cannot tell whether they fit a log.",
                CheckpointWarning,
            )
        return Query(ids, rows, first.made, first.parameters if alike else None, first.direction)

    def with_rows(self, rows: Tensor, direction: str) -> "Query":
        """The same questions with other rows (Q, width): what ``direction`` says was made of them."""
        if rows.shape != self.matrix.shape:
            raise ConfigError(f"rows {tuple(rows.shape)} do not have the query's shape {tuple(self.matrix.shape)}.")
        return replace(self, _rows=rows, direction=direction)

    def save(self, path: str | Path) -> None:
        """Write the query to one safetensors file."""
        facts = {"data_ids": self.data_ids, "parameters": self.parameters, "direction": self.direction}
        save_checked(path, "query", asdict(self.made) | facts, {"rows": self.matrix.contiguous()})

    @staticmethod
    def load(path: str | Path) -> "Query":
        """Read a query that ``save`` wrote.

        Raises:
            ConfigError: if the file is of another kind, such as scores.
            CorruptLogError: if it is none of ours, or damaged.
        """
        with loading(path, "query") as (header, tensors):
            ids, parameters, direction = (header.pop(key) for key in ("data_ids", "parameters", "direction"))
            made = Made(tuple(LayerSpec(**spec) for spec in header.pop("layers")), **header)
            query = Query(ids, tensors["rows"], made, parameters, direction)
            if query.matrix.shape != (len(query), query.layout.width):
                raise ValueError(f"its rows have shape {tuple(query.matrix.shape)}")
            return query


def require_query(query: Any) -> None:
    """Raise unless this is a query, which what ``query(...)`` returns is not before its ``with``."""
    if not isinstance(query, Query):
        raise ConfigError(
            f"{type(query).__name__} is no query: write `with run.query(data_id=...) as query:` around forward and "
            "backward of the questions, and pass that `query` after the block."
        )


def require_match(query: Any, made: Made, values: str | None, whose: str, asked_of: str) -> None:
    """Raise unless this is a query of what was ``made``, and warn if it was made with other parameter values.

    Args:
        query: what the user passed.
        made: what the rows, or factors, were made with.
        values: digest of the parameter values that they were made with, or None if any will do.
        whose: what they are called in messages.
        asked_of: what makes such queries.
    """
    require_query(query)
    if query.fingerprint != made.fingerprint:
        difference = "another rank, projection, seed or kind of gradient"
        if unshared := {spec.name for spec in made.layers} ^ set(query.layers):
            difference = f"other layers (for instance {min(unshared)!r} is in one of the two only)"
        raise MismatchError(
            f"the query was made with {difference} than {whose}: make it with {asked_of}.query(...), on the same model."
        )
    if differ(values, query.parameters):
        warn(
            f"the query was made with other parameter values, or moments of the optimizer, than {whose}: gradients at "
            "different points would be compared. Load that checkpoint first.",
            CheckpointWarning,
        )


def require_one_log(what: object, rows: int) -> None:
    """Raise unless all processes have equally many rows of a log, of which each reads a share."""
    if len(set(counts := all_gather(rows))) > 1:
        raise StateError(
            f"the processes opened {what} while it grew, and have {counts} rows of it: load it once it is finished."
        )


def require_one_query(query: Query, what: object) -> None:
    """Raise unless all processes ask the same questions: each scores a share of ``what`` for the answers of all."""
    (first_ids, first_norms), *others = all_gather((query.data_ids, query.matrix.norm(dim=1).tolist()))
    for ids, norms in others:
        # Equal questions may differ in rounding from process to process. All compare with the first, so that all raise.
        if ids != first_ids or not np.allclose(norms, first_norms, rtol=1e-2, equal_nan=True):
            raise MismatchError(
                f"the processes ask different questions of {what}, of which each scores a share for all: join the "
                "queries with Query.concat and ask that on all, or ask in a process of its own."
            )
