"""Rows against one-sample-at-a-time autograd: layer types, shapes, options, and the ways models use layers."""

import collections
import contextlib
import copy
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import loghook
from loghook.capture import adapters, compiling
from loghook.capture.compiling import OpenBlocks
from loghook.capture.rows import Rows
from loghook.errors import BatchError, ConfigError, DeliveryError, StateError, UnsupportedError
from loghook.project.outer import project_output
from loghook.project.projection import Side
from tests.harness import (
    TOLERANCE,
    assert_rows_exact,
    causal_loss,
    check_against_oracle,
    log_and_ask,
    log_batch,
    squares,
    text_batch,
    tiny_llama,
)

DTYPES = st.sampled_from([torch.float64, torch.float32])
SETTINGS = settings(max_examples=25, deadline=None)


def squared_loss(model, batch):
    x, target = batch
    return (model(x) - target).square().sum()


def run_case(model, x, dtype, **options):
    model = model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        target = torch.randn_like(model(x))
    return check_against_oracle(model, squared_loss, (x, target), dtype, **options)


@SETTINGS
@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    batch=st.integers(1, 5),
    rank=st.integers(1, 6),
    bias=st.booleans(),
    dtype=DTYPES,
    frozen=st.booleans(),
    seed=st.integers(0, 10),
)
def test_linear_with_inputs_of_any_rank(lead, sizes, batch, rank, bias, dtype, frozen, seed):
    torch.manual_seed(seed)
    i, h, o = sizes
    model = nn.Sequential(nn.Linear(i, h, bias=bias), nn.Tanh(), nn.Linear(h, o))
    x = torch.randn(batch, *lead, i)
    run_case(model, x, dtype, rank=min(rank, max(sizes)), frozen=frozen, seed=seed)


@SETTINGS
@given(
    n=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same"]),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    projection=st.sampled_from(["random", "none"]),
    dtype=DTYPES,
)
def test_convolutions(n, groups, width, kernel, stride, padding, dilation, mode, bias, projection, dtype):
    torch.manual_seed(0)
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    stride = 1 if padding == "same" else stride
    layer = convolution(
        groups * width, groups * 2, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
        bias=bias, padding_mode=mode,
    )  # fmt: skip
    run_case(layer_in_model(layer), torch.randn(3, groups * width, *[6] * n), dtype, rank=2, projection=projection)


def layer_in_model(layer):
    return nn.Sequential(layer, nn.Tanh())


@SETTINGS
@given(
    lead=st.lists(st.integers(1, 4), max_size=2),
    batch=st.integers(1, 4),
    rank=st.integers(1, 8),
    padding=st.booleans(),
    dtype=DTYPES,
)
def test_embedding(lead, batch, rank, padding, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 5, padding_idx=3 if padding else None), nn.Linear(5, 2))
    ids = torch.randint(0, 11, (batch, *lead))
    ids.view(-1)[0] = 7  # at least one index with a gradient
    run_case(model, ids, dtype, rank=rank, include=["*", "0"])


@SETTINGS
@given(tokens=st.integers(1, 4), rank=st.integers(1, 6), dtype=DTYPES)
def test_transformers_conv1d(tokens, rank, dtype):
    torch.manual_seed(0)
    run_case(nn.Sequential(Conv1D(6, 4), nn.GELU(), Conv1D(3, 6)), torch.randn(3, tokens, 4), dtype, rank=rank)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_llama_with_grouped_query_attention(dtype, frozen):
    check_against_oracle(tiny_llama().to(dtype), causal_loss, text_batch(), dtype, frozen=frozen, rank=8)


def test_tied_embedding_and_head_each_get_their_own_share():
    model = tiny_llama(tie_word_embeddings=True).double()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_against_oracle(
        model, causal_loss, text_batch(), torch.float64, include=["*", "*embed_tokens"], exclude=[], rank=8
    )


def test_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0
    )
    check_against_oracle(GPT2LMHeadModel(config).double(), causal_loss, text_batch(), torch.float64, rank=5)


class Twice(nn.Module):
    """One module called twice, and one weight shared by two modules."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(6, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(torch.tanh(self.again(torch.tanh(self.again(x)))))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_layer_called_twice_and_shared_weight(dtype):
    run_case(Twice(), torch.randn(4, 3, 6), dtype, rank=3)


@pytest.mark.parametrize("rank", [3, 5, 6])
def test_tensors_may_be_used_again_before_the_block_ends(tmp_path, rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)).double()
    x, other, learned = (torch.randn(n, 3, 6, dtype=torch.float64) for n in (4, 4, 1))
    learned = nn.Parameter(learned)
    optimizer = torch.optim.SGD([*model.parameters(), learned], lr=1.0)
    run = loghook.init(tmp_path / "log", rank=rank, dtype="float64")
    run.watch(model)
    expected = log_batch(model, lambda model, x: model(x).square().sum(), x, rank=rank)
    buffer = x.clone()
    with run(data_id=range(4)):
        model(buffer).square().sum().backward()
        buffer.copy_(other)
    expected_learned = log_batch(
        model, lambda model, x: model(x).square().sum(), learned.detach().expand(4, 3, 6), rank=rank
    )
    optimizer.zero_grad()
    with run(data_id=range(4, 8)):
        model(learned.expand(4, 3, 6)).square().sum().backward()
        optimizer.step()
    run.finalize()
    log = loghook.load(tmp_path / "log")
    for name in log.layers:
        rows = log.rows(name)[:]
        torch.testing.assert_close(rows[:4], expected.rows(name)[:], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rows[4:], expected_learned.rows(name)[:], rtol=1e-12, atol=1e-12)


def test_nested_tensors_and_inputs_without_a_batch_are_refused(tmp_path):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 1).eval()
    padding = torch.arange(4) >= torch.tensor([4, 2, 3])[:, None]
    run = loghook.init(tmp_path / "encoder", rank=2)
    run.watch(encoder)
    with pytest.raises(UnsupportedError, match="enable_nested_tensor=False"), loghook.frozen(encoder), run(range(3)):
        encoder(torch.randn(3, 4, 8), src_key_padding_mask=padding).sum().backward()
    run = loghook.init(tmp_path / "linear", rank=2)
    run.watch(model := nn.Linear(6, 4))
    with pytest.raises(BatchError, match=r"shape \(6,\), without a batch"), run([0]):
        model(torch.randn(6)).sum().backward()


def test_ranks_by_pattern():
    model, ranks = tiny_llama().double(), {"*o_proj": 3, "*down_proj": 5, "*.up_proj": 7, "*": 2}
    log = check_against_oracle(model, causal_loss, text_batch(), torch.float64, rank=ranks)
    found = {name: log.rows(name).shape[1:] for name in log.layers}
    assert found["model.layers.0.self_attn.o_proj"] == (3, 3) and found["model.layers.1.mlp.down_proj"] == (5, 5)
    # Siblings of one input share its projection only where they share the rank.
    assert found["model.layers.0.mlp.up_proj"] == (7, 7) and found["model.layers.0.mlp.gate_proj"] == (2, 2)
    with log.attach(model).query(data_id=[0, 1, 2, 3]) as query:
        causal_loss(model, text_batch()).backward()
    torch.testing.assert_close(query.matrix, torch.cat([block for _, block in log.blocks()]), rtol=1e-12, atol=1e-12)


class KeywordOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(input=torch.relu(self.a(input=x)))


def test_layers_called_with_keywords_only():
    run_case(KeywordOnly(), torch.randn(3, 2, 5), torch.float64, rank=3)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(5,), (4, 5)], ids=["2d", "3d"])
def test_inplace_activation_right_after_a_layer(shape, frozen):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)
    )
    run_case(model, torch.randn(4, *shape), torch.float64, rank=3, frozen=frozen)


def test_vgg_style_inplace_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip
    run_case(model, torch.randn(3, 2, 6, 6), torch.float64, rank=4)


def test_sequence_first_inputs():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    x = torch.randn(4, 6, 5).double()  # (batch, tokens, features)

    def loss(model, batch):
        return model(batch.transpose(0, 1)).pow(3).sum()

    check_against_oracle(layer_in_model(layer), loss, x, torch.float64, rank=2, batch_dim=1)


def test_a_head_on_pooled_tokens_of_a_sequence_first_model(tmp_path):
    """As many samples as features: with the axes exchanged nothing would complain."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x)).mean(0))

    torch.manual_seed(0)
    model, x = Pooled().double(), torch.randn(5, 6, 5).double()  # (batch, tokens, features)
    loss = lambda m, batch: m(batch.transpose(0, 1)).pow(3).sum()  # noqa: E731
    check_against_oracle(model, loss, x, torch.float64, rank=4, batch_dim=1)


