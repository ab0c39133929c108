"""Trust: what it predicts of other projection seeds against the seeds themselves, on logs whose noise is known."""

import itertools
import sys

import numpy as np
import pytest
import torch
from torch import nn

import loghook
from loghook.errors import ConfigError, UnfinishedWarning
from loghook.evaluate import trust
from loghook.evaluate.trust import Part, extended, membership
from loghook.influence.fidelity import correlations
from loghook.log import reader
from tests.harness import Largest, log_and_ask, squares

WIDTH = 64


def logged(path, seed=0, rank=16, n=300, shuffle=False, projection="random", finish=True, **options):
    """One wide linear layer whose gradients are near a few directions, so that some rows matter and most do not."""
    noise = torch.Generator().manual_seed(0)
    kinds = torch.randn(6, WIDTH, generator=noise)
    x = kinds[torch.arange(n + 8) % 6] * torch.rand(n + 8, 1, generator=noise) + 0.4 * torch.randn(
        n + 8, WIDTH, generator=noise
    )
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(WIDTH, WIDTH, generator=noise) / 8)
        model[0].bias.zero_()
    run = loghook.init(
        path, projection=projection, **({} if projection == "none" else {"rank": rank}), seed=seed, **options
    )
    run.watch(model)
    order = torch.arange(n).flip(0) if shuffle else torch.arange(n)
    for _ in run.passes() if projection == "whitened" else (None,):
        with run(data_id=order):
            model(x[order]).pow(2).sum().backward()
    with run.query(data_id=range(8)) as query:
        model(x[n:]).pow(2).sum().backward()
    if finish:
        run.finalize()
    run.close()
    return loghook.load(path), query


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    return [logged(folder / str(seed), seed) for seed in range(5)]


@pytest.mark.parametrize("method", ["dot", "cosine"])
def test_what_one_log_predicts_is_what_other_seeds_show(seeds, method):
    values = [log.influence(query, method).values.astype(float) for log, query in seeds]
    tops = [np.argsort(-v, axis=1)[:, :10] for v in values]
    seen, shared = [], []
    for a in range(5):
        for b in range(a):
            seen.append(correlations(values[a], values[b]))
            shared.append(np.mean([len(set(x) & set(y)) for x, y in zip(tops[a], tops[b], strict=True)]))
    found = [trust(log, query, method, nulls=0) for log, query in seeds]
    predicted = np.mean([np.median(one.correlation) for one in found])
    assert predicted == pytest.approx(np.median(seen), abs=0.08), (predicted, np.median(seen))
    overlap = np.mean([one.overlap.mean() for one in found])
    assert overlap == pytest.approx(np.mean(shared), abs=1.2), (overlap, np.mean(shared))
    assert 1 < np.mean(shared) < 9.5  # neither everything nor nothing: there was something to predict


def test_a_second_log_is_matched_by_ids_and_its_agreement_is_seen(seeds, tmp_path):
    (log, query), other = seeds[0], logged(tmp_path, seed=1, shuffle=True)
    found = trust(log, query, "dot", other=other, nulls=0)
    one, two = log.influence(query, "dot").values, seeds[1][0].influence(seeds[1][1], "dot").values
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(one, two, strict=True)]
    np.testing.assert_allclose(found.correlation, expected, rtol=1e-3)
    np.testing.assert_allclose(found.together, 2 * found.correlation / (1 + found.correlation.clip(min=0)))
    best = [set(np.argsort(-v)[:10]) for v in one], [set(np.argsort(-v)[:10]) for v in two]
    assert found.overlap.tolist() == [len(a & b) for a, b in zip(*best, strict=True)]
    with pytest.raises(ConfigError, match="the same projection"):
        trust(log, query, "dot", other=(log, query), nulls=0)
    assert found.how == "a second log" and str(found).endswith("between seeds.")


