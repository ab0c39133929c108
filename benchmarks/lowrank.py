"""What dtypes of few bytes keep, judged by retraining: rows of low rank beside rows of few bits.

Each task's samples are logged once in float32 and compressed to every dtype. LDS, fidelity to whole-gradient EK-FAC and
the share of its ten best that are among the best tenth are those of the leaderboard. On the digits a sample has one
token, so that its gradients are outer products; a passage of the text has 48. "seconds" is what compressing
all rows took.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from _common import Parser, truth, write
from leaderboard import Scored, judged, logged, show, whole

import loghook
from loghook.log.codec import DTYPES
from loghook.log.maintain import compress

LOGS: dict[str, tuple[dict[str, Any], ...]] = {
    "digits_mlp": ({"projection": "random", "rank": 64}, {"projection": "none"}),
    "text": ({"projection": "whitened", "rank": 64},),
}


def measure(name: str, dtypes: list[str], options: tuple[dict[str, Any], ...]) -> tuple[Any, list[dict[str, Any]]]:
    task = truth(name)
    model = next(iter(task.models(1)))
    with tempfile.TemporaryDirectory() as folder:
        scored = {one.method: [one] for one in whole(task, model, f"{folder}/whole", False, True)}
        for number, arguments in enumerate(options):
            path = Path(folder) / str(number)
            exact, query, _ = logged(task, model, str(path), {}, **arguments)
            for dtype in dtypes:
                start = time.perf_counter()
                if dtype != "float32":
                    compress(path, path.with_name(f"{number}-{dtype}"), dtype)
                took = time.perf_counter() - start
                log = exact if dtype == "float32" else loghook.load(path.with_name(f"{number}-{dtype}"))
                for method in ("dot", "ekfac"):
                    label = f"{' '.join(map(str, arguments.values()))} {dtype}, {method}"
                    values = log.influence(query, method).values
                    scored[label] = [Scored(label, values, took, log.codec.row_bytes, 0.0)]
    return task, judged(task, scored)


def main() -> None:
    made = Parser(__doc__)
    made.add_argument("--tasks", nargs="*", choices=LOGS, default=list(LOGS))
    made.add_argument("--dtypes", nargs="*", choices=DTYPES, default=["float32", *DTYPES[4:]])
    a = made.start()
    tables = {}
    for name in a.tasks:
        task, tables[name] = measure(name, a.dtypes, LOGS[name])
        show(task, tables[name])
    if a.save:
        write("lowrank", {"tasks": tables})


if __name__ == "__main__":
    main()
