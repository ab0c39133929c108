"""Refined questions: what damping and the number of iterations do to LDS, and what a product with the curvature takes.

    python benchmarks/refine.py --task text --samples 300 --dampings 0.1 1 --models 1 --save

Factors are those of the true Fisher. `choose` and `report` are two halves of the queries: look for the best setting in
one and read its figure in the other. "s.d." is that of the models' LDS. Seconds are of the processor, for all queries
together. `--exact` adds what no iteration can be nearer to than the inverse itself: the damped Gauss-Newton matrix,
inverted by a Cholesky decomposition over all outputs of all samples (for small models, and minutes for each).
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import leaderboard
import numpy as np
import torch
from _common import Parser, truth, write, written
from _whole import Whole
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from loghook.evaluate.lds import lds


def exact(task: Any, model: nn.Module, dampings: Sequence[float]) -> Iterator[np.ndarray]:
    """Scores (Q, N) with ``(GGN + l)^-1``, l each damping times the mean eigenvalue, GGN of all training samples.

    With J (N C, P) the derivative of all logits, W their curvature and ``B = W^1/2 J``, GGN is ``B^T B / N`` and
    ``(GGN + l)^-1 = (1 - B^T (N l + B B^T)^-1 B) / l``, so that inner products of derivatives are all that it takes.
    """
    parameters = dict(model.named_parameters())
    (samples,), (queries,) = (task.batches(of, None, size) for of, size in (("train", task.n_train), ("query", 10**9)))

    def derivative(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Derivatives of the logits by all parameters (n, C, P), and of the losses by the logits (n, C)."""

        def one(values: dict[str, Tensor], sample: dict[str, Tensor]) -> Tensor:
            alone = {key: value[None] for key, value in sample.items()}
            return task.outputs(lambda *inputs: functional_call(model, values, inputs), alone)[0]

        found = vmap(jacrev(one), (None, 0), chunk_size=100)(parameters, batch)
        leaf = task.outputs(model, batch).detach().requires_grad_()
        slope = torch.autograd.grad(task.loss_from_outputs(leaf, batch), leaf)[0]
        return torch.cat([part.detach().flatten(2) for part in found.values()], 2), slope

    (asked, slope), (j, residuals) = derivative(queries), derivative(samples)
    n, _, width = j.shape
    g = torch.einsum("qc,qcp->qp", slope, asked)
    p = task.outputs(model, samples).detach().softmax(1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    root = vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.mT
    b = (root @ j).flatten(0, 1)
    gram, own, asks = b @ b.T, torch.einsum("nc,ncp->np", residuals, j), g @ b.T
    del j
    plain, crossed, mean = g @ own.T, b @ own.T, float(gram.trace()) / n / width
    for damping in dampings:
        damped = gram.clone()
        damped.diagonal().add_(n * damping * mean)
        solved = torch.cholesky_solve(crossed, torch.linalg.cholesky(damped))
        yield ((plain - asks @ solved) / (damping * mean)).numpy()


def main() -> None:
    made = Parser(__doc__)
    made.add_argument("--task", choices=leaderboard.TASKS, default="digits_mlp")
    made.add_argument("--models", type=int, default=2)
    made.add_argument("--samples", type=int, default=1200, help="that the curvature is taken from")
    made.add_argument("--dampings", type=float, nargs="+", default=[3.0, 10.0, 30.0])
    made.add_argument("--iterations", type=int, nargs="+", default=[1, 2, 3])
    made.add_argument("--exact", action="store_true", help="the inverse itself, too")
    a = made.start()
    task = truth(a.task)
    halves = np.array_split(np.random.default_rng(0).permutation(task.n_query), 2)
    found: dict[tuple[float, Any], list[np.ndarray]] = {}
    seconds: dict[tuple[float, Any], float] = {}
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
        start = time.process_time()
        for damping, scores in zip(a.dampings, exact(task, model, a.dampings) if a.exact else (), strict=False):
            seconds[damping, "exact"], start = time.process_time() - start, time.process_time()
            each = lds(scores, task.members, task.losses, resamples=1).per_query
            found.setdefault((damping, "exact"), []).append(each)
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
        write("refine", written("refine") | {a.task: {"samples": a.samples, "models": a.models, "rows": rows}})


if __name__ == "__main__":
    main()
