"""The log as a user sees it: lazy reading, ids, resuming, what a kill leaves behind."""

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import loghook
from loghook.cli import app
from loghook.errors import CheckpointWarning, CorruptLogError, LogLockedError, MismatchError, StateError, WriteError
from loghook.evaluate.retrain import retrain
from loghook.log import maintain, reader
from loghook.log.records import read_commits
from loghook.log.writer import QUEUE, Writer
from tests.harness import fitted, log_and_ask, squares
from tests.test_influence import data, loss_fn, make_log, make_model


def test_reading_is_lazy_and_zero_copy(tmp_path):
    log, _, _ = make_log(tmp_path)
    rows = log.rows(log.layers[0])
    assert rows.shape == (40, 4, 4) and len(rows) == 40 and rows.ndim == 3
    view = rows[3:9]
    assert view.base is not None and not view.flags.writeable and not view.flags.owndata
    full = np.asarray(rows)
    for key in (
        0,
        -1,
        slice(None),
        slice(5, 2),
        slice(30, 3, -4),
        [7, 3, 3],
        np.arange(40) % 2 == 0,
        ...,
        (slice(2), 1),
    ):
        np.testing.assert_array_equal(rows[key], full[key])
    with pytest.raises(IndexError):
        rows[40]


def test_many_shards_read_like_one(tmp_path):
    one, _, _ = make_log(tmp_path / "one")
    many, _, _ = make_log(tmp_path / "many", shard_bytes=1)
    assert len(list((tmp_path / "many").glob("rows-*"))) == 5  # a batch is never split
    for name in one.layers:
        np.testing.assert_array_equal(one.rows(name)[:], many.rows(name)[:])
        np.testing.assert_array_equal(one.rows(name)[::-3], many.rows(name)[::-3])
    np.testing.assert_array_equal(one.moments(), many.moments())


def test_ids_are_python_values_with_their_step(tmp_path):
    model = make_model()
    for ids, expected in (
        (torch.arange(4), [0, 1, 2, 3]),
        (np.array([5, 6, 7, 8], dtype=np.int32), [5, 6, 7, 8]),
        (["w", "x", "y", "z"], ["w", "x", "y", "z"]),
        (np.array(["w", "x", "y", "z"]), ["w", "x", "y", "z"]),
    ):
        run = loghook.init(tmp_path, rank=4, overwrite=True)
        run.watch(model)
        for _ in range(2):
            with run(data_id=ids):
                loss_fn(model, data(4)).backward()
        run.finalize()
        log = loghook.load(tmp_path)
        assert log.data_ids == expected * 2 and type(log.data_ids[0]) in (int, str)
        assert log.keys.step.tolist() == [0] * 4 + [1] * 4
        assert set(log.keys.rank) == {0} and set(log.keys.pass_index) == {-1}  # outside passes()


def test_repeats_inside_passes_are_kept_once_and_counted_once_in_the_statistics(tmp_path):
    model, x = make_model(), data(8)
    clean = loghook.init(tmp_path / "clean", rank=4, dtype="float64")
    filled = loghook.init(tmp_path / "filled", rank=4, dtype="float64")
    for run, batches in ((clean, [[0, 1, 2, 3], [4, 5, 6, 7]]), (filled, [[0, 1, 2, 3], [4, 5, 6, 7, 7, 0, 1]])):
        run.watch(model)
        for _ in run.passes():
            for ids in batches:
                with run(data_id=ids):
                    loss_fn(model, x[ids]).backward()
        run.finalize()
        run.close()
    a, b = loghook.load(tmp_path / "clean"), loghook.load(tmp_path / "filled")
    assert a.data_ids == b.data_ids and b.repeats == 3 and a.repeats == 0
    np.testing.assert_allclose(a.moments(), b.moments(), rtol=1e-12)
    np.testing.assert_array_equal(a.rows("0")[:], b.rows("0")[:])


def test_resume_completes_an_interrupted_log(tmp_path):
    whole_log, _, _ = make_log(tmp_path / "whole")
    model, x = make_model(), data(40)
    for stop in (16, 40):
        run = loghook.init(tmp_path / "parts", rank=4, dtype="float64", resume=True, on_repeat="first")
        run.watch(model)
        for start in range(0, stop, 8):
            with run(data_id=list(range(start, start + 8))):
                loss_fn(model, x[start : start + 8]).backward()
        run.finalize() if stop == 40 else run.close()
    parts = loghook.load(tmp_path / "parts")
    assert parts.data_ids == whole_log.data_ids and not parts.verify()
    for name in parts.layers:
        np.testing.assert_array_equal(parts.rows(name)[:], whole_log.rows(name)[:])
    np.testing.assert_allclose(parts.moments(), whole_log.moments(), rtol=1e-12)


