"""repair, append, merge, delete: what they keep, what they say, and that a kill leaves the old log or the new one."""

import errno
import gc
import itertools
import json
import os
import resource
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import loghook
from loghook.cli import app
from loghook.errors import (
    CheckpointWarning,
    ConfigError,
    CorruptLogError,
    LogExistsError,
    LogLockedError,
    MismatchError,
    StateError,
    WriteError,
)
from loghook.log import maintain, reader, records
from tests import dense
from tests.harness import log_and_ask
from tests.test_influence import data, loss_fn, make_log, make_model


def write(path, ids, *, seed=0, **options):
    model, x = make_model(), data(40)
    run = loghook.init(path, **({"rank": 4, "dtype": "float64", "shard_bytes": 4000, "seed": seed} | options))
    run.watch(model)
    for _ in run.passes():
        for start in range(0, len(ids), 4):
            if run.pending(ids[start : start + 4]):
                with run(data_id=ids[start : start + 4]):
                    loss_fn(model, x[ids[start : start + 4]]).backward()
    run.finalize()
    run.close()
    return loghook.load(path)


def rows(log):
    return {i: [log.rows(name)[place].tobytes() for name in log.layers] for place, i in enumerate(log.data_ids)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole") / "run", list(range(40)))


@pytest.fixture
def path(tmp_path, whole):
    shutil.copytree(whole.path, tmp_path / "run")
    return tmp_path / "run"


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def drop_line(file, number, again=False):
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:number], *([lines[number]] * 2 if again else []), *lines[number + 1 :]]))


