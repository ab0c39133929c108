"""Scores against dense references, and what must not change them: repetition, batch, shard and block size."""

import contextlib
import copy
import gc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loghook
from loghook import evaluate
from loghook.errors import CheckpointWarning, ConfigError, CorruptLogError, MismatchError
from loghook.influence import engine, precondition, products
from loghook.influence.scores import strongest
from loghook.influence.solvers import Identity
from loghook.log import reader
from tests import dense
from tests.harness import Largest, log_and_ask, log_batch, sides, whole

METHODS = ("dot", "fisher", "kfac", "ekfac", "shampoo")


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)).double()


def loss_fn(model, x):
    return model(x).pow(3).sum()


def data(n, seed=1):
    return torch.randn(n, 3, 5, generator=torch.Generator().manual_seed(seed)).double()


def make_log(path, n=40, **options):
    model, options = make_model(), {"rank": 4, "dtype": "float64", "size": 8} | options
    log, query = log_and_ask(path, model, loss_fn, data(n), data(3, seed=2), query_ids="abc", **options)
    return log, query, model


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("log") / "run")


def token_factors(log, model, x, mask=None):
    """A and S of every layer from plain hooks, projected by hand: means over the tokens that count."""
    inputs, gradients, handles = {}, {}, []
    modules = dict(model.named_modules())
    for name in log.layers:
        handles.append(
            modules[name].register_forward_hook(lambda m, a, y, name=name: inputs.update({name: a[0].detach()}))
        )
        handles.append(
            modules[name].register_full_backward_hook(lambda m, gi, go, name=name: gradients.update({name: go[0]}))
        )
    loss_fn(model, x.clone().requires_grad_()).backward()
    for handle in handles:
        handle.remove()
    keep = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    out = {}
    for spec in log.manifest.layers:
        p_out, p_in = (whole(side) for side in sides(log, spec.name))
        z, g = inputs[spec.name][keep], gradients[spec.name][keep]
        if spec.bias:
            z = torch.cat([z, torch.ones(len(z), 1).double()], 1)
        z, g = z if p_in is None else z @ p_in.T, g if p_out is None else g @ p_out.T
        out[spec.name] = (z.T @ z / len(z), g.T @ g / len(g))
    return out


def as_dense(log, model, x, mask=None):
    factors = token_factors(log, model, x, mask)
    return [{"G": log.rows(n)[:], "A": factors[n][0].numpy(), "S": factors[n][1].numpy()} for n in log.layers]


@pytest.mark.parametrize("damping", [{"damping": 0.1}, {"damping": 0.01}, {"damping_abs": 0.3}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_scores_against_dense_references(logged, method, damping):
    log, query, model = logged
    layers = as_dense(log, model, data(40))
    queries = [query.rows(name) for name in log.layers]
    reference = dense.influence(method, layers, queries, **damping)
    scores = log.influence(query, method, per_layer=True, **damping)
    np.testing.assert_allclose(scores.values, reference.total, rtol=1e-5, atol=1e-7 * np.abs(reference.total).max())
    np.testing.assert_allclose(scores.by_layer, reference.layers, rtol=1e-5, atol=1e-7 * np.abs(reference.layers).max())
    own = dense.self_influence(method, layers, **damping)
    np.testing.assert_allclose(log.self_influence(method, **damping), own, rtol=1e-5)
    for kind in ("unit", "relatif"):
        expected = dense.cosine(reference.total, dense.self_influence(method, layers, queries, **damping), own, kind)
        values = log.influence(query, method, normalize=kind, **damping).values
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())


def test_fisher_with_more_rows_than_values_uses_the_same_formula(tmp_path):
    log, query, model = make_log(tmp_path, n=80, rank=2)
    layers = as_dense(log, model, data(80))
    reference = dense.influence("fisher", layers, [query.rows(name) for name in log.layers])
    assert max(spec.width for spec in log.manifest.layers) < len(log)
    np.testing.assert_allclose(log.influence(query, "fisher").values, reference.total, rtol=1e-5)


def test_fisher_in_groups_of_layers_that_fit_in_memory(logged, monkeypatch, tmp_path):
    log, query, _ = logged
    whole_fit = log.influence(query, "fisher", normalize="unit").values
    monkeypatch.setattr(precondition, "FIT_BYTES", 1)
    np.testing.assert_array_equal(loghook.load(log.path).influence(query, "fisher", normalize="unit").values, whole_fit)


def test_masked_tokens_do_not_count_in_the_factors(tmp_path):
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 1, 0]]).repeat(10, 1)
    model, options = make_model(), {"block": {"mask": mask}, "rank": 4, "dtype": "float64"}
    log, _ = log_and_ask(tmp_path, model, loss_fn, data(40), **options)
    with log.attach(model) as asker, asker.query(data_id=range(3)) as query:
        loss_fn(model, data(3, seed=2)).backward()
    layers = as_dense(log, model, data(40), mask)
    reference = dense.influence("ekfac", layers, [query.rows(name) for name in log.layers])
    np.testing.assert_allclose(log.influence(query, "ekfac").values, reference.total, rtol=1e-5, atol=1e-5)