def test_the_head_is_left_out_by_default_unless_a_pattern_names_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 9)

        def forward(self, x):
            return self.lm_head(self.body(x))

    def watched(**patterns):
        asker = loghook.fit(tempfile.mkdtemp())
        asker.watch(Model(), **patterns)
        return asker.layers

    assert watched() == ("body",)
    assert watched(include=["*", "lm_head"]) == watched(include=["*", "*lm_head"]) == ("body", "lm_head")
    assert watched(include=["*", "lm*"]) == ("body",) and watched(include="lm_head") == ("lm_head",)


def test_layer_that_does_not_run_in_a_batch_gets_zero_rows():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.expert = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x)

    torch.manual_seed(0)
    batch = (torch.randn(3, 4), torch.randn(3, 3))
    log = log_batch(Branch(), squared_loss, batch, may_sleep="*expert", rank=2, dtype="float32")
    assert not log.rows("expert")[:].any() and log.rows("a")[:].any()


def test_scale_turns_a_mean_into_a_sum():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 3)).double(), (torch.randn(5, 4).double(), torch.randn(5, 3).double())
    log = log_batch(model, lambda m, b: squared_loss(m, b) / 7, batch, scale=torch.tensor(7.0), rank=2)
    assert_rows_exact(log, model, squared_loss, batch, 1e-9)


def test_mask_of_samples_holds_for_all_their_tokens():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double(), torch.randn(4, 3, 6).double()
    keep = torch.tensor([True, False, True, True])

    def found(mask):
        return log_batch(model, lambda model, x: model(x).square().sum(), x, mask=mask, rank=3, activations="mean")

    by_sample, by_token = found(keep), found(keep[:, None].expand(4, 3))
    assert (by_sample.moments() == by_token.moments()).all()
    assert {by_sample.moments()[index] for *_, index in by_sample.layout.moments.values()} == {9.0}
    for name in by_sample.layers:
        assert (by_sample.rows(name, "activations")[:] == by_token.rows(name, "activations")[:]).all()


def test_mask_never_changes_a_row_but_decides_which_tokens_count():
    model, (ids, mask) = tiny_llama().double(), text_batch()
    with_mask = log_batch(model, causal_loss, (ids, mask), mask=mask, rank=4)
    without = log_batch(model, causal_loss, (ids, mask), rank=4)
    for name in with_mask.layers:
        assert (with_mask.rows(name)[:] == without.rows(name)[:]).all()
    counts = [with_mask.moments()[index] for *_, index in with_mask.layout.moments.values()]
    assert set(counts) == {float(mask.sum())}


def test_each_side_of_an_encoder_decoder_counts_its_own_tokens(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).double().eval()
    source, target = torch.randint(1, 30, (3, 6)), torch.randint(1, 30, (3, 6))  # as long as each other, by chance
    source_mask, target_mask = ((torch.arange(6) < torch.tensor(n)[:, None]).long() for n in ([6, 4, 1], [2, 5, 6]))
    masks = {"*EncDecAttention.[kv]": source_mask, "encoder.*": source_mask, "decoder.*": target_mask}

    def log(path, mask):
        run = loghook.init(path, rank=4, dtype="float64")
        run.watch(model, activations="mean")
        for call in (run, run.query):
            with call(data_id=[0, 1, 2], mask=mask) as result:
                labels = target.masked_fill(target_mask == 0, -100)
                logits = model(source, source_mask, decoder_input_ids=target).logits
                F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
        run.finalize()
        run.close()
        return loghook.load(path), result

    log_both, question = log(tmp_path / "both", masks)
    per_mask = {id(m): log(tmp_path / str(id(m)), m)[0] for m in (source_mask, target_mask)}
    for name in log_both.layers:
        sees_source = name.startswith("encoder.") or "EncDecAttention.k" in name or "EncDecAttention.v" in name
        expected = per_mask[id(source_mask if sees_source else target_mask)]
        (*_, here), (*_, there) = log_both.layout.moments[name], expected.layout.moments[name]
        assert log_both.moments()[here] == expected.moments()[there] == (11 if sees_source else 13)
        for side in (log_both, question):
            got = torch.as_tensor(side.rows(name, "activations")[:].copy())
            torch.testing.assert_close(got, torch.as_tensor(expected.rows(name, "activations")[:].copy()))
        assert (log_both.rows(name)[:] == expected.rows(name)[:]).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_activations_and_output_gradients_are_logged(reduction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, mask = torch.randn(3, 5, 4).double(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    seen = {}
    handles = [
        model[2].register_forward_hook(lambda m, a, y: seen.update(x=a[0].detach())),
        model[2].register_full_backward_hook(lambda m, gi, go: seen.update(g=go[0])),
    ]
    log = log_batch(
        model, lambda m, b: m(b).pow(3).sum(), x, mask=mask, rank=2, activations=reduction, output_gradients=reduction
    )
    for handle in handles:
        handle.remove()
    weight = mask[:, :, None].double()
    count = weight.sum(1) if reduction == "mean" else 1.0
    for kind, value in (("activations", seen["x"]), ("output_gradients", seen["g"])):
        expected = (value * weight).sum(1) / count
        torch.testing.assert_close(torch.from_numpy(log.rows("2", kind)[:].copy()), expected)
    assert log.rows("0", "activations").shape == (3, 4)
    assert log.rows("2").shape == (3, 2, 2)


def test_activations_do_not_change_scores():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), torch.randn(5, 4).double()
    loss = lambda m, b: m(b).pow(3).sum()  # noqa: E731
    plain = log_batch(model, loss, batch, rank=3)
    rich = log_batch(model, loss, batch, rank=3, activations="mean", output_gradients="sum")
    queries = []
    for log in (plain, rich):
        asker = log.attach(model)
        with asker.query(data_id=["q"]) as query:
            loss(model, batch[:1]).backward()
        asker.close()
        queries.append(query)
    for method in ("dot", "ekfac", "fisher"):
        a, b = plain.influence(queries[0], method), rich.influence(queries[1], method)
        assert a.values == pytest.approx(b.values, rel=1e-6)


def test_shared_inputs_are_projected_once(monkeypatch):
    model, batch = tiny_llama(), text_batch()
    calls = []
    from loghook.capture import adapters

    original = adapters.LinearAdapter.project
    monkeypatch.setattr(
        adapters.LinearAdapter, "project", lambda self, *a: calls.append(1) or original(self, *a), raising=True
    )
    log = log_batch(model, causal_loss, batch, rank=8, dtype="float32")
    assert len(log.layers) == 14
    assert len(calls) == 8  # a layer has q+k+v, o, gate+up and down


@pytest.mark.parametrize("projection", ["random", "whitened"])
def test_half_precision_layers_keep_their_projections_in_it_and_rows_stay_the_same(tmp_path, projection, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16)).bfloat16()
    x = torch.randn(3, 5, 24).bfloat16()
    run = loghook.init(tmp_path / "log", rank=4, projection=projection, on_repeat="all")
    run.watch(model)
    seen: list[torch.dtype | None] = []

    def project(side, x, bias, project=Side.project):
        seen.append(None if side.matrix is None else side.matrix.dtype)
        return project(side, x, bias)

    monkeypatch.setattr(Side, "project", project)
    for current in run.passes():
        for _ in range(3 if current.kind == "log" else 1):
            with run(data_id=[0, 1, 2]):
                model(x).float().square().sum().backward()
    run.finalize()
    rows = torch.cat([block for _, block in loghook.load(tmp_path / "log").blocks()])
    assert torch.equal(rows[:3], rows[3:6]) and torch.equal(rows[:3], rows[6:])
    assert seen[-2:] == [torch.bfloat16] * 2
    assert all(side.matrix.dtype == torch.float32 for layer in run._layers for side in layer.sides)


def assumed():
    return [getattr(torch._dynamo.config, name, False) for name in compiling._ASSUMPTIONS]


def test_the_compiler_is_left_as_it_was(tmp_path):
    """By blocks of two runs that overlap, and by one that fails; that modules have no hooks, when both are closed."""
    before, runs = assumed(), []
    *others, hooks = before
    for i in range(2):
        model = nn.Linear(4, 3)
        runs.append((loghook.init(tmp_path / str(i), rank=2), model))
        runs[-1][0].watch(model)
    first, second = (run(data_id=[0]) for run, _ in runs)
    first.__enter__()
    assert any(before) and not any(assumed())
    second.__enter__()
    for block, (_, model) in ((first, runs[0]), (second, runs[1])):
        assert not any(assumed())
        model(torch.randn(1, 4)).sum().backward()
        block.__exit__(None, None, None)
    assert assumed() == [*others, False]
    with pytest.raises(DeliveryError), runs[0][0](data_id=[1]):
        pass
    assert assumed() == [*others, False]
    for (run, _), left in zip(runs, (False, hooks), strict=True):
        run.close()
        assert assumed() == [*others, left]


