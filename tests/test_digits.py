"""Accuracy, end to end and through the public face: scores against retraining on scikit-learn's digits.

A reduced version of benchmarks/digits.py: its truth (500 retrainings, kept in a file), two models of its five, rank 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from loghook.evaluate.lds import lds
from tests.harness import benchmarks


@pytest.fixture(scope="module")
def digits() -> Iterator[ModuleType]:
    pytest.importorskip("sklearn")
    with benchmarks() as load:
        yield load("digits")


def test_ekfac_and_fisher_predict_retraining(digits: ModuleType) -> None:
    data, truth = digits.digits(), digits.load()
    assert truth.about["recipe"] == digits.asdict(digits.Recipe())  # the truth is that of the models below
    assert truth.members.shape == (100, 1200) and (truth.members.sum(1) == 600).all()
    measured: dict[str, list[float]] = {}
    for seed, model in enumerate(digits.models(data, digits.Recipe(), 2)):
        with digits.logged(model, data, rank=32, seed=seed) as (log, query):
            assert len(log) == 1200 and len(query) == 200
            scores = {method: log.influence(query, method).values for method in ("dot", "fisher", "ekfac")}
            scores["random"] = np.random.default_rng(seed).normal(size=scores["dot"].shape)
        for method, values in scores.items():
            measured.setdefault(method, []).append(lds(values, truth.members, truth.losses).mean)
    score = {method: float(np.mean(values)) for method, values in measured.items()}
    assert max(score["fisher"], score["ekfac"]) >= 0.38, score
    assert min(score["fisher"], score["ekfac"]) >= score["dot"] + 0.15, score
    assert 0.05 < score["dot"] < 0.2, score
    assert abs(score["random"]) < 0.05, score


def test_the_ensemble_trains_as_a_plain_loop_does(digits: ModuleType) -> None:
    """The truth is only as good as its trainer: one of many models at once against an ordinary PyTorch loop."""
    data, recipe = digits.digits(), digits.Recipe(epochs=2)
    index = torch.stack([torch.arange(300), torch.arange(500, 800)])
    noise = torch.Generator().manual_seed(5)
    start = digits.train(index, data, digits.Recipe(epochs=0), seed=5)
    for parameter in start:
        torch.rand(parameter.shape, generator=noise)
    trained = digits.train(index, data, recipe, seed=5)
    orders = [index.gather(1, torch.rand(index.shape, generator=noise).argsort(1)) for _ in range(recipe.epochs)]
    for which in range(2):
        model = digits.module(start, which)
        optimizer = recipe.build(model.parameters())
        for order in orders:
            for batch in order[which].split(recipe.batch)[: len(order[which]) // recipe.batch]:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(data.x[batch]), data.y[batch]).backward()
                optimizer.step()
        for parameter, values in zip(model.parameters(), trained, strict=True):
            torch.testing.assert_close(parameter.detach(), values[which].view_as(parameter), rtol=1e-4, atol=1e-5)


def test_the_truth_survives_its_file(digits: ModuleType, tmp_path: Path) -> None:
    truth = digits.load()
    truth.save(tmp_path / "truth.safetensors")
    again = digits.Truth.load(tmp_path / "truth.safetensors")
    assert (again.members == truth.members).all() and (again.losses == truth.losses).all()
    assert again.about == truth.about