def test_resume_refuses_other_arguments(tmp_path):
    make_unfinished(tmp_path)
    for changed in ({"rank": 3}, {"seed": 1}, {"dtype": "float32"}):
        run = loghook.init(tmp_path, **({"rank": 4, "dtype": "float64"} | changed), resume=True)
        with pytest.raises(loghook.LoghookError, match="cannot resume"):
            run.watch(make_model())
        assert run.layers == ()
        run.close()


def make_unfinished(path):
    model = make_model()
    with loghook.init(path, rank=4, dtype="float64") as run:
        run.watch(model)
        with run(data_id=[100, 101]):
            loss_fn(model, data(2)).backward()


def test_an_unfinished_log_reads_up_to_its_last_commit(tmp_path):
    make_unfinished(tmp_path)
    log = loghook.load(tmp_path)
    assert log.manifest.sealed is None and log.data_ids == [100, 101] and not log.verify()


def test_a_torn_record_is_cut_off(tmp_path):
    make_unfinished(tmp_path)
    with open(tmp_path / "commits-00000.jsonl", "ab") as file:
        file.write(b"000000ff 0123456789")
    log = loghook.load(tmp_path)
    assert log.data_ids == [100, 101] and len(log.torn) == 1
    run = loghook.init(tmp_path, rank=4, dtype="float64", resume=True)
    model = make_model()
    run.watch(model)
    with run(data_id=[102]):
        loss_fn(model, data(1)).backward()
    run.finalize()
    assert loghook.load(tmp_path).data_ids == [100, 101, 102]


def test_a_reader_sees_only_committed_rows_while_a_writer_works(tmp_path):
    model = make_model()
    run = loghook.init(tmp_path, rank=4, commit_seconds=0.01)
    run.watch(model)
    for step in range(3):
        with run(data_id=[2 * step, 2 * step + 1]):
            loss_fn(model, data(2)).backward()
        deadline = time.time() + 20
        while len(loghook.load(tmp_path)) < 2 * step + 2:
            assert time.time() < deadline, "rows were never committed"
            time.sleep(0.01)
        log = loghook.load(tmp_path)
        assert log.data_ids == list(range(2 * step + 2)) and not log.verify()
        assert np.isfinite(log.rows("0")[:]).all()
    run.finalize()