def test_cosine_is_dot_at_unit_norm(logged):
    log, query, _ = logged
    rows = np.concatenate([log.rows(n)[:].reshape(len(log), -1) for n in log.layers], 1)
    q = np.concatenate([query.rows(n).reshape(len(query), -1) for n in log.layers], 1)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(log.influence(query, "cosine").values, unit(q) @ unit(rows).T, rtol=1e-5)
    relatif = log.influence(query, "cosine", normalize="relatif").values
    np.testing.assert_allclose(relatif, q @ unit(rows).T, rtol=1e-5)


@pytest.mark.parametrize("method", (*METHODS, "cosine"))
def test_same_call_twice_gives_the_same_numbers(logged, method):
    log, query, _ = logged
    first = log.influence(query, method).values
    log.self_influence(method)
    log.influence(query, method, damping=0.7)
    np.testing.assert_array_equal(log.influence(query, method).values, first)
    np.testing.assert_array_equal(loghook.load(log.path).influence(query, method).values, first)


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 40),
    shard_rows=st.integers(1, 50),
    block=st.integers(1, 50),
    dtype=st.sampled_from(["float64", "float32"]),
)
def test_batch_shard_and_block_size_change_nothing_beyond_rounding(
    logged, tmp_path_factory, batch, shard_rows, block, dtype
):
    log, query, _ = logged
    folder = tmp_path_factory.mktemp("sizes") / "run"
    width = log.layout.width
    other, _, _ = make_log(folder, size=batch, dtype=dtype, shard_bytes=shard_rows * width * 8)
    tolerance = 1e-6 if dtype == "float64" else 1e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "BLOCK_BYTES", block * width * 8)
        for method in METHODS:
            expected = log.influence(query, method).values
            np.testing.assert_allclose(
                other.influence(query, method).values, expected, atol=tolerance * np.abs(expected).max()
            )


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 3e-3)])
def test_narrow_rows_score_alike(logged, tmp_path, dtype, tolerance):
    log, query, _ = logged
    narrow, _, _ = make_log(tmp_path, dtype=dtype)
    for method in METHODS:
        a, b = log.influence(query, method).values, narrow.influence(query, method).values
        assert np.abs(a - b).max() <= tolerance * np.abs(a).max()
    expected = np.dtype({"float32": "float32", "bfloat16": "float32", "float16": "float16"}[dtype])
    assert narrow.rows(narrow.layers[0]).dtype == np.asarray(narrow.rows(narrow.layers[0])).dtype == expected


@pytest.mark.parametrize("method", (*METHODS, "cosine"))
def test_top_keeps_the_best_without_all_scores(logged, method):
    log, query, _ = logged
    full, best = log.influence(query, method), log.influence(query, method, top=7)
    assert best.values.shape == best.places.shape == (3, 7)
    for a, b in zip(full.top(7), best.top(7), strict=True):
        assert [r.data_id for r in a] == [r.data_id for r in b]
        assert [r.score for r in a] == pytest.approx([r.score for r in b])
    with pytest.raises(loghook.LoghookError, match="keep only the best"):
        best.bottom(1)
    assert log.influence(query, method, top=1000).values.shape == (3, 40)


def test_top_in_small_blocks(logged, monkeypatch):
    log, query, _ = logged
    expected = log.influence(query, "ekfac").top(5)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 3 * log.layout.width * 8)
    found = log.influence(query, "ekfac", top=5).top(5)
    assert [[r.data_id for r in q] for q in found] == [[r.data_id for r in q] for q in expected]


@pytest.mark.parametrize("top", [None, 2])
def test_a_late_score_that_is_not_finite_is_not_lost_among_the_best(logged, monkeypatch, top):
    log, query, _ = logged
    monkeypatch.setattr(reader, "BLOCK_BYTES", 3 * log.layout.width * 8)
    floats, blocks = products._floats, []

    def broken(*args):
        multiply = floats(*args)

        def multiplied(block):
            blocks.append(len(block))
            scores = multiply(block)
            scores[1, 0] = float("nan") if sum(blocks) == len(log) else scores[1, 0]
            return scores

        return multiplied

    monkeypatch.setattr(products, "_floats", broken)
    with pytest.raises(loghook.LoghookError, match="scores are not finite"):
        log.influence(query, "dot", top=top)
    assert len(blocks) == 14


