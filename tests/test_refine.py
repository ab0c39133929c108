"""Gauss-Newton products, solvers and re-ranking against dense matrices."""

import gc
import tempfile
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import loghook
from loghook.errors import CheckpointWarning, ConfigError, MismatchError, UnsupportedError
from loghook.whole import refine
from loghook.whole.refine import GaussNewton, conjugate_gradients
from tests.harness import log_and_ask, log_batch


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)).double()


def data(n=24, tokens=2):
    torch.manual_seed(1)
    return torch.randn(n, tokens, 5, dtype=torch.float64), torch.randint(3, (n, tokens))


def outputs_of(model):
    return lambda batch: model(batch[0])


def loss_of(outputs, batch):
    return F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten(), reduction="sum")


def dense_gauss_newton(model, x):
    """Mean over samples of J^T H J, in the columns of a whole-gradient row, one output at a time."""
    total = 0
    for sample in x:
        for token in sample:
            y = model(token)
            rows = []
            for one in y:
                parts = []
                for layer in model:
                    if isinstance(layer, nn.Linear):
                        w = torch.autograd.grad(one, layer.weight, retain_graph=True)[0]
                        b = [] if layer.bias is None else [torch.autograd.grad(one, layer.bias, retain_graph=True)[0]]
                        parts.append(torch.cat([w, *(t[:, None] for t in b)], 1).flatten())
                rows.append(torch.cat(parts))
            J, p = torch.stack(rows), y.detach().softmax(0)
            total = total + J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
    return total / len(x)


def fitted(model, x, y):
    fit = loghook.fit(tempfile.mkdtemp(), fisher="true")
    fit.watch(model)
    for current in fit.passes():
        with fit(data_id=list(range(len(x)))):
            logits = model(x)
            loss_of(logits, (x, current.labels(logits, y))).backward()
    with fit.query(data_id=["a", "b"]) as query:
        loss_of(model(x[:2]), (x[:2], y[:2])).backward()
    return fit, query


def test_products_are_those_of_the_dense_matrix():
    model, (x, y) = make(), data()
    fit, query = fitted(model, x, y)
    batches = [(x[:10], y[:10]), (x[10:13], y[10:13]), (x[13:], y[13:])]
    for p in model.parameters():
        p.requires_grad_(False)
    matrix = GaussNewton(fit._layers, fit._layout, batches, outputs_of(model), loss_of)
    torch.manual_seed(2)
    vectors = torch.randn(3, query.matrix.shape[1], dtype=torch.float64)
    found = matrix.times(vectors)
    assert not any(p.requires_grad for p in model.parameters())
    for p in model.parameters():
        p.requires_grad_(True)
    expected = vectors @ dense_gauss_newton(model, x)
    assert torch.allclose(found, expected, atol=1e-10)
    mean = sum(matrix.estimate(vectors, step) for step in range(3, 6)) / 3
    assert torch.allclose(mean, expected, atol=1e-10)  # right on average, however batches differ in size


