"""A logging run to be killed: what runs in the forked processes, and the parent that kills and resumes them.

A fork server that has imported torch starts a process in milliseconds. Two ways to die: SIGKILL from outside, so many
blocks and a random moment after the start; and SIGKILL from within, at the n-th call that changes the disk, half of a
write being done. The first is what happens; the second finds every gap between two calls.
"""

import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import loghook
from tests.forked import forkserver

SAMPLES, BATCH = 60, 4
CALLS = ("pwrite", "fsync", "replace", "ftruncate", "unlink")
OPTIONS = (
    {"shard_bytes": 4000, "commit_seconds": 1e-6},  # many commits, many shards
    {"shard_bytes": 1, "commit_seconds": 60.0},  # a commit for each shard, a shard for each batch
    {"shard_bytes": 10**9, "commit_seconds": 60.0},  # one commit, at the end
    {"shard_bytes": 10**9, "commit_seconds": 2e-3},  # some commits, one shard
)


@dataclass(frozen=True)
class Plan:
    """One attempt: ``die_at`` is the number of the disk call at which the process kills itself, or None."""

    path: str
    options: dict[str, Any]
    rank: int = 0
    world: int = 1
    die_at: int | None = None
    repeats: bool = False
    skip: bool = False  # whether the loop asks run.pending(...)
    store: str = ""


def batches(plan: Plan) -> list[list[int]]:
    mine = list(range(plan.rank, SAMPLES, plan.world))
    if plan.repeats:
        mine += mine[:2]
        mine[10:10] = [mine[3], mine[9]]
    return [mine[k : k + BATCH] for k in range(0, len(mine), BATCH)]


def arm(die_at: int) -> None:
    """Die at the n-th call that changes the disk: a write is half done, another call not at all."""
    calls = 0

    def armed(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == die_at:
                if real is real_pwrite:
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], arguments[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    real_pwrite = os.pwrite
    for name in CALLS:
        setattr(os, name, armed(getattr(os, name)))


def child(plan: Plan, blocks: Any) -> None:
    """Log everything, as a user's script does; each block writes a byte into the pipe."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = open(Path(plan.path + f"-stderr-{plan.rank}"), "a")  # noqa: SIM115
    if plan.world > 1:
        dist.init_process_group("gloo", init_method=f"file://{plan.store}", rank=plan.rank, world_size=plan.world)
    log_everything(plan, blocks)
    if plan.world > 1:
        dist.destroy_process_group()


def log_everything(plan: Plan, blocks: Any = None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    data = torch.randn(SAMPLES, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    if plan.die_at is not None:
        arm(plan.die_at)
    run = loghook.init(plan.path, rank=4, resume=True, **({"dtype": "float64"} | plan.options))
    run.watch(model)
    for _ in run.passes():
        for ids in batches(plan):
            if plan.skip and not run.pending(ids):
                continue
            with run(data_id=ids):
                model(data[ids]).pow(2).sum().backward()
            if blocks is not None:
                blocks.send_bytes(b".")
    run.finalize()
    run.close()


@dataclass
class Killer:
    """Starts, kills and resumes; counts."""

    seed: int
    kills: int = 0
    context: Any = field(default_factory=forkserver)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def start(self, plan: Plan) -> tuple[Any, Any]:
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=child, args=(plan, theirs))
        process.start()
        theirs.close()
        return process, ours

    def until_done(self, kills: int, **plan: Any) -> None:
        """Kill so many times at random instants, then let the run end; an error that is no kill is an error."""
        for attempt in range(kills + 1):
            alone = Plan(**plan)
            last = attempt == kills
            inside = not last and self.random.random() < 0.5
            process, pipe = self.start(Plan(**plan | {"die_at": self.random.randint(1, 30)}) if inside else alone)
            if not last and not inside:
                wait_for_blocks(pipe, self.random.randint(0, 8))
                time.sleep(self.random.random() * 5e-3)
                process.kill()
            process.join(60)
            assert process.exitcode in (0, -signal.SIGKILL), errors(alone.path)
            self.kills += process.exitcode != 0
            pipe.close()
        assert process.exitcode == 0

    def ranks_until_done(self, kills: int, tmp: Path, **plan: Any) -> None:
        """The same with two ranks: one or both are killed; one that then cannot go on is ended as a launcher does."""
        for attempt in range(kills + 1):
            last = attempt == kills
            victims = [] if last else self.random.choice([[0], [1], [0, 1]])
            inside = self.random.random() < 0.5
            started = []
            for rank in range(2):
                die = self.random.randint(1, 20) if inside and rank in victims else None
                store = str(tmp / f"store-{attempt}")
                started.append(self.start(Plan(**plan, rank=rank, world=2, die_at=die, store=store)))
            if not last and not inside:
                wait_for_blocks(started[victims[0]][1], self.random.randint(0, 5))
                time.sleep(self.random.random() * 5e-3)
            for rank in victims:
                if not inside:
                    started[rank][0].kill()
                started[rank][0].join(60)
                self.kills += started[rank][0].exitcode == -signal.SIGKILL
            for process, pipe in started:
                process.join(60 if last else self.random.choice([0.02, 0.5]))
                if not last and process.exitcode is None:
                    process.kill()
                    process.join(60)
                pipe.close()
        assert [process.exitcode for process, _ in started] == [0, 0], errors(plan["path"])


def wait_for_blocks(pipe: Any, count: int) -> None:
    try:
        for _ in range(count):
            pipe.recv_bytes()
    except EOFError:
        pass


def errors(path: str) -> str:
    return "\n".join(file.read_text()[-3000:] for file in Path(path).parent.glob("*-stderr-*"))


def assert_same(killed: str | Path, whole: str | Path, *, statistics: bool = True, ordered: bool = True) -> None:
    """The finished logs are equal: ids once each and in order, where each row comes from, rows bitwise, statistics."""
    a, b = loghook.load(killed), loghook.load(whole)
    assert a.manifest.sealed and not a.verify() and not b.verify()
    assert sorted(a.data_ids) == list(range(SAMPLES))
    assert (a.flagged, a.unmeasured, a.asleep) == (b.flagged, b.unmeasured, b.asleep)
    assert a.data_ids == b.data_ids
    for key in ("pass_index", "step", "rank"):
        np.testing.assert_array_equal(getattr(a.keys, key), getattr(b.keys, key), err_msg=key)
    for layer in b.layers:
        assert a.rows(layer)[:].tobytes() == b.rows(layer)[:].tobytes()
    np.testing.assert_allclose(a.moments(), b.moments(), rtol=1e-12, atol=0)
    left = {f.name.partition("-")[0] for f in Path(killed).iterdir()}
    assert left <= {"loghook.json", "rows", "commits", "statistics", "lock", "loghook.json.tmp"}
    assert len(list(Path(killed).glob("statistics-*"))) <= 2 * b.manifest.world_size
