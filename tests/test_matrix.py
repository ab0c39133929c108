"""The matrix of docs/matrix.md in one process: each cell's rows against those of eager float32 on the same samples.

Cells that touch no CPU-only backend run on a GPU too (`make test-gpu`): the device is a parameter of the same code.
"""

import contextlib
import functools
import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import loghook
from loghook.errors import DeliveryError
from loghook.influence.precondition import Metric
from loghook.project.blocks import second_moment_blocks
from loghook.project.linear import MatrixUnits, widened
from loghook.project.outer import outer, second_moment, sum_of_squares
from tests.harness import assert_rows_exact
from tests.oracle import relative_error

ROOT = Path(__file__).parent.parent
SIZES = (4, 3, 5, 2)  # batches of different lengths, so that a compiled model must take the batch as dynamic
SAMPLES = sum(SIZES)
EXACT = 1e-5


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    # TF32 and the like would be another rounding than the reference's.
    torch.backends.cuda.matmul.allow_tf32 = False
    return request.param


@pytest.fixture(params=["cpu", "as a GPU does", pytest.param("cuda", marks=pytest.mark.gpu)])
def units(request, monkeypatch):
    """Where half-precision models compute: the CPU, also with sums as on a GPU's matrix units, and such a GPU."""
    if request.param != "as a GPU does":
        return request.param
    bmm = torch.bmm

    def product(x, y, *, out_dtype=None):
        assert out_dtype in (None, torch.float32)
        return bmm(x, y) if out_dtype is None else bmm(x.float(), y.float())

    monkeypatch.setattr(torch, "bmm", product)
    monkeypatch.setattr(
        MatrixUnits, "take", lambda _, *tensors: {t.dtype for t in tensors} in ({torch.bfloat16}, {torch.float16})
    )
    return "cpu"


class Block(nn.Module):
    relu = staticmethod(torch.relu_)

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return x + self.down(self.relu(self.up(self.norm(x))))


def save_products(ctx, op, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "none": None,
    "reentrant": {"use_reentrant": True},
    "non_reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, save_products),
    },
}


class Net(nn.Module):
    """What users write: a class of their own with blocks of their own, each of which may be checkpointed."""

    def __init__(self, blocks=2, checkpoints="none"):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 12)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.last = nn.Linear(12, 5, bias=False)
        self.checkpoints = CHECKPOINTS[checkpoints]

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.checkpoints is None else checkpoint(block, x, **self.checkpoints)
        return self.last(x)


def make_data(device="cpu"):
    return torch.randn(SAMPLES, 3, 8, generator=torch.Generator().manual_seed(1)).to(device)


def loss_of(model, x):
    return model(x).float().pow(2).sum() if x.dtype != torch.float64 else model(x).pow(2).sum()


def batches(sizes=SIZES):
    ends = np.cumsum(sizes)
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def new_run(model, include="*", exclude="*lm_head", **options):
    run = loghook.init(tempfile.mkdtemp(prefix="loghook-matrix-"), **{"rank": 6, "dtype": "float32"} | options)
    with contextlib.redirect_stdout(None):
        run.watch(model, include=include, exclude=exclude)
    return run


def finished(run):
    run.finalize()
    run.close()
    return loghook.load(run.path)


def logged(model, loss, data, *, call=None, frozen=False, sizes=SIZES, **options):
    """Log all samples in batches of different sizes; `call` is what is called where it is not the watched model."""
    run = new_run(model, **options)
    with loghook.frozen(model) if frozen else contextlib.nullcontext():
        for ids in batches(sizes):
            with run(data_id=ids):
                loss(model if call is None else call, data[ids]).backward()
    return finished(run)


def by_id(source, layer):
    """Rows in the order of the samples."""
    return torch.from_numpy(np.array(source.rows(layer)[:])[np.argsort(source.data_ids, kind="stable")])


def assert_same(log, expected, tolerance=EXACT):
    """`log` (a log or a query) holds rows of the samples 0 to n-1; so does `expected`, and perhaps more."""
    assert log.layers == expected.layers
    ids = sorted(log.data_ids)
    for layer in expected.layers:
        a, b = by_id(log, layer), by_id(expected, layer)[ids]
        assert b.abs().max() > 0
        error = relative_error(a, b)
        assert error <= tolerance, f"{layer}: relative error {error:.1e}"


