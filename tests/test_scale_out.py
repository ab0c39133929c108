"""Scoring on two processes gives what one process gives."""

import os
import subprocess
import sys

import numpy as np
import pytest

import loghook
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


def torchrun(*arguments):
    return call("torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments)


def call(*arguments):
    command = [sys.executable, "-m"]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_score_like_one(logged):
    folder, log, query = logged
    (folder / "script.py").write_text(SCRIPT)
    torchrun(folder / "script.py", folder)
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
    shown = torchrun("-m", "loghook", "score", folder / "run", folder / "q.safetensors", "--top", 2)
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
    (folder / "each.py").write_text(EACH_ITS_OWN)
    assert torchrun(folder / "each.py", folder).count("REFUSED") == 2
