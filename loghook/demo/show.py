"""What was found, as a report: the page and the terminal show the same one."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loghook.demo.attribute import Question
from loghook.demo.proof import NAMES, Estimate, Proof, story
from loghook.demo.text import Passage
from loghook.evaluate.lds import Lds
from loghook.views.report import Bars, Card, Entry, Report


def make_cards(
    questions: Sequence[Question], givens: Sequence[str], passages: Sequence[Passage], scores: np.ndarray, show: int
) -> tuple[Card, ...]:
    """A card for each question, from its row of (questions, passages) scores."""

    def entries(row: np.ndarray, places: np.ndarray) -> tuple[Entry, ...]:
        return tuple(
            Entry(
                data_id=passages[i].data_id,
                topic=passages[i].topic,
                text=passages[i].text.strip("\n"),
                score=float(row[i]),
            )
            for i in places
        )

    cards = []
    for question, given, row in zip(questions, givens, scores, strict=True):
        order = np.argsort(-row, kind="stable")
        cards.append(
            Card(
                kind=question.kind,
                title=question.title,
                text=question.text.removeprefix(given).rstrip("\n"),
                given=given,
                proponents=entries(row, order[:show]),
                opponents=entries(row, order[::-1][:show]),
            )
        )
    return tuple(cards)


def make_bars(proof: Proof, passages: int, groups: int) -> tuple[Bars, ...]:
    """The proof's numbers."""

    def rows(estimates: Mapping[str, Estimate | Lds]) -> tuple[tuple[str, float, float, float], ...]:
        return tuple((NAMES[name], e.mean, e.low, e.high) for name, e in estimates.items())

    bars = [
        Bars(
            title="Fine-tuned again without the strongest proponents",
            note=f"Rise of the loss, in nats a token, over {passages} held-out passages in {groups} groups, each group "
            f"without its {proof.removed} strongest; mean loss with everything: {proof.full.mean():.2f}. "
            "Intervals: bootstrap over passages.",
            rows=rows(proof.rises),
        ),
        Bars(
            title="How much more EK-FAC's removal raises it than the others'",
            note="The same losses, passage by passage: EK-FAC's minus the method's.",
            rows=rows(proof.leads),
        ),
    ]
    if proof.lds:
        bars.append(
            Bars(
                title="Linear datamodelling score",
                note="Rank correlation of predicted and real outcomes of fine-tuning on "
                f"{proof.subsets} random halves of the passages.",
                rows=rows(proof.lds),
            )
        )
    return tuple(bars)


def make_story(proof: Proof | None) -> tuple[str, ...]:
    """The proof in words; nothing where there is none."""
    return tuple(story(proof)) if proof else ()


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
