"""SIGTERM and Ctrl-C commit what is complete, and are not swallowed."""

import atexit
import os
import signal
import subprocess
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import loghook
from loghook.log.disk import lock
from tests.killing import Killer
from tests.test_log import make_unfinished

PRELUDE = """
    import contextlib, os, signal, sys, time, torch, loghook
    from tests.test_influence import data, loss_fn, make_model
    torch.set_num_threads(1)
    model, x = make_model(), data(40)
    run = loghook.init(sys.argv[1], rank=4, dtype="float64", commit_seconds=600)
    run.watch(model)
    def block(i):
        with run(data_id=[2 * i, 2 * i + 1]):
            loss_fn(model, x[2 * i : 2 * i + 2]).backward()
"""


@dataclass
class Ended:
    returncode: int
    shown: list[str]
    errors: str = ""


def script(code: str, path: str, pipe: str) -> None:
    """Run in a forked process what the interpreter runs: the script, then what is registered for the end."""
    os.dup2(os.open(pipe, os.O_WRONLY), 1)
    sys.stdout, sys.argv = os.fdopen(1, "w"), ["script", path]
    sys.stderr = open(pipe + "-errors", "w")  # noqa: SIM115
    status: Any = 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as leave:
        status = leave.code
    except Exception:
        traceback.print_exc()
        status = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def python(path: Path, program: str, signals: tuple[int, ...] = (), fresh: bool = False) -> Ended:
    """Run a script that starts like any; send it signals, one for each time that it says it is ready.

    A fork server has imported torch, so that it starts at once; ``fresh`` takes a new interpreter.
    """
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(program)
    path.parent.mkdir(exist_ok=True)
    pipe, waiting, shown = f"{path}-pipe", list(signals), []
    if fresh:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=open(pipe + "-errors", "w"),  # noqa: SIM115
            text=True, cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"},
            # What a shell starts in the background ignores Ctrl-C, what nohup starts SIGHUP, and so would all below.
            preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
        )  # fmt: skip
        output = process.stdout
    else:
        os.mkfifo(pipe)
        process = Killer(0).context.Process(target=script, args=(code, str(path), pipe))
        process.start()
        output = open(pipe)  # noqa: SIM115
    with output:
        for line in output:
            shown.append(line.strip())
            if line.startswith("ready") and waiting:
                os.kill(process.pid, waiting.pop(0))
    process.wait(60) if fresh else process.join(60)
    return Ended(process.returncode if fresh else process.exitcode, shown, Path(pipe + "-errors").read_text())


def rows(path: Path) -> list[int]:
    log = loghook.load(path)
    assert not log.verify() and log.manifest.sealed is None
    return log.data_ids


LOOP = """
    for i in range(5):
        block(i)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_commits_and_ends_the_process_as_it_would_have(tmp_path, number):
    process = python(tmp_path / "run", LOOP, (number,), fresh=True)
    assert process.returncode == -number, process.errors
    assert rows(tmp_path / "run") == list(range(10))


def test_ctrl_c_commits(tmp_path):
    process = python(tmp_path / "run", LOOP, (signal.SIGINT,), fresh=True)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in process.errors
    assert rows(tmp_path / "run") == list(range(10))


@pytest.mark.parametrize("end", ["sys.exit(3)", "raise ValueError", "with run: sys.exit(3)", "with run: 1 / 0"])
def test_leaving_the_interpreter_commits(tmp_path, end):
    process = python(tmp_path / "run", LOOP.replace('print("ready", flush=True)', end))
    assert process.returncode == (3 if "exit" in end else 1)
    assert rows(tmp_path / "run") == list(range(10))


def test_a_block_that_is_interrupted_is_not_written(tmp_path):
    program = """
        block(0)
        with run(data_id=[2, 3]):
            loss = loss_fn(model, x[2:4])
            print("ready", flush=True)
            time.sleep(60)
    """
    process = python(tmp_path / "run", program, (signal.SIGTERM,))
    assert process.returncode == -signal.SIGTERM
    assert rows(tmp_path / "run") == [0, 1]


def test_the_users_own_handler_is_called_and_may_go_on(tmp_path):
    program = """
        def mine(number, frame):
            os.write(1, b"mine %d\\n" % len(loghook.load(sys.argv[1])))
        signal.signal(signal.SIGTERM, mine)
        block(0)
        print("ready", flush=True)
        time.sleep(0.5)
        block(1)
        run.finalize()
        assert signal.getsignal(signal.SIGTERM) is mine
        print("finished", flush=True)
    """
    process = python(tmp_path / "run", program, (signal.SIGTERM,))
    assert process.returncode == 0 and process.shown[-3:] == ["ready", "mine 2", "finished"], process.errors
    assert loghook.load(tmp_path / "run").data_ids == [0, 1, 2, 3]


def test_a_handler_that_came_later_keeps_its_place(tmp_path):
    program = """
        block(0)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
        print("ready", flush=True)
        time.sleep(60)
    """
    process = python(tmp_path / "run", program, (signal.SIGTERM,))
    assert process.returncode == 4 and rows(tmp_path / "run") == [0, 1]


def test_an_ignored_sigterm_stays_ignored(tmp_path):
    program = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        block(0)
        print("ready", flush=True)
        time.sleep(0.2)
        run.close()
    """
    assert python(tmp_path / "run", program, (signal.SIGTERM,)).returncode == 0


