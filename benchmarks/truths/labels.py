"""A text classifier with 10 % wrong labels: do scores find them?

Which of six chapters of Python's language reference a passage of 48 tokens is from (the passages of text.py). A mean of
embeddings and three linear layers, trained on 1,200 passages of which 120 have the label of another chapter. The truth
is which; nothing is retrained, and there is no file.
"""

import functools
from typing import Any

import numpy as np
import text
import torch
from base import Batch, Task, cross_entropies, fit_classifier, main
from torch import Tensor, nn

RECIPE: dict[str, Any] = {"width": 128, "epochs": 8, "batch": 32, "rate": 2e-3, "flipped": 0.1}
CLASSES = len(text.TOPICS)


class Classifier(nn.Module):
    """Mean of embeddings, then linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(text.MODEL.vocabulary, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)

    def features(self, ids_BS: Tensor) -> Tensor:
        return self.body(self.embedding(ids_BS).mean(1))

    def forward(self, ids_BS: Tensor) -> Tensor:
        return self.head(self.features(ids_BS))


@functools.cache
def data() -> tuple[Batch, Batch, np.ndarray]:
    """Training samples with labels as they are trained on, queries with true ones, and which are wrong."""
    tokens, labels = text.data()["tokens"].long(), text.data()["topics"].long()
    rng = np.random.RandomState(0)
    flipped = np.zeros(text.N, dtype=bool)
    flipped[rng.permutation(text.N)[: round(RECIPE["flipped"] * text.N)]] = True
    shift = torch.from_numpy(rng.randint(1, CLASSES, text.N) * flipped)
    train = {"input_ids": tokens[: text.N], "y": (labels[: text.N] + shift) % CLASSES}
    return train, {"input_ids": tokens[text.N :], "y": labels[text.N :]}, flipped


def build() -> nn.Module:
    return Classifier(RECIPE["width"]).eval()


def fit(members: np.ndarray, seed: int) -> nn.Module:
    return fit_classifier(build, data()[0]["input_ids"], data()[0]["y"], members, seed, RECIPE)


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (B, classes)."""
    return model(batch["input_ids"])


def represent(model: nn.Module, batch: Batch) -> Tensor:
    """Input of the last layer."""
    return model.features(batch["input_ids"])  # type: ignore[operator]


@functools.cache
def task() -> Task:
    samples, queries, flipped = data()
    return Task(
        name="labels",
        train=samples,
        queries=queries,
        fit=fit,
        build=build,
        outputs=outputs,
        sample_losses=cross_entropies,
        represent=represent,
        flipped=flipped,
        labels=(samples["y"].numpy(), queries["y"].numpy()),
        texts=text.task().texts,
        about={"recipe": RECIPE, "query_loss": 0.9151},
    )


if __name__ == "__main__":
    main(task, None, __doc__)
