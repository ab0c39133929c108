"""What each shipped ground truth asks of scores, and how scores of two methods compare.

Shapes: N training samples, Q queries.
"""

from typing import Any

import numpy as np

from loghook.evaluate import judges
from loghook.evaluate.lds import Estimate, lds


def measure(task: Any) -> str:
    """What a task judges by."""
    return "LDS" if task.members is not None else "MRR" if task.relevant is not None else "AUC"


def judge(task: Any, scores: np.ndarray) -> Estimate:
    """LDS where there are retrainings, mean reciprocal rank of planted facts, mislabel AUC of wrong labels.

    Args:
        task: with queries whose labels are right.
        scores: (Q, N); a sample that hurts them in the mean is suspect. Or (N,), larger for more suspect.
    """
    if task.members is not None:
        return lds(scores, task.members, task.losses)
    if task.relevant is not None:
        return judges.mrr(scores, task.relevant)
    return judges.mislabel_auc(scores if scores.ndim == 1 else -scores.mean(0), task.flipped)


def among(scores: np.ndarray, reference: np.ndarray, k: int = 10, share: float = 0.1) -> float:
    """Share of the reference's k best that are among the best tenth: what re-ranking those would find again."""
    n = round(share * scores.shape[1])
    best, wanted = (np.argsort(-s, axis=1, kind="stable") for s in (scores, reference))
    return float(np.mean([len(set(a[:n]) & set(b[:k])) / k for a, b in zip(best, wanted, strict=True)]))


def held_out(task: Any, candidates: list[np.ndarray]) -> np.ndarray:
    """For each half of the queries the scores that the other half would choose by their LDS: (Q, N)."""
    halves = np.array_split(np.random.default_rng(0).permutation(task.n_query), 2)
    each = [lds(values, task.members, task.losses, resamples=1).per_query for values in candidates]
    scores = np.empty_like(candidates[0])
    for mine, other in (halves, halves[::-1]):
        scores[mine] = candidates[max(range(len(each)), key=lambda i: float(each[i][other].mean()))][mine]
    return scores
