"""Reading ahead: the next piece of a scan is made in a thread while its consumer works on this one."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Iterate over items of which a thread makes one ahead; what it raises is raised here, in its turn.

    A consumer that stops early waits for the item under way, and for no other.
    """
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, "loghook-ahead") as thread:
        coming = thread.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, source, end)
            yield item  # type: ignore[misc]