def test_layers_restricts_to_some(logged):
    log, query, _ = logged
    full = log.influence(query, "ekfac", per_layer=True)
    some = log.influence(query, "ekfac", layers=[log.layers[0], log.layers[2]])
    np.testing.assert_allclose(some.values, full.by_layer[[0, 2]].sum(0), rtol=1e-5, atol=1e-7)
    assert some.layers == (log.layers[0], log.layers[2])
    np.testing.assert_allclose(full.by_layer.sum(0), full.values, rtol=1e-4, atol=1e-6)


def test_positive_score_means_training_on_the_row_lowers_the_loss(tmp_path):
    """A small gradient step on one row changes each question's loss by minus the step times the score."""
    log, query, _ = make_log(tmp_path, rank=7)  # no layer is wider: nothing is projected
    scores, x, questions, step = log.influence(query, "dot"), data(40), data(3, seed=2), 1e-6
    for row in (0, 7, 31):
        model = make_model()
        loss_fn(model, x[row : row + 1]).backward()
        before = [loss_fn(model, q[None]).item() for q in questions]
        with torch.no_grad():
            for p in model.parameters():
                p -= step * p.grad
        change = [loss_fn(model, q[None]).item() - b for q, b in zip(questions, before, strict=True)]
        np.testing.assert_allclose(change, -step * scores.values[:, row], rtol=1e-3)


def test_scores_carry_their_provenance_and_come_back_from_disk(logged, tmp_path):
    log, query, _ = logged
    for options in ({}, {"top": 4}, {"per_layer": True}):
        scores = log.influence(query, "ekfac", damping=0.2, normalize="relatif", **options)
        scores.save(tmp_path / "s.safetensors")
        back = loghook.Scores.load(tmp_path / "s.safetensors")
        for key in ("query_ids", "data_ids", "layers", "method", "normalize", "damping", "damping_abs", "fingerprint"):
            assert getattr(back, key) == getattr(scores, key)
        np.testing.assert_array_equal(back.values, scores.values)
        assert back.top(3) == scores.top(3)
    assert scores.query_ids == ["a", "b", "c"] and scores.data_ids == list(range(40))
    assert scores.fingerprint == log.fingerprint and "lowers" in scores.sign
    assert scores.values.dtype == np.float32
    assert "ekfac" in repr(scores)


def test_a_saved_file_with_a_flipped_bit_is_never_read_as_good(logged, tmp_path):
    log, query, _ = logged
    scores = log.influence(query, "dot")
    scores.save(tmp_path / "scores")
    query.save(tmp_path / "query")
    for name, load in (("scores", loghook.Scores.load), ("query", loghook.Query.load)):
        data, rng = (tmp_path / name).read_bytes(), np.random.default_rng(0)
        for place in rng.integers(len(data), size=150):
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(rng.integers(8))
            (tmp_path / "damaged").write_bytes(damaged)
            try:
                back = load(tmp_path / "damaged")
            except (ConfigError, CorruptLogError):
                continue
            if name == "scores":  # what is left are spaces between the header and the values
                assert np.array_equal(back.values, scores.values) and repr(back) == repr(scores)
            else:
                assert torch.equal(back.matrix, query.matrix) and back.data_ids == query.data_ids


def test_scores_in_another_order(logged, tmp_path):
    log, query, _ = logged
    scores = log.influence(query, "ekfac", per_layer=True)
    turned = scores.align(np.array(log.data_ids[::-1][:7]), ["c", "a"])
    turned.save(tmp_path / "turned")
    assert turned.data_ids == log.data_ids[::-1][:7] and turned.query_ids == ["c", "a"]
    assert np.array_equal(turned.values, scores.values[[2, 0]][:, ::-1][:, :7])
    assert np.allclose(turned.by_layer.sum(0), turned.values, atol=1e-5)
    assert turned.top(1)[1][0].score == turned.values[1].max()
    best = log.influence(query, "ekfac", top=4)
    assert "3 queries x best 4 of 40 rows" in repr(best) and "3 queries x 40 rows" in repr(scores)
    assert best.align(query_ids=["b"]).top(4) == [best.top(4)[1]]
    with pytest.raises(ConfigError, match="without top"):
        best.align(log.data_ids)
    mixed = scores.align([np.int64(3), torch.tensor(1), 2])
    assert mixed.data_ids == [3, 1, 2] and {type(i) for i in mixed.data_ids} == {int}
    mixed.save(tmp_path / "mixed")
    for ids, says in (([0, "0"], "'0' was not scored"), ([1, 1], "1 is asked for more than once")):
        with pytest.raises(MismatchError, match=says):
            scores.align(ids)


@pytest.mark.parametrize("n", [1, 7, 300])
def test_the_strongest_are_those_of_a_stable_sort(n):
    values = np.random.default_rng(n).integers(0, 9, n).astype(np.float32)
    for k in (1, 3, n, n + 5):
        assert strongest(values, k).tolist() == np.argsort(-values, kind="stable")[:k].tolist()