@functools.cache
def reference(blocks=2, device="cpu"):
    """Eager, float32, one process."""
    return logged(Net(blocks).to(device), loss_of, make_data(device))


def proven(model, loss=loss_of, data=None, **options):
    """What docs/ tell users to run first says that all is well (it prints its report)."""
    report = loghook.check(model, loss, make_data()[:3] if data is None else data, **options)
    assert report, str(report)


def test_the_reference_is_exact_and_check_agrees(device):
    model, data = Net().double().to(device), make_data(device).double()
    log = logged(model, loss_of, data, dtype="float64")
    assert_rows_exact(log, model, loss_of, data, 1e-9)
    assert_same(reference(device=device), log)
    proven(model, data=data[:3])
    proven(Net().to(device), data=data[:3].float())


# Compiled models


def compiles():
    """Graphs compiled so far; none may have been broken."""
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled_whole(model, backend="aot_eager", **options):
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def compiled_in_place(model, backend="aot_eager"):
    model.compile(fullgraph=True, backend=backend)
    return model


@pytest.mark.parametrize("compile_it", [compiled_whole, compiled_in_place])
def test_compiled_without_breaks_and_few_compilations(device, compile_it, fresh_compiler):
    blocks = int(compile_it is compiled_whole)
    model, data, expected = Net(blocks).to(device), make_data(device), reference(blocks, device)
    run = new_run(model)
    call = compile_it(model)
    for ids in batches():
        with run(data_id=ids):
            loss_of(call, data[ids]).backward()
    assert compiles() <= 2  # the first size, then any size
    for size in (4, 2, 3):  # a query has no statistics, hence a graph of its own
        with run.query(data_id=list(range(size))) as query:
            loss_of(call, data[:size]).backward()
        assert_same(query, expected)
    assert compiles() <= 3
    loss_of(call, data[:6]).backward()  # outside of blocks the hooks are inert
    loss_of(call, data[:7]).backward()
    assert compiles() <= 5
    seen = compiles()
    with run(data_id=[100, 101, 102]):
        loss_of(call, data[:3]).backward()
    with run.query(data_id=[0, 1, 2, 3]) as query:
        loss_of(model, data[:4]).backward()  # the model itself, eager where it was compiled under another name
    assert_same(query, expected)
    assert compiles() == seen
    log = finished(run)
    for layer in log.layers:
        assert relative_error(by_id(log, layer)[:SAMPLES], by_id(expected, layer)) <= EXACT
        assert relative_error(by_id(log, layer)[SAMPLES:], by_id(expected, layer)[:3]) <= EXACT