def test_memory_of_scoring_is_flat_in_the_number_of_rows(tmp_path):
    """Score logs of 16 and 128 MB in fresh processes; the larger one takes hardly more memory."""
    script = """
        import sys, torch, loghook
        from pathlib import Path
        torch.set_num_threads(1)
        log = loghook.load(sys.argv[1])
        query = loghook.Query.load(sys.argv[2])
        Path("/proc/self/clear_refs").write_text("5")
        log.influence(query, "ekfac", normalize="unit", top=5)
        status = Path("/proc/self/status").read_text()
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 64, bias=False))
    peaks = []
    for rows in (1024, 8192):
        folder = tmp_path / str(rows)
        run = loghook.init(folder, rank=64, projection="random")
        run.watch(model)
        for start in range(0, rows, 1024):
            with run(data_id=list(range(start, start + 1024))):
                model(torch.randn(1024, 64)).square().sum().backward()
        with run.query(data_id=["q"]) as query:
            model(torch.randn(1, 64)).square().sum().backward()
        run.finalize()
        run.close()
        query.save(tmp_path / "q.safetensors")
        command = [sys.executable, "-c", textwrap.dedent(script), str(folder), str(tmp_path / "q.safetensors")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": "."})
        peaks.append(int(done.stdout.split()[-1]) * 1024)
    sizes = [sum(f.stat().st_size for f in (tmp_path / str(rows)).glob("rows-*")) for rows in (1024, 8192)]
    assert sizes[1] - sizes[0] > 200e6
    assert peaks[1] - peaks[0] < 0.45 * (sizes[1] - sizes[0])  # of which none would be needed


def test_opening_a_log_that_commits_meanwhile_reads_it_again(tmp_path, monkeypatch):
    model, x = make_model(), data(40)
    run = loghook.init(tmp_path, rank=4, dtype="float64")
    run.watch(model)

    def commit(i):
        with run(data_id=[i]):
            loss_fn(model, x[i : i + 1]).backward()
        run._session.writer.settle()

    commit(0)
    commits, real = iter([2, 2, 1]), reader.load_moments  # of two, the first deletes what the reader looks for

    def slow(*arguments):
        for _ in range(next(commits, 0)):
            commit(len(slow.done))
            slow.done.append(1)
        return real(*arguments)

    slow.done = [0]
    monkeypatch.setattr(reader, "load_moments", slow)
    log = loghook.load(tmp_path)
    monkeypatch.setattr(reader, "load_moments", real)
    assert log.data_ids == [0, 1, 2, 3, 4] and len(slow.done) == 6
    by_hand = real(tmp_path, read_commits(tmp_path, log.manifest, 0).rows[4]["statistics"], log.layout.moments_width)
    np.testing.assert_array_equal(log.moments(), by_hand)  # those of its five rows
    for file in tmp_path.glob("statistics-*"):
        file.unlink()
    with pytest.raises(CorruptLogError, match="cannot be read"):  # and not for ever
        loghook.load(tmp_path)
    run.close()


@pytest.mark.parametrize(("frozen", "trained"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("moved", [True, False])
def test_a_pass_that_goes_on_with_other_parameters_warns_unless_it_trains(tmp_path, frozen, moved, trained):
    model, x = make_model(), data(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def part(run, places):
        run.watch(model)
        with loghook.frozen(model) if frozen else contextlib.nullcontext():
            for _ in run.passes():
                for i in places:
                    with run(data_id=[i, i + 1]):
                        loss_fn(model, x[i : i + 2]).backward()
                    if trained:
                        optimizer.step()
                if len(places) < 6:
                    break  # as if it had been killed
        if len(places) == 6:
            run.finalize()
        run.close()

    part(loghook.init(tmp_path, rank=4), [0, 2])
    if moved:
        torch.nn.init.normal_(model[0].weight)
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        part(loghook.init(tmp_path, rank=4, resume=True), range(0, 12, 2))
    told = [w for w in met if w.category is CheckpointWarning]
    assert len(told) == (moved and not trained)
    assert all("other parameter values than it goes on with" in str(w.message) for w in told)
    shown = CliRunner().invoke(app, ["info", str(tmp_path)]).output
    if told:  # and it is not forgotten
        assert "rows of several parameter values" in shown
    else:
        assert f"parameters {'changed' if moved or trained else 'unchanged'} while logging" in shown


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    (home := tmp_path / "home").mkdir()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    model, x = nn.Linear(5, 4), torch.randn(16, 2, 5)
    for name in ("one", "two"):
        _, query = log_and_ask(f"~/{name}", model, squares, x, x[:1], ids=[f"{name}{i}" for i in range(16)], rank=2)
    log = loghook.load("~/one")
    log.compress("~/small", "int8", queries=2)
    maintain.compress("~/one", "~/wide", "float64")
    maintain.merge("~/both", ["~/one", "~/two"])
    maintain.delete("~/both", ["one3"])
    maintain.repair("~/both")
    maintain.reopen("~/two")
    query.save("~/query")
    scores = log.influence(loghook.Query.load("~/query"), "dot")
    scores.save("~/scores")
    loghook.Scores.load("~/scores").report("~/page.html")
    log.index(2, "Flat").save("~/index")
    log.load_index("~/index")
    fitted(model, x, squares, "~/factors")
    run = loghook.init("~/fitted", rank=2, projection="pca", fitted="~/factors")
    run.watch(model)
    retrain(lambda members, seed: [1.0], np.ones((1, 4), bool), [0], "~/results", workers=0)
    written = {"one", "two", "small", "wide", "both", "query", "scores", "page.html", "index", "factors", "results"}
    assert written <= {file.name for file in home.iterdir()} and not list(elsewhere.iterdir())


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts the process's threads")
@pytest.mark.parametrize("dtype", ["float32", "int1"])
def test_the_writer_takes_no_threads_from_the_loop(tmp_path, dtype):
    """Two teams of OpenMP threads on as many cores slow down each operation of the loop by a tenth of a millisecond."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model, x = nn.Linear(400, 300), torch.randn(64, 400)
        model(x.repeat(100, 1)).square().sum().backward()  # the loop's own team
        run = loghook.init(tmp_path, rank=200, dtype=dtype, commit_seconds=1e-6)
        run.watch(model)
        threads = len(os.listdir("/proc/self/task"))
        for i in range(3):
            with run(data_id=[f"{i}/{k}" for k in range(64)]):
                model(x).square().sum().backward()
        run._session.writer.settle()
        assert len(os.listdir("/proc/self/task")) == threads + 1
        assert torch.get_num_threads() == 2
        run.finalize()
        run.close()
    finally:
        torch.set_num_threads(before)


