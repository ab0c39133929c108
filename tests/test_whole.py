"""Whole-gradient EK-FAC: factors and scores against slow dense references, in the modes that users run."""

import contextlib
import tempfile

import numpy as np
import pytest
import torch
from torch import nn

import loghook
from loghook.capture import whole
from loghook.errors import (
    BatchError,
    CheckpointWarning,
    ConfigError,
    CorruptLogError,
    LogExistsError,
    LogLockedError,
    MismatchError,
    StateError,
    UnsupportedError,
)
from loghook.project import blocks, outer
from loghook.whole.scoring import low_rank
from tests import dense, harness
from tests.harness import log_batch
from tests.oracle import one_sample_gradients
from tests.test_capture import Sees
from tests.test_fitted import data, loss_fn, make, raw_moments


def fitted(model, x, loss=loss_fn, folder=None, size=16, **options):
    return harness.fitted(model, x, loss, folder, size, **options)


def ask(fit, model, x, loss=loss_fn, count=2):
    with fit.query(data_id=list(range(count))) as query:
        loss(model, x[:count]).backward()
    return query


def scored(fit, query, model, x, loss=loss_fn, size=16, **options):
    scoring = fit.score(query, **options)
    for ids in torch.arange(len(x)).split(size):
        with scoring(data_id=ids):
            loss(model, x[ids]).backward()
    return scoring.scores()


def as_dense(model, x):
    gradients, moments = one_sample_gradients(model, loss_fn, x, fit_names(model)), raw_moments(model, x)
    return [{"G": gradients[n], "A": moments[n][0], "S": moments[n][1]} for n in gradients]


def reference(method, model, x, **damping):
    rows = as_dense(model, x)
    return dense.influence(method, rows, [layer["G"][:2] for layer in rows], **damping)


def fit_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def close(values, expected, tolerance=1e-5):
    return np.abs(values - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("method", ["dot", "kfac", "ekfac"])
def test_scores_are_those_of_dense_matrices(method):
    model, x = make(), data()
    fit = fitted(model, x)
    damping = {} if method == "dot" else {"damping": 0.2}
    expected = reference(method, model, x, **damping)
    scores = scored(fit, ask(fit, model, x), model, x, method=method, per_layer=True, **damping)
    assert close(scores.values, expected.total)
    assert close(scores.by_layer, expected.layers)
    assert scores.data_ids == list(range(40)) and scores.query_ids == [0, 1]
    assert scores.method == f"{method} (whole gradients)"


def test_one_query_and_one_token_take_the_other_contraction():
    model, x = make(), data(tokens=1)
    fit = fitted(model, x)
    for count in (1, 2):
        scores = scored(fit, ask(fit, model, x, count=count), model, x, damping_abs=0.3)
        assert close(scores.values, reference("ekfac", model, x, damping_abs=0.3).total[:count])
    long = data(tokens=7)
    fit = fitted(model, long)
    scores = scored(fit, ask(fit, model, long, count=1), model, long)
    assert close(scores.values, reference("ekfac", model, long).total[:1])


def test_small_chunks_change_nothing(monkeypatch):
    model, x = make(), data()
    fit = fitted(model, x)
    query = ask(fit, model, x)
    expected = scored(fit, query, model, x).values
    sizes = []
    monkeypatch.setattr(outer, "outer", lambda g, x, outer=outer.outer: sizes.append(len(x)) or outer(g, x))
    monkeypatch.setattr(outer, "CHUNK_BYTES", 1)
    monkeypatch.setattr(whole, "CACHE_BYTES", 1)
    again = fitted(model, x)
    assert close(scored(again, query, model, x).values, expected)
    assert close(scored(again, query, model, x, rank=2).values, scored(fit, query, model, x, rank=2).values)
    assert set(sizes) == {1}  # one sample at a time


def test_low_rank_questions():
    model, x = make(), data()
    fit = fitted(model, x)
    query = ask(fit, model, x)
    scoring = fit.score(query, rank=12)
    assert scoring.lost == pytest.approx(0, abs=1e-12)
    assert close(scored(fit, query, model, x, rank=12).values, scored(fit, query, model, x).values)
    torch.manual_seed(0)
    matrices = torch.randn(3, 6, 5, dtype=torch.float64)
    left, right, lost = low_rank(matrices, 2)
    u, s, v = torch.linalg.svd(matrices)
    best = torch.stack([u[i][:, :2] @ torch.diag(s[i, :2]) @ v[i][:2] for i in range(3)])
    assert torch.allclose(left @ right, best)
    assert lost == pytest.approx(float(((matrices - best) ** 2).sum((1, 2)).div((matrices**2).sum((1, 2))).max()))


def image_model():
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 2, groups=2, bias=False), nn.Flatten(), nn.Linear(54, 3))
    return nn.Sequential(*layers).double()


