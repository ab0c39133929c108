"""What peers take for the same work over what we take: rows of rank 32 to disk, and whole-gradient EK-FAC.

Same model, samples, layers (all linears but the head), batches and threads; each program in a process of its own, in
turn, and beside the loggers their floor: the same passes over a frozen model without hooks. `make peers` installs the
peers first. A time is the median of a process's turns after a warm-up; import and loading are not in it.
"""

import dataclasses
import math
import os
import tempfile
from pathlib import Path

import torch
from _common import Parser, keep_memory, ratio, report, setting
from peers import driver
from peers.exchange import Options
from peers_check import llama_folder

LOGGERS = ("bergson", "dattri", "logix")


def main() -> None:
    made = Parser(__doc__, timed=True, threads=2)
    made.add_argument("--hidden", type=int, default=512)
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--samples", type=int, default=32)
    made.add_argument("--queries", type=int, default=8)
    made.add_argument("--tokens", type=int, default=128)
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--rank", type=int, default=32)
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", default="float32", help="of the model that is logged; EK-FAC is in float32")
    made.add_argument("--ekfac-hidden", type=int, help="width of the model for EK-FAC, if it is another")
    made.add_argument("--turns", type=int, default=3, help="processes for each program; --repeats is within one")
    made.add_argument("--peers", nargs="*", default=LOGGERS, choices=LOGGERS, help="whose logging is timed")
    made.add_argument("--no-ekfac", action="store_true", help="time the logging alone")
    made.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of all threads")
    made.add_argument("--keep-memory", action="store_true", help="let glibc keep what is freed, in all processes")
    a = made.start()
    if a.keep_memory:
        keep_memory()
    common = Options(method="log", batch=a.batch, query_batch=a.batch, threads=a.threads, device=a.device)
    log = dataclasses.replace(common, rank=a.rank, repeats=a.repeats, dtype=a.dtype)
    floor = dataclasses.replace(log, method="floor")
    whole = dataclasses.replace(common, method="ekfac", repeats=1)
    together = {a.hidden: [(driver.OURS, log), *((peer, log) for peer in a.peers), (driver.OURS, floor)]}
    if not a.no_ekfac:
        together.setdefault(a.ekfac_hidden or a.hidden, []).extend([(driver.OURS, whole), ("kronfluence", whole)])
    times: dict[str, list[float]] = {}
    facts, reasons = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        scores = {}
        for hidden, cases in together.items():
            folder = llama_folder(
                Path(scratch) / f"llama{hidden}", hidden=hidden, layers=a.layers, samples=a.samples, queries=a.queries,
                tokens=a.tokens, vocabulary=4096, sampled=False,
            )  # fmt: skip
            for (peer, options), outcomes in zip(cases, driver.alternate(cases, folder, a.turns), strict=True):
                name = f"{peer} {options.method}"
                if outcomes[-1].reason:
                    reasons[name] = outcomes[-1].reason
                    continue
                times[name] = [o.seconds if a.clock == "wall" else o.cpu_seconds for o in outcomes]
                facts[name] = [outcome.about for outcome in outcomes]
                scores[name] = outcomes[-1].scores
    targets, ratios = {}, {}
    for method, peers, goal in (("log", LOGGERS, 1.05), ("ekfac", ["kronfluence"], 1.3)):
        ours = f"{driver.OURS} {method}"
        for name in (f"{peer} {method}" for peer in peers):
            if ours in times and name in times:
                ratios[f"{name} / ours"] = ratio(times, name, ours)
                targets[f"{name} / ours"] = (goal, ">=")
    for name in (f"{peer} log" for peer in (driver.OURS, *LOGGERS)):
        if name in times:
            ratios[f"{name} / floor"] = ratio(times, name, f"{driver.OURS} floor")
    for name, reason in reasons.items():
        print(f"  {name}: could not run: {reason}")
    for name, values in times.items():
        about = facts[name][-1]
        gpu = f", {about['gpu_peak_mb']:,.0f} MB of the GPU" if "gpu_peak_mb" in about else ""
        print(
            f"  {name:<22} {min(values):8.2f} to {max(values):.2f} s, {about['peak_mb'] - about['before_mb']:,.0f} MB"
            f" more at the peak{gpu}, {about['bytes_per_sample']:,.0f} bytes a sample"
        )
    pair = [scores.get(f"{peer} ekfac") for peer in (driver.OURS, "kronfluence")]
    agreement = math.nan
    if pair[0] is not None and pair[1] is not None:
        agreement = float(torch.corrcoef(torch.stack([torch.from_numpy(s).flatten() for s in pair]))[0, 1])
        print(f"  EK-FAC scores, ours and Kronfluence's: correlation {agreement:.6f}")
    about = setting(
        a, "hidden", "layers", "samples", "queries", "tokens", "batch", "rank", "turns", "clock", "repeats", "device",
        "dtype", "ekfac_hidden",
    )  # fmt: skip
    report(
        f"peers_logging_{a.batch * a.tokens}_tokens"
        + "_kept" * a.keep_memory
        + "".join(f"_{how}" for how in (a.device, a.dtype) if how not in ("cpu", "float32")),
        {
            "setting": about | {"cores": os.cpu_count(), "keep_memory": a.keep_memory},
            "seconds": times,
            "facts": facts,
            "reasons": reasons,
            "ekfac_correlation": agreement,
            "ratios": ratios,
        },
        a,
        targets,
    )


if __name__ == "__main__":
    main()
