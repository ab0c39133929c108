"""What DeepSpeed makes of a model, imitated: its engine, and ZeRO's parameters."""

import contextlib

import pytest
import torch
from torch import nn

import loghook
from loghook.errors import UnsupportedError
from tests.harness import log_and_ask, squares


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
    return log_and_ask(folder, model, squares, torch.ones(2, 6), watch=watch, rank=4)[0]


def test_layers_of_an_engine_are_those_of_the_plain_model(tmp_path):
    plain, engine = logged(tmp_path / "plain", make_model()), DeepSpeedEngine(torch.compile(make_model()))
    log = logged(tmp_path / "engine", engine, include=["0", "2"])
    assert log.layers == plain.layers == ("0", "2") and log.fingerprint == plain.fingerprint
    assert log.manifest.parameters == plain.manifest.parameters
    assert logged(tmp_path / "pipeline", PipelineEngine(make_model())).layers == plain.layers
    plain.attach(engine).close()


def partitioned(model):
    """As ZeRO-3 leaves parameters outside of forward and backward: empty, with their number of values beside them."""
    for number, p in enumerate(model.parameters()):
        p.ds_id, p.ds_numel, p.whole, p.data = number, p.numel(), p.data, p.data.new_empty(0)
    return model


@contextlib.contextmanager
def gathered(model):
    for p in model.parameters():
        p.data = p.whole
    yield
    for p in model.parameters():
        p.grad, p.data = None, p.data.new_empty(0)


def test_partitioned_parameters_count_in_full_and_have_no_digest(tmp_path, capsys):
    plain, model = logged(tmp_path / "plain", make_model(), include="2"), partitioned(make_model())
    model[0].requires_grad_(False)
    run = loghook.init(tmp_path / "run", rank=4)
    run.watch(model, include="2")
    printed = capsys.readouterr().out
    assert "32.5% of 83 parameters" in printed and "27 of 27 trainable" in printed
    with run(data_id=[0, 1]), gathered(model):
        model(torch.ones(2, 6)).pow(2).sum().backward()
    run.finalize()
    manifest = loghook.load(tmp_path / "run").manifest
    assert manifest.coverage == plain.manifest.coverage
    assert set(manifest.parameters.values()) == {None} != set(plain.manifest.parameters.values())


def managed(**marks):
    """A model whose parameters have what DeepSpeed notes on them."""
    model = make_model()
    for p in model.parameters():
        vars(p).update(marks)
    return model


MANAGED = {
    "ZeRO-1 and 2": lambda: managed(_hp_mapping=None, param_idx_in_group=0),
    "ZeRO-3": lambda: partitioned(make_model()),
    "its engine": lambda: DeepSpeedEngine(managed(ds_id=3)),
}


@pytest.mark.parametrize("name", MANAGED)
def test_frozen_passes_are_refused_where_zero_would_train_otherwise_afterwards(name):
    model = MANAGED[name]()
    with pytest.raises(UnsupportedError, match=r"ZeRO.*inside training.*before deepspeed\.initialize"):
        with loghook.frozen(model):
            pass
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", [*MANAGED, "its engine without ZeRO"])
def test_check_is_refused_where_deepspeed_has_a_say_in_backward(name):
    model = MANAGED[name]() if name in MANAGED else DeepSpeedEngine(make_model())
    with pytest.raises(UnsupportedError, match=r"DeepSpeed.*before deepspeed\.initialize"):
        loghook.check(model, lambda model, x: model(x).pow(2).sum(), torch.randn(3, 6))
    assert not any(module._forward_hooks for module in model.modules())
