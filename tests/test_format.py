"""docs/format.md and the code say the same: tables against what is written, and a reader made from the page alone."""

import dataclasses
import json
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import xxhash
from torch import nn

import loghook
from loghook.log.format import LayerSpec, Layout, Manifest

PAGE = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
DTYPES = ("float64", "float32", "bfloat16", "float16")
BITS = {"int8": 8, "int4": 4, "int1": 1}
TERMS = {"lowrank1": 1, "lowrank2": 2, "lowrank4": 4, "lowrank8": 8}


def table(first_header: str) -> list[str]:
    """Names in the first column of the page's table whose first heading is this, in order."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_header} |"))
    names = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        names.append(re.match(r"\| `([^`]+)` \|", line).group(1))
    assert names
    return names


def write_run(path: Path, dtype: str = "float32", finish: bool = True, **options: object) -> loghook.Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Flatten(), nn.Tanh(), nn.Linear(36, 5))
    other = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Flatten(), nn.Tanh(), nn.Linear(36, 5, bias=False))
    both = nn.ModuleDict({"first": model, "second": other})
    run = loghook.init(path, rank=4, dtype=dtype, **options)
    run.watch(both, exclude="first.0", activations="mean", output_gradients="sum", may_sleep="first.3")
    for _ in run.passes():
        for step in range(3):
            x = torch.randn(4, 4, 8)
            # The last batch repeats an id, as a sampler that fills up a batch does.
            ids = [4 * step + i for i in range(4)] if step < 2 else [8, 9, 10, 0]
            with run(data_id=ids, scale=2.0):
                (model(x).square().sum() + other(x).square().sum()).backward()
    if finish:
        run.finalize()
    run.close()
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("format") / "run"
    # Shards of a few rows and commits at once: several shards and records.
    write_run(path, shard_bytes=1000, commit_seconds=1e-9)
    return path


# The reader below was written from docs/format.md. It must not import loghook.


def checksum(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def read_commits(data: bytes) -> list[dict]:
    records = []
    while data:
        length = int(data[:8], 16)
        assert data[8:9] == b" " and data[41:42] == b" " and data[42 + length : 43 + length] == b"\n"
        body = data[42 : 42 + length]
        assert b"\n" not in body and checksum(body) == data[9:41].decode()
        records.append(json.loads(body))
        assert records[-1]["n"] == len(records) - 1
        data = data[43 + length :]
    return records


def read_values(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"float64": "<f8", "float32": "<f4", "float16": "<f2"}[dtype])


def read_low_bits(data: np.ndarray, widths: list[int], rest: int, bits: int) -> np.ndarray:
    """Rows (n, values) of stored ones (n, bytes), value by value."""
    rows = []
    for stored in data:
        place = 4 * (len(widths) + rest)
        scales = np.frombuffer(stored[: 4 * len(widths)].tobytes(), "<f4")
        row = []
        for scale, width in zip(scales, widths, strict=True):
            codes = stored[place : place + -(-width * bits // 8)].astype(int)
            place += len(codes)
            if bits == 1:
                row += list(turned_back([1 if codes[i // 8] >> i % 8 & 1 else -1 for i in range(width)]) * scale)
                continue
            for value in range(width):
                if bits == 8:
                    c = (codes[value] + 128) % 256 - 128
                else:
                    c = (codes[value % len(codes)] >> 4 * (value // len(codes))) % 16 - 8
                row.append(scale * np.float32(c))
        row += list(np.frombuffer(stored[4 * len(widths) : 4 * (len(widths) + rest)].tobytes(), "<f4"))
        assert len(stored) - place in range(4) and not stored[place:].any()
        rows.append(row)
    return np.array(rows, np.float32)


def turned_back(signs: list[int]) -> np.ndarray:
    """R^T of a layer's signs, in float64."""
    values = np.array(signs, np.float64)
    b = max(2**i for i in range(13) if 2**i <= len(values))
    whole = len(values) // b * b
    flips = [1 - 2 * int(raw >> np.uint64(63)) for raw in np.random.Philox(key=0).random_raw(whole)]
    for start in dict.fromkeys((len(values) - whole, 0)):
        part = values[start : start + whole]
        mixed = [sum((-1) ** ((i % b) & j).bit_count() * part[i // b * b + j] for j in range(b)) for i in range(whole)]
        values[start : start + whole] = np.array(mixed) * b**-0.5 * flips
    return values


def read_low_rank(data: np.ndarray, shapes: list[tuple[int, int]], rest: int, c: int) -> np.ndarray:
    """Rows (n, values) of stored ones (n, bytes), layer by layer."""
    rows = []
    for stored in data:
        place, row = 4 * rest, []
        for k_out, k_in in shapes:
            count = min(c * (k_out + k_in), k_out * k_in)
            numbers = read_values(stored[place : place + 2 * count].tobytes(), "bfloat16")
            place += 2 * count
            if count < k_out * k_in:
                u, v = numbers[: c * k_out].reshape(c, k_out), numbers[c * k_out :].reshape(c, k_in)
                numbers = np.zeros((k_out, k_in), np.float32)
                for j in range(c):
                    numbers = numbers + np.outer(u[j], v[j])
            row += list(numbers.reshape(-1))
        row += list(np.frombuffer(stored[: 4 * rest].tobytes(), "<f4"))
        assert len(stored) - place in (0, 2) and not stored[place:].any()
        rows.append(row)
    return np.array(rows, np.float32)


def read_run(path: Path) -> dict:
    """Read a finished run as the page says: manifest, ids, keys, rows by (kind, layer), statistics by layer."""
    manifest = json.loads((path / "loghook.json").read_text())
    assert manifest["format"] == "loghook" and manifest["version"] == 3
    keys = ("name", "type", "in_features", "out_features", "groups", "bias", "k_in", "k_out")
    text = json.dumps(
        {
            "layers": [[layer[key] for key in keys] for layer in manifest["layers"]],
            "projection": manifest["projection"],
            "seed": None if manifest["projection"] == "none" else manifest["seed"],
            "scheme": 1,
        }
    )
    assert checksum(text.encode()) == manifest["fingerprint"]
    parts = [("gradients", layer["name"], (layer["k_out"], layer["k_in"])) for layer in manifest["layers"]]
    parts += [
        ("activations", layer["name"], (layer["channels"],)) for layer in manifest["layers"] if layer["activations"]
    ]
    parts += [
        ("output_gradients", layer["name"], (layer["out_features"],))
        for layer in manifest["layers"]
        if layer["output_gradients"]
    ]
    width = sum(int(np.prod(shape)) for *_, shape in parts)
    columns, bits, terms = width, BITS.get(manifest["dtype"]), TERMS.get(manifest["dtype"])
    shapes = [(layer["k_out"], layer["k_in"]) for layer in manifest["layers"]]
    widths = [k_out * k_in for k_out, k_in in shapes]
    rest = width - sum(widths)
    if terms:
        columns = (
            -(-(4 * rest + sum(2 * min(terms * sum(shape), w) for shape, w in zip(shapes, widths, strict=True))) // 4)
            * 4
        )
    if bits:
        columns = -(-(4 * (len(widths) + rest) + sum(-(-w * bits // 8) for w in widths)) // 4) * 4
    size = columns * {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}.get(manifest["dtype"], 1)
    ids, places, rows, logs, total = [], [], [], b"", 0.0
    for rank in range(manifest["world_size"]):
        log = (path / f"commits-{rank:05d}.jsonl").read_bytes()
        logs += log
        records = read_commits(log)
        assert isinstance(records[-1]["end"], str) and all(r["run"] == manifest["run_id"] for r in records)
        ends: dict[int, int] = {}
        snapshot = None
        for record in (r for r in records if "shard" in r):
            data = (path / f"rows-{rank:05d}-{record['shard']:05d}.safetensors").read_bytes()
            assert struct.unpack("<Q", data[:8]) == (504,)
            header = json.loads(data[8:512])
            assert header["__metadata__"] == {"run_id": manifest["run_id"]}
            count = header["rows"]["shape"][0]
            assert header["rows"]["shape"] == [count, columns] and len(data) == 512 + count * size
            assert header["rows"]["data_offsets"] == [0, count * size]
            assert record["start"] == ends.get(record["shard"], 0)
            ends[record["shard"]] = record["start"] + record["rows"]
            body = data[512 + record["start"] * size : 512 + (record["start"] + record["rows"]) * size]
            assert checksum(body) == record["checksum"]
            if bits:
                rows.append(read_low_bits(np.frombuffer(body, np.uint8).reshape(-1, columns), widths, rest, bits))
            elif terms:
                rows.append(read_low_rank(np.frombuffer(body, np.uint8).reshape(-1, columns), shapes, rest, terms))
            else:
                rows.append(read_values(body, manifest["dtype"]).reshape(-1, width))
            ids += record["ids"]
            places += [(p, s, rank) for p, s, n in record["steps"] for _ in range(n)]
            assert len(ids) == len(places) == sum(map(len, rows))
            snapshot = record["statistics"]
        data = (path / snapshot["file"]).read_bytes()
        assert checksum(data) == snapshot["checksum"]
        length = struct.unpack("<Q", data[:8])[0]
        entry = json.loads(data[8 : 8 + length])["moments"]
        assert entry["dtype"] == "F64"
        total = total + np.frombuffer(data[8 + length :], "<f8").reshape(entry["shape"])
    assert manifest["sealed"] == {"rows": len(ids), "digest": checksum(logs)}
    rule = manifest["on_repeat"]
    if rule in (None, "first"):
        order = sorted(range(len(ids)), key=lambda i: places[i])
        first: dict = {}
        for i in order:
            first.setdefault(i if places[i][0] < 0 and rule is None else ("id", ids[i]), i)
        kept = sorted(first.values())
    else:
        kept = list(range(len(ids)))
    matrix = np.concatenate(rows)[kept]
    values, end = {}, 0
    for kind, name, shape in parts:
        values[kind, name] = matrix[:, end : end + int(np.prod(shape))].reshape(-1, *shape)
        end += int(np.prod(shape))
    statistics, end = {}, 0
    for layer in manifest["layers"]:
        k, o = layer["k_in"], layer["k_out"]
        inputs, outputs, tokens = np.split(total[end : end + k * k + o * o + 1], [k * k, k * k + o * o])
        statistics[layer["name"]] = inputs.reshape(k, k), outputs.reshape(o, o), float(tokens[0])
        end += k * k + o * o + 1
    assert end == len(total)
    ids, places = [ids[i] for i in kept], [places[i] for i in kept]
    return {"manifest": manifest, "ids": ids, "places": places, "rows": values, "statistics": statistics}


# Page and code.


def test_manifest_table(finished: Path) -> None:
    written = json.loads((finished / "loghook.json").read_text())
    assert [name for name in table("field") if name not in ("fitted", "fidelity", "gradient", "whitening")] == list(
        written
    )  # a random projection has no file
    assert table("field") == ["format", "fingerprint", *(f.name for f in dataclasses.fields(Manifest)), "checksum"]
    stated = written.pop("checksum")
    assert stated == xxhash.xxh3_128_hexdigest(json.dumps(written, sort_keys=True, separators=(",", ":")).encode())
    assert table("layer field") == [f.name for f in dataclasses.fields(LayerSpec)] == list(written["layers"][0])
    assert table("seal key") == list(written["sealed"])
    for names, value in (
        (r"covered total not_covered", "coverage"),
        (r"created python machine versions", "provenance"),
    ):
        assert list(written[value]) == names.split()
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{value}` |"))
        assert all(f"`{name}`" in row for name in names.split())
    assert list(written["coverage"]["not_covered"][0]) == ["name", "parameters", "reason"]
    assert list(written["parameters"]) == ["first", "last"]


def test_record_tables(finished: Path) -> None:
    records = read_commits((finished / "commits-00000.jsonl").read_bytes())
    kinds = {"shard": "rows key", "pass_end": "pass key", "end": "end key"}
    seen = set()
    for record in records:
        kind = next(key for key in kinds if key in record)
        assert sorted(record) == sorted(table("key") + table(kinds[kind]))
        seen.add(kind)
    assert seen == set(kinds)
    assert set(next(r for r in records if "shard" in r)["statistics"]) == {"file", "checksum"}


def test_files_table(finished: Path) -> None:
    number = "R{5}|I{5}|G{5}|N{8}"
    patterns = [re.sub(number, lambda m: rf"\d{{{len(m[0])},}}", re.escape(name)) for name in table("file")]
    for file in finished.iterdir():
        assert any(re.fullmatch(pattern, file.name) for pattern in patterns), file.name
    for pattern, name in zip(patterns, table("file"), strict=True):
        if "GGGGG" not in name and name != "projection.safetensors":  # this run is not maintained, nor is it fitted
            assert any(re.fullmatch(pattern, file.name) for file in finished.iterdir()), pattern


def test_query_scores_and_index_tables(finished: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    with loghook.init(tmp_path / "run", rank=4) as run:
        run.watch(model, "")
        with run(data_id=[0, 1]):
            model(torch.randn(2, 6)).square().sum().backward()
        run.finalize()
        with run.query(data_id=["q"]) as query:
            model(torch.randn(1, 6)).square().sum().backward()
    query.save(tmp_path / "query.safetensors")
    log = loghook.load(tmp_path / "run")
    log.influence(query, top=1).save(tmp_path / "scores.safetensors")
    index = log.index(3, "Flat")
    index.save(tmp_path / "index.safetensors")
    for name, tensors in (
        ("query", {"rows"}),
        ("scores", {"data_ids", "values", "places"}),
        ("index", {"basis", "rows"}),
    ):
        with safetensors.safe_open(tmp_path / f"{name}.safetensors", framework="np") as file:
            header = json.loads(file.metadata()[f"loghook_{name}"])
            assert set(file.keys()) == tensors
        stated = header.pop("checksum")
        assert list(header) == table(f"{name} metadata")
        parts = [
            [key, str(t.dtype), list(t.shape), checksum(t.reshape(-1).view(torch.uint8).numpy().tobytes())]
            for key, t in sorted(safetensors.torch.load_file(tmp_path / f"{name}.safetensors").items())
        ]
        assert stated == checksum(json.dumps([header, *parts], sort_keys=True, separators=(",", ":")).encode())
    assert header == {"seal": log.manifest.sealed["digest"], "factory": "Flat"}
    rows = torch.from_numpy(log.rows("")[:].copy()).flatten(1)
    torch.testing.assert_close(
        safetensors.torch.load_file(tmp_path / "index.safetensors")["rows"], rows @ index.basis.T
    )


@pytest.mark.parametrize("dtype", (*DTYPES, *BITS, *TERMS))
def test_reader_from_the_page(tmp_path: Path, dtype: str) -> None:
    write_run(tmp_path / "run", dtype, shard_bytes=1000, commit_seconds=1e-9)
    mine, log = read_run(tmp_path / "run"), loghook.load(tmp_path / "run")
    assert len(list((tmp_path / "run").glob("rows-*"))) > 1
    assert mine["ids"] == log.data_ids == list(range(11))
    assert mine["places"] == list(zip(log.keys.pass_index, log.keys.step, log.keys.rank, strict=True))
    kinds = {"gradients": set(log.layers), "activations": set(log.layers), "output_gradients": set(log.layers)}
    assert {kind: {n for k, n in mine["rows"] if k == kind} for kind in kinds} == kinds
    for (kind, layer), rows in mine["rows"].items():
        assert np.abs(rows).max() > 0
        np.testing.assert_array_equal(rows, log.rows(layer, kind))
    layout, moments = Layout(log.manifest.layers), log.moments()
    for layer, (inputs, outputs, tokens) in mine["statistics"].items():
        where_in, where_out, count = layout.moments[layer]
        np.testing.assert_array_equal(inputs.ravel(), moments[where_in])
        np.testing.assert_array_equal(outputs.ravel(), moments[where_out])
        assert tokens == moments[count] > 0
    # Eleven samples; the convolution has six positions and two groups, each counted.
    assert [mine["statistics"][n][2] for n in log.layers] == [11, 11 * 6 * 2, 11]


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_open_with_safetensors(tmp_path: Path, dtype: str) -> None:
    write_run(tmp_path / "run", dtype)
    log = loghook.load(tmp_path / "run")
    shard = safetensors.torch.load_file(tmp_path / "run" / "rows-00000-00000.safetensors")["rows"]
    assert shard.dtype == getattr(torch, dtype) and shard.shape == (11, log.layout.width)
    whole = log.layout.columns[log.layers[0]]
    expected = shard[:, whole].float() if dtype == "bfloat16" else shard[:, whole]
    np.testing.assert_array_equal(expected.numpy(), log.rows(log.layers[0])[:].reshape(11, -1))


def test_growing_shard_states_no_rows(tmp_path: Path) -> None:
    model = nn.Linear(6, 3)
    with loghook.init(tmp_path / "run", rank=4, commit_seconds=1e-9) as run:
        run.watch(model, "")
        for step in range(4):
            with run(data_id=[step]):
                model(torch.randn(1, 6)).square().sum().backward()
        deadline = time.monotonic() + 30
        while len(loghook.load(tmp_path / "run")) < 4:
            assert time.monotonic() < deadline, "rows were never committed"
            time.sleep(0.01)
        data = (tmp_path / "run" / "rows-00000-00000.safetensors").read_bytes()
        entry = json.loads(data[8:512])["rows"]
        width = loghook.load(tmp_path / "run").layout.width
        assert entry == {"dtype": "F32", "shape": [0, width], "data_offsets": [0, 0]}
        assert len(data) == 512 + 4 * 4 * width
        assert loghook.load(tmp_path / "run").rows("").shape[0] == 4
        assert (tmp_path / "run" / "lock-00000").exists()
        assert set(json.loads((tmp_path / "run" / "lock-00000").read_text())) == {"process", "host"}
    # Closed without finalize: not sealed, but a valid safetensors file.
    assert json.loads((tmp_path / "run" / "loghook.json").read_text())["sealed"] is None
    assert safetensors.numpy.load_file(tmp_path / "run" / "rows-00000-00000.safetensors")["rows"].shape == (4, width)


def test_torn_tail_and_corruption(finished: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", finish=False)
    commits = tmp_path / "run" / "commits-00000.jsonl"
    whole = commits.read_bytes()
    commits.write_bytes(whole + whole[:100].replace(b"\n", b""))
    assert len(loghook.load(tmp_path / "run")) == 11  # an unfinished last record of an unsealed run is ignored
    commits.write_bytes(whole.replace(b'"dropped":1', b'"dropped":2'))
    with pytest.raises(loghook.LoghookError, match="record 0 is damaged"):
        loghook.load(tmp_path / "run")


def test_fingerprint_leaves_out_what_the_page_says() -> None:
    line = PAGE[PAGE.index("**Not** part of it:") :].split("\n\n")[0]
    spec = LayerSpec(
        name="a", type="T", in_features=4, out_features=4, groups=1, channels=4, bias=True, k_in=2, k_out=2
    )
    changed = {
        "channels": 5, "activations": "mean", "output_gradients": "sum", "batch_dim": 1, "may_sleep": True,
        "flattened": True, "name": "b", "type": "U", "in_features": 5, "out_features": 5, "groups": 2, "bias": False,
        "k_in": 3, "k_out": 3,
    }  # fmt: skip
    assert set(changed) == {f.name for f in dataclasses.fields(LayerSpec)}

    def mark(spec: LayerSpec = spec, **changes: object) -> str:
        base = {
            "run_id": "0" * 32, "projection": "random", "rank": 2, "seed": 0, "dtype": "float32", "id_type": "int",
            "coverage": {"covered": 1, "total": 1, "not_covered": []}, "on_repeat": "all", "world_size": 1,
        }  # fmt: skip
        return Manifest(layers=(spec,), **(base | changes)).fingerprint

    for name, value in changed.items():
        free = mark(dataclasses.replace(spec, **{name: value})) == mark()
        assert free == (f"`{name}`" in line), name
    for name, value in {"dtype": "float16", "rank": 3, "on_repeat": "first", "world_size": 2}.items():
        assert mark(**{name: value}) == mark() and f"`{name}`" in line
    assert mark(seed=1) != mark() and mark(projection="none", seed=1) == mark(projection="none")
