"""What the documentation shows runs: the README's code and commands, the adapters page, the examples."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import loghook
from loghook.capture import adapters
from loghook.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def summed_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def make_batch(ids: list[int]) -> dict:
    mask = torch.ones(len(ids), 12, dtype=torch.long)
    mask[0, 8:] = 0
    return {"id": ids, "input_ids": torch.randint(100, (len(ids), 12)), "attention_mask": mask}


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, max_position_embeddings=12, **sizes)).eval()
    loader = [make_batch(list(range(4 * i, 4 * i + 4))) for i in range(3)]
    names = {"model": model, "loader": loader, "summed_loss": summed_loss, "question": make_batch([0])}
    ten_lines, check, ask, attach, tune, whole = blocks(README, "python")
    assert len([line for line in ten_lines.splitlines() if line.strip()]) <= 10
    exec(ten_lines, names)
    assert names["run"].layers and len(loghook.load("runs/mine")) == 12
    names["batch"] = loader[0]
    capsys.readouterr()
    exec(check, names)
    assert "all rows are exact" in capsys.readouterr().out
    exec(ask, names)
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert names["scores"].values.shape == (1, 12) and len(names["unusual"]) == 12
    names["run"].close()
    exec(attach, names)
    names |= {key: lambda: [(batch["id"], batch) for batch in loader] for key in ("samples", "queries")}
    capsys.readouterr()
    exec(tune, names)
    assert "<-- chosen" in capsys.readouterr().out
    names["batches_of"] = lambda ids: [(batch["id"], batch) for batch in loader]
    exec(whole, names)
    assert names["scores"].values.shape == (1, 12) and names["best"].top(1)[0][0].data_id in range(12)
    commands = [line.split("#")[0] for block in blocks(README, "sh") for line in block.splitlines()]
    commands = [shlex.split(c) for c in commands if c.startswith("loghook ") and not c.startswith("loghook demo")]
    assert [command[1] for command in commands] == ["info", "verify", "score", "report"]
    lines = [json.dumps({"id": data_id, "text": str(data_id)}) for data_id in loghook.load("runs/mine").data_ids]
    Path("train.jsonl").write_text("\n".join(lines))
    for command in commands:
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, result.output


def test_commands_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks(README, "sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    lines = [line for block in blocks(README, "sh") for line in block.splitlines() if line.startswith("loghook demo")]
    options = set(re.findall(r"--[\w-]+", " ".join(lines)))
    result = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0 and options and all(option in result.output for option in options), result.output


def test_links() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


class Block(nn.Module):
    def __init__(self, eps: float | None) -> None:
        super().__init__()
        self.up_proj, self.norm, self.down_proj = nn.Linear(5, 8), nn.RMSNorm(8, eps=eps), nn.Linear(8, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.tanh(self.norm(self.up_proj(x))))


@pytest.mark.parametrize("eps", [None, 0.1])
def test_adapters_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eps: float | None) -> None:
    monkeypatch.setattr(adapters, "_REGISTRY", dict(adapters._REGISTRY))  # what the page registers ends with the test
    torch.manual_seed(0)
    model, x = Block(eps).double(), torch.randn(4, 6, 5, dtype=torch.float64)
    define, watch = blocks((ROOT / "docs" / "adapters.md").read_text(), "python")
    exec(define, {})

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).pow(3).sum()

    run = loghook.init(tmp_path / "run", rank=8, projection="none", dtype="float64")
    exec(watch, {"run": run, "model": model})
    assert run.layers == ("up_proj", "norm", "down_proj")
    with run(data_id=[0, 1, 2, 3]):
        loss_fn(model, x).backward()
    run.finalize()
    log = loghook.load(tmp_path / "run")
    alone = [torch.autograd.grad(loss_fn(model, x[i : i + 1]), model.norm.weight)[0] for i in range(4)]
    rows = torch.from_numpy(log.rows("norm")[:].copy())
    torch.testing.assert_close(rows, torch.stack(alone)[:, :, None], rtol=1e-9, atol=1e-12)

    # Projected, and through the statistics.
    report = loghook.check(model, loss_fn, x, include=["*proj", "*norm"], rank=3)
    assert report and report.errors["norm"] < 1e-9
    with run.query(data_id=["q"]) as query:
        loss_fn(model, x[:1]).backward()
    for method in ("kfac", "ekfac", "fisher"):
        values = log.influence(query, method, layers=["norm"]).values
        assert values[0, 0] > 0 and torch.isfinite(torch.from_numpy(values)).all()
    run.close()


def example(tmp_path: Path, name: str, *arguments: str, processes: int = 1) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher * (processes > 1), str(ROOT / "examples" / name)]
    command += ["--out", str(tmp_path / "run"), *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_run() -> None:
    mine = Path(__file__).read_text()
    for file in (ROOT / "examples").glob("*.py"):
        assert f'"{file.name}"' in mine, f"no test runs {file.name}"


def test_finetune_causal_lm(tmp_path: Path) -> None:
    output = example(tmp_path, "finetune_causal_lm.py", "--steps", "4", "--passages", "48")
    lines = output[output.index("proponents") :].splitlines()
    assert len([line for line in lines if re.match(r"\s+[+-]\d", line)]) == 7


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_loop(tmp_path: Path, processes: int) -> None:
    output = example(tmp_path, "accelerate_loop.py", "--steps", "6", processes=processes)
    assert len(re.findall(r"^\s*[+-]\d+\.\d\d  ", output, re.MULTILINE)) == 5
    assert len(loghook.load(tmp_path / "run")) == 48


@pytest.mark.parametrize("processes", [1, 2])
def test_trainer(tmp_path: Path, processes: int) -> None:
    output = example(tmp_path, "trainer.py", "--steps", "3", processes=processes)
    assert len(re.findall(r"^\s*[+-]\d+\.\d\d  ", output, re.MULTILINE)) == 5
    assert len(loghook.load(tmp_path / "run")) == 48


def test_mislabelled_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = example(tmp_path, "mislabelled_digits.py")
    found = {name: float(value) for name, value in re.findall(r"^(.+?) +AUC ([\d.]+)", output, re.MULTILINE)}
    assert found["self-influence, ekfac"] > 0.95, output


def checkpoints_of_a_training(folder: Path) -> tuple[dict, list[tuple[Path, float]]]:
    """Names that the methods page's code takes, and a checkpoint of each of two moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    batch = {"id": [0, 1, 2], "x": torch.randn(3, 5)}
    names = {"model": model, "optimizer": optimizer, "loader": [batch], "question": {"x": torch.randn(1, 5)}}
    names |= {"torch": torch, "loghook": loghook, "summed_loss": lambda model, batch: model(batch["x"]).square().sum()}
    files = [(folder / f"step{i}.pt", rate) for i, rate in enumerate((0.1, 0.02))]
    for file, _ in files:
        names["summed_loss"](model, batch).backward()
        optimizer.step()
        torch.save(model.state_dict(), file)
    return names, files


