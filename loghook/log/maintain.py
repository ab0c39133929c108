"""Changing a log that is there: repair, delete, merge, compress, and opening a finished one for more rows.

Nothing is altered in place. New shards and new commit logs (of the next *generation*) are written beside the old ones
and flushed; then one replaced manifest makes them count, and what it no longer names is deleted. A kill leaves the old
log or the new one.

All raise CorruptLogError for a damaged log (``repair``: a damaged manifest), LogLockedError for one that is being
written, LogExistsError where the new one's path is taken, StateError for a run that is not finished, ConfigError for
ids or a dtype that do not exist, MismatchError for runs that do not go together, and NotFiniteError for rows that a
dtype cannot hold.
"""

import itertools
import math
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loghook.arguments import choose
from loghook.errors import ConfigError, CorruptLogError, LogExistsError, LoghookError, MismatchError, StateError, some
from loghook.log.codec import DTYPES, Codec
from loghook.log.disk import absolute, checksum, sync_folder, write_atomically, write_flushed, writing
from loghook.log.files import KEPT, PROJECTION, load_moments, load_sides, save_moments
from loghook.log.folder import locked, next_shard, reached, reopened_at
from loghook.log.format import SEVERAL, Layout, Manifest, commits_name, run_files, shard_name, statistics_name
from loghook.log.reader import Reader
from loghook.log.records import Commits, all_commits, encode_record, ids_of, read_commits, sum_up, unnamed
from loghook.log.shard import SHARD_HEADER, ShardFile, close_shard
from loghook.log.writer import finite_rows, not_finite
from loghook.processes import on_cpu, time_of_now

RECODED = 2**22  # values of rows that are written in another dtype at a time
AS_IT_WAS = "The log is as it was. Make room, or a folder that can be written, and call this again."
GENERATION_STEP = 10**10  # snapshots of maintenance are numbered from here, out of the way of every writer's


@dataclass(frozen=True)
class Changed:
    """What maintenance did."""

    rows: int  # rows that the log holds now
    dropped: int  # rows that were left out
    ids: list[int | str]  # their data_ids, as far as they are known, once each: after ``repair`` the ones to log again
    notes: list[str]  # what was found, a line each
    rewritten: bool = False  # whether the log is another generation now


def repair(path: str | Path) -> Changed:
    """Drop what is damaged, keep what is good, and seal again what was sealed.

    Records whose rows do not match their checksum go, and damaged lines of a commit log, which alone named the ids of
    their rows. Where anything went, the statistics are given up, since they cannot be had from the rows: kfac and ekfac
    then refuse. A finished run that lacks a whole commit log is refused: nothing else says whose its rows are.
    """
    path, notes = absolute(path), list[str]()
    with locked(path, AS_IT_WAS) as manifest:
        codec, width = manifest.codec, Layout(manifest.layers).moments_width
        logs = [read_commits(path, manifest, rank, damage=notes) for rank in range(manifest.world_size)]
        if manifest.sealed is not None and not notes and sum_up(logs) != manifest.sealed:
            notes.append(f"{path}: the commit logs are not those that were sealed: rows may be missing")
        for log in logs:
            for record in log.rows:
                if _read_rows(log, record, codec) is None:
                    notes.append(f"{log.shard(record['shard'])}: {record['rows']} rows do not match their checksum")
            try:
                if log.rows and manifest.no_statistics is None:
                    load_moments(path, log.rows[-1]["statistics"], width)
            except CorruptLogError as error:
                notes.append(str(error))
        if notes:
            if nameless := _nameless(manifest, logs):
                notes.append(f"{path}: the ids of {nameless:,} rows are not known, which damaged records alone named")
            reason = "the log was damaged and repaired"
            done = _rewrite(path, manifest, logs, "repair", reason, notes, drop_damaged=True)
            return replace(done, dropped=done.dropped + nameless)
        _clean(path, logs)  # what a killed `delete` or `repair` may have left
        for log in logs:
            for number, rows in log.shard_ends.items():
                file = log.shard(number)
                if close_shard(file, rows, codec, manifest.run_id):
                    notes.append(f"{file}: header and size are those of its rows again, all of which are good")
        return Changed(len(ids_of(logs)), 0, [], notes)


def _nameless(manifest: Manifest, logs: Sequence[Commits]) -> int:
    """How many rows are lost of which no record is left."""
    named = sum(record["rows"] for log in logs for record in log.rows)
    if manifest.sealed is not None:
        return max(0, int(manifest.sealed["rows"]) - named)
    return sum(end for log in logs for end in log.shard_ends.values()) - named


