"""Whole gradients on a task: factors, scoring passes, refined questions, and scores along the training.

Shapes: N training samples, Q queries.
"""

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _common import silent
from torch import nn

import loghook

State = dict[str, torch.Tensor]


def walk(
    task: Any, model: nn.Module, run: Any, current: loghook.Pass | None = None, size: int = 100, prefix: str = ""
) -> None:
    """One pass of a run (or a scoring) over the training samples; a prefix tells checkpoints' ids apart."""
    for ids in torch.arange(task.n_train).split(size):
        (batch,) = task.batches("train", ids.tolist(), size)
        names = [f"{prefix}{i}" for i in ids.tolist()] if prefix else ids
        with run(data_id=names, **({"mask": batch["mask"]} if "mask" in batch else {})):
            outputs = task.outputs(model, batch)
            if current is not None and current.fisher == "true":
                batch = drawn(task, current, outputs, batch)
            task.loss_from_outputs(outputs, batch).backward()


def drawn(task: Any, current: loghook.Pass, outputs: torch.Tensor, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with labels drawn from the model."""
    if "targets" not in batch:
        return batch | {"y": current.labels(outputs, batch["y"])}
    targets = batch["targets"].clone()
    targets[:, 1:] = current.labels(outputs[:, :-1], targets[:, 1:])
    return batch | {"targets": targets}


def ask(task: Any, model: nn.Module, run: Any) -> loghook.Query:
    """All queries of a task."""
    parts, start = [], 0
    for batch in task.batches("query", None, 50):
        size = len(next(iter(batch.values())))
        with run.query(data_id=list(range(start, start + size))) as query:
            task.loss(model, batch).backward()
        parts.append(query)
        start += size
    return loghook.Query.concat(parts)


class Whole:
    """Factors of whole gradients of one model, or of some checkpoints of it, and scoring passes with them."""

    def __init__(
        self, task: Any, model: nn.Module, fisher: str, folder: str, states: Sequence[State] | None = None
    ) -> None:
        self.task, self.model, start = task, model, time.perf_counter()
        self.states = [model.state_dict()] if states is None else states
        self.fit = loghook.fit(folder, fisher=fisher, overwrite=True)
        with silent(), loghook.frozen(model):
            self.fit.watch(model)
            for current in self.fit.passes():
                for place, state in enumerate(self.states):
                    model.load_state_dict(state)
                    walk(task, model, self.fit, current, prefix=f"{place}/")
            self.query = ask(task, model, self.fit)
        self.seconds = time.perf_counter() - start

    def score(
        self, query: loghook.Query | None = None, states: Sequence[State] | None = None, **options: Any
    ) -> tuple[np.ndarray, float]:
        """Mean over checkpoints, by default those of the factors, of the scores (Q, N); and seconds."""
        start, parts, before = time.perf_counter(), [], copy.deepcopy(self.model.state_dict())
        for state in states or self.states:
            self.model.load_state_dict(state)
            scoring = self.fit.score(query or self.query, **options)
            with loghook.frozen(self.model):
                walk(self.task, self.model, scoring)
            parts.append(scoring.scores())
        self.model.load_state_dict(before)
        return loghook.Scores.combine(parts).values, time.perf_counter() - start

    def itself(self, **options: Any) -> tuple[np.ndarray, float]:
        """Each sample's influence on itself, (N,), and seconds."""
        start, scoring = time.perf_counter(), self.fit.self_influence(**options)
        with loghook.frozen(self.model):
            walk(self.task, self.model, scoring)
        return scoring.scores().values[0], self.seconds + time.perf_counter() - start

    def refine(self, samples: int, **options: Any) -> loghook.Query:
        task = self.task
        chosen = np.random.default_rng(0).permutation(task.n_train)[:samples]
        batches = list(task.batches("train", chosen.tolist(), 50))
        return self.fit.refine(
            self.query, batches, lambda b: task.outputs(self.model, b), task.loss_from_outputs, **options
        )


def source(segments: Sequence[Whole], total: float) -> np.ndarray:
    """SOURCE: segments of equal time, the last with the final model's queries; (Q, N).

    The time of all together is given in units of one over the last segment's mean eigenvalue.
    """
    query, scores = segments[-1].query, 0.0
    time = total / len(segments) / segments[-1].fit.mean_eigenvalue
    for segment in reversed(segments):
        direction, query = segment.fit.unroll(query, time)
        scores = scores + segment.score(direction)[0]
    return scores