def whole_log(model, x):
    """Whole gradients of 20 samples, logged."""
    return log_batch(model, loss_fn, x, projection="none")


@pytest.mark.parametrize("rank", [None, 60])
def test_convolutions_and_groups_equal_a_log_of_whole_gradients(rank):
    torch.manual_seed(1)
    model, x = image_model(), torch.randn(20, 2, 6, 6, dtype=torch.float64)
    fit = fitted(model, x)
    log, query = whole_log(model, x), ask(fit, model, x)
    expected = log.influence(query, method="ekfac").values
    assert close(scored(fit, query, model, x, rank=rank).values, expected)


def test_mask_scale_segments_and_repeats():
    model, x = make(), data()
    base = fitted(model, x)
    query = ask(base, model, x)
    expected = scored(base, query, model, x).values

    def mean_loss(model, x):
        return loss_fn(model, x) / 7

    scaled = fitted(model, x, loss=mean_loss, scale=7.0)
    assert close(scored(scaled, query, model, x).values, expected)
    # Documents of five tokens packed two to a row, and an id that comes twice.
    fit = loghook.fit(tempfile.mkdtemp())
    fit.watch(model)
    packed = x.reshape(20, 10, 12)
    for _ in fit.passes():
        with fit(data_id=list(range(40)), segments=torch.arange(40).repeat_interleave(5).view(20, 10)):
            loss_fn(model, packed).backward()
        with fit(data_id=[3, 3]):
            loss_fn(model, 5 * x[3:5]).backward()
    scoring = fit.score(query)
    for _ in range(2):
        with scoring(data_id=list(range(40)), segments=torch.arange(40).repeat_interleave(5).view(20, 10)):
            loss_fn(model, packed).backward()
    scores = scoring.scores()
    assert scores.data_ids == list(range(40)) and close(scores.values, expected)


