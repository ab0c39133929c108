"""Changing a log that is there: repair, delete, merge, compress, and opening a finished one for more rows.

Nothing is altered in place. New shards and new commit logs (of the next *generation*) are written beside the old ones
and flushed; then one replaced manifest makes them count, and what it no longer names is deleted. A kill leaves the old
log or the new one.

All raise CorruptLogError for a damaged log (``repair``: a damaged manifest), LogLockedError for one that is being
written, LogExistsError where the new one's path is taken, StateError for a run that is not finished, ConfigError for
ids or a dtype that do not exist, MismatchError for runs that do not go together, and NotFiniteError for rows that a
dtype cannot hold.
"""

import dataclasses
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loghook.errors import ConfigError, CorruptLogError, LogExistsError, MismatchError, StateError
from loghook.log.codec import DTYPES
from loghook.log.disk import lock, sync_folder, writing
from loghook.log.fitted import load_sides, save_sides
from loghook.log.folder import close_shard, sum_up
from loghook.log.format import VERSION, Layout, Manifest, checksum, commits_name, parse_object, shard_header, shard_name
from loghook.log.moments import load_moments
from loghook.log.reader import Reader
from loghook.log.records import Commits, all_commits, check_record, decode_records, encode_record, read_commits
from loghook.log.rewrite import Changed, Keep, clean, copy_log, entry, ids_of, read_rows, rewrite, shard_of
from loghook.processes import on_cpu

SEVERAL = "several"  # in place of a digest of parameter values, where rows are gradients at different ones


def repair(path: str | Path) -> Changed:
    """Drop what is damaged, keep what is good, and seal again what was sealed.

    Records whose rows do not match their checksum go, and everything after a damaged line of a commit log. Where
    anything went, the statistics are given up, since they cannot be had from the rows: kfac and ekfac then refuse.
    """
    path = Path(path)
    manifest = Manifest.load(path)
    row_bytes = manifest.codec.row_bytes
    notes: list[str] = []
    lost: list[int | str] = []
    with _locked(path, manifest):
        logs: list[Commits] = []
        for rank in range(manifest.world_size):
            log, missing, note = _good_records(path, manifest, rank)
            logs.append(log)
            lost += missing
            notes += note
        sealed = manifest.sealed
        if sealed is not None and not notes and sum_up(logs) != sealed:
            notes.append(f"{path}: the commit logs are not those that were sealed: rows may be missing")
        for log in logs:
            for record in log.rows:
                if read_rows(path, log, record, row_bytes) is None:
                    notes.append(f"{shard_of(path, log, record)}: {record['rows']} rows do not match their checksum")
            try:
                if log.rows and manifest.no_statistics is None:
                    load_moments(path, log.rows[-1]["statistics"], Layout(manifest.layers).moments_width)
            except CorruptLogError as error:
                notes.append(str(error))
        if not notes:
            clean(path, manifest, logs)  # what a killed `delete` or `repair` may have left
            return Changed(len(ids_of(logs)), 0, [], _mend_headers(path, manifest, logs))

        keep: Keep = lambda record, data: np.full(record["rows"], bool(data))  # noqa: E731
        reason = "the log was damaged and repaired"
        return rewrite(path, manifest, logs, keep, "repair", reason, notes=notes, lost=lost, drop_ends=True)


def delete(path: str | Path, ids: Sequence[int | str], *, keep_statistics: bool = False) -> Changed:
    """Take rows out, for instance because a provider withdraws data: their bytes are gone afterwards.

    Args:
        path: the run's folder.
        ids: data_ids whose rows go.
        keep_statistics: keep the statistics of kfac and ekfac, in which the withdrawn data still counts; otherwise
            they go as well, and these methods refuse.
    """
    path, gone = Path(path), set(ids)
    manifest = Manifest.load(path)
    with _locked(path, manifest):
        logs = _recovered(path, manifest)
        unknown = gone - {i for log in logs for r in log.records for i in (*r.get("ids", ()), *r["flagged"])}
        if unknown or not gone:
            raise ConfigError(f"the log {path} holds no rows of {sorted(map(repr, unknown))[:5]}: check the ids.")

        reason = manifest.no_statistics if keep_statistics else "rows were deleted, and the statistics with them"
        return rewrite(path, manifest, logs, _all_but(path, gone), "delete", reason, gone=gone)


