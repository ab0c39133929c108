"""How well exact replay predicts retraining, and how smooth a training must be for that: the digits MLP.

Two questions, each answered by LDS. "Itself": the training that is replayed is run again, with its initialisation and
its order, without a random part of the samples. "Truth": the shipped retrainings on halves, with five other seeds.
``eps_root`` inside Adam's root makes the training smoother, and another one: its query loss is shown. Seconds are of
processor time.
"""

import dataclasses
import time
from typing import Any

import numpy as np
import torch
from _common import Parser, truth, write
from base import FIRST_SEED

from loghook.evaluate.lds import lds, random_subsets
from loghook.evaluate.replay import Training, replay

KEPT = (0.99, 0.95, 0.8, 0.5)


def itself(training: Training, queries: Any, scores: np.ndarray, kept: float, count: int) -> float:
    """LDS against the same training without some samples, whose losses weigh nothing."""
    members = random_subsets(scores.shape[1], count, kept, seed=1)
    losses = []
    for subset in members:
        weights = {int(i): 0.0 for i in np.flatnonzero(~subset)}
        losses.append(queries(training.run(weights)).numpy())
    return lds(scores, members, np.stack(losses), resamples=1).mean


def main() -> None:
    made = Parser(__doc__, threads=2)
    made.add_argument("--roots", type=float, nargs="*", default=[1e-16, 1e-5, 1e-4, 1e-3])
    made.add_argument("--subsets", type=int, default=20, help="retrainings for each kept fraction")
    made.add_argument("--queries", type=int, default=200)
    a = made.start()
    task = truth("digits_mlp")
    real = task.training(FIRST_SEED)
    batch = {key: values[: a.queries] for key, values in task.queries.items()}
    rows = []
    for root in a.roots:
        optimizer = dataclasses.replace(real.optimizer, eps_root=root)
        training = dataclasses.replace(real, optimizer=optimizer)

        def queries(parameters: dict[str, torch.Tensor], training: Training = training) -> torch.Tensor:
            return training.losses(parameters, batch)

        training.run()  # the first one warms up
        start = time.process_time()
        row: dict[str, Any] = {"eps_root": root, "query_loss": float(queries(training.run()).mean())}
        row["training_seconds"] = time.process_time() - start
        start = time.process_time()
        scores = replay(training, queries)
        row["replay_seconds"] = time.process_time() - start
        values = np.zeros((a.queries, task.n_train))  # a sample that was in no batch did nothing
        values[:, scores.data_ids] = scores.values
        row["itself"] = {str(kept): itself(training, queries, values, kept, a.subsets) for kept in KEPT}
        row["truth"] = lds(values, task.members, task.losses[:, : a.queries], resamples=1).mean
        rows.append(row)
        own = "  ".join(f"{kept:.0%}: {value:.3f}" for kept, value in zip(KEPT, row["itself"].values(), strict=True))
        print(
            f"eps_root {root:<8g} query loss {row['query_loss']:.3f}   itself, kept {own}   truth {row['truth']:.3f}   "
            f"{row['replay_seconds']:.1f} s for {len(values)} queries, {row['training_seconds']:.2f} s a training"
        )
    if a.save:
        write("replay", {"subsets": a.subsets, "rows": rows})


if __name__ == "__main__":
    main()
