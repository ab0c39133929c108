"""Logging on a GPU: real architectures with random weights, bfloat16, rows to disk, beside LogIX's published run.

Everything runs unattended in one call and ends before ``--seconds``: what found no time, or no memory, says so in the
JSON, which is written anew after each part. Needs torch, transformers and what loghook needs; from the repository:

    PYTHONPATH=. python benchmarks/gpu.py --out gpu.json

``--tiny`` runs all of it on small models, on the CPU where there is no GPU.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _common import alternate, finish, machine, medians, ratio, setting, silent, summed_loss
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import loghook

# Llama-3-8B, one A100-80GB, rank 64 (Choe et al. 2024)
LOGIX = {"tokens/s, batch 1": 3430, "tokens/s, batch 16": 4696, "pairs/s": 79_004}
MANY = 256  # questions of a scan whose arithmetic, and no longer the memory, decides
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def configs(tiny: bool) -> dict[str, Any]:
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    small = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama = {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    }  # fmt: skip
    qwen = {
        "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return {
        "llama-3-8b": LlamaConfig(**(small if tiny else llama)),
        "qwen2.5-1.5b": Qwen2Config(**(small if tiny else qwen)),
        "gpt2": GPT2Config(**({"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4} if tiny else {})),
    }


def build(config: Any) -> torch.nn.Module:
    """A model with random weights in bfloat16, made where it runs."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.use_cache = False
    return model.to(DEVICE).eval()


def peak(case: Callable[[], None]) -> float | None:
    """GB on the GPU at the peak of one call, the model included; None on the CPU."""
    if not CUDA:
        return None
    finish()
    torch.cuda.reset_peak_memory_stats()
    case()
    finish()
    return torch.cuda.max_memory_allocated() / 1e9


def waits(case: Callable[[], None]) -> int | None:
    """How often one call waits for the GPU, of the operations that torch knows to wait; None on the CPU."""
    if not CUDA:
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            case()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)


def attention(q: Any, k: Any, v: Any, *args: Any, **others: Any) -> int:
    """Operations of an attention's two products, whose queries may have more heads than keys."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **others: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


def matrix_product(a: Any, b: Any, *args: Any, **others: Any) -> int:
    """Operations of mm and bmm, which may be told the dtype to sum in."""
    return 2 * math.prod(a) * b[-1]


FORMULAS = {torch.ops.aten.mm: matrix_product, torch.ops.aten.bmm: matrix_product}
for _name in ("flash_attention", "efficient_attention", "cudnn_attention"):
    FORMULAS[getattr(torch.ops.aten, f"_scaled_dot_product_{_name}")] = attention
    FORMULAS[getattr(torch.ops.aten, f"_scaled_dot_product_{_name}_backward")] = attention_backward


def operations(case: Callable[[], None]) -> int | None:
    """What one call computes, or None where torch cannot count it."""
    try:
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            case()
    except (AssertionError, TypeError, ValueError):
        return None
    return counter.get_total_flops()


def launch_seconds(count: int = 2000) -> float | None:
    """What it takes this host to start a kernel that has next to nothing to do; None on the CPU."""
    if not CUDA:
        return None
    t = torch.zeros(1, device=DEVICE)
    several(lambda: t.add_(1), 100)()
    start = time.perf_counter()
    several(lambda: t.add_(1), count)()
    return (time.perf_counter() - start) / count


def disk_rate(folder: Path, size: int) -> float:
    """MB a second that the folder's disk takes of so many, synchronised at their end."""
    data, file = os.urandom(2**20), folder / "rate"
    start = time.perf_counter()
    with open(file, "wb") as f:
        for _ in range(size):
            f.write(data)
        f.flush()
        os.fsync(f.fileno())
    took = time.perf_counter() - start
    file.unlink()
    return size / took


