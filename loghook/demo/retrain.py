"""Fine-tune again, many times: the same weights, the same order, some passages left out."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from loghook.demo.config import DemoConfig
from loghook.demo.huggingface import load_model
from loghook.demo.train import Sequences, fit, mean_losses, shuffled


@dataclass(frozen=True)
class Task:
    """All that a fine-tuning needs but the passages to keep.

    Attributes:
        base: folder or name of the model it starts from.
        train: ids of the passages.
        queries: ids of the passages whose loss is wanted.
        config: steps, rates and seed.
    """

    base: str
    train: Sequences
    queries: Sequences
    config: DemoConfig


def finetune(task: Task, keep: Sequence[bool], progress: str | None = None) -> nn.Module:
    """Fine-tune the base on the kept passages; with ``progress``, under a bar of that name."""
    config = task.config
    with one_thread(config.device):
        torch.manual_seed(config.seed)
        model = load_model(task.base, config.device)
        batches = shuffled(task.train, keep, config.epochs, config.batch_size, config.seed)
        losses = fit(model, batches, len(batches), config.learning_rate)
        for _ in tqdm(losses, progress, total=len(batches), unit="step", disable=progress is None):
            pass
    return model


def measure(task: Task, keep: Sequence[bool]) -> list[float]:
    """Losses of the queries after fine-tuning on the kept passages."""
    with one_thread(task.config.device):
        return mean_losses(finetune(task, keep), task.queries, task.config.batch_size)


def measure_all(task: Task, keeps: Sequence[np.ndarray], progress: str) -> np.ndarray:
    """Do ``measure`` for many choices, several at a time: (choices, queries).

    Each fine-tuning computes on one thread, so that the numbers do not depend on how many run at once.
    """
    results = np.zeros((len(keeps), len(task.queries)))
    workers = min(task.config.processes, len(keeps))
    if workers <= 1:
        for i, keep in enumerate(tqdm(keeps, progress, unit="fine-tuning")):
            results[i] = measure(task, keep.tolist())
        return results
    context = multiprocessing.get_context("spawn")  # a fork after torch has started its threads can hang
    with ProcessPoolExecutor(workers, context, _start, (task,)) as pool:
        futures = {pool.submit(_measure, keep.tolist()): i for i, keep in enumerate(keeps)}
        for future in tqdm(as_completed(futures), progress, total=len(futures), unit="fine-tuning"):
            results[futures[future]] = future.result()
    return results


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """Compute on one CPU thread: sums come in one order, and small matrices are no faster on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_task: Task | None = None


def _start(task: Task) -> None:
    """Run once in each worker, so that passages travel once."""
    global _task
    from transformers.utils import logging

    logging.disable_progress_bar()
    _task = task


def _measure(keep: list[bool]) -> list[float]:
    assert _task is not None
    return measure(_task, keep)
