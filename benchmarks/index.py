"""When a vector index pays: seconds to build and to search it beside a scan of the log, and what it finds.

The log is synthetic and clustered: in each layer x and g of a sample are a topic's centre plus noise, and so are the
questions'. Everything is in the page cache and on as many threads as are asked for. "recall" is the share of the true
ten best that are found. A search reads its candidates' rows from the log, so that many questions read much of it.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import Parser, alternate, ratio, report, setting, silent

import loghook

SHARED = 0.7  # of a sample's variance, what its topic explains


class Layers(torch.nn.Module):
    """Linear layers side by side, each with inputs and output gradients of its own."""

    def __init__(self, layers: int, side: int) -> None:
        super().__init__()
        self.each = torch.nn.ModuleList(torch.nn.Linear(side, side, bias=False) for _ in range(layers))

    def forward(self, x_BLI: torch.Tensor, g_BLO: torch.Tensor) -> torch.Tensor:
        return sum(
            (layer(x) * g).sum() for layer, x, g in zip(self.each, x_BLI.unbind(1), g_BLO.unbind(1), strict=True)
        )


class Samples:
    """Samples of topics, drawn anew for every batch."""

    def __init__(self, topics: int, layers: int, side: int) -> None:
        self.centres = torch.randn(2, topics, layers, side)

    def draw(self, n: int) -> list[torch.Tensor]:
        topic = torch.randint(self.centres.shape[1], (n,))
        return [SHARED**0.5 * c[topic] + (1 - SHARED) ** 0.5 * torch.randn(n, *c.shape[1:]) for c in self.centres]


def make_log(folder: Path, model: torch.nn.Module, samples: Samples, rows: int) -> loghook.Log:
    run = loghook.init(folder, projection="none", dtype="bfloat16")
    with silent(), loghook.frozen(model):
        run.watch(model)
        for start in range(0, rows, 250):
            with run(data_id=list(range(start, min(start + 250, rows)))):
                model(*samples.draw(min(250, rows - start))).backward()
        run.finalize()
    return loghook.load(folder)


def measure(log: loghook.Log, query: dict[int, loghook.Query], a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for dimensions, factory in itertools.product(a.dimensions, a.factories):
        start = time.perf_counter()
        with silent():
            index = log.index(dimensions, factory)
        place = {"rows": len(log), "factory": factory, "dimensions": len(index.basis)}
        place |= {"built": time.perf_counter() - start, "bytes": index.basis.nbytes + index.rows.nbytes}
        for candidates in (n for n in a.candidates if n <= len(log)):
            cases: dict[str, Any] = {f"scan {n}": partial(log.influence, query[n], top=10) for n in query}
            cases |= {f"search {n}": partial(index.search, query[n], candidates=candidates) for n in query}
            times = alternate(cases, a.repeats)
            yield place | {
                "candidates": candidates,
                "recall": index.recall(query[max(query)], candidates=candidates),
                "seconds": {case: statistics.median(values) for case, values in times.items()},
                "ratios": {n: ratio(times, f"search {n}", f"scan {n}") for n in query},
            }


def main() -> None:
    made = Parser(__doc__, timed=True, threads=2)
    made.add_argument("--rows", type=int, nargs="*", default=[10_000, 40_000])
    made.add_argument("--layers", type=int, default=16)
    made.add_argument("--side", type=int, default=32)
    made.add_argument("--topics", type=int, default=500)
    made.add_argument("--questions", type=int, nargs="*", default=[1, 64])
    made.add_argument("--dimensions", type=int, nargs="*", default=[256, 1024])
    made.add_argument("--factories", nargs="*", default=["Flat", "HNSW32"])
    made.add_argument("--candidates", type=int, nargs="*", default=[50, 200])
    a = made.start()
    torch.manual_seed(0)
    model, samples = Layers(a.layers, a.side), Samples(a.topics, a.layers, a.side)
    measured = []
    for rows in a.rows:
        with tempfile.TemporaryDirectory() as folder:
            log, query = make_log(Path(folder) / "log", model, samples, rows), {}
            asker = log.attach(model)
            for n in a.questions:
                with asker.query(data_id=list(range(n))) as query[n]:
                    model(*samples.draw(n)).backward()
            for one in measure(log, query, a):
                measured.append(one)
                what = f"{rows:,} rows, {one['factory']} of {one['dimensions']} ({one['bytes'] / 1e6:.0f} MB)"
                print(
                    f"{what}: built in {one['built']:.0f} s; {one['candidates']} candidates, recall {one['recall']:.2f}"
                )
                print("  " + ", ".join(f"{case} {s:.3f} s" for case, s in one["seconds"].items()), flush=True)
    ratios = {
        f"{m['rows']:,}, {m['factory']} {m['dimensions']}, {m['candidates']}: search / scan, {n}": m["ratios"][n]
        for m in measured
        for n in a.questions
    }
    about = setting(a, "rows", "layers", "side", "topics")
    report("index", {"setting": about, "measured": measured, "ratios": ratios}, a, {})


if __name__ == "__main__":
    main()
