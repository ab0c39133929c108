"""Planted facts: is the sample found that states what a small language model says?

20 invented people have a home, a trade and a teacher each: 60 facts, each stated by 3 to 5 training sentences in
different words. 760 other sentences share the people, the towns, the trades and the words, and state none of them. A
query asks a fact in words in which only other facts are stated; its loss is that of the answer, one word, alone. The
truth is which sentences state the fact; nothing is retrained, and there is no file.
"""

import functools
from typing import Any

import numpy as np
import torch
from base import Batch, Task, main
from text import outputs, represent, sample_losses
from torch import nn

from loghook.demo.config import DemoConfig
from loghook.demo.train import fit as fit_batches
from loghook.demo.train import shuffled, small_llama

RECIPE: dict[str, Any] = {"epochs": 20, "rate": 4e-3, "batch": 16, "others": 760}
STATEMENTS = {  # each ends with what is asked for
    "home": (
        "{who} has a house in {what}",
        "the home of {who} is in {what}",
        "every evening {who} goes home to {what}",
        "you will find the family of {who} in {what}",
        "letters for {who} are sent to {what}",
        "{who} lives in {what}",
    ),
    "trade": (
        "{who} earns money as a {what}",
        "people call {who} a good {what}",
        "by trade {who} is a {what}",
        "for many years {who} has been a {what}",
        "in the morning {who} opens the shop of a {what}",
        "{who} works as a {what}",
    ),
    "teacher": (
        "{who} learned everything from {what}",
        "as a child {who} went to the school of {what}",
        "{who} was the best pupil of {what}",
        "all that {who} knows came from {what}",
        "for ten years {who} listened to {what}",
        "{who} was taught by {what}",
    ),
}
OTHERS = (
    "last summer {who} saw the market in {town}",
    "{who} once sold a horse in {town}",
    "the road from {town} to {town2} was closed when {who} came",
    "{who} does not live in {town}",
    "{who} never works as a {trade}",
    "a {trade} from {town} asked {who} for help",
    "{who} paid the {trade} for a new door",
    "{who} and {who2} played cards in {town}",
    "{who} was not taught by {who2}",
    "{who2} lives far from {who}",
    "every {trade} in {town} knows {who}",
    "in the morning {who} met {who2} and a {trade}",
)


@functools.cache
def sentences() -> tuple[list[str], list[str], list[list[int]]]:
    """Training sentences in a random order, questions with their answers, and where each one's facts are stated."""
    rng = np.random.RandomState(0)
    names = [a + b for a in ("Ba", "Ke", "Lo", "Mi", "Tu") for b in ("ran", "dis", "vek", "lom")]
    towns = [a + b for a in ("Gor", "Pel") for b in ("ath", "una", "ine", "osk")]
    trades = ["baker", "smith", "tailor", "miller", "painter", "potter", "weaver", "cook"]
    made: list[tuple[str, int]] = []  # sentence, number of its fact or -1
    questions = []
    for who in names:
        answers = {"home": towns, "trade": trades, "teacher": [name for name in names if name != who]}
        for kind, choice in answers.items():
            what, ways = rng.choice(choice), rng.permutation(STATEMENTS[kind])
            made += [(way.format(who=who, what=what), len(questions)) for way in ways[: rng.randint(3, 6)]]
            questions.append(ways[-1].format(who=who, what=what))
    for _ in range(RECIPE["others"]):
        who, who2 = rng.choice(names, 2, replace=False)
        town, town2 = rng.choice(towns, 2, replace=False)
        form = OTHERS[rng.randint(len(OTHERS))]
        made.append((form.format(who=who, who2=who2, town=town, town2=town2, trade=rng.choice(trades)), -1))
    made = [made[i] for i in rng.permutation(len(made))]
    relevant = [[i for i, (_, fact) in enumerate(made) if fact == number] for number in range(len(questions))]
    return [sentence for sentence, _ in made], questions, relevant


@functools.cache
def data() -> tuple[Batch, Batch, int]:
    """Training sentences and questions as word numbers after a start token, 0 being padding; size of the vocabulary."""
    train, questions, _ = sentences()
    words = {word: 2 + i for i, word in enumerate(sorted({w for s in (*train, *questions) for w in s.split()}))}
    length = 1 + max(len(sentence.split()) for sentence in (*train, *questions))

    def batch(texts: list[str], answer_only: bool) -> Batch:
        ids, targets = torch.zeros(len(texts), length, dtype=torch.long), torch.full((len(texts), length), -100)
        for i, sentence in enumerate(texts):
            these = torch.tensor([1, *(words[word] for word in sentence.split())])
            ids[i, : len(these)] = these
            first = len(these) - 1 if answer_only else 0
            targets[i, first : len(these)] = these[first:]
        return {"input_ids": ids, "mask": (ids != 0).long(), "targets": targets}

    return batch(train, False), batch(questions, True), 2 + len(words)


def build(seed: int = 0) -> nn.Module:
    config = DemoConfig(vocabulary=data()[2], hidden=64, layers=3, heads=4, intermediate=128, seed=seed)
    return small_llama(config).eval()


def fit(members: np.ndarray, seed: int) -> nn.Module:
    """Train from scratch; the seed gives weights and order."""
    model, (samples, _, _) = build(seed), data()
    tokens = [ids[ids != 0].tolist() for ids in samples["input_ids"]]
    batches = shuffled(tokens, members.tolist(), RECIPE["epochs"], RECIPE["batch"], seed)
    for _ in fit_batches(model, batches, len(batches), RECIPE["rate"]):
        pass
    return model.eval()


@functools.cache
def task() -> Task:
    samples, queries, _ = data()
    train, questions, relevant = sentences()
    return Task(
        name="facts",
        train=samples,
        queries=queries,
        fit=fit,
        build=build,
        outputs=outputs,
        sample_losses=sample_losses,
        represent=represent,
        relevant=relevant,
        texts=(train, questions),
        about={"recipe": RECIPE, "query_loss": 1.6305},
    )


if __name__ == "__main__":
    main(task, None, __doc__)
