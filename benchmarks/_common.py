"""What the benchmark scripts share: a model, alternating timings, the machine's name, JSON."""

import argparse
import contextlib
import importlib
import io
import json
import math
import operator
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}  # bytes
sys.path.append(str(Path(__file__).parent / "truths"))


def truth(name: str) -> Any:
    """A shipped ground truth: the `Task` of a script in truths/."""
    return importlib.import_module(name).task()


def llama(hidden: int, layers: int, vocabulary: int = 4096) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=int(hidden * 8 / 3) // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config)


def summed_loss(model: torch.nn.Module, tokens_BS: Tensor) -> Tensor:
    logits = model(input_ids=tokens_BS).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens_BS[:, 1:].flatten(), reduction="sum")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def alternate(
    cases: dict[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    rest: float = 0.0,
) -> dict[str, list[float]]:
    """Time the cases in turn, so that a busy moment of the machine hits all of them; seconds for each call.

    ``rest``: seconds before each, since the rate of a rented disk depends on what was read just before.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():  # warm-up
        case()
    for turn in range(repeats):
        order = list(cases) if turn % 2 == 0 else list(reversed(cases))
        for name in order:
            time.sleep(rest)
            start = clock()
            cases[name]()
            times[name].append(clock() - start)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median_high(values) for name, values in times.items()}


def ratio(times: dict[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Median and quartiles of the ratios within each turn, and the ratio of the fastest turns.

    What others do on the machine only ever adds to a time, so that the fastest turns are the least disturbed ones.
    """
    values = sorted(a / b for a, b in zip(times[over], times[under], strict=True))
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {
        "median": statistics.median(values),
        "low": low,
        "high": high,
        "fastest": min(times[over]) / min(times[under]),
    }


def finish() -> None:
    """Wait for what the GPU, if there is one, has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Peak:
    """The most memory that this process has held since it was made; without one, since it began. Linux keeps count."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def bytes(what: str = "VmHWM") -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0])

    @property
    def mb(self) -> float:
        return self.bytes() / 2**20


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    vectors = torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu, "vectors": vectors, "threads": torch.get_num_threads(), "gpu": gpu, "torch": torch.__version__}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    """A script's command line: what all have, and for those that time something what these have."""

    def __init__(self, description: str | None, *, timed: bool = False, threads: int = 1) -> None:
        super().__init__(description=description, formatter_class=Help)
        self.add_argument("--threads", type=int, default=threads, help="of torch")
        self.add_argument("--save", action="store_true", help="write the JSON to benchmarks/results/")
        if timed:
            self.add_argument("--repeats", type=int, default=9, help="turns; the medians of the ratios are reported")
            self.add_argument("--require", action="store_true", help="end with status 1 if a target is missed")

    def start(self) -> argparse.Namespace:
        """Read the arguments, and let torch have its threads."""
        arguments = self.parse_args()
        torch.set_num_threads(arguments.threads)
        return arguments


def keep_memory() -> None:
    """Start the script anew, and with it all that it starts, with glibc told to keep what is freed.

    Else it gives the end of its heap back to the system in each step, and asks for it again in the next.
    """
    if not os.environ.items() >= KEEP.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)


def setting(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def write(name: str, result: dict[str, Any]) -> None:
    """Write a benchmark's result as JSON, with the machine that gave it; what is no number, as null."""
    RESULTS.mkdir(exist_ok=True)
    result = _numbers({"benchmark": name, "machine": machine()} | result)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"  written to {RESULTS.name}/{name}.json")


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def written(name: str) -> dict[str, Any]:
    """A result as it was written the last time, or nothing."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def report(
    name: str, result: dict[str, Any], arguments: argparse.Namespace, targets: dict[str, tuple[float, str]]
) -> None:
    """Print a table of ratios beside their targets; write JSON; end with status 1 if --require was missed."""
    here = machine()
    print(f"\n{name} on {here['cpu']} ({here['vectors']}), {here['threads']} threads, torch {here['torch']}")
    for key, value in result["ratios"].items():
        shown = f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
        if "fastest" in value:
            shown += f"   fastest {value['fastest']:.3f}"
        if key in result.get("arithmetic", {}):
            shown += f"   operations {result['arithmetic'][key]:.3f}"
        goal = f"   target {targets[key][1]} {targets[key][0]}" if key in targets else ""
        print(f"  {key:<58} {shown}{goal}")
    if arguments.save:
        write(name, result)
    medians = {key: result["ratios"][key]["median"] for key in targets if key in result["ratios"]}
    holds = {"<=": operator.le, ">=": operator.ge}
    missed = [key for key, median in medians.items() if not holds[targets[key][1]](median, targets[key][0])]
    if missed:
        print("  missed: " + "; ".join(missed), file=sys.stderr)
        if arguments.require:
            raise SystemExit(1)
