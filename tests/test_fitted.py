"""Fitted projections: their matrices against a slow reference, their rows against autograd, and what a run keeps."""

import contextlib
import tempfile

import numpy as np
import pytest
import torch
from torch import nn

import loghook
from loghook.capture.passes import split
from loghook.errors import BatchError, ConfigError, CorruptLogError, MismatchError, NotFiniteError, StateError
from loghook.log import maintain
from loghook.log.files import load_sides
from loghook.project import blocks
from loghook.project.blocks import Factor, cut, second_moment_blocks, take_blocks
from loghook.project.projection import draw_side, shared_input_name
from tests.forked import two_processes
from tests.harness import fitted, log_and_ask, squares
from tests.oracle import one_sample_gradients, project, relative_error


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6, bias=False), nn.Tanh(), nn.Linear(6, 3))
    return model.double()


def data(n=40, tokens=5):
    torch.manual_seed(1)
    return torch.randn(n, tokens, 12, dtype=torch.float64) * torch.linspace(0.1, 3, 12, dtype=torch.float64)


def loss_fn(model, x):
    return model(x).logsumexp(-1).sum()


def fit_and_log(model, x, folder=None, **options):
    folder = folder or tempfile.mkdtemp(prefix="loghook-test-")
    run = loghook.init(folder, **{"rank": 4, "dtype": "float64"} | options)
    run.watch(model)
    kinds = []
    for current in run.passes():
        kinds.append(current.kind)
        for ids in torch.arange(len(x)).split(16):
            with run(data_id=ids):
                loss_fn(model, x[ids]).backward()
    with run.query(data_id=["q"]) as query:
        loss_fn(model, x[:1]).backward()
    run.finalize()
    run.close()
    return loghook.load(folder), query, kinds


def raw_moments(model, x):
    """Second moments of every linear layer's inputs (with a 1 for the bias) and output gradients, by plain hooks."""
    seen = {}

    def hook(name):
        def keep(module, args, y):
            y.retain_grad()
            seen[name] = (args[0].detach(), y, module.bias is not None)

        return keep

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    loss_fn(model, x).backward()
    found = {}
    for name, (inputs, y, bias) in seen.items():
        tokens = inputs.flatten(0, -2)
        if bias:
            tokens = torch.cat([tokens, torch.ones(len(tokens), 1, dtype=tokens.dtype)], 1)
        gradients = y.grad.flatten(0, -2)
        found[name] = (tokens.T @ tokens / len(tokens), gradients.T @ gradients / len(tokens))
    for handle in handles:
        handle.remove()
    return found


def inverse_root(m, damping):
    values, vectors = torch.linalg.eigh(m + damping * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype))
    return vectors @ torch.diag(values**-0.5) @ vectors.T


@pytest.mark.parametrize("kind", ["random", "pca", "whitened", "none"])
def test_the_log_says_what_gradients_were_multiplied_by(kind):
    model, x = make(), data(6)
    log, _, _ = fit_and_log(model, x, projection=kind, seed=3)
    for place in range(6):
        model.zero_grad()
        loss_fn(model, x[place : place + 1]).backward()
        for name in log.layers:
            layer = model.get_submodule(name)
            G = layer.weight.grad if layer.bias is None else torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            p_out, p_in = (np.eye(n) if p is None else p for p, n in zip(log.projection(name), G.shape, strict=True))
            np.testing.assert_allclose(log.rows(name)[place], p_out @ G.numpy() @ p_in.T, rtol=1e-6, atol=1e-6)
    assert kind != "none" or log.projection("0") == (None, None)
    with pytest.raises(ConfigError, match="is not in the log"):
        log.projection("5")


