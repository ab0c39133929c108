"""One self-contained HTML page: questions with their proponents and opponents, and what was measured."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from loghook.log.format import write_atomically


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A training sample in a ranking."""

    data_id: str
    topic: str
    text: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Card:
    """A question and its rankings; ``given`` is the part of it, in front of ``text``, that was not attributed."""

    kind: str
    title: str
    text: str
    given: str = ""
    proponents: tuple[Entry, ...] = ()
    opponents: tuple[Entry, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Numbers with intervals: (name, mean, low, high) each."""

    title: str
    note: str
    rows: tuple[tuple[str, float, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a page shows."""

    title: str  # of the page
    lead: str  # a sentence under it
    story: tuple[str, ...] = ()  # what the measurements say, a sentence each
    bars: tuple[Bars, ...] = ()  # the measurements
    cards: tuple[Card, ...] = ()  # the questions
    facts: tuple[tuple[str, str], ...] = ()  # what was run, name and value


def write(report: Report, path: str | Path) -> Path:
    """Write the page, whole or not at all, and return where it is."""
    write_atomically(Path(path), render(report).encode())
    return Path(path)


def render(report: Report) -> str:
    """The page as HTML. It loads nothing from elsewhere; the report is in it as JSON too, under the id "data"."""
    data = json.dumps(asdict(report)).replace("<", "\\u003c")
    story = "".join(f"<li>{escape(line)}</li>" for line in report.story)
    facts = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in report.facts)
    kinds = dict.fromkeys(card.kind for card in report.cards)
    parts = [
        f"<h1>{escape(report.title)}</h1><p class=lead>{escape(report.lead)}</p>",
        f"<ul class=story>{story}</ul>" if story else "",
        *(_bars(bars) for bars in report.bars),
    ]
    for kind in kinds:
        cards = "".join(_card(card) for card in report.cards if card.kind == kind)
        parts.append(f"<h2>{escape(kind[:1].upper() + kind[1:])}</h2>{cards}")
    if facts:
        parts.append(f"<h2>What was run</h2><table class=facts>{facts}</table>")
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{escape(report.title)}</title>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><main>"
        + "\n".join(parts)
        + f'</main>\n<script type="application/json" id=data>{data}</script></body></html>\n'
    )


def _bars(bars: Bars) -> str:
    """A table whose last column draws each mean as a bar and its interval as a line, all on one axis."""
    low = min([0.0, *(row[2] for row in bars.rows)])
    span = max([0.0, *(row[3] for row in bars.rows)]) - low or 1.0

    def at(value: float) -> float:
        return 100 * (value - low) / span

    lines = []
    for name, mean, bottom, top in bars.rows:
        left, right = sorted((at(0.0), at(mean)))
        lines.append(
            f"<tr><th>{escape(name)}</th><td>{mean:+.3f}</td><td class=dim>{bottom:+.3f} to {top:+.3f}</td>"
            f"<td class=plot><i class=bar style='left:{left:.1f}%;width:{right - left:.1f}%'></i>"
            f"<i class=range style='left:{at(bottom):.1f}%;width:{at(top) - at(bottom):.1f}%'></i></td></tr>"
        )
    head = "<tr class=dim><th></th><td>mean</td><td>95 % interval</td><td></td></tr>"
    table = f"<table class=bars>{head}{''.join(lines)}</table>"
    return f"<h2>{escape(bars.title)}</h2><p class=dim>{escape(bars.note)}</p>{table}"


def _card(card: Card) -> str:
    given = f"<span class=dim>{escape(card.given)}</span>" if card.given else ""
    sides = [
        ("Proponents: training on these made it likelier", "pro", card.proponents),
        ("Opponents: training on these made it less likely", "con", card.opponents),
    ]
    rankings = "".join(
        f"<details{' open' if tone == 'pro' else ''}><summary>{heading}</summary>{_ranking(entries, tone)}</details>"
        for heading, tone, entries in sides
        if entries
    )
    asked = f"<pre class=asked>{given}{escape(card.text)}</pre>"
    return f"<section><h3>{escape(card.title)}</h3>{asked}{rankings}</section>"


def _ranking(entries: Iterable[Entry], tone: str) -> str:
    items = "".join(
        f"<li><b class={tone}>{entry.score:+.4g}</b> <b>{escape(entry.topic)}</b> "
        f"<span class=dim>{escape(entry.data_id)}</span><pre>{escape(entry.text)}</pre></li>"
        for entry in entries
    )
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
pre.asked { border-left: 3px solid var(--line); padding-left: .8rem } ol { padding-left: 1.4rem; margin: .5rem 0 0 }
summary { cursor: pointer; color: var(--dim); font-size: .9rem } .pro { color: var(--pro) } .con { color: var(--con) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td, th { text-align: left; font-weight: inherit; padding: .3rem .8rem .3rem 0; vertical-align: top }
tr { border-bottom: 1px solid var(--line) }
.bars th { white-space: nowrap } .bars td { white-space: nowrap } .plot { width: 50%; position: relative }
.bar { position: absolute; top: 25%; bottom: 25%; background: var(--pro); opacity: .45; border-radius: 2px }
.range { position: absolute; top: 50%; height: 2px; margin-top: -1px; background: currentColor }
.facts th { color: var(--dim); width: 12rem }
"""
