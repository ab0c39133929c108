"""A small convolutional network on scikit-learn's digits: 1,200 training and 200 test samples, those of digits_mlp.

The truth: trained again on 60 random halves, three seeds each (initialisation and order), loss of each test digit.
"""

import functools
from typing import Any

import base
import numpy as np
from base import Batch, Task, main
from torch import nn

RECIPE: dict[str, Any] = {
    "optimizer": "adam",
    "channels": (16, 32),
    "hidden": 64,
    "epochs": 20,
    "batch": 32,
    "rate": 2e-3,
}


@functools.cache
def data() -> tuple[Batch, Batch]:
    from digits import digits

    made = digits()
    return (
        {"x": made.x.view(-1, 1, 8, 8), "y": made.y},
        {"x": made.query_x.view(-1, 1, 8, 8), "y": made.query_y},
    )


def build() -> nn.Sequential:
    first, second = RECIPE["channels"]
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * second, RECIPE["hidden"]),
        nn.ReLU(),
        nn.Linear(RECIPE["hidden"], 10),
    ).eval()


def fit(members: np.ndarray, seed: int) -> nn.Module:
    return base.fit_classifier(build, data()[0]["x"], data()[0]["y"], members, seed, RECIPE, whole_batches=True)


@functools.cache
def task() -> Task:
    samples, queries = data()
    return Task(
        name="digits_cnn",
        train=samples,
        queries=queries,
        fit=fit,
        build=build,
        outputs=base.logits,
        sample_losses=base.cross_entropies,
        represent=base.last_input,
        labels=(samples["y"].numpy(), queries["y"].numpy()),
        **base.known_truth("digits_cnn"),
    )


def train(members: np.ndarray, seed: int) -> np.ndarray:
    return base.query_losses(task(), fit(members, seed))


def again(arguments: Any) -> Task:
    return base.measure(task(), train, arguments, halves=60, seeds=3, recipe=RECIPE)


if __name__ == "__main__":
    main(task, again, __doc__)
