"""The benchmark scripts run from end to end on tiny models, so that nothing in them rots; no figure is judged."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness import benchmarks

pytest.importorskip("transformers")
Load = Callable[[str], ModuleType]
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def load() -> Iterator[Load]:
    with benchmarks() as load:
        yield load


@pytest.fixture
def run(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a script, and read what it wrote."""

    def run(script: str, *arguments: str, name: str = "") -> dict[str, Any]:
        module = load(script)
        monkeypatch.setattr(load("_common"), "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", [script, "--threads", "1", "--save", *arguments])
        module.main()
        return json.loads((tmp_path / f"{name or script}.json").read_text())

    return run


def test_slice_of_a_large_model_takes_what_was_planned(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    kept = run("slice", "--tiny", "--samples", "6")
    # Of so few rows headers and records are a large part.
    assert kept["planned_bytes"] <= kept["measured_bytes"] < 3 * kept["planned_bytes"]
    assert 0 < kept["row_bytes"] - 512 / 6 < kept["row_bytes"]
    assert "LogIX" in capsys.readouterr().out


def test_gpu_benchmark_measures_every_part_on_every_architecture(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    load("gpu").main(["--tiny", "--compile", "gpt2", "--out", str(out)])
    models = json.loads(out.read_text())["models"]
    assert set(models) == {"llama-3-8b", "qwen2.5-1.5b", "gpt2"}
    for place in models.values():
        batches = {f"{part}, batch {size}" for part in ("log", "profile") for size in (1, 2)}
        assert batches | {"train", "to the disk", "score"} <= set(place)
        assert not [name for name in place if isinstance(place[name], dict) and "left_out" in place[name]]
        for name, over in (("log, batch 1", "log"), ("log, batch 2", "log"), ("train", "train and log")):
            assert place[name][over]["tokens/s"] > 0 and math.isfinite(place[name]["overhead"]["median"])
        assert place["log, batch 1"]["arithmetic"] > 1 or place["log, batch 2"]["arithmetic"] > 1
        assert place["profile, batch 1"]["by host"]
        assert place["row_bytes"] == place["score"]["values"] * 2  # bfloat16
        assert place["score"]["agreement"] > 0.999
    assert "log compiled, batch 2" in models["gpt2"]
    assert {"covariance", "eigenvalues", "score"} <= set(models["gpt2"]["whole gradients"]["seconds"])
    assert "LogIX" in capsys.readouterr().out


def test_gpu_benchmark_ends_in_time_and_says_what_it_left_out(load: Load, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    load("gpu").main(["--tiny", "--seconds", "0", "--out", str(out)])
    for place in json.loads(out.read_text())["models"].values():
        assert place["build"] == {"left_out": "no time left"}


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_capture_benchmark_states_every_ratio(
    load: Load, run: Run, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = load("capture")
    monkeypatch.setattr(capture, "NARROW", 64)
    monkeypatch.setattr(capture, "WIDE", 128)
    arguments = ("--repeats 2 --layers 1 --tokens 8 --no-memory --compile eager --clock " + clock).split()
    result = run("capture", *arguments, name="capture_32_tokens" + "_cpu" * (clock == "cpu"))
    assert set(result["ratios"]) == {*capture.RATIOS, capture.COMPILED}
    assert all(value["low"] <= value["median"] <= value["high"] for value in result["ratios"].values())
    assert result["operations"]["train"] > result["operations"]["frozen"]


def test_our_program_among_the_peers_gives_the_slow_ekfac(load: Load, tmp_path: Path) -> None:
    exchange, reference = load("peers.exchange"), load("peers.reference")
    load("peers_check").llama_folder(tmp_path / "x", samples=12, queries=3, tokens=10, sampled=False)
    given = exchange.read(tmp_path / "x")
    work = load("peers.loghook_scores").work
    costs = exchange.Costs()
    scores = work(given, exchange.Options(method="ekfac", batch=5), costs, tmp_path)
    slow = reference.ekfac(given, 0.1)
    assert reference.agreement(scores.numpy(), slow)[1] > 0.999
    np.testing.assert_allclose(scores, slow, rtol=0.05, atol=0.01 * float(np.abs(slow).max()))
    assert work(given, exchange.Options(method="log", rank=8), costs, tmp_path) is None
    assert set(costs.seconds) == {"fit", "score", "log"} and costs.facts["bytes_per_sample"] > 0


def test_settings_are_judged_by_queries_that_did_not_choose_them(load: Load) -> None:
    members = np.random.default_rng(0).random((40, 6)) < 0.5
    truth = np.random.default_rng(1).standard_normal((8, 6))
    task = SimpleNamespace(n_query=8, members=members, losses=-(truth @ members.T).T)
    halves = np.array_split(np.random.default_rng(0).permutation(8), 2)
    candidates = []
    for mine, other in (halves, halves[::-1]):
        scores = np.empty((8, 6))  # right for one half, and wrong for the other
        scores[mine], scores[other] = truth[mine], -truth[other]
        candidates.append(scores)
    found = load("_judge").held_out(task, candidates)
    np.testing.assert_array_equal(found, -truth)


def test_source_carries_queries_from_the_last_segment_to_the_first(load: Load, tmp_path: Path) -> None:
    whole = load("_whole")
    x, y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    models = [torch.nn.Linear(4, 3) for _ in range(3)]

    def batches(which: str, ids: list[int] | None, size: int) -> Iterator[dict[str, torch.Tensor]]:
        for part in torch.tensor(range(2) if ids is None else ids).split(size):
            yield {"x": x[part], "y": y[part]}

    def loss_from_outputs(outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, batch["y"], reduction="sum")

    task = SimpleNamespace(
        n_train=60,
        batches=batches,
        outputs=lambda model, batch: model(batch["x"]),
        loss_from_outputs=loss_from_outputs,
        loss=lambda model, batch: loss_from_outputs(model(batch["x"]), batch),
    )
    states, model = [one.state_dict() for one in models], torch.nn.Linear(4, 3)
    segments = [
        whole.Whole(task, model, "true", str(tmp_path / name), part)
        for name, part in (("a", states[:1]), ("b", states[1:]))
    ]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), models[2].parameters(), strict=True))
    short = whole.source(segments, 1e-6)
    # In no time nothing is preconditioned and nothing forgotten: each segment's plain products, times its time.
    segments[1].query.parameters = None  # asked at the end, and of the first segment too
    time = 0.5e-6 / segments[1].fit.mean_eigenvalue
    plain = sum(segment.score(segments[1].query, method="dot")[0] for segment in segments) * time
    np.testing.assert_allclose(short, plain, rtol=1e-3, atol=1e-5 * float(np.abs(plain).max()))
    assert np.abs(whole.source(segments, 1e3) / short).max() > 1e3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), models[2].parameters(), strict=True))