DAMAGE = {
    "rows": lambda path: flip(path / "rows-00000-00001.safetensors", 700),
    "a header": lambda path: flip(path / "rows-00000-00001.safetensors", 100),
    "a missing shard": lambda path: (path / "rows-00000-00001.safetensors").unlink(),
    "a record": lambda path: flip(path / "commits-00000.jsonl", (path / "commits-00000.jsonl").stat().st_size // 2),
    "a torn commit log": lambda path: os.truncate(path / "commits-00000.jsonl", 700),
    "the first record": lambda path: flip(path / "commits-00000.jsonl", 60),
    "a record that is gone": lambda path: drop_line(path / "commits-00000.jsonl", 2),
    "a record twice": lambda path: drop_line(path / "commits-00000.jsonl", 2, again=True),
    "an empty commit log": lambda path: os.truncate(path / "commits-00000.jsonl", 0),
    "statistics": lambda path: flip(next(path.glob("statistics-*")), -1),
    "a stray file": lambda path: shutil.copy(next(path.glob("rows-*")), path / "rows-00000-00077.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_repair_keeps_what_is_good_and_names_the_rest(path, whole, damage):
    damage(path)
    done = maintain.repair(path)
    log = loghook.load(path)
    assert not log.verify() and log.manifest.sealed
    good = rows(whole)
    assert all(good[i] == row for i, row in rows(log).items())
    lost = set(range(40)) - set(log.data_ids)
    assert done.dropped == len(lost)
    known = f"the ids of {len(lost)} rows are not known" not in str(done.notes)  # or only damaged records named them
    assert set(done.ids) == (lost if known else set())
    if log.manifest.no_statistics:
        with pytest.raises(StateError, match=r"damaged and repaired.*log the data again"):
            log.moments()
        assert log.manifest.history[-1]["what"] == "repair"
    else:
        assert len(log) == 40
        np.testing.assert_array_equal(log.moments(), whole.moments())
    assert maintain.repair(path).notes == []


def test_a_damaged_record_costs_its_own_rows_alone(path, whole):
    records = [json.loads(line[42:]) for line in (path / "commits-00000.jsonl").read_bytes().splitlines()]
    for number, record in enumerate(records):
        shutil.copytree(path, path.with_name(str(number)))
        file = path.with_name(str(number)) / "commits-00000.jsonl"
        flip(file, sum(len(line) for line in file.read_bytes().splitlines(keepends=True)[:number]) + 50)
        done = maintain.repair(path.with_name(str(number)))
        lost = set(record.get("ids", ()))
        assert done.rows == 40 - len(lost) == 40 - done.dropped
        assert rows(loghook.load(path.with_name(str(number)))) == {
            i: r for i, r in rows(whole).items() if i not in lost
        }
    assert sum("ids" in record for record in records) > 3


def test_repair_of_a_run_that_lacks_a_commit_log_is_refused(path, whole):
    (path / "commits-00000.jsonl").rename(path / "elsewhere")
    with pytest.raises(CorruptLogError, match=r"commits-00000.jsonl is missing.*restore it from a copy.*empty file"):
        maintain.repair(path)
    (path / "elsewhere").rename(path / "commits-00000.jsonl")
    assert rows(loghook.load(path)) == rows(whole)


@pytest.mark.parametrize("damage", ["rows", "a record", "the first record", "a torn commit log"])
def test_what_repair_dropped_can_be_logged_again(path, whole, damage):
    DAMAGE[damage](path)
    assert maintain.repair(path).dropped
    maintain.reopen(path)
    log = write(path, list(range(40)), resume=True)
    assert not log.verify() and rows(log) == rows(whole)
    assert [entry["what"] for entry in log.manifest.history] == ["repair", "append"]


def test_damaged_rows_can_be_deleted_but_not_kept(tmp_path, path, whole):
    DAMAGE["rows"](path)
    shutil.copytree(path, tmp_path / "copy")
    damaged = maintain.repair(tmp_path / "copy").ids
    assert len(damaged) > 1
    with pytest.raises(CorruptLogError, match="run `loghook repair` first"):
        maintain.delete(path, damaged[1:])
    maintain.delete(path, damaged)
    log = loghook.load(path)
    assert not log.verify() and rows(log) == {i: row for i, row in rows(whole).items() if i not in damaged}


def test_append_takes_a_new_delivery(tmp_path, whole):
    write(tmp_path / "run", list(range(24)))
    maintain.reopen(tmp_path / "run")
    assert loghook.load(tmp_path / "run").manifest.sealed is None
    log = write(tmp_path / "run", list(range(40)), resume=True)
    assert log.data_ids == whole.data_ids and rows(log) == rows(whole) and not log.verify()
    np.testing.assert_allclose(log.moments(), whole.moments(), rtol=1e-12)
    assert log.manifest.history[-1]["what"] == "append"
    maintain.reopen(tmp_path / "run")
    with pytest.raises(StateError, match="not finished"):
        maintain.reopen(tmp_path / "run")


@pytest.mark.parametrize("how", ["merge", "compress", "delete"])
@pytest.mark.parametrize("commit_seconds", [1e-9, 1000.0])
def test_append_after_maintenance_keeps_the_statistics(tmp_path, how, commit_seconds):
    """The snapshot that maintenance wrote is the writer's until it has a newer one, whatever their numbers are."""
    path, options = tmp_path / "run", {"dtype": "float32" if how == "compress" else "float64", "shard_bytes": 10**6}
    if how == "merge":
        write(tmp_path / "a", list(range(8)))
        write(tmp_path / "b", list(range(8, 16)))
        maintain.merge(path, [tmp_path / "a", tmp_path / "b"])
    elif how == "compress":
        write(tmp_path / "a", list(range(16)), commit_seconds=1e-9).compress(path, "float32", queries=2)
    else:
        write(path, list(range(16)), commit_seconds=1e-9)
        maintain.delete(path, [3], keep_statistics=True)
    before = loghook.load(path).moments()
    maintain.reopen(path)
    log = write(path, list(range(16, 40)), resume=True, commit_seconds=commit_seconds, **options)
    assert not log.verify()
    later = write(tmp_path / "later", list(range(16, 40)), **options).moments()
    np.testing.assert_allclose(log.moments(), before + later, rtol=1e-6 if how == "compress" else 1e-12)


def test_logs_may_have_more_shards_than_a_process_may_open_files(tmp_path, whole):
    log = write(tmp_path / "run", list(range(40)), shard_bytes=1)
    gc.collect()  # what other tests left open must not be closed between counting and using
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = (fd for fd in itertools.count() if not os.path.lexists(f"/proc/self/fd/{fd}"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (list(itertools.islice(free, 7))[-1], hard))  # six are left
    try:
        assert len(list(log.path.glob("rows-*"))) == 10 and rows(log) == rows(whole)
        name = log.layers[0]
        for place in range(40):
            assert log.rows(name)[place].tobytes() == whole.rows(name)[place].tobytes()
        maintain.compress(log.path, tmp_path / "small", "float16")
        maintain.delete(log.path, [0])
        small, kept = loghook.load(tmp_path / "small"), []
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                kept.append(open("/dev/null"))  # noqa: SIM115
        with pytest.raises(OSError, match="Too many open files"):
            small.rows(name)[0]
        del kept
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(loghook.load(tmp_path / "small")) == 40 and len(loghook.load(log.path)) == 39


def test_merge_joins_runs(tmp_path, whole):
    a, b = write(tmp_path / "a", list(range(24))), write(tmp_path / "b", list(range(20, 40)))
    done = maintain.merge(tmp_path / "out", [a.path, b.path])
    assert len(done.notes) == 1 and "4 rows have ids that another run has too" in done.notes[0]
    log = loghook.load(tmp_path / "out")
    assert sorted(log.data_ids) == list(range(40)) and log.repeats == 4 and not log.verify()
    assert rows(log) == rows(whole)
    np.testing.assert_allclose(log.moments(), a.moments() + b.moments(), rtol=1e-12)
    assert [run["run_id"] for run in log.manifest.history[0]["runs"]] == [a.manifest.run_id, b.manifest.run_id]
    with pytest.raises(LogExistsError):
        maintain.merge(tmp_path / "out", [a.path, b.path])
    other = write(tmp_path / "other", list(range(8)), seed=1)
    with pytest.raises(MismatchError, match=r"differ in seed \(1 and 0\)"):
        maintain.merge(tmp_path / "out2", [a.path, other.path])
    flip(next(b.path.glob("rows-*")), 600)
    with pytest.raises(CorruptLogError, match="repair"):
        maintain.merge(tmp_path / "out2", [a.path, b.path])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b", "other", "out"]


@pytest.mark.parametrize("keep", [False, True])
def test_delete_takes_rows_out_and_is_honest_about_statistics(path, whole, keep):
    secret = whole.rows(whole.layers[0])[5].tobytes()[:32]
    assert any(secret in file.read_bytes() for file in path.iterdir())
    done = maintain.delete(path, [5, 17], keep_statistics=keep)
    log = loghook.load(path)
    assert done.dropped == 2 and log.data_ids == [i for i in range(40) if i not in (5, 17)] and not log.verify()
    good = rows(whole)
    assert rows(log) == {i: good[i] for i in log.data_ids}
    assert not any(secret in file.read_bytes() for file in path.iterdir())
    if keep:
        np.testing.assert_array_equal(log.moments(), whole.moments())
    else:
        with pytest.raises(StateError, match="rows were deleted"):
            log.moments()
    with pytest.raises(ConfigError, match="99"):
        maintain.delete(path, [99])
    assert log.manifest.history[-1]["what"] == "delete" and log.manifest.history[-1]["dropped"] == 2


def test_samples_that_were_flagged_stay_so_when_all_beside_them_go(tmp_path):
    model, x = make_model(), data(8)
    x[3] = float("inf")
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    run = loghook.init(tmp_path / "run", rank=4, commit_seconds=1e-9)
    run.watch(model)
    for start in (0, 4):
        with run(data_id=range(start, start + 4), scaler=scaler):
            scaler.scale(loss_fn(model, x[start : start + 4])).backward()
    run.finalize()
    run.close()
    assert loghook.load(run.path).flagged == [3]
    for ids, left in (([0, 1, 2], [4, 5, 6, 7]), ([4, 5, 6, 7], [])):
        maintain.delete(run.path, ids)
        log = loghook.load(run.path)
        assert (log.data_ids, log.flagged, log.verify()) == (left, [3], [])


def test_ekfac_refuses_after_a_deletion(tmp_path):
    log, query, _ = make_log(tmp_path / "run")
    layers = [{"G": np.delete(log.rows(name)[:], 3, axis=0)} for name in log.layers]
    maintain.delete(log.path, [3])
    after = loghook.load(log.path)
    with pytest.raises(StateError, match="method='shampoo'"):
        after.influence(query, "ekfac")
    reference = dense.influence("shampoo", layers, [query.rows(name) for name in log.layers])
    np.testing.assert_allclose(after.influence(query, "shampoo").values, reference.total, rtol=1e-4, atol=1e-6)


class Killed(BaseException):
    pass


def dying(real, left):
    def call(*arguments):
        left[0] -= 1
        if left[0] <= 0:
            raise Killed
        return real(*arguments)

    return call


@pytest.mark.parametrize("what", ["delete", "repair", "merge", "append"])
def test_a_kill_at_any_point_leaves_the_old_log_or_the_new_one(tmp_path, whole, what, monkeypatch):
    """Every call that changes the disk, one after the other, is the last one."""
    expected = {40} if what in ("merge", "append") else {40, 38} if what == "delete" else {40 - 4}
    seen, other = set(), write(tmp_path / "other", list(range(40))).path
    for die_at in range(1, 1000):
        path, out = tmp_path / f"run-{die_at}", tmp_path / f"out-{die_at}"
        shutil.copytree(whole.path, path)
        if what == "repair":
            DAMAGE["rows"](path)
        left = [die_at]
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "rename", "unlink", "pwrite"):
                patch.setattr(os, name, dying(getattr(os, name), left))
            try:
                if what == "merge":
                    patch.setattr(shutil, "rmtree", lambda *a, **k: None)
                    maintain.merge(out, [path, other])
                elif what == "delete":
                    maintain.delete(path, [5, 17])
                elif what == "append":
                    maintain.reopen(path)
                else:
                    maintain.repair(path)
                break
            except Killed:
                pass
        if what == "merge":
            assert not out.exists() or len(loghook.load(out)) == 40
        if what == "repair" and loghook.load(path).manifest.history == []:
            assert loghook.load(path).verify()
            maintain.repair(path)
        log = loghook.load(path)
        seen.add(len(log))
        assert len(log) in expected or what == "repair"
        maintain.repair(path)  # sweeps what was left
        assert not loghook.load(path).verify()
        shutil.rmtree(path)
    assert die_at > 3 and (what == "repair" or seen == expected)


@pytest.mark.parametrize("die_at", [1, 3, 6])
def test_a_deletion_that_a_full_disk_stops_gives_its_room_back(path, die_at, monkeypatch):
    before = {file.name: file.read_bytes() for file in path.iterdir() if not file.name.startswith("lock")}
    left, real = [die_at], os.pwrite

    def full(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(WriteError, match="The log is as it was"):
            maintain.delete(path, [3])
    assert {file.name: file.read_bytes() for file in path.iterdir() if not file.name.startswith("lock")} == before
    assert not loghook.load(path).verify()


def test_a_deletion_clears_away_what_a_killed_one_left(path):
    (path / "rows-00000-00099.safetensors").write_bytes(b"left over")
    assert "repair" in loghook.load(path).verify()[0]
    maintain.delete(path, [3])
    assert not loghook.load(path).verify()


def test_the_statistics_of_writers_that_stay_are_their_own(tmp_path):
    a, b = write(tmp_path / "a", list(range(20))), write(tmp_path / "b", list(range(20, 40)))
    maintain.merge(tmp_path / "both", [a.path, b.path])
    maintain.delete(tmp_path / "both", list(range(20, 40)), keep_statistics=True)
    np.testing.assert_array_equal(loghook.load(tmp_path / "both").moments(), a.moments())


def test_maintenance_is_locked_out_while_the_run_is_written(tmp_path):
    with loghook.init(tmp_path, rank=4) as run:
        model = make_model()
        run.watch(model)
        with run(data_id=[0]):
            loss_fn(model, data(1)).backward()
        with pytest.raises(LogLockedError):
            maintain.repair(tmp_path)


def test_commands(path, tmp_path):
    def call(*arguments, status=0):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == status, result.output
        return result.output

    for command in ("repair", "append", "merge", "delete"):
        assert "Usage" in call(command, "--help")
    assert "nothing to repair" in call("repair", path)
    flip(path / "rows-00000-00001.safetensors", 100)  # its header, which costs neither rows nor statistics
    mended = call("repair", path)
    assert "header" in mended and "40 rows, all good now" in mended and "given up" not in mended
    assert loghook.load(path).manifest.no_statistics is None
    assert "2 rows deleted, 38 left" in call("delete", path, "--ids", 3, "--ids", 4)
    assert "no whole number" in call("delete", path, "--ids", "x", status=1)
    (tmp_path / "ids").write_text("5\n6\n\n")
    (tmp_path / "odd").write_text("5\nx y")
    assert "odd, line 2: " in call("delete", path, "--ids-file", tmp_path / "odd", status=1)
    (tmp_path / "odd").write_text('{"id": 5}')
    assert "an id on each line" in call("delete", path, "--ids-file", tmp_path / "odd", status=1)
    assert "2 rows deleted, 36 left" in call("delete", path, "--ids-file", tmp_path / "ids")
    assert "no statistics, so that kfac and ekfac cannot score it: rows were deleted" in call("info", path)
    assert "rows were deleted" in json.loads(call("info", path, "--json"))["no_statistics"]
    assert "40 rows" in call("merge", tmp_path / "out", *[write(tmp_path / n, r).path for n, r in PARTS])
    flip(tmp_path / "out" / "rows-00000-00000.safetensors", 700)
    kept = write(tmp_path / "kept", list(range(20))).path
    call("delete", kept, "--ids", 3, "--keep-statistics")
    assert "still count in the statistics" in call("info", kept)
    lines = [line for line in call("repair", tmp_path / "out").splitlines() if line.isdecimal()]
    assert [json.loads(line) for line in lines] == list(range(len(lines))) != []
    assert "is open" in call("append", tmp_path / "out")


PARTS = (("a", list(range(20))), ("b", list(range(20, 40))))


def test_merged_logs_of_two_checkpoints_say_so_now_and_later(tmp_path):
    paths = []
    for name, shift in (("a", 0.0), ("b", 0.1)):
        model, x = make_model(), data(4)
        next(model.parameters()).data.add_(shift)
        ids = [f"{name}{i}" for i in range(4)]
        _, query = log_and_ask(tmp_path / name, model, loss_fn, x, x[:1], ids=ids, rank=4, dtype="float64")
        paths.append(tmp_path / name)
        query.save(tmp_path / f"{name}.query")
    assert any("different parameter values" in note for note in maintain.merge(tmp_path / "ab", paths).notes)
    for name in "ab":
        with pytest.warns(CheckpointWarning):
            loghook.load(tmp_path / "ab").influence(loghook.Query.load(tmp_path / f"{name}.query"), method="dot")
    with pytest.warns(CheckpointWarning, match="different parameter values"):
        both = loghook.Query.load(tmp_path / "a.query") + loghook.Query.load(tmp_path / "b.query")
    assert len(both) == 2


def test_a_log_that_was_opened_before_rows_were_deleted_says_so(path):
    log = loghook.load(path)
    maintain.delete(path, [3, 30], keep_statistics=True)
    with pytest.raises(StateError, match="was changed since it was opened"):
        for _ in log.blocks():
            pass
    with pytest.raises(StateError, match="was changed since it was opened"):
        log.moments()
    (line,) = log.verify()
    assert "load it again" in line
    assert 3 not in loghook.load(path).data_ids


def test_verifying_beside_maintenance_finds_nothing_wrong(path, monkeypatch):
    found, clean, load = [], maintain._clean, reader.load_moments

    def meanwhile(*arguments):
        found.append(loghook.load(path).verify())  # the new files count, and the old ones are still there
        return clean(*arguments)

    def replaced(*arguments):
        monkeypatch.setattr(reader, "load_moments", load)
        maintain.delete(path, [4], keep_statistics=True)
        return load(*arguments)

    monkeypatch.setattr(maintain, "_clean", meanwhile)
    maintain.delete(path, [3], keep_statistics=True)
    assert len(found) == 2 and not any(found)
    log = loghook.load(path)
    monkeypatch.setattr(reader, "load_moments", replaced)
    (line,) = log.verify()
    assert "load it again" in line and not loghook.load(path).verify()


def test_an_open_log_calls_no_rows_strays_that_came_later(path):
    log = loghook.load(path)
    maintain.reopen(path)
    model, x = make_model(), data(40)
    with loghook.init(path, rank=4, dtype="float64", shard_bytes=4000, resume=True) as run:
        run.watch(model)
        for _ in run.passes():
            with run(data_id=[100, 101]):
                loss_fn(model, x[:2]).backward()
        run.finalize()
    (line,) = log.verify()
    assert "load it again" in line
    assert not loghook.load(path).verify()


@pytest.mark.parametrize("what", ["delete", "repair", "finish"])
def test_a_run_that_was_changed_before_its_first_block_is_left_alone(path, what):
    """Recovery deletes what the commit log does not name: of an older generation that would be every row."""
    maintain.reopen(path)
    model, x = make_model(), data(40)
    run = loghook.init(path, rank=4, dtype="float64", shard_bytes=4000, resume=True)
    run.watch(model)
    if what == "repair":
        flip(next(path.glob("rows-00000-00001*")), 700)
    if what == "finish":
        with loghook.init(path, rank=4, dtype="float64", shard_bytes=4000, resume=True) as other:
            other.watch(model)
            for _ in other.passes():
                with other(data_id=[100]):
                    loss_fn(model, x[:1]).backward()
            other.finalize()
    else:
        maintain.delete(path, [5]) if what == "delete" else maintain.repair(path)
    before = rows(loghook.load(path))
    with pytest.raises(StateError, match="resume=True"), run(data_id=[200]):
        loss_fn(model, x[:1]).backward()
    run.close()
    assert rows(loghook.load(path)) == before and before


@pytest.mark.parametrize("finished", [True, False])
def test_a_log_that_is_opened_while_maintenance_replaces_it_is_read_anew(path, finished, monkeypatch):
    if not finished:
        maintain.reopen(path)
    original, done = reader.all_commits, []

    def between(folder, manifest, *more):
        if not done:
            done.append(maintain.delete(path, [3]))
        return original(folder, manifest, *more)

    monkeypatch.setattr(reader, "all_commits", between)
    assert loghook.load(path).data_ids == [i for i in range(40) if i != 3]


def test_a_growing_log_may_outrun_its_reader(path, monkeypatch):
    maintain.reopen(path)
    expected, check_record = loghook.load(path).moments(), records.check_record

    def meanwhile(*arguments):
        for file in path.glob("statistics-*"):
            file.unlink()
        return check_record(*arguments)

    monkeypatch.setattr(records, "check_record", meanwhile)
    np.testing.assert_array_equal(loghook.load(path).moments(), expected)


def test_a_file_system_without_locks_is_named(path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(WriteError, match=r"cannot be locked.*write to a file system that has locks"):
        maintain.delete(path, [1])


@pytest.mark.parametrize("statistics", ["x", [1], {"file": 3, "checksum": "a"}, {"file": "a"}])
def test_a_growing_log_believes_no_record_before_it_is_checked(path, statistics):
    maintain.reopen(path)
    commits = path / "commits-00000.jsonl"
    *lines, rest = commits.read_bytes().split(b"\n")
    last = next(i for i, line in reversed(list(enumerate(lines))) if b"statistics" in line)
    lines[last] = records.encode_record(records.decode_record(lines[last]) | {"statistics": statistics})[:-1]
    commits.write_bytes(b"\n".join([*lines, rest]))
    with pytest.raises(CorruptLogError, match="has statistics"):
        loghook.load(path)


def test_blocks_of_repeats_alone_are_passed_over(tmp_path, path):
    """As in a merged run of the same ids, and where two ranks log the same samples."""
    maintain.merge(tmp_path / "both", [path, write(tmp_path / "again", list(range(40))).path])
    both, alone = loghook.load(tmp_path / "both"), loghook.load(path)
    assert both.data_ids == alone.data_ids
    query = loghook.Query(["q"], torch.randn(1, alone.layout.gradient_width), alone.made)
    for method in ("dot", "cosine", "ekfac"):
        a, b = (log.influence(query, method, top=3) for log in (both, alone))
        assert a.top(3) == b.top(3)
        np.testing.assert_array_equal(both.influence(query, method).values, alone.influence(query, method).values)
    for name in ("both", "run"):
        sizes = [len(block) for _, block in loghook.load(tmp_path / name).blocks(5)]
        assert sum(sizes) == 40 and min(sizes) > 0


def test_a_lock_file_of_other_bytes_is_still_a_lock(path):
    maintain.reopen(path)
    run = loghook.init(path, rank=4, dtype="float64", shard_bytes=4000, resume=True)
    run.watch(model := make_model())
    with run(data_id=[300]):
        loss_fn(model, data(1)).backward()
    (path / "lock-00000").write_bytes(b"\xff\xfe")
    with pytest.raises(LogLockedError, match="an unknown process"):
        maintain.delete(path, [3])
    run.close()


def test_a_log_that_was_emptied_says_so(path):
    maintain.delete(path, loghook.load(path).data_ids)
    log = loghook.load(path)
    for method in ("dot", "fisher", "shampoo"):
        with pytest.raises(ConfigError, match="holds no rows yet"):
            log.self_influence(method)


@pytest.mark.parametrize("rule", [None, "all"])
def test_what_is_withdrawn_from_a_pass_that_was_completed_after_append_stays_away(tmp_path, rule):
    path, model, x = tmp_path / "run", make_model(), data(40)

    def go(count, *, finish):
        run = loghook.init(path, rank=4, resume=True, on_repeat=rule)
        run.watch(model)
        for _ in run.passes():
            for start in range(0, count, 4):
                with run(data_id=list(range(start, start + 4))):
                    loss_fn(model, x[start : start + 4]).backward()
                run._session.writer.settle()  # a commit for each block
        if finish:
            run.finalize()
        run.close()

    go(12, finish=True)
    maintain.reopen(path)
    go(16, finish=False)  # the pass comes to its end
    maintain.delete(path, list(range(12)))
    go(16, finish=True)
    assert loghook.load(path).data_ids == [12, 13, 14, 15]


def test_rows_that_are_gone_are_asleep_no_more(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 2)})
    run = loghook.init(tmp_path / "run", rank=2)
    run.watch(model, may_sleep="b")
    for start, awake in ((0, True), (4, False), (8, False)):
        with run(data_id=list(range(start, start + 4))):
            y = model["a"](torch.randn(4, 3))
            (model["b"](y) if awake else y).pow(2).sum().backward()
        run._session.writer.settle()
    run.finalize()
    run.close()
    assert loghook.load(run.path).asleep == {"b": 8}
    maintain.delete(run.path, [4, 5, 6, 7, 8])
    assert loghook.load(run.path).asleep == {"b": 3}


def test_a_run_is_not_merged_with_itself(tmp_path, path):
    with pytest.raises(ConfigError, match="one run twice"):
        maintain.merge(tmp_path / "out", [path, path])
    assert not (tmp_path / "out").exists()
