"""Refined questions: what damping and the number of iterations do to LDS, and what a product with the curvature takes.

    python benchmarks/refine.py --task text --samples 300 --dampings 0.1 1 --models 1 --save

Factors are those of the true Fisher. `choose` and `report` are two halves of the queries: look for the best setting in
one and read its figure in the other. "s.d." is that of the models' LDS. Seconds are of the
processor, for all queries together.
"""

import argparse
import json
import tempfile
import time

import leaderboard
import numpy as np
import torch
from _common import RESULTS, machine, truth
from _whole import Whole

from loghook.evaluate.lds import lds


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--task", choices=leaderboard.TASKS, default="digits_mlp")
    made.add_argument("--models", type=int, default=2)
    made.add_argument("--samples", type=int, default=1200, help="that the curvature is taken from")
    made.add_argument("--dampings", type=float, nargs="+", default=[3.0, 10.0, 30.0])
    made.add_argument("--iterations", type=int, nargs="+", default=[1, 2, 3])
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--save", action="store_true", help="write the JSON, beside what it has of other tasks")
    a = made.parse_args()
    torch.set_num_threads(a.threads)
    task = truth(a.task)
    halves = np.array_split(np.random.default_rng(0).permutation(task.n_query), 2)
    found: dict[tuple[float, int], list[np.ndarray]] = {}
    seconds: dict[tuple[float, int], float] = {}
    for model in task.models(a.models):
        with tempfile.TemporaryDirectory() as folder:
            one = Whole(task, model, "true", folder)
            for damping in a.dampings:
                for iterations in a.iterations:
                    start = time.process_time()
                    u = one.refine(a.samples, damping=damping, iterations=iterations, tolerance=0)
                    seconds[damping, iterations] = time.process_time() - start
                    scores, _ = one.score(u)
                    each = lds(scores, task.members, task.losses, resamples=1).per_query
                    found.setdefault((damping, iterations), []).append(each)
            one.fit.close()
    rows = []
    print(f"{task.name}: {task.n_query} queries, curvature of {a.samples} samples, models: {a.models}")
    print(f"{'damping':>8}{'iterations':>12}{'LDS':>8}{'choose':>8}{'report':>8}{'s.d.':>8}{'seconds':>9}")
    for (damping, iterations), models in found.items():
        each = np.mean(models, axis=0)
        row = {"damping": damping, "iterations": iterations, "lds": float(each.mean())}
        row |= {"choose": float(each[halves[0]].mean()), "report": float(each[halves[1]].mean())}
        row["models"] = [float(model.mean()) for model in models]
        row["seconds"] = seconds[damping, iterations]
        rows.append(row)
        print(
            "{damping:>8g}{iterations:>12}{lds:>8.3f}{choose:>8.3f}{report:>8.3f}{spread:>8.3f}{seconds:>9.1f}".format(
                spread=np.std(row["models"]), **row
            )
        )
    if a.save:
        file = RESULTS / "refine.json"
        result = json.loads(file.read_text()) if file.exists() else {"benchmark": "refine", "machine": machine()}
        result[a.task] = {"samples": a.samples, "models": a.models, "rows": rows}
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
