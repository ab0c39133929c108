"""The part that is loghook: log every passage, ask questions, rank the passages. This is what a user would copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import loghook
from loghook.demo.config import METHODS, DemoConfig
from loghook.demo.text import Passage
from loghook.demo.train import collate, sequence_losses
from loghook.evaluate.controls import bm25


@dataclass(frozen=True)
class Question:
    """Something the model says, whose loss is attributed."""

    data_id: str  # what the query is called
    kind: str  # "held out", "generated" or "prompt"
    title: str  # a line above it
    text: str  # all of it
    tokens: tuple[int, ...]  # its ids
    before: str = ""  # the text in front that counts for nothing
    given: int = 1  # how many of them at the front are context only and count for nothing


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
                row[: question.given] = 0
            with asker.query(data_id=[question.data_id for question in batch], mask=mask_BS) as query:
                sequence_losses(model, ids_BS, counts_BS).sum().backward()
            queries.append(query)
    asker.close()
    return loghook.Query.concat(queries)


def score(
    log: loghook.Log, query: loghook.Query, questions: Sequence[Question], passages: Sequence[Passage], damping: float
) -> dict[str, np.ndarray]:
    """Score every passage for every question with every method: (questions, passages), in the passages' order."""
    place = {data_id: i for i, data_id in enumerate(log.data_ids)}
    order = [place[passage.data_id] for passage in passages]
    scores = {m: log.influence(query, m, damping=damping).values[:, order] for m in METHODS if m != "bm25"}
    return scores | {"bm25": bm25([question.text for question in questions], [passage.text for passage in passages])}
