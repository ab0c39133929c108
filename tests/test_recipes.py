"""The recipes page's code, run block by block and compared with autograd, one sample at a time."""

import collections
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import loghook
from tests.test_docs import ROOT, blocks, make_batch
from tests.test_update import changed

OWN_MEAN, LESS, LABELS, DOMAINS, SHAPLEY, SPANS = blocks((ROOT / "docs" / "recipes.md").read_text(), "python")


def token_losses(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    counted = F.pad(batch["attention_mask"][:, 1:], (1, 0)).bool()
    labels = batch["input_ids"].masked_fill(~counted, -100)[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return F.pad(losses.view(labels.shape), (1, 0)), counted


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Names that the page takes for granted, and `own_mean`, which it defines."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=100, max_position_embeddings=12, attn_implementation="eager", **sizes)
    )
    model = model.eval().double()
    loader = [make_batch(list(range(4 * i, 4 * i + 4))) for i in range(3)]
    found = {"model": model, "loader": loader, "token_losses": token_losses}
    found |= {"collections": collections, "loghook": loghook, "np": np, "torch": torch}
    exec(OWN_MEAN, found)
    return found


def watched(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def alone(model, loss):
    """Each watched layer's gradient of a loss, whole."""
    layers = watched(model)
    return dict(
        zip(layers, torch.autograd.grad(loss, [m.weight for m in layers.values()], retain_graph=True), strict=True)
    )


def product(a, b):
    return sum(float((a[name] * b[name]).sum()) for name in a)


def test_less(names, tmp_path):
    model, batches = names["model"], names["loader"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    names |= {"optimizer": optimizer, "questions": [make_batch(["a1", "a2"]), make_batch(["b1"])]}
    names |= {"task_of": {"a1": "a", "a2": "a", "b1": "b"}, "checkpoints": []}
    expected = 0
    for step, rate in enumerate((0.1, 0.02)):
        names["own_mean"](model, batches[step]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        file = tmp_path / f"step{step}.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        names["checkpoints"].append((file, rate))
        asked = [alone(model, loss) for batch in names["questions"] for loss in names["own_mean"](model, batch)]
        rows = []
        for batch in batches:
            for loss in names["own_mean"](model, batch):
                whole = alone(model, loss)
                rows.append(
                    {n: changed("adam", optimizer, m, whole[n][None], False)[0] for n, m in watched(model).items()}
                )
        sizes = [np.sqrt([product(x, x) for x in group]) for group in (asked, rows)]
        cosines = np.array([[product(q, row) for row in rows] for q in asked]) / np.outer(*sizes)
        expected = expected + rate * cosines
    exec(LESS.replace("rank=64", 'projection="none"').replace(', dtype="int8"', ""), names)
    np.testing.assert_allclose(names["less"].values, expected, atol=1e-5)
    worth = np.maximum(expected[:2].mean(0), expected[2])
    np.testing.assert_allclose(names["worth"], worth, atol=1e-5)
    assert names["selected"].tolist() == [int(np.argmax(worth))]
    exec(LESS.replace("runs/", "few/").replace("rank=64", "rank=20"), names)
    assert np.corrcoef(names["less"].values.ravel(), expected.ravel())[0, 1] > 0.9


def test_wrong_labels_and_domains(names):
    with loghook.init("runs/mine", rank=8) as run:
        run.watch(names["model"])
        for batch in reversed(names["loader"]):
            with run(data_id=batch["id"]):
                names["own_mean"](names["model"], batch).sum().backward()
        with run.query(data_id=["q"]) as query:
            names["own_mean"](names["model"], make_batch([0])).sum().backward()
        run.finalize()
    exec(LABELS, names)
    values = dict(zip(names["log"].data_ids, names["suspicion"], strict=True))
    assert names["suspects"].tolist() == sorted(values, key=lambda i: -values[i])
    names |= {
        "scores": names["log"].influence(query, "dot"),
        "domain_of": {i: "odd" if i % 2 else "even" for i in range(12)},
    }
    exec(DOMAINS, names)
    row = dict(zip(names["scores"].data_ids, names["scores"].values[0], strict=True))
    expected = [sum(row[i] for i in range(start, 12, 2)) for start in (0, 1)]
    np.testing.assert_allclose(names["by_domain"], [expected], rtol=1e-4)


def test_shapley_along_a_training(names):
    model, own_mean = names["model"], names["own_mean"]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    names |= {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "validation": make_batch(list(range(5)))}
    exec(SHAPLEY.replace("rank=64", 'projection="none"'), names)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    assert not list(Path("runs/shapley").glob("*"))
    names["run"].close()
    model.load_state_dict(start)
    for batch in names["loader"]:
        aim = alone(model, own_mean(model, names["validation"]).mean())
        for data_id, loss in zip(batch["id"], own_mean(model, batch), strict=True):
            assert names["worth"][data_id] == pytest.approx(0.1 / 4 * product(alone(model, loss), aim), rel=1e-6)
        own_mean(model, batch).mean().backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
    for name, value in model.state_dict().items():  # the training itself is as without
        torch.testing.assert_close(value, trained[name], rtol=0, atol=0)


def test_parts_of_an_answer(names):
    model = names["model"]
    names |= {"text": {"input_ids": torch.randint(100, (1, 12)), "attention_mask": torch.ones(1, 12, dtype=torch.long)}}
    names |= {"spans": {"first": (1, 5), "rest": (5, 12)}}
    run = names["run"] = loghook.init("runs/spans", projection="none", dtype="float64")
    run.watch(model)
    exec(SPANS, names)
    losses = token_losses(model, names["text"])[0][0]
    for place, (start, stop) in enumerate(names["spans"].values()):
        for name, gradient in alone(model, losses[start:stop].sum()).items():
            torch.testing.assert_close(torch.from_numpy(names["query"].rows(name)[place]), gradient)
