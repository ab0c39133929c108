"""The runner: what it collects, that it goes on where it was killed, what it refuses."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from loghook.errors import ConfigError, LogLockedError, RetrainingError
from loghook.evaluate.lds import random_subsets
from loghook.evaluate.retrain import retrain

SUBSETS = random_subsets(6, 4, seed=1)


def outputs(members: np.ndarray, seed: int, calls: Path, pause: float = 0.0) -> np.ndarray:
    """A training that leaves a trace of having been called."""
    (calls / f"{''.join(str(int(x)) for x in members)}-{seed}-{time.time_ns()}").touch()
    time.sleep(pause)
    return np.array([members.sum() + seed, members @ np.arange(len(members)), torch.get_num_threads()])


def expected(threads: int) -> np.ndarray:
    return np.array([[[s.sum() + seed, s @ np.arange(6), threads] for seed in (3, 9)] for s in SUBSETS], dtype=float)


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    (tmp_path / "calls").mkdir()
    return tmp_path / "calls"


@pytest.mark.parametrize("workers", [0, 2])
def test_every_subset_and_seed_once_and_never_again(workers: int, tmp_path: Path, calls: Path) -> None:
    train = functools.partial(outputs, calls=calls)
    results = retrain(train, SUBSETS, [3, 9], tmp_path / "out", workers=workers)
    assert (results == expected(torch.get_num_threads() if workers == 0 else 1)).all()
    names = [file.name.rsplit("-", 1)[0] for file in calls.iterdir()]
    assert len(names) == 8 and len(set(names)) == 8
    next((tmp_path / "out").glob("subset00002-seed9.npy")).unlink()  # as if it had not come
    assert (retrain(train, SUBSETS, [3, 9], tmp_path / "out", workers=workers) == results).all()
    assert len(list(calls.iterdir())) == 9


SCRIPT = """
import functools, signal, sys
from pathlib import Path
from tests.test_retrain import SUBSETS, outputs
from loghook.evaluate.retrain import retrain
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    folder = Path(sys.argv[1])
    train = functools.partial(outputs, calls=folder / "calls", pause=float(sys.argv[2]))
    retrain(train, SUBSETS, [3, 9], folder / "out", workers=2)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed(sent: signal.Signals, tmp_path: Path, calls: Path) -> None:
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    process = subprocess.Popen([*command, "0.5"], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (done := list((tmp_path / "out").glob("*.npy"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)
    assert sent == signal.SIGKILL or ("KeyboardInterrupt" in said and "BrokenProcessPool" not in said), said
    started = len(list(calls.iterdir()))
    time.sleep(1.2)
    assert len(list(calls.iterdir())) == started  # the workers have ended with their parent
    done = list((tmp_path / "out").glob("*.npy"))
    assert 0 < len(done) < 8
    kept = {file.name: file.stat().st_mtime_ns for file in done}
    train = functools.partial(outputs, calls=calls)
    assert (retrain(train, SUBSETS, [3, 9], tmp_path / "out", workers=1) == expected(1)).all()
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == at for name, at in kept.items())


def test_another_plan_is_refused(tmp_path: Path, calls: Path) -> None:
    train = functools.partial(outputs, calls=calls)
    retrain(train, SUBSETS, [3, 9], tmp_path / "out", workers=0, recipe={"rate": 0.1, "widths": (1, 2)})
    again = functools.partial(retrain, train, path=tmp_path / "out", workers=0)
    recipe = {"rate": 0.1, "widths": (1, 2)}
    again(subsets=SUBSETS, seeds=[3, 9], recipe=recipe)
    for change, says in (
        ({"subsets": ~SUBSETS}, "other subsets"),
        ({"subsets": SUBSETS[:2]}, "other subsets and shape"),
        ({"subsets": np.concatenate([SUBSETS[::-1], SUBSETS])}, "other subsets"),
        ({"recipe": {"rate": 0.2, "widths": (1, 2)}}, "other recipe"),
    ):
        with pytest.raises(ConfigError, match=says):
            again(**({"subsets": SUBSETS, "seeds": [3, 9], "recipe": recipe} | change))
    assert len(list(calls.iterdir())) == 8


def test_a_truth_grows(tmp_path: Path, calls: Path) -> None:
    more = functools.partial(retrain, functools.partial(outputs, calls=calls), path=tmp_path / "out", workers=0)
    recipe = {"rate": np.float32(0.5), "steps": np.int64(3)}
    old = more(subsets=SUBSETS, seeds=[3, 9], recipe=recipe)
    seeded = more(subsets=SUBSETS, seeds=[5, 9, 3], recipe={"rate": 0.5, "steps": 3})
    assert (seeded[:, [2, 1]] == old).all() and len(list(calls.iterdir())) == 12
    larger = random_subsets(6, 7, seed=1)  # the first of which are the same
    assert (more(subsets=larger, seeds=[3, 9], recipe=recipe)[:4] == old).all() and len(list(calls.iterdir())) == 18
    with pytest.raises(ConfigError, match="is not JSON"):
        more(subsets=larger, seeds=[3], recipe={"path": tmp_path})


def test_outputs_may_have_a_graph(tmp_path: Path) -> None:
    found = retrain(lambda *_: torch.ones(3, requires_grad=True).bfloat16(), SUBSETS, [3], tmp_path / "out", workers=0)
    assert found.shape == (4, 1, 3) and (found == 1).all()
    with pytest.raises(RetrainingError, match="subset 0 with seed 3 raised"):
        retrain(lambda *_: ["a"], SUBSETS, [3], tmp_path / "text", workers=0)


def test_a_function_that_no_other_process_can_import(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be handed to another process .*workers=0"):
        retrain(lambda *_: [1.0], SUBSETS, [3], tmp_path / "out", workers=1)
    assert not multiprocessing.active_children()


def fails(members: np.ndarray, seed: int) -> np.ndarray:
    if members.tolist() == SUBSETS[1].tolist() and seed == 9:
        raise ValueError("the loss is a banana")
    return np.zeros(2)


def dies(members: np.ndarray, seed: int) -> np.ndarray:
    os.kill(os.getpid(), signal.SIGKILL)
    return np.zeros(2)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_subset_and_seed(workers: int, tmp_path: Path) -> None:
    says = "subset 1 with seed 9 raised ValueError: the loss is a banana"
    with pytest.raises(RetrainingError, match=says) as caught:
        retrain(fails, SUBSETS, [3, 9], tmp_path / "out", workers=workers)
    assert isinstance(caught.value.__cause__, ValueError)
    assert len(list((tmp_path / "out").glob("*.npy"))) >= 3  # what came before is kept
    assert not multiprocessing.active_children()


def test_a_process_that_dies(tmp_path: Path) -> None:
    with pytest.raises(RetrainingError, match="a training process died"):
        retrain(dies, SUBSETS, [3, 9], tmp_path / "out", workers=1)


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (lambda members, seed: np.zeros((2, 2)), "subset 0 with seed 3 returned an array of shape"),
        (lambda members, seed: np.array([np.nan, 1.0]), "1 values that are not finite"),
        (lambda members, seed: np.zeros(1 + seed), "subset 0 with seed 9 returned 10 outputs and the first one 4"),
    ],
)
def test_outputs_that_cannot_be_used(train: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(RetrainingError, match=says):
        retrain(train, SUBSETS, [3, 9], tmp_path / "out", workers=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("subsets", "seeds", "workers", "says"),
    [
        (SUBSETS.astype(int), [0], 0, "of bool"),
        (SUBSETS, [], 0, "at least one"),
        (SUBSETS, 3, 0, "seeds=3 must be a list"),
        (SUBSETS, [1, 1], 0, "different"),
        (SUBSETS, [1], -1, "workers=-1"),
    ],
)
def test_bad_input(subsets: np.ndarray, seeds: list[int], workers: int, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        retrain(fails, subsets, seeds, tmp_path / "out", workers=workers)


def test_one_at_a_time(tmp_path: Path, calls: Path) -> None:
    def nested(members: np.ndarray, seed: int) -> np.ndarray:
        return retrain(fails, SUBSETS, [3, 9], tmp_path / "out", workers=0)[0, 0]

    with pytest.raises(RetrainingError, match="LogLockedError") as caught:
        retrain(nested, SUBSETS, [3, 9], tmp_path / "out", workers=0)
    assert isinstance(caught.value.__cause__, LogLockedError)
