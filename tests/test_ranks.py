"""What the ranks of one job owe each other: they begin, agree and end together, or all are told."""

import dataclasses
import datetime
import json
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import loghook
from loghook.errors import LogLockedError
from loghook.log import maintain
from loghook.log.disk import lock, lock_name
from loghook.log.format import Manifest
from tests.forked import forkserver

DATA = torch.randn(16, 3, 5, generator=torch.Generator().manual_seed(1))


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


def watched(folder, model=None, include="*", **options):
    run = loghook.init(Path(folder, "run"), **({"rank": 3, "dtype": "float32"} | options))
    run.watch(model or make_model(), include=include)
    return run


def log(run, ids, model=None):
    with run(data_id=ids):
        (model or run._model)(DATA[[int(i) for i in ids]]).pow(2).sum().backward()


def log_pass(run, *batches, model=None):
    for _ in run.passes():
        for ids in batches:
            log(run, ids, model)


def mine(rank):
    return [2 * rank, 2 * rank + 1]


def child(scenario, rank, world, folder, arguments):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wait = datetime.timedelta(seconds=10)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=wait)
    try:
        said = scenario(rank, folder, *arguments)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    Path(folder, f"said-{rank}").write_text(str(said))
    os._exit(0)  # a rank that an error leaves behind waits for nobody