def test_sigterm_at_any_moment_of_a_busy_loop_does_not_hang(tmp_path):
    """The handler runs between any two instructions of the loop: while it hands rows over, too."""
    program = """
        block(0)
        print("ready", flush=True)
        i = 1
        while True:
            block(i % 20)
            i += 1
    """
    for attempt in range(3):
        process = python(tmp_path / str(attempt), program, (signal.SIGTERM,))
        assert process.returncode == -signal.SIGTERM
        assert rows(tmp_path / str(attempt))[:2] == [0, 1]


def test_a_forked_child_dies_of_sigterm_and_commits_nothing(tmp_path):
    program = """
        block(0)
        child = os.fork()
        if child == 0:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            time.sleep(60)
            os._exit(1)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        block(1)
        run.finalize()
        print("finished", flush=True)
    """
    process = python(tmp_path / "run", program)
    assert process.returncode == 0, process.errors
    assert loghook.load(tmp_path / "run").data_ids == [0, 1, 2, 3]


def test_a_forked_child_that_logs_into_its_parents_run_is_told(tmp_path):
    program = """
        block(0)
        if os.fork() == 0:
            try:
                block(1)
            except loghook.LoghookError as error:
                os._exit(7 if "forked" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
        block(2)
        run.finalize()
    """
    assert python(tmp_path / "run", program).returncode == 0
    assert loghook.load(tmp_path / "run").data_ids == [0, 1, 4, 5]


def test_a_forked_child_keeps_no_lock(tmp_path):
    program = """
        block(0)
        if os.fork() == 0:
            for fd in map(int, os.listdir("/proc/self/fd")):  # those that its parent's end is told by
                if not os.path.realpath(f"/proc/self/fd/{fd}").endswith("lock-00000"):
                    with contextlib.suppress(OSError):
                        os.close(fd)
            time.sleep(20)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert python(tmp_path / "run", program).returncode == -signal.SIGKILL
    lock(tmp_path / "run" / "lock-00000").close()  # while the child lives


def test_a_run_in_another_thread_installs_no_handler_and_still_commits_at_exit(tmp_path):
    program = """
        import threading
        thread = threading.Thread(target=block, args=(0,))
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    """
    assert python(tmp_path / "run", program).returncode == 0
    assert rows(tmp_path / "run") == [0, 1]


def test_the_handler_goes_with_the_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    make_unfinished(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_process_of_multiprocessing_commits_however_it_ends(tmp_path):
    """One that is forked ends without what atexit knows."""
    program = """
        import multiprocessing
        run.close()
        def work(path, how):
            run = loghook.init(path, rank=4)
            run.watch(model)
            with run(data_id=[0, 1]):
                loss_fn(model, x[:2]).backward()
            if how == "exit":
                sys.exit(1)
            if how == "raise":
                raise RuntimeError("out of memory")
        for how in ("exit", "raise", "return"):
            process = multiprocessing.get_context("fork").Process(target=work, args=(f"{sys.argv[1]}-{how}", how))
            process.start()
            process.join()
    """
    done = python(tmp_path / "run", program)
    assert done.returncode == 0, done.errors
    for how in ("exit", "raise", "return"):
        assert loghook.load(f"{tmp_path}/run-{how}").data_ids == [0, 1], how