def test_counts_and_ids_that_make_no_sense_are_refused(logged):
    log, query, _ = logged
    scores = log.influence(query, "dot")
    for k in (0, -1):
        with pytest.raises(ConfigError, match=f"k={k}"):
            scores.distinct(k)
    with pytest.raises(MismatchError, match="is asked for more than once"):
        scores.align([1, 1, 2])


def test_layers_by_pattern(logged):
    log, query, _ = logged
    two, same = (log.influence(query, "ekfac", layers=layers) for layers in (["0", "2"], "[02]"))
    assert two.layers == same.layers == ("0", "2") and np.array_equal(two.values, same.values)
    every = log.influence(query, "ekfac", layers="*")
    assert every.layers == log.layers and np.array_equal(every.values, log.influence(query, "ekfac").values)
    with pytest.raises(ConfigError, match=r"'mlp\.\*' fits no layer of the log"):
        log.influence(query, layers=["mlp.*"])


def test_hooks_of_an_asker_go_with_it(logged):
    log, _, model = logged

    def count():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = count()
    with log.attach(model) as asker:
        assert count() > before
    assert count() == before
    asker = log.attach(model)
    del asker
    gc.collect()
    assert count() == before


@pytest.mark.parametrize("spread", [0, 6, 12])
def test_small_rows_are_no_rounding_of_large_ones(tmp_path, spread):
    """fisher of fewer rows than values: every row is all of itself, however small it is beside the others."""
    torch.manual_seed(0)
    model, n = nn.Linear(30, 20, bias=False), 24
    sizes = torch.logspace(0, -spread, n)[:, None].double()
    x, g = (torch.randn(n, width, dtype=torch.float64) for width in (30, 20))
    loss = lambda m, x: (m(x) * g * sizes).sum()  # noqa: E731
    log, query = log_and_ask(tmp_path, model.double(), loss, x, x, projection="none", dtype="float64")
    rows = log.rows(log.layers[0])[:].reshape(n, -1)
    damping = 0.1 * (rows**2).sum() / n / rows.shape[1]
    gram = rows @ rows.T
    dense = (gram - gram @ np.linalg.solve(n * damping * np.eye(n) + gram, gram)) / damping
    own = np.sqrt(np.diag(dense))
    np.testing.assert_allclose(
        log.influence(query, "fisher", normalize="unit").values, dense / np.outer(own, own), atol=1e-5
    )


@pytest.mark.parametrize("method", ["kfac", "ekfac", "shampoo"])
def test_rows_beside_far_larger_ones_keep_their_scores(tmp_path, method):
    """In float64 nothing is taken for rounding."""
    torch.manual_seed(0)
    model, n = nn.Sequential(nn.Linear(13, 8), nn.Tanh(), nn.Linear(8, 5)), 100
    x, sizes = torch.randn(n, 13), torch.ones(n, 1)
    sizes[[17, 80]] = 1e6
    log, query = log_and_ask(
        tmp_path / "run", model, lambda m, batch: (m(batch[0]).square() * batch[1]).sum(), (x, sizes),
        (torch.randn(5, 13), torch.ones(5, 1)), projection="none",
    )  # fmt: skip
    log.compress(tmp_path / "wide", "float64", queries=2)
    wide = loghook.load(tmp_path / "wide")
    small = (sizes == 1)[:, 0].numpy()
    for damping in (0.1, 1e-3):
        found, expected = (one.influence(query, method, damping=damping).values[:, small] for one in (log, wide))
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_layers_whose_gradients_vanish_have_a_self_influence(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), torch.randn(30, 8)
    loss = lambda m, x: m(x).square().sum() * 1e-20  # noqa: E731
    log, query = log_and_ask(tmp_path, model, loss, x, x, projection="none")
    for method in ("kfac", "ekfac", "shampoo"):
        assert np.isfinite(log.self_influence(method)).all()
        unit = log.influence(query, method, normalize="unit").values
        np.testing.assert_allclose(np.diag(unit), 1, atol=1e-3)


def test_to_pandas(logged):
    log, query, _ = logged
    table = log.influence(query, "dot").to_pandas()
    assert list(table.columns) == ["query_id", "data_id", "score"] and len(table) == 120
    best = table[table.query_id == "b"].sort_values("score", ascending=False).iloc[0]
    assert best.data_id == log.influence(query, "dot").top(1)[1][0].data_id


