"""The progress bar of everything that may take long, but for retraining, which takes hours."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Iterable[T] | None, what: str, unit: str, total: int | None = None) -> "tqdm[T]":
    """Iterate over items, or count up to ``total``, with a bar on a terminal once it takes more than two seconds."""
    return tqdm(items, what, total, unit=f" {unit}", delay=2, leave=False, disable=None)