def test_compiled_by_inductor(device, fresh_compiler):
    model = Net(0).to(device)
    call, data = compiled_whole(model, "inductor", dynamic=True), make_data(device)
    log = logged(model, loss_of, data, call=call)
    assert compiles() <= 2
    assert_same(log, reference(0, device))
    proven(call, data=data[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("regions", [False, True], ids=["whole", "regions"])
def test_recorded_in_cuda_graphs(fresh_compiler, regions):
    """Rows leave a graph's own memory before it is played again; it is played from the third batch of a size on."""
    model, data = Net().to("cuda"), make_data("cuda")
    for module in model.blocks if regions else [model]:
        module.compile(mode="reduce-overhead")
    assert_same(logged(model, loss_of, data, sizes=(2,) * (SAMPLES // 2)), reference(device="cuda"))


@pytest.mark.gpu
def test_compiled_by_inductor_in_bfloat16(fresh_compiler, monkeypatch):
    """The compiler is handed the sums in float32 of half-precision operands.

    It rounds elsewhere than eager mode does, which turns a ReLU near zero on or off, and with it a part of a row.
    """
    monkeypatch.setattr(Block, "relu", staticmethod(torch.tanh))
    expected = logged(Net().to("cuda"), loss_of, make_data("cuda"))
    model, data = Net().to("cuda", torch.bfloat16), make_data("cuda").bfloat16()
    log = logged(model, loss_of, data, call=torch.compile(model, dynamic=True))
    assert_same(log, expected, 3e-2)
    assert np.linalg.norm(log.moments() - expected.moments()) <= 5e-2 * np.linalg.norm(expected.moments())


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", [{}, {"projection": "none"}], ids=str)
def test_a_forward_pass_in_another_stream(frozen, options):
    """Autograd runs its backward there too, and in a frozen model nobody waits for that."""
    model, data, side = Net().to("cuda"), make_data("cuda"), torch.cuda.Stream()

    def call(x):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = model(x)
        torch.cuda.current_stream().wait_stream(side)
        y.register_hook(lambda _: torch.cuda._sleep(10**8))
        return y

    log = logged(model, loss_of, data, call=call, frozen=frozen, **options)
    assert_same(log, logged(model, loss_of, data, **options))


def test_regions_compiled_one_by_one(device, fresh_compiler):
    model = Net().to(device)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    data = make_data(device)
    log = logged(model, loss_of, data)
    assert compiles() <= 2 * len(model.blocks)
    assert_same(log, reference(device=device))
    proven(model, data=data[:2])


def test_equal_regions_share_what_is_compiled(device, fresh_compiler):
    """Otherwise the compiler would give up at its eighth block, in training without logging too."""
    model, data = Net(blocks=12).to(device), make_data(device)
    run = new_run(model)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    loss_of(model, data).backward()
    assert compiles() == 1
    for frozen in (True, False):
        log = logged(model, loss_of, data, frozen=frozen)
        assert_same(log, reference(12, device))
    assert compiles() <= 5  # with and without a gradient for their inputs, and again for batches of other sizes
    run.close()


@pytest.mark.parametrize("include", [["*.down", "*.1.up"], ["*.up", "*.2.down"], ["*.1.*"]], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_equal_regions_of_which_some_layers_are_watched(device, include, trained, fresh_compiler):
    """What is compiled for a block without a watched layer must not serve for one with it."""
    model, data = Net(blocks=4).to(device), make_data(device)
    run = new_run(model, include)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=16):  # each in training and in a log, of one size and of any
        for ids in batches() if trained else ():
            loss_of(model, data[ids]).backward()
        for ids in batches():
            with run(data_id=ids):
                loss_of(model, data[ids]).backward()
    assert_same(finished(run), logged(Net(blocks=4).to(device), loss_of, data, include=include))


def test_rows_are_right_past_the_compilers_limit(device, fresh_compiler):
    """The compiler gives up on a region and runs it as it is."""
    model = Net().to(device)
    with torch._dynamo.config.patch(recompile_limit=1):
        for block in model.blocks:
            block.compile(backend="aot_eager")
        assert_same(logged(model, loss_of, make_data(device)), reference(device=device))


@pytest.mark.parametrize("compile_it", [compiled_whole, compiled_in_place])
@pytest.mark.parametrize("with_graph", [True, False], ids=["trained", "evaluated"])
def test_compiled_and_called_before_watch_is_right_or_refused(compile_it, with_graph, fresh_compiler):
    model, data = Net(0), make_data()
    call = compile_it(model)
    with torch.set_grad_enabled(with_graph):
        call(data[:4])
    run = new_run(model)
    for size in (4, 3):
        try:
            with run.query(data_id=list(range(size))) as query:
                loss_of(call, data[:size]).backward()
        except DeliveryError as error:
            assert "compiled before watch()" in str(error)
        else:
            assert_same(query, reference(0))
    run.close()
    torch._dynamo.reset()  # the remedy
    assert_same(logged(model, loss_of, data, call=call), reference(0))


# Precision


def outer_products(model, loss, data):
    """{layer: (B, O, I [+ 1])}: products in float64 of what each layer really got and got back, whatever its dtype."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, Block):
            module.relu = torch.relu  # autograd's own hooks cannot do with code that works in place
        if isinstance(module, nn.Linear):
            keep = seen.setdefault(name, {})
            handles += [
                module.register_forward_hook(lambda m, args, y, keep=keep: keep.update(x=args[0].detach().double())),
                module.register_full_backward_hook(lambda m, gi, go, keep=keep: keep.update(g=go[0].double())),
            ]
    loss(model, data).backward()
    for handle in handles:
        handle.remove()
    products = {}
    for name, kept in seen.items():
        x = kept["x"]
        if model.get_submodule(name).bias is not None:
            x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)
        products[name] = torch.einsum("bso,bsi->boi", kept["g"], x).cpu()
    return products


def assert_sums_exactly(model, loss, data):
    """Whole gradients are the sums over tokens of the layers' own inputs and output gradients, to float32."""
    log = logged(model, loss, data, sizes=(len(data),), projection="none")
    for layer, expected in outer_products(model, loss, data).items():
        assert relative_error(by_id(log, layer), expected) <= EXACT


def autocast_loss(dtype, scale=1.0):
    def loss(model, x):
        with torch.autocast(x.device.type, dtype):
            y = model(x)
        return y.float().pow(2).sum() * scale

    return loss


def test_bfloat16_autocast(device):
    model, data, loss = Net().to(device), make_data(device), autocast_loss(torch.bfloat16)
    assert_same(logged(model, loss, data), reference(device=device), 3e-2)
    assert_same(logged(model, loss, data, frozen=True), reference(device=device), 3e-2)
    assert_sums_exactly(model, loss, data)
    proven(model, loss, data[:3])


def test_backward_inside_autocast(device):
    model, data = Net().to(device), make_data(device)
    run = new_run(model, projection="none")
    with run(data_id=list(range(SAMPLES))), torch.autocast(device, torch.bfloat16):
        model(data).float().pow(2).sum().backward()
    log = finished(run)
    for layer, expected in outer_products(model, autocast_loss(torch.bfloat16), data).items():
        assert relative_error(by_id(log, layer), expected) <= EXACT


def test_whole_model_in_bfloat16(units):
    model, data = Net().to(units, torch.bfloat16), make_data(units).bfloat16()
    log, expected = logged(model, loss_of, data), reference(device=units)
    assert_same(log, expected, 5e-2)
    run = new_run(model)
    for ids in batches():
        with run(data_id=ids, mask=torch.full((len(ids), data.shape[1]), 0.25)):
            loss_of(model, data[ids]).backward()
    weighted = finished(run)
    assert_same(weighted, log, 1e-5)
    moments = [torch.from_numpy(one.moments())[None] for one in (log, expected, weighted)]
    assert relative_error(moments[0], moments[1]) <= 5e-2
    assert relative_error(4 * moments[2], moments[0]) <= EXACT
    assert_sums_exactly(model, loss_of, data)
    proven(model, data=data[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width, tokens", [(7, 50), (64, 50), (64, 20_000)])
def test_sums_of_half_precision_are_as_exact_as_float32(units, dtype, width, tokens):
    torch.manual_seed(0)
    g, x = (torch.randn(2, 3, tokens, k, device=units).to(dtype) for k in (5, width))
    (wide_g, wide_x), whole = widened(torch.float32, g, x), (g.double(), x.double())
    found = outer(wide_g, wide_x), outer(wide_g[0, :1], wide_x[0, :1]), second_moment(wide_x)
    expected = outer(*whole), outer(*(t[0, :1] for t in whole)), second_moment(whole[1])
    found += (sum_of_squares(wide_x),)
    expected += (sum_of_squares(whole[1]),)
    flat = wide_x.flatten(0, 2)
    found += (second_moment_blocks(flat, None)[None],)
    expected += (second_moment_blocks(flat.double(), None)[None],)
    for a, b in zip(found, expected, strict=True):
        # A GPU's units cut where they add up long sums.
        assert a.dtype == torch.float32 and relative_error(a.cpu(), b.cpu()) <= (EXACT if tokens == 50 else 1e-4)


def test_whole_gradients_of_a_model_in_bfloat16(units, tmp_path):
    """All in one batch, since products of bfloat16 round otherwise in batches of other sizes."""
    model, data = Net().to(units, torch.bfloat16), make_data(units).bfloat16()
    fit, ids = loghook.fit(tmp_path / "factors"), list(range(SAMPLES))
    with contextlib.redirect_stdout(None):
        fit.watch(model)
    for _ in fit.passes():
        with fit(data_id=ids):
            loss_of(model, data).backward()
    with fit.query(data_id=ids) as query:
        loss_of(model, data).backward()
    scoring = fit.score(query, "dot")
    with scoring(data_id=ids):
        loss_of(model, data).backward()
    gradients = torch.cat([G.flatten(1) for G in outer_products(model, loss_of, data).values()], 1)
    assert relative_error(torch.from_numpy(scoring.scores().values), (gradients @ gradients.T).cpu()) <= EXACT
    assert fit.solvers(Metric(method="ekfac"))  # the factors are there


def test_float16_with_a_scaler_that_overflows(device):
    model, data = Net().to(device), make_data(device)
    data[5] *= 1e6  # beyond float16: the second batch of three holds one such sample
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    run, scales = new_run(model), []
    for ids in batches():
        scales.append(scaler.get_scale())
        with run(data_id=ids, scaler=scaler):
            scaler.scale(autocast_loss(torch.float16)(model, data[ids])).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    log = finished(run)
    assert scales == [2.0**8, 2.0**8, 2.0**7, 2.0**7]  # the scaler saw the overflow too
    assert log.flagged == [5] and sorted(log.data_ids) == [i for i in range(SAMPLES) if i != 5]
    expected = reference(device=device)
    good = [i for i in range(SAMPLES) if i != 5]
    for layer in log.layers:
        assert relative_error(by_id(log, layer), by_id(expected, layer)[good]) <= 2e-2
    proven(model, autocast_loss(torch.float16), make_data(device)[:3])


# Activation checkpointing


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant", "selective"])
def test_checkpointed(device, kind, frozen):
    model, data = Net(checkpoints=kind).to(device).train(), make_data(device)
    assert_same(logged(model, loss_of, data, frozen=frozen), reference(device=device))
    proven(model, data=data[:3])


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant", "selective"])
def test_checkpointed_and_compiled(device, kind, frozen, fresh_compiler):
    model, data = Net(1, kind).to(device).train(), make_data(device)
    call = compiled_whole(model, dynamic=True)
    log = logged(model, loss_of, data, call=call, frozen=frozen)
    assert compiles() <= 2
    assert_same(log, reference(1, device))
    masked = new_run(model)
    with loghook.frozen(model) if frozen else contextlib.nullcontext():
        for ids in batches():
            with masked(data_id=ids, mask=torch.ones(len(ids), 3, device=device)):
                loss_of(call, data[ids]).backward()
    assert_same(finished(masked), reference(1, device))
    if kind == "non_reentrant" and not frozen:  # once: it compiles the model anew, for two samples and for one
        proven(call, data=data[:2])


def test_reentrant_checkpoint_whose_input_needs_no_gradient_is_refused():
    model = Net()
    run = new_run(model)
    with (
        pytest.raises(DeliveryError, match=r"blocks\.0\.up, .*a reentrant checkpoint.*'blocks\.0\.up'"),
        run(data_id=[0, 1]),
    ):
        x = checkpoint(model.blocks[0], model.first(make_data()[:2]).detach(), use_reentrant=True)
        model.last(model.blocks[1](x) + 0 * model.first(make_data()[:2])).sum().backward()
    run.close()


# Logging inside training, and beside it


def test_gradient_accumulation(device):
    model, data = Net().to(device), make_data(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = new_run(model)
    for index, ids in enumerate(batches()):
        with run(data_id=ids, scale=2 * len(ids)):
            (loss_of(model, data[ids]) / len(ids) / 2).backward()
        if index % 2:
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    assert_same(finished(run), reference(device=device))
    loss_of(model, data[:4]).backward()
    before = [p.grad.clone() for p in model.parameters()]
    mean = lambda model, x: loss_of(model, x) / len(x) / 2  # noqa: E731
    proven(model, mean, data[:3], scale=lambda x: 2 * len(x))  # between two micro-batches
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_training_logs_each_step_at_its_own_parameters(device):
    def train(model, run, steps):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for ids in batches() * 2:
            steps.append({k: v.clone() for k, v in model.state_dict().items()})
            with run(data_id=ids) if run else contextlib.nullcontext():
                loss_of(model, data[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()

    data, model, bare, steps = make_data(device), Net().to(device), Net().to(device), []
    run = new_run(model)
    train(model, run, steps)
    log = finished(run)
    train(bare, None, [])
    for mine, theirs in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine, theirs)  # logging changes nothing of the training
    place = 0
    for ids, state in zip(batches() * 2, steps, strict=True):
        then = Net().to(device)
        then.load_state_dict(state)
        alone = logged(then, loss_of, data[ids], sizes=(len(ids),))
        for layer in log.layers:
            got = torch.from_numpy(log.rows(layer)[place : place + len(ids)].copy())
            assert relative_error(got, by_id(alone, layer)) <= EXACT
        place += len(ids)
    assert place == len(log)


def test_log_only_pass(device):
    model = Net().to(device)
    assert_same(logged(model, loss_of, make_data(device), frozen=True), reference(device=device))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("where", ["block", "forward", "part"])
def test_without_gradients_is_refused(context, where):
    class Part(Net):
        def forward(self, x):
            x = self.first(x)
            with context():
                x = self.blocks[0](x)
            return self.last(self.blocks[1](x.clone() + self.first(x[..., :8].clone())))

    model, data = (Part() if where == "part" else Net()), make_data()[:2]
    run = new_run(model)
    with pytest.raises(DeliveryError, match="gradient"), run(data_id=[0, 1]):
        if where == "block":
            with context():
                loss_of(model, data).backward()
        elif where == "forward":
            with context():
                y = model(data)
            y.sum().backward()
        else:
            loss_of(model, data).backward()
    with run.query(data_id=[0, 1]) as query:  # the run goes on
        loss_of(Net.forward.__get__(model), data).backward()
    assert_same(query, reference())
    run.close()


# Models spread over devices


def test_offloaded_weights():
    """accelerate keeps weights elsewhere and fetches them for each layer's forward, as in `device_map` with "disk"."""
    from accelerate import cpu_offload

    model = Net()
    expected = reference()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert_same(logged(model, loss_of, make_data(), frozen=True), expected)
    proven(model)


@pytest.fixture(
    params=[pytest.param("cuda:0", marks=pytest.mark.gpu), pytest.param("second:0", marks=pytest.mark.second)]
)
def other(request):
    """A device beside the CPU: a GPU, or what tests/second_device.py makes."""
    if request.param == "second:0":
        importlib.import_module("tests.second_device")
    return request.param


def test_a_second_device_on_every_machine():
    """The tests marked `second` in a process of their own, since that device is there for good."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices made in Python")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "second", __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("offloaded", [False, True], ids=["split", "offloaded"])
@pytest.mark.parametrize("kind", ["none", "reentrant", "non_reentrant"])
def test_layers_on_two_devices(other, kind, offloaded, frozen):
    """As `device_map` does it: the CPU computes its block itself, or keeps weights that the other device fetches."""
    from accelerate import dispatch_model

    places = {"first": other, "blocks.0": "cpu", "blocks.1": other, "last": other}
    main = other if offloaded else "cpu"
    model = dispatch_model(Net(checkpoints=kind), device_map=places, main_device=main, force_hooks=True)
    assert {p.device.type for p in model.parameters()} == {torch.device(other).type, "meta" if offloaded else "cpu"}
    data = make_data(main)
    assert_same(logged(model, loss_of, data, frozen=frozen), reference(), 1e-4)
    proven(model, data=data[:3])


class Spread(Net):
    """The first block on one device, the rest on another, moved by hand."""

    def place(self, a, b):
        self.a, self.b = a, b
        self.to(b).blocks[0].to(a)
        return self

    def forward(self, x):
        x = self.blocks[0](self.first(x.to(self.b)).to(self.a)).to(self.b)
        return self.last(self.blocks[1](x))


@pytest.mark.parametrize("swapped", [False, True], ids=["mostly there", "mostly here"])
def test_model_moved_by_hand_between_devices(other, swapped):
    model = Spread().place(*((other, "cpu") if swapped else ("cpu", other)))
    assert_same(logged(model, loss_of, make_data()), reference(), 1e-4)
    proven(model)


def fitted(model, data, scale=1.0):
    """A log of whitened rows, EK-FAC's scores of whole gradients; of a loss that is divided by `scale`."""
    run, fit = new_run(model, projection="whitened"), loghook.fit(tempfile.mkdtemp(prefix="loghook-matrix-"))
    with contextlib.redirect_stdout(None):
        fit.watch(model)
    for each in (run, fit):
        for _ in each.passes():
            for ids in batches():
                with each(data_id=ids, scale=scale):
                    (loss_of(model, data[ids]) / float(scale)).backward()
    with fit.query(data_id=[0, 1], scale=scale) as query:
        (loss_of(model, data[:2]) / float(scale)).backward()
    scoring = fit.score(query)
    for ids in batches():
        with scoring(data_id=ids, scale=scale):
            (loss_of(model, data[ids]) / float(scale)).backward()
    return finished(run), torch.from_numpy(scoring.scores().values)


def test_fitted_on_two_devices(other):
    (expected, scores), data = fitted(Net(), make_data()), make_data()
    scale = torch.tensor(4.0, device=other)  # as Trainer counts items: layers elsewhere cannot be multiplied by it
    log, others = fitted(Spread().place("cpu", other), data, scale)
    assert_same(log, expected, 1e-3)  # of float32 sums, where the CPU adds in float64
    assert relative_error(others, scores) <= 1e-3


def test_offloaded_shards_compute_on_the_device_of_their_mesh(other, tmp_path):
    """As FSDP2's CPUOffloadPolicy has it on a GPU; its place alone, since a mesh of several needs several processes."""
    model = nn.Sequential(nn.Linear(3, 2))
    with loghook.init(tmp_path / "run", rank=2) as run:
        run.watch(model)
        (layer,) = run._layers
        assert layer.device_and_dtype()[0] == torch.device("cpu")
        model[0].weight.device_mesh = SimpleNamespace(device_type=torch.device(other).type)
        assert layer.device_and_dtype()[0] == torch.device(other)


class Siblings(nn.Module):
    """Two layers of one parent and one width, which would share a projected input if they had it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pair = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})

    def forward(self, x):
        return self.pair["b"](torch.tanh(self.pair["a"](x)))


def test_siblings_with_inputs_of_their_own(other):
    """On a device that gives its tensors no addresses too."""
    expected = logged(Siblings(), loss_of, make_data())
    assert_same(logged(Siblings().to(other), loss_of, make_data(other)), expected, 1e-4)


def everything(model, data, folder):
    """Results of all that is computed where the model is, and of what a log then answers."""
    pytest.importorskip("faiss")
    rows, whole_scores = fitted(model, data)
    proven(model, data=data[:3])
    log, wide = logged(model, loss_of, data), logged(model, loss_of, data, dtype="float64")
    asker = log.attach(model)
    with asker.query(data_id=[0, 1]) as query:
        loss_of(model, data[:2]).backward()
    found = [log.rows("first")[:], wide.rows("first")[:], whole_scores.numpy(), log.self_influence(method="kfac")]
    for method in ("cosine", "fisher", "ekfac", "shampoo"):
        found += [log.influence(query, method).values, log.influence(query, method, top=3).values]
    folder.mkdir()
    log.index(dimensions=4, factory="Flat").save(folder / "index")
    index = log.load_index(folder / "index")
    found += [index.search(query, top=3).values, np.array(index.recall(2, top=3))]
    fit = loghook.fit(folder / "fit")
    fit.watch(model)
    for _ in fit.passes():
        with fit(data_id=range(SAMPLES)):
            loss_of(model, data).backward()
    with fit.query(data_id=[0, 1]) as whole:
        loss_of(model, data[:2]).backward()
    for scoring in (
        fit.self_influence(),
        fit.score(whole, "cosine"),
        fit.score(whole, "dot", normalize="unit"),
        fit.score(whole, normalize="relatif", rank=2),
    ):
        with scoring(data_id=range(SAMPLES)):
            loss_of(model, data).backward()
        found.append(scoring.scores().values)
    for dtype in ("int8", "int1", "lowrank1"):
        log.compress(folder / dtype, dtype)
        small = loghook.load(folder / dtype)
        found += [small.influence(query, "ekfac").values, small.rows("first")[:], small.rows("first")[1]]
    found.append(rows.rows("first")[:])
    plain = all(type(p) is nn.Parameter for p in model.parameters())  # not on a device made in Python
    for solver in ("astra", "cg") if plain else ():
        refined = fit.refine(whole, [data], model, lambda y, _: y.pow(2).sum(), solver=solver, iterations=3)
        found.append(refined.matrix.numpy())
    return found


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def test_another_default_device(tmp_path):
    """What loghook makes lies where the layers compute or, of a log, on the CPU; on "meta" nothing has a value."""
    model, data = Net(), make_data()
    expected = everything(model, data, tmp_path / "here")
    with torch.device("meta"):
        found = everything(model, data, tmp_path / "there")
    assert_close(found, expected, 1e-4)


def test_everything_on_a_device_without_float64(other, tmp_path):
    """Apple's GPUs have none, nor decompositions of matrices."""
    found = everything(Net().to(other), make_data(other), tmp_path / "there")
    expected = everything(Net(), make_data(), tmp_path / "here")
    assert_close(found, expected[: len(found)], 1e-3)


# The table


def test_each_cell_of_the_table_names_a_test_that_exists():
    table = (ROOT / "docs/matrix.md").read_text()
    named = set(re.findall(r"`(test_\w+\.py)::(\w+)`", table))
    assert len(named) >= 30
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), f"{file}::{test}"
    mine = {test for file, test in named if file == Path(__file__).name}
    written = set(re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(), re.MULTILINE))
    assert written - mine == {"test_each_cell_of_the_table_names_a_test_that_exists"}
