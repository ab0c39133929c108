"""Rows held in memory: what questions are made of."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loghook.errors import ConfigError, MismatchError, StateError
from loghook.log.format import LayerSpec, Layout, fingerprint, listed
from loghook.log.kinds import loading, save_tensors


class Query:
    """Rows of one or many questions, in the layout of the log they will be scored against.

    Queries from several batches add up: ``a + b``, or ``Query.concat(queries)``.
    """

    def __init__(self, ids: Sequence[int] | Sequence[str]) -> None:
        """An empty query for these ids; the block that made it fills it when it ends."""
        self.data_ids: list[int] | list[str] = list(ids)  # type: ignore[assignment]
        self._rows: Tensor | None = None
        self._specs: tuple[LayerSpec, ...] = ()
        self._projection, self._seed = "", 0
        self._fitted: str | None = None
        self._gradient = "plain"
        self.parameters: str | None = None
        self.direction: str | None = None  # how the rows were preconditioned already, if they were

    def fill(
        self,
        rows: Tensor,
        specs: Iterable[LayerSpec],
        projection: str,
        seed: int,
        parameters: str | None,
        fitted: str | None = None,
        gradient: str = "plain",
    ) -> None:
        """Take the rows, (Q, width), what they were made with, and what the rows of the log are of."""
        self._rows, self._specs = rows, tuple(specs)
        self._projection, self._seed, self.parameters, self._fitted = projection, seed, parameters, fitted
        self._gradient = gradient

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
    def layout(self) -> Layout:
        """Where each layer's values are in a row."""
        return Layout(self._made_of())

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in row order."""
        return tuple(spec.name for spec in self._made_of())

    @property
    def fingerprint(self) -> str:
        """Digest of layers and projection; a log must have the same."""
        return fingerprint(self._made_of(), self._projection, self._seed, self._fitted, self._gradient)

    def _made_of(self) -> tuple[LayerSpec, ...]:
        _ = self.matrix  # raises where there is none
        return self._specs

    def _like(self, ids: Sequence[Any], rows: Tensor) -> "Query":
        """A query whose rows were made as this one's were."""
        query = Query(ids)
        query.fill(rows, self._specs, self._projection, self._seed, self.parameters, self._fitted, self._gradient)
        query.direction = self.direction
        return query

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.data_ids)

    def __repr__(self) -> str:
        """Say how many questions there are, and what their rows are."""
        if self._rows is None:
            return f"Query({len(self)} questions, no rows: its block has not ended, or raised)"
        refined = f", {self.direction}" if self.direction else ""
        return f"Query({len(self)} questions, {self._rows.shape[1]:,} values in {len(self._specs)} layers{refined})"

    def rows(self, layer: str, kind: str = "gradients") -> np.ndarray:
        """Rows of one layer: (Q, k_out, k_in) gradients, or (Q, features) of another kind; see ``Log.rows``."""
        spec, columns = find_columns(self.layout, layer, kind)
        values = self.matrix[:, columns].numpy()
        return values.reshape(len(self), spec.k_out, spec.k_in) if kind == "gradients" else values

    def __add__(self, other: "Query") -> "Query":
        """Both queries' rows, one after the other."""
        return Query.concat([self, other])

    @staticmethod
    def concat(queries: Sequence["Query"]) -> "Query":
        """Join queries, for instance those of a loader's batches.

        Raises:
            MismatchError: if they were made with different layers or projections, or ids of different types.
        """
        if not queries:
            raise ConfigError("Query.concat got no queries: pass at least one.")
        first = queries[0]
        for query in queries[1:]:
            if query.fingerprint != first.fingerprint or query._specs != first._specs:
                raise MismatchError("these queries come from different layers or projections and cannot be joined.")
            if query.direction != first.direction:
                raise MismatchError("some of these queries are preconditioned and some are not: join equal ones.")
            if type(query.data_ids[0]) is not type(first.data_ids[0]):
                raise MismatchError("these queries have ids of different types: use int or str throughout.")
        ids = [i for query in queries for i in query.data_ids]
        joined = first._like(ids, torch.cat([query.matrix for query in queries]))
        if any(query.parameters != first.parameters for query in queries):
            joined.parameters = None
        return joined

    def with_rows(self, rows: Tensor, direction: str) -> "Query":
        """The same questions with other rows (Q, width): what ``direction`` says was made of them."""
        if rows.shape != self.matrix.shape:
            raise ConfigError(f"rows {tuple(rows.shape)} do not have the query's shape {tuple(self.matrix.shape)}.")
        query = self._like(self.data_ids, rows)
        query.direction = direction
        return query

    def save(self, path: str | Path) -> None:
        """Write the query to one safetensors file."""
        header = {
            "layers": [spec.__dict__ for spec in self._specs],
            "projection": self._projection,
            "seed": self._seed,
            "data_ids": self.data_ids,
            "parameters": self.parameters,
            "fitted": self._fitted,
            "direction": self.direction,
            "gradient": self._gradient,
        }
        save_tensors(path, "query", header, {"rows": self.matrix.contiguous()})

    @staticmethod
    def load(path: str | Path) -> "Query":
        """Read a query that ``save`` wrote.

        Raises:
            ConfigError: if the file is of another kind, such as scores.
            CorruptLogError: if it is none of ours, or damaged.
        """
        with loading(path, "query") as (header, tensors):
            rows, query = tensors["rows"], Query(header["data_ids"])
            specs = [LayerSpec(**spec) for spec in header["layers"]]
            if rows.shape != (len(query), Layout(specs).width):
                raise ValueError(f"its rows have shape {tuple(rows.shape)}")
        made = {"fitted": header.get("fitted"), "gradient": header.get("gradient", "plain")}
        query.fill(rows, specs, header["projection"], header["seed"], header["parameters"], **made)
        query.direction = header.get("direction")
        return query


def require_query(query: Any) -> None:
    """Raise unless this is a query, which what ``query(...)`` returns is not before its ``with``."""
    if not isinstance(query, Query):
        raise ConfigError(
            f"{type(query).__name__} is no query: write `with run.query(data_id=...) as query:` around forward and "
            "backward of the questions, and pass that `query` after the block."
        )


def find_columns(layout: Layout, layer: str, kind: str) -> tuple[LayerSpec, slice]:
    """Return a layer's spec and its columns of a row, for one kind of rows."""
    if kind not in layout.kinds:
        raise ConfigError(f"kind={kind!r} is unknown: choose one of {', '.join(layout.kinds)}.")
    specs = {spec.name: spec for spec in layout.layers}
    if layer not in specs:
        raise ConfigError(f"layer {layer!r} is not in the log; its layers are {listed(specs)}.")
    if layer not in layout.kinds[kind]:
        raise ConfigError(f"layer {layer!r} was logged without {kind}: pass watch(..., {kind}='mean').")
    return specs[layer], layout.kinds[kind][layer]
