"""Rows that are complete are committed when the process is told to end: SIGTERM, Ctrl-C, sys.exit.

A signal handler runs in the main thread between any two of its instructions, also while that thread holds a lock. So it
takes no lock: writers are asked through ``queue.SimpleQueue``, whose ``put`` may be called from a signal handler.
"""

import atexit
import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loghook.log.writer import Writer
_writers: "list[Writer]" = []  # a list: it is changed by single operations, which a signal does not split
_previous: Any = None  # the handler that was there before ours


def guard(writer: "Writer") -> None:
    """Commit this writer's rows if the process is told to end before ``release``."""
    global _previous
    _writers.append(writer)
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may install handlers; leaving the interpreter still commits
    current = signal.getsignal(signal.SIGTERM)
    # A handler that Python does not know (None) could not be called; one that ignores the signal means it.
    if current not in (None, signal.SIG_IGN, _terminate):
        _previous = current
        signal.signal(signal.SIGTERM, _terminate)


def release(writer: "Writer") -> None:
    """Forget a writer, and with the last one take the handler away."""
    if writer in _writers:
        _writers.remove(writer)
    if not _writers:
        _restore()


def _restore() -> None:
    """Put back the handler that was there, unless another has taken our place since."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, _previous)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Commit, then do what would have been done without us."""
    for writer in list(_writers):
        writer.commit_now()
    if callable(_previous):
        _previous(number, frame)
        return
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)  # the parent sees a process that ended by this signal


@atexit.register
def _leave() -> None:
    """Close what is open when the interpreter ends by itself, by an exception or by SystemExit."""
    for writer in list(_writers):
        writer.close()


def _forked() -> None:
    """Let a child, such as a loader's worker, die of SIGTERM as it would without us: the threads are not its own."""
    _writers.clear()
    _restore()


os.register_at_fork(after_in_child=_forked)
