"""The reader: committed rows of every rank, mapped read-only, verified on first touch."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from loghook.errors import CorruptLogError, LogLockedError, StateError
from loghook.log.disk import absolute, lock, lock_name
from loghook.log.files import load_moments, load_sides
from loghook.log.format import Layout, Manifest, commits_name, run_files
from loghook.log.records import all_commits, last_snapshot, read_bytes
from loghook.log.shard import BLOCK_BYTES, CHANGED, MAP_BYTES, Shard
from loghook.log.source import Source
from loghook.progress import bar
from loghook.project.projection import describe_projection

T = TypeVar("T")

TRIES = 10  # how often a log is read anew that grows faster than it is opened


@dataclass(frozen=True)
class RowKeys:
    """Where each row comes from: ``pass_index`` (-1 outside passes), ``step`` and ``rank``, int64 arrays (rows,)."""

    pass_index: np.ndarray
    step: np.ndarray
    rank: np.ndarray


class Reader(Source):
    """A run's committed rows, read lazily: the base of ``loghook.api.Log``, which lists the attributes."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = absolute(path)
        for tries_left in reversed(range(TRIES)):
            self.manifest, failure = Manifest.load(self.path), None
            try:
                self._open()
            except (CorruptLogError, StateError) as error:
                failure = error
            # Maintenance may have put another generation in place meanwhile, or two commits of a growing run have
            # deleted the snapshot that its records named.
            file_gone = failure is not None and isinstance(failure.__cause__, FileNotFoundError)
            replaced = file_gone or self.manifest.superseded(self.path)
            if failure is None and not replaced:
                return
            if not tries_left or not replaced:
                raise failure or StateError(CHANGED.format(self.path))

    def _open(self) -> None:
        self.layout = Layout(self.manifest.layers)
        self.codec = self.manifest.codec
        self._shards: list[Shard] = []
        self._snapshots: list[dict[str, str]] = []
        self.flagged: list[int | str] = []
        self.torn: list[str] = []  # a line for each unfinished last record of an unsealed run: it is ignored
        self.repeats = 0
        self.unmeasured = 0
        self.asleep: Counter[str] = Counter()
        data = [read_bytes(self.path, self.manifest, rank) for rank in range(self.manifest.world_size)]
        self._moments: np.ndarray | None = None
        if self.manifest.sealed is None and self.manifest.no_statistics is None:
            # The writer of a growing run replaces its snapshots, so that an open log takes what it finds, and at once.
            last = [snapshot for rank, d in enumerate(data) if (snapshot := last_snapshot(d, rank))]
            self._moments = self._read_moments(last)
        self._read_records(data)

    def __repr__(self) -> str:
        m = self.manifest
        rows = f"{len(self):,} rows, finished" if self.finished else f"not finished: {len(self):,} rows so far"
        kind = describe_projection(m.projection, m.rank)
        return f"{type(self).__name__}({str(self.path)!r}, {rows}, {len(self.layers)} layers, {m.dtype}, {kind})"

    def rows(self, layer: str, kind: str = "gradients") -> "Rows":
        """Rows of one layer, read lazily from the memory map.

        Args:
            layer: a name of ``layers``.
            kind: "gradients" (rows, k_out, k_in); "activations" (rows, channels); or "output_gradients"
                (rows, out_features), where ``watch`` asked for them.

        Returns:
            An array-like: slices are numpy views where the dtype has a numpy equal (bfloat16 comes as float32).
        """
        spec, columns = self.layout.find(layer, kind)
        return Rows(self, columns, (spec.k_out, spec.k_in) if kind == "gradients" else (columns.stop - columns.start,))

    def moments(self) -> np.ndarray:
        """The streamed statistics, summed over ranks: (moments_width,) float64; see ``Layout``.

        Raises:
            StateError: if maintenance gave them up, since they were not those of the rows any more.
        """
        if self.manifest.no_statistics is not None:
            raise StateError(
                f"{self.path} has no statistics for kfac and ekfac ({self.manifest.no_statistics}): use "
                "method='shampoo', 'fisher', 'dot' or 'cosine'"
                + (", or log the data again." if self.manifest.gradient == "plain" else ".")
            )
        return self._read_moments(self._snapshots) if self._moments is None else self._moments.copy()

    def _read_moments(self, snapshots: Sequence[dict[str, str]]) -> np.ndarray:
        width = self.layout.moments_width
        try:
            found = [load_moments(self.path, entry, width) for entry in snapshots]
        except CorruptLogError as error:
            if isinstance(error.__cause__, FileNotFoundError) and self.manifest.superseded(self.path):
                raise StateError(CHANGED.format(self.path)) from error
            raise
        return sum(found[1:], found[0]) if found else np.zeros(width)

    def blocks(
        self, rows: int | None = None, share: tuple[int, int] = (0, 1), *, stored: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """Walk through the log in blocks.

        Args:
            rows: rows of a block at most; by default as many as fit in 32 MB.
            share: (i, n) walks through every n-th shard from the i-th on.
            stored: yield rows as they are in the shard, (n, ``codec.columns``), without decoding them.

        Yields:
            The block's place among the rows, and its rows (n, width): a view of the map where nothing is coded.
        """
        row_bytes = self.codec.row_bytes if stored else self.codec.width * self.dtype.itemsize
        step = rows or max(1, BLOCK_BYTES // row_bytes)
        for shard, first, last in ahead(self._pieces(share, max(step, MAP_BYTES // self.codec.row_bytes))):
            data, release = shard.mapped(first, last)
            for start in range(first, last, step):
                stop = min(start + step, last)
                block = data[start - first : stop - first]
                place = slice(shard.first + start, shard.first + stop)
                if self._keep is not None:
                    kept = self._keep[place]
                    place = slice(*self._kept_before[[place.start, place.stop]].tolist())
                    block = block if kept.all() else block[torch.from_numpy(kept)]
                if len(block):  # and not of repeats alone
                    yield place, block if stored else self.codec.decode(block)
                release(stop - first)

    def _pieces(self, share: tuple[int, int], most: int) -> Iterator[tuple[Shard, int, int]]:
        """Verified ranges of at most so many rows: their shard, the first row in it, and the end."""
        for shard in self._shards[share[0] :: share[1]]:
            for first, last in shard.pieces():
                for start in range(first, last, most):
                    yield shard, start, min(start + most, last)

    def gather(self, index: np.ndarray, columns: slice = slice(None)) -> Tensor:
        """Copy rows out by their place in the log: (len(index), width), or some columns that contain whole layers."""
        physical = index if self._keep is None else np.flatnonzero(self._keep)[index]
        out = torch.empty(0, 0, dtype=self.dtype, device="cpu")
        for shard in self._shards:
            inside = (physical >= shard.first) & (physical < shard.first + shard.rows)
            if not inside.any():
                continue
            data = shard.touch()
            if not len(out):  # only now: a file that is there vouches for the width that the manifest states
                out = self._empty(len(physical), columns)
            step = max(1, BLOCK_BYTES // max(self.codec.row_bytes, out.shape[1] * out.itemsize))
            for targets in torch.from_numpy(np.flatnonzero(inside)).split(step):
                sources = torch.from_numpy(physical)[targets] - shard.first
                coded = self.codec.coded
                out[targets] = self.codec.decode(data[sources], columns) if coded else data[:, columns][sources]
        return out if len(out) else self._empty(0, columns)

    def _empty(self, rows: int, columns: slice) -> Tensor:
        return torch.empty(rows, len(range(self.codec.width)[columns]), dtype=self.dtype, device="cpu")

    def span(self, span: range, columns: slice) -> Tensor:
        """As ``gather``, but a view of the map where rows lie in one shard as they are."""
        if span and span.step > 0 and self._keep is None and not self.codec.coded:
            for shard in self._shards:
                if shard.first <= span[0] and span[-1] < shard.first + shard.rows:
                    return shard.touch()[span[0] - shard.first : span[-1] + 1 - shard.first : span.step, columns]
        return self.gather(np.arange(span.start, span.stop, span.step), columns)

    def verify(self) -> list[str]:
        """Read every committed byte against its checksum.

        Returns:
            One line for each problem, with the file and what to do; empty if all is well.
        """
        problems = [
            line for shard in bar(self._shards, "verifying", "shards") for line in _problems(list, shard.verify())
        ]
        if self.manifest.fitted is not None:
            problems += _problems(load_sides, self.path, self.manifest.fitted)
        if self.finished:
            problems += self._strays()
            for entry in self._snapshots if self.manifest.no_statistics is None else ():
                problems += _problems(load_moments, self.path, entry, self.layout.moments_width)
        return [CHANGED.format(self.path)] if self.manifest.superseded(self.path) else problems

    def _strays(self) -> list[str]:
        """Files in a sealed run that look like its own and that nothing names."""
        m = self.manifest
        named = {shard.file.name for shard in self._shards} | {entry["file"] for entry in self._snapshots}
        named |= {commits_name(rank, m.generation) for rank in range(m.world_size)}
        strays = [
            f"{file}: no record names this file, so that it is left over from maintenance that was killed, which "
            "`loghook repair` clears away, or of another run: restore the run from a copy."
            for file in run_files(self.path)
            if file.name not in named
        ]
        try:
            with suppress(OSError):  # of a folder that may only be read
                if strays:
                    lock(self.path / lock_name(0), wait=0).close()
        except LogLockedError:  # maintenance is under way, and these are what it has written or will delete
            return []
        return strays

    def _read_records(self, data: Sequence[bytes]) -> None:
        ids: list[Any] = []
        steps: list[tuple[int, int, int]] = []  # (pass, step, rank) of each block
        counts: list[int] = []  # its rows
        for log in all_commits(self.path, self.manifest, data):
            if log.rest:
                self.torn.append(f"{log.file}: {len(log.rest)} bytes of an unfinished record, ignored")
            for record in log.records:
                self.flagged += record["flagged"]
                self.repeats += record["dropped"]
                self.unmeasured += record["unmeasured"]
                self.asleep.update(record["asleep"])
            for record in log.rows:
                file = log.shard(record["shard"])
                if not self._shards or self._shards[-1].file != file:
                    self._shards.append(Shard(file, self.manifest, self.codec, first=len(ids)))
                self._shards[-1].rows += record["rows"]
                self._shards[-1].records.append((record["start"], record["rows"], record["checksum"]))
                ids += record["ids"]
                steps += [(p, s, log.rank) for p, s, _ in record["steps"]]
                counts += [n for *_, n in record["steps"]]
            self._snapshots += [record["statistics"] for record in log.rows[-1:]]
        keys = np.repeat(np.array(steps, dtype=np.int64).reshape(-1, 3), counts, axis=0)
        self._keep: np.ndarray | None = None
        rule = self.manifest.on_repeat
        if rule in (None, "first") and len(set(ids)) < len(ids):
            self._keep = _first_of_each(ids, keys, outside_too=rule == "first")
            ids = list(itertools.compress(ids, self._keep))
            self.repeats += int((~self._keep).sum())
            self._kept_before = np.concatenate([[0], np.cumsum(self._keep)])  # of each row, and of the log's end
            keys = keys[self._keep]
        self.data_ids = ids
        self.keys = RowKeys(*keys.T)


def _problems(check: Callable[..., object], *arguments: Any) -> list[str]:
    try:
        check(*arguments)
    except (CorruptLogError, StateError) as error:
        return [str(error)]
    return []


def _first_of_each(ids: Sequence[Any], keys: np.ndarray, *, outside_too: bool) -> np.ndarray:
    """Which rows are the first of their id by (pass, step, rank), whatever rank wrote them: (rows,) bool.

    Rows logged outside ``passes()`` (pass -1) are all kept unless ``outside_too``.
    """
    seen: set[Any] = set()
    keep = np.ones(len(ids), dtype=bool)
    for row in np.lexsort((keys[:, 2], keys[:, 1], keys[:, 0])):
        if outside_too or keys[row, 0] >= 0:
            keep[row] = ids[row] not in seen
            seen.add(ids[row])
    return keep


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Iterate over items of which a thread makes one ahead; what it raises is raised here, in its turn.

    A consumer that stops early waits for the item under way, and for no other.
    """
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, "loghook-ahead") as thread:
        future = thread.submit(next, source, end)
        while (item := future.result()) is not end:
            future = thread.submit(next, source, end)
            yield item  # type: ignore[misc]


class Rows:
    """One layer's rows as a lazy array: indexing reads what it is asked for; the first axis decides what that is."""

    def __init__(self, reader: Reader, columns: slice, shape: tuple[int, ...]) -> None:
        self._reader, self._columns = reader, columns
        self.shape = (len(reader), *shape)
        self.ndim = len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype that indexing gives."""
        return self[:0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        first, *rest = key if isinstance(key, tuple) and key else (key,)
        if isinstance(first, int | np.integer):
            place = range(len(self))[first]
            return self[place : place + 1][0][tuple(rest)]
        if isinstance(first, slice):
            values = self._reader.span(range(len(self))[first], self._columns)
        else:
            index = np.arange(len(self))[first]  # numpy's own rules for lists, masks and negative places
            if first is Ellipsis or index.ndim != 1:
                return self[:][key]
            values = self._reader.gather(index, self._columns)
        array = (values.float() if values.dtype == torch.bfloat16 else values).numpy().reshape(-1, *self.shape[1:])
        array.flags.writeable = False
        columns = (slice(None), *rest)
        return array[columns]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self[:]
        return np.array(values, dtype=dtype or values.dtype, copy=copy)

    def __repr__(self) -> str:
        return f"Rows(shape={self.shape}, dtype={self.dtype})"
