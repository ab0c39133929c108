"""Everything loghook raises on purpose. Each message gives the value, the rule and the remedy."""

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence

# Of this package, and of what calls its context managers.
_OURS = (os.path.join(os.path.dirname(__file__), ""), contextlib.__file__)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called loghook."""
    level, frame = 1, sys._getframe()
    while frame.f_code.co_filename.startswith(_OURS) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def some(values: Sequence[object], most: int = 4) -> str:
    """Show the first few values, for a message."""
    return ", ".join(map(repr, values[:most])) + (", ..." if len(values) > most else "")


class LoghookError(Exception):
    """Base of every error that loghook raises on purpose."""


class ConfigError(LoghookError, ValueError):
    """An argument that cannot work: the message names it, the rule it breaks and what to pass instead."""


class UnsupportedError(LoghookError):
    """A model, wrapper or layer for which exact per-sample rows do not exist or cannot be had."""


class BatchError(LoghookError, ValueError):
    """Ids, mask or scale that do not fit the batch they came with."""


class StateError(LoghookError, RuntimeError):
    """A call at the wrong time: logging after ``finalize``, a query inside a logging block."""


class DeliveryError(LoghookError, RuntimeError):
    """A block that did not deliver exactly one set of rows: layers that stayed silent, or two backward passes."""


class NotFiniteError(LoghookError, ValueError):
    """Rows that hold infinities or not-a-numbers, so that they must not be written as if they were good.

    Attributes:
        ids: all samples of the batches that were not written for it, good or not.
    """

    def __init__(self, message: str, ids: Sequence[int | str]) -> None:
        super().__init__(message)
        self.ids = list(ids)

    def __reduce__(self) -> tuple[type, tuple[str, list[int | str]]]:
        return type(self), (str(self), self.ids)  # as it goes from process to process


class LogExistsError(LoghookError, FileExistsError):
    """A run that is there already, opened without ``resume`` or ``overwrite``; or a folder of another kind."""


class LogLockedError(LoghookError):
    """A run that another process is writing."""


class WriteError(LoghookError, OSError):
    """The log could not be written (a full disk, a lost folder); what was committed before is intact."""


class CorruptLogError(LoghookError):
    """A log that does not match its own records: truncated, altered or missing files."""


class VersionError(LoghookError):
    """A log or factors written in another version of their format."""


class MismatchError(LoghookError, ValueError):
    """A query and a log (or a log and a model) that do not belong together."""


class CheckpointWarning(UserWarning):
    """A query, or a pass taken up again, with other parameter values than the rows that it goes with."""


class UnfinishedWarning(UserWarning):
    """Scores of a log whose run is not finished, or was killed: only the rows so far take part."""


class RetrainingError(LoghookError, RuntimeError):
    """A training of ``loghook.evaluate.retrain`` that raised, died or returned what cannot be used."""