def test_host_benchmark_times_every_stage(load: Load, run: Run) -> None:
    found = run("host", "--layers", "4", "--repeats", "2", "--compile", "eager")["microseconds"]
    assert set(found) == {"bare tap", "eager", "compiled"}
    assert set(found["eager"]) == set(found["compiled"]) == {"in all", *load("host").STAGES}


def test_index_benchmark_compares_searches_with_scans(run: Run) -> None:
    arguments = "--repeats 2 --rows 60 90 --layers 2 --side 4 --topics 9 --dimensions 8 --candidates 12"
    result = run("index", *arguments.split())
    assert [(one["rows"], one["factory"]) for one in result["measured"]] == [
        (60, "Flat"), (60, "HNSW32"), (90, "Flat"), (90, "HNSW32"),
    ]  # fmt: skip
    for one in result["measured"]:
        assert 0 < one["recall"] <= 1 and one["built"] > 0
        assert set(one["seconds"]) == {"scan 1", "scan 64", "search 1", "search 64"}


def test_low_rank_benchmark_judges_every_dtype(load: Load, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lowrank, _ = load("lowrank"), load("digits_mlp")  # which finds its truth in RESULTS
    monkeypatch.setattr(lowrank, "LOGS", {"digits_mlp": ({"projection": "random", "rank": 64},)})
    monkeypatch.setattr(lowrank, "whole", lambda *_: ())  # the reference takes longer than all the rest
    arguments = "--tasks digits_mlp --dtypes float32 lowrank1"
    rows = run("lowrank", *arguments.split())["tasks"]["digits_mlp"]
    found = {row["method"]: row for row in rows}
    exact, small = found["random 64 float32, dot"], found["random 64 lowrank1, dot"]
    assert small["bytes"] < exact["bytes"] / 40 and abs(small["lds"] - exact["lds"]) < 0.005  # one token a sample


def test_replay_benchmark_answers_both_questions(
    load: Load, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(load("digits_mlp"), "RECIPE", load("digits").Recipe(epochs=1))
    rows = run("replay", *["--roots", "1e-3", "1e-16", "--subsets", "6", "--queries", "3"])["rows"]
    assert [row["eps_root"] for row in rows] == [1e-3, 1e-16] and "3 queries" in capsys.readouterr().out
    assert all(-1 <= value <= 1 for row in rows for value in (*row["itself"].values(), row["truth"]))
    assert rows[0]["itself"]["0.95"] > 0.5  # one epoch with a smooth optimiser is as good as linear


@pytest.mark.parametrize(
    "script, options, name, ratio",
    [
        ("score", "--disk-bytes 6e4 --rest 0", "score_disk", "read / scan, 1 questions"),
        ("lowbit", "--rows 40 --disk-rows 300 --rest 0", "lowbit", "bfloat16, 4 from disk / int1, 4 from disk"),
        ("lowbit", "--rows 40 --disk-rows 300 --rest 0", "lowbit_floats", "int8, 64 / float32, 64"),
    ],
)
def test_scan_benchmarks_state_their_ratios(
    load: Load, run: Run, script: str, options: str, name: str, ratio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script == "lowbit":  # both, whatever processor this is
        monkeypatch.setattr(load(script), "has_integer_products", lambda: name == script)
    here = SimpleNamespace(apply=lambda function, given: function(*given))  # and not in a process of its own
    context = SimpleNamespace(Pool=lambda _: contextlib.nullcontext(here))
    monkeypatch.setattr("multiprocessing.get_context", lambda _: context)
    result = run(script, *["--repeats", "2", "--layers", "2", "--width", "64"], *options.split(), name=name)
    assert ratio in result["ratios"] and all(value["median"] > 0 for value in result["ratios"].values())


@pytest.mark.parametrize("name", ["facts", "labels"])
def test_leaderboard_judges_what_is_not_retrained(
    load: Load, run: Run, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    board = load("leaderboard")
    module = load(name)
    task = module.task()
    few = {"train": {k: v[:60] for k, v in task.train.items()}, "queries": {k: v[:4] for k, v in task.queries.items()}}
    if name == "facts":
        few["relevant"] = [[i, 2 * i + 5] for i in range(4)]
    else:
        few |= {"flipped": np.arange(60) % 5 == 0, "labels": tuple(np.asarray(v["y"]) for v in few.values())}
    few["texts"] = task.texts[0][:60], task.texts[1][:4]
    small = dataclasses.replace(task, **few)
    monkeypatch.setattr(board, "truth", lambda name: small)
    monkeypatch.setattr(type(small), "models", lambda self, count: [module.build()])
    options = ["--rows", "random 16", "whitened 0.01 84 (down_proj)", "--tune", "--no-refine", "--fast"]
    result = run("leaderboard", "--task", name, *options, name=f"leaderboard_{name}")
    rows = {row["method"]: row for row in result["rows"]}
    assert ("whitened 0.01 84 (down_proj), dot" in rows) == (name == "facts")
    assert ("random 16, dot, on itself" in rows) == ("control: loss" in rows) == (name == "labels")
    assert all(0 <= row["low"] <= row["lds"] <= row["high"] <= 1 for row in rows.values())
    assert {"facts": "MRR", "labels": "AUC"}[name] in capsys.readouterr().out