def delete(path: str | Path, ids: Sequence[int | str], *, keep_statistics: bool = False) -> Changed:
    """Take rows out, for instance because a provider withdraws data: their bytes are gone afterwards.

    Args:
        path: the run's folder.
        ids: data_ids whose rows go.
        keep_statistics: keep the statistics of kfac and ekfac, in which the withdrawn data still counts; otherwise
            they go as well, and these methods refuse. Of a writer (a rank, or a log that was merged) all of whose rows
            go they go in any case, and those of the others are then as if it had never been there.
    """
    path, withdrawn = absolute(path), set(ids)
    if not withdrawn:
        raise ConfigError("ids=[] names no rows to delete: pass some.")
    with locked(path, AS_IT_WAS) as manifest:
        logs = all_commits(path, manifest)
        unknown = withdrawn - {i for log in logs for r in log.records for i in (*r.get("ids", ()), *r["flagged"])}
        if unknown:
            raise ConfigError(f"the log {path} holds no rows of {some(sorted(unknown, key=str), 5)}: check the ids.")
        _clean(path, logs)  # what a killed `delete` or `repair` may have left
        counts = keep_statistics or withdrawn.isdisjoint(ids_of(logs))  # what was flagged is not in the statistics
        reason = manifest.no_statistics if counts else "rows were deleted, and the statistics with them"
        for log in logs:
            for record in log.records:
                record["flagged"] = [i for i in record["flagged"] if i not in withdrawn]
        return _rewrite(path, manifest, logs, "delete", reason, withdrawn=withdrawn)


def reopen(path: str | Path) -> None:
    """Open a finished run for more rows: ``init(path, resume=True)`` then logs the ids that are not there yet."""
    path = absolute(path)
    with locked(path, AS_IT_WAS) as manifest:
        if manifest.sealed is None:
            raise StateError(f"{path} is not finished: go on with loghook.init({str(path)!r}, resume=True).")
        logs = all_commits(path, manifest)
        entry = _history_entry("append", rows=manifest.sealed["rows"], **reached(path, manifest, logs))
        manifest.history = [*manifest.history, entry]
        manifest.sealed = None
        manifest.save(path)


def merge(out: str | Path, runs: Sequence[str | Path]) -> Changed:
    """Join finished runs, for instance of several machines, into a new one; each source writer becomes a rank.

    Ids that clash follow the runs' rule for repeats: under "first" a reader takes the first by (pass, step, rank), but
    the statistics count all; a note says so.
    """
    out, paths = absolute(out), [absolute(run) for run in runs]
    if len(paths) < 2:
        raise ConfigError(f"merge got {len(paths)} runs: pass at least two.")
    manifests = [Manifest.load(path) for path in paths]
    first = manifests[0]
    for path, manifest in zip(paths, manifests, strict=True):
        if difference := _difference(manifest, first):
            raise MismatchError(f"{path} and {paths[0]} {difference}")
    if len({(m.run_id, str(m.sealed)) for m in manifests}) < len(manifests):
        raise ConfigError(
            f"merge got one run twice, whose rows would all be there twice: {', '.join(map(str, paths))}."
        )
    values = {m.values for m in manifests} - {None}
    parameters: dict[str, str | None] = {"last": SEVERAL} if len(values) > 1 else first.parameters
    merged = _build(out, list(zip(paths, manifests, strict=True)), {"what": "merge"}, parameters=parameters)
    if len(values) > 1:
        merged.notes.append(
            "the runs ended with different parameter values, or moments of the optimizer: their rows were made at "
            "different points, and no question fits all of them."
        )
    if first.no_statistics is None and (clashing := Reader(out).repeats - sum(Reader(path).repeats for path in paths)):
        merged.notes.append(
            f"{clashing:,} rows have ids that another run has too: readers leave them out, but the statistics, which "
            "kfac and ekfac use, count them as well. For them to count once, no id may be in two runs."
        )
    return merged


@on_cpu
def compress(source: str | Path, out: str | Path, dtype: str) -> Changed:
    """Write the run ``source`` again as ``out``, in another dtype; see ``Log.compress``."""
    choose("dtype", dtype, DTYPES)
    path = absolute(source)
    manifest = Manifest.load(path)
    entry = {"what": "compress", "dtype": manifest.dtype}
    fidelity = manifest.fidelity if dtype == manifest.dtype else None  # it was measured of rows in the other
    return _build(absolute(out), [(path, manifest)], entry, dtype=dtype, fidelity=fidelity)


def _difference(one: Manifest, other: Manifest) -> str | None:
    """Say why two runs cannot be merged, if so."""
    made = () if one.fingerprint == other.fingerprint else ("projection", "rank", "seed", "gradient", "fitted")
    for name in (*made, "layers", "dtype", "id_type", "on_repeat"):
        a, b = getattr(one, name), getattr(other, name)
        if a != b and name == "fitted":
            return "have projections that were fitted apart: log one again with init(fitted=path of the other)."
        if a != b:
            values = "" if name == "layers" else f" ({a!r} and {b!r})"
            return f"differ in {name}{values}: only runs that agree can be merged."
    return None