def on_ranks(scenario, folder, *arguments, world=2):
    """What a scenario returns, or raises, on each rank; None of a rank that died."""
    context = forkserver()
    started = [
        context.Process(target=child, args=(scenario, rank, world, str(folder), arguments)) for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        process.kill()
    (folder / "store").unlink(missing_ok=True)  # for the next group
    said = [folder / f"said-{rank}" for rank in range(world)]
    return [file.read_text() if file.exists() else None for file in said]


def at_the_seal(rank, act):
    """Let rank 0 come to ``act`` when it puts the manifest that seals the run in its place."""
    real = os.replace
    if rank == 0:
        os.replace = lambda *arguments: act() or real(*arguments)


def ends_and_asks(rank, folder):
    run = watched(folder)
    log_pass(run, mine(rank))
    with run.query(data_id=["q"]) as query:
        run._model(DATA[:1]).pow(2).sum().backward()
    at_the_seal(rank, lambda: time.sleep(1))
    run.finalize()
    log = loghook.load(run.path)
    return log.finished, len(log), log.influence(query, "cosine").values.round(4).tolist()


def test_finalize_returns_on_all_ranks_when_the_run_is_sealed(tmp_path):
    said = on_ranks(ends_and_asks, tmp_path)
    assert said[0].startswith("(True, 4,") and said[0] == said[1], said


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk():
    raise OSError("No space left on device")


def ends(rank, folder, act):
    run = watched(folder)
    log_pass(run, mine(rank))
    at_the_seal(rank, act)
    run.finalize()


@pytest.mark.parametrize("act", [die, full_disk])
def test_a_rank_that_waits_for_the_seal_is_told_at_once_that_there_will_be_none(tmp_path, act):
    first, second = on_ranks(ends, tmp_path, act)
    assert first is None or ("WriteError" in first and "No space left" in first)
    assert second.startswith("StateError: rank 0 failed") and "resume=True" in second, second


def comes_late(rank, folder, passes):
    time.sleep(rank // 7)  # the last one's data may be read slowly
    run = watched(folder, resume=True)
    if passes:
        log_pass(run, mine(rank))
    else:
        log(run, mine(rank))
    run.finalize()
    return sorted(loghook.load(run.path).data_ids)


@pytest.mark.parametrize("passes", [True, False])
def test_a_rank_that_comes_late_does_not_take_the_new_run_for_an_interrupted_one(tmp_path, passes):
    assert on_ranks(comes_late, tmp_path, passes, world=8) == [str(list(range(16)))] * 8


def finds_another_run(rank, folder):
    log_pass(watched(Path(folder, str(rank)), resume=True), mine(rank))


def test_ranks_that_find_different_runs_are_told(tmp_path):
    with loghook.init(tmp_path / "1" / "run", rank=3, dtype="float32") as run:
        run.watch(make_model())
        log(run, [0, 1])
    for said in on_ranks(finds_another_run, tmp_path):
        assert said.startswith("StateError: ranks found different runs") and "one path" in said, said


def has_no_batch(rank, folder, idle, projection, passes):
    run = watched(folder, projection=projection)
    if passes:
        log_pass(run, *[mine(rank)] * (rank != idle))
        dist.barrier()
    elif rank != idle:
        log(run, mine(rank))
    run.finalize()
    return sorted(loghook.load(run.path).data_ids)


@pytest.mark.parametrize("projection,passes", [("random", True), ("random", False), ("pca", True)])
@pytest.mark.parametrize("idle", [0, 1])
def test_a_rank_without_a_batch_does_not_keep_the_run_from_its_end(tmp_path, idle, projection, passes):
    assert on_ranks(has_no_batch, tmp_path, idle, projection, passes) == [str(mine(1 - idle))] * 2


def logs_in_a_part_of_the_ranks(rank, folder, idle):
    group = dist.new_group([0, 1])
    if rank == 2:
        return idle(folder)
    run = watched(folder, model := make_model())
    log_pass(run, mine(rank), model=nn.parallel.DistributedDataParallel(model, process_group=group))
    run.finalize()
    return sorted(loghook.load(run.path).data_ids)


def comes_along(folder):
    run = watched(folder)
    log_pass(run)
    run.finalize()
    return sorted(loghook.load(run.path).data_ids)


def gathers_something_else(folder):
    metrics = [None] * 3
    dist.all_gather_object(metrics, "a metric of rank 2")


def test_ranks_outside_of_the_group_that_logs_come_along(tmp_path):
    assert on_ranks(logs_in_a_part_of_the_ranks, tmp_path, comes_along, world=3) == [str([0, 1, 2, 3])] * 3


def test_ranks_whose_calls_meet_those_of_others_are_told(tmp_path):
    first, second, _ = on_ranks(logs_in_a_part_of_the_ranks, tmp_path, gathers_something_else, world=3)
    assert first == second
    assert first.startswith("StateError: rank 2") and "'a metric of rank 2'" in first, first
    assert all(word in first for word in ("init", "watch", "finalize", "log nothing"))


def none_has_a_batch(rank, folder):
    run = watched(folder)
    log_pass(run)
    run.finalize()


def test_where_no_rank_has_a_batch_all_are_told(tmp_path):
    for said in on_ranks(none_has_a_batch, tmp_path):
        assert said.startswith("StateError: nothing was logged"), said


def disagree(rank, folder):
    """What this rank says of each way in which the two may differ."""
    ways = {
        "seed": lambda: watched(path, seed=rank),
        "dtype": lambda: watched(path, dtype=("float32", "bfloat16")[rank]),
        "rank": lambda: watched(path, rank=(3, 4)[rank]),
        "layers": lambda: watched(path, include=("0", "2")[rank]),
        "on_repeat": lambda: watched(path, on_repeat=("first", "all")[rank]),
        "id_type": lambda: watched(path),
        "path": lambda: watched(path / str(rank)),
        "parameters": lambda: watched(path, make_model(rank)),
    }
    said = {}
    for way, make in ways.items():
        path = Path(folder, way)
        run = make()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                log(run, [str(i) for i in mine(rank)] if way == "id_type" and rank else mine(rank))
            said[way] = " ".join(f"{one.category.__name__}: {one.message}" for one in caught)
        except loghook.LoghookError as error:
            said[way] = f"{type(error).__name__}: {error}"
        run.close()
    return json.dumps(said)


def test_ranks_that_would_not_write_the_same_are_told(tmp_path):
    said = [json.loads(one) for one in on_ranks(disagree, tmp_path)]
    assert said[0] == said[1]
    for way, values in {"seed": "01", "rank": "34", "dtype": ("'float32'", "'bfloat16'"), "id_type": ("'int'", "'str'"),
                        "on_repeat": ("'first'", "'all'")}.items():  # fmt: skip
        assert f"MismatchError: {way} is {values[0]} on rank 0 and {values[1]} on rank 1: " in said[0][way]
    assert (
        said[0]["layers"].startswith("MismatchError: ranks 0 and 1 watch other layers") and "0, 2" in said[0]["layers"]
    )
    assert said[0]["path"].startswith("ConfigError: rank 1 writes to") and "same path" in said[0]["path"]
    assert said[0]["parameters"].startswith("CheckpointWarning: the ranks begin with different parameter values")


def leaves_the_group_first(rank, folder):
    run = watched(folder, resume=True)
    log_pass(run, mine(rank))
    dist.destroy_process_group()
    run.finalize()


def ends_what_was_begun(rank, folder):
    run = watched(folder, resume=True)
    log_pass(run, mine(rank))
    run.finalize()
    return len(loghook.load(run.path))


def test_finalize_after_the_end_of_the_group_is_refused_at_once_on_all_ranks(tmp_path):
    for said in on_ranks(leaves_the_group_first, tmp_path):
        assert said.startswith("StateError: 2 processes") and "before destroy_process_group()" in said, said
    assert on_ranks(ends_what_was_begun, tmp_path) == ["4", "4"]


def repeats_a_sample(rank, folder, *batches):
    run = watched(folder, on_repeat="error", resume=True)
    log_pass(run, batches[rank])
    run.finalize()
    return sorted(loghook.load(run.path).data_ids)


def test_an_id_on_two_ranks_is_an_error_where_repeats_are(tmp_path):
    first, second = on_ranks(repeats_a_sample, tmp_path, [0, 2], [1, 2])
    assert first.startswith("BatchError: several ranks logged data_id 2 (1 in all)"), first
    assert second.startswith("StateError: rank 0 failed"), second
    maintain.delete(tmp_path / "run", [2])
    assert on_ranks(repeats_a_sample, tmp_path, [0], [1]) == ["[0, 1]"] * 2


def half_of_the_tokens(rank, folder, passes, shared):
    model = make_model()
    run = watched(folder, model)
    batches = [[0, 1, 2], [3, 4, 5], [6, 7, 8]] if shared else [[4 * rank + i] for i in range(4)] + [[0]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in run.passes() if passes else [None]:
            for ids in batches:
                with run(data_id=ids):
                    model(DATA[ids][:, rank :: 2 if shared else 1]).pow(2).sum().backward()
        run.finalize()
    return [str(warning.message) for warning in caught if "same samples" in str(warning.message)]


@pytest.mark.parametrize("passes", [True, False])
def test_ranks_that_log_parts_of_the_same_samples_are_told(tmp_path, passes):
    said = on_ranks(half_of_the_tokens, tmp_path, passes, True)
    assert said[1] == "[]" and "sequence, context or tensor parallelism" in said[0] and "such as 0" in said[0]


@pytest.mark.parametrize("passes", [True, False])
def test_ranks_that_only_fill_up_their_last_batch_are_not(tmp_path, passes):
    assert on_ranks(half_of_the_tokens, tmp_path, passes, False) == ["[]", "[]"]


def closes(rank, folder):
    run = watched(folder)
    log_pass(run, mine(rank))
    run.close()


def test_maintenance_minds_ranks_that_the_manifest_does_not_count_yet(tmp_path):
    on_ranks(closes, tmp_path)
    path = tmp_path / "run"
    # As where a run of one rank is resumed with two, and rank 0 has not come to its first block.
    dataclasses.replace(Manifest.load(path), world_size=1).save(path)
    with lock(path / lock_name(1)), pytest.raises(LogLockedError):
        maintain.repair(path)
    assert maintain.repair(path).rows == 4 and (path / "commits-00001.jsonl").exists()
    maintain.delete(path, [0])
    assert sorted(loghook.load(path).data_ids) == [1, 2, 3]