class Siamese(nn.Module):
    """Calls its layers once for each half of the features, under a checkpoint or not."""

    def __init__(self, checkpoint=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
        self.checkpoint = checkpoint

    def forward(self, x):
        def encode(half):
            if self.checkpoint is None:
                return self.layers(half)
            half = half.requires_grad_()
            return torch.utils.checkpoint.checkpoint(self.layers, half, use_reentrant=self.checkpoint == "reentrant")

        a, b = (encode(half.clone()) for half in x.split(6, -1))
        return (a - b) * a.exp()


@pytest.mark.parametrize("checkpoint", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("packed", [False, True])
def test_layers_called_several_times_are_squared_after_their_calls_are_added(checkpoint, packed):
    x = data(20)
    log, query = whole_log(Siamese(), x), None
    model, fit = Siamese(checkpoint), loghook.fit(tempfile.mkdtemp())
    fit.watch(model)

    def walk(block):
        for ids in torch.arange(20).split(5):
            several = {"segments": torch.arange(5).repeat_interleave(x.shape[1]).view(1, -1)} if packed else {}
            with block(data_id=ids, **several):
                loss_fn(model, x[ids].reshape(1, -1, 12) if packed else x[ids]).backward()

    for _ in fit.passes():
        walk(fit)
    query = ask(fit, model, x)
    for method in ("dot", "ekfac"):
        for normalize in (None, "unit"):
            scoring = fit.score(query, method=method, normalize=normalize)
            walk(scoring)
            assert close(scoring.scores().values, log.influence(query, method=method, normalize=normalize).values)
        own = fit.self_influence(method=method)
        walk(own)
        assert close(own.scores().values[0], log.self_influence(method=method))


def test_calls_are_added_in_float32_whatever_autocast_is_around_the_block():
    model, x, means = Siamese().float(), data(20).float(), []
    for autocast in (False, True):
        fit = loghook.fit(tempfile.mkdtemp())
        fit.watch(model)
        for _ in fit.passes():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), fit(data_id=list(range(20))):
                with torch.autocast("cpu", enabled=False):
                    loss_fn(model, x).backward()
        means.append(fit.mean_eigenvalue)
    assert means[0] == pytest.approx(means[1], rel=1e-6)


def test_several_compiled_calls_of_a_layer_are_refused_where_they_do_not_add_up():
    model, x, fit = Siamese(), data(20), loghook.fit(tempfile.mkdtemp())
    fit.watch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(UnsupportedError, match="called several times in this block, compiled"):
        for _ in fit.passes():
            with fit(data_id=list(range(20))):
                loss_fn(compiled, x).backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_without_breaks(frozen):
    model, x = make(), data()
    fit = fitted(model, x)
    query = ask(fit, model, x)
    fast = make()
    run = loghook.fit(tempfile.mkdtemp())
    run.watch(fast)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    with loghook.frozen(fast) if frozen else contextlib.nullcontext():
        for _ in run.passes():
            for ids in torch.arange(len(x)).split(16):
                with run(data_id=ids):
                    compiled(x[ids]).logsumexp(-1).sum().backward()
        for normalize in (None, "unit"):
            scoring = run.score(query, normalize=normalize)
            for ids in torch.arange(len(x)).split(16):
                with scoring(data_id=ids):
                    compiled(x[ids]).logsumexp(-1).sum().backward()
            expected = scored(fit, query, model, x, normalize=normalize).values
            assert close(scoring.scores().values, expected)


def test_true_fisher_draws_labels_from_the_model():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(4000, 3)
    labels = torch.zeros(4000, dtype=torch.long)
    labels[::4] = -100
    sampling = loghook.Pass(0, "covariance", "true")
    drawn = sampling.labels(logits, labels)
    assert (drawn[::4] == -100).all()
    kept = drawn[labels >= 0]
    shares = torch.bincount(kept, minlength=3) / len(kept)
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.03)
    assert torch.equal(loghook.Pass(0, "covariance", "true").labels(logits, labels), drawn)
    assert loghook.Pass(0, "covariance").labels(logits, labels) is labels
    for wrong in (labels[:5], labels.float(), labels[:, None]):
        with pytest.raises(BatchError, match="one class for each vector of logits"):
            sampling.labels(logits, wrong)


