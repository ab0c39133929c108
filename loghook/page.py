"""Questions and the data they rest on, as one HTML page that loads nothing from elsewhere and needs no script."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from loghook.errors import ConfigError
from loghook.influence.scores import Record, Scores

Texts = Mapping[int | str, str] | Callable[[int | str], str]


class Entry(NamedTuple):
    """One training sample in a ranking."""

    score: float
    title: str
    note: str = ""  # behind the title
    text: str = ""


class Card(NamedTuple):
    """A question and both ends of its ranking."""

    kind: str  # cards of one kind that follow each other stand under one heading
    title: str
    before: str  # what is in front of its text and counts for nothing
    text: str
    proponents: Sequence[Entry]
    opponents: Sequence[Entry]


def render_scores(scores: Scores, texts: Texts | None, questions: Texts | None, top: int, bottom: int) -> str:
    """The page of ``Scores.report``."""

    def entries(records: Sequence[Record]) -> list[Entry]:
        return [Entry(score, str(data_id), text=_text("texts", texts, data_id)) for data_id, score in records]

    ids: Sequence[int | str] = scores.query_ids
    best = scores.top(top)
    worst: Sequence[Sequence[Record]] = scores.bottom(bottom) if bottom else [()] * len(best)
    cards = [
        Card("Questions", str(query_id), "", _text("questions", questions, query_id), entries(pro), entries(con))
        for query_id, pro, con in zip(ids, best, worst, strict=True)
    ]
    facts = {
        "log": scores.log, "method": scores.method, "normalize": scores.normalize,
        "damping, relative to each layer": scores.damping, "damping, absolute": scores.damping_abs,
        "fidelity to whole EK-FAC, as tuned": scores.fidelity, "layers": ", ".join(scores.layers),
        "sign": scores.sign, "fingerprint": scores.fingerprint,
    }  # fmt: skip
    lead = f"{len(scores.data_ids):,} training samples, scored for each of {len(cards):,} questions: {scores.method}."
    facts = {name: value for name, value in facts.items() if value not in (None, "")}
    return render(lead, [render_cards(cards), render_facts("How they were made", facts)])


def _text(argument: str, texts: Texts | None, data_id: int | str) -> str:
    if texts is None:
        return ""
    try:
        return str(texts(data_id) if callable(texts) else texts[data_id])
    except (KeyError, IndexError) as error:
        raise ConfigError(
            f"{argument} has nothing for id {data_id!r} ({type(data_id).__name__}), which is shown: map each id, as "
            "it was logged or asked with, to its text."
        ) from error


def render(lead: str, sections: Iterable[str]) -> str:
    """A page: a sentence under the title, and what follows."""
    title = "loghook: which training data made the model say this?"
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{title}</title>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><main><h1>{title}</h1><p class=lead>{escape(lead)}</p>\n"
        + "\n".join(sections)
        + "</main></body></html>\n"
    )


def render_facts(title: str, facts: Mapping[str, object]) -> str:
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    return f"<h2>{escape(title)}</h2><table class=facts>{''.join(lines)}</table>"


def render_cards(cards: Iterable[Card]) -> str:
    kinds = groupby(cards, lambda card: card.kind)
    return "\n".join(f"<h2>{escape(kind.capitalize())}</h2>{''.join(map(_card, group))}" for kind, group in kinds)


def _card(card: Card) -> str:
    before = f"<span class=dim>{escape(card.before)}</span>" if card.before else ""
    question = f"<pre class=asked>{before}{escape(card.text)}</pre>" if card.before or card.text else ""
    pro, con = _ranking(card.proponents, "pro"), _ranking(card.opponents, "con")
    proponents = f"<details open><summary>Proponents: training on these made it likelier</summary>{pro}</details>"
    opponents = f"<details><summary>Opponents: training on these made it less likely</summary>{con}</details>"
    return (
        f"<section><h3>{escape(card.title)}</h3>{question}{proponents}{opponents if card.opponents else ''}</section>"
    )


def _ranking(entries: Iterable[Entry], tone: str) -> str:
    items = ""
    for score, title, note, text in entries:
        items += f"<li><b class={tone}>{score:+.4g}</b> <b>{escape(title)}</b> <span class=dim>{escape(note)}</span>"
        text = text.strip("\n")
        items += (f"<pre>{escape(text)}</pre>" if text else "") + "</li>"
    return f"<ol>{items}</ol>"


_STYLE = """
:root { color-scheme: light dark; --dim: #6b7280; --line: #8884; --pro: #0f766e; --con: #b45309; --soft: #8881 }
@media (prefers-color-scheme: dark) { :root { --dim: #9ca3af; --pro: #2dd4bf; --con: #fbbf24 } }
body { font: 16px/1.55 system-ui, sans-serif; margin: 0 }
main { max-width: 56rem; margin: 0 auto; padding: 2rem 1.25rem 5rem }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1rem; margin: 0 0 .5rem }
.lead { font-size: 1.05rem; margin-top: .3rem } .dim { color: var(--dim) } .story li { margin: .2rem 0 }
section { border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem; margin: .9rem 0 }
pre { font: .8rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0 .8rem }
pre { max-height: 24rem; overflow-y: auto }
pre.asked { border-left: 3px solid var(--line); padding-left: .8rem } ol { padding-left: 1.4rem; margin: .5rem 0 0 }
summary { cursor: pointer; color: var(--dim); font-size: .9rem } .pro { color: var(--pro) } .con { color: var(--con) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td, th { text-align: left; font-weight: inherit; padding: .3rem .8rem .3rem 0; vertical-align: top }
tr { border-bottom: 1px solid var(--line) }
.bars th { white-space: nowrap } .bars td { white-space: nowrap } .plot { width: 50%; position: relative }
.bar { position: absolute; top: 25%; bottom: 25%; background: var(--pro); opacity: .45; border-radius: 2px }
.range { position: absolute; top: 50%; height: 2px; margin-top: -1px; background: currentColor }
.facts th { color: var(--dim); width: 12rem } .facts td { overflow-wrap: anywhere }
"""