def test_code_of_an_equal_model_does_not_serve_for_a_watched_one(tmp_path):
    """As where a program compares a step with logging with one of another model without."""
    x = torch.randn(2, 3, 4)
    logged, plain = (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)) for _ in range(2))
    compiled = [torch.compile(model, backend="aot_eager") for model in (logged, plain)]
    run = loghook.init(tmp_path, rank=2)
    run.watch(logged)
    for step in range(3):
        compiled[1](x).sum().backward()
        with run(data_id=[2 * step, 2 * step + 1]):
            compiled[0](x).sum().backward()
    run.finalize()
    rows = torch.cat([block for _, block in loghook.load(tmp_path).blocks()]).view(3, -1)
    assert rows.any() and torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_the_compiler_is_left_as_it_was_in_each_thread():
    blocks, before, seen = OpenBlocks(), assumed(), []
    opened, closed = threading.Event(), threading.Event()

    def other():
        blocks.open()
        opened.set()
        closed.wait(10)
        blocks.close()
        seen.append(assumed())

    thread = threading.Thread(target=other)
    blocks.open()
    thread.start()
    opened.wait(10)
    blocks.close()
    assert assumed() == before and blocks.any
    closed.set()
    thread.join()
    assert seen == [before] and assumed() == before and not blocks.any


def test_projected_inner_products_are_unbiased():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20)).double()
    batch = (torch.randn(2, 24).double(), torch.randn(2, 20).double())
    exact = log_batch(model, squared_loss, batch, projection="none").rows("0")[:].reshape(2, -1)
    estimates = []
    for seed in range(300):
        rows = log_batch(model, squared_loss, batch, rank=8, seed=seed).rows("0")[:].reshape(2, -1)
        estimates.append([rows[0] @ rows[1], rows[0] @ rows[0]])
    truth = torch.tensor([exact[0] @ exact[1], exact[0] @ exact[0]])
    estimates = torch.tensor(estimates)
    error = estimates.mean(0) - truth
    assert (error.abs() <= 4 * estimates.std(0) / 300**0.5).all()


def test_frozen_computes_no_weight_gradient_and_restores():
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    run_folder = log_batch(model, causal_loss, text_batch(), frozen=True, dtype="float32")
    assert len(run_folder) == 4
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == before
    with contextlib.suppress(ZeroDivisionError), loghook.frozen(model):
        raise ZeroDivisionError
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing_as_transformers_does_it(reentrant, frozen):
    model = tiny_llama().double().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if not frozen:
        model.enable_input_require_grads()
    log = log_batch(model, causal_loss, text_batch(), frozen=frozen, rank=4)
    model.gradient_checkpointing_disable()
    assert_rows_exact(log, model, causal_loss, text_batch(), TOLERANCE[torch.float64])


def test_compiled_model_without_graph_breaks():
    model, (ids, mask) = tiny_llama().double(), text_batch(6)
    folder = log_batch(model, causal_loss, (ids, mask), rank=4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    log = log_batch(compiled, causal_loss, (ids, mask), rank=4)
    assert log.layers == folder.layers
    assert_rows_exact(log, model, causal_loss, (ids, mask), TOLERANCE[torch.float64])


def test_hooks_leave_the_model_as_it_was(tmp_path):
    model, batch = tiny_llama(), text_batch()
    keys, loss = list(model.state_dict()), causal_loss(model, batch)
    with loghook.init(tmp_path, rank=4) as run:
        run.watch(model)
        assert list(model.state_dict()) == keys
        assert causal_loss(model, batch) == loss  # inert outside a block
    assert not any(module._forward_hooks for module in model.modules())


def test_two_runs_watch_one_model(tmp_path):
    model, batch = tiny_llama().double(), text_batch()
    runs = [loghook.init(tmp_path / str(rank), rank=rank, dtype="float64") for rank in (4, 8)]
    for run in runs:
        run.watch(model)
    with runs[0](data_id=[0, 1, 2, 3]), runs[1](data_id=[0, 1, 2, 3]):
        causal_loss(model, batch).backward()
    for run in runs:
        run.finalize()
        assert_rows_exact(loghook.load(run.path), model, causal_loss, batch, 1e-9)


def packed_batch():
    """Two rows of eight tokens: documents of 3 + 5 tokens, and of 6 with two tokens of padding."""
    torch.manual_seed(3)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0]])
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2, -1, -1]])
    return torch.randn(2, 8, 5).double(), positions, numbers


def test_segments_from_what_packed_batches_carry():
    _, positions, numbers = packed_batch()
    found = loghook.segments.from_position_ids(positions)
    assert (found[numbers >= 0] == numbers[numbers >= 0]).all()
    ends = torch.tensor([0, 3, 8, 14])
    assert (loghook.segments.from_cu_seqlens(ends, (2, 8)) == numbers).all()
    assert loghook.segments.from_cu_seqlens(torch.tensor([0, 2, 3])).tolist() == [[0, 0, 1]]
    assert loghook.segments.per_token(2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("activations", [None, "sum"])
@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_packed_documents_get_a_row_each(tmp_path, kind, activations):
    """Rows and statistics of packed documents equal those of the documents one by one (the model mixes no tokens)."""
    x, _, numbers = packed_batch()
    torch.manual_seed(0)

    class Depthwise(nn.Module):
        """A pointwise grouped convolution, so that tokens stay apart."""

        def __init__(self):
            super().__init__()
            self.inner = nn.Conv1d(5, 10, 1, groups=5)

        def forward(self, x):
            return self.inner(x.transpose(1, 2)).transpose(1, 2)

    first = nn.Linear(5, 10) if kind == "linear" else Depthwise()
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(10, 3)).double()
    logs = {}
    for name in ("packed", "apart"):
        run = loghook.init(tmp_path / name, rank=4, dtype="float64")
        run.watch(model, activations=activations, output_gradients=activations)
        if name == "packed":
            with run(data_id=["a", "b", "c"], segments=numbers):
                model(x)[numbers >= 0].pow(3).sum().backward()
        else:
            for i, data_id in enumerate("abc"):
                with run(data_id=[data_id]):
                    model(x[numbers == i][None]).pow(3).sum().backward()
        run.finalize()
        run.close()
        logs[name] = loghook.load(tmp_path / name)
    packed, apart = logs["packed"], logs["apart"]
    assert packed.data_ids == ["a", "b", "c"]
    torch.testing.assert_close(torch.from_numpy(packed.moments()), torch.from_numpy(apart.moments()))
    for layer in packed.layers:
        for rows in ("gradients", *(("activations", "output_gradients") if activations else ())):
            a, b = packed.rows(layer, rows)[:].copy(), apart.rows(layer, rows)[:].copy()
            torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b))


def test_one_row_for_each_token_adds_up_to_the_sample(tmp_path):
    model, (ids, mask) = tiny_llama().double(), text_batch()
    whole = log_batch(model, causal_loss, (ids, mask), rank=4)
    options = {"ids": range(ids.numel()), "block": {"segments": loghook.segments.per_token(*ids.shape)}}
    tokens, _ = log_and_ask(tmp_path, model, causal_loss, (ids, mask), **options, rank=4, dtype="float64")
    for layer in whole.layers:
        summed = tokens.rows(layer)[:].reshape(4, 9, *tokens.rows(layer).shape[1:]).sum(1)
        torch.testing.assert_close(torch.from_numpy(summed), torch.from_numpy(whole.rows(layer)[:].copy()))


@pytest.mark.parametrize(
    "segments,message",
    [
        (torch.zeros(2, 8), "integer tensor"),
        (torch.zeros(8, dtype=torch.long), "integer tensor"),
        (torch.zeros(2, 0, dtype=torch.long), "integer tensor"),
        (torch.full((2, 8), 3), "number them 0 to 2"),
        (torch.zeros(2, 8, dtype=torch.long), "number them 0 to 2"),
        (torch.tensor([[0, 1, 2]]), "cannot be told apart"),
    ],
)
def test_segments_that_do_not_fit_are_refused(tmp_path, segments, message):
    x, _, numbers = packed_batch()
    model = nn.Sequential(nn.Linear(5, 3)).double()
    run = loghook.init(tmp_path, rank=2)
    run.watch(model)
    with pytest.raises(loghook.LoghookError, match=message):
        with run(data_id=["a", "b", "c"], segments=segments):
            model(x).sum().backward()
    with run(data_id=["a", "b", "c"], segments=numbers):
        model(x).sum().backward()
    run.finalize()
    assert len(loghook.load(tmp_path)) == 3


