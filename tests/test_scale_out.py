"""Scoring on two processes gives what one process gives."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import loghook
from tests.forked import two_processes
from tests.test_influence import make_log


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    log, query, _ = make_log(folder / "run", shard_bytes=1)  # a shard for each batch
    query.save(folder / "q.safetensors")
    return folder, log, query


SCRIPT = """
import sys, torch, loghook
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
folder = sys.argv[1]
query = loghook.Query.load(f"{folder}/q.safetensors")
for method in ("dot", "fisher", "kfac", "ekfac", "shampoo"):
    for name, options in (("all", {"per_layer": True}), ("unit", {"normalize": "unit"}), ("top", {"top": 5})):
        scores = loghook.load(f"{folder}/run").influence(query, method, **options)
        if torch.distributed.get_rank() == 0:
            scores.save(f"{folder}/{method}-{name}.safetensors")
found = loghook.load(f"{folder}/run").index(5, "Flat").search(query, 5, candidates=9)
if torch.distributed.get_rank() == 1:
    found.save(f"{folder}/index.safetensors")
torch.distributed.destroy_process_group()
"""


TWO = ("--standalone", "--nproc_per_node", "2")


def call(*arguments):
    command = [sys.executable, "-m"]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_score_like_one(logged):
    folder, log, query = logged
    two_processes(SCRIPT, folder)
    for method in ("dot", "fisher", "kfac", "ekfac", "shampoo"):
        for name, options in (("all", {"per_layer": True}), ("unit", {"normalize": "unit"}), ("top", {"top": 5})):
            one, two = (
                log.influence(query, method, **options),
                loghook.Scores.load(folder / f"{method}-{name}.safetensors"),
            )
            np.testing.assert_allclose(two.values, one.values, rtol=1e-5, atol=1e-6 * np.abs(one.values).max())
            assert [[r.data_id for r in q] for q in two.top(5)] == [[r.data_id for r in q] for q in one.top(5)]
            if name == "all":
                np.testing.assert_allclose(
                    two.by_layer, one.by_layer, rtol=1e-5, atol=1e-6 * np.abs(one.by_layer).max()
                )
    one, two = log.index(5, "Flat").search(query, 5, candidates=9), loghook.Scores.load(folder / "index.safetensors")
    np.testing.assert_array_equal(two.places, one.places)
    np.testing.assert_allclose(two.values, one.values, rtol=1e-5)


def test_the_command_line_on_two_processes_prints_once(logged):
    folder, log, query = logged
    shown = call(
        "torch.distributed.run", *TWO, "-m", "loghook", "score", folder / "run", folder / "q.safetensors", "--top", 2
    )
    lines = [line.split() for line in shown.splitlines() if line.strip()]
    assert [line[0] for line in lines if len(line) == 1] == ["a", "b", "c"]
    expected = [str(r.data_id) for q in log.influence(query, "ekfac").top(2) for r in q]
    assert [line[1] for line in lines if len(line) == 2] == expected


def test_accelerate_launch_scores_like_the_plain_command(logged):
    """On a CPU accelerate starts one process."""
    folder, *_ = logged
    score = ("loghook", "score", folder / "run", folder / "q.safetensors", "--top", 3)
    launched = call("accelerate.commands.launch", "--cpu", "--num_processes", 1, "-m", *score)
    assert launched == call(*score) and len(launched.split()) == 3 + 2 * 3 * 3


EACH_ITS_OWN = """
import sys, torch, loghook
torch.distributed.init_process_group("gloo")
folder = sys.argv[1]
query = loghook.Query.load(f"{folder}/q.safetensors")
rank = torch.distributed.get_rank()
try:
    loghook.load(f"{folder}/run").influence(query.with_rows(query.matrix * (1 + rank), ""), "dot")
except loghook.LoghookError as error:
    print("REFUSED" if "ask different questions" in str(error) else error)
