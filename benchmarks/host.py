"""The host's time for a watched layer: what logging adds where products cost nothing, in microseconds.

Small batches on a GPU, and small models, wait for Python. A stack of narrow linear layers, two samples of a few tokens,
one thread: passes that log less passes outside of a block, over the number of layers, in eager mode by stage and
compiled. The floor is a bare tap of the same kind: a hook that projects the input, an autograd function that projects
the output gradient, and one batched product for all layers; it checks nothing and writes nothing.
"""

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Parser, alternate, finish, setting, silent, write
from torch import Tensor, nn
from torch.nn import functional as F

import loghook

WIDTH, RANK, SAMPLES, TOKENS = 64, 8, 2, 8
STAGES = ("entering the block", "forward", "backward", "leaving the block")


class Part(nn.Module):
    """Four layers, three of which read the same input, as those of attention do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(self.q(x) + self.k(x) + self.v(x))


class BareTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, matrix: Tensor, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.save_for_backward(x, matrix)
        ctx.kept = kept
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, matrix = ctx.saved_tensors
        ctx.kept.append((F.linear(grads[0], matrix), x))
        return grads[0], None, None, None


def stack(layers: int, device: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    with torch.device(device):
        x = torch.randn(SAMPLES, TOKENS, WIDTH, requires_grad=True)
        return nn.Sequential(*(Part() for _ in range(layers // 4))), x


def bare(layers: int, device: str) -> Callable[[], None]:
    (model, x), matrix = stack(layers, device), torch.randn(RANK, WIDTH, device=device)
    kept: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Any:
        with torch.no_grad():
            projected = F.linear(args[0], matrix)
        return BareTap.apply(y, projected, matrix, kept)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(hook)

    def step() -> None:
        model(x).sum().backward()
        g, inputs = (torch.stack(sides) for sides in zip(*kept, strict=True))
        torch.matmul(g.mT, inputs)
        kept.clear()
        finish()

    return step


def logged(
    layers: int, device: str, folder: Path, backend: str | None = None
) -> tuple[Callable[[], list[float]], loghook.Run]:
    """A step that logs, and returns the seconds of its stages."""
    model, x = stack(layers, device)
    run = loghook.init(tempfile.mkdtemp(dir=folder), overwrite=True, rank=RANK, on_repeat="all")
    with silent():
        run.watch(model)
    called = torch.compile(model, backend=backend) if backend else model

    def step() -> list[float]:
        times = [time.perf_counter()]
        with run(data_id=list(range(SAMPLES))):
            times.append(time.perf_counter())
            loss = called(x).sum()
            times.append(time.perf_counter())
            loss.backward()
            times.append(time.perf_counter())
        times.append(time.perf_counter())
        finish()
        return [b - a for a, b in itertools.pairwise(times)]

    return step, run


def plain(layers: int, device: str, backend: str | None = None) -> Callable[[], list[float]]:
    model, x = stack(layers, device)
    called = torch.compile(model, backend=backend) if backend else model

    def step() -> list[float]:
        times = [time.perf_counter()]
        loss = called(x).sum()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        finish()
        return [0.0, times[1] - times[0], times[2] - times[1], 0.0]

    return step


def main() -> None:
    made = Parser(__doc__)
    made.add_argument("--repeats", type=int, default=200, help="turns, of which medians are reported")
    made.add_argument("--layers", type=int, default=128)
    made.add_argument("--device", default="cpu")
    made.add_argument("--compile", default="inductor", help="backend of torch.compile, or none")
    a = made.start()
    backends = {"eager": None} | ({} if a.compile == "none" else {"compiled": a.compile})
    stages: dict[str, list[list[float]]] = {}
    cases: dict[str, Callable[[], Any]] = {"bare tap": bare(a.layers, a.device)}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as runs:
        for how, backend in backends.items():
            log, run = logged(a.layers, a.device, Path(folder), backend)
            runs.callback(run.finalize)
            for name, step in ((how, log), (f"plain, {how}", plain(a.layers, a.device, backend))):
                stages[name] = []
                cases[name] = lambda step=step, times=stages[name]: times.append(step())
        times = alternate(cases, a.repeats)

    def added(over: Sequence[float], under: Sequence[float]) -> float:
        return 1e6 * statistics.median(x - y for x, y in zip(over, under, strict=True)) / a.layers

    found = {"bare tap": {"in all": added(times["bare tap"], times["plain, eager"])}}
    for how in backends:
        by_stage = zip(STAGES, zip(*stages[how], strict=True), zip(*stages[f"plain, {how}"], strict=True), strict=True)
        found[how] = {"in all": added(times[how], times[f"plain, {how}"])}
        found[how] |= {stage: added(over, under) for stage, over, under in by_stage}
    print("microseconds for a watched layer")
    for how, parts in found.items():
        print(f"  {how:<9}" + "".join(f"  {name} {value:.1f}" for name, value in parts.items()))
    if a.save:
        about = setting(a, "layers", "device", "compile", "repeats")
        write("host" if a.device == "cpu" else f"host_{a.device}", {"setting": about, "microseconds": found})


if __name__ == "__main__":
    main()