def test_repeated_documents_are_kept_once_also_in_the_statistics(tmp_path):
    x, _, numbers = packed_batch()
    model = nn.Sequential(nn.Linear(5, 3)).double()
    loss = lambda m, x: m(x)[numbers >= 0].sum()  # noqa: E731
    log, _ = log_and_ask(tmp_path, model, loss, x, ids="aba", block={"segments": numbers}, rank=2, dtype="float64")
    assert log.data_ids == ["a", "b"] and log.moments()[-1] == 8


class Squashed(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


def test_a_subclass_with_a_forward_of_its_own_is_left_out_until_it_is_vouched_for(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(4, 4), Squashed(4, 4))
    run = loghook.init(tmp_path, rank=2)
    run.watch(model)
    assert run.layers == ("0",) and "Squashed overrides forward" in capsys.readouterr().out


def test_a_deep_copy_of_a_watched_model_adds_nothing(tmp_path):
    import copy

    model, x = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(2, 4).double()
    run = loghook.init(tmp_path, rank=2, dtype="float64")
    run.watch(model)
    teacher = copy.deepcopy(model)
    with run(data_id=[0, 1]):
        (model(x) - 2 * teacher(x)).square().sum().backward()
    run.finalize()
    batch = (x, teacher(x).detach())
    assert_rows_exact(loghook.load(tmp_path), model, lambda m, b: (m(b[0]) - 2 * b[1]).square().sum(), batch, 1e-9)


def test_a_watched_model_can_be_saved_whole(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(2, 4).double()
    run = loghook.init(tmp_path / "log", rank=2, dtype="float64")
    run.watch(model)
    with run(data_id=[0, 1]):
        torch.save(model, tmp_path / "model.pt")
        back = torch.load(tmp_path / "model.pt", weights_only=False)
        (model(x) - 2 * back(x)).square().sum().backward()  # what came back is watched by nobody
    run.finalize()
    batch = (x, back(x).detach())
    assert_rows_exact(
        loghook.load(tmp_path / "log"), model, lambda m, b: (m(b[0]) - 2 * b[1]).square().sum(), batch, 1e-9
    )


def test_a_model_that_was_saved_whole_takes_other_hooks_in_another_process(tmp_path):
    """Hooks have numbers that each process counts for itself, and those of ours are in the file."""
    model = nn.Sequential(nn.Linear(4, 3))
    run = loghook.init(tmp_path / "log", rank=2)
    run.watch(model)
    torch.save(model, tmp_path / "model.pt")
    script = """
        import sys, torch
        model = torch.load(sys.argv[1], weights_only=False)
        seen = []
        model[0].register_forward_hook(lambda module, args, y: seen.append(y))
        model(torch.zeros(2, 4))
        assert len(seen) == 1
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), tmp_path / "model.pt"], check=True)


def test_inputs_made_in_inference_mode():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double().requires_grad_(False)
    with torch.inference_mode():
        x = torch.randn(4, 8).double()
    log = log_batch(model, squares, x, rank=3)
    assert_rows_exact(log, model.requires_grad_(True), squares, x.clone(), 1e-9)


def test_keywords_in_any_order(tmp_path):
    class Gated(nn.Linear):
        def forward(self, input, gate=None):
            return super().forward(input)

    @loghook.adapter(Gated)
    class GatedAdapter(loghook.capture.adapters.LinearAdapter):
        pass

    layer, x = Gated(4, 3).double(), torch.randn(2, 4).double()
    model = nn.Sequential(layer)
    loss = lambda m, b: m[0](gate=torch.zeros(2, 1), input=b).square().sum()  # noqa: E731
    gradients = torch.stack([torch.autograd.grad(loss(model, x[i : i + 1]), layer.weight)[0] for i in range(2)])
    log = log_batch(model, loss, x, projection="none", bias=False)
    torch.testing.assert_close(torch.from_numpy(log.rows("0")[:].copy()), gradients)


def test_second_order_losses_are_refused(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(2, 4, requires_grad=True)
    run = loghook.init(tmp_path, rank=2)
    run.watch(model)
    with pytest.raises(loghook.LoghookError, match="create_graph"):
        with run(data_id=[0, 1]):
            (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            grad.square().sum().backward()


def test_kept_losses_do_not_keep_rows_alive(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    run = loghook.init(tmp_path, rank=64)
    run.watch(model)
    losses = []
    for i in range(3):
        with run(data_id=list(range(8 * i, 8 * i + 8))):
            losses.append(model(torch.randn(8, 64)).square().sum())
            losses[-1].backward()
    import gc

    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
    assert not [t for t in tensors if t.dim() > 2 and t.untyped_storage().nbytes() >= 8 * 64 * 64 * 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_formed_a_few_layers_at_a_time(dtype, monkeypatch):
    monkeypatch.setattr(Rows, "limit", 4000)
    check_against_oracle(tiny_llama().to(dtype), causal_loss, text_batch(), dtype, rank=8)
    run_case(Twice(), torch.randn(4, 3, 6), dtype, rank=3)


def test_a_layer_called_compiled_and_not_in_one_block(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 3, 4)
    run = loghook.init(tmp_path, rank=2, on_repeat="all")
    run.watch(model)
    for again in (model, torch.compile(model, backend="eager")):
        with run(data_id=[0, 1]):
            again(model(x)).square().sum().backward()
    run.finalize()
    log = loghook.load(tmp_path)
    rows = torch.cat([block for _, block in log.blocks()])
    assert rows.any() and torch.allclose(rows[:2], rows[2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"rank": 2}, {"projection": "none"}])
@torch._functorch.config.patch(donated_buffer=False)  # for two passes through compiled code
def test_a_model_is_compiled_between_blocks(tmp_path, options):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(2, 3, 4)
    run = loghook.init(tmp_path, on_repeat="all", **options)
    run.watch(model)
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True), model):
        with run(data_id=[0, 1]):
            forward(x).square().sum().backward()
        with pytest.raises(DeliveryError, match="two backward passes"), run(data_id=[0, 1]):
            loss = forward(x).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
    run.finalize()
    rows = torch.cat([block for _, block in loghook.load(tmp_path).blocks()])
    assert rows.any() and torch.allclose(rows[:2], rows[2:4]) and torch.equal(rows[:2], rows[4:])


@pytest.mark.parametrize("options", [{"rank": 2}, {"projection": "none"}])
@pytest.mark.parametrize("last", [False, True])
def test_a_layer_whose_rows_fail_has_not_delivered(tmp_path, options, last, monkeypatch):
    """Programs go on where memory runs out: the block must not end with rows that are zero."""
    model, ran = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), []

    def failing(g, matrix):
        ran.append(g)
        if len(ran) == 1 + last:
            raise torch.OutOfMemoryError("out of memory")
        return project_output(g, matrix)

    run = loghook.init(tmp_path, **options)
    run.watch(model)
    monkeypatch.setattr("loghook.capture.rows.project_output", failing)
    says = "1 of 2 watched layers delivered no rows" if last else "no backward pass reached a watched layer"
    with pytest.raises(DeliveryError, match=says), run(data_id=[0, 1]):
        with contextlib.suppress(torch.OutOfMemoryError):
            model(torch.randn(2, 8)).square().sum().backward()


def test_rows_that_fail_to_be_formed_are_formed_at_the_end(tmp_path, monkeypatch):
    model, x, formed = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(2, 8), []
    form = Rows.form

    def failing(self, group):
        formed.append(len(group))
        if len(formed) == 1:
            raise torch.OutOfMemoryError("out of memory")
        form(self, group)

    run = loghook.init(tmp_path, rank=2, on_repeat="all")
    run.watch(model)
    with run(data_id=[0, 1]):
        model(x).square().sum().backward()
    monkeypatch.setattr(Rows, "limit", 2 * 2 * (2 + 2) * 4)  # both layers', so that the last call fills it
    monkeypatch.setattr(Rows, "form", failing)
    with run(data_id=[0, 1]), contextlib.suppress(torch.OutOfMemoryError):
        model(x).square().sum().backward()
    run.finalize()
    rows = torch.cat([block for _, block in loghook.load(tmp_path).blocks()])
    assert formed == [2, 2] and rows.any() and torch.equal(rows[:2], rows[2:])


def test_a_mask_that_fits_only_a_layer_that_sleeps_is_refused(tmp_path):
    model, x = nn.ModuleDict({"a": nn.Linear(5, 5), "b": nn.Linear(5, 5)}), torch.randn(3, 4, 5)
    run = loghook.init(tmp_path, rank=3)
    run.watch(model, may_sleep="a")
    with pytest.raises(BatchError, match="fits no layer"), run(data_id=[0, 1, 2], mask=torch.ones(3, 4)):
        model["a"](x).detach()
        model["b"](x[:, :3]).square().sum().backward()


def test_inputs_that_a_later_hook_makes_tensors_of(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 3)), np.ones((2, 8), np.float32)
    run = loghook.init(tmp_path, rank=2)
    run.watch(model)
    with pytest.raises(TypeError, match="must be Tensor"), run(data_id=[0, 1]):  # as torch says it
        model(x)
    model[0].register_forward_pre_hook(lambda module, args: (torch.as_tensor(args[0]),))
    with run(data_id=[0, 1]):
        model(x).square().sum().backward()
    run.finalize()
    assert len(loghook.load(tmp_path)) == 2


@pytest.mark.parametrize("options", [{"rank": 2}, {"projection": "none"}])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_eager_model_under_compiled_autograd(tmp_path, options, frozen):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(2, 8)
    run = loghook.init(tmp_path, on_repeat="all", **options)
    run.watch(model)
    compiled = torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager"))
    for context in (contextlib.nullcontext(), compiled):
        with loghook.frozen(model) if frozen else contextlib.nullcontext(), run(data_id=[0, 1]):
            loss = model(x).square().sum()
            with context:
                loss.backward()
    run.finalize()
    rows = torch.cat([block for _, block in loghook.load(tmp_path).blocks()])
    assert rows.any() and torch.equal(rows[:2], rows[2:])


def test_gradients_of_inputs_asked_for_in_a_block_are_no_rows(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(2, 5, 4, requires_grad=True)
    run = loghook.init(tmp_path, rank=2, on_repeat="all")
    run.watch(model)
    with run(data_id=[0, 1]):
        loss = model(x).square().sum()
        (saliency,) = torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
    with run(data_id=[0, 1]):
        model(x).square().sum().backward()
    run.finalize()
    rows = torch.cat([block for _, block in loghook.load(tmp_path).blocks()])
    assert rows.any() and torch.equal(rows[:2], rows[2:]) and torch.equal(saliency, x.grad / 2)


def test_products_of_all_layers_are_few(tmp_path):
    model, batch = tiny_llama(num_hidden_layers=6), text_batch()
    run = loghook.init(tmp_path, rank=8)
    run.watch(model)
    products = collections.Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    with Count():
        causal_loss(model, batch).backward()
        plain = products["mm"], products["bmm"]
        products.clear()
        with run(data_id=list(range(len(batch[0])))):
            causal_loss(model, batch).backward()
    layers = len(run.layers)
    assert products["mm"] - plain[0] <= 6 * 4 + layers  # shared inputs, and each layer's output gradients
    assert products["bmm"] - plain[1] <= 3 * 3  # rows and two moments, for layers of three shapes


def test_generation_without_gradients_inside_a_block_hides_no_second_backward_pass(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    run = loghook.init(tmp_path, rank=2)
    run.watch(model)
    with pytest.raises(loghook.LoghookError, match="two backward passes"):
        with run(data_id=[0, 1]):
            with torch.no_grad():
                model(x), model(x)
            loss = model(x).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()


def test_no_tokens_give_zero_rows():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    log = log_batch(model, lambda m, x: m(x).sum(), torch.randn(2, 0, 4), rank=2, dtype="float32")
    assert not log.rows("0")[:].any()


@pytest.mark.parametrize("call", ["watch", "finalize", "close"])
def test_an_open_block_is_left_before_anything_else(tmp_path, call):
    model = nn.Sequential(nn.Linear(4, 3))
    run = loghook.init(tmp_path, rank=2)
    run.watch(model)
    with pytest.raises(loghook.LoghookError, match="leave it first"):
        with run(data_id=[0]):
            model(torch.randn(1, 4)).sum().backward()
            run.watch(nn.Sequential(nn.Linear(4, 3))) if call == "watch" else getattr(run, call)()
    with run(data_id=[1]):
        model(torch.randn(1, 4)).sum().backward()
    run.finalize()
    assert loghook.load(tmp_path).data_ids == [1]


def test_libraries_own_subclasses_are_vouched_for_by_name(tmp_path, capsys):
    from transformers import BitConfig, BitForImageClassification
    from transformers.models.falcon.modeling_falcon import FalconLinear

    sizes = {"num_channels": 3, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4}
    run = loghook.init(tmp_path / "bit", rank=2)
    run.watch(BitForImageClassification(BitConfig(**sizes, num_labels=5)))
    assert run.layers == ("classifier.1",)  # its convolutions standardise their weights
    assert "WeightStandardizedConv2d overrides forward" in capsys.readouterr().out
    run = loghook.init(tmp_path / "falcon", rank=2)
    run.watch(nn.Sequential(FalconLinear(4, 3)))
    assert run.layers == ("0",)


def test_a_call_on_something_else_than_the_batch_counts_only_where_it_gets_a_gradient(tmp_path):
    """DoRA multiplies an adapter's matrices by calling its layers on an identity, and detaches the result."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False)
            self.detached = True

        def forward(self, x):
            product = self.b(self.a(torch.eye(5, dtype=x.dtype)))
            norm = product.norm(dim=0)
            return self.b(self.a(x)) / (norm.detach() if self.detached else norm)

    torch.manual_seed(0)
    model, x = Adapted().double(), torch.randn(4, 5, dtype=torch.float64)
    run = loghook.init(tmp_path, rank=2, dtype="float64")
    run.watch(model)
    with run(data_id=[0, 1, 2, 3]):
        squares(model, x).backward()
    model.detached = False
    with pytest.raises(BatchError, match="5 samples, 4 ids"), run(data_id=[4, 5, 6, 7]):
        squares(model, x).backward()
    run.finalize()
    model.detached = True
    assert_rows_exact(loghook.load(tmp_path), model, squares, x, 1e-9)


def test_convolutions_over_batch_and_time_on_one_axis(tmp_path):
    class OverTime(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.o = nn.Conv2d(3, 4, 3, groups=1), nn.Linear(4, 2)

        def forward(self, x):
            return self.o(self.c(x.flatten(0, 1)).mean((2, 3)).unflatten(0, x.shape[:2]).tanh().mean(1))

    torch.manual_seed(0)
    model, x = OverTime().double(), torch.randn(4, 5, 3, 6, 6, dtype=torch.float64)
    check_against_oracle(model, squares, x, torch.float64, rank=3, flattened="c")


@pytest.mark.parametrize("order", [(True, True, False), (False, True, True), (True, False)])
def test_a_layer_called_plainly_and_in_reentrant_checkpoints(tmp_path, order):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 5)).double(), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def loss(x):
        for inside in order:
            again = lambda t: model(t).tanh()  # noqa: E731
            x = torch.utils.checkpoint.checkpoint(again, x, use_reentrant=True) if inside else again(x)
        return x.square().sum()

    run = loghook.init(tmp_path, projection="none", dtype="float64")
    run.watch(model)
    with run.query(data_id=[0, 1, 2, 3]) as query:
        loss(x).backward()
    for row, sample in zip(query.rows("0"), x.split(1), strict=True):
        model.zero_grad()
        loss(sample).backward()
        expected = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
        torch.testing.assert_close(torch.from_numpy(row), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(DeliveryError, match="two backward passes"), run.query(data_id=[0, 1, 2, 3]):
        loss(x).backward()
        loss(x).backward()


RUNS = {
    "plainly": lambda function, x: function(x),
    "reentrant": partial(torch.utils.checkpoint.checkpoint, use_reentrant=True),
    "again": partial(torch.utils.checkpoint.checkpoint, use_reentrant=False),
}


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("outer", RUNS)
@pytest.mark.parametrize("middle", RUNS)
@pytest.mark.parametrize("inner", RUNS)
def test_two_backward_passes_through_checkpoints_are_seen(tmp_path, outer, middle, inner):
    """Layers deliver inside backward passes of the checkpoints' own, which are not to be taken for another loss."""
    deep, shallow, x = nn.Linear(5, 5), nn.Linear(5, 5), torch.randn(4, 5, requires_grad=True)
    model = nn.ModuleDict({"deep": deep, "shallow": shallow})

    def in_middle(h):
        return RUNS[inner](lambda t: deep(t).tanh(), shallow(h).tanh())

    def forward(x):
        return RUNS[outer](lambda h: RUNS[middle](in_middle, h) * 1.0, x)

    def one_pass():
        with torch.no_grad():
            forward(x)
        (forward(x) + forward(2 * x)).sum().backward()
        forward(x)

    def retained():
        y = forward(x)
        y.sum().backward(retain_graph=True)
        y.sin().sum().backward()

    def after_a_reference_pass():
        with torch.no_grad():
            forward(x)
        forward(x).sum().backward()
        forward(x).sin().sum().backward()

    def of_two_forwards():
        first, second = forward(x), forward(2 * x)
        first.sum().backward()
        second.sum().backward()

    run = loghook.init(tmp_path / "run", rank=3)
    run.watch(model)
    with run.query(data_id=[0, 1, 2, 3]) as query:
        one_pass()
    assert query.rows("deep").any() and query.rows("shallow").any()
    for two in (retained, after_a_reference_pass, of_two_forwards):
        with pytest.raises(DeliveryError, match="two backward passes"), run.query(data_id=[0, 1, 2, 3]):
            two()


@pytest.mark.parametrize("kind", ["a look", "a loss"])
def test_what_a_hook_of_the_backward_pass_runs_is_no_checkpoint(tmp_path, kind):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 4, requires_grad=True)
    run = loghook.init(tmp_path / "run", rank=2)
    run.watch(model)

    def look(_):
        with torch.no_grad():
            model(x)

    def another_loss(_):
        with torch.enable_grad():
            model(x.detach()).square().sum().backward()

    with pytest.raises(DeliveryError, match="two backward passes"), run.query(data_id=[0, 1, 2]):
        h = x * 1.0
        h.register_hook(look if kind == "a look" else another_loss)
        RUNS["again"](model, h).sum().backward()
        if kind == "a look":
            RUNS["again"](model, x).square().sum().backward()


def test_a_forward_pass_after_the_backward_pass_is_no_second_loss(tmp_path):
    model, x = nn.Sequential(nn.Linear(5, 5), nn.Tanh()), torch.randn(4, 5)
    run = loghook.init(tmp_path / "run", rank=3)
    run.watch(model)
    with run.query(data_id=[0, 1, 2, 3]) as query:
        model(x).sum().backward()
        float(model(x).square().mean())  # a metric, without torch.no_grad
    with run.query(data_id=[0, 1, 2, 3]) as alone:
        model(x).sum().backward()
    assert np.array_equal(query.rows("0"), alone.rows("0"))


def test_a_call_that_has_no_rows_holds_nothing_of_its_callers(tmp_path):
    import gc
    import weakref

    held = []
    layer = nn.Linear(5, 5)
    run = loghook.init(tmp_path, rank=2)
    run.watch(model := nn.Sequential(layer))

    def forward(x):
        activation = torch.eye(5).exp()
        held.append(weakref.ref(activation))
        layer(activation)
        return model(x)

    gc.disable()
    try:
        for start in (0, 4):
            with run(data_id=range(start, start + 4)):
                forward(torch.randn(4, 5)).sum().backward()
        assert all(reference() is None for reference in held)
    finally:
        gc.enable()


def test_flattened_layers_of_a_sequence_first_model(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):  # (B, S, T, 5)
            h = self.a(x.flatten(0, 1)).tanh().mean(1).unflatten(0, x.shape[:2])  # (B * S, T, 5)
            return self.b(h.transpose(0, 1))

    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(4, 3, 2, 5, dtype=torch.float64)
    check_against_oracle(model, squares, x, torch.float64, rank=2, batch_dim=1, flattened="a")


@pytest.mark.parametrize("rank", [3, 64])
@pytest.mark.parametrize(
    "changed",
    [
        {"dilation": (2, 2), "padding": (2, 2), "stride": (1, 1)},
        {"padding": 0},
        {"padding": (3, 0), "stride": 2, "dilation": 1},
        {"padding": "same", "stride": (1, 1), "dilation": (1, 3)},
    ],
)
def test_convolutions_that_were_changed_after_they_were_made(changed, rank):
    """As segmentation models do with a backbone's strides."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh())
    for name, value in changed.items():
        setattr(model[0], name, value)
    x, options = torch.randn(3, 2, 9, 9), {"rank": rank} if rank < 4 else {"projection": "none"}
    run_case(model, x, torch.float32, **options)


def test_what_replaces_a_layers_computation_is_left_out(tmp_path, capsys):
    class Tiled(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), weight, bias)

    class Conv1D(nn.Module):  # of one's own
        def __init__(self):
            super().__init__()
            self.nf, self.w = 3, nn.Parameter(torch.ones(3, 3))

        def forward(self, x):
            return x @ self.w * 2

    model = nn.ModuleDict(
        {"tiled": Tiled(2, 2, 3), "patched": nn.Linear(3, 3), "own": Conv1D(), "good": nn.Linear(3, 3)}
    )
    model["patched"].forward = lambda x: 2 * x
    run = loghook.init(tmp_path / "run", rank=2)
    run.watch(model)
    shown = capsys.readouterr().out
    assert run.layers == ("good",)
    for why in ("Tiled overrides _conv_forward", "forward was replaced on the module", "no adapter for Conv1D"):
        assert why in shown
    with pytest.raises(ConfigError, match="patched: forward was replaced"):
        loghook.init(tmp_path / "other").watch(model, exclude="good")
    with pytest.raises(UnsupportedError, match=r"'0.weight' has no shape yet"):
        loghook.init(tmp_path / "lazy").watch(nn.Sequential(nn.LazyConv1d(3, 2), nn.Linear(2, 2)))


def test_a_tied_weight_is_named_where_it_is_used_otherwise(tmp_path, capsys):
    model = nn.ModuleDict({"words": nn.Embedding(11, 5), "decoder": nn.Linear(5, 11, bias=False)})
    model["decoder"].weight = model["words"].weight
    loghook.init(tmp_path / "run", rank=4).watch(model)
    shown = capsys.readouterr().out
    assert "100.0% of 55 parameters" in shown
    assert "words (tied to decoder, whose rows are of its own use of the weight)" in shown


@pytest.mark.parametrize("options", [{"rank": 2}, {"projection": "none"}])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_state_that_is_carried_over_blocks_is_refused(tmp_path, options, compiled):
    torch.manual_seed(0)
    model, x = nn.Linear(5, 5), torch.randn(2, 3, 5)
    run = loghook.init(tmp_path / "run", **options)
    run.watch(model)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    state = torch.zeros(3, 5)
    with run(data_id=[0, 1, 2]):
        state = torch.tanh(forward(x[0] + state))
        state.square().sum().backward(retain_graph=True)
    with pytest.raises(DeliveryError, match="detach what is carried on"), run(data_id=[3, 4, 5]):
        torch.tanh(forward(x[1] + state)).square().sum().backward()
    state = state.detach()
    with run(data_id=[3, 4, 5]):
        torch.tanh(forward(x[1] + state)).square().sum().backward()
    run.finalize()
    assert loghook.load(run.path).data_ids == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("channels", [3, 4])  # of which one is as many as samples
def test_sequence_first_models_with_convolutions_and_single_tokens(channels):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.kind, self.words = nn.Embedding(5, channels), nn.Embedding(7, channels)
            self.conv, self.out = nn.Conv1d(channels, channels, 3, padding=1), nn.Linear(channels, 2)

        def forward(self, words, kind):
            h = self.words(words) + self.kind(kind)  # (S, B, C) + (B, C)
            h = self.conv(h.permute(1, 2, 0)).permute(2, 0, 1)
            return self.out(torch.tanh(h))

    torch.manual_seed(0)
    model, words, kind = Model(), torch.randint(7, (6, 3)), torch.randint(5, (3,))
    log, _ = log_and_ask(
        tempfile.mkdtemp(), model, lambda m, kind: m(words, kind).square().sum(), kind, projection="none",
        watch={"include": ["*", "words", "kind"], "batch_dim": 1},
    )  # fmt: skip
    for i in range(3):
        model.zero_grad()
        model(words[:, i : i + 1], kind[i : i + 1]).square().sum().backward()
        for name, module in model.named_children():
            expected = module.weight.grad.T if name in ("words", "kind") else module.weight.grad.flatten(1)
            found = torch.tensor(log.rows(name)[i])[:, : expected.shape[1]]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_batchnorms_are_looked_for_where_they_are_in_each_pass(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(5, 4)
    run = loghook.init(tmp_path / "run", rank=2, projection="whitened")
    run.watch(model)
    model[1] = nn.GroupNorm(2, 4)  # the one that was in training mode is gone

    def go_through():
        for current in run.passes():
            with run(data_id=range(5)):
                model(x).square().sum().backward()
            if current.kind == "covariance":
                model[1] = nn.BatchNorm1d(4)

    with pytest.raises(UnsupportedError, match="BatchNorm1d '1' is in training mode"):
        go_through()
    model[1].eval()
    go_through()
    run.finalize()
    assert len(loghook.load(run.path)) == 5


def test_batch_norm_that_is_set_to_training_inside_a_block(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval(), torch.randn(5, 4)
    run = loghook.init(tmp_path / "run", rank=2)
    run.watch(model)
    with pytest.raises(UnsupportedError, match="BatchNorm1d '1' is in training mode"), run(data_id=range(5)):
        model.train()(x).square().sum().backward()
    with pytest.raises(UnsupportedError, match="BatchNorm1d '1' is in training mode"), run(data_id=range(5)):
        model.train()(x).square().sum().backward()
        model.eval()  # as for a validation
    assert not model[1]._forward_pre_hooks
    model.eval()
    with run.query(data_id=range(5)):
        model[2](copy.copy(model[1])(model[0](x))).sum().backward()  # a shallow copy has the same hooks
    with run(data_id=range(5)):
        model(x).square().sum().backward()
    run.finalize()
    assert len(loghook.load(run.path)) == 5


@pytest.mark.parametrize("compiled", [False, True])
def test_pairs_through_layers_that_see_different_tokens(tmp_path, compiled):
    """Chosen and rejected of a reward model with patches and a pooled head, or two views of an image."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv1d(2, 4, 3, stride=2), nn.Tanh())
    model = nn.ModuleDict({"words": nn.Linear(2, 2), "body": body, "head": nn.Linear(4, 1)})
    x = torch.randn(6, 9, 2)  # three pairs: 0 and 3, 1 and 4, 2 and 5

    def scores(x):
        return model["head"](model["body"](torch.tanh(model["words"](x)).transpose(1, 2)).mean(2))[:, 0]

    def loss(x):
        chosen, rejected = scores(x).chunk(2)
        return F.softplus(rejected - chosen).sum()

    run = loghook.init(tmp_path / "run", rank=3)
    run.watch(model)
    forward = torch.compile(loss, backend="aot_eager") if compiled else loss
    with run(data_id=["a", "b", "c"], segments=torch.arange(3).repeat(2)[:, None]):
        forward(x).backward()
    run.finalize()
    log = loghook.load(run.path)
    for i in range(3):
        model.zero_grad()
        loss(x[[i, i + 3]]).backward()
        for name in log.layers:
            module = model.get_submodule(name)
            whole = torch.cat([module.weight.grad.flatten(1), module.bias.grad[:, None]], 1).double().numpy()
            out, into = log.projection(name)
            whole = whole if out is None else out @ whole
            whole = whole if into is None else whole @ into.T
            assert abs(log.rows(name)[i] - whole).max() < 1e-5 * max(1.0, abs(whole).max())


@pytest.mark.parametrize(
    ("projection", "frozen"), [("random", True), ("random", False), ("none", True)]
)  # where autograd itself keeps the whole input, for the weight's gradient, the program has to copy it
def test_an_array_that_the_program_writes_anew_between_calls(projection, frozen):
    """Torch does not count what numpy writes: the same tensor, with other values, is another input."""
    torch.manual_seed(0)
    frames, buffer = torch.randn(5, 3, 20, dtype=torch.float64), np.zeros((5, 20))
    policy = nn.Sequential(nn.Linear(20, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)).double()

    def each(model: nn.Module, inputs: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.stack([model(x).square().sum() * (i + 1) for i, x in enumerate(inputs)]).sum()

    def refilled() -> Iterator[torch.Tensor]:
        for frame in frames.unbind(1):
            buffer[:] = frame
            yield torch.from_numpy(buffer)

    log = log_batch(
        policy, lambda model, _: each(model, refilled()), frames, frozen=frozen, projection=projection, rank=8
    )
    assert_rows_exact(log, policy, lambda model, batch: each(model, batch.unbind(1)), frames, 1e-9)


class Siblings(nn.Module):
    """Two layers that read what looks like one input."""

    def __init__(self, first: nn.Module, second: nn.Module, views: Any = lambda x: (x, x)) -> None:
        super().__init__()
        self.first, self.second, self.views = first, second, views

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.views(x)
        return self.first(a).sin() + self.second(b)


def test_an_array_that_the_program_writes_anew_between_siblings():
    torch.manual_seed(0)
    first, second, buffer = *torch.randn(2, 5, 20, dtype=torch.float64), np.zeros((5, 20))

    class Rewriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.of = nn.ModuleDict({"a": nn.Linear(20, 4), "b": nn.Linear(20, 4)})

        def forward(self, frames, copies=False):
            x, out = torch.from_numpy(buffer)[: len(frames)], []
            for layer, frame in zip(self.of.values(), frames.unbind(1), strict=True):
                buffer[: len(frame)] = frame
                out.append(layer(x.clone() if copies else x))
            return out[0].sin() + out[1].cos()

    frames = torch.stack([first, second], 1)
    model = Rewriting().double()
    log = log_batch(model, lambda model, batch: model(batch).sum(), frames, frozen=True, rank=3)
    # Autograd itself keeps the array, and would see what was written last.
    assert_rows_exact(log, model, lambda model, batch: model(batch, copies=True).sum(), frames, 1e-9)


class ReluLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.relu(), self.weight, self.bias)


def test_siblings_share_a_projection_only_where_it_is_the_same():
    torch.manual_seed(0)
    x = torch.randn(5, 7, 6, dtype=torch.float64)

    @loghook.adapter(ReluLinear)
    class ReluLinearAdapter(adapters.LinearAdapter):
        def project(self, module, x, side, bias):
            return super().project(module, x.relu(), side, bias)

    try:
        for model, batch in (
            (Siblings(nn.Linear(6, 6), ReluLinear(6, 6)), x),
            (
                Siblings(nn.Linear(6, 6), nn.Linear(6, 6), lambda z: (z.imag, z.conj().imag)),
                torch.complex(x, x.flip(0)),
            ),
        ):
            model = nn.Sequential(model).double()  # layers of one parent share
            log = log_batch(model, lambda model, x: model(x).square().sum(), batch, rank=3)
            assert_rows_exact(log, model, lambda model, x: model(x).square().sum(), batch, 1e-9)
    finally:
        del adapters._REGISTRY[ReluLinear]


def test_a_layer_outside_autocast_has_rows_of_its_own_precision():
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"pair": Siblings(nn.Linear(32, 32), nn.Linear(32, 32))}), torch.randn(5, 9, 32)

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            low = model["pair"].first(x).float()
        return (low * 1e-3 + model["pair"].second(x)).square().sum()

    alone = log_batch(model, loss, x, rank=8, include="*second", dtype="float32").rows("pair.second")[:]
    beside = log_batch(model, loss, x, rank=8, dtype="float32").rows("pair.second")[:]
    np.testing.assert_allclose(beside, alone, atol=1e-5 * np.abs(alone).max())


