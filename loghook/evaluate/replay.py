"""Exact replay of a small training (MAGIC; Ilyas and Engstrom 2025): what each sample's weight did to each query.

In the loss of every step each sample has a weight, which was 1. The derivative of a query's loss *after* training by
these weights is followed backwards through all steps (Engstrom et al. 2025), with vector-Jacobian products of the step.
Nothing is approximated, so that it is a reference for small models: it speaks of this one training, with its
initialisation and its order, given as pure functions.

Shape suffixes: B samples of a batch, N training samples, Q queries.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from loghook.arguments import plain, whole
from loghook.errors import ConfigError
from loghook.influence.scores import Scores
from loghook.progress import bar

Tensors = dict[str, Tensor]


class Optimizer(Protocol):
    """A differentiable optimiser: pure functions that change nothing in place."""

    def start(self, parameters: Tensors) -> Any:
        """Return the state before the first step: tensors, in tuples or dicts of any depth."""

    def step(self, parameters: Tensors, state: Any, gradients: Tensors, rate: float, t: int) -> tuple[Tensors, Any]:
        """Return parameters and state after step t = 0, 1, ..."""


@dataclass(frozen=True, kw_only=True)
class SGD:
    """``torch.optim.SGD`` with momentum and weight decay, as an ``Optimizer``."""

    momentum: float = 0.0
    weight_decay: float = 0.0

    def start(self, parameters: Tensors) -> Tensors:
        return {n: torch.zeros_like(p) for n, p in parameters.items()}

    def step(self, parameters: Tensors, state: Tensors, gradients: Tensors, rate: float, t: int) -> tuple[Tensors, Any]:
        decay = self.weight_decay
        state = {n: self.momentum * state[n] + gradients[n] + decay * p for n, p in parameters.items()}
        return {n: p - rate * state[n] for n, p in parameters.items()}, state


@dataclass(frozen=True, kw_only=True)
class Adam:
    """``torch.optim.Adam`` or, with ``decoupled`` weight decay, ``AdamW``, as an ``Optimizer``.

    ``eps_root`` is added to the second moment inside the root, whose slope at 0 is infinite: with 0 an entry that never
    had a gradient (of a dead unit) makes everything nan. It smooths the steps of entries with gradients below its root.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 1e-16
    weight_decay: float = 0.0
    decoupled: bool = False

    def start(self, parameters: Tensors) -> tuple[Tensors, Tensors]:
        zeros = {n: torch.zeros_like(p) for n, p in parameters.items()}
        return zeros, dict(zeros)

    def step(self, parameters: Tensors, state: Any, gradients: Tensors, rate: float, t: int) -> tuple[Tensors, Any]:
        (b1, b2), (means, squares) = self.betas, state
        coupled, decay = (0.0, rate * self.weight_decay) if self.decoupled else (self.weight_decay, 0.0)
        g = {n: gradients[n] + coupled * p for n, p in parameters.items()}
        means = {n: b1 * m + (1 - b1) * g[n] for n, m in means.items()}
        squares = {n: b2 * v + (1 - b2) * g[n] ** 2 for n, v in squares.items()}
        c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        roots = {n: (v / c2 + self.eps_root).sqrt() + self.eps for n, v in squares.items()}
        return {n: p * (1 - decay) - rate * means[n] / c1 / roots[n] for n, p in parameters.items()}, (means, squares)


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training as pure functions; each step is on the mean of its batch's losses.

    Attributes:
        parameters: at the start, by name.
        losses: (parameters, batch) -> the loss of each sample, (B,); the same whenever it is called (no dropout).
        batches: for each step the samples' ids and the batch.
        rates: the learning rate of each step.
        optimizer: ``SGD``, ``Adam``, or anything with their two methods.
    """

    parameters: Tensors
    losses: Callable[[Tensors, Any], Tensor]
    batches: Sequence[tuple[Sequence[Any], Any]]
    rates: Sequence[float]
    optimizer: Optimizer

    def __post_init__(self) -> None:
        batches = [(np.asarray(ids).tolist(), batch) for ids, batch in self.batches]  # tensors and arrays have no hash
        object.__setattr__(self, "batches", batches)
        if not self.batches or len(self.rates) != len(self.batches):
            raise ConfigError(f"{len(self.rates)} rates for {len(self.batches)} batches: pass one for each step.")

    def advance(self, t: int, parameters: Tensors, state: Any, weights_B: Tensor) -> tuple[Tensors, Any]:
        """Return parameters and state after step t with a weight for each sample's loss."""
        batch = self.batches[t][1]

        def mean(parameters: Tensors) -> Tensor:
            losses_B = self.losses(parameters, batch)
            if losses_B.shape != weights_B.shape:
                raise ConfigError(f"losses {tuple(losses_B.shape)} must be one for each of the {len(weights_B)} ids.")
            return (weights_B * losses_B).mean()

        return self.optimizer.step(parameters, state, torch.func.grad(mean)(parameters), self.rates[t], t)

    def weights(self, t: int, by_id: Mapping[Any, float]) -> Tensor:
        """Weights of the samples of step t, (B,): those given by id, and else 1."""
        return next(iter(self.parameters.values())).new_tensor([by_id.get(i, 1.0) for i in self.batches[t][0]])

    def run(self, weights: Mapping[Any, float] | None = None) -> Tensors:
        """Train, perhaps with other weights for some ids, and return the last parameters."""
        kinds = [{type(plain(i)) for i in ids} for ids in (weights or (), (i for ids, _ in self.batches for i in ids))]
        if not kinds[0] <= kinds[1]:
            names = [" and ".join(sorted(kind.__name__ for kind in found)) for found in kinds]
            raise ConfigError(f"weights has ids of type {names[0]}, and the batches of {names[1]}: make them alike.")
        parameters, state = self.parameters, self.optimizer.start(self.parameters)
        for t in range(len(self.batches)):
            parameters, state = self.advance(t, parameters, state, self.weights(t, weights or {}))
        return parameters


