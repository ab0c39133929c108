"""The demo: its parts against slow references, and the whole of it on a tiny configuration."""

import io
import json
import re
import sys
from dataclasses import replace
from html import escape

import numpy as np
import pytest
import torch
from rich.console import Console

import loghook
from loghook.demo import DemoConfig, run_demo
from loghook.demo.page import Bars, Report, render
from loghook.demo.proof import NAMES, Proof, measure_all, story
from loghook.demo.text import (
    Document,
    cut,
    language_reference,
    load_documents,
    load_tokenizer,
    split,
    start_tokens,
    tokenize,
    train_tokenizer,
)
from loghook.demo.train import Task, collate, generate, load_model, sequence_losses, shuffled, small_llama
from loghook.errors import ConfigError
from loghook.evaluate.lds import Estimate
from loghook.page import Card, Entry
from tests.test_page import check_self_contained


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([document.text for document in language_reference()], 512)


# The text


@pytest.mark.parametrize("length", [7, 31])
def test_cutting_loses_nothing(tokenizer, length):
    for document in [*language_reference()[:12], Document("odd", "naïve 🙂🙂🙂 " * 40), Document("empty", "")]:
        pieces = list(cut(document, tokenizer, length))
        assert "".join(text for text, _ in pieces) == document.text
        assert [i for _, ids in pieces for i in ids] == tokenize(tokenizer, document.text)[0]
        assert all(0 < len(ids) <= length for _, ids in pieces)


def test_passages_are_labelled_and_held_out(tokenizer):
    config = DemoConfig.fast()
    parts = split(language_reference(), tokenizer, config)
    ids = [passage.data_id for passage in (*parts.train, *parts.queries)]
    assert len(set(ids)) == len(ids)
    assert len(parts.train) == config.passages and len(parts.groups) == config.groups
    assert all(passage.data_id.startswith(passage.topic + "#") for passage in parts.train)
    for topic, passages in parts.groups:
        assert [passage.topic for passage in passages] == [topic] * config.group_size
        assert all(int(p.data_id.split("#")[1]) % config.hold_out == config.hold_out // 2 for p in passages)
    assert all(passage.tokens[:1] == start_tokens(tokenizer) for passage in parts.train)
    assert all(2 <= len(passage.tokens) <= config.chunk_tokens for passage in parts.train)


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="groups=2"):
        split([Document("a", "some words " * 300)], tokenizer, DemoConfig.fast())
    with pytest.raises(ConfigError, match="is none"):
        split([Document("a", "few")], tokenizer, DemoConfig.fast())


# Training


def test_losses_do_not_see_padding():
    model = small_llama(DemoConfig.fast()).eval()
    sequences = [[1, 5, 9, 7], [1, 3], [1, 8, 8, 2, 4, 6]]
    together = sequence_losses(model, *collate(sequences))
    alone = torch.cat([sequence_losses(model, *collate([sequence])) for sequence in sequences])
    torch.testing.assert_close(together, alone)


def test_a_removal_changes_nothing_else():
    sequences, keep = [[i] for i in range(50)], [i % 7 != 0 for i in range(50)]
    full = [s[0] for batch in shuffled(sequences, [True] * 50, 1.5, 8, seed=3) for s in batch]
    less = [s[0] for batch in shuffled(sequences, keep, 1.5, 8, seed=3) for s in batch]
    assert len(full) == 75 and sorted(full[:50]) == list(range(50))
    assert less == [i for i in full if keep[i]]


def test_generation_is_reproducible():
    model = small_llama(DemoConfig.fast()).eval()
    assert generate(model, (1, 4), 6, seed=1) == generate(model, (1, 4), 6, seed=1)
    assert len(generate(model, (1, 4), 6, seed=1)) == 8


def test_workers_change_no_number(tmp_path):
    config = DemoConfig.fast(out=tmp_path)
    small_llama(config).save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(0)
    train = [[1, *rng.integers(2, 512, 20).tolist()] for _ in range(24)]
    keeps = [rng.random(24) < 0.5 for _ in range(2)]
    results = [
        measure_all(Task(str(tmp_path / "base"), train, train[:3], replace(config, workers=n)), keeps) for n in (1, 2)
    ]
    np.testing.assert_array_equal(*results)
    assert (results[0][0] != results[0][1]).all()


# The proof


def test_story_follows_the_numbers():
    def proof(ekfac, lead):
        def about(mean, width=0.1):
            return Estimate(mean, mean - width, mean + width, np.array([mean]))

        leads = {method: about(lead) for method in ("cosine", "dot", "bm25", "random")}
        rises = {"ekfac": about(ekfac), "random": about(0.0, 0.0)}
        return Proof(removed=5, full=np.zeros(2), losses={}, rises=rises, leads=leads, lds={}, subsets=0)

    assert "raises" in story(proof(0.5, 0.0))[0] and "not clearly change" in story(proof(0.05, 0.0))[0]
    assert "weaker than BM25" in story(proof(0.5, -0.3))[3] and "stronger than BM25" in story(proof(0.5, 0.3))[3]
    assert "not clearly different" in story(proof(0.5, 0.0))[3]


# The page


def test_page_escapes_every_text():
    bad = "<script>alert('x')</script><img src=http://x>&\"'"
    card = Card(bad, bad, bad, bad, [Entry(1.0, bad, bad, bad)], [Entry(-1.0, bad, bad, bad)])
    bars = Bars(title=bad, note=bad, estimates={"bm25": Estimate(0.5, -0.1, 1.2, np.zeros(1))})
    html = render(Report(lead=bad, story=[bad], bars=[bars], cards=[card], facts={bad: bad}))
    assert "<script" not in html and "<img" not in html
    # lead, story, two of bars, two of facts; kind (capitalised), title, before and text; three of a passage, twice
    assert html.lower().count(escape(bad)) == 6 + 4 + 2 * 3


