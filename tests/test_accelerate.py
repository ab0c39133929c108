"""A script as one writes it for ``accelerate launch``, on two processes: each id once, rows as in one process."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader

import loghook
from tests.harness import sides, whole
from tests.oracle import one_sample_gradients, project, relative_error

SAMPLES, BATCH, CLASSES = 19, 4, 5  # two ranks of 4: the third round has 3 samples, and is filled up with the first 5
SCENARIOS = {
    "plain": {},
    "accumulate": {"gradient_accumulation_steps": 2},  # three rounds: the last window is shorter
    "bf16": {"mixed_precision": "bf16"},
}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 16), nn.GELU(), nn.Linear(16, CLASSES))


def make_data():
    torch.manual_seed(1)
    return [{"id": i, "x": torch.randn(6, 8), "y": torch.randint(CLASSES, (6,))} for i in range(SAMPLES)]


def script(out, **options):
    """The user's training script."""
    accelerator = Accelerator(cpu=True, **options)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = DataLoader(make_data(), batch_size=BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())

    assert loghook.check(model, loss_fn, next(iter(loader)), scale=lambda batch: batch["y"].numel())
    run = loghook.init(out, rank=6)
    run.watch(model)
    for _ in run.passes():
        for batch in loader:
            with accelerator.accumulate(model):
                n = batch["y"].numel() * accelerator.gradient_accumulation_steps
                with run(data_id=batch["id"], scale=n, scaler=accelerator.scaler):
                    accelerator.backward(loss_fn(model, batch))
                optimizer.step()
                optimizer.zero_grad()
    run.finalize()
    run.close()
    accelerator.wait_for_everyone()
    return accelerator.num_processes


def every_script(folder):
    """All scenarios in one process group; the resets are needed only because they share a process."""
    for name, options in SCENARIOS.items():
        AcceleratorState._reset_state()
        GradientState._reset_state()
        with contextlib.redirect_stdout(None):
            yield script(f"{folder}/{name}", **options)
    AcceleratorState._reset_state()
    GradientState._reset_state()


def oracle(log):
    """What autograd gives for one sample at a time, in float64."""
    data = make_data()
    batch = {name: torch.stack([sample[name] for sample in data]) for name in ("x", "y")}
    batch["x"] = batch["x"].double()

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten(), reduction="sum")

    gradients = one_sample_gradients(make_model().double(), loss, batch, log.layers)
    return {name: project(gradients[name], *(whole(side) for side in sides(log, name))) for name in log.layers}


def rows(log):
    order = np.argsort(log.data_ids)
    return {layer: torch.from_numpy(log.rows(layer)[:][order].copy()) for layer in log.layers}


def test_each_id_once_with_the_rows_of_one_process(tmp_path):
    assert list(every_script(tmp_path / "one")) == [1, 1, 1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*command, str(tmp_path / "two")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in SCENARIOS:
        one, two = (loghook.load(tmp_path / processes / name) for processes in ("one", "two"))
        for log, repeats, ranks in ((one, 0, {0}), (two, 5, {0, 1})):
            assert sorted(log.data_ids) == list(range(SAMPLES)) and not log.verify(), name
            assert log.repeats == repeats and set(log.keys.rank) == ranks
            for layer, expected in oracle(log).items():
                assert relative_error(rows(log)[layer], expected) <= (3e-2 if name == "bf16" else 1e-5), (name, layer)
        for layer, expected in rows(one).items():
            assert relative_error(rows(two)[layer], expected) <= (1e-2 if name == "bf16" else 1e-5), (name, layer)


if __name__ == "__main__":
    assert list(every_script(sys.argv[1])) == [2, 2, 2]