def test_layers_of_no_width_are_left_out(tmp_path, capsys):
    model = nn.ModuleDict({"extra": nn.Linear(0, 8), "used": nn.Linear(6, 8)})
    run = loghook.init(tmp_path / "log", rank=2)
    run.watch(model)
    assert "extra (no inputs, or no outputs)" in capsys.readouterr().out
    with run([0, 1]):
        (model["extra"](torch.ones(2, 0)) + model["used"](torch.ones(2, 6))).sum().backward()
    run.finalize()
    assert loghook.load(tmp_path / "log").layers == ("used",)


def test_sparse_and_complex_parameters_and_buffers(tmp_path):
    """Graph networks keep their adjacency matrix as a sparse buffer, or train its values."""

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            adjacency = torch.eye(4).to_sparse()
            self.register_buffer("rows", torch.eye(4).to_sparse_csr())
            self.register_buffer("fixed", adjacency)
            self.trained = nn.Parameter(adjacency.clone())
            self.phase = nn.Parameter(torch.complex(torch.ones(2), torch.ones(2)))
            self.head = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.sparse.mm(self.trained, torch.sparse.mm(self.fixed, x.T)).T)

    model, x = Graph(), torch.randn(5, 4)
    loghook.check(model, lambda model, x: model(x).square().sum(), x)  # which raises where rows are wrong
    run = loghook.init(tmp_path / "log", rank=2)
    run.watch(model)
    before = run.digest()
    with torch.no_grad():
        model.phase.imag.mul_(2)
    assert run.digest() != before
    run.close()


