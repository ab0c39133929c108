"""Commit logs: one checked line for each record. What a record says is data from a file and is checked as such."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loghook.errors import CorruptLogError
from loghook.log.format import Manifest, checksum, commits_name, parse_object

_COMMON = {"n", "run", "flagged", "dropped", "unmeasured", "asleep"}
_ROWS = _COMMON | {"shard", "start", "rows", "checksum", "ids", "steps", "statistics"}
_KINDS = (_ROWS, _COMMON | {"pass_end"}, _COMMON | {"end"})
_LARGEST = 1 << 53  # beyond it other languages' JSON readers lose digits


def encode_record(record: dict[str, Any]) -> bytes:
    """One line of a commit log: length, checksum, JSON. A line that does not match both is not committed."""
    body = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s %s\n" % (len(body), checksum(body).encode(), body)


def decode_records(data: bytes) -> tuple[list[dict[str, Any]], int, str | None]:
    """Read the lines of a commit log.

    Returns:
        The records, the number of bytes they take, and what is wrong with the bytes after them: None if nothing
        follows, "torn" for an incomplete last line, or a description of a damaged line.
    """
    records: list[dict[str, Any]] = []
    position = 0
    while position < len(data):
        end = data.find(b"\n", position)
        if end < 0:
            return records, position, "torn"
        line = data[position:end]
        body = line[42:]
        if line[:42] != b"%08x %s " % (len(body), checksum(body).encode()):
            return records, position, f"record {len(records)} is damaged"
        try:
            record = parse_object(body)
        except ValueError as error:
            return records, position, f"record {len(records)} is not valid ({error})"
        if record.get("n") != len(records):
            return records, position, f"record {len(records)} is missing"
        records.append(record)
        position = end + 1
    return records, position, None


@dataclass(frozen=True)
class Commits:
    """One writer's commit log, checked."""

    rank: int  # whose it is
    file: Path  # where it is
    records: list[dict[str, Any]]  # its records
    data: bytes  # the bytes of these records
    torn: int = 0  # how many bytes of an unfinished record follow

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Those of its records that name rows."""
        return [record for record in self.records if "shard" in record]

    @property
    def shard_ends(self) -> dict[int, int]:
        """How many rows of each shard are committed: {number of the shard: rows}."""
        return {r["shard"]: r["start"] + r["rows"] for r in self.rows}


def read_commits(path: Path, manifest: Manifest, rank: int) -> Commits:
    """Read and check the commit log of one of a run's writers; one that does not exist is empty."""
    file = path / commits_name(rank, manifest.generation)
    try:
        data = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise CorruptLogError(f"{file} cannot be read ({error}): {REMEDY}.") from error
    records, size, wrong = decode_records(data)
    if wrong not in (None, "torn"):
        raise CorruptLogError(f"{file}: {wrong}: {REMEDY}.")
    ends: dict[int, int] = {}
    for record in records:
        try:
            check_record(record, manifest, rank)
            if "shard" in record:
                if record["start"] != ends.get(record["shard"], 0):
                    raise ValueError(f"leaves a gap at row {ends.get(record['shard'], 0)} of shard {record['shard']}")
                ends[record["shard"]] = record["start"] + record["rows"]
        except ValueError as error:
            raise CorruptLogError(f"{file}: record {record['n']} {error}: {REMEDY}.") from error
    return Commits(rank, file, records, data[:size], len(data) - size)


REMEDY = "restore it from a copy, or run `loghook repair` on the run"


def all_commits(path: Path, manifest: Manifest) -> list[Commits]:
    """Read the commit logs of all of a run's writers, in the order of ranks."""
    return [read_commits(path, manifest, rank) for rank in range(manifest.world_size)]


def check_record(record: dict[str, Any], manifest: Manifest, rank: int) -> None:
    """Raise ValueError, a phrase that follows "record n", unless a writer could have written this."""
    if record.get("run") != manifest.run_id:
        raise ValueError("belongs to another run")
    if set(record) not in _KINDS:
        raise ValueError(f"has other keys than a record has ({', '.join(sorted(record))})")
    for key in ("dropped", "unmeasured", "pass_end", "shard", "start", "rows"):
        if key in record and not _count(record[key]):
            raise ValueError(f"has {key} {record[key]!r}")
    if not isinstance(record["asleep"], dict) or not all(map(_count, record["asleep"].values())):
        raise ValueError("has counts of sleeping layers that are no counts")
    if "end" in record and not isinstance(record["end"], str):
        raise ValueError(f"has end {record['end']!r}")
    _check_ids(record["flagged"], manifest.id_type)
    if "shard" not in record:
        return
    _check_ids(record["ids"], manifest.id_type)
    steps, snapshot = record["steps"], record["statistics"]
    if not isinstance(steps, list) or not all(
        isinstance(s, list) and len(s) == 3 and _count(s[0], -1) and _count(s[1]) and _count(s[2]) for s in steps
    ):
        raise ValueError("has steps that are no [pass, step, count]")
    if len(record["ids"]) != record["rows"] or sum(n for *_, n in steps) != record["rows"] or not record["rows"]:
        raise ValueError("has ids, steps and rows that differ in number")
    name = rf"statistics-{rank:05d}-\d{{8,18}}\.safetensors"
    if (
        not isinstance(snapshot, dict)
        or set(snapshot) != {"file", "checksum"}
        or not isinstance(snapshot["file"], str)
        or not re.fullmatch(name, snapshot["file"], re.ASCII)
    ):
        raise ValueError("names statistics that are none of this writer's")
    if not isinstance(record["checksum"], str) or not isinstance(snapshot["checksum"], str):
        raise ValueError("has a checksum that is no text")


def _count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < _LARGEST


def _check_ids(ids: Any, id_type: str) -> None:
    kinds = set(map(type, ids)) if isinstance(ids, list) else {list}
    if not kinds <= {int, str}:
        raise ValueError("has ids that are neither int nor str")
    if any(kind.__name__ != id_type for kind in kinds):
        raise ValueError(f"has ids that are not {id_type}")
