"""The callback of docs/trainer.md, in Lightning's own trainer."""

import contextlib
import os
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loghook
from tests.harness import sides, whole
from tests.oracle import one_sample_gradients, project, relative_error
from tests.test_docs import ROOT, blocks

lightning = pytest.importorskip("lightning")


@pytest.fixture(autouse=True)
def environment():
    """Lightning leaves addresses and ranks behind, with which the next Trainer would join a group of processes."""
    with mock.patch.dict(os.environ):
        yield


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        if batch["id"][0] == self.stop_at:
            raise RuntimeError("stopped")
        return F.cross_entropy(self.net(batch["x"]), batch["y"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    stop_at = None


def made(folder, callback_of, accumulate=1, stop_at=None):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(10, 6, generator=generator), torch.randint(3, (10,), generator=generator)
    data = [{"id": i, "x": x[i], "y": y[i]} for i in range(10)]
    module = Module()
    module.stop_at = stop_at
    run = loghook.init(folder, rank=4, resume=True)
    run.watch(module)
    trainer = lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[callback_of(run)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder.parent,
    )  # fmt: skip
    return module, run, trainer, torch.utils.data.DataLoader(data, batch_size=3), {"x": x, "y": y}


@pytest.fixture
def callback():
    names = {"lightning": lightning, "contextlib": contextlib}
    page = (ROOT / "docs" / "trainer.md").read_text()
    exec(next(block for block in blocks(page, "python") if "LogTraining" in block), names)
    return lambda run: names["LogTraining"](run, lambda batch: len(batch["y"]))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_rows_are_those_of_each_sample_alone(tmp_path, callback, accumulate):
    module, run, trainer, loader, data = made(tmp_path / "run", callback, accumulate)
    trainer.fit(module, loader)
    run.finalize()
    log = loghook.load(tmp_path / "run")
    assert list(log.data_ids) == list(range(10))

    def loss(module, batch):
        return F.cross_entropy(module.net(batch["x"]), batch["y"], reduction="sum")

    for name, gradients in one_sample_gradients(module, loss, data, log.layers).items():
        p_out, p_in = (whole(side) for side in sides(log, name))
        rows = torch.from_numpy(np.array(log.rows(name)[:]))
        assert relative_error(rows, project(gradients, p_out, p_in)) <= 1e-5


def test_a_training_that_fails_leaves_the_block(tmp_path, callback):
    module, run, trainer, loader, _ = made(tmp_path / "run", callback, stop_at=6)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.fit(module, loader)
    run.finalize()
    assert list(loghook.load(tmp_path / "run").data_ids) == list(range(6))


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_layers_of_a_fabric_module_are_those_of_the_plain_model(tmp_path, strategy):
    """Names, patterns, fingerprint, digest and questions, whichever of the two was watched."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1, strategy=strategy)
    fabric.launch()
    try:
        wrapped, x = fabric.setup_module(Module().net), torch.randn(2, 6)
        for name, model in {"wrapped": wrapped, "plain": Module().net}.items():
            run = loghook.init(tmp_path / name, rank=4)
            run.watch(model, include="2")
            with run(data_id=[0, 1]):
                fabric.backward(model(x).pow(2).sum())
            run.finalize()
            run.close()
        log, plain = (loghook.load(tmp_path / name) for name in ("wrapped", "plain"))
        assert log.layers == plain.layers == ("2",) and log.fingerprint == plain.fingerprint
        assert log.manifest.coverage == plain.manifest.coverage and log.manifest.parameters == plain.manifest.parameters
        for asked in (wrapped, Module().net):
            with plain.attach(asked) as asker, asker.query(data_id=["q"]) as question:
                fabric.backward(asked(x[:1]).pow(2).sum())
            assert log.influence(question, "dot").values[0, 0] > 0
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
