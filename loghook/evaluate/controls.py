"""Controls: scores that know nothing of gradients. A method that does not beat them has shown nothing.

Each returns (Q, N) scores, for Q queries and N training samples, larger for more alike. The cosine of whole gradients,
another control, is ``log.influence(query, "cosine")``.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loghook.errors import ConfigError

_WORD = re.compile(r"\w+")


def random(queries: int, samples: int, seed: int = 0) -> NDArray[np.float64]:
    """Independent standard normal scores: (queries, samples)."""
    return np.random.default_rng(seed).standard_normal((queries, samples))


def cosine(queries: ArrayLike, samples: ArrayLike) -> NDArray[np.float64]:
    """Cosine between representations, for instance mean hidden states of a layer; 0 where one is all zero.

    Args:
        queries: (Q, D).
        samples: (N, D).

    Raises:
        ConfigError: shapes that do not fit.
    """
    queries_QD, samples_ND = np.asarray(queries, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    if queries_QD.ndim != 2 or samples_ND.ndim != 2 or queries_QD.shape[1] != samples_ND.shape[1]:
        raise ConfigError(f"queries {queries_QD.shape}, samples {samples_ND.shape} do not fit: pass (Q, D) and (N, D).")
    units = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (queries_QD, samples_ND)]
    return units[0] @ units[1].T


def same_label(queries: ArrayLike, samples: ArrayLike) -> NDArray[np.float64]:
    """Return 1 where query and sample have the same label, else 0: (Q,), (N,) -> (Q, N)."""
    return (np.asarray(queries)[:, None] == np.asarray(samples)[None, :]).astype(np.float64)


def bm25(queries: Sequence[str], documents: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> NDArray[np.float64]:
    """Okapi BM25 (Robertson et al. 1994): similarity in words of each query to each document.

    Sum over the query's words (with repeats) of
    ``log(1 + (N - n + 0.5) / (n + 0.5)) * f (k1 + 1) / (f + k1 (1 - b + b length / mean length))``, where n documents
    hold the word and this one holds it f times. Words are lower-cased runs of letters, digits and underscores.

    Returns:
        float64 (queries, documents).

    Raises:
        ConfigError: a single text in place of a list, or no documents.
    """
    for name, texts in (("queries", queries), ("documents", documents)):
        if isinstance(texts, str):
            raise ConfigError(f"{name} is a single text: pass a list of them.")
    if not len(documents):
        raise ConfigError("documents is empty, so that words have no frequencies: pass some.")
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
            holding = holders.get(word, [])
            f = np.array([counts[i][word] for i in holding], dtype=np.float64)
            idf = np.log(1 + (len(documents) - len(holding) + 0.5) / (len(holding) + 0.5))
            row[holding] += times * idf * f * (k1 + 1) / (f + norm[holding])
    return scores


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
