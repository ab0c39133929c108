"""The ground truths in benchmarks/truths: each loads, has the shapes it states, and could tell methods apart."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness import benchmarks

TRUTHS = Path(__file__).parents[1] / "benchmarks" / "truths"
NAMES = tuple(file.stem for file in sorted(TRUTHS.glob("*.py")) if file.stem != "base")
SHAPES = {  # training samples, queries, at least so many halves
    "digits_cnn": (1200, 200, 60),
    "digits_mlp": (1200, 200, 100),
    "facts": (998, 60, 0),
    "labels": (1200, 50, 0),
    "text": (1200, 50, 60),
}


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    pytest.importorskip("sklearn")
    with benchmarks() as load:
        yield load


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest, load: Any) -> Any:
    return load(request.param).task()


def test_every_truth_has_its_shapes_here() -> None:
    assert set(NAMES) == set(SHAPES)


def test_shapes_and_truth(task: Any) -> None:
    samples, queries, least = SHAPES[task.name]
    assert (task.n_train, task.n_query) == (samples, queries)
    for texts in (task.texts, task.labels):
        assert texts is None or (len(texts[0]), len(texts[1])) == (samples, queries)
    assert sum(truth is not None for truth in (task.losses, task.flipped, task.relevant)) == 1
    if not least:
        return
    halves = task.about["halves"]
    assert halves >= least
    assert task.members.shape == (halves, samples) and task.members.dtype == bool
    assert (task.members.sum(1) == samples // 2).all() and len(np.unique(task.members, axis=0)) == halves
    assert task.losses.shape == (halves, queries) and task.losses.dtype == np.float32
    assert np.isfinite(task.losses).all() and (task.losses.std(0) > 0).all()
    assert 0.5 < task.about["ceiling"] < 1
    file = TRUTHS / f"{task.name}.safetensors"
    assert task.name == "digits_mlp" or file.stat().st_size < 300_000


def test_the_loss_is_summed_over_samples_that_do_not_mix(task: Any) -> None:
    model = task.build()
    for which in ("train", "query"):
        (batch,) = task.batches(which, [0, 3, 5])
        alone = [task.loss(model, one) for one in task.batches(which, [0, 3, 5], size=1)]
        torch.testing.assert_close(task.loss(model, batch), sum(alone), rtol=1e-4, atol=1e-4)
        assert task.represent(model, batch).shape[0] == 3
    sizes = [len(next(iter(batch.values()))) for batch in task.batches("query", size=32)]
    assert sum(sizes) == task.n_query and max(sizes) == 32
    vectors = task.representations(model, "query")
    assert len(vectors) == task.n_query and np.isfinite(vectors).all() and vectors.std(0).max() > 0


def test_labels_are_wrong_where_it_says_so(load: Any) -> None:
    task, text = load("labels").task(), load("text")
    true = text.data()["topics"][: text.N].numpy()
    assert ((task.labels[0] != true) == task.flipped).all() and task.flipped.sum() == 120


def test_facts_are_stated_where_it_says_so(load: Any) -> None:
    task = load("facts").task()
    train, questions = task.texts
    for question, places in zip(questions, task.relevant, strict=True):
        answer = question.split()[-1]
        person = next(word for word in question.split() if word[0].isupper())
        assert 3 <= len(places) <= 5 and question not in train
        for place in places:
            assert person in train[place].split() and train[place].split()[-1] == answer
    queries = task.queries
    assert ((queries["targets"] != -100).sum(1) == 1).all()  # the answer alone
    last = queries["mask"].sum(1, keepdim=True) - 1
    assert (queries["targets"].gather(1, last) == queries["input_ids"].gather(1, last)).all()


def test_text_starts_from_the_shipped_weights(load: Any) -> None:
    text, base = load("text"), load("base")
    model = text.build()
    assert sum(isinstance(m, torch.nn.Linear) for m in model.model.modules()) == 28
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loss = base.query_losses(text.task(), model).mean() / (text.TOKENS - 1)
    assert loss < 0.7 * np.log(text.MODEL.vocabulary), loss  # nats a token; an untrained model has more than the log


def test_a_trained_model_is_kept(load: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    task, base = load("labels").task(), load("base")
    (first,) = task.models(1, tmp_path)
    assert not [warning for warning in recwarn if "labels" in str(warning.message)]  # no drift
    assert base.query_losses(task, first).mean() < 0.8 * np.log(6)
    (again,) = task.models(1, tmp_path)
    assert again is not first and len(list(tmp_path.iterdir())) == 1
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_tail_patch_takes_its_step_back(load: Any) -> None:
    task, base = load("facts").task(), load("base")
    model = task.build()
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    top = np.array([places[:1] for places in task.relevant])[:2]
    before, after = base.tail_patch_logs(task, model, top, rate=1e-2)
    assert before.shape == (60,) and after.shape == (2, 1)
    assert (after[:, 0] > before[:2]).all()  # a step on a sentence with the answer makes the answer likelier
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["labels.py"], "120 training labels are wrong"), (["facts.py", "--retrain"], "nothing to retrain")],
)
def test_command_line(arguments: list[str], says: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(TRUTHS.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=TRUTHS, env=environment, capture_output=True, text=True, timeout=120)
    assert says in done.stdout + done.stderr


def test_the_digits_truth_is_that_of_digits_py(load: Any) -> None:
    task = load("digits_mlp").task()
    one, other = task.build(), task.build()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert task.about["recipe"] == load("digits").asdict(load("digits_mlp").RECIPE)
    model = task.fit(np.ones(task.n_train, dtype=bool), 7)
    end, way = task.checkpoint(7, 1.0), task.checkpoint(7, 0.05)
    assert all(torch.equal(a, b) for a, b in zip(end.parameters(), model.parameters(), strict=True))
    assert base_loss(load, task, way) > base_loss(load, task, end)


def base_loss(load: Any, task: Any, model: torch.nn.Module) -> float:
    return float(load("base").query_losses(task, model).mean())


def test_what_is_replayed_is_the_training_of_the_digits_model(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, digits = load("digits_mlp"), load("digits")
    monkeypatch.setattr(module, "RECIPE", digits.Recipe(epochs=1))  # more amplify rounding
    model, training = module.fit(np.ones(1200, dtype=bool), seed=7), module.training(7)
    optimizer = module.optimizer(model, 7)
    assert len(training.batches) == 1200 // 64
    for name, values in training.run().items():  # Adam amplifies the rounding of entries with hardly any gradient
        moved, apart = (model.get_parameter(name) - t for t in (training.parameters[name], values))
        assert apart.norm() < 1e-2 * moved.norm()
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 18 and state["exp_avg_sq"].shape == parameter.shape
        assert float(state["exp_avg_sq"].max()) > 0
