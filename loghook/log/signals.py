"""Rows that are complete are also committed when the process is told to end: SIGTERM, SIGHUP, Ctrl-C, sys.exit.

A signal handler runs in the main thread between any two of its instructions, also while that thread holds a lock. So it
takes no lock: writers are asked through ``queue.SimpleQueue``, whose ``put`` may be called from a signal handler.
"""

import atexit
import contextlib
import multiprocessing.util
import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loghook.log.writer import Writer

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # a scheduler's, and that of a terminal which is closed
_writers: list["Writer"] = []  # a list: it is changed by single operations, which a signal does not split
_previous: dict[int, Any] = {}  # the handlers that were there before ours


def guard(writer: "Writer") -> None:
    """Commit this writer's rows if the process is told to end before ``release``."""
    _writers.append(writer)
    atexit.unregister(_leave)  # here and not on import: a process of multiprocessing forgets what its parent registered
    atexit.register(_leave)
    if multiprocessing.parent_process() is not None:  # one that is forked ends without what atexit knows
        multiprocessing.util.Finalize(None, _leave, exitpriority=0)
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may install handlers; leaving the interpreter still commits
    for number in _SIGNALS:
        current = signal.getsignal(number)
        # A handler that Python does not know (None) could not be called; one that ignores the signal means it.
        if current not in (None, signal.SIG_IGN, _terminate):
            _previous[number] = current
            signal.signal(number, _terminate)


def release(writer: "Writer") -> None:
    """Forget a writer, and with the last one take the handlers away."""
    if writer in _writers:
        _writers.remove(writer)
    if not _writers:
        _restore()


def _restore() -> None:
    """Put back the handlers that were there, unless another has taken our place since."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is _terminate:
                signal.signal(number, _previous[number])


def _terminate(number: int, frame: FrameType | None) -> None:
    """Commit, then do what would have been done without us."""
    for writer in list(_writers):
        writer.commit_now()
    previous = _previous[number]
    if callable(previous):
        previous(number, frame)
        return
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)  # the parent sees a process that ended by this signal


def _leave() -> None:
    """Close what is open when the interpreter ends by itself, by an exception or by SystemExit."""
    with contextlib.ExitStack() as stack:  # all of them, also where one raises
        for writer in list(_writers):
            stack.callback(writer.close)


def _forked() -> None:
    """Let a child, such as a loader's worker, die of a signal as it would without us: the threads are not its own."""
    for writer in _writers:
        writer.disown()
    _writers.clear()
    _restore()


os.register_at_fork(after_in_child=_forked)