def test_layers_that_changed_after_they_were_watched_are_named(tmp_path):
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), torch.randn(3, 6)
    run = loghook.init(tmp_path / "log", rank=2)
    run.watch(model)
    model[1].bias = None
    with pytest.raises(StateError, match="'1' has changed since it was watched"), run([0, 1, 2]):
        model(x).sum().backward()


@pytest.mark.parametrize("projection", ["random", "none"])
def test_transforms_of_torch_func_are_named(tmp_path, projection):
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), torch.randn(3, 6)
    run = loghook.init(tmp_path / "log", rank=2, projection=projection)
    run.watch(model)
    for transform in (torch.func.vmap(model), torch.func.grad(lambda x: model(x).sum())):
        with pytest.raises(UnsupportedError, match=r"torch\.func"), run([0, 1, 2]):
            transform(x)


def test_patches_of_a_depthwise_convolution_are_laid_out_once(tmp_path):
    """They hold the input many times over, and are neither copied for the bias's column nor for the statistics."""
    model, x = nn.Conv2d(8, 8, 5, padding=2, groups=8), torch.randn(4, 8, 12, 12)
    patches, made = 4 * 12 * 12 * 8 * 25, []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= 4 * patches:
                made.append(result)
            return result

    run = loghook.init(tmp_path, projection="none")
    run.watch(model)
    for mask in (None, torch.ones(4, 144)):
        made.clear()
        with run(data_id=range(4), mask=mask), Watching():
            model(x).square().sum().backward()
        assert len({t.untyped_storage().data_ptr() for t in made}) == 1 + (
            mask is not None
        )  # weighted ones are made for the statistics


