"""What 1-bit questions cost: `query_dtype="int1"` beside questions in full precision, both on a log of 1-bit rows.

The mean over questions of the Pearson correlation between their scores, on made-up rows without any structure and on
whitened rows of a trained model (a task of benchmarks/truths/), with the LDS of both where there is a truth.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import parser, report, truth
from _judge import like
from leaderboard import TASKS, logged
from score import write_log

import loghook
from loghook.evaluate.lds import lds


def both(log: loghook.Log, query: loghook.Query, method: str, task: Any = None) -> dict[str, float]:
    full, signs = (log.influence(query, method, query_dtype=dtype).values for dtype in (None, "int1"))
    found = {"pearson": like(signs, full)}
    if task is not None:
        for name, values in (("lds", full), ("lds, 1-bit questions", signs)):
            found[name] = lds(values, task.members, task.losses, resamples=1).mean
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--task", choices=TASKS, default="text")
    made.add_argument("--ranks", type=int, nargs="*", default=[32, 64])
    made.add_argument("--rows", type=int, default=8192, help="of the made-up log, 28 layers x 1,024 values")
    a = made.parse_args()
    torch.set_num_threads(a.threads)
    ratios = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        query = write_log(folder / "random", a.rows, 28, 1024, "int1", 16)
        ratios["random rows, dot"] = both(loghook.load(folder / "random"), query, "dot")
        task = truth(a.task)
        (model,) = task.models(1)
        for rank in a.ranks:
            options = {"projection": "whitened", "whitening": 0.01, "rank": rank, "dtype": "int1"}
            log, query, _ = logged(task, model, str(folder / str(rank)), **options)
            for method in ("dot", "ekfac"):
                ratios[f"{a.task}, whitened {rank}, {method}"] = both(log, query, method, task)
    for case, found in ratios.items():
        print(f"{case:<34}" + "  ".join(f"{key} {value:.3f}" for key, value in found.items()))
    report("signs", {"cases": ratios, "ratios": {}}, save=a.save, targets={})


if __name__ == "__main__":
    main()
