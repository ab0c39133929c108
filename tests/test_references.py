"""The references judged on their own: against finite differences, closed forms and special cases."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.dense import (
    Layer,
    cosine,
    ekfac_matrix,
    fisher_matrix,
    influence,
    kfac_matrix,
    lds,
    self_influence,
    spearman,
)
from tests.harness import squares
from tests.oracle import batch_size, one_sample, one_sample_gradients, project, relative_error

VOCABULARY, HIDDEN = 7, 4


class Mixed(nn.Module):
    """Every kind of layer once; `twice` called twice, `asleep` never; `head` may be tied to `embedding`."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.gpt = Conv1D(6, HIDDEN)
        self.conv1 = nn.Conv1d(6, 4, kernel_size=3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(1, 2, kernel_size=(2, 3), padding=(1, 1), bias=False)
        self.conv3 = nn.Conv3d(2, 1, kernel_size=(1, 2, 2))
        self.twice = nn.Linear(HIDDEN, HIDDEN)
        self.asleep = nn.Linear(3, 2)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.gpt(self.embedding(tokens)))  # (B, T, 6)
        h = self.conv1(h.transpose(1, 2))  # (B, 4, T)
        h = torch.tanh(self.conv2(h.unsqueeze(1)))  # (B, 2, 5, T)
        h = self.conv3(h.unsqueeze(2)).squeeze(1).squeeze(1)  # (B, 4, T - 1)
        h = torch.tanh(self.twice(torch.tanh(self.twice(h.transpose(1, 2)))))
        return self.head(h)  # (B, T - 1, V)


LAYERS = ["embedding", "gpt", "conv1", "conv2", "conv3", "twice", "asleep", "head"]
SHAPES = {
    "embedding": (HIDDEN, VOCABULARY),
    "gpt": (6, HIDDEN + 1),
    "conv1": (4, 3 * 3 + 1),
    "conv2": (2, 1 * 2 * 3),
    "conv3": (1, 2 * 1 * 2 * 2 + 1),
    "twice": (HIDDEN, HIDDEN + 1),
    "asleep": (2, 3 + 1),
    "head": (VOCABULARY, HIDDEN),
}


def summed_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def mixed(tied: bool = False, seed: int = 0) -> tuple[Mixed, Tensor]:
    torch.manual_seed(seed)
    model = Mixed(tied).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, torch.randint(VOCABULARY, (3, 5))


