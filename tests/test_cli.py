"""The command line, as a person calls it."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import loghook
from loghook.cli import app
from loghook.log import maintain
from tests.harness import log_and_ask, squares
from tests.test_fitted import data, loss_fn, make
from tests.test_influence import make_log


def call(*arguments, status=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    log, query, _ = make_log(folder / "run")
    query.save(folder / "q.safetensors")
    return log, query, folder / "q.safetensors"


@pytest.mark.parametrize("command", [(), ("info",), ("verify",), ("score",), ("demo",)])
def test_help_says_what_each_command_does(command):
    shown = call(*command, "--help")
    assert "Usage" in shown and len(shown.splitlines()) > 5


def test_info(logged):
    log, *_ = logged
    shown = call("info", log.path)
    for fact in (
        "40 rows",
        "finished",
        "rank 4",
        "3 layers",
        "100.0%",
        "parameters unchanged",
        log.fingerprint,
    ):
        assert fact in shown
    facts = json.loads(call("info", log.path, "--json"))
    assert facts["rows"] == 40 and facts["covered"] == 1.0 and facts["fingerprint"] == log.fingerprint


def test_verify_finds_a_flipped_byte(logged, tmp_path):
    log, *_ = logged
    assert "every checksum matches" in call("verify", log.path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in log.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = copy / "rows-00000-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    assert "do not match their checksum" in call("verify", copy, status=1)


def test_score_prints_proponents_and_writes_all(logged, tmp_path):
    log, query, file = logged
    best = log.influence(query, "ekfac").top(2)
    shown = call("score", log.path, file, "--top", 2)
    for query_id, records in zip("abc", best, strict=True):
        assert query_id in shown.split()
        assert all(f"{record.score:+.6g}  {record.data_id}" in shown for record in records)
    call("score", log.path, file, "--method", "dot", "--out", tmp_path / "s.safetensors")
    assert (loghook.Scores.load(tmp_path / "s.safetensors").values == log.influence(query, "dot").values).all()


def test_errors_are_one_line_without_a_traceback(logged, tmp_path):
    log, _, file = logged
    assert "holds no loghook.json" in call("info", tmp_path, status=1)
    shown = call("score", log.path, file, "--method", "magic", status=1)
    assert "magic" in shown and "Traceback" not in shown


def test_a_log_that_is_not_finished_is_scored_with_one_plain_warning(logged, tmp_path):
    log, _, file = logged
    shutil.copytree(log.path, tmp_path / "open")
    maintain.reopen(tmp_path / "open")
    assert "not finished" in call("info", tmp_path / "open")
    shown = call("score", tmp_path / "open", file, "--method", "dot", "--top", 1)
    assert shown.count("warning: ") == 1 and shown.startswith(
        f"warning: {tmp_path / 'open'} is not finished: only the 40"
    )
    assert ".py" not in shown and len(shown.splitlines()) == 1 + 3 * 2
    assert call("score", log.path, file, "--method", "dot", "--top", 1) == shown.partition("\n")[2]


def test_a_query_of_another_log_is_an_error_alone(logged, tmp_path):
    log, *_ = logged
    _, query, _ = make_log(tmp_path / "other", rank=3)
    query.parameters = "of another checkpoint"
    query.save(tmp_path / "q.safetensors")
    shown = call("score", log.path, tmp_path / "q.safetensors", status=1)
    assert shown.startswith("error: the query was made with another rank") and "warning" not in shown.lower()


def test_a_run_killed_while_its_projection_was_fitted_may_be_started_again(tmp_path):
    model, x = make(), data()
    run = loghook.init(tmp_path / "run", rank=4, projection="whitened")
    run.watch(model)
    for _ in run.passes():
        with run(data_id=torch.arange(16)):
            loss_fn(model, x[:16]).backward()
        break
    run.close()
    shown = call("info", tmp_path / "run", status=1)
    assert "holds no loghook.json" in shown and "start its script again with resume=True" in shown
    assert "start its script" not in call("info", tmp_path / "no such folder", status=1)
    (tmp_path / "notes.txt").write_text("mine")
    assert "start its script" not in call("info", tmp_path, status=1)


def test_options_are_looked_at_before_the_log_is_scanned(logged, tmp_path, monkeypatch):
    log, _, query = logged
    monkeypatch.setattr(loghook.Log, "influence", lambda *_, **__: pytest.fail("the log was scanned first"))
    assert "cannot be written" in call("score", log.path, query, "--out", tmp_path / "nowhere" / "s", status=1)
    assert "cannot be written" in call("report", log.path, query, "--out", tmp_path, status=1)
    assert "error" in call("report", log.path, query, "--texts", tmp_path, status=1)  # a folder
    call("score", log.path, query, "--bottom", "-1", status=2)


def test_ids_to_delete_are_taken_at_their_word(logged, tmp_path):
    log, *_ = logged
    shutil.copytree(log.path, tmp_path / "run")
    assert "pass --ids" in call("delete", tmp_path / "run", status=1)
    assert "'1_2' is no whole number" in call("delete", tmp_path / "run", "--ids", "1_2", status=1)
    assert len(loghook.load(tmp_path / "run")) == 40


def test_ids_give_a_terminal_no_commands(tmp_path):
    model, x = torch.nn.Linear(3, 2), torch.randn(2, 3)
    with loghook.init(tmp_path / "run", rank=2) as run:
        run.watch(model)
        with run(data_id=["two\nlines\x1b[31m", "a lone \ud800"]):
            model(x).square().sum().backward()
        run.finalize()
        with run.query(data_id=["q"]) as query:
            model(x[:1]).square().sum().backward()
    query.save(tmp_path / "q")
    shown = call("score", tmp_path / "run", tmp_path / "q", "--method", "dot")
    assert r"'two\nlines\x1b[31m'" in shown and r"'a lone \ud800'" in shown and "\x1b" not in shown


def test_merge_counts_the_rows_that_readers_leave_out(tmp_path):
    model = torch.nn.Linear(4, 3)
    for name in "ab":
        # One is left out here already.
        log_and_ask(tmp_path / name, model, squares, torch.randn(4, 4), ids=[0, 1, 2, 2], rank=2)
    shown = call("merge", tmp_path / "both", tmp_path / "a", tmp_path / "b")
    assert "6 rows of 2 runs, of which 3 are repeats" in shown