def reopen(path: str | Path) -> None:
    """Open a finished run for more rows: ``init(path, resume=True)`` then logs the ids that are not there yet."""
    path = Path(path)
    manifest = Manifest.load(path)
    if manifest.sealed is None:
        raise StateError(f"{path} is not finished: go on with loghook.init({str(path)!r}, resume=True).")
    with _locked(path, manifest):
        logs = _recovered(path, manifest)
        done = entry("append", rows=manifest.sealed["rows"], records=[len(log.records) for log in logs])
        manifest.sealed, manifest.history = None, [*manifest.history, done]
        manifest.save(path)


def merge(out: str | Path, runs: Sequence[str | Path]) -> Changed:
    """Join finished runs, for instance of several machines, into a new one; each source writer becomes a rank.

    Ids that clash follow the runs' rule for repeats: under "first" a reader takes the first by (pass, step, rank), but
    the statistics count all; a note says so.
    """
    out, paths = Path(out), [Path(run) for run in runs]
    if len(paths) < 2:
        raise ConfigError(f"merge got {len(paths)} runs: pass at least two.")
    manifests = [Manifest.load(path) for path in paths]
    first = manifests[0]
    for path, manifest in zip(paths, manifests, strict=True):
        for name in ("fingerprint", "layers", "dtype", "id_type", "on_repeat"):
            if getattr(manifest, name) != getattr(first, name):
                raise MismatchError(f"{path} and {paths[0]} differ in {name}: only runs that agree can be merged.")
    done = entry("merge", runs=[_origin(m) for m in manifests])
    values = {m.parameters.get("last") or m.parameters.get("first") for m in manifests} - {None}
    parameters: dict[str, str | None] = {"last": SEVERAL} if len(values) > 1 else first.parameters
    merged = _build(out, list(zip(paths, manifests, strict=True)), first.dtype, [done], parameters)
    if len(values) > 1:
        merged.notes.append(
            "the runs ended with different parameter values: their rows are gradients at different points, and no "
            "question fits all of them."
        )
    if first.no_statistics is None and (clashing := Reader(out).repeats - sum(Reader(path).repeats for path in paths)):
        merged.notes.append(
            f"{clashing:,} rows have ids that another run has too: readers leave them out, but the statistics, which "
            "kfac and ekfac use, count them as well. For them to count once, no id may be in two runs."
        )
    return merged


@on_cpu
def compress(source: str | Path, out: str | Path, dtype: str) -> Changed:
    """Write a finished run again with another dtype, usually one of fewer bits; the old one stays.

    Args:
        source: the run's folder.
        out: folder of the new run.
        dtype: how its rows are stored, as in ``loghook.init``.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}.")
    path, manifest = Path(source), Manifest.load(Path(source))
    done = entry("compress", runs=[_origin(manifest)], dtype=manifest.dtype)
    return _build(Path(out), [(path, manifest)], dtype, [done], manifest.parameters)


def _origin(manifest: Manifest) -> dict[str, Any]:
    """What a new run's history says of one that it was made of."""
    rows = manifest.sealed["rows"] if manifest.sealed else None
    return {"run_id": manifest.run_id, "rows": rows, "history": manifest.history}


