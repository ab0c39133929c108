"""Which layers of a transformer to log: whole-gradient EK-FAC of some of them, judged on the shipped ground truths.

On text by retraining (LDS), on planted facts by whether the sentences that state a fact are found (mean reciprocal
rank). Scores of all layers are one sum, so that every choice of layers comes from one scoring pass.
"""

import tempfile

import numpy as np
from _common import Parser, silent, truth, write
from _judge import judge, measure
from _whole import Whole, walk

import loghook

CHOICES = {
    "all": ("q", "k", "v", "o", "gate", "up", "down"),
    "o, down (what writes into the residual stream)": ("o", "down"),
    "down": ("down",),
    "v, o, down": ("v", "o", "down"),
    "all but q, k": ("v", "o", "gate", "up", "down"),
    "MLP: gate, up, down": ("gate", "up", "down"),
    "attention: q, k, v, o": ("q", "k", "v", "o"),
    "gate, up": ("gate", "up"),
    "o": ("o",),
    "v": ("v",),
    "k": ("k",),
    "q": ("q",),
}


def judged(name: str, damping: float) -> dict[str, dict[str, float]]:
    task = truth(name)
    model = task.model()
    with tempfile.TemporaryDirectory() as folder:
        whole = Whole(task, model, "empirical", f"{folder}/factors")
        scoring = whole.fit.score(whole.query, damping=damping, per_layer=True)
        with silent(), loghook.frozen(model):
            walk(task, model, scoring)
        scores = scoring.scores()
    by_layer = dict(zip(scores.layers, scores.by_layer, strict=True))
    found = {}
    for choice, kinds in CHOICES.items():
        chosen = [v for layer, v in by_layer.items() if layer.rpartition(".")[2].removesuffix("_proj") in kinds]
        estimate = judge(task, np.sum(chosen, 0))
        found[choice] = {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
    return found


def main() -> None:
    made = Parser(__doc__)
    made.add_argument("--tasks", nargs="*", default=["text", "facts"], choices=["text", "facts"])
    made.add_argument("--damping", type=float, default=0.1)
    a = made.start()
    result = {task: judged(task, a.damping) for task in a.tasks}
    for task, rows in result.items():
        print(f"{task}: {measure(truth(task))} of whole EK-FAC, damping {a.damping:g}")
        for choice, row in rows.items():
            print(f"  {choice:<50}{row['mean']:.3f}  {row['low']:.3f} to {row['high']:.3f}")
    if a.save:
        write("layers", {"damping": a.damping, "tasks": result})


if __name__ == "__main__":
    main()