class Attending(nn.Module):
    """Attention, normalisation and a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.out, self.idle = nn.Linear(5, 12), nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(5, 2)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(self.norm(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


@pytest.mark.parametrize("graph_bytes", [1, 2**28])
def test_one_vector_at_a_time_and_many_are_the_same(monkeypatch, graph_bytes):
    monkeypatch.setattr(refine, "GRAPH_BYTES", graph_bytes)
    torch.manual_seed(0)
    model, (x, y) = Attending().double(), data(6, tokens=3)
    fit = loghook.fit(tempfile.mkdtemp())
    fit.watch(model, may_sleep="idle")
    matrix = GaussNewton(fit._layers, fit._layout, [(x[:4], y[:4]), (x[4:], y[4:])], outputs_of(model), loss_of)
    vectors = torch.randn(5, fit._layout.width, dtype=torch.float64)
    parameters = {name: p for name, p in model.named_parameters() if "norm" not in name and "idle" not in name}

    def forward(values):
        return torch.func.functional_call(model, values, (x,))

    J = torch.func.jacrev(forward)(parameters)  # {name: (6, 3, 3, *shape)}
    columns = [torch.cat([J[f"{n}.weight"], J[f"{n}.bias"][..., None]], -1).flatten(3) for n in ("qkv", "out")]
    J = torch.cat(columns, -1)
    p = model(x).detach().softmax(-1)
    H = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    dense = torch.einsum("stca,stcd,stdb->ab", J, H, J) / len(x)
    used = len(dense)
    assert torch.allclose(matrix.times(vectors)[:, :used], vectors[:, :used] @ dense, atol=1e-10)
    assert (matrix.times(vectors)[:, used:] == 0).all()


def test_questions_help_each_other_and_may_repeat():
    torch.manual_seed(3)
    root = torch.randn(60, 40, dtype=torch.float64) * torch.logspace(0, -2, 40)

    @dataclass
    class Plain:
        """A system without a preconditioner, that counts products."""

        products: int = 0

        def times(self, u):
            self.products += 1
            return u @ (root.T @ root + 1e-3 * torch.eye(40))

        def precondition(self, r):
            return r.clone()

    g = torch.randn(8, 40, dtype=torch.float64) * torch.logspace(-6, 6, 8)[:, None]
    g[3], g[5] = g[2] * 4, 0
    expected = torch.linalg.solve(root.T @ root + 1e-3 * torch.eye(40), g.T).T
    counts = []
    for questions in (g[:1], g):
        system = Plain()
        u, residuals = conjugate_gradients(system, questions, 200, 1e-14)
        counts.append(system.products)
        assert residuals[-1] <= 1e-5 and len(residuals) == system.products + 1 < 200
        wanted = expected[: len(questions)]
        errors = (u - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30)
        assert errors.max() < 1e-5
    assert counts[1] < counts[0] / 2


def test_convolutions_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    x = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    fit = loghook.fit(tempfile.mkdtemp())
    fit.watch(model)
    matrix = GaussNewton(fit._layers, fit._layout, [x], model, lambda o, _: o.square().sum() / 2)
    torch.manual_seed(2)
    vector = torch.randn(1, 2 * 5 + 2 * 9, dtype=torch.float64)
    J = []  # the loss's own second derivative is the identity
    for sample in x:
        for one in model(sample[None])[0]:
            w1, b1, w2, b2 = torch.autograd.grad(one, list(model.parameters()), retain_graph=True)
            rows = (torch.cat([w1.flatten(1), b1[:, None]], 1), torch.cat([w2, b2[:, None]], 1))
            J.append(torch.cat([r.flatten() for r in rows]))
    J = torch.stack(J)
    assert torch.allclose(matrix.times(vector), vector @ J.T @ J / len(x), atol=1e-10)


@pytest.mark.parametrize(("solver", "iterations"), [("cg", 200), ("astra", 500)])
def test_refined_questions_solve_the_damped_system(solver, iterations):
    model, (x, y) = make(), data()
    fit, query = fitted(model, x, y)
    batches = [(x, y)] if solver == "cg" else [(x[::2], y[::2]), (x[1::2], y[1::2])]
    u = fit.refine(
        query, batches, outputs_of(model), loss_of, solver=solver, iterations=iterations, damping_abs=0.05,
        tolerance=1e-16,
    )  # fmt: skip
    matrix = dense_gauss_newton(model, x)
    expected = torch.linalg.solve(matrix + 0.05 * torch.eye(len(matrix)), query.matrix.T).T
    assert (u.matrix - expected).norm() / expected.norm() < (1e-6 if solver == "cg" else 1e-3)
    assert u.direction.startswith(solver)
    scoring = fit.score(u)
    with scoring(data_id=list(range(len(x)))):
        loss_of(model(x), (x, y)).backward()
    with fit.query(data_id=list(range(len(x)))) as rows:
        loss_of(model(x), (x, y)).backward()
    scores = scoring.scores()
    assert np.allclose(scores.values, (u.matrix @ rows.matrix.T).numpy(), rtol=1e-4, atol=1e-5)
    assert u.direction in scores.method
    with pytest.raises(ConfigError, match="preconditioned already"):
        fit.score(u, method="ekfac")


def test_stochastic_steps_come_nearer_where_batches_differ():
    model, (x, y) = make(), data(60)
    x = x * torch.logspace(-1, 0.5, 60, dtype=x.dtype)[:, None, None]  # the last batches have the most curvature by far
    fit, query = fitted(model, x, y)
    batches = list(zip(x.split(3), y.split(3), strict=True))
    matrix = dense_gauss_newton(model, x)
    expected = torch.linalg.solve(matrix + 0.01 * torch.eye(len(matrix)), query.matrix.T).T

    def error(iterations):
        u = fit.refine(
            query, batches, outputs_of(model), loss_of, solver="astra", iterations=iterations, damping_abs=0.01
        )
        residual = query.matrix - u.matrix @ matrix - 0.01 * u.matrix
        residual = float((residual.norm(dim=1) / query.matrix.norm(dim=1)).mean())
        assert u.direction == f"astra, damping_abs 0.01, {iterations} iterations, residual {residual:.2g}"
        return float((u.matrix - expected).norm() / expected.norm())

    batches[-3:] = [tuple(torch.cat(parts) for parts in zip(*batches[-3:], strict=True))]  # a larger one, too
    errors = [error(iterations) for iterations in (1, 200, 1000)]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.1, errors


def test_saved_directions_say_what_they_are(tmp_path):
    model, (x, y) = make(), data()
    fit, query = fitted(model, x, y)
    u = fit.refine(query, [(x, y)], outputs_of(model), loss_of, iterations=2)
    u.save(tmp_path / "u")
    again = loghook.Query.load(tmp_path / "u")
    assert again.direction == u.direction and torch.equal(again.matrix, u.matrix)
    with pytest.raises(MismatchError, match="preconditioned"):
        u + query
    with pytest.raises(ConfigError, match="solver"):
        fit.refine(query, [(x, y)], outputs_of(model), loss_of, solver="newton")
    with pytest.raises(ConfigError, match="no batches"):
        fit.refine(query, [], outputs_of(model), loss_of)


def test_a_log_does_not_precondition_refined_questions_again(tmp_path):
    model, (x, y) = make(), data()
    fit, query = fitted(model, x, y)
    u = fit.refine(query, [(x, y)], outputs_of(model), loss_of, iterations=2)
    log = log_batch(model, lambda m, b: loss_of(m(b[0]), b), (x, y), projection="none")
    for options in ({}, {"method": "cosine"}, {"method": "dot", "normalize": "unit"}):
        with pytest.raises(ConfigError, match="preconditioned already"):
            log.influence(u, **options)
    scores = log.influence(u, "dot")
    rows = np.concatenate([log.rows(name)[:].reshape(len(x), -1) for name in log.layers], 1)
    assert np.allclose(scores.values, u.matrix.numpy() @ rows.T, rtol=1e-5) and scores.method == u.direction
    with pytest.raises(ConfigError, match="preconditioned already"):
        loghook.evaluate.trust(log, u, nulls=0, k=3)
    with pytest.raises(ConfigError, match="chance questions are not preconditioned"):
        loghook.evaluate.trust(log, u, "dot", k=3)
    assert loghook.evaluate.trust(log, u, "dot", nulls=0, k=3).correlation == pytest.approx(1)


def test_reranking_gives_the_order_of_whole_gradients():
    model, (x, y) = make(), data(60)
    fit, query = fitted(model, x, y)
    log, small = log_and_ask(
        tempfile.mkdtemp(), model, lambda m, b: loss_of(m(b[0]), b), (x, y), (x[:2], y[:2]),
        ids=[f"s{i}" for i in range(60)], query_ids="ab", rank=2,
    )  # fmt: skip
    rough = log.influence(small)
    asked = []

    def batches(ids):
        asked.extend(ids)
        index = torch.tensor([int(i[1:]) for i in ids])
        for part in index.split(16):
            yield [f"s{i}" for i in part.tolist()], (x[part], y[part])

    def packed(ids):
        for names, (x_BSI, y_BS) in batches(ids):  # all samples of a batch in one row
            row = x_BSI.flatten(0, 1)[None], y_BS.flatten()[None]
            yield names, row, {"segments": torch.arange(len(names)).repeat_interleave(2)[None]}

    with pytest.raises(ConfigError, match="is a function here"):
        fit.rerank(rough, query, [([0], None)], lambda b: loss_of(model(b[0]), b))
    with pytest.raises(ConfigError, match="per_layer=True has no place"):
        fit.rerank(rough, query, batches, lambda b: loss_of(model(b[0]), b), per_layer=True)
    better = fit.rerank(rough, query, batches, lambda b: loss_of(model(b[0]), b), top=30)
    assert len(asked) == len(set(asked)) <= 60
    again = fit.rerank(rough, query, packed, lambda b: loss_of(model(b[0]), b), top=30)
    assert np.allclose(again.values, better.values, rtol=1e-6)
    scoring = fit.score(query)
    with scoring(data_id=[f"s{i}" for i in range(60)]):
        loss_of(model(x), (x, y)).backward()
    exact = scoring.scores()
    for q in range(2):
        candidates = {record.data_id for record in rough.top(30)[q]}
        expected = [r for r in exact.top(60)[q] if r.data_id in candidates]
        assert [r.data_id for r in better.top(30)[q]] == [r.data_id for r in expected]
        assert np.allclose([r.score for r in better.top(30)[q]], [r.score for r in expected], rtol=1e-4)


def test_a_product_keeps_nothing_of_the_graphs_that_it_went_through():
    model, (x, y) = make(), data()
    (fit, query), seen = fitted(model, x, y), []

    def outputs(batch):
        seen.append(weakref.ref(made := model[:2](batch[0])))  # saved by the operation that made it
        return model[2:](made)

    fit.refine(query, [(x, y)], outputs, loss_of, iterations=1)
    gc.collect()
    assert seen and all(reference() is None for reference in seen)


def test_a_mean_loss_is_refused():
    model, (x, y) = make(), data()
    fit, query = fitted(model, x, y)
    with pytest.raises(ConfigError, match="sum over the batch"):
        fit.refine(query, [(x, y)], outputs_of(model), lambda outputs, batch: loss_of(outputs, batch) / len(outputs))
    with pytest.raises(ConfigError, match="no function that yields them"):
        fit.refine(query, lambda: [(x, y)], outputs_of(model), loss_of)


def test_rounding_of_a_narrow_loss_is_no_mean():
    model, (x, y) = make(), data()
    fit, query = fitted(model, x, y)

    def narrow(outputs, batch):
        return loss_of(outputs.bfloat16(), batch)

    def outputs(batch):
        return model(batch[0]).bfloat16().double() if torch.is_grad_enabled() else model(batch[0]).bfloat16()

    assert fit.refine(query, [(x, y)], outputs, narrow, iterations=1).direction


class Shared(nn.Module):
    """Two layers with one weight, or with two of the same values; `excluded` or not, each has its own share."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        if tied:
            self.second.weight = self.first.weight
        else:
            self.second.weight.data.copy_(self.first.weight)

    def forward(self, x):
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("exclude", [(), "first"], ids=["both watched", "one watched"])
def test_layers_that_share_a_weight_have_their_own_shares(exclude):
    (x, y), found = data(), []
    for tied in (True, False):
        model = Shared(tied).double()
        before = [id(p) for p in model.parameters()]
        fit = loghook.fit(tempfile.mkdtemp())
        fit.watch(model, exclude=exclude)
        for _ in fit.passes():
            with fit(data_id=list(range(len(x)))):
                loss_of(model(x), (x, y)).backward()
        with fit.query(data_id=["a", "b"]) as query:
            loss_of(model(x[:2]), (x[:2], y[:2])).backward()
        found.append(fit.refine(query, [(x, y)], outputs_of(model), loss_of, damping_abs=0.05, iterations=50).matrix)
        assert [id(p) for p in model.parameters()] == before
    assert torch.allclose(*found, rtol=1e-8, atol=1e-10)