torch.distributed.destroy_process_group()
"""


def test_processes_that_ask_different_questions_are_told(logged):
    folder, _, _ = logged
    assert two_processes(EACH_ITS_OWN, folder).count("REFUSED") == 2


TOGETHER = """
import contextlib, copy, datetime, io, json, sys, torch, loghook
from torch import nn
from torch.distributed.fsdp import fully_shard
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
rank, folder = torch.distributed.get_rank(), sys.argv[1]
torch.manual_seed(0)
model, data = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12)).eval(), torch.randn(24, 12)

def loss_fn(model, x):
    return model(x).square().sum()

def pairs():
    for i in range(0, 12, 4):
        mine = slice(12 * rank + i, 12 * rank + i + 4)
        yield list(range(24))[mine], data[mine]

def questions():
    yield [0, 1], data[:2]

def refused(call, words):
    try:
        call()
    except loghook.LoghookError as error:
        return words in str(error)

log, query = loghook.load(f"{folder}/run"), loghook.Query.load(f"{folder}/q.safetensors")
for i in range(30):
    log.influence(query, "dot").save(f"{folder}/scores.safetensors")
said = {}
said["compressed"] = len(log.compress(f"{folder}/int8", "int8").pearson) > 0
said["again"] = refused(lambda: log.compress(f"{folder}/int8", "int8"), "exists")

sharded = fully_shard(copy.deepcopy(model))
def sometimes(model, x):
    return nn.functional.dropout(model(x), 0.5 if rank == 0 else 0.0).square().sum()

with contextlib.redirect_stdout(io.StringIO()):
    said["random"] = "something random" in str(loghook.check(sharded, sometimes, data[:4]))
said["check"] = refused(lambda: loghook.check(sharded, loss_fn, data[: 4 - rank]), "batches of [4, 3] samples")

growing = loghook.init(f"{folder}/growing", rank=4)
growing.watch(model)
for ids, x in pairs():
    with growing(data_id=ids):
        loss_fn(model, x).backward()
with growing.query(data_id=[0]) as own:
    loss_fn(model, data[:1]).backward()
growing._session.writer.commit_now() if rank == 0 else None
torch.distributed.barrier()
early = loghook.load(f"{folder}/growing") if rank == 0 else None
torch.distributed.barrier()
growing._session.writer.commit_now()
torch.distributed.barrier()
late = early or loghook.load(f"{folder}/growing")
said["growing"] = refused(lambda: late.influence(own, "dot"), "while it grew")
said["own"] = refused(lambda: late.self_influence("dot"), "while it grew")

large = loghook.init(f"{folder}/large", rank=4, dtype="float32")
large.watch(model)
for ids, x in pairs():
    with large(data_id=ids, scale=1e7):
        loss_fn(model, x).backward()
large.finalize()
try:
    loghook.load(large.path).compress(f"{folder}/half", "float16")
except loghook.errors.NotFiniteError as error:
    said["half"] = len(error.ids) > 0

fit = loghook.fit(f"{folder}/factors")
fit.watch(model)
for _ in fit.passes():
    for ids, x in pairs():
        with fit(data_id=ids):
            loss_fn(model, x).backward()
with fit.query(data_id=[0]) as whole:
    loss_fn(model, data[:1]).backward()
batches = [x for _, x in pairs()][: 3 - rank]
said["none"] = refused(
    lambda: fit.refine(whole, batches[:1 - rank], model, lambda y, x: y.square().sum()), "the processes have [1, 0]"
)
u = fit.refine(whole, batches, model, lambda y, x: y.square().sum(), solver="astra", iterations=5)
said["refined"] = float(u.matrix.norm())
tuned = loghook.tune(fit, pairs, questions, lambda x: loss_fn(model, x), ranks=(4, 8), dtypes=("float32", "int8"))
said["tuned"] = tuned.best.fidelity
json.dump(said, open(f"{folder}/said-{rank}.json", "w"))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_what_all_processes_do_together(logged):
    folder, _, _ = logged
    two_processes(TOGETHER, folder)
    one, two = (json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1))
    assert one.pop("refined") == two.pop("refined") > 0 and one.pop("tuned") == two.pop("tuned") > 0.5
    assert one == two == dict.fromkeys(one, True)
