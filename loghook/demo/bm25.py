"""Okapi BM25 (Robertson et al. 1994), the text-similarity control that attribution has to be compared with."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"\w+")


def bm25(queries: Sequence[str], documents: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Similarity of each query to each document.

    Sum over the query's words (with repeats) of
    ``log(1 + (N - n + 0.5) / (n + 0.5)) * f (k1 + 1) / (f + k1 (1 - b + b length / mean length))``, where n documents
    hold the word and this one holds it f times. Words are lower-cased runs of letters, digits and underscores.

    Returns:
        float64 (queries, documents).
    """
    counts = [Counter(_words(document)) for document in documents]
    lengths = np.array([sum(count.values()) for count in counts], dtype=np.float64)
    norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1.0))
    holders: dict[str, list[int]] = {}
    for i, count in enumerate(counts):
        for word in count:
            holders.setdefault(word, []).append(i)
    scores = np.zeros((len(queries), len(documents)))
    for row, query in zip(scores, queries, strict=True):
        for word, times in Counter(_words(query)).items():
            where = holders.get(word, [])
            f = np.array([counts[i][word] for i in where], dtype=np.float64)
            idf = np.log(1 + (len(documents) - len(where) + 0.5) / (len(where) + 0.5))
            row[where] += times * idf * f * (k1 + 1) / (f + norm[where])
    return scores


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