def test_queries_of_a_loader_concatenate_save_and_load(logged, tmp_path):
    log, whole_query, model = logged
    asker = log.attach(model)
    parts = []
    for i, name in enumerate("abc"):
        with asker.query(data_id=[name]) as part:
            loss_fn(model, data(3, seed=2)[i : i + 1]).backward()
        parts.append(part)
    asker.close()
    other = copy.copy(parts[1])  # another question of the same name
    other.fill(parts[2].matrix, other.made, other.parameters)
    assert loghook.Query.concat([parts[1], other]).data_ids == ["b", "b"]
    joined = loghook.Query.concat(part for part in (*parts, parts[1]))  # a sampler fills its last batch with repeats
    assert joined.data_ids == (parts[0] + parts[1] + parts[2]).data_ids == whole_query.data_ids
    torch.testing.assert_close(joined.matrix, whole_query.matrix)
    joined.save(tmp_path / "q.safetensors")
    loaded = loghook.Query.load(tmp_path / "q.safetensors")
    assert (loaded.matrix == joined.matrix).all() and loaded.fingerprint == log.fingerprint
    np.testing.assert_array_equal(loaded.rows("0"), joined.rows("0"))
    np.testing.assert_array_equal(log.influence(loaded).values, log.influence(joined).values)


def test_query_from_another_checkpoint_warns(logged):
    log, *_ = logged
    other = make_model(seed=5)
    with pytest.warns(UserWarning, match="checkpoint"):
        asker = log.attach(other)
    with asker.query(data_id=["q"]) as moved:
        loss_fn(other, data(1)).backward()
    with pytest.warns(UserWarning, match="other parameter values"):
        log.influence(moved)
    four = copy.copy(moved)
    four.fill(moved.matrix.repeat(4, 1), moved.made, moved.parameters).data_ids = ["q", "r", "s", "t"]
    members, losses = np.random.default_rng(0).random((3, 40)) < 0.5, np.zeros((3, 4))
    for ask in (
        lambda: log.index(6, "Flat").search(moved),
        lambda: evaluate.trust(log, moved, "dot", normalize="unit", nulls=0, other=(log, moved)),
        lambda: evaluate.sweep(log, four, members=members, losses=losses, dampings=(0.1,)),
    ):
        with pytest.warns(CheckpointWarning, match="other parameter values"), contextlib.suppress(ConfigError):
            ask()


def test_the_line_that_asked_is_shown_with_the_warning(logged):
    log, query, _ = logged
    moved = loghook.Query(query.data_ids, query.matrix, query.made, "of another checkpoint")
    for ask in (log.influence, log.index(6, "Flat").search):
        with pytest.warns(CheckpointWarning) as met:
            ask(moved)
        assert {warning.filename for warning in met} == {__file__}


def test_warnings_of_blocks_and_passes_show_the_users_line(tmp_path):
    model, x = make_model(), data(8)
    fit = loghook.fit(tmp_path / "factors")
    fit.watch(model)
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        for current in fit.passes():
            if current.kind == "eigenvalues":
                with torch.no_grad():
                    model[0].weight += 1
            with fit(data_id=range(8)):
                loss_fn(model, x).backward()
        with loghook.init(tmp_path / "run", rank=2) as run:
            run.watch(model)
            for _ in run.passes():
                for _ in range(4):
                    with run(data_id=range(8)):
                        loss_fn(model, x).backward()
    assert len(met) == 2 and "not its place in the batch" in str(met[1].message)
    assert {warning.filename for warning in met} == {__file__}


def test_a_fidelity_that_says_something_else_is_left_out(logged):
    log, query, _ = logged
    scoring = {"method": "dot"}
    for said in (
        {"pearson": 0.9},
        {"scoring": scoring},
        {"pearson": "much", "scoring": scoring},
        {"scoring": ["dot"]},
        {"pearson": 0.9, "scoring": {"method": "later"}},
        {"pearson": 0.9, "scoring": scoring | {"top": 3}},
    ):
        other = loghook.load(log.path)
        other.manifest.fidelity = said
        assert other.influence(query, "dot").fidelity is None
    other.manifest.fidelity = {"pearson": 0.9, "scoring": scoring}
    assert other.influence(query, "dot").fidelity == 0.9


def test_numbers_of_numpy_are_numbers(tmp_path):
    log, query, _ = make_log(tmp_path / "log", rank=np.int64(4), seed=np.int32(3), shard_bytes=np.int64(10_000))
    assert log.manifest.rank == 4 and log.manifest.seed == 3
    assert make_log(tmp_path / "by_name", rank={"*": np.int64(2)})[0].layout.layers[0].k_in == 2
    scores = log.influence(query, damping=np.float32(0.5), top=np.int64(3))
    np.testing.assert_array_equal(scores.values, log.influence(query, damping=0.5, top=3).values)
    scores.save(tmp_path / "scores")
    assert loghook.Scores.load(tmp_path / "scores").damping == 0.5
    np.testing.assert_array_equal(log.self_influence(damping_abs=np.float64(2)), log.self_influence(damping_abs=2))
    for wrong in (np.float32(0), np.float64("nan"), np.float32("inf"), "0.1"):
        with pytest.raises(ConfigError, match="positive, finite number"):
            log.influence(query, damping=wrong)