def test_membership_is_that_of_many_simulated_seeds():
    """Scores that are Gaussian signal plus Gaussian noise: the probabilities are relative frequencies."""
    rng = np.random.default_rng(0)
    r, k, rounds, n = 0.8, 5, 300, 60
    predicted, happened = np.zeros((rounds, 2, k)), np.zeros((rounds, 2, k))
    for i in range(rounds):
        truth = rng.normal(size=n) * np.sqrt(r)
        one, other = (truth + rng.normal(size=n) * np.sqrt(1 - r) for _ in range(2))
        top = np.argsort(-one)[:k]
        predicted[i] = np.stack(membership(one[None], np.array([r]), np.ones((1, n)), top[None], rng))[:, 0]
        happened[i] = [np.isin(top, np.argsort(-scores)[:k]) for scores in (other, truth)]
    np.testing.assert_allclose(predicted.mean(0), happened.mean(0), atol=0.08)
    sure, unsure = predicted > 0.7, predicted < 0.4
    assert happened[sure].mean() == pytest.approx(predicted[sure].mean(), abs=0.05)
    assert happened[unsure].mean() == pytest.approx(predicted[unsure].mean(), abs=0.05)


def test_extension_to_the_whole_rank():
    quarter, half = np.array([0.5]), np.array([2 / 3])  # noise over signal 1, then 1/2: the whole has 1/4
    assert extended(half, quarter, 0.0) == pytest.approx(0.8)
    assert extended(half, np.array([0.1]), 0.0) == pytest.approx(1 / (1 + 0.5 / 4))  # a faster fall is not believed
    assert extended(half, half, 0.0) == pytest.approx(2 / 3)


@pytest.mark.parametrize("rank", [8, 16, 32, 60])
def test_what_is_drawn_without_replacement_is_foretold(tmp_path, rank):
    """One projected side of 64 coordinates: the larger the share that is drawn, the less noise is left."""
    torch.manual_seed(0)
    model = nn.Linear(64, 4, bias=False)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    logs = []
    for seed in range(4):
        logs.append(log_and_ask(tmp_path / str(seed), model, squares, x[:280], x[280:], rank=rank, seed=seed))
    pairs = itertools.combinations(logs, 2)
    seen = np.mean([trust(*one, "dot", nulls=0, other=other).correlation.mean() for one, other in pairs])
    foretold = np.mean([trust(*one, "dot", nulls=0).correlation.mean() for one in logs])
    assert foretold == pytest.approx(seen, abs=0.07), (foretold, seen)


def test_of_whitened_rows_it_says_that_it_is_optimistic(tmp_path):
    """Parts of whitened rows agree better than two seeds do."""
    one, other = (logged(tmp_path / str(seed), seed, projection="whitened") for seed in (0, 1))
    alone, seen = trust(*one, method="dot", nulls=0), trust(*one, method="dot", other=other, nulls=0)
    assert np.median(alone.correlation) > np.median(seen.correlation)
    assert "optimistic" in alone.how and "optimistic" not in seen.how