@pytest.mark.parametrize("kind", ["pca", "whitened"])
def test_rows_are_exact_and_the_projection_is_the_formula(kind):
    model, x = make(), data()
    log, _, kinds = fit_and_log(model, x, projection=kind, whitening=0.05)
    assert kinds == ["covariance", "log"]
    sides = load_sides(log.path, log.manifest.fitted)
    moments = raw_moments(model, x)
    gradients = one_sample_gradients(model, loss_fn, x, log.layers)
    for name in log.layers:
        matrices = []
        for side, moment, kind_of in zip(sides[name], moments[name], ("in", "out"), strict=True):
            matrix = torch.eye(side.width).double() if side.matrix is None else side.matrix.double() * side.gain
            matrices.append(matrix)
            if kind == "whitened":
                expected = inverse_root(moment, 0.05)
                if side.width > 4:
                    owner = shared_input_name(name) if kind_of == "in" else name
                    random = draw_side("random", seed=0, name=owner, side=kind_of, width=side.width, rank=4)
                    expected = random.matrix.double() * random.gain @ expected
                assert relative_error(matrix[None], expected[None]) < 1e-6
            elif side.width > 4:
                # Eigenvectors are free in sign: what they span and in which order is not.
                top = torch.linalg.eigvalsh(moment).flip(0)[:4]
                assert torch.allclose(matrix @ moment @ matrix.T, torch.diag(top), atol=1e-5 * float(top[0]))
            else:
                assert side.matrix is None
        rows = torch.from_numpy(log.rows(name)[:].copy())
        assert relative_error(rows, project(gradients[name], matrices[1], matrices[0])) < 1e-9


@pytest.mark.parametrize("kind", ["pca", "whitened"])
def test_fitted_projections_have_the_ranks_of_their_layers(kind):
    model, x = make(), data()
    log, query, _ = fit_and_log(model, x, projection=kind, rank={"2": 2, "*": 5})
    assert {name: log.rows(name).shape[1:] for name in log.layers} == {"0": (5, 5), "2": (2, 2), "4": (3, 5)}
    with log.attach(model).query(data_id=["q"]) as again:
        loss_fn(model, x[:1]).backward()
    assert torch.equal(again.matrix, query.matrix)


def test_whitened_rows_of_full_width_score_as_kfac_with_factored_damping():
    model, x = make(), data()
    log, query, _ = fit_and_log(model, x, projection="whitened", whitening=0.1, rank=13)
    expected = 0
    gradients, moments = one_sample_gradients(model, loss_fn, x, log.layers), raw_moments(model, x)
    for name in log.layers:
        a, s = (m + 0.1 * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype) for m in moments[name])
        solved = torch.linalg.inv(s) @ gradients[name][0] @ torch.linalg.inv(a)
        expected = expected + (gradients[name] * solved).sum((1, 2))
    scores = log.influence(query, method="dot")
    assert scores.method == "dot (whitened)"
    assert np.abs(scores.values[0] - expected.numpy()).max() < 1e-5 * float(expected.abs().max())


def test_query_in_a_new_process_and_saved_query(tmp_path):
    model, x = make(), data()
    log, query, _ = fit_and_log(model, x, projection="whitened", dtype="float32")
    asker = log.attach(model)
    with asker.query(data_id=["q"]) as again:
        loss_fn(model, x[:1]).backward()
    assert again.fingerprint == query.fingerprint == log.fingerprint
    assert torch.equal(again.matrix, query.matrix)
    query.save(tmp_path / "q")
    assert np.array_equal(log.influence(loghook.Query.load(tmp_path / "q")).values, log.influence(query).values)
    assert (query + again).fingerprint == log.fingerprint


def test_projections_fitted_on_other_data_do_not_match():
    model, x = make(), data()
    log, _, _ = fit_and_log(model, x, projection="pca")
    _, query, _ = fit_and_log(model, x[:20], projection="pca")
    with pytest.raises(MismatchError):
        log.influence(query)


def test_inside_training_an_unfitted_projection_is_refused_and_a_fitted_one_taken():
    model, x = make(), data()
    run = loghook.init(tempfile.mkdtemp(), rank=4, projection="whitened")
    run.watch(model)
    with pytest.raises(StateError, match="not fitted yet"), run(data_id=[0]):
        loss_fn(model, x[:1]).backward()
    with pytest.raises(StateError, match="not fitted yet"), run.query(data_id=[0]):
        loss_fn(model, x[:1]).backward()
    first, _, _ = fit_and_log(model, x, projection="whitened", dtype="float64")
    taken = {"rank": 4, "projection": "whitened", "fitted": first.path, "dtype": "float64"}
    log, _ = log_and_ask(tempfile.mkdtemp(), model, loss_fn, x[:16], **taken)
    assert log.fingerprint == first.fingerprint
    for name in log.layers:
        assert np.allclose(log.rows(name)[:], first.rows(name)[:16], rtol=1e-12, atol=1e-12)
    with pytest.raises(MismatchError, match="rank"):
        other = loghook.init(tempfile.mkdtemp(), rank=3, projection="whitened", fitted=first.path)
        other.watch(model)
        next(other.passes())