def replay(
    training: Training,
    queries: Callable[[Tensors], Tensor],
    query_ids: Sequence[Any] | None = None,
    *,
    every: int | None = None,
    chunk: int | None = None,
) -> Scores:
    """Score every training sample for every query by the exact derivative through the training.

    Args:
        training: goes forwards, again between the states that are kept, and backwards.
        queries: last parameters -> the loss of each query, (Q,).
        query_ids: one for each query; by default 0, 1, ...
        every: a state is kept at every so many steps, and those between are computed again; by default about the root
            of the number of steps, which takes the least memory. 1 keeps all.
        chunk: queries that go backwards at the same time; all by default.

    Returns:
        Scores (Q, N), samples in the order in which they are first met: minus the derivative of the query's loss by the
        weight of the sample's, so that a sample that lowers it is positive. Memory holds Q times parameters and state.

    Raises:
        ConfigError: losses of a wrong shape, or derivatives that are not finite.
    """
    steps = len(training.batches)
    every = math.isqrt(steps) if every is None else whole("every", every)
    chunk = None if chunk is None else whole("chunk", chunk)
    point: tuple[Tensors, Any] = (training.parameters, training.optimizer.start(training.parameters))
    ones, checkpoints = [training.weights(t, {}) for t in range(steps)], []
    for t in range(steps):
        if t % every == 0:
            checkpoints.append(point)
        point = training.advance(t, *point, ones[t])
    losses_Q, pull = torch.func.vjp(lambda parameters, _: queries(parameters), *point)[:2]
    if losses_Q.dim() != 1 or (query_ids is not None and len(query_ids) != len(losses_Q)):
        raise ConfigError(
            f"queries(parameters) has shape {tuple(losses_Q.shape)}: return one loss for each query, (Q,), and pass as "
            "many query_ids, or none."
        )
    adjoint = torch.vmap(pull, chunk_size=chunk)(torch.eye(len(losses_Q)).to(losses_Q))
    column = {i: n for n, i in enumerate(dict.fromkeys(i for ids, _ in training.batches for i in ids))}
    slopes_QN = losses_Q.new_zeros(len(losses_Q), len(column))
    with bar(None, "replaying", "steps", steps) as progress:
        for first in reversed(range(0, steps, every)):
            points = [checkpoints.pop()]
            for t in range(first, min(first + every, steps) - 1):
                points.append(training.advance(t, *points[-1], ones[t]))
            for t in reversed(range(first, first + len(points))):
                pull = torch.func.vjp(partial(training.advance, t), *points.pop(), ones[t])[1]
                *adjoint, slopes_QB = torch.vmap(pull, chunk_size=chunk)(tuple(adjoint))
                columns = torch.tensor([column[i] for i in training.batches[t][0]], device=slopes_QN.device)
                slopes_QN.index_add_(1, columns, slopes_QB)
                progress.update()
    if not bool(torch.isfinite(slopes_QN).all()):
        raise ConfigError(
            "derivatives through the training are not finite: with Adam pass a larger eps_root (as 1e-12), and look "
            "for roots and quotients at zero in losses."
        )
    return Scores(
        values=-slopes_QN.float().cpu().numpy(),
        query_ids=list(range(len(losses_Q)) if query_ids is None else query_ids),
        data_ids=list(column),
        method="replay",
        fingerprint="",
        log=f"a training of {steps} steps",
    )