def test_processes_draw_labels_of_their_own(monkeypatch):
    logits, labels = torch.zeros(200, 10), torch.zeros(200, dtype=torch.long)
    drawn = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        drawn.append(loghook.Pass(0, "covariance", "true").labels(logits, labels))
    assert all((drawn[a] == drawn[b]).float().mean() < 0.3 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_true_fisher_without_drawn_labels_and_ids_of_places_warn(tmp_path):
    model, x = make(), data()
    for fisher, ids, says in (
        ("true", range(len(x)), "no labels were drawn"),
        ("empirical", (0, 1, 2, 3), "not its place"),
    ):
        fit = loghook.fit(tmp_path / fisher, fisher=fisher)
        fit.watch(model)
        with pytest.warns(UserWarning, match=says):
            for _ in fit.passes():
                for part in torch.tensor(range(len(x))).split(len(ids)):
                    with fit(data_id=list(ids)):
                        loss_fn(model, x[part]).backward()


def test_samples_at_other_parameter_values_than_the_questions_warn(tmp_path):
    model, x = make(), data()
    fit = fitted(model, x)
    query = ask(fit, model, x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    for scoring in (fit.score(query), fit.self_influence()):
        with pytest.warns(CheckpointWarning, match="other parameter values than the questions"):
            with scoring(data_id=list(range(len(x)))):
                loss_fn(model, x).backward()


def test_factors_can_be_read_by_whom_the_umask_lets(tmp_path):
    model, x = make(), data()
    fit = fitted(model, x, folder=tmp_path / "f")
    (tmp_path / "plain").touch()
    wanted = (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in fit.path.glob("*.safetensors")} == {wanted}


def test_stopped_fits_go_on_and_finished_ones_are_used(tmp_path):
    model, x = make(), data()
    complete = fitted(model, x)
    query = ask(complete, model, x)
    expected = scored(complete, query, model, x).values

    def attempt(stop):
        fit = loghook.fit(tmp_path / "f", resume=True)
        fit.watch(model)
        done = 0
        for current in fit.passes():
            for ids in torch.arange(len(x)).split(16):
                if done == stop:
                    fit.close()
                    return current.kind
                with fit(data_id=ids):
                    loss_fn(model, x[ids]).backward()
                done += 1
        return fit

    assert attempt(2) == "covariance"
    assert attempt(4) == "eigenvalues"
    fit = attempt(99)
    assert close(scored(fit, query, model, x).values, expected)
    fit.close()
    assert list(attempt(0).passes()) == []
    with pytest.raises(LogExistsError, match="resume=True"):
        loghook.fit(tmp_path / "f")
    other = loghook.fit(tmp_path / "f", resume=True, fisher="true")
    with pytest.raises(MismatchError, match="Fisher"):
        other.watch(model)
    bigger = loghook.fit(tmp_path / "f", resume=True)
    other_model = nn.Linear(5, 5)
    with pytest.raises(MismatchError, match="layers"):
        bigger.watch(other_model)
    assert not other_model._forward_hooks and bigger.layers == ()
    bigger.watch(model)  # the right one can still be watched
    assert list(bigger.passes()) == []


def test_another_checkpoint_warns_and_overwriting_forgets(tmp_path):
    model, x = make(), data()
    fit = fitted(model, x, folder=tmp_path / "f")
    fit.score(ask(fit, model, x))
    with torch.no_grad():
        model[0].weight += 1
    other = ask(fit, model, x)
    with pytest.warns(CheckpointWarning, match="other parameter values"):
        fit.score(other)
    fit.close()
    loghook.fit(tmp_path / "f", overwrite=True).watch(model)  # and killed before its first pass is complete
    again = loghook.fit(tmp_path / "f", resume=True)
    again.watch(model)
    assert next(again.passes()).kind == "covariance"


def test_damage_and_wrong_use_are_refused(tmp_path):
    model, x = make(), data()
    fit = loghook.fit(tmp_path / "f")
    with pytest.raises(StateError, match="watch"):
        next(fit.passes())
    fit.watch(model)
    with pytest.raises(StateError, match="passes"), fit(data_id=[0]):
        pass
    query = ask(fit, model, x)
    with pytest.raises(StateError, match="no covariance yet"):
        fit.score(query)
    with pytest.raises(StateError, match="no samples"):
        for _ in fit.passes():
            pass
    for _ in fit.passes():
        with fit(data_id=[0, 1]):
            loss_fn(model, x[:2]).backward()
    with pytest.raises(ConfigError, match="fisher"):
        fit.score(query, method="fisher")
    with pytest.raises(StateError, match="nothing was scored"):
        fit.score(query).scores()
    run = loghook.init(tmp_path / "log", rank=4)
    run.watch(model)
    with run.query(data_id=[0]) as other:
        loss_fn(model, x[:1]).backward()
    with pytest.raises(MismatchError, match="whole gradients"):
        fit.score(other)
    fit.close()
    file = tmp_path / "f" / "eigenvalues.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = loghook.fit(tmp_path / "f", resume=True)
    again.watch(model)
    with pytest.raises(CorruptLogError, match="eigenvalues"):
        again.score(query)
    (tmp_path / "f" / "factors.json").write_text("{}")
    with pytest.raises(CorruptLogError, match="factors"):
        loghook.fit(tmp_path / "f", resume=True)
    with pytest.raises(ConfigError, match="fisher"):
        loghook.fit(tmp_path / "g", fisher="exact")


@pytest.mark.parametrize("method", ["dot", "kfac", "ekfac"])
@pytest.mark.parametrize("kind", ["unit", "relatif"])
@pytest.mark.parametrize("block", [4096, 4], ids=["whole", "wide"])
def test_normalised_scores_are_those_of_dense_matrices(method, kind, block, monkeypatch):
    """Also where layers are too wide for whole factors, and what couples two blocks of one is left out."""
    monkeypatch.setattr(blocks.cut, "__defaults__", (block,))
    model, x = make(), data()
    fit = fitted(model, x)
    damping = {} if method == "dot" else {"damping": 0.2}
    rows = as_dense(model, x)
    for layer in rows:
        for side in "AS":
            parts = [layer[side][part, part] for part in blocks.cut(len(layer[side]))]
            assert len(parts) > 1 or block == 4096 or len(layer[side]) <= 4
            layer[side] = np.asarray(torch.block_diag(*map(torch.as_tensor, parts)))
    queries = [layer["G"][:2] for layer in rows]
    own = [dense.self_influence(method, rows, which, **damping) for which in (queries, None)]
    total, layers = dense.influence(method, rows, queries, **damping)
    scores = scored(fit, ask(fit, model, x), model, x, method=method, normalize=kind, per_layer=True, **damping)
    assert close(scores.values, dense.cosine(total, *own, kind))
    assert close(scores.by_layer[0], dense.cosine(layers[0], *own, kind))
    assert scores.normalize == kind
    if method == "dot" and kind == "unit":
        assert close(scored(fit, ask(fit, model, x), model, x, method="cosine").values, scores.values)
    scoring = fit.self_influence(method, **damping)
    for ids in torch.arange(len(x)).split(16):
        with scoring(data_id=ids):
            loss_fn(model, x[ids]).backward()
    alone = scoring.scores()
    assert close(alone.values[0], own[1]) and alone.query_ids == ["self"] and len(alone.values) == 1
    assert alone.top(1)[0][0].data_id == int(np.argmax(own[1]))


def test_norms_with_groups_scale_low_rank_and_no_gradient():
    torch.manual_seed(1)
    model, x = image_model(), torch.randn(20, 2, 6, 6, dtype=torch.float64)

    def mean_loss(model, x):
        return loss_fn(model, x) / 7 * (x.abs().sum() > 0)

    fit = fitted(model, x)
    log, query = whole_log(model, x), ask(fit, model, x)
    expected = log.influence(query, method="ekfac", normalize="unit").values
    scoring = fit.score(query, normalize="unit", rank=60)
    with scoring(data_id=list(range(20)), scale=7.0):
        mean_loss(model, x).backward()
    with scoring(data_id=[20]):
        (0 * loss_fn(model, x[:1])).backward()
    values = scoring.scores().values
    assert close(values[:, :20], expected) and (values[:, 20] == 0).all()
    with pytest.raises(ConfigError, match="normalize='l2'"):
        fit.score(query, normalize="l2")
    refined = query.with_rows(query.matrix, "cg")
    with pytest.raises(ConfigError, match="without normalize"):
        fit.score(refined, normalize="relatif")


def test_a_second_pass_at_other_parameters_warns(tmp_path):
    model, x = make(), data(8)
    fit = loghook.fit(tmp_path)
    fit.watch(model)
    for _ in fit.passes():
        with fit(data_id=range(8)):
            loss_fn(model, x).backward()
        break  # killed between the passes: the first is not committed unless it ended
    for stop in ("covariance", "eigenvalues"):
        fit = loghook.fit(tmp_path, resume=True)
        fit.watch(model)
        passes = fit.passes()
        assert next(passes).kind == stop
        with (
            pytest.warns(CheckpointWarning, match="eigenvalues") if stop == "eigenvalues" else contextlib.nullcontext()
        ):
            with fit(data_id=range(8)):
                loss_fn(model, x).backward()
        next(passes, None)
        passes.close()
        with torch.no_grad():
            next(model.parameters()).add_(0.1)


def test_a_rank_of_nothing_is_refused():
    model, x = make(), data(8)
    fit = fitted(model, x)
    with pytest.raises(ConfigError, match="rank=0"):
        fit.score(ask(fit, model, x), rank=0)


def test_factors_that_are_being_fitted_are_not_overwritten(tmp_path):
    model, x = make(), data(8)
    fit = loghook.fit(tmp_path)
    fit.watch(model)
    for _ in fit.passes():
        with fit(data_id=range(8)):
            loss_fn(model, x).backward()
        with pytest.raises(LogLockedError):
            loghook.fit(tmp_path, overwrite=True)


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_eigenvalues_that_float32_cannot_hold_are_refused(tmp_path, scale):
    model, x = nn.Linear(6, 4).double(), torch.randn(8, 6, dtype=torch.float64)
    fit = loghook.fit(tmp_path / "fit")
    fit.watch(model)

    def go_through():
        for _ in fit.passes():
            with fit(data_id=range(8)):
                (model(x).sin().sum() * scale).backward()

    with pytest.raises(ConfigError, match="do not fit in float32"):
        go_through()


def test_layers_that_see_images_have_scores_of_their_samples():
    torch.manual_seed(0)
    model, counts, words = Sees(side_by_side=False), [3, 1, 4, 2], torch.randn(4, 6, 5)
    owner, patches, scores = loghook.segments.from_counts(counts), torch.randn(10, 6), {}
    for batches in ([[0, 1, 2, 3]], [[0], [1], [2], [3]]):
        fit = loghook.fit(tempfile.mkdtemp())
        fit.watch(model)

        def run(blocks, batches=batches):
            for ids in batches:
                mine, own = torch.isin(owner[:, 0], torch.tensor(ids)), [counts[i] for i in ids]
                own = loghook.segments.from_counts(own)
                with blocks(data_id=ids, segments={"vision*": own}):
                    model(patches[mine], own[:, 0], words[ids]).pow(3).sum().backward()

        for _ in fit.passes():
            run(fit)
        with fit.query(data_id=["q"], segments={"vision*": owner[:3]}) as query:
            model(patches[:3], owner[:3, 0], words[:1]).pow(2).sum().backward()
        scoring = fit.score(query, normalize="relatif")
        run(scoring)
        scores[len(batches)] = scoring.scores()
    assert scores[1].data_ids == scores[4].data_ids
    assert close(scores[1].values, scores[4].values)


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("rank", [None, 3])
def test_samples_of_a_single_token(count, rank):
    """Where no gradient is formed: few questions one by one, many together, and in low rank."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(20, 6)
    fit = fitted(model, x, lambda m, b: m(b).logsumexp(-1).sum())
    query, everything = (ask(fit, model, x, lambda m, b: m(b).logsumexp(-1).sum(), count=n) for n in (count, 20))
    scores = scored(fit, query, model, x, lambda m, b: m(b).logsumexp(-1).sum(), size=5, method="dot", rank=rank)
    assert close(scores.values, (query.matrix @ everything.matrix.T).numpy())


def test_factors_are_let_go_by_a_with_statement(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    with loghook.fit(tmp_path) as fit:
        fit.watch(model)
        assert model[0]._forward_hooks
    assert not model[0]._forward_hooks
    with pytest.raises(StateError, match="closed: watch the model again"), fit.query(data_id=[0]):
        pass
    fit.watch(model)
