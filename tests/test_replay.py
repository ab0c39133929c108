"""Exact replay against real trainings with torch's own optimisers, whose samples' weights are moved a little."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from loghook.errors import ConfigError
from loghook.evaluate.replay import SGD, Adam, Training, replay

N, QUERIES, BATCH = 10, 4, 4
OPTIMIZERS = {
    "sgd": (SGD(momentum=0.9, weight_decay=0.01), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "adam": (Adam(weight_decay=0.01, eps_root=0.0), torch.optim.Adam, {"weight_decay": 0.01}),
    "adamw": (
        Adam(betas=(0.8, 0.9), eps=1e-3, eps_root=0.0, weight_decay=0.1, decoupled=True),
        torch.optim.AdamW,
        {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    ),
}


def make(width=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()


def data():
    made = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(N + QUERIES, 3, dtype=torch.float64, generator=made),
        torch.randint(2, (N + QUERIES,), generator=made),
    )
    orders = [torch.randperm(N, generator=made) for _ in range(3)]
    return x, y, [ids for order in orders for ids in order.split(BATCH)]  # the last batch of each epoch is smaller


def sample_losses(model, x, y):
    return lambda parameters, ids: F.cross_entropy(
        functional_call(model, parameters, (x[ids],)), y[ids], reduction="none"
    )


def given(optimizer, model=None, rates=None):
    x, y, batches = data()
    model = model or make()
    rates = rates or [0.1 / (1 + t) for t in range(len(batches))]
    losses = sample_losses(model, x, y)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    steps = [(ids, ids) for ids in batches]  # ids as a loader gives them
    training = Training(parameters=parameters, losses=losses, batches=steps, rates=rates, optimizer=optimizer)
    return training, lambda parameters: losses(parameters, torch.arange(N, N + QUERIES))


def retrained(kind, options, weights):
    """Losses of the queries after a real training: (QUERIES,)."""
    x, y, batches = data()
    model = make()
    optimizer = kind(model.parameters(), lr=0.1, **options)
    for t, ids in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)
        optimizer.zero_grad()
        (weights[ids] * F.cross_entropy(model(x[ids]), y[ids], reduction="none")).mean().backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(x[N:]), y[N:], reduction="none"), model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_derivatives_are_those_of_real_retrainings(name):
    optimizer, kind, options = OPTIMIZERS[name]
    training, queries = given(optimizer)
    ones = torch.ones(N, dtype=torch.float64)
    _, model = retrained(kind, options, ones)
    for key, values in training.run().items():
        torch.testing.assert_close(values, model.get_parameter(key).detach(), rtol=1e-10, atol=1e-12)
    scores = replay(training, queries, query_ids=list("abcd"))
    assert scores.query_ids == list("abcd") and sorted(scores.data_ids) == list(range(N))
    step, slopes = 1e-6, torch.empty(QUERIES, N, dtype=torch.float64)
    for i in range(N):
        more, less = (
            retrained(kind, options, ones + sign * step * F.one_hot(torch.tensor(i), N))[0] for sign in (1, -1)
        )
        slopes[:, i] = (more - less) / (2 * step)
    found = torch.from_numpy(scores.values[:, np.argsort(scores.data_ids)]).double()
    assert slopes.abs().max() > 1e-3
    torch.testing.assert_close(found, -slopes, rtol=1e-5, atol=1e-6 * float(slopes.abs().max()))
    heavier = training.run({3: 1.5})
    other = retrained(kind, options, ones + 0.5 * F.one_hot(torch.tensor(3), N))[0]
    torch.testing.assert_close(queries(heavier), other)


@pytest.mark.parametrize("every", [1, 2, 4, 100])
@pytest.mark.parametrize("chunk", [None, 3])
def test_states_kept_and_chunks_change_nothing(every, chunk):
    training, queries = given(Adam())
    expected = replay(training, queries)
    found = replay(training, queries, every=every, chunk=chunk)
    assert expected.query_ids == [0, 1, 2, 3]
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5, atol=1e-9)


def test_a_step_of_ones_own():
    class Signless:
        """Gradient descent that keeps a count and clips smoothly."""

        def start(self, parameters):
            return {"slow": {name: p.clone() for name, p in parameters.items()}}

        def step(self, parameters, state, gradients, rate, t):
            moved = {n: p - rate * torch.tanh(gradients[n]) for n, p in parameters.items()}
            return moved, {"slow": {n: 0.5 * s + 0.5 * moved[n] for n, s in state["slow"].items()}}

    training, queries = given(Signless())
    scores = replay(training, queries)
    step, i = 1e-5, scores.data_ids[2]
    more, less = (queries(training.run({i: 1 + sign * step})) for sign in (1, -1))
    np.testing.assert_allclose(scores.values[:, 2], -(more - less) / (2 * step), rtol=1e-5)


def test_dead_units_need_room_under_the_root():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        model[0].bias[0] = -100
    training, queries = given(Adam(eps_root=0.0), model)
    with pytest.raises(ConfigError, match="eps_root"):
        replay(training, queries)
    training, queries = given(Adam(), model)
    scores = replay(training, queries)
    step, i = 1e-5, scores.data_ids[0]
    more, less = (queries(training.run({i: 1 + sign * step})) for sign in (1, -1))
    np.testing.assert_allclose(scores.values[:, 0], -(more - less) / (2 * step), rtol=1e-4)


def test_wrong_use_is_refused():
    training, queries = given(SGD())
    with pytest.raises(ConfigError, match="8 rates for 9 batches"):
        given(SGD(), rates=[0.1] * 8)
    summed = Training(
        parameters=training.parameters, losses=lambda p, ids: training.losses(p, ids).sum(), batches=training.batches,
        rates=training.rates, optimizer=SGD(),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="one for each of the 4 ids"):
        replay(summed, queries)
    for wrong in ({"every": 0}, {"every": -1}, {"chunk": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            replay(training, queries, **wrong)
    with pytest.raises(ConfigError, match=r"shape \(4,\).*as many query_ids"):
        replay(training, queries, ["a", "b"])
    with pytest.raises(ConfigError, match="ids of type str, and the batches of int"):
        training.run({"1": 0.0})
    named = training.run({1: 0.0})
    assert all(torch.equal(named[name], p) for name, p in training.run({np.int64(1): 0.0}).items())