def test_an_input_that_changes_in_place_after_a_whole_side_kept_it_is_named(tmp_path):
    """A frozen layer does not keep its input, so that this trains without logging."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False).requires_grad_(False)

        def forward(self, x):
            x = self.first(x) * 1.0
            h = self.second(x)
            x += h
            return x

    model, x = Residual(), torch.randn(3, 4)
    model(x).sum().backward()
    with loghook.init(tmp_path / "whole", projection="none") as run:
        run.watch(model)
        with (
            pytest.raises(
                UnsupportedError, match=r"input of second, or the block's mask, was changed in place.*x = x \+ y"
            ),
            run(data_id=[0, 1, 2]),
        ):
            model(x).sum().backward()
    with loghook.init(tmp_path / "projected", rank=2) as run:
        run.watch(model)
        with run(data_id=[0, 1, 2]):
            model(x).sum().backward()


def test_watch_says_how_much_of_what_is_trained_is_covered(tmp_path, capsys):
    """As of adapters that are no layers (IA3): everything is covered but what is trained."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def shown(model):
        loghook.init(tmp_path, rank=2, overwrite=True).watch(model)
        return capsys.readouterr().out

    model = Scaled()
    assert "trainable" not in shown(model)  # all are
    model.layer.requires_grad_(False)
    assert "83.3% of 18 parameters" in (out := shown(model)) and "0 of 3 trainable parameters" in out
    model.layer.weight.requires_grad_(True)
    assert "12 of 15 trainable parameters" in shown(model)
    assert "trainable" not in shown(model.requires_grad_(False))  # in a log-only pass


