"""When a vector index pays: seconds to build and to search it beside a scan of the log, and what it finds.

The log is synthetic and clustered: in each layer x and g of a sample are a topic's centre plus noise, and so are the
questions'. Everything is in the page cache and on as many threads as are asked for. "recall" is the share of the true
ten best that are found. A search reads its candidates' rows from the log, so that many questions read much of it.
"""

import contextlib
import io
import tempfile
import time
from pathlib import Path

import torch
from _common import alternate, parser, ratio, report

import loghook

DEPTH = 0.7  # of a sample's variance, what its topic explains


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
        return [DEPTH**0.5 * c[topic] + (1 - DEPTH) ** 0.5 * torch.randn(n, *c.shape[1:]) for c in self.centres]


def make_log(folder: Path, model: torch.nn.Module, samples: Samples, rows: int) -> loghook.Log:
    run = loghook.init(folder, projection="none", dtype="bfloat16")
    with contextlib.redirect_stdout(io.StringIO()), loghook.frozen(model):
        run.watch(model)
        for start in range(0, rows, 250):
            with run(data_id=list(range(start, min(start + 250, rows)))):
                model(*samples.draw(min(250, rows - start))).backward()
        run.finalize()
    return loghook.load(folder)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, nargs="*", default=[10_000, 40_000])
    made.add_argument("--layers", type=int, default=16)
    made.add_argument("--side", type=int, default=32)
    made.add_argument("--topics", type=int, default=500)
    made.add_argument("--dimensions", type=int, nargs="*", default=[256, 1024])
    made.add_argument("--factories", nargs="*", default=["Flat", "HNSW32"])
    made.add_argument("--candidates", type=int, nargs="*", default=[50, 200, 1000])
    a = made.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    model, samples = Layers(a.layers, a.side), Samples(a.topics, a.layers, a.side)
    measured, ratios = [], {}
    print(
        f"{'rows':>8} {'index':<14}{'build s':>9}{'MB':>7}  {'candidates':>10}{'recall':>8}  seconds for 1, 64 questions"
    )
    for rows in a.rows:
        with tempfile.TemporaryDirectory() as folder:
            log, query = make_log(Path(folder) / "log", model, samples, rows), {}
            asker = log.attach(model)
            for n in (1, 64):
                with asker.query(data_id=list(range(n))) as query[n]:
                    model(*samples.draw(n)).backward()
            for dimensions, factory in [(d, f) for d in a.dimensions for f in a.factories]:
                start = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):
                    index = log.index(dimensions, factory)
                built = time.perf_counter() - start
                for candidates in (n for n in a.candidates if n <= rows):
                    found = index.recall(query[64], candidates=candidates)
                    cases = {}
                    for n in (1, 64):
                        cases[f"scan {n}"] = lambda n=n: log.influence(query[n], top=10)
                        cases[f"search {n}"] = lambda n=n, c=candidates: index.search(query[n], candidates=c)
                    times = alternate(cases, a.repeats)
                    name = f"{rows:,} rows, {factory} of {dimensions}, {candidates} candidates"
                    seconds = {case: sorted(values)[len(values) // 2] for case, values in times.items()}
                    for n in (1, 64):
                        ratios[f"{name}: search / scan, {n}"] = ratio(times, f"search {n}", f"scan {n}")
                    place = {"rows": rows, "factory": factory, "dimensions": len(index.basis), "built": built}
                    measured.append(place | {"candidates": candidates, "recall": found, "seconds": seconds})
                    size = (index.basis.nbytes + index.rows.nbytes) / 1e6
                    print(
                        f"{rows:>8,} {factory + ' ' + str(dimensions):<14}{built:>9.1f}{size:>7.0f}  {candidates:>10,}{found:>8.2f}"
                        f"  search {seconds['search 1']:.4f}, {seconds['search 64']:.4f};"
                        f" scan {seconds['scan 1']:.4f}, {seconds['scan 64']:.4f}",
                        flush=True,
                    )
    setting = {key: getattr(a, key) for key in ("rows", "layers", "side", "topics")}
    report("index", {"setting": setting, "measured": measured, "ratios": ratios}, save=a.save, targets={})


if __name__ == "__main__":
    main()