def test_taken_from_whole_factors():
    model, x = make(), data()
    fit = fitted(model, x, loss_fn)
    fit.close()
    own, _, _ = fit_and_log(model, x, projection="whitened")
    taken, _, kinds = fit_and_log(model, x, projection="whitened", fitted=fit.path)
    assert kinds == ["log"]
    for name in own.layers:
        assert relative_error(torch.tensor(taken.rows(name)[:]), torch.tensor(own.rows(name)[:])) < 1e-5


def test_a_resumed_run_that_is_given_other_layers_leaves_nothing_behind(tmp_path):
    model, x = make(), data()
    run = loghook.init(tmp_path, rank=4, projection="pca")
    run.watch(model)
    for current in run.passes():
        with run(data_id=list(range(16))):
            loss_fn(model, x[:16]).backward()
        if current.kind == "log":
            break
    run.close()
    again, other = loghook.init(tmp_path, rank=4, projection="pca", resume=True), nn.Sequential(nn.Linear(12, 12))
    with pytest.raises(MismatchError, match="other layers"):
        again.watch(other)
    assert not other[0]._forward_hooks and again.layers == ()
    again.watch(model)
    for _ in again.passes():
        with again(data_id=list(range(len(x)))):
            loss_fn(model, x).backward()
    again.finalize()
    assert len(loghook.load(tmp_path)) == len(x)


def test_resumed_after_a_kill_in_either_pass(tmp_path):
    model, x = make(), data()
    whole, _, _ = fit_and_log(model, x, projection="pca")

    def attempt(stop):
        """Log, dying in the block before `stop`; returns whether it came to the end."""
        run = loghook.init(
            tmp_path / "log", rank=4, dtype="float64", projection="pca", resume=True, commit_seconds=1e-6
        )
        run.watch(model)
        blocks_done = 0
        for _ in run.passes():
            for ids in torch.arange(len(x)).split(16):
                if blocks_done == stop:
                    run.close()
                    return False
                if run.pending(ids):
                    with run(data_id=ids):
                        loss_fn(model, x[ids]).backward()
                    blocks_done += 1
        run.finalize()
        run.close()
        return True

    assert [attempt(2), attempt(4), attempt(1), attempt(99)] == [False, False, False, True]
    log = loghook.load(tmp_path / "log")
    assert log.data_ids == whole.data_ids and log.fingerprint == whole.fingerprint
    for name in log.layers:
        assert np.array_equal(log.rows(name)[:], whole.rows(name)[:])
    assert np.allclose(log.moments(), whole.moments(), rtol=1e-12)


def test_the_mask_and_repeats_decide_what_is_fitted():
    model, x = make(), data()
    short = x[:, :3]
    padded = torch.cat([short, 100 * torch.ones_like(x[:, :2])], 1)
    mask = torch.tensor([1, 1, 1, 0, 0]).expand(len(x), 5)

    def log(batches):
        run = loghook.init(tempfile.mkdtemp(), rank=4, dtype="float64", projection="whitened")
        run.watch(model)
        for _ in run.passes():
            for ids, inputs, tokens in batches:
                with run(data_id=ids, mask=tokens):
                    (model(inputs) * (1 if tokens is None else tokens[..., None])).sum().backward()
        run.finalize()
        return load_sides(run.path, loghook.load(run.path).manifest.fitted)

    every = list(range(len(x)))
    plain = log([(every, short, None)])
    masked = log([(every, padded, mask)])
    repeated = log([(every, short, None), ([5, 5], 7 * short[:2], None)])
    for name, sides in plain.items():
        for other in (masked, repeated):
            for side, same in zip(sides, other[name], strict=True):
                assert side.matrix is None or relative_error(same.matrix[None], side.matrix[None]) < 1e-6


def test_wide_layers_are_fitted_by_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    monkeypatch.setattr(cut, "__defaults__", (4,))
    assert [p.stop - p.start for p in cut(13)] == [3, 3, 3, 4]
    model, x = make(), data()
    log, _, _ = fit_and_log(model, x, projection="whitened", rank=13, whitening=0.1)
    sides, moments = load_sides(log.path, log.manifest.fitted), raw_moments(model, x)
    side, moment = sides["0"][0], moments["0"][0]
    expected = torch.zeros_like(moment)
    mean = moment.diagonal().mean()
    for part in cut(13):
        block = moment[part, part]
        values, vectors = torch.linalg.eigh(block + 0.1 * mean * torch.eye(len(block), dtype=block.dtype))
        expected[part, part] = vectors @ torch.diag(values**-0.5) @ vectors.T
    assert relative_error((side.matrix.double() * side.gain)[None], expected[None]) < 1e-6


