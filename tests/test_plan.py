"""``run.plan`` and ``loghook plan``: what they say against what a run then takes."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from typer.testing import CliRunner

import loghook
from loghook.capture.plan import parse_size, plan_config
from loghook.cli import app
from loghook.errors import ConfigError, StateError

PAGE = (Path(__file__).parents[1] / "docs" / "choosing.md").read_text()
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip


def make(path, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20, bias=False))
    run = loghook.init(path, rank=8, **options)
    run.watch(model)
    return run, model


def block(run, model, ids):
    with run(data_id=ids):
        model(torch.randn(len(ids), 5, 40)).square().sum().backward()


def test_a_billion_tokens_through_llama_3_8b(tmp_path):
    """docs/choosing.md shows this: LogIX takes 3.5 TB at the same rank."""
    LLAMA_3_8B.save_pretrained(tmp_path)
    sequences = 10**9 // 512
    plan = plan_config(tmp_path, samples=sequences, tokens=512, rank=64, dtype="int1", projection="whitened")
    assert len(plan.layers) == 224 and plan.coverage["total"] == 8_030_261_248
    assert plan.row_bytes() == 224 * (4096 // 8 + 4)
    assert plan.total_bytes() == pytest.approx(0.226e12, rel=2e-3)
    assert plan.total_bytes("bfloat16") == pytest.approx(3.58e12, rel=2e-3)
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert plan.arithmetic[1] == 2 * weights and plan.arithmetic[0] < 0.05 * plan.arithmetic[1]
    command, *lines = PAGE.partition("$ loghook plan ")[2].partition("```")[0].splitlines()
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "config.json"), *shlex.split(command)[1:]])
    assert shown.exit_code == 0, shown.output
    assert len(lines) > 10 and not [line for line in lines if line != "  ..." and line not in shown.output.splitlines()]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int8", "int1"])
def test_bytes_are_those_of_the_log(tmp_path, dtype):
    run, model = make(tmp_path / "run", dtype=dtype)
    with run:
        plan = run.plan(samples=300, disk=10_000)
        block(run, model, list(range(300)))
        run.finalize()
    log = loghook.load(tmp_path / "run")
    assert plan.row_bytes() == log.codec.row_bytes
    on_disk = sum(file.stat().st_size for file in (tmp_path / "run").glob("rows-*"))
    assert on_disk - 512 == plan.total_bytes()
    best = plan.largest_rank()
    assert plan.total_bytes(rank=best + 1) > 10_000 and (best == 0 or plan.total_bytes(rank=best) <= 10_000)
    assert plan.row_bytes(rank=10**6) == plan.layout(10**6).codec(dtype).row_bytes  # whole gradients
    assert plan.layout(10**6).width == 30 * 41 + 20 * 30


def test_measured_blocks_write_nothing(tmp_path):
    run, model = make(tmp_path / "run", projection="whitened")
    with run, run.plan(samples=1000, tokens=5) as plan:
        for start in (0, 3, 6):
            block(run, model, [start, start + 1, start + 2])
        with pytest.raises(StateError, match="plan is being measured"):
            next(iter(run.passes()))
    assert list((tmp_path / "run").iterdir()) == []
    assert plan.batch == 3 and 0 < plan.seconds < 10
    assert "samples/s" in str(plan) and "one more pass" in str(plan)
    run, model = make(tmp_path / "run", projection="whitened")
    with run.plan(samples=1000) as plan:
        block(run, model, [0, 1])
    assert plan.seconds > 0
    for _ in run.passes():
        block(run, model, [0, 1, 2])
    run.finalize()
    run.close()
    assert loghook.load(tmp_path / "run").data_ids == [0, 1, 2]


def test_arithmetic_is_what_torch_counts(tmp_path):
    """Matrix products of a logged pass, less those of the same pass unlogged; two multiply-adds are four operations."""
    run, model = make(tmp_path / "run")

    def operations(logged):
        with FlopCounterMode(display=False) as counter, loghook.frozen(model):
            x = torch.randn(2, 500, 40, requires_grad=True)
            if logged:
                with run.query(data_id=[0, 1]):
                    model(x).square().sum().backward()
            else:
                model(x).square().sum().backward()
        return counter.get_total_flops() / 2 / 1000

    with run:
        capture, watched = run.plan(samples=1).arithmetic
        plain = operations(False)
        assert plain == watched
        moments = sum(spec.k_in**2 + spec.k_out**2 for spec in run.plan(samples=1).layout().layers)
        bias = 8  # the plan multiplies the bias's 1 as well, capture adds its column
        assert operations(True) - plain == capture - moments - bias


def test_memory_is_of_what_there_is(tmp_path):
    run, _ = make(tmp_path / "run")
    with run:
        memory = run.plan(samples=1, tokens=7, batch=3).memory
    assert memory["projections"] == 4 * 8 * (41 + 30 + 30 + 20)
    assert memory["projected inputs"] == 3 * 7 * 4 * (8 + 8)
    assert memory["rows of a block"] == 2 * 3 * 4 * 128
    assert memory["second moments, in the fitting pass"] == 0
    run, model = make(tmp_path / "fitted", projection="pca")
    with run:
        memory = run.plan(samples=1).memory
        for _ in zip(run.passes(), range(1), strict=False):
            block(run, model, [0])
            assert memory["second moments, in the fitting pass"] == 12 * sum(
                len(t) - 1 for t in run._pass._gathering.totals.values()
            )


def test_sizes_and_refusals(tmp_path):
    assert parse_size("500 GB") == 5e11 and parse_size("2 TiB") == 2 * 2**40 and parse_size(1000) == 1000
    assert parse_size("1.5TB") == 1.5e12 and parse_size("1,000 kB") == 1e6
    assert parse_size("1,234,567.5") == 1234567.5
    assert parse_size(1e16) == 1e16 and parse_size("5e11") == 5e11 and parse_size("500 KB") == 5e5
    for wrong in ("much", "-1 GB", "0", "5 XB", "1.2.3 GB", "1,5 GB"):
        with pytest.raises(ConfigError, match="is no size"):
            parse_size(wrong)
    run, _ = make(tmp_path / "run")
    with run, pytest.raises(ConfigError, match="samples=0"):
        run.plan(samples=0)
    with loghook.init(tmp_path / "other") as run, pytest.raises(StateError, match="nothing is watched"):
        run.plan(samples=1)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    shown = CliRunner().invoke(app, ["plan", str(tmp_path), "--samples", "1"])
    assert shown.exit_code == 1 and "no configuration" in shown.output
    assert "rank=0" in CliRunner().invoke(app, ["plan", str(tmp_path), "--samples", "1", "--rank", "0"]).output
    missing = CliRunner().invoke(app, ["plan", str(tmp_path / "confg.json"), "--samples", "1"])
    assert missing.exit_code == 1 and "is no file" in missing.output
