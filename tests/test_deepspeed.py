"""What DeepSpeed makes of a model, imitated: its engine, and ZeRO's parameters."""

import torch
from torch import nn

import loghook


class DeepSpeedEngine(nn.Module):
    """A wrapper that answers for all attributes of its model, as DeepSpeed's does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args):
        return self.module(*args)


class PipelineEngine(DeepSpeedEngine):
    """DeepSpeed has several, all of them kinds of the first."""


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def logged(folder, model, **watch):
    run = loghook.init(folder, rank=4)
    run.watch(model, **watch)
    with run(data_id=[0, 1]):
        model(torch.ones(2, 6)).pow(2).sum().backward()
    run.finalize()
    run.close()
    return loghook.load(folder)


def test_layers_of_an_engine_are_those_of_the_plain_model(tmp_path):
    plain, engine = logged(tmp_path / "plain", make_model()), DeepSpeedEngine(torch.compile(make_model()))
    log = logged(tmp_path / "engine", engine, include=["0", "2"])
    assert log.layers == plain.layers == ("0", "2") and log.fingerprint == plain.fingerprint
    assert log.manifest.parameters == plain.manifest.parameters
    assert logged(tmp_path / "pipeline", PipelineEngine(make_model())).layers == plain.layers
    plain.attach(engine).close()