def test_a_name_with_brackets_names_itself(tmp_path):
    model = nn.Module()
    for name in ("a[0]", "a0"):
        model.add_module(name, nn.Linear(3, 2))
    loss, x = lambda m, x: sum(layer(x).square().sum() for layer in m.children()), torch.randn(6, 1, 3)
    watch, rank = {"include": ["a[0]", "a0"]}, {"a[0]": 1, "*": 2}
    log, query = log_and_ask(tmp_path, model, loss, x, x[:1], watch=watch, rank=rank)
    assert log.layers == ("a[0]", "a0")
    scores = log.influence(query, "dot", per_layer=True)
    np.testing.assert_allclose(
        log.influence(query, "dot", layers=[log.layers[1]]).values, scores.by_layer[1], rtol=1e-6
    )
    # A name is also a pattern where it fits others, as before: here of "a0".
    assert log.influence(query, "dot", layers=[log.layers[0]]).layers == ("a[0]", "a0")


def test_mislabelled_rows_have_large_self_influence():
    torch.manual_seed(0)
    x = torch.randn(200, 4).double()
    y = (x[:, 0] > 0).double() * 2 - 1
    y[:10] *= -1
    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0, 0, 0]]))
        model.bias.zero_()
    net = nn.Sequential(model)
    loss = lambda m, x: nn.functional.softplus(-y * m(x)[:, 0] * 3).sum()  # noqa: E731
    worst = np.argsort(-log_batch(net, loss, x, dtype="float32").self_influence("ekfac"))[:10]
    assert len(set(worst.tolist()) & set(range(10))) >= 7


@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-6])
def test_fisher_of_few_rows_is_accurate_in_float32(tmp_path, damping):
    """Fewer rows than values: at a small damping the part outside the rows' span must not drown the scores."""
    log, query, _ = make_log(tmp_path, n=12, dtype="float32", rank=6)
    layers = [{"G": log.rows(n)[:]} for n in log.layers]
    reference = dense.influence("fisher", layers, [query.rows(n) for n in log.layers], damping)
    values = log.influence(query, "fisher", damping=damping).values
    np.testing.assert_allclose(values, reference.total, atol=2e-5 * np.abs(reference.total).max())


def scores_in(dtype, folder, model, x, asked, method, **options):
    """Scores of a model, its data and its log in one dtype, on whole gradients."""
    name = str(dtype).removeprefix("torch.")
    with loghook.init(folder / name, projection="none", dtype=name) as run:
        run.watch(model.to(dtype))
        with run(data_id=range(len(x))):
            model(x.to(dtype)).sin().sum().backward()
        with run.query(data_id=range(len(asked))) as query:
            model(asked.to(dtype)).cos().sum().backward()
        run.finalize()
    return loghook.load(run.path).influence(query, method, **options).values


@pytest.mark.parametrize("damping", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("method", ["kfac", "ekfac", "shampoo"])
def test_small_dampings_are_accurate_in_float32(tmp_path, method, damping):
    """Of fewer samples than features many directions are empty: a question's part there scores zero, not rounding."""
    torch.manual_seed(0)
    model, x, asked = (
        nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 8)),
        torch.randn(30, 60),
        torch.randn(5, 60),
    )

    wide, narrow = (
        scores_in(dtype, tmp_path, model, x, asked, method, damping=damping) for dtype in (torch.float64, torch.float32)
    )
    np.testing.assert_allclose(narrow, wide, atol=1e-3 * np.abs(wide).max())


@pytest.mark.parametrize("size", [1e-20, 1e-24, 1e-28, 1e-38])
@pytest.mark.parametrize("method", ["fisher", "ekfac", "shampoo"])
def test_the_size_of_a_layers_gradients_cancels_or_it_says_nothing(tmp_path, method, size):
    """With relative damping a layer of small gradients counts as any other, until float32 cannot hold them."""
    torch.manual_seed(0)
    x, asked, found = torch.randn(40, 6), torch.randn(3, 6), []
    models = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, scale in zip(models, (1.0, size), strict=True):
        loss = lambda m, x, scale=scale: m(x).sin().sum() * scale  # noqa: E731
        log, query = log_and_ask(tmp_path / str(scale), model, loss, x, asked, projection="none")
        found.append(log.influence(query, method).values)
    if size < 1e-36:
        assert not found[1].any()
    elif method != "ekfac" or size > 1e-22:  # of smaller ones the factors are 0, and any basis is their eigenbasis
        np.testing.assert_allclose(found[1], found[0], rtol=2e-2, atol=2e-2 * np.abs(found[0]).max())
    else:
        assert np.isfinite(found[1]).all() and found[1].any()


