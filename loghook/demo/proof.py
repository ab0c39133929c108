"""The proof: take the strongest proponents away, fine-tune again, and see whether the questions get harder."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from loghook.demo.train import Task, finetune, mean_losses, one_thread, quiet
from loghook.evaluate.judges import without_top
from loghook.evaluate.lds import Estimate, estimate, lds, random_subsets
from loghook.evaluate.retrain import retrain
from loghook.log.format import checksum

NAMES = {"ekfac": "EK-FAC", "cosine": "cosine", "dot": "dot product", "bm25": "BM25", "random": "random"}
METHODS = tuple(name for name in NAMES if name != "random")  # that score passages


class Proof(NamedTuple):
    """What fine-tuning again showed, by method: ekfac, cosine, dot, bm25, and random where it makes sense."""

    removed: int  # how many passages a removal takes
    full: np.ndarray  # loss of each question after fine-tuning on everything, nats a token
    losses: dict[str, np.ndarray]  # loss of each question without its group's strongest proponents
    rises: dict[str, Estimate]  # mean rise over the full fine-tuning
    leads: dict[str, Estimate]  # how much more ekfac's removal raises the loss than this one's, question by question
    lds: Mapping[str, Estimate]  # the linear datamodelling score; empty if none was asked for
    subsets: int  # how many random halves it rests on


def prove(task: Task, full: np.ndarray, scores: dict[str, np.ndarray], sizes: Sequence[int]) -> Proof:
    """Fine-tune again without each group's strongest proponents, for each method and at random.

    The task's queries are the groups' passages, of which each has as many as ``sizes`` says; ``full`` are their losses
    after fine-tuning on everything, and ``scores`` (questions, passages) by method.
    """
    config = task.config
    n, rng = len(task.train), np.random.default_rng(config.seed)
    removed = max(1, round(config.fraction * n))
    groups = np.split(np.arange(len(full)), np.cumsum(sizes)[:-1])
    # A group's questions share a removal, by the sum of their scores.
    keeps = [k for m in METHODS for k in without_top([scores[m][group].sum(0) for group in groups], removed)]
    keeps += [~np.isin(np.arange(n), rng.permutation(n)[:removed]) for _ in range(config.random_removals)]
    removals = len(keeps)
    if config.lds_subsets:
        keeps += list(random_subsets(n, config.lds_subsets, seed=config.seed))
    outcomes = measure_all(task, keeps)

    chosen = iter(outcomes)  # in the order of keeps: each method's removals, one for each group
    losses = {method: np.concatenate([next(chosen)[group] for group in groups]) for method in METHODS}
    losses["random"] = outcomes[len(METHODS) * len(groups) : removals].mean(0)

    mean = partial(estimate, resamples=config.resamples, seed=config.seed)
    subsets, measured = np.array(keeps[removals:]), outcomes[removals:]
    return Proof(
        removed=removed,
        full=full,
        losses=losses,
        rises={method: mean(values - full) for method, values in losses.items()},
        leads={method: mean(losses["ekfac"] - values) for method, values in losses.items() if method != "ekfac"},
        lds={method: lds(scores[method], subsets, measured) for method in METHODS if len(subsets)},
        subsets=len(subsets),
    )


def measure_all(task: Task, keeps: Sequence[np.ndarray]) -> np.ndarray:
    """Losses of the queries after fine-tuning on each choice of passages, several at a time: (choices, queries).

    A run that is broken off goes on where it was.
    """
    config, workers = task.config, task.config.processes
    described = repr(task._replace(config=replace(config, workers=0)))  # how many work changes no number
    results = config.out / f"again-{checksum(described.encode() + np.packbits(keeps).tobytes())[:16]}"
    losses = retrain(partial(_measure, task), keeps, [config.seed], results, workers=0 if workers == 1 else workers)
    shutil.rmtree(results)
    return losses[:, 0]


def _measure(task: Task, keep: np.ndarray, _: int) -> list[float]:
    with one_thread(task.config.device), quiet():  # so the numbers do not depend on how many run at once
        return mean_losses(finetune(task, keep.tolist()), task.queries, task.config.batch_size)


def story(proof: Proof) -> list[str]:
    """Say in words what the numbers say, and nothing else."""
    ekfac, random = proof.rises["ekfac"], proof.rises["random"]
    effect = "raises" if ekfac.low > 0 else "lowers" if ekfac.high < 0 else "does not clearly change"
    lines = [
        f"Leaving out EK-FAC's {proof.removed} strongest proponents of a group {effect} the loss on its passages: "
        f"{ekfac.mean:+.2f} nats a token ({ekfac.low:+.2f} to {ekfac.high:+.2f}); random removal: {random.mean:+.2f}."
    ]
    for method, lead in proof.leads.items():
        verdict = "stronger than" if lead.low > 0 else "weaker than" if lead.high < 0 else "not clearly different from"
        lines.append(
            f"EK-FAC is {verdict} {NAMES[method]} here: {lead.mean:+.2f} nats, {lead.low:+.2f} to {lead.high:+.2f}."
        )
    if proof.lds:
        ranking = sorted(proof.lds.items(), key=lambda entry: -entry[1].mean)
        scores = ", ".join(f"{NAMES[method]} {estimate.mean:.2f}" for method, estimate in ranking)
        lines.append(f"Rank correlation with training on {proof.subsets} random halves of the passages: {scores}.")
    return lines
