"""What a run's folder goes through, in odd orders: found by random lives of one against a simple model of it."""

import shutil

import pytest
import torch
from torch import nn

import loghook
from loghook.errors import CorruptLogError, NotFiniteError, StateError
from loghook.log import maintain

SCALER = torch.amp.GradScaler("cpu", enabled=False)  # lets a block flag what is not finite


class Life:
    def __init__(self, path):
        self.path = path
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)

    def start(self, **options):
        run = loghook.init(self.path, **({"rank": 2, "dtype": "float64"} | options))
        run.watch(self.model)
        return run

    def block(self, run, ids, infinite=(), **options):
        x = torch.tensor(ids)[:, None] + torch.arange(4.0)
        x[list(infinite), 0] = torch.inf
        with run(data_id=ids, **options):
            self.model(x).square().sum().backward()

    def log(self, *blocks, **options):
        """A finished run of these blocks, each committed by itself."""
        run = self.start(**options)
        for ids in blocks:
            self.block(run, ids)
            run._session.writer.settle()
        return self.finish(run)

    def finish(self, run):
        run.finalize()
        run.close()
        return self.open()

    def open(self):
        return loghook.load(self.path)


@pytest.fixture
def life(tmp_path):
    return Life(tmp_path / "run")


@pytest.mark.parametrize("looked", [False, True])
def test_an_open_log_never_takes_rows_that_came_later_for_its_own(life, looked):
    """Not even where none was left, so that the shards' numbers could begin anew."""
    old = life.log([1, 2, 3])
    if looked:
        assert len(old.rows("")[:]) == 3
    for ids in ([4, 5, 6], [7, 8, 9]):
        maintain.delete(life.path, life.open().data_ids)
        maintain.reopen(life.path)
        new = life.log(ids, resume=True)
        assert new.data_ids == ids and not new.verify()
        with pytest.raises(StateError, match="was changed"):
            print(old.rows("")[:])


def test_a_snapshot_that_does_not_count_may_be_damaged(life):
    life.log([1, 2, 3])
    maintain.delete(life.path, [2])
    for file in life.path.glob("statistics-*"):
        file.unlink()
    assert not life.open().verify() and not maintain.repair(life.path).notes
    maintain.reopen(life.path)
    log = life.log([4], resume=True)
    assert log.data_ids == [1, 3, 4] and not log.verify()


@pytest.mark.parametrize("changed", ["append", "delete"])
@pytest.mark.parametrize("lost", ["all", "the last record"])
def test_a_commit_log_that_lost_records_is_damaged_also_in_an_open_run(life, changed, lost):
    log = life.log([0, 1], [2, 3], [4, 5])
    if changed == "delete":
        maintain.delete(life.path, [0], keep_statistics=True)
    maintain.reopen(life.path)
    (file,) = life.path.glob("commits-*")
    lines = file.read_bytes().splitlines(keepends=True)
    file.unlink() if lost == "all" else file.write_bytes(b"".join(lines[:-2]))  # the last is that of the end
    for look in (life.open, lambda: life.start(resume=True)):
        with pytest.raises(CorruptLogError, match=r"is missing|No such file"):
            look()
    if lost == "all":
        with pytest.raises(CorruptLogError, match="put an empty file in its place"):
            maintain.repair(life.path)
        file.touch()
    done = maintain.repair(life.path)
    assert done.notes and not life.open().verify()
    log = life.log([0, 1, 2, 3, 4, 5], resume=True, on_repeat="first")
    assert sorted(log.data_ids) == [0, 1, 2, 3, 4, 5] and not log.verify()
    with pytest.raises(StateError, match="no statistics"):
        log.moments()


def test_nothing_is_no_run(life):
    run = life.start()
    with pytest.raises(NotFiniteError):
        life.block(run, [1], infinite=[0])
    with pytest.raises(StateError, match="nothing was logged"):
        run.finalize()
    life.block(run, [1])
    assert life.finish(run).data_ids == [1]


def test_a_fitting_pass_alone_is_no_run(life):
    run = life.start(projection="pca")
    for current in run.passes():
        if current.kind == "log":
            break
        life.block(run, [1, 2, 3])
    with pytest.raises(StateError, match="nothing was logged"):
        run.finalize()
    run.close()


@pytest.mark.parametrize("counts", [False, True])
def test_a_run_whose_delete_was_killed_ends_whole(life, tmp_path, counts):
    """Before its manifest was there, or when nothing was cleared away yet."""
    run = life.start()
    life.block(run, [1, 2])
    run.close()
    shutil.copytree(life.path, tmp_path / "copy")
    maintain.delete(tmp_path / "copy", [1])
    for file in (tmp_path / "copy").iterdir():
        if not (life.path / file.name).exists() or (counts and file.name == "loghook.json"):
            shutil.copy(file, life.path)
    assert len(list(life.path.glob("commits-*"))) == 2
    log = life.log([3], resume=True)
    assert log.data_ids == ([2, 3] if counts else [1, 2, 3]) and not log.verify()


def test_a_sample_that_was_flagged_outside_of_passes_is_logged_inside(life):
    run = life.start()
    life.block(run, [1, 5], infinite=[1], scaler=SCALER)
    run.close()
    run = life.start(resume=True)
    for _ in run.passes():
        life.block(run, [5, 6])
    log = life.finish(run)
    assert log.data_ids == [1, 5, 6] and log.flagged == [5]


def test_what_was_flagged_or_left_out_last_is_known_after_close(life):
    run = life.start(on_repeat="first")
    life.block(run, [1, 2])
    run._session.writer.settle()
    life.block(run, [3], infinite=[0], scaler=SCALER)
    life.block(run, [1, 1])
    run.close()
    log = life.log(resume=True)
    assert log.data_ids == [1, 2] and log.flagged == [3] and log.repeats == 2


def test_what_was_flagged_is_deleted_without_the_statistics(life):
    run = life.start()
    life.block(run, [1, 2])
    life.block(run, [3, 4], infinite=[0], scaler=SCALER)
    before = life.finish(run).moments()
    maintain.delete(life.path, [3])
    after = life.open()
    assert after.data_ids == [1, 2, 4] and not after.flagged
    assert (after.moments() == before).all()


def test_a_run_that_never_had_a_block_is_in_nobodys_way(life):
    life.log([1])
    life.start(overwrite=True).close()
    assert life.log([2]).data_ids == [2]


@pytest.mark.parametrize("change", [maintain.repair, maintain.reopen, lambda path: maintain.delete(path, [1])])
def test_maintenance_of_no_run_says_so(tmp_path, change):
    with pytest.raises(FileNotFoundError, match="no loghook run"):
        change(tmp_path)
