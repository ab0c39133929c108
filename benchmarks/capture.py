"""What logging costs: passes that log over the same passes frozen without hooks, and over training steps.

The floor is the frozen pass: forward, and backward to the inputs only (the embeddings' output requires grad, so that
there is something to differentiate), on a model that never had a hook. Each case has a model of its own, all alternate
in one process, and peak memory is read in a process for each case. Beside each ratio to the floor stands that of the
operations (multiplications and additions of matrix products), below which only a more efficient product could go.

On a machine that others use, `--threads 1 --clock cpu` counts the processor time of all threads, the writer's too.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _common import Parser, Peak, alternate, keep_memory, llama, medians, ratio, report, setting, silent, summed_loss
from torch.utils.flop_counter import FlopCounterMode

import loghook

Case = Callable[[], None]
NARROW, WIDE = 512, 1024


class Bench:
    """Makes the cases: what runs on a model of its own, for data of one shape."""

    def __init__(self, layers: int, batch: int, tokens: int, backend: str, folder: Path) -> None:
        self.layers, self.backend, self.folder = layers, backend, folder
        self.ids = list(range(batch))
        self.runs: list[loghook.Run] = []
        self.data = torch.randint(0, 4096, (batch, tokens), generator=torch.Generator().manual_seed(0))

    def floor(self, hidden: int, compiled: bool = False) -> Case:
        model = llama(hidden, self.layers)
        model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_())
        called = torch.compile(model, backend=self.backend) if compiled else model

        def case() -> None:
            with loghook.frozen(model):
                summed_loss(called, self.data).backward()

        return case

    def log(self, hidden: int, rank: int = 32, *, compiled: bool = False, whitened: bool = False, **init: str) -> Case:
        model = llama(hidden, self.layers)
        if whitened:
            init |= {"projection": "whitened", "fitted": self.fitted(hidden, rank)}
        run = self.init(model, rank=rank, **init)
        called = torch.compile(model, backend=self.backend) if compiled else model

        def case() -> None:
            with loghook.frozen(model), run(data_id=self.ids):
                summed_loss(called, self.data).backward()

        return case

    def train(self, hidden: int, log: bool) -> Case:
        model = llama(hidden, self.layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        run = self.init(model, rank=32) if log else None

        def case() -> None:
            with run(data_id=self.ids) if run else contextlib.nullcontext():
                summed_loss(model, self.data).backward()
            optimizer.step()
            optimizer.zero_grad()

        return case

    def init(self, model: torch.nn.Module, **init: Any) -> loghook.Run:
        run = loghook.init(tempfile.mkdtemp(dir=self.folder), overwrite=True, **init)
        optimizer = self.stepped(model) if "gradient" in init else None
        with silent():
            run.watch(model, optimizer=optimizer)
        self.runs.append(run)
        return run

    def stepped(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """An optimizer that has moments."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        summed_loss(model, self.data).backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def fitted(self, hidden: int, rank: int) -> str:
        """Path of a whitened projection, fitted in one covariance pass."""
        path = self.folder / f"whitened-{hidden}-{rank}"
        if not path.exists():
            model = llama(hidden, self.layers)
            run = loghook.init(path, rank=rank, projection="whitened")
            with silent():
                run.watch(model)
            with loghook.frozen(model):
                for _ in run.passes():
                    with run(data_id=self.ids):
                        summed_loss(model, self.data).backward()
            run.finalize()
        return str(path)

    def close(self) -> None:
        """End the runs before their folder goes."""
        for run in self.runs:
            run.finalize()

    def cases(self) -> dict[str, Callable[[], Case]]:
        made: dict[str, Callable[[], Case]] = {
            "frozen": lambda: self.floor(NARROW),
            "train": lambda: self.train(NARROW, log=False),
            "log": lambda: self.log(NARROW),
            "log, rank 64": lambda: self.log(NARROW, 64),
            "train and log": lambda: self.train(NARROW, log=True),
            "log whitened": lambda: self.log(NARROW, whitened=True),
            "log int8": lambda: self.log(NARROW, dtype="int8"),
            "log whitened int1": lambda: self.log(NARROW, whitened=True, dtype="int1"),
            "log normalized": lambda: self.log(NARROW, gradient="normalized"),
            "log adam": lambda: self.log(NARROW, gradient="adam"),
            "frozen, wide": lambda: self.floor(WIDE),
            "log, wide": lambda: self.log(WIDE),
        }
        if self.backend != "none":
            made["frozen, compiled"] = lambda: self.floor(NARROW, compiled=True)
            made["log, compiled"] = lambda: self.log(NARROW, compiled=True)
        return made


