"""Choosing projection, rank, dtype and scoring by fidelity to whole-gradient EK-FAC."""

import numpy as np
import pytest
import torch
from torch import nn

import loghook
from loghook.errors import ConfigError
from loghook.whole.candidates import shortened
from tests.harness import fitted


class Attention(nn.Module):
    """Siblings that read one input, as in a transformer: their factors are shared."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.out = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.q_proj(x)) * torch.tanh(self.k_proj(x)))


def setting():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(80, 4, 12) * torch.linspace(0.2, 2, 12)
    fit = fitted(model, x, loss)

    def samples():
        for part in torch.arange(60).split(20):
            yield part, x[part]

    def queries():
        yield ["a", "b", "c"], x[60:63]

    return model, x, fit, samples, queries


def loss(model, x):
    return model(x).logsumexp(-1).sum()


def logged(folder, model, x, tuned, samples):
    run = loghook.init(folder, **tuned.arguments)
    run.watch(model, **tuned.watch)
    for _ in run.passes():
        for ids, batch in samples():
            with run(data_id=ids):
                loss(model, batch).backward()
    with run.query(data_id=["a", "b", "c"]) as query:
        loss(model, x[60:63]).backward()
    run.finalize()
    return loghook.load(folder), query


def correlation(scores, reference):
    return np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(scores, reference, strict=True)])


def test_the_choice_reproduces_whole_scores_within_the_budget(tmp_path):
    model, x, fit, samples, queries = setting()
    tuned = loghook.tune(fit, samples, queries, lambda b: loss(model, b), ranks=(2, 4, 8), subsets=False)
    by_bytes = {one.bytes for one in tuned.candidates}
    assert len(tuned.candidates) == 3 * (2 * 2 + 3 * 3) and len(by_bytes) > 3
    top = max(one.fidelity for one in tuned.candidates)
    assert tuned.best.fidelity >= top - 0.005 > 0.9
    assert all(one.fidelity < top - 0.005 for one in tuned.candidates if one.bytes < tuned.best.bytes)
    assert "<-- chosen" in str(tuned)
    budget = 100
    small = loghook.tune(fit, samples, queries, lambda b: loss(model, b), ranks=(2, 4), bytes_per_sample=budget)
    assert small.best.bytes <= budget
    with pytest.raises(ConfigError, match="bytes_per_sample"):
        loghook.tune(fit, samples, queries, lambda b: loss(model, b), ranks=(4,), bytes_per_sample=3)
    # The log that is made with the choice has the fidelity that was measured, and says so.
    log, query = logged(tmp_path / "log", model, x, tuned, samples)
    assert log.layers == ("q_proj", "k_proj", "out") and log.codec.row_bytes == tuned.best.bytes
    scores = log.influence(query, **tuned.best.scoring)
    assert scores.fidelity == round(tuned.best.fidelity, 4)
    assert "fidelity" in repr(scores)
    log.compress(tmp_path / "small", "int4", queries=2)  # other rows, of which nothing was measured
    assert loghook.load(tmp_path / "small").manifest.fidelity is None
    scores.save(tmp_path / "scores")
    assert loghook.Scores.load(tmp_path / "scores").fidelity == scores.fidelity
    other = {"method": "cosine"}
    assert log.influence(query, **other).fidelity is None
    log.manifest.fidelity = log.manifest.fidelity | {"scoring": other}
    for same in (other, other | {"damping": 3.0}, {"method": "cosine", "normalize": "unit"}):
        assert log.influence(query, **same).fidelity == scores.fidelity
    for others in (tuned.best.scoring, {"method": "dot"}, other | {"normalize": "relatif"}):
        assert log.influence(query, **others).fidelity is None
    with fit.query(data_id=["a", "b", "c"]) as whole:
        loss(model, x[60:63]).backward()
    scoring = fit.score(whole, damping=0.1)
    for ids, batch in samples():
        with scoring(data_id=ids):
            loss(model, batch).backward()
    measured = correlation(scores.values, scoring.scores().values)
    assert measured == pytest.approx(tuned.best.fidelity, abs=1e-3)


def test_layers_that_say_little_are_left_out(tmp_path):
    model, x, fit, samples, queries = setting()
    whole = whole_scores(fit, model, x, samples)
    tuned = loghook.tune(
        fit, samples, queries, lambda b: loss(model, b), projections=[{"projection": "random"}], ranks=(8,),
        dtypes=("float32",), methods=[{"method": "dot"}, {"method": "cosine"}],
    )  # fmt: skip
    sizes = {len(one.layers): one for one in tuned.candidates}
    assert set(sizes) == {1, 2, 3}  # groups one by one
    assert set(sizes[1].layers) < set(sizes[2].layers) < set(sizes[3].layers)
    for one in sizes.values():
        assert one.bytes == 4 * sum(min(8, 13 if n != "out" else 9) * (3 if n == "out" else 8) for n in one.layers)
    # The first is the one that alone is most like the reference, of scores made by hand from a log of that layer.
    alone = {}
    for name in fit.layers:
        with loghook.init(tmp_path / name, rank=8) as run:
            run.watch(model, include=name)
            for ids, batch in samples():
                with run(data_id=ids):
                    loss(model, batch).backward()
            with run.query(data_id=["a", "b", "c"]) as query:
                loss(model, x[60:63]).backward()
            run.finalize()
        alone[name] = correlation(loghook.load(tmp_path / name).influence(query, "dot").values, whole.values)
    first = max(alone, key=alone.get)
    assert sizes[1].layers == (first,) and sizes[1].fidelity == pytest.approx(alone[first], abs=1e-4)
    small = loghook.tune(
        fit, samples, queries, lambda b: loss(model, b), projections=[{"projection": "random"}], ranks=(8,),
        dtypes=("float32",), methods=[{"method": "dot"}], bytes_per_sample=sizes[1].bytes,
    )  # fmt: skip
    log, query = logged(tmp_path / "log", model, x, small, samples)
    assert log.layers == small.best.layers == (first,)
    assert correlation(log.influence(query, "dot").values, whole.values) == pytest.approx(alone[first], abs=1e-4)


def test_known_answers_choose_the_layers_of_the_reference(tmp_path):
    model, x, fit, samples, queries = setting()
    whole = whole_scores(fit, model, x, samples)
    truth = whole.by_layer[1]  # as if the scores of k_proj alone were right, which no reference of all layers can say
    options = {"ranks": (4, 8), "dtypes": ("float32",), "projections": [{"projection": "random"}]}
    tuned = loghook.tune(
        fit, samples, queries, lambda b: loss(model, b), judge=lambda scores: correlation(scores, truth), **options
    )
    assert tuned.best.layers == ("k_proj",)
    assert tuned.reference == "ekfac (whole gradients), damping 0.1, of k_proj, judged 1.000"
    plain = loghook.tune(fit, samples, queries, lambda b: loss(model, b), **options)
    assert len(plain.best.layers) > 1 and plain.reference == "ekfac (whole gradients), damping 0.1"
    # Projection, rank and scoring are chosen by fidelity to what was liked, and the log keeps that figure.
    log, asked = logged(tmp_path / "log", model, x, tuned, samples)
    scores = log.influence(asked, **tuned.best.scoring)
    assert scores.fidelity == pytest.approx(correlation(scores.values, truth), abs=1e-3)
    # A judge that likes several groups together gets their sum.
    both = whole.by_layer[[0, 2]].sum(0)
    tuned = loghook.tune(
        fit, samples, queries, lambda b: loss(model, b), judge=lambda scores: correlation(scores, both), **options
    )
    assert sorted(tuned.best.layers) == ["out", "q_proj"] and "judged 1.000" in tuned.reference


def whole_scores(fit, model, x, samples):
    scoring = fit.score(fit_query(fit, model, x), per_layer=True)
    for ids, batch in samples():
        with scoring(data_id=ids):
            loss(model, batch).backward()
    return scoring.scores()


def fit_query(fit, model, x):
    with fit.query(data_id=["a", "b", "c"]) as query:
        loss(model, x[60:63]).backward()
    return query


def test_refined_questions_are_the_reference_where_outputs_are_given():
    model, x, fit, samples, queries = setting()

    def output_loss(outputs, batch):
        return outputs.logsumexp(-1).sum()

    options = {"projections": ["none"], "ranks": (1,), "dtypes": ("float32",)}
    tuned = loghook.tune(
        fit, samples, queries, lambda b: loss(model, b), outputs=model, output_loss=output_loss, subsets=False,
        methods=[{"method": "dot"}], **options,
    )  # fmt: skip
    assert tuned.reference.startswith("cg, ")
    refined = fit.refine(fit_query(fit, model, x), [b for _, b in samples()], model, output_loss, damping=1.0)
    scoring, plain = fit.score(refined), fit.score(fit_query(fit, model, x), "dot")
    for one in (scoring, plain):
        for ids, batch in samples():
            with one(data_id=ids):
                loss(model, batch).backward()
    expected = correlation(plain.scores().values, scoring.scores().values)
    assert tuned.best.fidelity == pytest.approx(expected, abs=1e-4) and expected < 0.999
    with pytest.raises(ConfigError, match="output_loss"):
        loghook.tune(fit, samples, queries, lambda b: loss(model, b), outputs=model, **options)


def test_siblings_share_factors_on_the_disk(tmp_path):
    model, _, fit, _, _ = setting()
    stored = (fit.path / "covariance.safetensors").stat().st_size
    one = 13 * 13 * 4 + 13 * 8
    assert stored < 2 * one + 3 * (8 * 8 * 4 + 8 * 8) + 4000
    factors = loghook.fit(fit.path, resume=True)
    factors.watch(model)
    found = factors._store.factors()
    assert torch.equal(found["q_proj"][0].basis, found["k_proj"][0].basis)


def test_what_cannot_work_is_refused_before_anything_is_computed():
    model, _, fit, samples, queries = setting()

    def refused(match, loss_of=lambda b: pytest.fail("computed"), walk=samples, **options):
        with pytest.raises(ConfigError, match=match):
            loghook.tune(fit, walk, queries, loss_of, **options)

    refused("smallest row to be tried takes", bytes_per_sample=3, ranks=(4,))
    refused("'int1' takes a whitened projection", projections=[{"projection": "random"}], dtypes=["int1"])
    refused("widest layer's 13", ranks=(500,))
    refused("no choice of", judge=np.mean, subsets=False, ranks=(4,))
    refused("all layers together", judge=np.mean, outputs=model, output_loss=lambda y, b: y.sum(), ranks=(4,))
    refused("is a function here", walk=list(samples()), ranks=(4,))
    refused("yields {'x': 1}, where", walk=lambda: [{"x": 1}], ranks=(4,), outputs=model, output_loss=loss)
    refused("mask, scale and segments", lambda b: loss(model, b), walk=lambda: [([0], 1, {"ids": 1})], ranks=(4,))
    refused("choose one of 'float64'", ranks=(4,), dtypes=("int3",))
    refused("ranks=0", ranks=0)
    refused("argument='dtype' is unknown", ranks=(4,), projections=[{"projection": "random", "dtype": "int8"}])
    refused("projections='sketch' is unknown", ranks=(4,), projections=["random", "sketch"])
    refused("projections=None is unknown", ranks=(4,), projections=[{"whitening": 0.1}])
    refused("bytes_per_sample='50 Kilo'", ranks=(4,), bytes_per_sample="50 Kilo")
    by_loss = {"loss_of": lambda b: loss(model, b), "ranks": 4, "dtypes": ("float32",), "methods": ("dot",)}
    refused("yields 3 samples", walk=queries, **by_loss)
    refused("judge.* returns nan", judge=lambda scores: float("nan"), **by_loss)
    used_up = iter(samples())
    list(used_up)
    refused("samples\\(\\) yields nothing", lambda b: loss(model, b), walk=lambda: used_up, ranks=(4,))
    refused(
        "must be the same sum",
        lambda b: loss(model, b),
        ranks=(4,),
        outputs=model,
        output_loss=lambda y, b: y.logsumexp(-1).mean(),
    )


def test_rows_that_cannot_fit_the_budget_are_not_tried():
    model, _, fit, samples, queries = setting()
    options = {"projections": [{"projection": "random"}], "dtypes": ("float32", "int8"), "methods": [{"method": "dot"}]}
    tuned = loghook.tune(fit, samples, queries, lambda b: loss(model, b), ranks=(2, 8), bytes_per_sample=60, **options)
    assert {(one.init["rank"], one.init["dtype"]) for one in tuned.candidates} == {
        (2, "float32"),
        (2, "int8"),
        (8, "int8"),
    }
    assert tuned.best.bytes <= 60 and tuned.reference == "ekfac (whole gradients), damping 0.1"
    other = loghook.tune(fit, samples, queries, lambda b: loss(model, b), ranks=(2,), damping=0.5, **options)
    assert other.reference == "ekfac (whole gradients), damping 0.5"


def test_whole_gradients_are_tried_once_whatever_the_ranks():
    model, _, fit, samples, queries = setting()
    options = {"projections": ["none"], "dtypes": ("float32",), "methods": ["dot"], "subsets": False}
    tuned = loghook.tune(fit, samples, queries, lambda b: loss(model, b), ranks=(8, 2, 4), **options)
    assert len(tuned.candidates) == 1


def test_groups_that_fit_the_budget_are_found_where_the_best_one_does_not():
    model, _, fit, samples, queries = setting()
    options = {"ranks": (8,), "dtypes": ("float32",), "projections": [{"projection": "random"}]}
    tuned = loghook.tune(fit, samples, queries, lambda b: loss(model, b), bytes_per_sample=100, **options)
    assert [one.layers for one in tuned.candidates] == [("out",)] and tuned.best.bytes == 96
    with pytest.raises(ConfigError, match="normalised scores need"):
        loghook.tune(
            fit,
            samples,
            queries,
            lambda b: loss(model, b),
            bytes_per_sample=100,
            methods=[{"method": "cosine"}],
            **options,
        )


def test_samples_that_come_again_count_once():
    """As the reference has them; a sampler that fills its last batch repeats some."""
    model, x, fit, samples, queries = setting()

    def padded():
        yield from samples()
        yield [0, 1, 1, 59], x[[0, 1, 1, 59]]

    options = {"ranks": (4,), "dtypes": ("float32",), "projections": [{"projection": "random"}]}
    one, other = (loghook.tune(fit, walk, queries, lambda b: loss(model, b), **options) for walk in (samples, padded))
    assert other.samples == 60 and other.best.fidelity == pytest.approx(one.best.fidelity, abs=1e-6)


def test_the_rank_of_a_choice_is_no_wider_than_its_layers(tmp_path):
    model, x, fit, samples, queries = setting()
    tuned = loghook.tune(
        fit, samples, queries, lambda batch: loss(model, batch), bytes_per_sample=3 * 9 * 4, ranks=(12,),
        projections=({"projection": "whitened", "whitening": 0.1},), dtypes=("float32",),
    )  # fmt: skip
    assert tuned.best.layers == ("out",) and tuned.best.init["rank"] == 9
    log, query = logged(tmp_path / "log", model, x, tuned, samples)
    assert log.influence(query, **tuned.best.scoring).fidelity == pytest.approx(tuned.best.fidelity, abs=1e-3)


def test_packed_batches_are_tried_as_their_documents_alone_are():
    """Two samples in a row of a batch; refined questions count them as the segments do."""
    model, _, fit, samples, queries = setting()

    def packed():
        for ids, batch in samples():
            segments = torch.arange(len(ids)).view(-1, 2).repeat_interleave(4, 1)
            yield ids, batch.reshape(len(ids) // 2, 8, 12), {"segments": segments, "mask": torch.ones(segments.shape)}

    def output_loss(outputs, batch):
        return outputs.logsumexp(-1).sum()

    options = {
        "ranks": (4,), "dtypes": ("float32",), "projections": [{"projection": "random"}], "outputs": model,
        "output_loss": output_loss,
    }  # fmt: skip
    one, other = (loghook.tune(fit, walk, queries, lambda b: loss(model, b), **options) for walk in (samples, packed))
    assert other.samples == 60 and other.reference == one.reference
    for mine, theirs in zip(other.candidates, one.candidates, strict=True):
        assert (mine.layers, mine.scoring) == (theirs.layers, theirs.scoring)
        assert mine.fidelity == pytest.approx(theirs.fidelity, abs=1e-5)


def test_layers_are_told_apart_by_as_much_of_their_names_as_it_takes():
    names = ["h.*.attn.c_proj", "h.*.mlp.c_proj", "h.*.mlp.c_fc", "head", "lm.head"]
    short = ["attn.c_proj", "mlp.c_proj", "c_fc", "head", "lm.head"]
    assert shortened(names) == dict(zip(names, short, strict=True))
