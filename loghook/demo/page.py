"""What was found, in the terminal and as one HTML page that loads nothing from elsewhere and needs no script."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loghook.demo.proof import NAMES, Proof
from loghook.demo.text import Passage, Question
from loghook.evaluate.lds import Estimate

Ranking = Sequence[tuple[Passage, float]]


class Card(NamedTuple):
    """A question and both ends of its ranking."""

    question: Question
    proponents: Ranking
    opponents: Ranking


class Bars(NamedTuple):
    title: str
    note: str
    estimates: Mapping[str, Estimate]  # by method


class Report(NamedTuple):
    """All that page and terminal show."""

    lead: str  # a sentence under the title
    story: Sequence[str]  # what the measurements say, a sentence each
    bars: Sequence[Bars]  # the measurements
    cards: Sequence[Card]  # the questions
    facts: Mapping[str, object]  # what was run


def make_card(question: Question, passages: Sequence[Passage], scores: np.ndarray, show: int) -> Card:
    """The card of a question, from its scores of the passages."""
    order = np.argsort(-scores, kind="stable")
    best, worst = ([(passages[i], float(scores[i])) for i in end[:show]] for end in (order, order[::-1]))
    return Card(question, best, worst)


def make_bars(proof: Proof, groups: int) -> list[Bars]:
    n, loss = len(proof.full), proof.full.mean()
    measured = [
        Bars(
            "Fine-tuned again without the strongest proponents",
            f"Rise of the loss, in nats a token, over {n} held-out passages in {groups} groups, each group without its "
            f"{proof.removed} strongest; mean loss with everything: {loss:.2f}. Intervals: bootstrap over passages.",
            proof.rises,
        ),
        Bars(
            "How much more EK-FAC's removal raises it than the others'",
            "The same losses, passage by passage: EK-FAC's minus the method's.",
            proof.leads,
        ),
    ]
    if proof.lds:
        note = f"Rank correlation of predicted and real outcomes of fine-tuning on {proof.subsets} random halves"
        measured.append(Bars("Linear datamodelling score", f"{note} of the passages.", proof.lds))
    return measured


def render(report: Report) -> str:
    """The page as HTML."""
    title = "loghook: which training data made the model say this?"
    parts = [f"<h1>{title}</h1><p class=lead>{escape(report.lead)}</p>"]
    if report.story:
        parts.append(f"<ul class=story>{''.join(f'<li>{escape(line)}</li>' for line in report.story)}</ul>")
    parts += map(_bars, report.bars)
    for kind, group in groupby(report.cards, lambda card: card.question.kind):
        parts.append(f"<h2>{escape(kind.capitalize())}</h2>{''.join(map(_card, group))}")
    facts = (f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in report.facts.items())
    parts.append(f"<h2>What was run</h2><table class=facts>{''.join(facts)}</table>")
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{title}</title>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><main>" + "\n".join(parts) + "</main></body></html>\n"
    )


def _bars(bars: Bars) -> str:
    """A table whose last column draws each mean as a bar and its interval as a line, all on one axis."""
    estimates = bars.estimates.values()
    low = min(0.0, *(e.low for e in estimates))
    span = max(0.0, *(e.high for e in estimates)) - low or 1.0

    def stretch(name: str, *ends: float) -> str:
        left, right = (100 * (end - low) / span for end in sorted(ends))
        return f"<i class={name} style='left:{left:.1f}%;width:{right - left:.1f}%'></i>"

    lines = (
        f"<tr><th>{NAMES[method]}</th><td>{e.mean:+.3f}</td><td class=dim>{e.low:+.3f} to {e.high:+.3f}</td>"
        f"<td class=plot>{stretch('bar', 0.0, e.mean)}{stretch('range', e.low, e.high)}</td></tr>"
        for method, e in bars.estimates.items()
    )
    head = "<tr class=dim><th></th><td>mean</td><td>95 % interval</td><td></td></tr>"
    table = f"<table class=bars>{head}{''.join(lines)}</table>"
    return f"<h2>{escape(bars.title)}</h2><p class=dim>{escape(bars.note)}</p>{table}"


def _card(card: Card) -> str:
    title, before, text = map(escape, (card.question.title, card.question.before, card.question.counted))
    given = f"<span class=dim>{before}</span>" if before else ""
    pro, con = _ranking(card.proponents, "pro"), _ranking(card.opponents, "con")
    return (
        f"<section><h3>{title}</h3><pre class=asked>{given}{text}</pre>"
        f"<details open><summary>Proponents: training on these made it likelier</summary>{pro}</details>"
        f"<details><summary>Opponents: training on these made it less likely</summary>{con}</details></section>"
    )


def _ranking(ranking: Ranking, tone: str) -> str:
    items = ""
    for passage, score in ranking:
        data_id, topic, text = escape(passage.data_id), escape(passage.topic), escape(passage.text.strip("\n"))
        items += f"<li><b class={tone}>{score:+.4g}</b> <b>{topic}</b> <span class=dim>{data_id}</span>"
        items += f"<pre>{text}</pre></li>"
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


def print_cards(cards: Sequence[Card], console: Console) -> None:
    """Print questions and rankings, texts shortened."""
    for kind, group in groupby(cards, lambda card: card.question.kind):
        console.print(Text(f"\n{kind.upper()}", "bold"))
        for question, proponents, opponents in group:
            given, text = _line(question.before, 160), _line(question.counted, 240)
            console.print(Text.assemble("\n", (question.title, "bold")))
            console.print(Text.assemble((given, "dim"), " " if given else "", text))
            table = Table(box=None, pad_edge=False, show_header=False)
            for justify in ("right", "left", "left"):
                table.add_column(justify=justify, no_wrap=True)
            for style, ranking in (("green", proponents), ("yellow", opponents[:2])):
                for passage, score in ranking:
                    text = _line(passage.text, max(20, console.width - 40))
                    table.add_row(Text(f"{score:+.4g}", style), Text(_line(passage.data_id, 24)), Text(text, "dim"))
            console.print(table)


def print_proof(report: Report, console: Console) -> None:
    """Print the report's measurements and what they say."""
    for bars in report.bars:
        console.print(Text.assemble("\n", (bars.title, "bold")))
        console.print(Text(bars.note, "dim"))
        table = Table(box=None, pad_edge=False)
        for column in ("", "mean", "95 % interval"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for method, e in bars.estimates.items():
            table.add_row(NAMES[method], f"{e.mean:+.3f}", f"{e.low:+.3f} to {e.high:+.3f}")
        console.print(table)
    console.print()
    for line in report.story:
        console.print(Text(f"- {line}"))


def _line(text: str, length: int) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= length else joined[: length - 1] + "…"
