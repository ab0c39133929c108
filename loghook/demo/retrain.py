"""Fine-tune again, many times: the same weights, the same order, some passages left out."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from loghook.demo.config import DemoConfig
from loghook.demo.huggingface import load_model
from loghook.demo.train import Sequences, fit, mean_losses, shuffled
from loghook.evaluate.retrain import retrain
from loghook.log.format import checksum


@dataclass(frozen=True)
class Task:
    """All that a fine-tuning needs but the passages to keep."""

    base: str  # folder or name of the model it starts from
    train: Sequences  # ids of the passages
    queries: Sequences  # ids of the passages whose loss is wanted
    config: DemoConfig  # steps, rates and seed


def finetune(task: Task, keep: Sequence[bool], progress: str | None = None) -> nn.Module:
    """Fine-tune the base on the kept passages; with ``progress``, under a bar of that name."""
    config = task.config
    with one_thread(config.device), quiet():
        torch.manual_seed(config.seed)
        model = load_model(task.base, config.device)
        batches = shuffled(task.train, keep, config.epochs, config.batch_size, config.seed)
        losses = fit(model, batches, len(batches), config.learning_rate)
        for _ in tqdm(losses, progress, total=len(batches), unit="step", disable=progress is None):
            pass
    return model


def measure(task: Task, keep: np.ndarray, _: int) -> list[float]:
    """Losses of the queries after fine-tuning on the kept passages; as ``retrain`` calls it."""
    with one_thread(task.config.device):
        return mean_losses(finetune(task, keep.tolist()), task.queries, task.config.batch_size)


def measure_all(task: Task, keeps: Sequence[np.ndarray]) -> np.ndarray:
    """Do ``measure`` for many choices, several at a time: (choices, queries).

    Each fine-tuning computes on one thread, so that the numbers do not depend on how many run at once. A run that is
    broken off goes on where it was.
    """
    workers, what = task.config.processes, replace(task, config=replace(task.config, workers=0))
    results = task.config.out / f"again-{checksum(repr(what).encode() + np.packbits(keeps).tobytes())[:16]}"
    seeds = [task.config.seed]
    measured = retrain(partial(measure, task), keeps, seeds, results, workers=0 if workers == 1 else workers)[:, 0]
    shutil.rmtree(results)
    return measured


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """Compute on one CPU thread: sums come in one order, and small matrices are no faster on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars of loading and saving weights off the screen."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
