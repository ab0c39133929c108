"""Commit logs: one checked line for each record. What a record says is data from a file and is checked as such."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from loghook.errors import CorruptLogError
from loghook.log.disk import checksum, parse_object
from loghook.log.format import MANIFEST, Manifest, commits_name, run_files, shard_name

REPAIR = "restore it from a copy, or run `loghook repair` on the run"
_COMMON = {"n", "run", "flagged", "dropped", "unmeasured", "asleep"}
_ROWS = _COMMON | {"shard", "start", "rows", "checksum", "ids", "steps", "statistics"}
_KINDS = (_ROWS, _COMMON | {"pass_end"}, _COMMON | {"end"})
_COUNTS = ("n", "dropped", "unmeasured", "pass_end", "shard", "start", "rows")


def encode_record(record: dict[str, Any]) -> bytes:
    """One line of a commit log: length, checksum, JSON. A line that does not match both is not committed."""
    body = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s %s\n" % (len(body), checksum(body).encode(), body)


def decode_record(line: bytes) -> dict[str, Any]:
    """Read a line, without its newline; ValueError, a phrase that follows "record n", if it is damaged."""
    body = line[42:]
    if line[:42] != b"%08x %s " % (len(body), checksum(body).encode()):
        raise ValueError("is damaged")
    try:
        return parse_object(body)
    except ValueError as error:
        raise ValueError(f"is not valid ({error})") from error


@dataclass(frozen=True)
class Commits:
    """One writer's commit log, checked."""

    rank: int  # whose it is
    file: Path  # where it is
    records: list[dict[str, Any]]  # its records
    data: bytes  # the bytes of these records
    rest: bytes  # what follows them: nothing, or an unfinished record

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Those of its records that name rows."""
        return [record for record in self.records if "shard" in record]

    @property
    def shard_ends(self) -> dict[int, int]:
        """How many rows of each shard are committed: {number of the shard: rows}."""
        return {r["shard"]: r["start"] + r["rows"] for r in self.rows}

    def shard(self, number: int) -> Path:
        return self.file.parent / shard_name(self.rank, number)

    def blocks(self) -> Iterator[tuple[int, int, list[Any]]]:
        """The pass, the step and the ids of each block, some of which have none."""
        for record in self.rows:
            start = 0
            for pass_index, step, rows in record["steps"]:
                yield pass_index, step, record["ids"][start : start + rows]
                start += rows


def last_change(manifest: Manifest) -> dict[str, Any]:
    """The last line of a run's history that says how many records and shards each writer had, or nothing."""
    return next((e for e in reversed(manifest.history) if e["what"] in ("append", "delete", "repair")), {})


def told(change: dict[str, Any], key: str, rank: int) -> int:
    """What such a line says of a writer: 0 of one that came later."""
    numbers: list[int] = change.get(key, [])
    return numbers[rank] if rank < len(numbers) else 0


def read_bytes(path: Path, manifest: Manifest, rank: int) -> bytes:
    """Read the commit log of one of a run's writers as it is; one that has not begun may have none."""
    file = path / commits_name(rank, manifest.generation)
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        # The first writer's is there before the manifest, and maintenance writes one for each.
        begun = max(int((path / MANIFEST).exists()), len(last_change(manifest).get("records", ())))
        if rank >= begun and manifest.sealed is None:
            return b""
        raise CorruptLogError(
            f"{file} is missing, and nothing else says whose its rows are: restore it from a copy. To give its rows "
            "up, put an empty file in its place and run `loghook repair`."
        ) from error
    except OSError as error:
        raise CorruptLogError(f"{file} cannot be read ({error}): {REPAIR}.") from error


def last_snapshot(data: bytes, rank: int) -> dict[str, str] | None:
    """What the last record of rows in a commit log says of its statistics, if nothing is wrong with it."""
    *lines, _ = data.split(b"\n")
    with suppress(ValueError):  # of a damaged record, which ``read_commits`` reports
        snapshots = (record["statistics"] for record in map(decode_record, reversed(lines)) if "statistics" in record)
        if _is_snapshot(last := next(snapshots, None), rank):
            return last
    return None


def read_commits(
    path: Path, manifest: Manifest, rank: int, *, data: bytes | None = None, damage: list[str] | None = None
) -> Commits:
    """Check the commit log of one of a run's writers, of which ``data`` was read if it is given.

    Damage is an error, or is noted in ``damage``, and then the other records count, in their order.
    """
    file = path / commits_name(rank, manifest.generation)
    data = read_bytes(path, manifest, rank) if data is None else data
    *lines, rest = data.split(b"\n")
    records: list[dict[str, Any]] = []
    ends: dict[int, int] = {}
    damaged = False

    def note(number: int, problem: str) -> None:
        if damage is None:
            raise CorruptLogError(f"{file}: record {number} {problem}: {REPAIR}.")
        damage.append(f"{file}: record {number} {problem}")

    for number, line in enumerate(lines):
        try:
            record = decode_record(line)
            check_record(record, manifest, rank)
            gap = _gap(record, records, ends)
            if gap is not None and not damaged:  # behind a damaged record there is one
                note(number, gap)
            if "shard" in record:
                ends[record["shard"]] = record["start"] + record["rows"]
            records.append(record)
        except ValueError as error:
            note(number, str(error))
            damaged = True
    if rest and manifest.sealed is not None:
        note(len(lines), "is torn")
    if not damaged and len(lines) < (least := told(last_change(manifest), "records", rank)):
        note(len(lines), f"is missing: there were {least} records already")
    return Commits(rank, file, records, data[: len(data) - len(rest)], rest)