def test_a_projection_without_a_seed_has_no_noise_of_one(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Linear(64, 4), torch.randn(60, 64)
    found = trust(*log_and_ask(tmp_path, model, squares, x, x[:2], rank=16, projection="pca"), "dot", nulls=0)
    assert found.how == "no random projection" and (found.correlation == 1).all()


@pytest.mark.parametrize("method,normalize", [("dot", None), ("ekfac", None), ("ekfac", "unit"), ("fisher", "relatif")])
def test_p_values_know_chance_from_signal(seeds, method, normalize):
    """The p-values of chance questions are even, or on the safe side; those of the rows themselves small."""
    log = seeds[0][0]
    rows = torch.tensor(log.rows("0")[:]).flatten(1)
    mixed = torch.randn(100, len(log), generator=torch.Generator().manual_seed(1)) @ (
        rows / torch.from_numpy(log.self_influence(method))[:, None].sqrt()
    )
    made = {}
    for name, questions in (("chance", mixed), ("signal", rows[:50] + 0.01 * mixed[:50])):
        made[name] = loghook.Query(list(range(len(questions))), questions, log.made)
    chance, signal = (trust(log, made[name], method, normalize=normalize, k=3) for name in ("chance", "signal"))
    p = chance.p_values[:, 0]
    assert p.mean() > 0.38 and (p <= 0.05).mean() < 0.12
    if normalize == "unit":  # where the top is the best aligned row, they are exact and not on the safe side only
        assert p.mean() < 0.62 and (np.diff(chance.p_values, axis=1) >= 0).all()
    assert signal.p_values[:, 0].mean() < p.mean() - 0.03 and "than chance" in str(signal)
    assert method == "dot" or (signal.p_values[:, 0] <= 0.05).mean() > 0.6


def test_chance_questions_are_drawn_a_few_rows_at_a_time(tmp_path, monkeypatch):
    """The weights of all rows would be far more than the scores; blocks have no say in what is drawn."""
    (log, query), nulls = logged(tmp_path, rank=8), 4000
    monkeypatch.setattr(sys.modules[trust.__module__], "DRAWN", 8, raising=False)
    expected = trust(log, query, "dot", nulls=nulls).p_values
    monkeypatch.setattr(reader, "BLOCK_BYTES", 7 * log.codec.row_bytes)
    with Largest() as largest:
        found = trust(log, query, "dot", nulls=nulls).p_values
    np.testing.assert_array_equal(found, expected)
    assert largest.bytes < 8 * nulls * len(log) / 2


def test_a_part_is_a_log_of_fewer_coordinates(seeds):
    log, query = seeds[0]
    parts = [Part(log, i, 2) for i in range(2)]
    whole, name = log.rows("0")[:], "0"
    for part in parts:
        out, into = np.divmod(part._columns.numpy().reshape(8, 8), 16)
        out, into = out[:, 0], into[0]
        (block,) = [b for _, b in part.blocks()]
        np.testing.assert_allclose(block.reshape(-1, 8, 8), 2 * whole[:, out[:, None], into], rtol=1e-6)
        mine, theirs = part.layout.moments[name], log.layout.moments[name]
        a = log.moments()[theirs[0]].reshape(16, 16)
        np.testing.assert_array_equal(part.moments()[mine[0]].reshape(8, 8), a[np.ix_(into, into)])
        assert part.query(query).matrix.shape == (8, 64)
    assert not set(parts[0]._columns.tolist()) & set(parts[1]._columns.tolist())


def test_of_a_log_of_narrow_floats(tmp_path, seeds):
    """Its parts are cut from what is stored, but are not rounded once more."""
    log, query = logged(tmp_path / "log", dtype="bfloat16")
    found, wide = (trust(*one, "dot", nulls=0) for one in ((log, query), seeds[0]))
    assert np.abs(found.correlation - wide.correlation).max() < 0.01
    ((_, block),) = Part(log, 0, 2).blocks()
    assert block.dtype == torch.float32


def test_of_a_log_that_is_not_finished(tmp_path):
    log, query = logged(tmp_path / "log", n=40, finish=False)
    with pytest.warns(UnfinishedWarning, match="is not finished") as caught:
        assert len(trust(log, query, "dot", nulls=0).correlation) == 8
    assert len([one for one in caught if one.category is UnfinishedWarning]) == 1


def test_without_projection_and_with_arguments_that_cannot_work(tmp_path, seeds):
    log, query = logged(tmp_path / "whole", projection="none")
    found = trust(log, query, nulls=0)
    assert found.how == "no random projection" and (found.stays == 1).all() and (found.overlap == 10).all()
    small_whole = log.compress(tmp_path / "bits", "int1") and loghook.load(tmp_path / "bits")
    assert "int1" in trust(small_whole, query, nulls=0).how
    with pytest.raises(ConfigError, match="holds one row"):
        trust(*logged(tmp_path / "one", n=1))
    small = logged(tmp_path / "small", rank=4)
    with pytest.raises(ConfigError, match="rank 8 or more"):
        trust(*small)
    for arguments in ({"k": 0}, {"k": 300}, {"nulls": -1}):
        with pytest.raises(ConfigError, match=r"\w+=-?\d+ must be a whole number"):
            trust(*seeds[0], **arguments)