def _history_entry(what: str, **facts: Any) -> dict[str, Any]:
    """Make a line of the manifest's history."""
    return {"what": what, "when": time_of_now()} | facts


def _build(out: Path, runs: Sequence[tuple[Path, Manifest]], entry: dict[str, Any], **changed: Any) -> Changed:
    """Write a new run of finished ones, all of it or nothing; ``changed`` goes into the first one's manifest."""
    if out.exists():
        raise LogExistsError(f"{out} exists: choose another path for the new run.")
    origins = []
    for path, manifest in runs:
        if manifest.sealed is None:
            raise StateError(f"{path} is not finished: finish it with resume=True first.")
        origins.append({"run_id": manifest.run_id, "rows": manifest.sealed["rows"], "history": manifest.history})
    building = out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    first_path, first = runs[0]
    target = replace(
        first, run_id=uuid.uuid4().hex, world_size=sum(m.world_size for _, m in runs), generation=0, sealed=None,
        no_statistics=next((m.no_statistics for _, m in runs if m.no_statistics), None),
        history=[_history_entry(**entry, runs=origins)], **changed,
    )  # fmt: skip
    with writing(building, AS_IT_WAS):
        building.mkdir(parents=True)
        try:
            sources = [(manifest, log) for path, manifest in runs for log in all_commits(path, manifest)]
            logs, _ = _copy_all(sources, building, target)
            if first.on_repeat == "error" and len(ids := ids_of(logs)) > len(set(ids)):
                raise MismatchError("ids clash between the runs and on_repeat is 'error': delete them in one first.")
            if first.fitted is not None:
                load_sides(first_path, first.fitted)  # which raises if it is damaged
                write_atomically(building / PROJECTION, (first_path / PROJECTION).read_bytes())
            target.sealed = sum_up(logs)
            target.save(building)
            os.rename(building, out)
            sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return Changed(target.sealed["rows"], 0, [], [])


def _rewrite(
    path: Path, manifest: Manifest, logs: Sequence[Commits], what: str, reason: str | None, notes: Sequence[str] = (),
    **left_out: Any,
) -> Changed:  # fmt: skip
    """Write the next generation of a run beside this one, let it count, and delete what it does not name."""
    new = replace(manifest, generation=manifest.generation + 1, no_statistics=reason, sealed=None)
    old_files = set(run_files(path))
    try:
        written, dropped = _copy_all([(manifest, log) for log in logs], path, new, **left_out)
        seal = sum_up(written)
        new.sealed = seal if manifest.sealed is not None else None
        facts = {"rows": seal["rows"], "dropped": len(dropped), "notes": list(notes)}
        entry = _history_entry(what, **facts, **reached(path, manifest, written))
        new.history = [*manifest.history, entry]
        new.save(path)
    except BaseException:
        with suppress(OSError, LoghookError):  # what stays is cleared away by the next
            if Manifest.load(path).generation == manifest.generation:  # nothing of the new one counts
                for file in set(run_files(path)) - old_files:
                    file.unlink()
        raise
    _clean(path, written)
    remaining = set(ids_of(written))
    gone = [i for i in dict.fromkeys(dropped) if i not in remaining]
    return Changed(seal["rows"], len(dropped), gone, list(notes), rewritten=True)


def _copy_all(
    sources: Sequence[tuple[Manifest, Commits]], out: Path, new: Manifest, **left_out: Any
) -> tuple[list[Commits], list[int | str]]:
    """Write the rows of some writers as new shards and new commit logs, of one rank each: these, and ids left out."""
    dropped = [i for rank, source in enumerate(sources) for i in _copy_log(*source, out, new, rank, **left_out)]
    sync_folder(out)
    return all_commits(out, replace(new, history=[])), dropped


