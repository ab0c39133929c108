"""``verify`` finds everything: a thousand altered copies of a log, none of which is read as good."""

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import loghook
from loghook.errors import CorruptLogError

COPIES = 1000


def write_log(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    run = loghook.init(path, rank=2, shard_bytes=150, commit_seconds=1e-9)
    run.watch(model)
    for _ in run.passes():
        for start in range(0, 12, 2):
            with run(data_id=[start, start + 1]):
                model(torch.randn(2, 4)).square().sum().backward()
    run.finalize()
    run.close()


def mine(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if not f.name.startswith("lock-") and f.suffix != ".tmp")


def flip(folder: Path, other: Path, draw: random.Random) -> str:
    file = draw.choice(mine(folder))
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= draw.randint(1, 255)
    file.write_bytes(data)
    return file.name


def flip_header(folder: Path, other: Path, draw: random.Random) -> str:
    file = draw.choice(sorted(folder.glob("rows-*")))
    data = bytearray(file.read_bytes())
    data[draw.randrange(512)] ^= draw.randint(1, 255)
    file.write_bytes(data)
    return file.name


def space(folder: Path, other: Path, draw: random.Random) -> str:
    """White space that means nothing in JSON."""
    file = folder / "loghook.json"
    data = bytearray(file.read_bytes())
    places = [i for i, byte in enumerate(data) if byte in b" \n"]
    data[draw.choice(places)] = draw.choice(b"\t\r")
    file.write_bytes(data)
    return file.name


def truncate(folder: Path, other: Path, draw: random.Random) -> str:
    file = draw.choice(mine(folder))
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])
    return file.name


def append(folder: Path, other: Path, draw: random.Random) -> str:
    file = draw.choice(mine(folder))
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.randint(1, 600)))
    return file.name


def remove(folder: Path, other: Path, draw: random.Random) -> str:
    file = draw.choice(mine(folder))
    file.unlink()
    return file.name


def swap(folder: Path, other: Path, draw: random.Random) -> str:
    a, b = draw.sample(sorted(folder.glob("rows-*")), 2)
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)
    return draw.choice((a.name, b.name))


def foreign(folder: Path, other: Path, draw: random.Random) -> str:
    file = draw.choice([f for f in mine(folder) if f.suffix != ".json"])
    shutil.copyfile(other / file.name, file)
    return file.name


def stray(folder: Path, other: Path, draw: random.Random) -> str:
    name = draw.choice(("rows-00000-00099.safetensors", "commits-00001.jsonl", "statistics-00000-00000099.safetensors"))
    shutil.copyfile(next(other.glob(name[:6] + "*")), folder / name)
    return name


def stale(folder: Path, other: Path, draw: random.Random) -> str:
    file = folder / "commits-00000.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: draw.randrange(len(lines))]))
    return file.name


ALTER: tuple[Callable[[Path, Path, random.Random], str], ...] = (
    flip, flip, flip, flip_header, space, truncate, append, remove, swap, foreign, stray, stale,
)  # fmt: skip


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    write_log(folder / "good", 0)
    write_log(folder / "other", 1)
    return folder / "good", folder / "other"


def test_a_thousand_altered_copies_are_reported_and_never_read_as_good(logs: tuple[Path, Path], tmp_path: Path) -> None:
    good, other = logs
    log = loghook.load(good)
    ids, pristine, moments = log.data_ids, {name: log.rows(name)[:].copy() for name in log.layers}, log.moments()
    assert not log.verify()
    draw = random.Random(0)
    for number in range(COPIES):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for file in mine(good):
            shutil.copyfile(file, copy / file.name)
        alter = draw.choice(ALTER)
        name = alter(copy, other, draw)
        what = f"copy {number}: {alter.__name__} {name}"
        try:
            opened = loghook.load(copy)
        except CorruptLogError as error:
            assert "copy" in str(error) and (name in str(error) or "commit logs" in str(error)), f"{what}: {error}"
            continue
        problems = opened.verify()
        assert any(name in line and "copy" in line for line in problems), f"{what} was not reported: {problems}"
        # Whatever can still be read is what was written.
        assert opened.data_ids == ids, what
        for layer, rows in pristine.items():
            for key in (slice(None), slice(0, 3), [1, 5, 9], -1):
                with contextlib.suppress(CorruptLogError):
                    assert np.array_equal(opened.rows(layer)[key], rows[key]), what
        with contextlib.suppress(CorruptLogError):
            assert np.array_equal(opened.moments(), moments), what