def test_blocks_of_a_second_moment():
    torch.manual_seed(0)
    z, weight = torch.randn(50, 7, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    full = sum(w * torch.outer(v, v) for v, w in zip(z, weight, strict=True))
    assert torch.allclose(second_moment_blocks(z, weight), take_blocks(full))
    factor = Factor.of(blocks.blocks_of(take_blocks(full), 7))
    assert torch.allclose(factor.basis @ torch.diag(factor.values) @ factor.basis.T, full)


def test_the_stated_error_is_the_error_of_gaussian_inputs():
    torch.manual_seed(0)
    model = nn.Linear(20, 2, bias=False).double()
    run = loghook.init(tempfile.mkdtemp(), rank=4, projection="pca")
    run.watch(model)
    x = torch.randn(400, 20, dtype=torch.float64)
    for current in run.passes():
        if current.kind == "covariance":
            assert current.error == float("inf")
            with run(data_id=list(range(400))):
                model(x).square().sum().backward()
            moment = x.T @ x / 400
            seen = float((moment - torch.eye(20)).norm() / torch.eye(20).norm())
            assert current.error == pytest.approx(seen, rel=0.25)
        else:
            assert current.error == float("inf")  # it needs every sample: nobody may break out of it
            with run(data_id=list(range(400))):
                model(x).square().sum().backward()


def test_an_altered_projection_file_is_found():
    model, x = make(), data()
    log, _, _ = fit_and_log(model, x, projection="pca")
    file = log.path / "projection.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert any("projection.safetensors" in line for line in loghook.load(log.path).verify())
    with pytest.raises(CorruptLogError, match=r"projection\.safetensors"):
        loghook.load(log.path).attach(model)


def test_merged_logs_keep_their_projection(tmp_path):
    model, x = make(), data()
    first, _, _ = fit_and_log(model, x, projection="whitened")
    taken = {"rank": 4, "projection": "whitened", "fitted": first.path, "dtype": "float64"}
    other, _ = log_and_ask(tempfile.mkdtemp(), model, loss_fn, x[:2], ids=[100, 101], **taken)
    maintain.merge(tmp_path / "both", [first.path, other.path])
    both = loghook.load(tmp_path / "both")
    assert len(both) == 42 and not both.verify()
    with both.attach(model).query(data_id=["q"]) as query:
        loss_fn(model, x[:1]).backward()
    assert both.influence(query).values.shape == (1, 42)


class Siblings(nn.Module):
    """They share an input, and their names are not in the order of the alphabet."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 10) for _ in range(3))

    def forward(self, x):
        return (self.q_proj(x) * self.k_proj(x) * self.v_proj(x)).sum(1)


def test_a_projection_of_siblings_stays_the_same_where_it_is_taken_over(tmp_path):
    model, x, path = Siblings(), torch.randn(40, 12), None
    for name, ids in (("a", range(40)), ("b", range(40, 80))):
        log_and_ask(tmp_path / name, model, squares, x, ids=ids, rank=4, projection="pca", fitted=path)
        path = tmp_path / "a"
    maintain.merge(tmp_path / "both", [tmp_path / "a", tmp_path / "b"])
    maintain.compress(tmp_path / "both", tmp_path / "small", "int8")
    for name in ("both", "small"):
        log = loghook.load(tmp_path / name)
        assert len(log) == 80 and not log.verify() and log.fingerprint == loghook.load(path).fingerprint


def test_a_batch_that_is_not_finite_is_not_added():
    model, x = make(), data()
    run = loghook.init(tempfile.mkdtemp(), rank=4, projection="pca")
    run.watch(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    passes = run.passes()
    sums = next(passes)._gathering
    for arguments in ({}, {"scaler": scaler}):
        with (
            pytest.raises(NotFiniteError, match="statistics") if not arguments else contextlib.nullcontext(),
            run(data_id=[0, 1], **arguments),
        ):
            (model(x[:2]) * float("inf")).sum().backward()
        assert not sums.totals and not sums.samples
    with run(data_id=[0, 1], scaler=scaler):
        (loss_fn(model, x[:2]) * 4).backward()
    expected = raw_moments(model, x[:2])["4"][1] * 10
    found = split(run._layers[2], sums.totals["4"])[1].view(3, 3)
    assert sums.samples == 2 and torch.allclose(found, expected)


def test_arguments_are_checked():
    with pytest.raises(ConfigError, match="whitening"):
        loghook.init(tempfile.mkdtemp(), projection="whitened", whitening=0)
    with pytest.raises(ConfigError, match="fitted"):
        loghook.init(tempfile.mkdtemp(), projection="random", fitted="somewhere")


WORKER = """
    import contextlib, sys
    import torch
    import torch.distributed as dist
    import loghook
    from tests.test_distributed import fsdp2
    from tests.test_fitted import data, loss_fn, make
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    x = data()
    for name, model, run in (
        ("log", make(), loghook.init(f"{sys.argv[1]}/log", rank=4, dtype="float64", projection="whitened")),
        ("sharded", fsdp2(make()), loghook.init(f"{sys.argv[1]}/sharded", rank=4, dtype="float64", projection="pca")),
        ("fit", fsdp2(make()), loghook.fit(f"{sys.argv[1]}/fit")),
    ):
        run.watch(model)
        for _ in run.passes():
            for ids in torch.arange(rank, len(x), world).split(7):
                with run(data_id=ids):
                    loss_fn(model, x[ids]).backward()
        if name != "fit":
            run.finalize()
    with run.query(data_id=["q"]) as query:
        loss_fn(model, x[:1]).backward()
    scoring = run.score(query)
    for ids in torch.arange(rank, len(x), world).split(7):
        with scoring(data_id=ids):
            loss_fn(model, x[ids]).backward()
    scoring.scores().save(f"{sys.argv[1]}/scores-{rank}")
    dist.destroy_process_group()
"""


def test_two_processes_fit_what_one_does(tmp_path):
    two_processes(WORKER, tmp_path)
    model, x = make(), data()
    for folder, kind in (("log", "whitened"), ("sharded", "pca")):
        one, _, _ = fit_and_log(model, x, projection=kind)
        two = loghook.load(tmp_path / folder)
        assert sorted(two.data_ids) == one.data_ids
        place = np.argsort(two.data_ids)
        for name in one.layers:
            assert relative_error(torch.tensor(two.rows(name)[:][place]), torch.tensor(one.rows(name)[:])) < 1e-6
    scores = [loghook.Scores.load(tmp_path / f"scores-{rank}") for rank in (0, 1)]
    assert np.array_equal(scores[0].values, scores[1].values)
    assert scores[0].data_ids == scores[1].data_ids and sorted(scores[0].data_ids) == one.data_ids
    fit = loghook.fit(tmp_path / "fit", resume=True)
    fit.watch(model)
    assert list(fit.passes()) == []
    with fit.query(data_id=["q"]) as query:
        loss_fn(model, x[:1]).backward()
    scoring = fit.score(query)
    with scoring(data_id=list(range(len(x)))):
        loss_fn(model, x).backward()
    expected = dict(zip(scoring.scores().data_ids, scoring.scores().values[0], strict=True))
    found = dict(zip(scores[0].data_ids, scores[0].values[0], strict=True))
    assert np.allclose([found[i] for i in range(40)], [expected[i] for i in range(40)], rtol=1e-4)


def test_a_projection_is_taken_with_all_its_arguments(tmp_path):
    model, x = make(), data()
    first, _, _ = fit_and_log(model, x, projection="whitened", whitening=0.01)
    assert first.manifest.whitening == 0.01
    for other, says in (({"seed": 1, "whitening": 0.01}, "seed=1"), ({}, "whitening=0.1")):
        run = loghook.init(tmp_path / says, rank=4, projection="whitened", fitted=first.path, **other)
        run.watch(model)
        with pytest.raises(MismatchError, match=f"where this run has .*{says}"), run(data_id=range(16)):
            loss_fn(model, x[:16]).backward()
        run.close()
    with pytest.raises(MismatchError, match=r"whitening is 0\.01 there and 0\.1 now"):
        loghook.init(first.path, rank=4, dtype="float64", projection="whitened", resume=True).watch(model)


def test_a_mask_counts_tokens(tmp_path):
    model, x = make(), data()
    run = loghook.init(tmp_path, rank=4)
    run.watch(model)
    for wrong in (-1.0, float("nan")):
        mask = torch.ones(16, x.shape[1])
        mask[3, 0] = wrong
        with pytest.raises(BatchError, match="negative numbers or nan"), run(data_id=range(16), mask=mask):
            loss_fn(model, x[:16]).backward()
