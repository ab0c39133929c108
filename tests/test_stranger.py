"""A log from a stranger is safe to open: whatever it says is refused as what it is, and nothing huge is allocated."""

import contextlib
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loghook
from loghook.errors import CorruptLogError, VersionError
from loghook.log.format import LayerSpec, Made, canonical_json, checksum
from loghook.log.records import decode_record, encode_record
from tests.test_fuzz import write_log

HUGE = 1 << 39


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stranger") / "run"
    write_log(path, 0)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Alter the manifest as somebody does who knows the format: with a checksum that fits."""
    body = json.loads((path / "loghook.json").read_text())
    body.pop("checksum")
    change(body)
    with contextlib.suppress(TypeError, KeyError):
        layers = [LayerSpec(**layer) for layer in body["layers"]]
        body["fingerprint"] = Made(tuple(layers), body["projection"], body["seed"]).fingerprint
    body["checksum"] = checksum(canonical_json(body))
    (path / "loghook.json").write_bytes(json.dumps(body, indent=1).encode())


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The same for the first record, in a run that is not sealed."""
    file = path / "commits-00000.jsonl"
    records = [decode_record(line) for line in file.read_bytes().splitlines()]
    change(records[0])
    file.write_bytes(b"".join(encode_record(record) for record in records))
    rewrite(path, lambda body: body.update(sealed=None))


def layer(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body["layers"][0].update(changes)


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "version": lambda body: body.update(version=-1),
    "version text": lambda body: body.update(version="1"),
    "version later": lambda body: body.update(version=4),
    "huge layer": layer(in_features=HUGE, k_in=HUGE, out_features=HUGE, k_out=HUGE),
    "larger layer": layer(in_features=1 << 80, k_in=1 << 80),
    "negative layer": layer(k_in=-1),
    "layer of text": layer(k_in="2"),
    "layer of true": layer(k_in=True),
    "layer of a fraction": layer(k_in=2.0),
    "unknown key": lambda body: body.update(extra=1),
    "unknown key of a layer": layer(extra=1),
    "no layers": lambda body: body.update(layers=[]),
    "layers text": lambda body: body.update(layers="ab"),
    "world_size": lambda body: body.update(world_size=10**12),
    "world_size negative": lambda body: body.update(world_size=-1),
    "run_id": lambda body: body.update(run_id="../../etc/passwd"),
    "dtype": lambda body: body.update(dtype="object"),
    "dtype list": lambda body: body.update(dtype=["float32"]),
    "generation": lambda body: body.update(generation=-1),
    "generation text": lambda body: body.update(generation="/../../x"),
    "sealed": lambda body: body.update(sealed={"rows": "many"}),
    "sealed list": lambda body: body.update(sealed=[]),
    "coverage": lambda body: body.update(coverage=None),
    "parameters": lambda body: body.update(parameters={"last": {}}),
    "history": lambda body: body.update(history={}),
}
RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "rows": lambda r: r.update(rows=HUGE),
    "rows negative": lambda r: r.update(rows=-2),
    "start": lambda r: r.update(start=HUGE),
    "start negative": lambda r: r.update(start=-512),
    "shard path": lambda r: r.update(shard="../../x"),
    "shard huge": lambda r: r.update(shard=1 << 70),
    "statistics path": lambda r: r["statistics"].update(file="../../../etc/passwd"),
    "statistics none": lambda r: r.update(statistics=None),
    "ids nested": lambda r: r.update(ids=[[1], [2]]),
    "ids text": lambda r: r.update(ids=["a", "b"]),
    "ids number": lambda r: r.update(ids=2),
    "ids true": lambda r: r.update(ids=[True, False]),
    "steps": lambda r: r.update(steps=[[0, 0, HUGE], [0, 0, -HUGE + 2]]),
    "steps text": lambda r: r.update(steps="abc"),
    "asleep": lambda r: r.update(asleep=[1]),
    "dropped": lambda r: r.update(dropped="1"),
    "unknown key": lambda r: r.update(extra=1),
    "missing key": lambda r: r.pop("ids"),
    "checksum": lambda r: r.update(checksum=None),
    "end": lambda r: (r.clear(), r.update(n=0, end=True)),
}


def refused(path: Path) -> None:
    """Every way in is refused with an error of ours, and memory stays flat."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((CorruptLogError, VersionError)) as error:
        log = loghook.load(path)
        problems = log.verify()
        log.moments()
        raise CorruptLogError(problems[0])
    assert str(path) in str(error.value)
    for use in (
        lambda log: log.rows(log.layers[0])[:],
        lambda log: log.rows(log.layers[0])[[0]],
        lambda log: list(log.blocks()),
    ):
        with pytest.raises((CorruptLogError, VersionError)):
            use(loghook.load(path))
    with pytest.raises((CorruptLogError, VersionError)):
        loghook.init(path, resume=True)
        raise CorruptLogError("the run is taken as finished; nothing of it is read")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200e3


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_manifest_of_a_stranger(good: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    shutil.copytree(good, tmp_path / "run")
    rewrite(tmp_path / "run", change)
    refused(tmp_path / "run")


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS.keys())
def test_record_of_a_stranger(good: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    shutil.copytree(good, tmp_path / "run")
    forge(tmp_path / "run", change)
    refused(tmp_path / "run")


@pytest.mark.parametrize("data", [b"[" * 10**6, b'{"a":' * 10**5, b"9" * 10**5, b"", b"\x00" * 100, b'{"format":1}'])
def test_deep_and_odd_json(good: Path, tmp_path: Path, data: bytes) -> None:
    shutil.copytree(good, tmp_path / "run")
    (tmp_path / "run" / "loghook.json").write_bytes(data)
    refused(tmp_path / "run")
    shutil.copy(good / "loghook.json", tmp_path / "run")
    line = b"%08x %s %s\n" % (len(data), checksum(data).encode(), data)
    (tmp_path / "run" / "commits-00000.jsonl").write_bytes(line)
    refused(tmp_path / "run")


@pytest.mark.parametrize("shape", [[HUGE, 8], [-1, 8], [1 << 70, 8], ["a", 8], [True, 8], None])
def test_shard_header_of_a_stranger(good: Path, tmp_path: Path, shape: Any) -> None:
    shutil.copytree(good, tmp_path / "run")
    file = tmp_path / "run" / "rows-00000-00000.safetensors"
    data = file.read_bytes()
    header = json.loads(data[8:512])
    header["rows"]["shape"] = shape
    file.write_bytes(data[:8] + json.dumps(header).encode().ljust(504) + data[512:])
    refused(tmp_path / "run")
