"""What we hand to a peer's program, and what comes back. Used on both sides; imports nothing of loghook or a peer.

An exchange folder holds

- ``model.json``: ``{"kind": "mlp", "config": [64, 128, 10]}`` (widths of a Linear/ReLU stack) or
  ``{"kind": "llama", "config": {...}}`` (a LlamaConfig);
- ``model.safetensors``: its state dict, float32;
- ``data.safetensors``: ``train.x`` (N, features) float32 and ``train.y`` (N,) int64, or ``train.input_ids`` and
  ``train.labels`` (N, T) int64 (-100: no loss; ``labels[:, t]`` is the target of position t - 1), the same for
  ``query.`` (Q, ...), and, if the Fisher matrix is not to be the empirical one, ``fisher``: the labels to fit it
  with, of the training labels' shape, so that two programs fit theirs to the same sample.

Sequences are of one length and without padding. The loss is everywhere the sum of cross-entropies over labels.

A program is called as ``python -m peers.NAME FOLDER OUT OPTIONS`` (OPTIONS as JSON, see `Options`) and writes
``OUT.safetensors`` with ``scores`` (Q, N), positive for proponents, and ``OUT.json`` with its costs.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import Peak, finish
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

Batch = dict[str, Tensor]


class Rows(Dataset):
    """Columns as the data set that peers ask for."""

    def __init__(self, columns: Batch) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i: int | slice | Tensor) -> Batch:
        return {name: values[i] for name, values in self.columns.items()}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compute.

    method: a name that the program knows; "log" times the logging of the training rows alone.
    damping: relative to the mean eigenvalue of each layer, or absolute.
    rank: of the projection on each side; 0 for whole gradients.
    repeats: 0 runs once. Otherwise the work is done once to warm up and then so many times, each timed.
    device, dtype: where the model computes, and in what; data stay on the CPU and are brought batch by batch.
    """

    method: str
    damping: float = 0.1
    absolute: bool = False
    rank: int = 0
    batch: int = 8
    query_batch: int = 8
    threads: int = 1
    repeats: int = 0
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Exchange:
    kind: str
    model: nn.Module
    train: Batch
    query: Batch
    fisher: Tensor | None

    @property
    def label(self) -> str:
        return "y" if self.kind == "mlp" else "labels"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropies of a batch, summed."""
        device = next(model.parameters()).device
        batch = {name: values.to(device) for name, values in batch.items()}
        if self.kind == "mlp":
            return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")

    def fisher_data(self) -> Batch:
        """Return the training data with the labels that the Fisher matrix is fitted with."""
        return self.train if self.fisher is None else self.train | {self.label: self.fisher}


class Costs:
    """What a piece of work took: seconds for each stage, and of the processor in all threads; memory, bytes kept."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.facts: dict[str, Any] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        finish()
        start, cpu = time.perf_counter(), time.process_time()
        yield
        finish()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu


Work = Callable[[Exchange, Options, Costs, Path], Tensor | None]


def write(folder: Path, model: nn.Module, train: Batch, query: Batch, fisher: Tensor | None = None) -> None:
    """Write an exchange folder. `model` is an nn.Sequential of Linear and ReLU, or a LlamaForCausalLM."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, nn.Sequential):
        linears = [layer for layer in model if isinstance(layer, nn.Linear)]
        about = {"kind": "mlp", "config": [linears[0].in_features, *(layer.out_features for layer in linears)]}
    else:
        about = {"kind": "llama", "config": model.config.to_dict()}
    (folder / "model.json").write_text(json.dumps(about))
    save_model(model, str(folder / "model.safetensors"))
    data = {f"train.{key}": value for key, value in train.items()}
    data |= {f"query.{key}": value for key, value in query.items()}
    if fisher is not None:
        data["fisher"] = fisher
    save_file({key: value.contiguous() for key, value in data.items()}, folder / "data.safetensors")


def read(folder: Path, device: str = "cpu", dtype: str = "float32") -> Exchange:
    about = json.loads((folder / "model.json").read_text())
    model: nn.Module
    if about["kind"] == "mlp":
        widths = about["config"]
        layers: list[nn.Module] = []
        for k_in, k_out in itertools.pairwise(widths):
            layers += [nn.Linear(k_in, k_out), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
    else:
        from transformers import AutoModelForCausalLM, LlamaConfig

        with torch.device(device):  # rotary frequencies stay in float32
            model = AutoModelForCausalLM.from_config(LlamaConfig(**about["config"]), dtype=getattr(torch, dtype))
    model.to(device)
    load_model(model, str(folder / "model.safetensors"), device=device)
    data = load_file(folder / "data.safetensors")
    sides: dict[str, Batch] = {"train": {}, "query": {}}
    for name in data.keys() - {"fisher"}:
        side, key = name.split(".")
        sides[side][key] = data[name]
    return Exchange(about["kind"], model.eval(), sides["train"], sides["query"], data.get("fisher"))


def linears(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that count: all of an MLP, all but the head of a language model."""
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]


def size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(work: Work) -> None:
    """Run a peer's program: read the exchange, do the work, write scores and costs."""
    folder, out, options = Path(sys.argv[1]), Path(sys.argv[2]), Options(**json.loads(sys.argv[3]))
    torch.set_num_threads(options.threads)
    scores, turns = None, []
    for turn in range(options.repeats + 1):
        torch.manual_seed(options.seed)
        exchange, costs = read(folder, options.device, options.dtype), Costs()
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            peak, before = Peak(), Peak.bytes("VmRSS") / 2**20
            if options.device != "cpu":
                torch.cuda.reset_peak_memory_stats(options.device)
            scores = work(exchange, options, costs, Path(scratch))
        costs.facts |= {"peak_mb": peak.mb, "before_mb": before}
        if options.device != "cpu":
            costs.facts["gpu_peak_mb"] = torch.cuda.max_memory_allocated(options.device) / 2**20
        if turn or not options.repeats:
            turns.append(costs)
    stages = {name: [turn.seconds[name] for turn in turns] for name in turns[0].seconds}
    if scores is not None:
        save_file({"scores": scores.float().contiguous()}, out.with_suffix(".safetensors"))
    cpu = {name: [turn.cpu[name] for turn in turns] for name in turns[0].cpu}
    about = {"options": dataclasses.asdict(options), "seconds": stages, "cpu_seconds": cpu} | turns[-1].facts
    out.with_suffix(".json").write_text(json.dumps(about))