def test_writers_that_start_at_once_leave_threads_as_they_were(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        left, ready = [], threading.Barrier(12)

        def log(i):
            torch.get_num_threads()  # what a thread has it has from its first look
            ready.wait()
            model = nn.Linear(4, 3)
            run = loghook.init(tmp_path / str(i), rank=2)
            run.watch(model)
            with run(data_id=[0, 1]):
                model(torch.randn(2, 4)).square().sum().backward()
            left.append(torch.get_num_threads())
            run.close()

        threads = [threading.Thread(target=log, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert left == [2] * 12
    finally:
        torch.set_num_threads(before)


def test_committed_rows_outlive_their_manifest(tmp_path):
    """A copy that lacks loghook.json can be mended; deleting its rows on resume could not."""
    make_unfinished(tmp_path)
    (tmp_path / "notes.tmp").write_text("the user's own")
    kept = (tmp_path / "loghook.json").read_bytes()
    (tmp_path / "loghook.json").unlink()
    for again in ({"resume": True}, {}):
        with pytest.raises(loghook.LoghookError, match=r"restore it from a copy|holds a run already"):
            loghook.init(tmp_path, rank=4, dtype="float64", **again)
    (tmp_path / "loghook.json").write_bytes(kept)
    assert loghook.load(tmp_path).data_ids == [100, 101]
    loghook.init(tmp_path, rank=4, dtype="float64", overwrite=True).close()
    assert (tmp_path / "notes.tmp").exists() and not list(tmp_path.glob("rows-*"))


def test_a_cell_that_is_run_again_is_told_to_close_the_run(tmp_path):
    first = loghook.init(tmp_path, rank=4, dtype="float64")
    first.watch(model := make_model())
    with first(data_id=[0, 1]):
        loss_fn(model, data(2)).backward()
    with pytest.raises(LogLockedError, match=r"by this process: run.finalize\(\) or run.close\(\)"):
        loghook.init(tmp_path, rank=4, dtype="float64", overwrite=True)
    first.close()
    loghook.init(tmp_path, rank=4, dtype="float64", overwrite=True).close()


def begun(path, model, ids=(0, 1), **options):
    run = loghook.init(path, **({"rank": 4, "dtype": "float64"} | options))
    run.watch(model)
    with run(data_id=list(ids)):
        loss_fn(model, data(len(ids))).backward()
    return run


def test_the_rule_for_repeats_is_that_of_the_run(tmp_path):
    begun(tmp_path, make_model(), on_repeat="first").close()
    with pytest.raises(MismatchError, match="on_repeat is 'first' there and 'all' now"):
        loghook.init(tmp_path, rank=4, dtype="float64", resume=True, on_repeat="all")
    run = begun(tmp_path, make_model(), ids=(1, 2), resume=True)
    run.finalize()
    log = loghook.load(tmp_path)
    assert log.data_ids == [0, 1, 2] and log.moments()[-1] == begun_tokens(log)


@pytest.mark.parametrize("rule", ["first", "all", "error"])
def test_a_run_takes_a_rule_for_repeats_late_while_there_are_none(tmp_path, rule):
    begun(tmp_path, make_model()).close()
    run = begun(tmp_path, make_model(), ids=(2, 3), resume=True, on_repeat=rule)
    for _ in run.passes():
        for ids in ([4, 5], [4, 5]) if rule != "error" else ([4, 5],):
            with run(data_id=ids):
                loss_fn(run._model, data(2)).backward()
    run.finalize()
    log = loghook.load(tmp_path)
    assert log.manifest.on_repeat == rule and log.moments()[-1] == begun_tokens(log)
    assert log.data_ids == [0, 1, 2, 3, 4, 5] + [4, 5] * (rule == "all")


def test_a_run_with_repeats_takes_no_rule_for_them(tmp_path):
    run = begun(tmp_path, make_model())
    with run(data_id=[1, 2]):
        loss_fn(run._model, data(2)).backward()
    run.close()
    with pytest.raises(MismatchError, match="ids have several rows by now"):
        loghook.init(tmp_path, rank=4, dtype="float64", resume=True, on_repeat="first")
    begun(tmp_path, make_model(), resume=True).finalize()
    assert loghook.load(tmp_path).data_ids == [0, 1, 1, 2, 0, 1]


def begun_tokens(log):
    return len(log.data_ids) * data(1).shape[1]


def test_two_processes_that_resume_one_run(tmp_path):
    begun(tmp_path, make_model()).close()
    late = loghook.init(tmp_path, rank=4, dtype="float64", resume=True, on_repeat="first")
    begun(tmp_path, make_model(), ids=(2, 3), resume=True, on_repeat="first").finalize()
    late.watch(model := make_model())
    with pytest.raises(StateError, match="another process went on"), late(data_id=[2, 3]):
        loss_fn(model, data(2)).backward()
    assert loghook.load(tmp_path).data_ids == [0, 1, 2, 3]


def test_training_may_go_once_more_through_steps_of_a_finished_log(tmp_path, capsys):
    begun(tmp_path, make_model(), on_repeat="first").finalize()
    before = (tmp_path / "commits-00000.jsonl").read_bytes()
    again = begun(tmp_path, make_model(), resume=True, on_repeat="first")
    again.finalize()
    assert (tmp_path / "commits-00000.jsonl").read_bytes() == before
    with pytest.raises(StateError, match="loghook append"), again(data_id=[0, 5]):
        pass
    assert list(again.passes()) == [] and "is finished: nothing is logged" in capsys.readouterr().out


def test_ids_that_name_places_in_a_batch_are_noticed(tmp_path):
    run = loghook.init(tmp_path, rank=4, dtype="float64")
    run.watch(model := make_model())
    with pytest.warns(UserWarning, match="12 samples of this pass had ids that came before"):
        for _ in run.passes():
            for _ in range(4):
                with run(data_id=range(4)):
                    loss_fn(model, data(4)).backward()


def test_a_loader_that_is_used_up_after_the_first_pass_is_noticed(tmp_path):
    run = loghook.init(tmp_path, rank=4, projection="pca")
    run.watch(model := make_model())
    batches = iter([(range(4), data(4)), (range(4, 8), data(4))])
    with pytest.raises(StateError, match="gone through only once"):
        for _ in run.passes():
            for ids, x in batches:
                with run(data_id=ids):
                    loss_fn(model, x).backward()


def test_nothing_is_written_into_a_folder_that_took_the_place_of_the_runs_own(tmp_path):
    old = begun(tmp_path / "run", make_model())
    (tmp_path / "run").rename(tmp_path / "gone")  # at once: its writer may be at work
    new = begun(tmp_path / "run", make_model(), ids=range(10, 14))
    new.finalize()
    files = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    with pytest.raises(WriteError, match="replaced by another run"):
        old.close()
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == files
    assert loghook.load(tmp_path / "run").data_ids == [10, 11, 12, 13] and not loghook.load(tmp_path / "run").verify()


def test_a_rank_that_is_killed_once_it_has_ended_has_left_nothing_undone(tmp_path, monkeypatch):
    append = Writer._append

    def spied(writer, record):
        append(writer, record)
        if "end" in record:
            shutil.copytree(tmp_path / "run", tmp_path / "killed")

    monkeypatch.setattr(Writer, "_append", spied)
    run = begun(tmp_path / "run", model := make_model(), commit_seconds=1e-9)
    with run(data_id=[2, 3]):
        loss_fn(model, data(2)).backward()
    run.finalize()
    shutil.copy(tmp_path / "run" / "loghook.json", tmp_path / "killed")  # rank 0 seals it
    log = loghook.load(tmp_path / "killed")
    assert log.finished and log.data_ids == [0, 1, 2, 3] and not log.verify()


def test_several_epochs_inside_passes_are_no_mistake(tmp_path, recwarn):
    run = loghook.init(tmp_path, rank=4, dtype="float64")
    run.watch(model := make_model())
    for _ in run.passes():
        for _ in range(3):
            for ids in (range(4), range(4, 8)):
                with run(data_id=ids):
                    loss_fn(model, data(4)).backward()
    run.finalize()
    assert not [w for w in recwarn if "data_id" in str(w.message)] and len(loghook.load(tmp_path)) == 8


def test_all_runs_are_committed_at_exit_also_if_one_cannot_be(tmp_path):
    script = """
        import shutil, sys, loghook
        from tests.test_influence import data, loss_fn, make_model
        runs = [loghook.init(f"{sys.argv[1]}/{name}", rank=4, dtype="float64") for name in "ab"]
        for run in runs:
            run.watch(model := make_model())
            with run(data_id=[0, 1]):
                loss_fn(model, data(2)).backward()
        shutil.rmtree(f"{sys.argv[1]}/a")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "was deleted, or replaced" in done.stderr
    assert loghook.load(tmp_path / "b").data_ids == [0, 1]


def test_a_program_may_change_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    model, x = make_model(), data(20)
    run = loghook.init("run", rank=4)
    run.watch(model)
    monkeypatch.chdir("elsewhere")
    for start in (0, 10):
        with run(data_id=range(start, start + 10)):
            loss_fn(model, x[start : start + 10]).backward()
        monkeypatch.chdir(tmp_path)
        log = loghook.load("run") if start else None
    run.finalize()
    monkeypatch.chdir("elsewhere")
    assert not list((tmp_path / "elsewhere").iterdir())
    log = loghook.load("../run")
    monkeypatch.chdir(tmp_path)
    assert log.data_ids == list(range(20)) and not log.verify() and len(log.rows("0")[:]) == 20


def test_passes_are_gone_through_once(tmp_path, capsys):
    model, x = make_model(), data(8)

    def go_through(run, ids):
        for _ in run.passes():
            with run(data_id=ids):
                loss_fn(model, x[: len(ids)]).backward()

    run = loghook.init(tmp_path / "run", rank=4)
    run.watch(model)
    go_through(run, range(8))
    with pytest.raises(StateError, match="put the epochs inside"):
        go_through(run, range(8, 16))
    run.close()
    run = loghook.init(tmp_path / "run", rank=4, resume=True)
    run.watch(model)
    go_through(run, range(8))
    assert "an earlier process completed all passes" in capsys.readouterr().out
    run.finalize()
    with pytest.raises(StateError, match="is finalised"):
        go_through(run, range(8))
    assert len(loghook.load(run.path)) == 8


def test_rows_that_are_looked_at_hold_one_descriptor_a_shard(tmp_path):
    """Each map holds a descriptor, and a program may keep as many rows as it likes."""
    model, x = nn.Linear(6, 4), torch.randn(64, 6)
    log, _ = log_and_ask(tmp_path, model, squares, x.repeat(16, 1), size=64, rank=2)
    before = len(os.listdir("/proc/self/fd"))
    rows = log.rows(log.layers[0])
    kept = [rows[i] for i in range(1024)] + [block for _, block in log.blocks(rows=1)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(kept) == 2048
    del kept
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("waiting", [2**30, 1])
def test_of_large_blocks_none_waits_for_another(tmp_path, monkeypatch, waiting):
    """Or a slow disk would fill the memory; small ones may run ahead of it."""
    taking, behind = Writer._take, []

    def slow(self, batch):
        time.sleep(0.05)
        behind.append(QUEUE - 1 - self._room.qsize())
        taking(self, batch)

    monkeypatch.setattr("loghook.log.writer.WAITING", waiting)
    monkeypatch.setattr(Writer, "_take", slow)
    model, x = make_model(), data(24)
    log, _ = log_and_ask(tmp_path, model, loss_fn, x, size=2, rank=4)
    most = max(behind[:-1])  # behind the last block comes the end of the pass
    assert log.data_ids == list(range(24)) and (most == 0 if waiting == 1 else 2 < most < QUEUE), behind


def test_commits_may_be_as_rare_as_one_likes(tmp_path):
    begun(tmp_path, make_model(), commit_seconds=1e300).finalize()
    assert loghook.load(tmp_path).data_ids == [0, 1]


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_that_was_killed_while_it_was_overwritten_begins_anew(tmp_path, monkeypatch, finished):
    unlink, killed = Path.unlink, 0
    while True:
        path, left = tmp_path / str(killed), killed
        run = begun(path, make_model())
        (run.finalize if finished else run.close)()
        run.close()

        def until_killed(file, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            unlink(file, **options)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "unlink", until_killed)
            loghook.init(path, rank=4, dtype="float64", overwrite=True)
        with pytest.raises(FileNotFoundError, match="was being overwritten" if left < 0 else None):
            loghook.load(path)
        begun(path, make_model(), ids=(5, 6), resume=True).finalize()
        log = loghook.load(path)
        assert log.data_ids == [5, 6] and not log.verify()
        if left >= 0:
            break
        killed += 1
    assert killed > 3
