"""Rows of what the optimiser makes of a gradient: against autograd, one sample at a time, changed the slow way."""

import contextlib
import json
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import loghook
from loghook.cli import app
from loghook.errors import BatchError, CheckpointWarning, ConfigError, MismatchError, StateError, UnsupportedError
from loghook.evaluate import trust
from loghook.log import maintain
from loghook.project import outer
from tests.harness import log_and_ask, sides, whole
from tests.oracle import one_sample_gradients, project, relative_error

KINDS = ("normalized", "adam")
ADAMS = {
    "adam": torch.optim.Adam,
    "amsgrad": lambda p, **o: torch.optim.AdamW(p, amsgrad=True, **o),
    "radam": torch.optim.RAdam,
    "nadam": torch.optim.NAdam,
    "fused": lambda p, **o: torch.optim.AdamW(p, fused=True, **o),
}


def loss_fn(model, x):
    return model(x).pow(2).sum()


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)).double()


def data(n=6, tokens=4):
    return torch.randn(n, tokens, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trained(model, x, loss=loss_fn, adam=torch.optim.Adam, steps=3, **options):
    """An optimizer that took some steps, with other options than the default ones for all but the weights."""
    weights, others = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": weights}, {"params": others, "betas": (0.8, 0.95), "eps": 1e-3}]
    optimizer = adam([g for g in groups if g["params"]], **{"lr": 0.01} | options)
    for _ in range(steps):
        optimizer.zero_grad()
        (loss(model, x) / len(x)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def changed(kind, optimizer, module, gradients, bias=True):
    """The formula of docs/methods.md, column by column, in float64."""
    columns = []
    options = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, G in zip(("weight", "bias"), gradients.split([gradients.shape[2] - bias, int(bias)], 2), strict=True):
        if not G.shape[2]:
            continue
        parameter = getattr(module, name)
        state, group = optimizer.state[parameter], options[id(parameter)]
        m, v = state["exp_avg"].double(), state["exp_avg_sq"].double()
        turned = isinstance(module, Conv1D | nn.Embedding) and name == "weight"
        m, v = (t.T if turned else t.reshape(len(t), -1) for t in (m, v))
        (b1, b2), eps = group["betas"], group["eps"]
        if kind == "adam":
            columns.append((b1 * m + (1 - b1) * G) / torch.sqrt(b2 * v + (1 - b2) * G**2 + eps))
        else:
            columns.append(G / (torch.sqrt(v / (1 - b2 ** float(state["step"]))) + eps))
    return torch.cat(columns, 2)


def expected(kind, model, optimizer, log, x, loss=loss_fn, scale=1.0):
    rows = {}
    gradients = one_sample_gradients(model, loss, x, log.layers)
    specs = {spec.name: spec for spec in log.manifest.layers}
    for name, G in gradients.items():
        module, bias = model.get_submodule(name), specs[name].bias
        if not bias and getattr(module, "bias", None) is not None:
            G = G[:, :, :-1]
        p_out, p_in = sides(log, name)
        rows[name] = project(changed(kind, optimizer, module, scale * G, bias), whole(p_out), whole(p_in))
    return rows


def logged(folder, kind, model, optimizer, x, loss=loss_fn, call=None, size=4, watch=None, block=None, **options):
    run = loghook.init(folder, **{"rank": 4, "dtype": "float64", "gradient": kind} | options)
    with contextlib.redirect_stdout(None):
        run.watch(model, optimizer=optimizer, **watch or {})
    for ids in torch.arange(len(x)).split(size):
        with run(data_id=ids, **block or {}):
            loss(model if call is None else call, x[ids]).backward()
    with run.query(data_id=list(range(3)), **{k: v for k, v in (block or {}).items() if k == "scale"}) as query:
        loss(model, x[:3]).backward()
    run.finalize()
    run.close()
    return loghook.load(folder), query


def assert_rows(source, rows, tolerance=1e-9):
    for name, values in rows.items():
        assert values.abs().max() > 0
        error = relative_error(torch.from_numpy(np.array(source.rows(name)[:])), values)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adam", ADAMS)
def test_rows_of_every_adam_against_autograd(tmp_path, kind, adam):
    model, x = make(), data()
    optimizer = trained(model, x, adam=ADAMS[adam])
    log, query = logged(tmp_path / "run", kind, model, optimizer, x)
    assert_rows(log, expected(kind, model, optimizer, log, x))
    assert log.manifest.gradient == kind
    if kind == "adam":  # LESS's questions are plain gradients
        plain = one_sample_gradients(model, loss_fn, x[:3], log.layers)
        asked = {n: project(G, *(whole(side) for side in sides(log, n))) for n, G in plain.items()}
    else:
        asked = expected(kind, model, optimizer, log, x[:3])
    assert_rows(query, asked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_each_row_may_have_a_scale_of_its_own(tmp_path, kind, packed):
    """As rows need that are gradients of each sample's own mean, of a loss that is a mean over all tokens."""
    model, x = make(), data(4)
    optimizer = trained(model, x)
    scale = torch.tensor([0.5, 3.0, -2.0, 10.0])
    batch, segments = (x.flatten(0, 1)[None], torch.arange(4).repeat_interleave(4)[None]) if packed else (x, None)
    run = loghook.init(tmp_path / "run", rank=4, dtype="float64", gradient=kind)
    run.watch(model, optimizer=optimizer, output_gradients="sum")
    with run(data_id=range(4), scale=scale, segments=segments):
        loss_fn(model, batch).backward()
    with run.query(data_id=range(4), scale=scale, segments=segments) as query:
        loss_fn(model, batch).backward()
    run.finalize()
    log, factors = loghook.load(run.path), scale[:, None, None].double()
    assert_rows(log, expected(kind, model, optimizer, log, x, scale=factors))
    plain = {name: factors * G for name, G in one_sample_gradients(model, loss_fn, x, log.layers).items()}
    asked = {n: project(G, *(whole(side) for side in sides(log, n))) for n, G in plain.items()}
    assert_rows(query, asked if kind == "adam" else expected(kind, model, optimizer, log, x, scale=factors))
    outputs = model(x)
    per_sample = torch.autograd.grad(loss_fn(lambda _: outputs, x), outputs)[0].sum(1) * scale[:, None]
    assert relative_error(torch.from_numpy(log.rows("4", "output_gradients")[:].copy()), per_sample) <= 1e-9
    with (
        pytest.raises(BatchError, match=r"scale has shape \(4,\) in a block of 3 ids"),
        run.query([1, 2, 3], scale=scale),
    ):
        pass


def test_a_scale_for_each_row_does_not_go_with_statistics(tmp_path):
    model, x = make(), data(4)
    run = loghook.init(tmp_path / "run", rank=4)
    run.watch(model)
    scale = torch.tensor([0.5, 3.0, -2.0, 10.0])
    with pytest.raises(BatchError, match="statistics are sums over all samples"), run(data_id=range(4), scale=scale):
        loss_fn(model, x).backward()
    with pytest.raises(BatchError, match="must be finite and not 0"), run.query(range(4), scale=torch.zeros(4)):
        pass
    fit = loghook.fit(tmp_path / "factors")
    fit.watch(model)
    for _ in fit.passes():
        with pytest.raises(BatchError, match="statistics are sums"), fit(data_id=range(4), scale=scale):
            loss_fn(model, x).backward()
        with fit(data_id=range(4)):
            loss_fn(model, x).backward()
    with fit.query(data_id=["q"]) as query:
        loss_fn(model, x[:1]).backward()
    found = []
    for options in ({}, {"scale": scale}):  # a sample's score has its own scale, and a norm takes the size out
        for normalize in (None, "unit"):
            scoring = fit.score(query, normalize=normalize)
            with scoring(data_id=range(4), **options):
                loss_fn(model, x).backward()
            found.append(scoring.scores().values)
    np.testing.assert_allclose(found[2], found[0] * scale.numpy(), rtol=1e-5)
    np.testing.assert_allclose(found[3], found[1] * np.sign(scale.numpy()), rtol=1e-5)


def layers_of_all_kinds():
    torch.manual_seed(0)
    conv = nn.Conv1d(4, 6, 3, groups=2)
    return nn.Sequential(nn.Embedding(11, 4, padding_idx=0), Turn(), conv, nn.Tanh(), Turn(), Conv1D(5, 6)).double()


class Turn(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2).contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_groups_embeddings_and_transposed_weights(tmp_path, kind, monkeypatch):
    model = layers_of_all_kinds()
    x = torch.randint(11, (6, 8), generator=torch.Generator().manual_seed(0))
    optimizer = trained(model, x)
    watch = {"include": ["*", "0"], "activations": "mean", "output_gradients": "sum"}
    monkeypatch.setattr(outer, "CHUNK_BYTES", 1)  # one sample at a time
    log, _ = logged(tmp_path / "run", kind, model, optimizer, x, watch=watch, rank=3, block={"scale": 2.0})
    assert log.layers == ("0", "2", "5")
    assert_rows(log, expected(kind, model, optimizer, log, x, scale=2.0))
    plain, _ = logged(tmp_path / "plain", "plain", model, None, x, watch=watch, rank=3, block={"scale": 2.0})
    for stored, names in (("activations", log.layers[1:]), ("output_gradients", log.layers)):
        for name in names:  # what is stored beside the rows is as ever
            np.testing.assert_allclose(log.rows(name, stored)[:], plain.rows(name, stored)[:])


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    sizes=st.tuples(*[st.integers(1, 7)] * 3),
    tokens=st.integers(1, 3),
    bias=st.booleans(),
    logs_bias=st.booleans(),
    rank=st.integers(1, 5),
    scale=st.sampled_from([1.0, 0.25, 7.0, torch.tensor(3.0)]),
    frozen=st.booleans(),
)
def test_shapes_scales_and_biases(tmp_path_factory, kind, sizes, tokens, bias, logs_bias, rank, scale, frozen):
    torch.manual_seed(0)
    i, h, o = sizes
    model = nn.Sequential(nn.Linear(i, h, bias=bias), nn.Tanh(), nn.Linear(h, o)).double()
    x = torch.randn(3, tokens, i, dtype=torch.float64)
    optimizer = trained(model, x)
    with loghook.frozen(model) if frozen else contextlib.nullcontext():
        log, _ = logged(
            tmp_path_factory.mktemp("shapes") / "run", kind, model, optimizer, x, rank=min(rank, *[max(sizes)] * 2),
            watch={"bias": logs_bias}, block={"scale": scale},
        )  # fmt: skip
    assert_rows(log, expected(kind, model, optimizer, log, x, scale=float(scale)))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_and_masks(tmp_path, kind):
    model, x = make(), data(4, 5)
    optimizer = trained(model, x)
    packed = x.reshape(2, 10, 7)
    numbers = torch.arange(4).repeat_interleave(5).view(2, 10)
    options = {"watch": {"optimizer": optimizer}, "block": {"segments": numbers, "mask": torch.ones(2, 10)}}
    log, _ = log_and_ask(
        tmp_path, model, loss_fn, packed, ids="abcd", **options, rank=4, dtype="float64", gradient=kind
    )
    assert_rows(log, expected(kind, model, optimizer, log, x))


class Checkpointed(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner, self.options = make(), options

    def forward(self, x):
        for part in (self.inner[:2], self.inner[2:]):
            x = checkpoint(part, x.requires_grad_(), **self.options)
        return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed(tmp_path, kind, use_reentrant):
    model, x = Checkpointed(use_reentrant=use_reentrant), data()
    optimizer = trained(model.inner, x)
    log, _ = logged(tmp_path / "run", kind, model, optimizer, x)
    model.options = {"use_reentrant": False}  # the oracle differentiates with autograd.grad
    assert_rows(log, expected(kind, model, optimizer, log, x))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_without_breaks(tmp_path, kind):
    model, x = make(), data(13)
    optimizer = trained(model, x)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    log, _ = logged(tmp_path / "run", kind, model, optimizer, x, call=call, size=4)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 2  # the first size, then any size
    assert_rows(log, expected(kind, model, optimizer, log, x))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_sums_in_float32_and_a_scaler_is_divided_out(tmp_path, kind):
    model, x = make().float(), data().float()
    optimizer = trained(model, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loss(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().pow(2).sum()

    log, _ = logged(
        tmp_path / "run", kind, model, optimizer, x, dtype="float32", block={"scaler": scaler},
        loss=lambda model, x: scaler.scale(loss(model, x)),
    )  # fmt: skip
    rows = expected(kind, model, optimizer, log, x, loss=loss)
    assert_rows(log, rows, 5e-2)


def test_blocks_inside_training_have_the_moments_of_their_step(tmp_path):
    model, x = make(), data()
    optimizer = Accelerator(cpu=True).prepare(trained(model, x))
    run = loghook.init(tmp_path / "run", rank=4, dtype="float64", gradient="adam")
    run.watch(model, optimizer=optimizer)
    steps = []
    for _ in range(3):
        with run(data_id=[0, 1, 2, 3, 4, 5]):
            loss_fn(model, x).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        steps.append(one_sample_gradients(model, loss_fn, x, run.layers))
        steps[-1] = {n: changed("adam", optimizer, model.get_submodule(n), G, n != "2") for n, G in steps[-1].items()}
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    run.finalize()
    log = loghook.load(tmp_path / "run")
    for name in log.layers:
        rows = torch.cat([project(step[name], *(whole(side) for side in sides(log, name))) for step in steps])
        assert relative_error(torch.from_numpy(log.rows(name)[:].copy()), rows) <= 1e-9


class Twice(nn.Module):
    def __init__(self, shared=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(7, 7, bias=False), nn.Linear(7, 7, bias=False)
        self.shared = shared
        if shared:
            self.b.weight = self.a.weight
        self.double()

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))) if self.shared else self.a(torch.tanh(self.a(x)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_several_calls_add_up_or_are_refused(tmp_path, shared, compiled):
    """A quotient of a sum is the sum of the quotients; Adam's direction is not."""
    model, x = Twice(shared), data()
    optimizer = trained(model, x)
    torch._dynamo.reset()
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    watch = {} if shared else {"include": "a"}
    log, _ = logged(tmp_path / "run", "normalized", model, optimizer, x, call=call, watch=watch)
    assert_rows(log, expected("normalized", model, optimizer, log, x))
    with pytest.raises(UnsupportedError, match="other modules" if shared else "'a' was called several times"):
        logged(tmp_path / "other", "adam", model, optimizer, x, call=call, watch=watch)
    torch._dynamo.reset()


def test_a_reentrant_checkpoint_for_each_call_is_refused(tmp_path):
    model, x = nn.Linear(7, 7).double(), data().requires_grad_()
    optimizer = trained(model, x)

    def loss(model, x):
        return checkpoint(model, checkpoint(model, x, use_reentrant=True), use_reentrant=True).pow(2).sum()

    with pytest.raises(UnsupportedError, match="several times"):
        logged(tmp_path / "run", "adam", model, optimizer, x, loss=loss)


def test_layers_that_sleep_have_zero_rows(tmp_path):
    """Adam leaves a parameter alone that got no gradient."""
    model, x = make(), data()
    optimizer = trained(model, x)
    model.spare = nn.Linear(7, 7).double()
    optimizer.add_param_group({"params": list(model.spare.parameters())})
    for p in model.spare.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.ones_like(p),
            "exp_avg_sq": torch.ones_like(p),
        }
    loss, watch = lambda m, x: loss_fn(m[:5], x), {"may_sleep": "spare", "optimizer": optimizer}
    log, _ = log_and_ask(tmp_path, model, loss, x, watch=watch, rank=4, dtype="float64", gradient="adam")
    assert log.asleep == {"spare": 6} and not log.rows("spare")[:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_methods_that_need_statistics_refuse_and_the_others_work(tmp_path, kind):
    model, x = make(), data(40)
    optimizer = trained(model, x)
    log, query = logged(tmp_path / "run", kind, model, optimizer, x, rank=3)
    assert log.unmeasured == 0 and not log.verify()
    for method in ("kfac", "ekfac"):
        with pytest.raises(StateError, match=rf"gradient='{kind}'.*'dot' or 'cosine'\.$"):
            log.influence(query, method)
    scores = log.influence(query, "cosine")
    assert scores.method == f"cosine ({kind})"
    rows, asked = (
        torch.cat([torch.from_numpy(np.array(s.rows(n)[:])).flatten(1) for n in log.layers], 1) for s in (log, query)
    )
    torch.testing.assert_close(
        torch.from_numpy(scores.values).double(), torch.cosine_similarity(asked[:, None], rows[None], dim=2),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    for method in ("dot", "fisher", "shampoo"):
        assert np.isfinite(log.influence(query, method, normalize="unit").values).all()
    wide = logged(tmp_path / "wide", kind, model, optimizer, x, rank=8)
    assert trust(*wide, "fisher").how.startswith("parts of the log's coordinates")
    assert f"gradient {kind}" in CliRunner().invoke(app, ["info", str(tmp_path / "run")]).output
    plain, other = logged(tmp_path / "plain", "plain", model, None, x, rank=3)
    with pytest.raises(MismatchError, match="kind of gradient"):
        log.influence(other, "dot")
    with pytest.raises(MismatchError, match="differ in gradient"):
        maintain.merge(tmp_path / "both", [log.path, plain.path])
    kinds = [json.loads((source.path / "loghook.json").read_text()).get("gradient") for source in (log, plain)]
    assert kinds == [kind, None]
    query.save(tmp_path / "query.safetensors")
    again = loghook.Query.load(tmp_path / "query.safetensors") + query  # the same questions, kept once
    assert np.array_equal(log.influence(again, "dot").values, log.influence(query, "dot").values)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_stopped_runs_go_on_and_rows_are_compressed(tmp_path, dtype):
    model, x = make(), data(20)
    optimizer = trained(model, x)

    def attempt(folder, stop=None, **options):
        run = loghook.init(folder, rank=3, dtype=dtype, resume=True, **{"gradient": "adam"} | options)
        with contextlib.redirect_stdout(None):
            run.watch(model, optimizer=optimizer if run._config.gradient != "plain" else None)
        for _ in run.passes():
            for n, ids in enumerate([*torch.arange(20).split(6), torch.tensor([3, 19])]):  # filled up with repeats
                if n == stop:
                    run.close()
                    return None
                with run(data_id=ids):
                    loss_fn(model, x[ids]).backward()
        run.finalize()
        run.close()
        return loghook.load(folder)

    complete = attempt(tmp_path / "one")
    assert attempt(tmp_path / "two", stop=2) is None
    with pytest.raises(MismatchError, match="gradient is 'adam' there and 'normalized' now"):
        attempt(tmp_path / "two", gradient="normalized")
    log = attempt(tmp_path / "two")
    assert log.data_ids == complete.data_ids and log.repeats == 2
    for name in log.layers:
        np.testing.assert_array_equal(log.rows(name)[:], complete.rows(name)[:])
    exact, _ = logged(tmp_path / "exact", "adam", model, optimizer, x, rank=3)
    for name in log.layers:
        got, want = (np.array(source.rows(name)[:], np.float64) for source in (log, exact))
        assert relative_error(torch.from_numpy(got), torch.from_numpy(want)) < 2e-2
    small = exact.compress(tmp_path / "small", "int8", queries=4)
    assert loghook.load(tmp_path / "small").manifest.gradient == "adam" and small.pearson["dot"] > 0.99


def test_a_pass_that_goes_on_with_other_moments_warns(tmp_path):
    model, x = make().requires_grad_(True), data(8)
    early, late = trained(model, x, steps=2), trained(model, x, steps=9, lr=0.0)

    def attempt(optimizer, stop):
        run = loghook.init(tmp_path / "run", rank=3, gradient="adam", resume=True)
        run.watch(model, optimizer=optimizer)
        with loghook.frozen(model):
            for _ in run.passes():
                for n, ids in enumerate(torch.arange(8).split(4)):
                    if n < stop:
                        with run(data_id=ids):
                            loss_fn(model, x[ids]).backward()
                if stop == 1:
                    break
        run.close()

    attempt(early, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attempt(early, 1)
    with pytest.warns(CheckpointWarning, match=r"than it goes on with \(or moments of the optimizer\)"):
        attempt(late, 2)


def test_questions_and_runs_of_other_moments_are_noticed(tmp_path):
    model, x = make(), data()
    right, other = trained(model, x), trained(model, x, steps=9, lr=0.0)  # which leaves the parameters as they are
    log, query = logged(tmp_path / "run", "normalized", model, right, x)
    with pytest.warns(CheckpointWarning, match="or the optimizer's moments, are not"):
        asker = log.attach(model, other)
    with asker.query(data_id=["q"]) as wrong:
        loss_fn(model, x[:1]).backward()
    with pytest.warns(CheckpointWarning, match="or moments of the optimizer, than"):
        log.influence(wrong, "dot")
    query.parameters = query.parameters.split("-")[0]  # as earlier versions saved it
    query.save(tmp_path / "query")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.attach(model, right).close()
        log.influence(loghook.Query.load(tmp_path / "query"), "dot")
    logged(tmp_path / "other", "normalized", model, other, x)
    merged = maintain.merge(tmp_path / "both", [tmp_path / "run", tmp_path / "other"])
    assert any("or moments of the optimizer" in note for note in merged.notes)


def test_attached_models(tmp_path):
    model, x = make(), data()
    optimizer = trained(model, x)
    for kind in KINDS:
        log, query = logged(tmp_path / kind, kind, model, optimizer, x)
        asker = log.attach(model, optimizer if kind == "normalized" else None)
        with asker.query(data_id=[0, 1, 2]) as again:
            loss_fn(model, x[:3]).backward()
        asker.close()
        torch.testing.assert_close(again.matrix, query.matrix)
        assert log.influence(again, "dot").values.shape == (3, 6)
    with pytest.raises(MismatchError, match=r"'normalized'.*log\.attach\(model, optimizer\)"):
        loghook.load(tmp_path / "normalized").attach(model)
    with pytest.raises(MismatchError, match="leave it out"):
        loghook.load(tmp_path / "adam").attach(model, optimizer)
    assert not model[0]._forward_hooks


def test_plans_count_whole_inputs_and_no_statistics(tmp_path):
    model, x = make(), data()
    optimizer = trained(model, x)
    plans = {}
    for kind in ("plain", *KINDS):
        run = loghook.init(tmp_path / kind, rank=3, gradient=kind)
        run.watch(model, optimizer=optimizer if kind != "plain" else None)
        with run.plan(samples=100, tokens=4, batch=6) as plans[kind]:
            for _ in range(2):
                with run(data_id=list(range(6))):
                    loss_fn(model, x).backward()
        run.close()
    memory = plans["adam"].memory
    assert memory["whole inputs"] == 6 * 4 * 8 * (8 + 9 + 7) and memory["statistics"] == 0
    assert plans["plain"].memory["projected inputs"] == 6 * 4 * 8 * (3 + 3 + 3)
    assert plans["adam"].arithmetic[0] > plans["plain"].arithmetic[0] and plans["adam"].seconds > 0


# Refusals


def refused(tmp_path, error, match, model, optimizer, kind="adam", **watch):
    run = loghook.init(tmp_path / "run", rank=2, gradient=kind, overwrite=True)
    with pytest.raises(error, match=match):
        run.watch(model, optimizer=optimizer, **watch)
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, nn.Linear))
    run.close()


def test_optimizers_without_adams_moments_are_refused(tmp_path):
    model, x = make(), data()
    refused(tmp_path, ConfigError, r"optimizer=NoneType.*watch\(\.\.\., optimizer=optimizer\)", model, None)
    refused(tmp_path, ConfigError, "optimizer=SGD", model, torch.optim.SGD(model.parameters(), 0.1))
    refused(tmp_path, ConfigError, "minimising", model, torch.optim.Adam(model.parameters(), maximize=True))
    part = torch.optim.Adam(model[0].parameters())
    refused(tmp_path, ConfigError, "does not hold the weight of layer '2'.*this very model", model, part)
    refused(tmp_path, ConfigError, "leave it out", model, part, kind="plain")
    fresh = trained(model, x)
    for state in fresh.state.values():
        state["step"] = torch.tensor(0.0)
    with pytest.raises(StateError, match=r"taken no step.*layer '0'"):
        logged(tmp_path / "fresh", "normalized", model, fresh, x)
    for optimizer, held in (
        (part, "nothing"),
        (trained(model, x, adam=torch.optim.Adamax), "exp_avg', 'exp_inf', 'step"),
    ):
        run = loghook.init(tmp_path / "run", rank=2, gradient="adam", overwrite=True)
        run.watch(model, "0", optimizer=optimizer)
        with pytest.raises(StateError, match=f"{held}.*layer '0'.*first step"):
            with run(data_id=[0, 1, 2, 3, 4, 5]):
                loss_fn(model, x).backward()
        run.close()


def test_weights_without_whole_moments_are_refused(tmp_path):
    model, x = make(), data()
    optimizer = trained(model, x)
    nn.utils.parametrizations.weight_norm(model[0])
    refused(tmp_path, UnsupportedError, "layer '0' holds no plain weight", model, optimizer)
    model = make()
    optimizer = trained(model, x)
    optimizer.state[model[2].weight]["exp_avg_sq"] = torch.ones(3)  # a shard, as engines keep it
    with pytest.raises(UnsupportedError, match="layer '2' are sharded or quantised"):
        logged(tmp_path / "other", "normalized", model, optimizer, x)


def test_sharded_weights_are_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = make(), data()
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        refused(tmp_path, UnsupportedError, "holds no plain weight.*sharded", model, trained(model, x))
    finally:
        dist.destroy_process_group()


def test_arguments_that_do_not_go_together(tmp_path):
    with pytest.raises(ConfigError, match="'plain', 'normalized', 'adam'"):
        loghook.init(tmp_path / "run", gradient="sign")
    refused = {
        "projection='random' or 'none'": [{"projection": "whitened"}, {"projection": "pca"}],
        "fidelity goes with gradient='plain'": [{"fidelity": {"pearson": 0.9}}],
    }
    for message, options in ((message, one) for message, found in refused.items() for one in found):
        with pytest.raises(ConfigError, match=message):
            loghook.init(tmp_path / "run", gradient="adam", **options)


def test_copies_of_moments_go_with_their_block(tmp_path):
    """Also where the user keeps the loss, and with it the graph."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    run = loghook.init(tmp_path / "run", rank=2, gradient="adam")
    run.watch(model, optimizer=optimizer)
    kept, losses = [], []
    for step in range(2):
        with run(data_id=[2 * step, 2 * step + 1]):
            slots = (layer.slots for layer in run._layers)
            kept += [weakref.ref(t) for s in slots for t in s.held if t is not None and t.numel() > 30]
            losses.append(model(torch.randn(2, 6)).square().sum())
            losses[-1].backward()
        with pytest.raises(RuntimeError, match="in the middle"), run(data_id=[8, 9]):
            losses.append(model(torch.randn(2, 6)).square().sum())
            raise RuntimeError("in the middle")
    assert len(kept) >= 4 and not any(reference() is not None for reference in kept)