# The whole


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    config = DemoConfig.fast(out=out, workers=1, lds_subsets=4, prompts=("The [b]with[/b] <script>",))
    return config, run_demo(config, console=Console(file=printed, width=120)), printed


def test_the_terminal_and_the_page_show_the_same(demo):
    _, result, printed = demo
    html, text = result.page.read_text(), printed.getvalue()
    check_self_contained(html)
    assert "[b]with[/b]" in text and "[b]with[/b] &lt;script&gt;" in html
    assert result.report.bars
    for bars in result.report.bars:
        assert escape(bars.title) in html and bars.title in text
        for method, e in bars.estimates.items():
            mean, interval = f"{e.mean:+.3f}", f"{e.low:+.3f} to {e.high:+.3f}"
            assert re.search(rf"{NAMES[method]} +{re.escape(mean)} +{re.escape(interval)}", text)
            assert f"<th>{NAMES[method]}</th><td>{mean}</td><td class=dim>{interval}</td>" in html
    for line in result.report.story:
        assert line.split(":")[0] in " ".join(text.split()) and f"<li>{escape(line)}</li>" in html
    for method, estimate in result.proof.rises.items():
        assert estimate.mean == pytest.approx(float((result.proof.losses[method] - result.proof.full).mean()))


def test_every_question_is_scored_against_every_passage(demo):
    config, result, _ = demo
    kinds = {name.rpartition(".")[2] for name in loghook.load(result.log).layers}
    assert kinds == {"o_proj", "down_proj"}
    assert set(result.scores) == {"ekfac", "cosine", "dot", "bm25"}
    assert all(values.shape == (4 + 2 + 2, config.passages) for values in result.scores.values())
    assert [question.kind for question in result.questions] == ["held out"] * 4 + ["generated"] * 2 + ["prompt"] * 2
    assert result.proof.removed == round(config.fraction * config.passages)
    card = result.report.cards[0]
    assert card.proponents[0].score == result.scores["ekfac"][0].max()
    assert card.opponents[0].score == result.scores["ekfac"][0].min()


def test_a_second_run_reuses_the_pretrained_model(demo):
    config, first, _ = demo
    weights = next(config.out.glob("base-*/model.safetensors"))
    before = weights.stat().st_mtime_ns
    again = run_demo(replace(config, prove=False), console=Console(file=io.StringIO()))
    assert weights.stat().st_mtime_ns == before and again.proof is None
    np.testing.assert_allclose(again.scores["dot"], first.scores["dot"], rtol=1e-4, atol=1e-4)
    assert not list(config.out.rglob("*.bin")) + list(config.out.rglob("*.pt")) + list(config.out.rglob("*.pkl"))


# Models and datasets by name


def test_a_named_model_and_dataset_take_the_same_path(tmp_path, tokenizer):
    pytest.importorskip("datasets")
    small_llama(DemoConfig.fast()).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    records = [json.dumps({"text": d.text[:1500], "topic": d.topic}) for d in language_reference()[:24]]
    (tmp_path / "data.jsonl").write_text("\n".join(records))
    config = DemoConfig.fast(
        out=tmp_path / "out", model=str(tmp_path / "model"), dataset=str(tmp_path / "data.jsonl"), workers=1
    )
    result = run_demo(config, console=Console(file=io.StringIO()))
    assert result.page.exists() and len(result.passages) == config.passages
    assert {passage.topic for passage in result.passages} <= {d.topic for d in language_reference()}
    assert not list(config.out.glob("base-*"))
    assert len(loghook.load(result.log).layers) == 7 * DemoConfig.fast().layers  # of a named model all are logged


def test_records_without_a_topic_are_grouped_in_blocks(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "data.csv").write_text("text\n" + "\n".join(f"line {i}" for i in range(30)))
    documents = list(load_documents(str(tmp_path / "data.csv"), DemoConfig.fast()))
    assert len(documents) == 30
    assert [d.topic for d in documents[:13]] == ["records from 0"] * 12 + ["records from 12"]


def test_missing_things_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"model='.*nothing' cannot be loaded"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"model='.*nothing' cannot be loaded"):
        load_model(str(tmp_path / "nothing"), "cpu")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"dataset='x' needs the datasets library: pip install 'loghook\[hub\]'"):
        next(load_documents("x", DemoConfig()))


def test_an_unusable_dataset_is_named(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match=r"cannot be loaded"):
        next(load_documents(str(tmp_path / "missing.jsonl"), DemoConfig()))
    (tmp_path / "numbers.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match=r"columns \['a'\]"):
        next(load_documents(str(tmp_path / "numbers.jsonl"), DemoConfig()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"fraction": 0.9}, "fraction=0.9"),
        ({"epochs": 0.0}, "epochs=0.0"),
        ({"hidden": 30, "heads": 4}, "hidden=30 over heads=4"),
        ({"lds_subsets": 2}, "lds_subsets=2"),
        ({"prompts": "one"}, "prompts='one'"),
        ({"prompts": (" ",)}, "is empty"),
        ({"finetune_lr": -1.0}, "learning_rate=-1.0"),
    ],
)
def test_configuration_is_checked_at_birth(change, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        DemoConfig(**change)