class Once(torch.autograd.Function):
    """A tanh whose backward autograd cannot follow, as a kernel's."""

    @staticmethod
    def forward(ctx, x):
        ctx.y = torch.tanh(x)
        return ctx.y

    @staticmethod
    def backward(ctx, g):
        return (g.detach() * (1 - ctx.y.detach().square())).clone()


class Kernel(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_what_cannot_be_refined_is_refused_before_it_is_wrong():
    model, (x, y) = make(), data()
    fit, query = fitted(model, x, y)
    one = fit.refine(query, [(x, y)], outputs_of(model), loss_of)

    def refused(match, outputs=None, loss=loss_of, kind=ConfigError, asked=None, **options):
        with pytest.raises(kind, match=match):
            fit.refine(asked or query, [(x, y)], outputs or outputs_of(model), loss, **options)

    refused("negative along a question", loss=lambda y, b: -y.square().sum())
    refused("depends on no watched layer", outputs=outputs_of(make()))
    refused("a dict", outputs=lambda b: {"logits": model(b[0])})
    refused("without a graph", outputs=lambda b: model(b[0]).detach())
    refused("second derivative", loss=lambda y, b: y.sum())
    refused("one number", loss=lambda y, b: y.square())
    refused("refined already", asked=one)
    for options in ({"tolerance": -1}, {"step": 0.0}, {"momentum": 1.0}):
        refused(next(iter(options)), **options)
    with pytest.raises(ConfigError, match="preconditioned"):
        fit.unroll(one, 1.0)
    with pytest.raises(ConfigError, match="are carried"):
        fit.score(fit.unroll(query, 1.0)[1])
    assert fit.unroll(fit.unroll(query, 1.0)[1], 1.0)

    noisy = nn.Sequential(*model[:2], nn.Dropout(0.5), *model[2:])
    refused("call model.eval", outputs=outputs_of(noisy))
    model[1] = Kernel()
    refused("cannot be differentiated twice", kind=UnsupportedError)
    alone = nn.Sequential(nn.Linear(5, 4), Kernel(), nn.Linear(4, 3)).double()
    fit, query = fitted(alone, x, y)
    refused("cannot be differentiated twice", outputs=outputs_of(alone), kind=UnsupportedError)


def test_refining_leaves_batch_statistics_alone():
    model, (x, y) = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(2), nn.Linear(4, 3)).double().eval(), data()
    fit, query = fitted(model, x, y)
    model.train()
    before = model[1].running_mean.clone()
    with pytest.raises(UnsupportedError, match="mixes the samples"):
        fit.refine(query, [(x, y)], outputs_of(model), loss_of)
    assert torch.equal(model[1].running_mean, before)