def _copy_log(
    old: Manifest, log: Commits, out: Path, new: Manifest, rank: int, *,
    withdrawn: Collection[int | str] = (), drop_damaged: bool = False,
) -> list[int | str]:  # fmt: skip
    """Write one writer's rows as new shards and a new commit log; returns the ids of rows left out."""
    old_codec, codec = old.codec, new.codec
    statistics = _copy_statistics(log, out, new, rank) if log.rows else None
    free = next_shard(out, new, rank)
    # {number of an old shard: that of the new one}. Where rows get smaller, several become one of about the same size.
    new_numbers = {n: free + i * codec.row_bytes // old_codec.row_bytes for i, n in enumerate(log.shard_ends)}
    shard, number = None, -1
    lines: list[bytes] = []
    dropped: list[int | str] = []
    passed_over: list[dict[str, Any]] = []  # records without rows now, of which the next one tells what else they told
    # A run that was damaged goes through all of its data again when it is resumed.
    oldest = math.inf if drop_damaged else reopened_at(old, log.rank)
    for record in log.records:
        new_record = record | {"n": len(lines), "run": new.run_id}
        if "pass_end" in record and record["n"] < oldest:
            passed_over.append(record)
            continue
        if "shard" in record:
            data = _read_rows(log, record, old_codec)
            lost = drop_damaged and data is None
            kept = np.array([not lost and i not in withdrawn for i in record["ids"]])
            dropped += itertools.compress(record["ids"], ~kept)
            if not kept.any():
                passed_over.append(record | {"unmeasured": 0, "asleep": {}})  # which are of its rows
                continue
            if data is None:
                raise CorruptLogError(
                    f"{log.file.parent}: rows do not match their checksum: run `loghook repair` first."
                )
            facts, stored = _kept_rows(record, data, kept, old_codec, codec)
            if shard is None or number != new_numbers[record["shard"]]:
                if shard is not None:
                    shard.close()
                number = new_numbers[record["shard"]]
                shard = ShardFile(out / shard_name(rank, number), codec, new.run_id)
            start, n = shard.append(stored, facts["rows"]), facts["rows"]
            # Which of its rows slept is not known: all that are left, at most.
            record = record | {"asleep": {k: min(v, n) for k, v in record["asleep"].items()}}
            record["unmeasured"] = min(record["unmeasured"], n)
            new_record |= facts | {"shard": number, "start": start, "statistics": statistics}
        told = [*passed_over, record]
        new_record |= {
            "flagged": [i for one in told for i in one["flagged"]],
            "dropped": sum(one["dropped"] for one in told),
            "unmeasured": sum(one["unmeasured"] for one in told),
            "asleep": dict(sum((Counter(one["asleep"]) for one in told), Counter[str]())),
        }
        passed_over = []
        lines.append(encode_record(new_record))
    if shard is not None:
        shard.close()
    write_flushed(out / commits_name(rank, new.generation), b"".join(lines))
    return dropped


def _copy_statistics(log: Commits, out: Path, new: Manifest, rank: int) -> dict[str, str]:
    """Write one writer's last snapshot again, or zeros where it does not count; returns what records say of it."""
    width = Layout(new.layers).moments_width
    moments = np.zeros(width)
    if new.no_statistics is None:
        moments = load_moments(log.file.parent, log.rows[-1]["statistics"], width)
    snapshot = out / statistics_name(rank, (new.generation + 1) * GENERATION_STEP + len(log.records))
    return save_moments(snapshot, moments, new.run_id)


def _kept_rows(
    record: dict[str, Any], data: bytes, kept: np.ndarray, old: Codec, new: Codec
) -> tuple[dict[str, Any], bytes]:
    """What a record says of those of its rows that are kept, but for their place; and their bytes in the new codec."""
    ids, ends = list(itertools.compress(record["ids"], kept)), np.cumsum([n for *_, n in record["steps"]])
    stored = _recoded(np.frombuffer(data, np.uint8).reshape(len(kept), -1)[kept], ids, old, new)
    steps = [[p, s, int(kept[end - n : end].sum())] for (p, s, n), end in zip(record["steps"], ends, strict=True)]
    return {"rows": len(ids), "checksum": checksum(stored), "ids": ids, "steps": steps}, stored


def _read_rows(log: Commits, record: dict[str, Any], codec: Codec) -> bytes | None:
    """Bytes of a record's rows, or None if they are not what was committed."""
    file, size = log.shard(record["shard"]), record["rows"] * codec.row_bytes
    start = SHARD_HEADER + record["start"] * codec.row_bytes
    if not file.is_file() or file.stat().st_size < start + size:  # before anything of that size is allocated
        return None
    with open(file, "rb") as handle:
        handle.seek(start)
        data = handle.read(size)
    return data if checksum(data) == record["checksum"] else None


def _recoded(stored: np.ndarray, ids: Sequence[int | str], old: Codec, new: Codec) -> bytes:
    """Bytes of rows (n, row_bytes) in another dtype, a few at a time."""
    if old.name == new.name:
        return stored.tobytes()
    parts, step = [], max(1, RECODED // old.width)
    for start in range(0, len(stored), step):
        chunk = torch.from_numpy(stored[start : start + step]).view(old.stored)
        rows = old.decode(chunk).to(new.dtype)
        if not finite_rows(rows).all():
            raise not_finite(ids[start : start + step], rows)
        parts.append(new.encode(rows).view(torch.uint8).numpy().tobytes())
    return b"".join(parts)


def _clean(path: Path, logs: Sequence[Commits]) -> None:
    """Delete what these commit logs do not name."""
    for file in unnamed(path, logs):
        file.unlink()
    (path / KEPT).unlink(missing_ok=True)  # it speaks of rows that may be gone
    sync_folder(path)