def entry(name: str, module: nn.Module, row: int, column: int) -> tuple[nn.Parameter, tuple[int, ...]]:
    """The parameter and its index behind entry (row, column) of a module's gradient, spelt out."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    inputs = SHAPES[name][1] - (bias is not None)
    if bias is not None and column == inputs:
        return bias, (row,)
    if name in ("embedding", "gpt"):
        return weight, (column, row)
    if weight.dim() == 2:
        return weight, (row, column)
    return weight, (row, *(int(i) for i in np.unravel_index(column, weight.shape[1:])))


# --- oracle -------------------------------------------------------------------------------------------------


def test_entries_equal_finite_differences() -> None:
    model, tokens = mixed()
    gradients = one_sample_gradients(model, summed_loss, tokens, LAYERS)
    step = 1e-5
    for name in LAYERS:
        assert gradients[name].shape == (3, *SHAPES[name])
        assert gradients[name].dtype == torch.float64
        some = [(row, column) for row in range(SHAPES[name][0]) for column in range(SHAPES[name][1])]
        some = [*some[::3], some[-1]]  # every third entry, and the last: a bias where there is one
        measured = []
        for row, column in some:
            parameter, index = entry(name, model.get_submodule(name), row, column)
            losses = []
            with torch.no_grad():
                for sign in (1, -1):
                    parameter[index] += sign * step
                    logits = model(tokens).flatten(0, 1)
                    each = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
                    losses.append(each.reshape(3, -1).sum(1))
                    parameter[index] -= sign * step
            measured.append((losses[0] - losses[1]) / (2 * step))
        picked = torch.stack([gradients[name][:, row, column] for row, column in some], dim=1)
        assert relative_error(picked, torch.stack(measured, dim=1)) < 1e-7, name


def test_asleep_gives_zeros_and_everything_asleep_is_an_error() -> None:
    model, tokens = mixed()
    gradients = one_sample_gradients(model, summed_loss, tokens, ["asleep", "head"])
    assert not gradients["asleep"].any()
    assert gradients["head"].any()
    with pytest.raises(ValueError, match="nothing but zeros"):
        one_sample_gradients(model, summed_loss, tokens, ["asleep"])


def test_samples_add_up_to_the_gradient_of_the_batch() -> None:
    model, tokens = mixed()
    gradients = one_sample_gradients(model, summed_loss, tokens, LAYERS)
    summed_loss(model, tokens).backward()
    conv1, embedding = model.conv1, model.embedding
    assert conv1.weight.grad is not None and conv1.bias is not None and conv1.bias.grad is not None
    whole = torch.cat([conv1.weight.grad.flatten(1), conv1.bias.grad[:, None]], dim=1)
    assert relative_error(gradients["conv1"].sum(0)[None], whole[None]) < 1e-12
    assert embedding.weight.grad is not None
    assert relative_error(gradients["embedding"].sum(0).T[None], embedding.weight.grad[None]) < 1e-12


def test_tied_weights_each_give_their_own_contribution() -> None:
    model, tokens = mixed(tied=True)
    assert model.head.weight is model.embedding.weight
    gradients = one_sample_gradients(model, summed_loss, tokens, ["embedding", "head"])

    untied, _ = mixed(tied=False)
    untied.load_state_dict(model.state_dict())
    expected = one_sample_gradients(untied, summed_loss, tokens, ["embedding", "head"])
    for name in ("embedding", "head"):
        assert relative_error(gradients[name], expected[name]) < 1e-13
        alone = one_sample_gradients(model, summed_loss, tokens, [name])
        assert relative_error(alone[name], expected[name]) < 1e-13

    summed_loss(model, tokens).backward()
    both = gradients["embedding"].sum(0).T + gradients["head"].sum(0)
    assert model.head.weight.grad is not None
    assert relative_error(both[None], model.head.weight.grad[None]) < 1e-12


def test_head_row_is_the_sum_over_tokens_of_g_x() -> None:
    model, tokens = mixed(tied=True)
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.update(x=inputs[0].detach(), y=output)

    handle = model.head.register_forward_hook(keep)
    summed_loss(model, tokens).backward()
    handle.remove()
    g = kept["y"].grad
    assert g is not None
    expected = torch.zeros(3, VOCABULARY, HIDDEN, dtype=torch.float64)
    for i in range(3):
        for t in range(g.shape[1]):
            expected[i] += torch.outer(g[i, t], kept["x"][i, t])
    actual = one_sample_gradients(model, summed_loss, tokens, ["head"])["head"]
    assert relative_error(actual, expected) < 1e-12


def test_tied_gpt2_from_transformers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model: Any = GPT2LMHeadModel(config).double().eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    batch = {"input_ids": torch.randint(11, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(**batch).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum")

    names = ["transformer.wte", "transformer.h.0.attn.c_attn", "lm_head"]
    gradients = one_sample_gradients(model, loss_fn, batch, names)
    assert gradients["transformer.h.0.attn.c_attn"].shape == (2, 24, 9)
    loss_fn(model, batch).backward()
    both = gradients["transformer.wte"].sum(0).T + gradients["lm_head"].sum(0)
    assert relative_error(both[None], model.lm_head.weight.grad[None]) < 1e-12
    c_attn = model.transformer.h[0].attn.c_attn
    whole = torch.cat([c_attn.weight.grad.T, c_attn.bias.grad[:, None]], dim=1)
    assert relative_error(gradients["transformer.h.0.attn.c_attn"].sum(0)[None], whole[None]) < 1e-12


def test_module_under_two_names_sums_over_its_calls() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    model.add_module("alias", layer)
    x = torch.randn(2, 3, dtype=torch.float64)
    gradients = one_sample_gradients(model, squares, x, ["0", "alias"])
    model(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(gradients["0"], gradients["alias"])
    assert relative_error(gradients["0"].sum(0)[None, :, :3], layer.weight.grad[None]) < 1e-12


def test_frozen_parameters_get_a_gradient_and_the_model_is_left_as_it_was() -> None:
    model, tokens = mixed(tied=True)
    expected = one_sample_gradients(model, summed_loss, tokens, LAYERS)
    model.requires_grad_(False)
    model.twice.weight.requires_grad_(True)
    before = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    with torch.no_grad():  # even here
        actual = one_sample_gradients(model, summed_loss, tokens, LAYERS)
    for name in LAYERS:
        assert torch.equal(actual[name], expected[name]), name
    after = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    assert list(before) == list(after)
    for name, (identity, required, value) in before.items():
        assert after[name][:2] == (identity, required)
        assert torch.equal(after[name][2], value)
    assert all(p.grad is None for p in model.parameters())
    assert model.head.weight is model.embedding.weight


def test_the_model_is_restored_when_the_loss_raises() -> None:
    model, tokens = mixed(tied=True)

    def broken(model: nn.Module, batch: Tensor) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        one_sample_gradients(model, broken, tokens, LAYERS)
    assert model.head.weight is model.embedding.weight


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "namedtuple", "nested"])
def test_batches_of_every_kind(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    weight = torch.tensor(2.0)  # no axis: passes unchanged
    batch: Any = {
        "tuple": (x, y, weight, "text"),
        "list": [x, y, weight, None],
        "dict": {0: x, 1: y, 2: weight, "ids": ["a", "b", "c", "d"]},
        "namedtuple": Pair(x, y),
        "nested": ((x,), {"y": y}),
    }[kind]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if kind == "nested":
            x_i, y_i = batch[0][0], batch[1]["y"]
        else:
            x_i, y_i = (batch.x, batch.y) if kind == "namedtuple" else (batch[0], batch[1])
        assert len(x_i) == len(y_i) == 1
        return (model(x_i) - y_i).square().sum()

    actual = one_sample_gradients(model, loss_fn, batch, [""])[""]  # "" is the model itself
    g = 2 * (model(x) - y).detach()
    ones = torch.ones(4, 1, dtype=torch.float64)
    expected = torch.einsum("bo,bi->boi", g, torch.cat([x, ones], dim=1))
    assert relative_error(actual, expected) < 1e-12


def test_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="share one first axis"):
        batch_size((torch.zeros(2), torch.zeros(3)))
    with pytest.raises(ValueError, match="share one first axis"):
        batch_size({"a": 1})
    assert one_sample(torch.arange(3), 1).tolist() == [1]
    model, tokens = mixed()
    with pytest.raises(ValueError, match="one number"):
        one_sample_gradients(model, lambda m, b: m(b), tokens, ["head"])
    with pytest.raises(TypeError, match="no layout"):
        one_sample_gradients(nn.LayerNorm(3), lambda m, b: m(b).sum(), torch.zeros(1, 3), [""])


def test_project_is_the_two_sided_product() -> None:
    torch.manual_seed(0)
    g, x = torch.randn(3, 6, 5).double(), torch.randn(3, 6, 4).double()  # (B, T, features)
    p_out, p_in = torch.randn(2, 5).double(), torch.randn(3, 4).double()
    G = torch.einsum("bto,bti->boi", g, x)
    expected = torch.einsum("bto,bti->boi", g @ p_out.T, x @ p_in.T)
    assert relative_error(project(G, p_out, p_in), expected) < 1e-13
    assert torch.equal(project(G, None, None), G)
    assert project(G, p_out, None).shape == (3, 2, 4)
    assert project(G, None, p_in).shape == (3, 5, 3)


def test_relative_error() -> None:
    b = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert relative_error(b, b) == 0
    assert relative_error(b * 1.5, b) == pytest.approx(0.5)
    noisy = torch.tensor([[3.0, 4.0], [5e-6, 0.0]])  # the zero row is judged against tiny * 5
    assert relative_error(noisy, b) == pytest.approx(1.0)
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert relative_error(torch.ones(2, 2), torch.zeros(2, 2)) == float("inf")
    assert relative_error(torch.full((2, 2), float("nan")), b) == float("inf")
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(b, b[:1])


# --- dense --------------------------------------------------------------------------------------------------


def random_layers(seed: int = 0, M: int = 2, N: int = 40) -> tuple[list[Layer], list[np.ndarray]]:
    """Two layers, (3, 4) and (2, 5) wide, from tokens: rows, factors and queries that belong together."""
    rng = np.random.default_rng(seed)
    rows: list[Layer] = []
    queries: list[np.ndarray] = []
    for k_o, k_i in ((3, 4), (2, 5)):
        x = rng.normal(size=(N, 6, k_i)) @ rng.normal(size=(k_i, k_i))
        g = rng.normal(size=(N, 6, k_o)) @ rng.normal(size=(k_o, k_o))
        rows.append(
            {
                "G": np.einsum("nto,nti->noi", g, x),
                "A": np.einsum("nti,ntj->ij", x, x) / (N * 6),
                "S": np.einsum("nto,ntp->op", g, g) / (N * 6),
            }
        )
        queries.append(rng.normal(size=(M, k_o, k_i)))
    return rows, queries


def test_dot_and_totals() -> None:
    rows, queries = random_layers()
    for method in ("dot", "fisher", "kfac", "ekfac"):
        scores = influence(method, rows, queries)
        assert scores.layers.shape == (2, 2, 40)
        np.testing.assert_allclose(scores.total, scores.layers.sum(0))
    expected = sum(np.einsum("moi,noi->mn", q, r["G"]) for q, r in zip(queries, rows, strict=True))
    np.testing.assert_allclose(influence("dot", rows, queries).total, expected)


def test_kron_convention() -> None:
    """Undamped, H^-1 vec(Q) = vec(S^-1 Q A^-1); H is the Fisher of rows g x^T, g and x independent."""
    rows, queries = random_layers()
    scores = influence("kfac", rows, queries, damping=0.0)
    for layer, (row, query) in enumerate(zip(rows, queries, strict=True)):
        for m, q in enumerate(query):
            preconditioned = np.linalg.inv(row["S"]) @ q @ np.linalg.inv(row["A"])
            expected = [np.trace(preconditioned.T @ g) for g in row["G"]]
            np.testing.assert_allclose(scores.layers[layer, m], expected, rtol=1e-9, atol=1e-9)
    xs, gs = np.random.default_rng(1).normal(size=(4, 3)), np.random.default_rng(2).normal(size=(5, 2))
    all_pairs: Layer = {
        "G": np.array([np.outer(g, x) for g in gs for x in xs]),
        "A": np.mean([np.outer(x, x) for x in xs], axis=0),
        "S": np.mean([np.outer(g, g) for g in gs], axis=0),
    }
    np.testing.assert_allclose(kfac_matrix(all_pairs), fisher_matrix(all_pairs), atol=1e-12)
    np.testing.assert_allclose(ekfac_matrix(all_pairs), fisher_matrix(all_pairs), atol=1e-12)


def test_kfac_damping_is_added_to_the_product_of_eigenvalues() -> None:
    rows, queries = random_layers()
    scores = influence("kfac", rows, queries, damping=0.3)
    for layer, (row, query) in enumerate(zip(rows, queries, strict=True)):
        values_a, Q_A = np.linalg.eigh(row["A"])
        values_s, Q_S = np.linalg.eigh(row["S"])
        products = np.outer(values_s, values_a)
        damped = products + 0.3 * values_s.mean() * values_a.mean()
        for m, q in enumerate(query):
            preconditioned = Q_S @ ((Q_S.T @ q @ Q_A) / damped) @ Q_A.T
            expected = [(preconditioned * g).sum() for g in row["G"]]
            np.testing.assert_allclose(scores.layers[layer, m], expected, rtol=1e-9)


def test_ekfac_divides_elementwise_in_the_eigenbasis() -> None:
    rows, queries = random_layers()
    scores = influence("ekfac", rows, queries, damping=0.2)
    for layer, (row, query) in enumerate(zip(rows, queries, strict=True)):
        Q_A, Q_S = np.linalg.eigh(row["A"])[1], np.linalg.eigh(row["S"])[1]
        turned = np.einsum("po,npq,qi->noi", Q_S, row["G"], Q_A)
        lambdas = (turned**2).mean(0)
        query_turned = np.einsum("po,mpq,qi->moi", Q_S, query, Q_A) / (lambdas + 0.2 * lambdas.mean())
        expected = np.einsum("moi,noi->mn", query_turned, turned)
        np.testing.assert_allclose(scores.layers[layer], expected, rtol=1e-9)


def test_corrected_eigenvalues_are_the_diagonal_of_the_fisher_in_that_basis() -> None:
    rows, _ = random_layers()
    for row in rows:
        U = np.kron(np.linalg.eigh(row["S"])[1], np.linalg.eigh(row["A"])[1])
        expected = U @ np.diag(np.diag(U.T @ fisher_matrix(row) @ U)) @ U.T
        np.testing.assert_allclose(ekfac_matrix(row), expected, atol=1e-10 * np.abs(expected).max())


def test_fisher_by_the_woodbury_identity() -> None:
    rows, queries = random_layers(N=5)  # fewer rows than width: H is singular, the damping carries it
    scores = influence("fisher", rows, queries, damping_abs=0.7)
    for layer, (row, query) in enumerate(zip(rows, queries, strict=True)):
        V = row["G"].reshape(5, -1) / np.sqrt(5)
        inverse = (np.eye(V.shape[1]) - V.T @ np.linalg.inv(0.7 * np.eye(5) + V @ V.T) @ V) / 0.7
        expected = query.reshape(2, -1) @ inverse @ row["G"].reshape(5, -1).T
        np.testing.assert_allclose(scores.layers[layer], expected, rtol=1e-9)


@pytest.mark.parametrize("method", ["fisher", "kfac", "ekfac"])
def test_relative_damping_is_times_each_layers_mean_eigenvalue(method: str) -> None:
    matrix = {"fisher": fisher_matrix, "kfac": kfac_matrix, "ekfac": ekfac_matrix}[method]
    rows, queries = random_layers()
    for row, query in zip(rows, queries, strict=True):
        mean = np.linalg.eigvalsh(matrix(row)).mean()
        relative = influence(method, [row], [query], damping=0.1).total
        np.testing.assert_allclose(relative, influence(method, [row], [query], damping_abs=0.1 * mean).total, rtol=1e-9)
    whole = influence(method, rows, queries, damping=0.1).layers
    np.testing.assert_allclose(whole[1], influence(method, rows[1:], queries[1:], damping=0.1).total)


@pytest.mark.parametrize("method", ["dot", "fisher", "kfac", "ekfac"])
def test_self_influence_is_the_diagonal(method: Any) -> None:
    rows, queries = random_layers()
    square = influence(method, rows, [row["G"] for row in rows]).total
    own = self_influence(method, rows)
    assert own.shape == (40,) and (own > 0).all()
    np.testing.assert_allclose(own, np.diag(square), rtol=1e-9)
    np.testing.assert_allclose(square, square.T, rtol=1e-6, atol=1e-9 * own.max())

    unit = cosine(square, own, own, "unit")
    np.testing.assert_allclose(np.diag(unit), 1)
    assert (np.abs(unit) <= 1 + 1e-9).all()

    scores = influence(method, rows, queries).total
    query_own = self_influence(method, rows, queries)
    assert query_own.shape == (2,)
    both, one_side = cosine(scores, query_own, own, "unit"), cosine(scores, query_own, own, "relatif")
    np.testing.assert_allclose(one_side, scores / np.sqrt(own)[None])
    np.testing.assert_allclose(both, one_side / np.sqrt(query_own)[:, None])


def test_zero_rows_and_sleeping_layers() -> None:
    rows, queries = random_layers()
    asleep: Layer = {"G": np.zeros((40, 2, 2)), "A": np.zeros((2, 2)), "S": np.zeros((2, 2))}
    for method in ("fisher", "kfac", "ekfac"):
        scores = influence(method, [*rows, asleep], [*queries, np.ones((2, 2, 2))])
        np.testing.assert_allclose(scores.total, influence(method, rows, queries).total)
        assert not scores.layers[2].any()
    assert cosine([[0.0, 2.0]], [4.0], [0.0, 1.0], "unit").tolist() == [[0.0, 1.0]]


def test_spearman_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, size=30), rng.integers(0, 5, size=30)  # many ties
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


def test_lds_sign_and_range() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 20))
    masks = rng.random((50, 20)) < 0.5
    losses = 5 - masks @ scores.T  # a proponent in the subset lowers the loss
    assert lds(scores, masks, losses) == pytest.approx(1)
    assert lds(-scores, masks, losses) == pytest.approx(-1)
    assert lds(scores, masks, np.exp(losses)) == pytest.approx(1)  # ranks only
    assert abs(lds(rng.normal(size=(3, 20)), masks, losses)) < 0.5
    losses[:, 0] = 1.0  # a query that nothing moves counts as 0
    assert lds(scores, masks, losses) == pytest.approx(2 / 3)


def test_lds_of_a_real_model_is_near_one_for_its_exact_influence() -> None:
    """Ridge regression retrained on halves: inverse-Hessian scores rank the halves, sign included."""
    rng = np.random.default_rng(0)
    N, M, d, ridge = 60, 5, 3, 1.0
    X, truth = rng.normal(size=(N + M, d)), rng.normal(size=d)
    y = X @ truth + rng.normal(size=N + M)

    def fit(rows: np.ndarray) -> np.ndarray:
        return np.linalg.solve(X[rows].T @ X[rows] + ridge * np.eye(d), X[rows].T @ y[rows])

    w = fit(np.arange(N))
    gradients = (X @ w - y)[:, None] * X  # of the squared error's half, (N + M, d)
    H = X[:N].T @ X[:N] + ridge * np.eye(d)
    scores = gradients[N:] @ np.linalg.solve(H, gradients[:N].T)
    masks = np.array([rng.permutation(N) < N // 2 for _ in range(60)])
    losses = np.array([(X[N:] @ fit(np.flatnonzero(mask)) - y[N:]) ** 2 / 2 for mask in masks])
    assert lds(scores, masks, losses) > 0.8