def test_scores_that_do_not_fit_say_what_helps(tmp_path):
    model, x = nn.Linear(6, 4), torch.randn(8, 6)
    options = {"projection": "none", "dtype": "float64", "block": {"scale": 1e25}}
    log, query = log_and_ask(tmp_path, model, lambda m, x: m(x).sum(), x, x[:1], **options)
    with pytest.raises(ConfigError, match="smaller scale"):
        log.influence(query, "dot")
    assert np.isfinite(log.influence(query, "shampoo").values).all()


def test_a_batch_whose_squares_overflow_is_left_out_of_the_statistics(tmp_path):
    """In float32 squares overflow long before rows do; infinities would stay in the statistics for good."""
    model, x = nn.Linear(6, 4), torch.randn(8, 6)
    with loghook.init(tmp_path / "run", rank=3) as run:
        run.watch(model)
        for scale, ids in ((1.0, range(8)), (1e25, range(8, 16))):
            with run(data_id=ids, scale=scale):
                model(x).sin().sum().backward()
        with run.query(data_id=[0]) as query:
            model(x[:1]).sin().sum().backward()
        run.finalize()
    log = loghook.load(run.path)
    assert len(log) == 16 and log.unmeasured == 8
    assert np.isfinite(log.moments()).all() and np.isfinite(log.influence(query, "kfac").values).all()


def test_ties_keep_the_order_of_the_log(tmp_path, monkeypatch):
    model = make_model()
    run = loghook.init(tmp_path, rank=4)
    run.watch(model)
    with run(data_id=list(range(30))):
        loss_fn(model, data(30)).backward()
    with run.query(data_id=["q"]) as query:
        (0 * loss_fn(model, data(1))).backward()  # every score is exactly 0
    run.finalize()
    log = loghook.load(tmp_path)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 7 * log.layout.width * 4)
    full, best = log.influence(query, "dot"), log.influence(query, "dot", top=4)
    assert not full.values.any()
    assert [r.data_id for r in best.top(4)[0]] == [r.data_id for r in full.top(4)[0]] == [0, 1, 2, 3]


@pytest.mark.parametrize("at_a_time", [1, 7, 40, 2**20])
@pytest.mark.parametrize("top", [1, 5, 23, 200])
def test_the_best_of_many_rows_are_found_a_part_at_a_time(tmp_path, monkeypatch, top, at_a_time):
    """Scores with many ties, in the order of the log."""
    torch.manual_seed(0)
    model, n = nn.Linear(2, 1, bias=False), 120
    x, asked = torch.randint(-2, 3, (n, 2)).float(), torch.randn(3, 2)
    log, query = log_and_ask(tmp_path, model, lambda m, x: m(x).sum(), x, asked, projection="none")
    expected = log.influence(query, "dot").top(top)
    monkeypatch.setattr(engine, "SCORES_AT_A_TIME", at_a_time)
    assert log.influence(query, "dot", top=top).top(top) == expected
    assert log.influence(loghook.Query([], query.matrix[:0], query.made), "dot", top=top).top(top) == []


