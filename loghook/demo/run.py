"""The demo from end to end: pre-train, fine-tune, log, attribute, prove, show."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tqdm import tqdm

import loghook
from loghook.demo import huggingface
from loghook.demo.attribute import Question, ask, log_passages, score
from loghook.demo.config import DemoConfig
from loghook.demo.proof import Proof, prove, story
from loghook.demo.retrain import Task, finetune, one_thread, quiet
from loghook.demo.show import make_bars, make_cards, print_cards, print_proof
from loghook.demo.text import (
    Passage,
    Split,
    decode,
    language_reference,
    library_source,
    split,
    start_tokens,
    tokenize,
    train_tokenizer,
)
from loghook.demo.train import fit, generate, mean_losses, small_llama
from loghook.views.report import Report, write


@dataclass(frozen=True)
class DemoResult:
    """What ``run_demo`` found."""

    page: Path  # the HTML page
    log: Path  # folder of the log
    report: Report  # what page and terminal show
    # by method, float (questions, passages): first the held-out passages, then what was generated
    scores: dict[str, np.ndarray]
    questions: Sequence[Question]  # the rows of the scores
    passages: Sequence[Passage]  # their columns
    proof: Proof | None  # what fine-tuning again showed, or None if it was not asked for
    seconds: dict[str, float]  # wall-clock time of each stage


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
            base = config.model or _own_base(config)
            tokenizer = huggingface.load_tokenizer(base)
            documents = huggingface.load_documents(config.dataset, config) if config.dataset else language_reference()
            parts = split(documents, tokenizer, config)
        passages, queries = parts.train, parts.queries
        console.print(f"{len(passages)} passages to fine-tune on, {len(queries)} held out to ask about: "
                      f"{', '.join(topic for topic, _ in parts.groups)}", markup=False)  # fmt: skip
        task = Task(base, [p.tokens for p in passages], [p.tokens for p in queries], config)
        with clock("fine-tuning"):
            model: Any = finetune(task, [True] * len(passages), "fine-tuning")
            full = np.array(mean_losses(model, task.queries, config.batch_size))
        with clock("log"):
            log_passages(model, passages, config.out / "log", config)
        with clock("attribution"):
            questions = _questions(model, tokenizer, parts, config)
            log = loghook.load(config.out / "log")
            scores = score(log, ask(model, questions, log, config), questions, passages, config.damping)
        # Of the held-out passages a group's first is shown, then all that was generated.
        shown = [i for i, q in enumerate(questions) if q.kind != "held out" or i % config.group_size == 0]
        cards = make_cards([questions[i] for i in shown], passages, scores["ekfac"][shown], config.show)
        print_cards(cards, console)
        proof = None
        if config.prove:
            with clock("proof"):
                held = {method: values[: len(queries)] for method, values in scores.items()}
                proof = prove(task, full, held, [len(group) for _, group in parts.groups], config)

    report = Report(
        title="loghook: which training data made the model say this?",
        lead=f"A language model was fine-tuned on {len(passages)} passages. Each left one row in the log; EK-FAC "
        "influence ranks them for each text below.",
        story=tuple(story(proof)) if proof else (),
        bars=make_bars(proof, len(queries), len(parts.groups)) if proof else (),
        cards=cards,
        facts=tuple((name, str(value)) for name, value in asdict(config).items() if name != "out")
        + tuple((f"seconds: {stage}", f"{value:.1f}") for stage, value in seconds.items()),
    )
    page = write(report, config.out / "index.html")
    print_proof(report, console)
    console.print(f"\npage: {page}\nlog:  {log.path}", markup=False)
    return DemoResult(page, config.out / "log", report, scores, questions, passages, proof, seconds)


def _own_base(config: DemoConfig) -> str:
    """Folder of the small model, pre-trained now or by an earlier run with the same settings."""
    folder = config.out / f"base-{config.digest()}"
    if folder.exists():
        return str(folder)
    library = library_source(config.corpus_bytes)
    tokenizer = train_tokenizer([*library, *(d.text for d in language_reference())], config.vocabulary)
    start, stream = start_tokens(tokenizer), []
    for text in tqdm(library, "reading", unit="module"):
        stream += [*start, *tokenize(tokenizer, text)[0]]
    size = config.pretrain_tokens
    sequences = [stream[k : k + size] for k in range(0, len(stream) - size + 1, size)]
    order = np.random.default_rng(config.seed).permutation(len(sequences))
    endless = (sequences[i] for i in cycle(order))
    batches = iter(lambda: list(islice(endless, config.batch_size)), [])
    model: Any = small_llama(config).to(config.device)
    steps = fit(model, batches, config.pretrain_steps, config.pretrain_lr)
    with tqdm(steps, "pre-training", total=config.pretrain_steps, unit="step") as bar:
        for loss in bar:
            bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
    unfinished = folder.with_name(folder.name + ".tmp")
    tokenizer.save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    unfinished.rename(folder)  # a folder of this name is whole
    return str(folder)


def _questions(model: Any, tokenizer: Any, parts: Split, config: DemoConfig) -> list[Question]:
    """What is asked about: held-out passages, what the model makes of their beginnings and of the user's prompts."""
    questions = [Question(p.data_id, "held out", p.topic, p.text, p.tokens) for p in parts.queries]

    def go_on(data_id: str, kind: str, title: str, start: tuple[int, ...]) -> None:
        ids = generate(model, start, config.new_tokens, config.seed)
        text, before = decode(tokenizer, ids), decode(tokenizer, start)
        questions.append(Question(data_id, kind, title, text, tuple(ids), before, len(start)))

    for topic, passages in parts.groups:
        start = passages[0].tokens[: config.chunk_tokens // 8]
        title = f"the beginning of a passage on {topic}, and how the model goes on"
        go_on(f"generated#{topic}", "generated", title, start)
    for number, prompt in enumerate(config.prompts):
        start = (*start_tokens(tokenizer), *tokenize(tokenizer, prompt)[0])
        if len(start) > 1:  # a single token is never predicted
            questions.append(Question(f"prompt#{number}", "prompt", "the prompt itself", prompt, start))
        go_on(f"continuation#{number}", "prompt", "how the model goes on", start)
    return questions