def test_methods_of_the_methods_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names, files = checkpoints_of_a_training(tmp_path)
    tracin, trackstar, source = (
        code.replace("rank=64", "rank=2") for code in blocks((ROOT / "docs" / "methods.md").read_text(), "python")
    )
    exec(tracin, names | {"checkpoints": files}, names)
    expected = 0.1 * names["parts"][0].values + 0.02 * names["parts"][1].values
    torch.testing.assert_close(torch.from_numpy(names["tracin"].values), torch.from_numpy(expected))
    exec(trackstar, names)
    assert names["trackstar"].method == "fisher (normalized)" and names["trackstar"].normalize == "unit"
    assert abs(names["trackstar"].values).max() <= 1 + 1e-6
    names |= {"groups": [[file] for file, _ in files], "times": (0.1, 0.02)}
    names |= {"load": lambda model, file: model.load_state_dict(torch.load(file))}
    names |= {"loss_with_labels_of": lambda current, model, batch: names["summed_loss"](model, batch)}
    exec(source, names)
    assert names["source"].values.shape == (1, 3) and names["source"].method.startswith("ensemble of 2: source")


def test_replay_of_the_evaluate_page() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    batches = [{"id": [2 * i, 2 * i + 1], "x": torch.randn(2, 5), "y": torch.tensor([0, 2])} for i in range(3)]
    names = {"model": model, "F": F, "batches": batches, "questions": batches[0]}
    exec(blocks((ROOT / "docs" / "evaluate.md").read_text(), "python")[0], names)
    assert names["scores"].values.shape == (2, 6) and names["scores"].data_ids == list(range(6))
    assert names["training"].run({1: 0.0})["weight"].shape == (3, 5)


def test_no_page_has_a_gap() -> None:
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.findall(r"\b[A-Z]+_NUMBERS\b|\bTODO\b|\bXXX\b", page.read_text()), page.name


def test_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's loop survives a restart from an older checkpoint; its functions are what tune and rerank call."""
    training, functions = blocks((ROOT / "docs" / "running.md").read_text(), "python")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100))

    def loss(logits: torch.Tensor, batch: dict) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum")

    names = {
        "loghook": loghook, "model": model, "epochs": 3, "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": [make_batch([0, 1]), make_batch([2, 3])], "output_loss": loss,
        "summed_loss": lambda model, batch: loss(model(batch["input_ids"]), batch),
        "outputs": lambda batch: model(batch["input_ids"]),
    }  # fmt: skip
    broken = training.replace("run.finalize()", "run.close()").replace("first_epoch, epochs", "first_epoch, 2")
    exec(broken, names | {"first_epoch": 0})
    exec(training, names | {"first_epoch": 1})  # the second epoch is done again
    assert loghook.load("runs/training").data_ids == [f"{e}/{i}" for e in range(3) for i in range(4)]

    names["whole"] = whole = loghook.fit("runs/factors")
    whole.watch(model)
    for _ in whole.passes():
        for batch in names["loader"]:
            with whole(data_id=batch["id"]):
                names["summed_loss"](model, batch).backward()
    with whole.query(data_id=["p", "q"]) as names["query"]:
        names["summed_loss"](model, names["loader"][0]).backward()
    names |= {"dataset": list(range(4)), "collate": make_batch}
    exec(functions, names)
    assert [ids for ids, _ in names["samples"]()] == [[0, 1], [2, 3]]
    assert [batch["id"] for _, batch in names["batches_of"]([3, 1])] == [[3, 1]]
    assert names["u"].direction