def test_samples_are_counted_by_hand_where_tensors_do_not_say():
    model, (x, y) = make(), data()
    fit, query = fitted(model, x, y)
    expected = fit.refine(query, [(x, y)], outputs_of(model), loss_of).matrix
    packed = x.reshape(12, 4, 5), y.reshape(12, 4)
    with fit.query(data_id=["a", "b"], segments=torch.tensor([[0, 0, 1, 1]])) as query:
        loss_of(model(packed[0][:1]), (packed[0][:1], packed[1][:1])).backward()
    with pytest.raises(ConfigError, match=r"samples=.*segments="):
        fit.refine(query, [packed], outputs_of(model), loss_of)
    again = fit.refine(query, [packed], outputs_of(model), loss_of, samples=lambda batch: 2 * len(batch[0])).matrix
    assert torch.allclose(again, expected, rtol=1e-6, atol=1e-9)


def test_a_fit_that_is_taken_up_again_still_wants_samples_counted_by_hand():
    model, (x, y) = make(), data(8)
    fit = loghook.fit(tempfile.mkdtemp())
    fit.watch(model)
    for _ in fit.passes():
        with fit(data_id=list(range(16)), segments=torch.arange(16).view(8, 2)):
            loss_of(model(x), (x, y)).backward()
    again = loghook.fit(fit.path, resume=True)
    again.watch(model)
    with again.query(data_id=["a"]) as query:
        loss_of(model(x[:1]), (x[:1], y[:1])).backward()
    with pytest.raises(ConfigError, match=r"samples=.*segments="):
        again.refine(query, [(x, y)], outputs_of(model), loss_of)
    with pytest.raises(ConfigError, match="0 samples in all"):
        again.refine(query, [(x, y)], outputs_of(model), loss_of, samples=lambda batch: 0)


