"""Processes that start in milliseconds: a fork server has imported, once, what they import."""

import contextlib
import os
import socket
import sys
import tempfile
import textwrap
import traceback
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


def forkserver() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.killing", "tests.test_ranks", "tests.test_signals"])
    return context


def two_processes(code: str, *arguments: Any) -> str:
    """What a script prints on two processes that torchrun might have started; it has to end well on both."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        script = textwrap.dedent(code), list(map(str, arguments))
        started = [forkserver().Process(target=_rank, args=(rank, port, *script, folder)) for rank in range(2)]
        for process in started:
            process.start()
        for process in started:
            process.join(300)
            process.kill()
        shown = "".join(file.read_text() for file in sorted(Path(folder).iterdir()))
    assert [process.exitcode for process in started] == [0, 0], shown[-3000:]
    return shown


def _rank(rank: int, port: int, code: str, arguments: list[str], folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.argv = ["script", *arguments]
    with open(f"{folder}/{rank}", "w") as shown, contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            raise
