"""What the demo found, in the terminal and as a page."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from loghook import page
from loghook.demo.proof import NAMES, Proof
from loghook.demo.questions import Question
from loghook.demo.text import Passage
from loghook.evaluate.lds import Estimate
from loghook.page import Card, Entry


class Bars(NamedTuple):
    title: str
    note: str
    estimates: Mapping[str, Estimate]  # by method

    def lines(self) -> list[tuple[str, str, str]]:
        """Method, mean and interval, as page and terminal show them."""
        return [(NAMES[m], f"{e.mean:+.3f}", f"{e.low:+.3f} to {e.high:+.3f}") for m, e in self.estimates.items()]


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
    ranked = [Entry(float(scores[i]), passages[i].topic, passages[i].data_id, passages[i].text) for i in order]
    best, worst = ranked[:show], ranked[::-1][:show]
    return Card(question.kind, question.title, question.before, question.counted, best, worst)


def make_bars(proof: Proof, groups: int) -> list[Bars]:
    n, loss = len(proof.full), proof.full.mean()
    bars = [
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
        bars.append(Bars("Linear datamodelling score", f"{note} of the passages.", proof.lds))
    return bars


def render(report: Report) -> str:
    """The page as HTML."""
    story = f"<ul class=story>{''.join(f'<li>{escape(line)}</li>' for line in report.story)}</ul>" * bool(report.story)
    cards, facts = page.render_cards(report.cards), page.render_facts("What was run", report.facts)
    return page.render(report.lead, [story, *map(_bars, report.bars), cards, facts])


def _bars(bars: Bars) -> str:
    """A table whose last column draws each mean as a bar and its interval as a line, all on one axis."""
    estimates = bars.estimates.values()
    low = min(0.0, *(e.low for e in estimates))
    span = max(0.0, *(e.high for e in estimates)) - low or 1.0

    def stretch(name: str, *ends: float) -> str:
        left, right = (100 * (end - low) / span for end in sorted(ends))
        return f"<i class={name} style='left:{left:.1f}%;width:{right - left:.1f}%'></i>"

    lines = (
        f"<tr><th>{method}</th><td>{mean}</td><td class=dim>{interval}</td>"
        f"<td class=plot>{stretch('bar', 0.0, e.mean)}{stretch('range', e.low, e.high)}</td></tr>"
        for (method, mean, interval), e in zip(bars.lines(), estimates, strict=True)
    )
    head = "<tr class=dim><th></th><td>mean</td><td>95 % interval</td><td></td></tr>"
    table = f"<table class=bars>{head}{''.join(lines)}</table>"
    return f"<h2>{escape(bars.title)}</h2><p class=dim>{escape(bars.note)}</p>{table}"


def print_cards(cards: Sequence[Card], console: Console) -> None:
    """Print questions and rankings, texts shortened."""
    for kind, group in groupby(cards, lambda card: card.kind):
        console.print(Text(f"\n{kind.upper()}", "bold"))
        for card in group:
            before = _line(card.before, 160)
            console.print(Text.assemble("\n", (card.title, "bold")))
            console.print(Text.assemble((before, "dim"), " " if before else "", _line(card.text, 240)))
            columns = Column(justify="right", no_wrap=True), Column(no_wrap=True), Column(no_wrap=True)
            table = Table(*columns, box=None, pad_edge=False, show_header=False)
            for style, ranking in (("green", card.proponents), ("yellow", card.opponents[:2])):
                for entry in ranking:
                    text = _line(entry.text, max(20, console.width - 40))
                    table.add_row(Text(f"{entry.score:+.4g}", style), Text(_line(entry.note, 24)), Text(text, "dim"))
            console.print(table)


def print_proof(report: Report, console: Console) -> None:
    """Print the report's measurements and what they say."""
    for bars in report.bars:
        console.print(Text.assemble("\n", (bars.title, "bold")))
        console.print(Text(bars.note, "dim"))
        numbers = (Column(name, justify="right", no_wrap=True) for name in ("mean", "95 % interval"))
        table = Table(Column(no_wrap=True), *numbers, box=None, pad_edge=False)
        for cells in bars.lines():
            table.add_row(*cells)
        console.print(table)
    console.print()
    for line in report.story:
        console.print(Text(f"- {line}"))


def _line(text: str, length: int) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= length else joined[: length - 1] + "…"