class Bench:
    """One model and its cases; every case is one batch, forward and backward. The first two are for a frozen model.

    Floors are the same passes outside of blocks: the hooks are there, and do nothing.
    """

    def __init__(self, model: torch.nn.Module, rank: int, tokens: int, folder: Path, dtype: str) -> None:
        self.model, self.tokens = model, tokens
        self.vocabulary = model.config.vocab_size
        self.ids = itertools.count()
        self.run = loghook.init(folder, rank=rank, dtype=dtype, overwrite=True)
        with silent():
            self.run.watch(model)

    def data(self, batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(batch)
        return torch.randint(0, self.vocabulary, (batch, self.tokens), generator=generator).to(DEVICE)

    def floor(self, batch: int) -> Callable[[], None]:
        data, embeddings = self.data(batch), self.model.get_input_embeddings()

        def case() -> None:
            handle = embeddings.register_forward_hook(lambda module, args, y: y.requires_grad_())
            summed_loss(self.model, data).backward()
            handle.remove()

        return case

    def log(self, batch: int) -> Callable[[], None]:
        data = self.data(batch)

        def case() -> None:
            with self.run(data_id=list(itertools.islice(self.ids, batch))):
                summed_loss(self.model, data).backward()

        return case

    def train(self, batch: int, log: bool) -> Callable[[], None]:
        data = self.data(batch)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)

        def case() -> None:
            with self.run(data_id=list(itertools.islice(self.ids, batch))) if log else contextlib.nullcontext():
                summed_loss(self.model, data).backward()
            optimizer.step()
            optimizer.zero_grad()

        return case


