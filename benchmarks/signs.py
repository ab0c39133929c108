"""What signs cost: rows of one bit beside float32 rows, and 1-bit questions beside questions in full precision.

"rows": the mean over questions of the Pearson correlation between scores of 1-bit rows and of the float32 rows that
they were made of; "pearson": between scores of 1-bit questions and of whole ones on 1-bit rows. On made-up rows without
any structure and on whitened rows of a trained model (a task of benchmarks/truths/), with the LDS of all where there is
a truth.
"""

import itertools
import tempfile
from pathlib import Path
from typing import Any

from _common import Parser, truth, write
from leaderboard import TASKS, logged
from score import write_log

import loghook
from loghook.evaluate.lds import lds
from loghook.influence.fidelity import likeness
from loghook.log.maintain import compress


def compared(exact: loghook.Log, query: loghook.Query, method: str, task: Any = None) -> dict[str, float]:
    log = loghook.load(exact.path.with_name(f"{exact.path.name}-int1"))
    whole = exact.influence(query, method).values
    full, signs = (log.influence(query, method, query_dtype=dtype).values for dtype in (None, "int1"))
    found = {"rows": likeness(full, whole), "pearson": likeness(signs, full)}
    if task is not None:
        for name, values in (("lds, float32", whole), ("lds", full), ("lds, 1-bit questions", signs)):
            found[name] = lds(values, task.members, task.losses, resamples=1).mean
    return found


def main() -> None:
    made = Parser(__doc__, threads=2)
    made.add_argument("--task", choices=TASKS, default="text")
    made.add_argument("--ranks", type=int, nargs="*", default=[32, 64])
    made.add_argument("--rows", type=int, default=8192, help="of the made-up log, 28 layers x 1,024 values")
    a = made.start()
    ratios = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        query = write_log(folder / "random", a.rows, 28, 1024, "float32", 16)
        compress(folder / "random", folder / "random-int1", "int1")
        ratios["random rows, dot"] = compared(loghook.load(folder / "random"), query, "dot")
        task = truth(a.task)
        (model,) = task.models(1)
        for whitening, rank in itertools.product((0.01, 0.1), a.ranks):
            options = {"projection": "whitened", "whitening": whitening, "rank": rank}
            name = f"whitened {whitening:g} {rank}"
            log, query, _ = logged(task, model, str(folder / name), {}, **options)
            compress(folder / name, folder / f"{name}-int1", "int1")
            for method in ("dot", "ekfac"):
                ratios[f"{a.task}, {name}, {method}"] = compared(log, query, method, task)
    for case, found in ratios.items():
        print(f"{case:<34}" + "  ".join(f"{key} {value:.3f}" for key, value in found.items()))
    if a.save:
        write("signs", {"cases": ratios, "ratios": {}})


if __name__ == "__main__":
    main()