def _gap(record: dict[str, Any], before: Sequence[dict[str, Any]], ends: Mapping[int, int]) -> str | None:
    """What is missing between a record and those before it, or None; ValueError where it cannot come after them."""
    expected = before[-1]["n"] + 1 if before else 0
    if record["n"] < expected:
        raise ValueError(f"is record {record['n']} once more")
    if "shard" in record:
        shard, start = record["shard"], ends.get(record["shard"], 0)
        if shard < next(reversed(ends), 0):
            raise ValueError(f"goes back to shard {shard}")
        if record["start"] < start:
            raise ValueError(f"goes back to row {record['start']} of shard {shard}")
        if record["start"] > start:
            return f"leaves a gap at row {start} of shard {shard}"
    return "is missing" if record["n"] > expected else None


def all_commits(path: Path, manifest: Manifest, data: Sequence[bytes | None] | None = None) -> list[Commits]:
    """Check the commit logs of all of a run's writers, in the order of ranks; they must match its seal."""
    data = data or [None] * manifest.world_size
    logs = [read_commits(path, manifest, rank, data=data[rank]) for rank in range(manifest.world_size)]
    if manifest.sealed is not None and manifest.sealed != (total := sum_up(logs)):
        raise CorruptLogError(
            f"{path}: the commit logs hold {total['rows']:,} rows where {manifest.sealed['rows']:,} were sealed, or "
            f"were altered: {REPAIR}."
        )
    return logs


def sum_up(logs: Iterable[Commits]) -> dict[str, Any]:
    """Make the seal of some commit logs, in the order of ranks: {"rows", "digest"}."""
    digest, rows = xxhash.xxh3_128(), 0
    for log in logs:
        digest.update(log.data)
        rows += sum(record["rows"] for record in log.rows)
    return {"rows": rows, "digest": digest.hexdigest()}


def unnamed(path: Path, logs: Iterable[Commits], snapshots: int = 0) -> list[Path]:
    """Files that look like a run's own and that these do not name; of snapshots they name the last so many, or all."""
    named = set()
    for log in logs:
        named |= {log.file, *map(log.shard, log.shard_ends)}
        named |= {path / record["statistics"]["file"] for record in log.rows[-snapshots:]}
    return [file for file in run_files(path) if file not in named]


def ids_of(logs: Iterable[Commits]) -> list[int | str]:
    """Ids of all rows, in order, repeats included."""
    return [i for log in logs for record in log.rows for i in record["ids"]]


def check_record(record: dict[str, Any], manifest: Manifest, rank: int) -> None:
    """Raise ValueError, a phrase that follows "record n", unless a writer could have written this."""
    if record.get("run") != manifest.run_id:
        raise ValueError("belongs to another run")
    if set(record) not in _KINDS:
        raise ValueError(f"has other keys than a record has ({', '.join(sorted(record))})")
    good = {key: _is_count(record[key]) for key in _COUNTS if key in record}
    good["flagged"] = _are_ids(record["flagged"], manifest.id_type)
    good["asleep"] = isinstance(record["asleep"], dict) and all(map(_is_count, record["asleep"].values()))
    good["end"] = isinstance(record.get("end", ""), str)
    if "shard" in record:
        steps = record["steps"]
        good["checksum"] = isinstance(record["checksum"], str)
        good["ids"] = _are_ids(record["ids"], manifest.id_type)
        good["steps"] = isinstance(steps, list) and all(
            isinstance(s, list) and len(s) == 3 and _is_count(s[0], -1) and _is_count(s[1]) and _is_count(s[2])
            for s in steps
        )
        good["statistics"] = _is_snapshot(record["statistics"], rank)
    for key, is_good in good.items():
        if not is_good:
            raise ValueError(f"has {key} {record[key]!r:.100}")
    if "shard" in record and not len(record["ids"]) == record["rows"] == sum(n for *_, n in record["steps"]) > 0:
        raise ValueError("has ids, steps and rows that differ in number")


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 1 << 53  # beyond it other languages' JSON readers lose digits


def _are_ids(value: Any, id_type: str) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {{"int": int, "str": str}[id_type]}


def _is_snapshot(value: Any, rank: int) -> bool:
    """Whether it names a snapshot, of this writer's alone, since old ones are deleted."""
    if not isinstance(value, dict) or {k: type(v) for k, v in value.items()} != {"file": str, "checksum": str}:
        return False
    return re.fullmatch(rf"statistics-{rank:05d}-\d{{8,18}}\.safetensors", value["file"], re.ASCII) is not None