def several(case: Callable[[], None], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            case()
        finish()

    return run


def compare(cases: dict[str, Callable[[], None]], over: str, under: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of each case, the ratio of two, and what each takes of memory, operations and the host's time."""
    found: dict[str, Any] = {"tokens": tokens}
    for case in cases.values():
        several(case, 2)()  # warm up
    start = time.perf_counter()
    several(cases[under], 1)()
    count = max(1, min(50, int(0.5 / max(time.perf_counter() - start, 1e-6)))) if CUDA else 1
    times = alternate({name: several(case, count) for name, case in cases.items()}, repeats)
    found["overhead"] = ratio(times, over, under)
    for name, case in cases.items():
        median = medians(times)[name] / count
        hosts = []
        for _ in range(3):
            start = time.perf_counter()
            case()
            hosts.append(time.perf_counter() - start)
            finish()
        found[name] = {
            "tokens/s": tokens / median,
            "seconds": median,
            # until the batch was issued: near "seconds", the GPU waits for Python
            "host_seconds": statistics.median(hosts),
            "peak_gb": peak(case),
            "waits": waits(case),
        }
    for name, case in cases.items():  # at last: what is counted once runs eagerly from then on
        counted = operations(case)
        finish()
        found[name]["operations"] = counted
        found[name]["tflop/s"] = None if counted is None else counted / found[name]["seconds"] / 1e12
    counts = found[over]["operations"], found[under]["operations"]
    found["arithmetic"] = counts[0] / counts[1] if all(counts) else None
    return found


def top_operators(floor: Callable[[], None], log: Callable[[], None], count: int = 16) -> dict[str, Any]:
    """What a logging pass adds to the floor, operator by operator: milliseconds on the device and on the host."""

    def table(case: Callable[[], None]) -> tuple[dict[str, tuple[float, float, int]], float]:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
        with profile(activities=activities) as seen:
            case()
            finish()
        # A kernel's time is told twice: of the operator that started it, and of the kernel itself.
        events = seen.key_averages()
        operators = [e for e in events if e.device_type == DeviceType.CPU]
        kernels = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
        times = {e.key: (e.self_device_time_total / 1e3, e.self_cpu_time_total / 1e3, e.count) for e in operators}
        return times, sum(e.self_device_time_total for e in kernels) / 1e3

    log()
    (before, device_before), (after, device_after) = table(floor), table(log)
    added = {
        key: [round(a - b, 4) for a, b in zip(values, before.get(key, (0.0, 0.0, 0)), strict=True)]
        for key, values in after.items()
    }
    by_device = sorted(added, key=lambda key: -added[key][0])[:count] if CUDA else []
    by_host = sorted(added, key=lambda key: -added[key][1])[:count]
    return {
        "columns": ["device ms", "host ms", "calls"],
        "by device": {key: added[key] for key in by_device},
        "by host": {key: added[key] for key in by_host},
        "total device ms": [device_before, device_after],
    }


def whole(
    model: torch.nn.Module, bench: Bench, batch: int, batches: int, questions: int, folder: Path
) -> dict[str, Any]:
    """Whole-gradient EK-FAC: seconds of each pass over some batches, of decompositions and of the questions."""
    ids, seconds = itertools.count(), {}
    data = bench.data(batch)

    def through(name: str, opened: Callable[[list[int]], Any]) -> None:
        start = time.perf_counter()
        for _ in range(batches):
            with opened(list(itertools.islice(ids, batch))):
                summed_loss(model, data).backward()
        finish()
        seconds[name] = time.perf_counter() - start

    with loghook.frozen(model):
        fit = loghook.fit(folder)
        with silent():
            fit.watch(model)
        handle = model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_())
        through("warm up", lambda ids: contextlib.nullcontext())
        through("floor", lambda ids: contextlib.nullcontext())
        handle.remove()
        begun = time.perf_counter()
        for stage in fit.passes():
            seconds[f"between, before {stage.kind}"] = time.perf_counter() - begun
            through(stage.kind, lambda ids: fit(data_id=ids))
            begun = time.perf_counter()
        start = time.perf_counter()
        with fit.query(data_id=list(range(questions))) as query:
            summed_loss(model, data[:1].expand(questions, -1)).backward()
        scoring = fit.score(query)
        finish()
        seconds["questions"] = time.perf_counter() - start
        through("score", lambda ids: scoring(data_id=ids))
        scoring.scores()
        found = {"tokens": batch * batches * bench.tokens, "questions": questions, "seconds": seconds}
        found["peak_gb"] = peak(lambda: through("again", lambda ids: scoring(data_id=ids)))
    fit.close()
    return found


def score(path: Path, query: loghook.Query, repeats: int) -> dict[str, Any]:
    """Pairs a second: our scan on this machine's CPU, and a product on the GPU, rows there already or brought there."""
    log = loghook.load(path)
    values = log.influence(query, "dot").values  # and the log is in the page cache from here on
    dtype = torch.bfloat16 if CUDA else torch.float32
    questions = query.matrix.to(DEVICE, dtype)
    copies = -(-MANY // len(query))
    many = loghook.Query(list(range(copies * len(query))), query.matrix.repeat(copies, 1), query.made, query.parameters)
    blocks = []
    for _, block in log.blocks():
        blocks.append(block.to(dtype))
        if sum(b.numel() for b in blocks) * dtype.itemsize > 4e9:
            break
    rows = torch.cat(blocks)
    there = rows.to(DEVICE)

    def resident() -> None:
        questions @ there.T
        finish()

    def brought() -> None:
        for block in blocks:
            questions @ block.to(DEVICE, non_blocking=True).T
        finish()

    times = alternate(
        {
            "dot, CPU": lambda: log.influence(query, "dot"),
            "ekfac, CPU": lambda: log.influence(query, "ekfac"),
            f"dot, CPU, {len(many)} questions": lambda: log.influence(many, "dot"),
            "product, rows on the GPU": resident,
            "product, rows brought": brought,
        },
        repeats,
    )
    found: dict[str, Any] = {"rows": len(log), "questions": len(query), "values": rows.shape[1]}
    found["operations_per_pair"] = 2 * rows.shape[1]
    for name, seconds in medians(times).items():
        count = len(log) if "CPU" in name else len(rows)
        found[name] = count * len(many if "questions" in name else query) / seconds
    product = (questions @ there.T).float().cpu()
    ours = torch.from_numpy(values[:, : len(rows)])
    found["agreement"] = float(torch.nn.functional.cosine_similarity(product.flatten(), ours.flatten(), 0))
    return found


class Work:
    """Parts of the whole, each tried, with the clock watched."""

    def __init__(self, seconds: float, out: Path | None) -> None:
        self.until, self.out = time.monotonic() + seconds, out
        self.result: dict[str, Any] = {"benchmark": "gpu", "machine": machine(), "published": LOGIX, "models": {}}

    @contextlib.contextmanager
    def part(self, place: dict[str, Any], name: str) -> Iterator[bool]:
        """Yield whether there is time for it; a failure is kept as its result, and the next part goes on."""
        go = time.monotonic() < self.until
        start = time.monotonic()
        try:
            yield go
            if not go:
                place[name] = {"left_out": "no time left"}
        except Exception as error:  # whatever one part dies of, the others run
            place[name] = {"left_out": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            if CUDA:
                torch.cuda.empty_cache()
        place.setdefault("took", {})[name] = round(time.monotonic() - start, 1)
        self.save()

    def save(self) -> None:
        if self.out is not None:
            self.out.write_text(json.dumps(self.result, indent=1) + "\n")


def bench_model(work: Work, name: str, config: Any, a: argparse.Namespace, folder: Path) -> None:
    place: dict[str, Any] = {}
    work.result["models"][name] = place
    repeats = 3 if a.tiny else a.repeats
    with work.part(place, "build") as go:
        if not go:
            return
        model = build(config)
        bench = Bench(model, a.rank, a.tokens, folder, a.dtype)
        place["parameters"] = sum(p.numel() for p in model.parameters())
        place["layers"] = len(bench.run.layers)
    if "left_out" in place.get("build", {}):
        return
    with loghook.frozen(model):
        for batch in a.batches:
            with work.part(place, f"log, batch {batch}") as go:
                if go:
                    cases = {"frozen": bench.floor(batch), "log": bench.log(batch)}
                    place[f"log, batch {batch}"] = compare(cases, "log", "frozen", batch * a.tokens, repeats)
            with work.part(place, f"profile, batch {batch}") as go:
                if go:
                    place[f"profile, batch {batch}"] = top_operators(bench.floor(batch), bench.log(batch))
        how = [("compiled", "default")] * (name in a.compile) + [("in CUDA graphs", "reduce-overhead")] * (
            name in a.graphs
        )
        for (kind, mode), batch in itertools.product(how, a.batches):
            for layer in decoder_layers(model):
                layer.compile(mode=mode)
            with work.part(place, f"log {kind}, batch {batch}") as go:
                if go:
                    cases = {"frozen": bench.floor(batch), "log": bench.log(batch)}
                    place[f"log {kind}, batch {batch}"] = compare(cases, "log", "frozen", batch * a.tokens, repeats)
            for layer in decoder_layers(model):
                layer._compiled_call_impl = None
            torch._dynamo.reset()  # else the next size would be compiled for all sizes
    with work.part(place, "train") as go:
        if go:
            batch = a.train_batch
            cases = {"train": bench.train(batch, False), "train and log": bench.train(batch, True)}
            place["train"] = compare(cases, "train and log", "train", batch * a.tokens, repeats)
    with work.part(place, "to the disk") as go:
        if go:
            batch, count = a.batches[-1], 2 if a.tiny else 12
            place["disk MB/s"] = disk_rate(folder, 16 if a.tiny else 1024)
            with loghook.frozen(model):
                case, start = bench.log(batch), time.perf_counter()
                for _ in range(count):
                    case()
                finish()
                looped = time.perf_counter() - start
                with bench.run.query(data_id=list(range(batch))) as query:
                    summed_loss(model, bench.data(batch)).backward()
            start = time.perf_counter()
            bench.run.finalize()
            ended = time.perf_counter() - start
            log = loghook.load(folder)
            place["row_bytes"] = log.codec.row_bytes
            place["to the disk"] = {
                "tokens/s": count * batch * a.tokens / (looped + ended),
                "loop": count * batch * a.tokens / looped,
                "rows": len(log),
                "finalize_seconds": ended,
            }
    bench.run.close()
    if name in a.whole:
        with work.part(place, "whole gradients") as go:
            if go:
                count = 1 if a.tiny else 8
                place["whole gradients"] = whole(
                    model, bench, a.train_batch, count, 2 if a.tiny else 16, folder / "fit"
                )
    with work.part(place, "score") as go:
        if go and "left_out" not in place["to the disk"]:
            place["score"] = score(folder, query, 3)
    del bench, model
    if CUDA:
        torch.cuda.empty_cache()


def show(result: dict[str, Any], tokens: int) -> None:
    about = result["machine"]
    print(f"\n{about['gpu'] or about['cpu']}, torch {about['torch']}, sequences of {tokens} tokens, bfloat16")
    if result["launch_seconds"]:
        print(f"{result['launch_seconds'] * 1e6:.1f} us of the host for a kernel")
    print(f"{'':<34}{'tokens/s':>12}{'overhead':>24}{'operations':>12}{'peak GB':>9}{'TFLOP/s':>9}")
    for name, place in result["models"].items():
        for part in place:
            found = place[part]
            if not isinstance(found, dict):
                continue
            if "left_out" in found:
                print(f"  {name}, {part}: {found['left_out']}")
            elif "overhead" in found:
                over = found["overhead"]
                for case in ("frozen", "log", "train", "train and log"):
                    if case in found:
                        one = found[case]
                        logs = "log" in case
                        spread = f"{over['median']:.3f} ({over['low']:.3f} to {over['high']:.3f})" if logs else ""
                        arithmetic = f"{found['arithmetic']:.3f}" if logs and found["arithmetic"] else ""
                        gb = "" if one["peak_gb"] is None else f"{one['peak_gb']:.1f}"
                        how = part.partition(",")[0].removeprefix("log").removeprefix("train")
                        label = f"  {name}, {case}{how}, {found['tokens'] // tokens}"
                        print(
                            f"{label:<34}{one['tokens/s']:>12,.0f}{spread:>24}{arithmetic:>12}{gb:>9}"
                            f"{one['tflop/s'] or 0:>9.1f}"
                        )
            elif part == "to the disk":
                rate = found["tokens/s"] / tokens * place["row_bytes"] / 1e6
                print(
                    f"  {name}, to the disk: {found['tokens/s']:,.0f} tokens/s, {place['row_bytes']:,.0f} bytes a row: "
                    f"{rate:,.0f} MB/s of {place['disk MB/s']:,.0f}"
                )
            elif part == "score":
                pairs = ", ".join(f"{key} {value:,.0f}" for key, value in found.items() if "CPU" in key or "pro" in key)
                print(f"  {name}, pairs/s at {found['operations_per_pair']:,} operations a pair: {pairs}")
            elif part == "whole gradients":
                times = ", ".join(f"{key} {value:.2f}" for key, value in found["seconds"].items())
                print(f"  {name}, whole gradients, seconds for {found['tokens']:,} tokens: {times}")
            elif part.startswith("profile"):
                column = "by device" if found["by device"] else "by host"
                index = 0 if found["by device"] else 1
                kernels = " to ".join(f"{ms:.1f}" for ms in found["total device ms"])
                print(f"  {name}, {part}: kernels {kernels} ms; what logging adds, ms {column}")
                for key, values in list(found[column].items())[:8]:
                    print(f"    {key[:60]:<62}{values[index]:>9.3f}  {values[2]:>6} calls")
    published = ", ".join(f"{key} {value:,}" for key, value in LOGIX.items())
    print(f"  LogIX, Llama-3-8B, rank 64, one A100-80GB, as published: {published}")


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", default=["llama-3-8b", "qwen2.5-1.5b", "gpt2"])
    made.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    made.add_argument("--train-batch", type=int, default=8)
    made.add_argument(
        "--compile", nargs="*", default=["llama-3-8b", "gpt2"], help="models whose layers are compiled too"
    )
    made.add_argument("--graphs", nargs="*", default=[], help="models whose layers are recorded in CUDA graphs too")
    made.add_argument("--whole", nargs="*", default=["gpt2"], help="models also run with whole-gradient EK-FAC")
    made.add_argument("--tokens", type=int, default=512)
    made.add_argument("--rank", type=int, default=64)
    made.add_argument("--dtype", default="bfloat16", help="of the rows on disk")
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--seconds", type=float, default=480, help="no part starts later than this")
    made.add_argument("--scratch", type=Path, help="folder for logs; by default the system's temporary one")
    made.add_argument("--out", type=Path, help="file for the JSON")
    made.add_argument("--tiny", action="store_true")
    a = made.parse_args(argv)
    if a.tiny:
        a.batches, a.train_batch, a.tokens, a.rank = [1, 2], 2, 8, 4
    work = Work(a.seconds, a.out)
    work.result["setting"] = setting(a, "batches", "train_batch", "tokens", "rank", "dtype", "repeats")
    work.result["launch_seconds"] = launch_seconds()
    for name in a.models:
        folder = Path(tempfile.mkdtemp(dir=a.scratch))
        try:
            bench_model(work, name, configs(a.tiny)[name], a, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    show(work.result, a.tokens)


if __name__ == "__main__":
    main()
