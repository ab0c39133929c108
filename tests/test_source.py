"""SOURCE: factors of several checkpoints, and questions carried back over segments, against exact unrolling."""

import tempfile
import warnings

import pytest
import torch
from torch import nn

import loghook
from loghook.errors import ConfigError, MismatchError
from tests import dense, harness
from tests.oracle import one_sample_gradients
from tests.test_fitted import data, loss_fn, make, raw_moments
from tests.test_whole import ask, close, fit_names, fitted

RATE, STEPS, N = 2e-3, 60, 30


def squares(w, x, y, weights=None):
    """Half squared errors of a linear model, summed with weights."""
    errors = (x @ w - y).square() / 2
    return errors.sum() if weights is None else (errors * weights).sum()


def train(x, y, weights):
    """Full-batch gradient descent on the mean loss: the parameters before each step, and after the last."""
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    path = [w]
    for _ in range(STEPS):
        slope = torch.autograd.grad(squares(w, x, y, weights) / N, w, create_graph=True)[0]
        w = w - RATE * slope
        path.append(w)
    return path


def test_unrolled_scores_are_the_derivative_of_training():
    torch.manual_seed(0)
    x = torch.randn(N, 4, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0, 0.2])
    y, asked_x, asked_y = x[:, 0] - x[:, 1], torch.randn(2, 4, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    weights = torch.ones(N, dtype=torch.float64, requires_grad=True)
    path = train(x, y, weights)
    losses = [squares(path[-1], asked_x[i : i + 1], asked_y[i : i + 1]) for i in range(2)]
    exact = torch.stack([-torch.autograd.grad(loss, weights, retain_graph=True)[0] for loss in losses]).numpy()

    model = nn.Linear(4, 1, bias=False).double()

    def load(w):
        with torch.no_grad():
            model.weight.copy_(w.detach()[None])

    def loss(x, y):
        return (model(x)[:, 0] - y).square().sum() / 2

    # The curvature of squared errors: output gradients of one. It is the same at each step, so that one fit serves all.
    fit = harness.fitted(model, x, lambda m, x: m(x).sum())
    load(path[-1])
    with fit.query(data_id=["a", "b"]) as carried:
        loss(asked_x, asked_y).backward()
    parts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scoring directions at other checkpoints is what they are for
        for w in reversed(path[:-1]):
            direction, carried = fit.unroll(carried, RATE)
            load(w)
            scoring = fit.score(direction)
            with scoring(data_id=list(range(N))):
                loss(x, y).backward()
            parts.append(scoring.scores())
    scores = loghook.Scores.combine(parts, weights=[1 / N] * STEPS)
    assert "source, time 0.002" in scores.method
    # Exact to first order in rate times eigenvalue, which is at most about 2e-3 * 9.
    assert close(scores.values, exact, 1e-2)
    for alone in (parts[0], parts[-1]):  # what all segments say is more than what one does
        assert not close(alone.values * STEPS / N, exact, 1e-1)


def test_directions_are_functions_of_the_dense_curvature():
    model, x = make(), data()
    fit = fitted(model, x)
    query = ask(fit, model, x)
    direction, carried = fit.unroll(query, 0.7)
    gradients, moments = one_sample_gradients(model, loss_fn, x, fit_names(model)), raw_moments(model, x)
    for name, G in gradients.items():
        H = torch.from_numpy(dense.ekfac_matrix({"G": G, "A": moments[name][0], "S": moments[name][1]}))
        n, q = len(H), torch.as_tensor(G[:2]).flatten(1)
        # The exponential of [[-tH, tI], [0, 0]] has that of -tH, and its integral, in its upper half.
        block = torch.zeros(2 * n, 2 * n, dtype=torch.float64)
        block[:n, :n], block[:n, n:] = -0.7 * H, 0.7 * torch.eye(n, dtype=torch.float64)
        power = torch.linalg.matrix_exp(block)
        assert close(direction.rows(name).reshape(2, -1), (q @ power[:n, n:].T).numpy())
        assert close(carried.rows(name).reshape(2, -1), (q @ power[:n, :n].T).numpy())


def test_one_fit_over_several_checkpoints_averages_them():
    first, second, x = make(), make(), data()
    with torch.no_grad():
        second[0].weight.mul_(1.5)
    model = make()
    fit = loghook.fit(tempfile.mkdtemp())
    fit.watch(model)
    for _ in fit.passes():
        for place, checkpoint in enumerate((first, second)):
            model.load_state_dict(checkpoint.state_dict())
            with fit(data_id=[f"{place}/{i}" for i in range(len(x))]):
                loss_fn(model, x).backward()
    found, single = fit._store.factors(), [raw_moments(one, x) for one in (first, second)]
    for name, (inputs, outputs) in found.items():
        for side, factor in enumerate((inputs, outputs)):
            mean = (torch.as_tensor(single[0][name][side]) + torch.as_tensor(single[1][name][side])) / 2
            again = factor.basis * factor.values @ factor.basis.T
            assert torch.allclose(again, mean, rtol=1e-4, atol=1e-6)
    assert fit._store.samples == {"covariance": 80, "eigenvalues": 80}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the factors are of no one checkpoint
        fit.score(ask(fit, model, x))


def test_samples_of_several_checkpoints_under_the_same_ids_are_noticed():
    model, x = make(), data()
    fit = loghook.fit(tempfile.mkdtemp())
    fit.watch(model)
    with pytest.warns(UserWarning, match="40 samples of this covariance pass had ids that came before"):
        for _ in fit.passes():
            for _ in range(2):
                for ids in torch.arange(len(x)).split(10):
                    with fit(data_id=ids):
                        loss_fn(model, x[ids]).backward()


@pytest.mark.parametrize("time", [0, -1.0, float("nan"), float("inf")])
def test_time_must_be_positive(time):
    model, x = make(), data()
    fit = fitted(model, x)
    with pytest.raises(ConfigError, match="learning rates"):
        fit.unroll(ask(fit, model, x), time)


def test_questions_of_other_layers_are_refused():
    model, x = make(), data()
    fit = fitted(model, x)
    other = loghook.fit(tempfile.mkdtemp())
    other.watch(model, include="0")
    with pytest.raises(MismatchError, match="whole gradients"):
        fit.unroll(ask(other, model, x), 1.0)
    assert torch.isfinite(fit.unroll(ask(fit, model, x), 1e6)[0].matrix).all()