@pytest.mark.parametrize("dtype", ["float64", "float16", "int8", "lowrank1"])
@pytest.mark.parametrize("normalize", [None, "unit"])
def test_a_product_sees_few_rows_of_a_block_where_questions_are_many(tmp_path, monkeypatch, dtype, normalize):
    """Also where all scores are kept: what a product makes on its way takes several times as much as they do."""
    log, query, _ = make_log(tmp_path, dtype=dtype)
    expected, lengths, made = log.influence(query, "dot", per_layer=True, normalize=normalize), [], engine.products

    def recorded(*arguments):
        multiply, stored = made(*arguments)
        return lambda block: lengths.append(len(block)) or multiply(block), stored

    monkeypatch.setattr(engine, "products", recorded)
    monkeypatch.setattr(engine, "SCORES_AT_A_TIME", 21)
    found = log.influence(query, "dot", per_layer=True, normalize=normalize)
    assert lengths == [7] * 20 + [5] * 4  # of 40 rows, for all layers and for each of three
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.by_layer, expected.by_layer, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(5000, 64), (3, 100_000), (0, 64)])
def test_norms_are_taken_of_few_values_at_a_time(shape):
    """Squares of a whole block in float64 take their time from the memory, and not from the cache."""
    rows = torch.randn(shape)
    with Largest() as largest:
        squares = Identity().quadratic(rows[1:])
    assert largest.bytes == 4 * rows.numel()  # the rows themselves
    assert torch.equal(squares, rows[1:].double().square().sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_do_not_follow_the_default_dtype(tmp_path, dtype):
    log, query, _ = make_log(tmp_path)
    expected = {method: log.influence(query, method).values for method in ("dot", "ekfac")}
    torch.set_default_dtype(dtype)
    try:
        again = loghook.load(tmp_path)
        for method, values in expected.items():
            np.testing.assert_array_equal(again.influence(query, method).values, values)
            assert again.influence(query, method, top=3).values.dtype == np.float32
        assert again.self_influence().dtype == np.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("spread", [1e3, 1e4])
@pytest.mark.parametrize("method", ["kfac", "ekfac", "shampoo"])
def test_small_dampings_beside_a_feature_that_is_far_larger_than_the_others(tmp_path, method, spread):
    """Directions with small factors are not empty: what counts is whether rows have anything there."""
    torch.manual_seed(0)
    model, x, asked = nn.Linear(12, 6), torch.randn(400, 12), torch.randn(4, 12)
    x[:, 0] *= spread
    asked[:, 0] *= spread

    for damping in (0.1, 1e-6):
        wide, narrow = (
            scores_in(dtype, tmp_path / str(damping), model, x, asked, method, damping=damping)
            for dtype in (torch.float64, torch.float32)
        )
        np.testing.assert_allclose(narrow, wide, atol=2e-2 * np.abs(wide).max())


def gradients_in(dtype, folder, x, g, asked, slopes, method, **options):
    """Scores of given inputs and output gradients of one layer, float64, logged in a dtype."""
    name = str(dtype).removeprefix("torch.")
    layer = nn.Linear(x.shape[1], g.shape[1], bias=False).to(dtype)
    samples, questions = ((a.to(dtype), b.to(dtype)) for a, b in ((x, g), (asked, slopes)))
    loss = lambda m, batch: (m(batch[0]) * batch[1]).sum()  # noqa: E731
    log, query = log_and_ask(folder / name, layer, loss, samples, questions, projection="none", dtype=name)
    return log.influence(query, method, **options).values


@pytest.mark.parametrize("size", [1e-3, 1e-5])
@pytest.mark.parametrize("method", ["kfac", "ekfac", "shampoo"])
def test_what_one_row_of_many_has_is_no_rounding(tmp_path, method, size):
    """A feature that is tiny in one sample and missing in all others: its mean square is nothing, and it is there."""
    torch.manual_seed(0)
    x, g = torch.randn(3000, 6, dtype=torch.float64), torch.randn(3000, 4, dtype=torch.float64)
    x[:, 5] = 0
    x[7, 5] = size
    asked, slopes = torch.zeros(1, 6, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    asked[0, 5] = 1
    for damping in (0.1, 1e-4) if size == 1e-3 else (0.1,):
        wide, narrow = (
            gradients_in(dtype, tmp_path / str(damping), x, g, asked, slopes, method, damping=damping)
            for dtype in (torch.float64, torch.float32)
        )
        assert wide.argmax() == 7 or wide.argmin() == 7
        np.testing.assert_allclose(narrow, wide, atol=1e-4 * np.abs(wide).max())


@pytest.mark.parametrize("damping", [1e-4, 1e-8])
@pytest.mark.parametrize(
    "method", ["kfac", "shampoo"]
)  # EK-FAC's basis comes from sums in float32, see docs/methods.md
def test_pairs_of_directions_that_never_come_together_score_zero(tmp_path, method, damping):
    """Two kinds of samples with features and slopes of their own: no side of the layer is empty, but pairs are."""
    torch.manual_seed(0)
    x, g = torch.randn(200, 12, dtype=torch.float64), torch.randn(200, 8, dtype=torch.float64)
    x[::2, :6], x[1::2, 6:], g[::2, :4], g[1::2, 4:] = 0, 0, 0, 0
    turns = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (12, 8)]
    asked, slopes = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    wide, narrow = (
        gradients_in(dtype, tmp_path, x @ turns[0], g @ turns[1], asked, slopes, method, damping=damping)
        for dtype in (torch.float64, torch.float32)
    )
    np.testing.assert_allclose(narrow, wide, atol=1e-3 * np.abs(wide).max())


@pytest.mark.parametrize("size", [1e-10, 1e-21, 1e-30])
def test_cosines_do_not_depend_on_the_size_of_gradients(tmp_path, size):
    torch.manual_seed(0)
    x, g, asked, slopes = (torch.randn(n, k, dtype=torch.float64) for n, k in ((30, 6), (30, 4), (3, 6), (3, 4)))
    wide, narrow = (
        gradients_in(dtype, tmp_path, x, g * size, asked, slopes * size, "cosine")
        for dtype in (torch.float64, torch.float32)
    )
    np.testing.assert_allclose(narrow, wide, atol=1e-5)
