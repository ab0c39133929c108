"""Scores as a page to look at."""

import json
import re
from html import unescape

import pytest

import loghook
from loghook.errors import ConfigError
from tests.test_cli import call
from tests.test_influence import make_log

LOADS_FROM_ELSEWHERE = re.compile(r"""(?:src|href|action|data)\s*=\s*["']?|@import|url\(|<link|<iframe|<img""", re.I)


def check_self_contained(html):
    markup = re.sub(r"<pre.*?</pre>", "", html, flags=re.S)
    assert not LOADS_FROM_ELSEWHERE.search(markup), LOADS_FROM_ELSEWHERE.search(markup)
    assert "http" not in markup and "<script" not in html


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    log, query, _ = make_log(folder / "run")
    query.save(folder / "q.safetensors")
    return log, query, folder


def listed(html):
    """What each question's two lists show: (score, id) pairs."""
    lists = re.findall(r"<ol>(.*?)</ol>", html, re.S)
    return [re.findall(r"<b class=\w+>([^<]+)</b> <b>([^<]*)</b>", one) for one in lists]


def expected(records):
    return [(f"{record.score:+.4g}", str(record.data_id)) for record in records]


def test_the_page_shows_both_ends_of_each_ranking_with_their_texts(logged, tmp_path):
    log, query, _ = logged
    scores = log.influence(query, "ekfac")
    bad = "<script>alert(1)</script> & <img src=http://x>"
    scores.report(
        tmp_path / "page.html", texts=lambda i: f"text of {i} {bad}", questions={q: f"asked {q}" for q in "abc"},
        top=3, bottom=2,
    )  # fmt: skip
    html = (tmp_path / "page.html").read_text()
    check_self_contained(html)
    pairs = zip(scores.top(3), scores.bottom(2), strict=True)
    assert listed(html) == [expected(end) for both in pairs for end in both]
    for records in scores.top(3):
        assert f"<pre>text of {records[0].data_id} {bad}</pre>" in unescape(html)
    assert all(f"asked {q}</pre>" in html for q in "abc")
    assert log.fingerprint in html and "proponent" in html and "ekfac" in html


def test_ids_alone_are_enough_and_the_best_alone_have_no_opponents(logged, tmp_path):
    log, query, _ = logged
    scores = log.influence(query, "dot", top=4)
    scores.report(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert listed(html) == [expected(records) for records in scores.top(4)] and "Opponents" not in html
    for nowhere in (tmp_path, tmp_path / "no" / "page.html"):
        with pytest.raises(ConfigError, match="is a folder, or its folder is not there"):
            scores.report(nowhere)
    with pytest.raises(ConfigError, match="keep only the best"):
        scores.report(tmp_path / "page.html", bottom=1)


def test_a_text_that_is_missing_is_named(logged, tmp_path):
    log, query, _ = logged
    with pytest.raises(ConfigError, match=r"texts has nothing for id \d+ \(int\)"):
        log.influence(query, "dot").report(tmp_path / "page.html", texts={"0": "a str for an int"})
    with pytest.raises(ConfigError, match=r"questions has nothing for id 'a' \(str\)"):
        log.influence(query, "dot").report(tmp_path / "page.html", questions={})
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_same_page(logged, tmp_path):
    log, query, folder = logged
    texts = {data_id: f"line\u2028of {data_id}" for data_id in log.data_ids}
    lines = (json.dumps({"id": data_id, "text": text}, ensure_ascii=False) for data_id, text in texts.items())
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    shown = call("report", log.path, folder / "q.safetensors", "--out", tmp_path / "a.html",
                 "--texts", tmp_path / "texts.jsonl", "--top", 3)  # fmt: skip
    assert "3 questions" in shown
    loghook.load(log.path).influence(query, "ekfac").report(tmp_path / "b.html", texts=texts, top=3)
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()
    for wrong in ('{"name": 1}', '{"id": [1], "text": "x"}', '{"id": true, "text": "x"}'):
        (tmp_path / "texts.jsonl").write_text(wrong)
        shown = call("report", log.path, folder / "q.safetensors", "--texts", tmp_path / "texts.jsonl", status=1)
        assert shown.startswith("error: ") and 'a JSON object with "id" and "text" on each line' in shown
