"""Which rank a layer's width needs: fidelity to whole-gradient EK-FAC against rank, for hidden sizes 128 to 1,024.

A three-layer Llama of each width is trained for a while on the text truth's passages, since gradients of random weights
are not like real ones. Factors are fitted on the passages, and `loghook.tune` correlates the scores of small logs with
those of whole EK-FAC (relative damping 0.1), question by question; the best damping of each log counts.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Parser, llama, setting, silent, summed_loss, write

import loghook

PROJECTIONS: tuple[dict[str, Any], ...] = (
    {"projection": "random"},
    {"projection": "whitened", "whitening": 0.01},
    {"projection": "whitened", "whitening": 0.1},
)
METHODS = ({"method": "dot"}, {"method": "ekfac", "damping": 0.01}, {"method": "ekfac", "damping": 0.1})


def trained(hidden: int, tokens: torch.Tensor, steps: int) -> torch.nn.Module:
    """A model that has seen the passages for some steps of AdamW."""
    model = llama(hidden, layers=3, vocabulary=1024)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (16,), generator=order)]
        loss = summed_loss(model, batch) / batch[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def measure(hidden: int, tokens: torch.Tensor, a: argparse.Namespace) -> list[dict[str, Any]]:
    model = trained(hidden, tokens[: a.samples], a.steps)
    batches = [(list(range(i, i + 20)), tokens[i : i + 20]) for i in range(0, a.samples, 20)]
    questions = [(list(range(a.queries)), tokens[-a.queries :])]
    with tempfile.TemporaryDirectory() as folder, silent(), loghook.frozen(model):
        fit = loghook.fit(folder)
        fit.watch(model)
        for _ in fit.passes():
            for ids, batch in batches:
                with fit(data_id=ids):
                    summed_loss(model, batch).backward()
        tuned = loghook.tune(
            fit, lambda: batches, lambda: questions, lambda batch: summed_loss(model, batch),
            projections=PROJECTIONS, ranks=a.ranks, dtypes=a.dtypes, methods=METHODS, subsets=False,
        )  # fmt: skip
    return [{"hidden": hidden, "fidelity": one.fidelity, "scoring": one.scoring} | one.init for one in tuned.candidates]


def needed(rows: list[dict[str, Any]], kind: str, hidden: int, fidelity: float) -> float:
    """Rank for a fidelity, interpolated in logarithms of the rank and of what is lost; nan beyond what was tried."""
    line = sorted((r["rank"], r["fidelity"]) for r in rows if r["hidden"] == hidden and name(r) == kind)
    kept = [-math.log(max(1e-9, 1 - found)) for _, found in line]
    wanted = -math.log(1 - fidelity)
    if not kept[0] <= wanted <= kept[-1]:
        return math.nan
    return float(2 ** np.interp(wanted, kept, [math.log2(rank) for rank, _ in line]))


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Fidelity against rank: a line for each width, a panel for each projection."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(name(row) for row in rows))
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.4), sharey=True, squeeze=False)
    for panel, kind in zip(panels[0], kinds, strict=True):
        for hidden in sorted({row["hidden"] for row in rows}):
            line = sorted((r["rank"], r["fidelity"]) for r in rows if r["hidden"] == hidden and name(r) == kind)
            panel.plot(*zip(*line, strict=True), marker="o", label=f"hidden {hidden}")
        panel.set(title=kind, xlabel="rank", xscale="log", xticks=sorted({r["rank"] for r in rows}))
        panel.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("fidelity to whole EK-FAC")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def name(row: dict[str, Any]) -> str:
    whitening = f" {row['whitening']:g}" if "whitening" in row else ""
    return row["projection"] + whitening + ("" if row["dtype"] == "float32" else f", {row['dtype']}")


def main() -> None:
    made = Parser(__doc__)
    made.add_argument("--hidden", type=int, nargs="*", default=[128, 256, 512])
    made.add_argument("--ranks", type=int, nargs="*", default=[16, 32, 64, 128])
    made.add_argument("--dtypes", nargs="*", default=["float32"])
    made.add_argument("--samples", type=int, default=400)
    made.add_argument("--queries", type=int, default=16)
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--figure", type=Path, help="write the figure there (needs matplotlib)")
    a = made.start()
    import text

    tokens, rows = text.data()["tokens"].long(), []
    for hidden in a.hidden:
        start = time.perf_counter()
        rows += measure(hidden, tokens, a)
        print(f"hidden {hidden} ({time.perf_counter() - start:.0f} s)")
        for row in rows:
            if row["hidden"] == hidden:
                print(f"  {name(row):<24}rank {row['rank']:>4}  {row['fidelity']:.3f}  {row['scoring']}", flush=True)
    for kind in dict.fromkeys(name(row) for row in rows):
        for fidelity in (0.8, 0.9):
            ranks = [f"{needed(rows, kind, hidden, fidelity):.0f}" for hidden in a.hidden]
            print(f"rank for a fidelity of {fidelity}, {kind}: {', '.join(ranks)} at hidden {a.hidden}")
    if a.save:
        write("width", {"about": setting(a, "samples", "queries", "steps"), "rows": rows})
    if a.figure:
        draw(rows, a.figure)


if __name__ == "__main__":
    main()