def _build(
    out: Path, runs: Sequence[tuple[Path, Manifest]], dtype: str, history: list[dict[str, Any]],
    parameters: dict[str, str | None],
) -> Changed:  # fmt: skip
    """Write a new run of finished ones, all of it or nothing."""
    if out.exists():
        raise LogExistsError(f"{out} exists: choose another path for the new run.")
    for path, manifest in runs:
        if manifest.sealed is None:
            raise StateError(f"{path} is not finished: finish it with resume=True first.")
    manifests = [manifest for _, manifest in runs]
    first, building = manifests[0], out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    run_id, reasons = uuid.uuid4().hex, [m.no_statistics for m in manifests if m.no_statistics]
    target = dataclasses.replace(
        first, run_id=run_id, world_size=sum(m.world_size for m in manifests), generation=0, sealed=None, dtype=dtype,
        no_statistics=reasons[0] if reasons else None, history=history, parameters=parameters,
        version=VERSION,
    )  # fmt: skip
    with writing(building):
        building.mkdir(parents=True)
        try:
            logs: list[Commits] = []
            for path, manifest in runs:
                for log in _recovered(path, manifest):
                    copy_log(path, manifest, log, building, target, len(logs), _all_but(path))
                    logs.append(read_commits(building, target, len(logs)))
            if first.on_repeat == "error" and len(ids := ids_of(logs)) > len(set(ids)):
                raise MismatchError("ids clash between the runs and on_repeat is 'error': delete them in one first.")
            if first.fitted is not None:
                save_sides(building, load_sides(runs[0][0], first.fitted))
            target.sealed = sum_up(logs)
            target.save(building)
            os.rename(building, out)
            sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return Changed(target.sealed["rows"], 0, [], [])


def _mend_headers(path: Path, manifest: Manifest, logs: Sequence[Commits]) -> list[str]:
    """Let every shard end after its rows and its header say so; a note for each that did not."""
    codec, notes = manifest.codec, []
    for log in logs:
        for index, rows in log.shard_ends.items():
            file = path / shard_name(log.rank, index)
            header = shard_header(rows, codec, manifest.run_id)
            if close_shard(file, header, rows * codec.row_bytes):
                notes.append(f"{file}: header and size are those of its rows again, all of which are good")
    return notes


def _all_but(path: Path, gone: Set[int | str] = frozenset()) -> Keep:
    def keep(record: dict[str, Any], data: bytes) -> np.ndarray:
        if not data:
            raise CorruptLogError(f"{path}: rows do not match their checksum: run `loghook repair` first.")
        return np.array([i not in gone for i in record["ids"]])

    return keep


@contextmanager
def _locked(path: Path, manifest: Manifest) -> Iterator[None]:
    with writing(path), ExitStack() as held:
        for rank in range(manifest.world_size):
            held.callback(lock(path / f"lock-{rank:05d}").close)
        yield


def _recovered(path: Path, manifest: Manifest) -> list[Commits]:
    logs = all_commits(path, manifest)
    if manifest.sealed is not None and sum_up(logs) != manifest.sealed:
        raise CorruptLogError(f"{path}: its commit logs are not those that were sealed: run `loghook repair` first.")
    return logs


def _good_records(path: Path, manifest: Manifest, rank: int) -> tuple[Commits, list[int | str], list[str]]:
    """Read a commit log up to its first damaged line: what is good, ids of what follows, and what was found."""
    file = path / commits_name(rank, manifest.generation)
    data = file.read_bytes() if file.is_file() else b""
    records, size, wrong = decode_records(data)
    for record in records:
        try:
            check_record(record, manifest, rank)
        except ValueError as error:
            wrong, records = f"record {record['n']} {error}", records[: record["n"]]
            size = sum(len(encode_record(r)) for r in records)
            break
    lost: list[int | str] = []
    for line in data[size:].splitlines(keepends=True):
        # Behind the damage lines are out of order, so that they do not count, but they say whose rows are lost.
        body = line[42:-1]
        if line[:42] == b"%08x %s " % (len(body), checksum(body).encode()):
            found = decode_records(encode_record(_object(body)))[0]
            lost += [i for r in found for i in r.get("ids", ()) if type(i).__name__ == manifest.id_type]
    torn = wrong == "torn" and manifest.sealed is None
    notes = [] if wrong is None or torn else [f"{file}: {wrong}"]
    return Commits(rank, file, records, data[:size]), lost, notes


def _object(body: bytes) -> dict[str, Any]:
    try:
        return parse_object(body) | {"n": 0}
    except ValueError:
        return {}
