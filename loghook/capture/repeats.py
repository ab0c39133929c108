"""Which samples are logged where an id comes again: in one run, or because an interrupted one is done once more."""

from collections.abc import Sequence

import numpy as np

from loghook.errors import BatchError
from loghook.log.folder import Committed


class Repeats:
    """Ids that were met, by this process and by the run that it takes up again.

    The two are told apart: an id of an earlier process is skipped in silence, one that comes twice now is a repeat.
    """

    def __init__(self) -> None:
        self.committed = Committed()
        self._seen: set[int | str] = set()

    def keep(self, ids: Sequence[int | str], rule: str) -> tuple[np.ndarray, int]:
        """Decide which samples of a batch are logged; ``rule`` is "first", "all" or "error".

        Returns:
            (B,) bool, and how many are left out as repeats.
        """
        keep, repeats = np.ones(len(ids), dtype=bool), 0
        if rule == "all":
            return keep, repeats
        fresh: set[int | str] = set()
        for i, data_id in enumerate(ids):
            again = data_id in self._seen or data_id in fresh
            if again and rule == "error":
                raise BatchError(
                    f"data_id {data_id!r} was logged before and on_repeat='error': give each sample an id of its own, "
                    "or pass on_repeat='first' to keep the first row, or 'all' to keep every row."
                )
            keep[i] = not again and data_id not in self.committed.ids
            repeats += again
            fresh.add(data_id)
        return keep, repeats

    def pending(self, ids: Sequence[int | str], rule: str) -> list[int | str]:
        """Return those of some ids whose rows would be logged now, in their order."""
        if rule == "all":
            return list(ids)
        return [i for i in dict.fromkeys(ids) if i not in self._seen and i not in self.committed.ids]

    def met(self, ids: Sequence[int | str]) -> None:
        """Remember a batch that was handed to the writer."""
        self._seen.update(ids)

    def forget(self, ids: Sequence[int | str]) -> None:
        """Let a batch come again that the writer did not take."""
        self._seen.difference_update(ids)
