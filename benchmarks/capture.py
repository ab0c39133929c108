"""What logging costs: a log-only pass over the same pass frozen without hooks, and over a training step.

The floor is the frozen pass: forward, and backward to the inputs only (the embeddings' output requires grad, so that
there is something to differentiate). Timings alternate in one process; peak memory is read in a process for each case.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _common import alternate, llama, parser, ratio, report, summed_loss

import loghook


def cases(hidden: int, layers: int, rank: int, batch: int, tokens: int, folder: str) -> dict[str, Callable[[], None]]:
    model = llama(hidden, layers)
    data = torch.randint(0, 4096, (batch, tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    run = loghook.init(f"{folder}/log", rank=rank, overwrite=True)
    run.watch(model)
    ids = list(range(batch))
    embeddings = model.get_input_embeddings()

    def train(log: bool) -> None:
        if log:
            with run(data_id=ids):
                summed_loss(model, data).backward()
        else:
            summed_loss(model, data).backward()
        optimizer.step()
        optimizer.zero_grad()

    def floor() -> None:
        with loghook.frozen(model):
            handle = embeddings.register_forward_hook(lambda m, a, y: y.requires_grad_())
            summed_loss(model, data).backward()
            handle.remove()

    def log_only() -> None:
        with loghook.frozen(model), run(data_id=ids):
            summed_loss(model, data).backward()

    return {
        "frozen": floor,
        "log-only": log_only,
        "train": lambda: train(False),
        "train and log": lambda: train(True),
    }


def peak_memory(arguments: list[str], case: str) -> float:
    """Bytes at the peak of one case, in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--peak", case]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--hidden", type=int, default=1024)
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--rank", type=int, default=32)
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--tokens", type=int, default=128)
    made.add_argument("--peak", help="run one case a few times and print its peak memory in bytes")
    made.add_argument("--no-memory", action="store_true")
    a = made.parse_args()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as folder:
        runs = cases(a.hidden, a.layers, a.rank, a.batch, a.tokens, folder)
        if a.peak:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
            for _ in range(3):
                runs[a.peak]()
            status = Path("/proc/self/status").read_text()
            print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))
            return
        times = alternate(runs, a.repeats)
    ratios = {
        "log-only / frozen": ratio(times, "log-only", "frozen"),
        "log-only / training step": ratio(times, "log-only", "train"),
        "training with logging / training": ratio(times, "train and log", "train"),
    }
    if not a.no_memory:
        shape = [f"--{key}={getattr(a, key)}" for key in ("hidden", "layers", "rank", "batch", "tokens", "threads")]
        logged, frozen = peak_memory(shape, "log-only"), peak_memory(shape, "frozen")
        ratios["peak memory, log-only / frozen"] = {key: logged / frozen for key in ("median", "low", "high")}
    targets = {
        "log-only / frozen": (1.10, "<="),
        "log-only / training step": (0.75, "<="),
        "peak memory, log-only / frozen": (1.15, "<="),
    }
    seconds = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    setting = {key: getattr(a, key) for key in ("hidden", "layers", "rank", "batch", "tokens")}
    report(
        "capture",
        {"setting": setting, "seconds": seconds, "ratios": ratios},
        save=a.save,
        targets=targets,
        require=a.require,
    )


if __name__ == "__main__":
    main()
