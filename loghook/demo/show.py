"""What was found, as a report: the page and the terminal show the same one."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loghook.demo.attribute import Question
from loghook.demo.proof import NAMES, Proof
from loghook.demo.text import Passage
from loghook.evaluate.lds import Estimate
from loghook.views.report import Bars, Card, Entry, Report


def make_cards(
    questions: Sequence[Question], passages: Sequence[Passage], scores: np.ndarray, show: int
) -> tuple[Card, ...]:
    """A card for each question, from its row of (questions, passages) scores."""

    def entry(place: int, score: float) -> Entry:
        passage = passages[place]
        text = passage.text.strip("\n")
        return Entry(data_id=passage.data_id, topic=passage.topic, text=text, score=float(score))

    cards = []
    for question, row in zip(questions, scores, strict=True):
        order = np.argsort(-row, kind="stable")
        cards.append(
            Card(
                kind=question.kind,
                title=question.title,
                text=question.text.removeprefix(question.before).rstrip("\n"),
                given=question.before,
                proponents=tuple(entry(i, row[i]) for i in order[:show]),
                opponents=tuple(entry(i, row[i]) for i in order[::-1][:show]),
            )
        )
    return tuple(cards)


def make_bars(proof: Proof, passages: int, groups: int) -> tuple[Bars, ...]:
    """The proof's numbers."""

    def bars(title: str, note: str, estimates: Mapping[str, Estimate]) -> Bars:
        rows = tuple((NAMES[name], e.mean, e.low, e.high) for name, e in estimates.items())
        return Bars(title=title, note=note, rows=rows)

    measured = [
        bars(
            "Fine-tuned again without the strongest proponents",
            f"Rise of the loss, in nats a token, over {passages} held-out passages in {groups} groups, each group "
            f"without its {proof.removed} strongest; mean loss with everything: {proof.full.mean():.2f}. "
            "Intervals: bootstrap over passages.",
            proof.rises,
        ),
        bars(
            "How much more EK-FAC's removal raises it than the others'",
            "The same losses, passage by passage: EK-FAC's minus the method's.",
            proof.leads,
        ),
    ]
    if proof.lds:
        note = f"Rank correlation of predicted and real outcomes of fine-tuning on {proof.subsets} random halves"
        measured.append(bars("Linear datamodelling score", f"{note} of the passages.", proof.lds))
    return tuple(measured)


def print_cards(cards: Sequence[Card], console: Console) -> None:
    """Print questions and rankings, texts shortened."""
    kind = ""
    for card in cards:
        if card.kind != kind:
            kind = card.kind
            console.print(Text(f"\n{kind.upper()}", "bold"))
        console.print(Text.assemble("\n", (card.title, "bold")))
        console.print(Text.assemble((_line(card.given, 160), "dim"), " " if card.given else "", _line(card.text, 240)))
        table = Table(box=None, pad_edge=False, show_header=False)
        for justify in ("right", "left", "left"):
            table.add_column(justify=justify, no_wrap=True)
        for style, entries in (("green", card.proponents), ("yellow", card.opponents[:2])):
            for entry in entries:
                text = _line(entry.text, max(20, console.width - 40))
                table.add_row(Text(f"{entry.score:+.4g}", style), Text(_line(entry.data_id, 24)), Text(text, "dim"))
        console.print(table)


def print_proof(report: Report, console: Console) -> None:
    """Print the report's measurements and what they say."""
    for bars in report.bars:
        console.print(Text.assemble("\n", (bars.title, "bold")))
        console.print(Text(bars.note, "dim"))
        table = Table(box=None, pad_edge=False)
        for column in ("", "mean", "95 % interval"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for name, mean, low, high in bars.rows:
            table.add_row(Text(name), f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}")
        console.print(table)
    console.print()
    for line in report.story:
        console.print(Text(f"- {line}"))


def _line(text: str, length: int) -> str:
    """Text on one line, cut at a length."""
    joined = " ".join(text.split())
    return joined if len(joined) <= length else joined[: length - 1] + "…"
