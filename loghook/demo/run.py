"""The demo from end to end: pre-train, fine-tune, log, attribute, prove, show.

``log_passages``, ``ask`` and ``score`` are the part that is loghook, and what a user would copy.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from tqdm import tqdm

import loghook
from loghook.demo.config import DemoConfig
from loghook.demo.page import Report, make_bars, make_card, print_cards, print_proof, render
from loghook.demo.proof import METHODS, Proof, prove, story
from loghook.demo.questions import Question, make_questions
from loghook.demo.text import Passage, language_reference, load_documents, load_tokenizer, split
from loghook.demo.train import Task, collate, finetune, mean_losses, one_thread, pretrained, quiet, sequence_losses
from loghook.evaluate.controls import bm25
from loghook.log.disk import write_atomically


class DemoResult(NamedTuple):
    """What ``run_demo`` found."""

    page: Path  # the HTML page
    log: Path  # folder of the log
    report: Report  # what page and terminal show
    # by method, float (questions, passages): first the held-out passages, then what was generated
    scores: dict[str, np.ndarray]
    questions: Sequence[Question]  # the rows of the scores
    passages: Sequence[Passage]  # their columns
    proof: Proof | None  # what fine-tuning again showed, or None if it was not asked for


def run_demo(config: DemoConfig | None = None, *, console: Console | None = None) -> DemoResult:
    """Run the demo: real text, a real fine-tuning, a log of it, questions, and the proof by fine-tuning again.

    Fine-tuning again starts processes: call this under ``if __name__ == "__main__":`` in a script, or with
    ``workers=1`` where a process cannot import the main module (a notebook, code read from standard input).

    Args:
        config: what to run; by default the main demo, about five minutes on two cores.
        console: where results are printed; standard output by default. Progress bars go to standard error.

    Raises:
        ConfigError: for text, a model or a dataset that is missing or too little.
    """
    config, console = config or DemoConfig(), console or Console()
    seconds: dict[str, float] = {}

    @contextmanager
    def clock(stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[stage] = time.perf_counter() - begin
        console.print(f"[dim]{stage}: {seconds[stage]:.0f} s[/dim]")

    config.out.mkdir(parents=True, exist_ok=True)
    with quiet(), one_thread(config.device):
        with clock("text and base model"):
            base = config.model or pretrained(config)
            tokenizer = load_tokenizer(base)
            documents = load_documents(config.dataset, config) if config.dataset else language_reference()
            data = split(documents, tokenizer, config)
        passages, held_out = data.train, data.queries
        topics = ", ".join(topic for topic, _ in data.groups)
        counts = f"{len(passages)} passages to fine-tune on, {len(held_out)} held out to ask about: "
        console.print(counts + topics, markup=False)
        task = Task(base, [p.tokens for p in passages], [p.tokens for p in held_out], config)
        with clock("fine-tuning"):
            model: Any = finetune(task, [True] * len(passages), "fine-tuning")
            full = np.array(mean_losses(model, task.queries, config.batch_size))
        with clock("log"):
            log_passages(model, passages, config.out / "log", config)
        with clock("attribution"):
            questions = make_questions(model, tokenizer, data, config)
            log = loghook.load(config.out / "log")
            scores = score(log, ask(model, questions, log, config), questions, passages, config.damping)
        # Of the held-out passages a group's first is shown, then all that was generated.
        shown = [i for i, q in enumerate(questions) if q.kind != "held out" or i % config.group_size == 0]
        cards = [make_card(questions[i], passages, scores["ekfac"][i], config.show) for i in shown]
        print_cards(cards, console)
        proof = None
        if config.prove:
            with clock("proof"):
                of_held_out = {method: values[: len(held_out)] for method, values in scores.items()}
                proof = prove(task, full, of_held_out, [len(group) for _, group in data.groups])

    facts = {name: value for name, value in asdict(config).items() if name != "out"}
    report = Report(
        lead=f"A language model was fine-tuned on {len(passages)} passages. Each left one row in the log; EK-FAC "
        "influence ranks them for each text below.",
        story=story(proof) if proof else (),
        bars=make_bars(proof, len(data.groups)) if proof else (),
        cards=cards,
        facts=facts | {f"seconds: {stage}": f"{value:.1f}" for stage, value in seconds.items()},
    )
    page = config.out / "index.html"
    write_atomically(page, render(report).encode())
    print_proof(report, console)
    console.print(f"\npage: {page}\nlog:  {log.path}", markup=False)
    return DemoResult(page, config.out / "log", report, scores, questions, passages, proof)


def log_passages(model: Any, passages: Sequence[Passage], path: Path, config: DemoConfig) -> None:
    """Log a row for each passage, in a frozen pass: no weight gradient is computed."""
    run = loghook.init(path, rank=config.rank, seed=config.seed, overwrite=True)
    run.watch(model, include=config.watched)
    batches = [passages[k : k + config.batch_size] for k in range(0, len(passages), config.batch_size)]
    with loghook.frozen(model):
        for step in run.passes():
            for batch in tqdm(batches, f"logging ({step.kind})", unit="batch"):
                ids_BS, mask_BS = collate([passage.tokens for passage in batch], config.device)
                with run(data_id=[passage.data_id for passage in batch], mask=mask_BS):
                    sequence_losses(model, ids_BS, mask_BS).sum().backward()
    run.finalize()
    run.close()


def ask(model: Any, questions: Sequence[Question], log: loghook.Log, config: DemoConfig) -> loghook.Query:
    """Rows of the questions, through the same hooks."""
    asker, queries = log.attach(model), []
    with loghook.frozen(model):
        for k in tqdm(range(0, len(questions), config.batch_size), "asking", unit="batch"):
            batch = questions[k : k + config.batch_size]
            ids_BS, mask_BS = collate([question.tokens for question in batch], config.device)
            counts_BS = mask_BS.clone()
            for row, question in zip(counts_BS, batch, strict=True):
                row[: question.context] = 0
            with asker.query(data_id=[question.data_id for question in batch], mask=mask_BS) as query:
                sequence_losses(model, ids_BS, counts_BS).sum().backward()
            queries.append(query)
    asker.close()
    return loghook.Query.concat(queries)


def score(
    log: loghook.Log, query: loghook.Query, questions: Sequence[Question], passages: Sequence[Passage], damping: float
) -> dict[str, np.ndarray]:
    """Score every passage for every question with every method: (questions, passages), in the passages' order."""
    ids = [passage.data_id for passage in passages]
    scores = {m: log.influence(query, m, damping=damping).align(ids).values for m in METHODS if m != "bm25"}
    return scores | {"bm25": bm25([question.text for question in questions], [passage.text for passage in passages])}