def test_curvature_of_another_checkpoint_warns():
    model, (x, y) = make(), data()
    fit, query = fitted(model, x, y)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.warns(CheckpointWarning, match="curvature is taken at other parameter values"):
        fit.refine(query, [(x, y)], outputs_of(model), loss_of, iterations=1)


def test_compiled_models_are_refined_as_they_are():
    model, (x, y) = make(), data()
    fit, query = fitted(model, x, y)
    expected = fit.refine(query, [(x, y)], outputs_of(model), loss_of).matrix
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(fit.refine(query, [(x, y)], outputs_of(compiled), loss_of).matrix, expected)


def test_outputs_without_spread_masked_ones_and_half_precision_are_refined():
    model, (x, y) = make(), data()
    fit, query = fitted(model, x, y)
    expected = fit.refine(query, [(x, y)], outputs_of(model), loss_of).matrix
    closed = torch.tensor([0.0, 0.0, 0.0, -torch.inf], dtype=torch.float64)

    def masked(batch):  # a class that no sample has
        logits = model(batch[0])
        return torch.cat([logits, logits[..., :1]], -1) + closed

    assert torch.allclose(fit.refine(query, [(x, y)], masked, loss_of).matrix, expected)
    summed = fit.refine(query, [(x, y)], outputs_of(model), lambda o, b: loss_of(o, b).view(1)).matrix
    assert torch.allclose(summed, expected)

    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    values = torch.randn(24, 1)
    fit, squared = loghook.fit(tempfile.mkdtemp()), lambda o, b: (o - b[1]).square().sum()
    fit.watch(narrow)
    x = x[:, 0].float()
    for _ in fit.passes():
        with fit(data_id=list(range(24))):
            squared(narrow(x), (x, values)).backward()
    with fit.query(data_id=["a"]) as query:
        squared(narrow(x[:1]), (x[:1], values[:1])).backward()
    wide = fit.refine(query, [(x[:1], values[:1]), (x[1:], values[1:])], outputs_of(narrow), squared).matrix

    def half(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return narrow(batch[0]).float()

    rounded = fit.refine(query, [(x, values)], half, squared).matrix
    assert (rounded - wide).norm() < 0.05 * wide.norm()