# ratio: (case, case it is divided by, target or None)
RATIOS = {
    "log-only / frozen, hidden 512, rank 32": ("log", "frozen", 1.05),
    "log-only / frozen, hidden 512, rank 64": ("log, rank 64", "frozen", 1.08),
    "log-only / frozen, hidden 1024, rank 32": ("log, wide", "frozen, wide", 1.02),
    "log-only / training step": ("log", "train", None),
    "training with logging / training": ("train and log", "train", 1.04),
    "whitened / random float32 rows": ("log whitened", "log", 1.03),
    "int8 / random float32 rows": ("log int8", "log", 1.03),
    "whitened int1 / random float32 rows": ("log whitened int1", "log", 1.03),
    "rows of gradient='normalized' / random float32 rows": ("log normalized", "log", None),
    "rows of gradient='adam' / random float32 rows": ("log adam", "log", None),
    "compiled: log-only / frozen": ("log, compiled", "frozen, compiled", None),
}
COMPILED = "overhead compiled / overhead eager"
MEMORY = "peak memory, log-only / frozen, hidden 1024"


def operations(case: Case) -> int:
    """Operations of the matrix products of one call."""
    # The counter knows no products of oneDNN.
    with patch("loghook.project.linear._onednn", lambda: None), FlopCounterMode(display=False) as counter:
        case()
    return counter.get_total_flops()


def peak_memory(arguments: list[str], case: str) -> float:
    """Bytes at the peak of one case, in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--peak", case]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    made = Parser(__doc__, timed=True, threads=2)
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--tokens", type=int, default=128)
    made.add_argument("--compile", default="inductor", help="backend of torch.compile, or none")
    made.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    made.add_argument("--peak", help="run one case a few times and print its peak memory in bytes")
    made.add_argument("--no-memory", action="store_true")
    made.add_argument("--keep-memory", action="store_true", help="let glibc keep what is freed, in all processes")
    a = made.start()
    if a.keep_memory:
        keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(a.layers, a.batch, a.tokens, a.compile, Path(folder))
        if a.peak:
            case = bench.cases()[a.peak]()
            peak = Peak()  # without that of building the model
            for _ in range(3):
                case()
            bench.close()
            print(peak.bytes())
            return
        runs = {name: make() for name, make in bench.cases().items()}
        counts = {name: operations(case) for name, case in runs.items() if "compiled" not in name}
        times = alternate(runs, a.repeats, time.process_time if a.clock == "cpu" else time.perf_counter)
        bench.close()
    ratios = {name: ratio(times, over, under) for name, (over, under, _) in RATIOS.items() if over in times}
    targets = {name: (goal, "<=") for name, (_, _, goal) in RATIOS.items() if goal}
    if a.compile != "none":
        times["eager"], times["compiled"] = (
            [x / y for x, y in zip(times[f"log{kind}"], times[f"frozen{kind}"], strict=True)]
            for kind in ("", ", compiled")
        )
        ratios[COMPILED] = ratio(times, "compiled", "eager")
        targets[COMPILED] = (1.0, "<=")
        del times["eager"], times["compiled"]
    if not a.no_memory:
        shape = [f"--{key}={value}" for key, value in setting(a, "layers", "batch", "tokens", "threads").items()]
        logged, frozen = (peak_memory(shape, case) for case in ("log, wide", "frozen, wide"))
        ratios[MEMORY] = dict.fromkeys(("median", "low", "high", "fastest"), logged / frozen)
        targets[MEMORY] = (1.10, "<=")
    arithmetic = {
        name: counts[over] / counts[under] for name, (over, under, _) in RATIOS.items() if over in counts
    }  # of the products alone
    report(
        f"capture_{a.batch * a.tokens}_tokens" + "_kept" * a.keep_memory + "_cpu" * (a.clock == "cpu"),
        {
            "setting": setting(a, "layers", "batch", "tokens", "compile", "clock", "keep_memory", "repeats"),
            "seconds": medians(times),
            "operations": counts,
            "arithmetic": arithmetic,
            "ratios": ratios,
        },
        a,
        targets,
    )


if __name__ == "__main__":
    main()
