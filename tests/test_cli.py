"""The command line, as a person calls it."""

import json

import pytest
from typer.testing import CliRunner

import loghook
from loghook.cli import app
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