class Sees(nn.Module):
    """A tower over all patches of a batch's images, in one axis, and a text model that gets their mean by sample."""

    def __init__(self, side_by_side):
        super().__init__()
        self.side_by_side = side_by_side
        self.vision = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        self.text = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, patches, owner, words):
        seen = self.vision(patches[None])[0] if self.side_by_side else self.vision(patches)
        return self.text(words + torch.zeros(len(words), 5).to(seen).index_add(0, owner, seen)[:, None])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_layers_that_see_patches_of_images_have_segments_of_their_own(tmp_path, side_by_side, compiled):
    torch.manual_seed(0)
    model = Sees(side_by_side).double()
    counts, words = [3, 0, 4, 1], torch.randn(4, 6, 5).double()
    owner = loghook.segments.from_counts(counts)
    assert owner.flatten().tolist() == [0, 0, 0, 2, 2, 2, 2, 3]
    patches, mask = torch.randn(8, 6).double(), (torch.rand(4, 6) < 0.7).double()
    mask[:, 0] = 1

    def log(name, blocks):
        run = loghook.init(tmp_path / name, rank=4, dtype="float64", on_repeat="first")
        run.watch(model, activations="sum", may_sleep="vision*")
        ran = torch.compile(model, backend="aot_eager", dynamic=True) if compiled and name == "together" else model
        for ids in blocks:
            mine = torch.isin(owner[:, 0], torch.tensor(ids))
            own = loghook.segments.from_counts([counts[i] for i in ids])
            with run(data_id=ids, mask=mask[ids], segments={"vision*": own}):
                out = ran(patches[mine], own[:, 0], words[ids])
                out.pow(3).sum().backward()
        run.finalize()
        run.close()
        return loghook.load(tmp_path / name)

    together, alone = log("together", [[0, 1], [1, 2, 3]]), log("alone", [[0], [1], [2], [3]])
    assert together.data_ids == alone.data_ids == [0, 1, 2, 3]
    torch.testing.assert_close(torch.from_numpy(together.moments()), torch.from_numpy(alone.moments()))
    for layer in together.layers:
        for kind in ("gradients", "activations"):
            a, b = (torch.from_numpy(log.rows(layer, kind)[:].copy()) for log in (together, alone))
            torch.testing.assert_close(a, b)
            assert (b.flatten(1).abs().amax(1) > 0).tolist() == [True, not layer.startswith("vision"), True, True]
    # A sample's whole gradient, by autograd.
    loss = lambda m, words: m(patches[:7], torch.tensor([0] * 3 + [1] * 4), words).pow(3).sum()  # noqa: E731
    options = {"projection": "none", "block": {"segments": {"vision*": loghook.segments.from_counts([3, 4])}}}
    whole, _ = log_and_ask(tmp_path / "whole", model, loss, words[[0, 2]], **options, dtype="float64")
    rows = whole.rows("vision.0")[1]
    for p in model.parameters():
        p.grad = None
    model(patches[3:7], torch.zeros(4, dtype=torch.long), words[2:3]).pow(3).sum().backward()
    first = model.vision[0]
    expected = torch.cat([first.weight.grad, first.bias.grad[:, None]], 1)
    torch.testing.assert_close(torch.from_numpy(rows.copy()), expected)


def test_segments_by_layer_that_do_not_fit_are_refused(tmp_path):
    model = Sees(side_by_side=False)
    run = loghook.init(tmp_path, rank=4)
    run.watch(model)
    owner = loghook.segments.from_counts([3, 5])
    patches, words = torch.randn(8, 6), torch.randn(2, 6, 5)

    def block(segments, **options):
        with run(data_id=[0, 1], segments=segments, **options):
            model(patches, owner[:, 0], words).sum().backward()

    for segments, options, says in (
        (None, {}, r"layer 'vision.2' got an input of shape \(8, 8\).*segments=\{pattern: ...\}"),
        ({"visual*": owner}, {}, r"segments=\{'visual\*': ...\} fits no layer of the model"),
        ({"vision*": owner[:-1]}, {}, "'vision.2' has .batch, tokens. = .8, 1. where segments has .7, 1."),
        ({"vision*": owner + 1}, {}, "number them 0 to 1"),
        (
            {"vision*": owner},
            {"mask": {"*": torch.ones(2, 6)}},
            "mask has shape .2, 6. in a block of 2 ids, and layer 'vision.0' sees 8",
        ),
    ):
        with pytest.raises(BatchError, match=says):
            block(segments, **options)
    block({"vision*": owner}, mask=torch.ones(2, 6))
    run.close()
    run = loghook.init(tmp_path, rank=4, overwrite=True)
    run.watch(model, exclude="vision*")  # as tune may leave layers out whose segments the loop still gives
    block({"vision*": owner, "*": torch.arange(2)[:, None]})
    run.close()
    run = loghook.init(tmp_path, rank=4, overwrite=True)
    run.watch(model, "vision*")  # what is for all others may have none
    block({"vision*": owner, "*": torch.arange(2)[:, None]})
