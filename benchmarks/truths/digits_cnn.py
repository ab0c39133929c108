"""A small convolutional network on scikit-learn's digits: 1,200 training and 200 test samples, those of digits_mlp.

The truth: trained again on 60 random halves, three seeds each (initialisation and order), loss of each test digit.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from base import HERE, Batch, Task, load_truth, main, measure, query_losses, save_truth
from torch import Tensor, nn
from torch.nn import functional as F

TRUTH = HERE / "digits_cnn.safetensors"
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
    """Adam at a constant rate on the mean loss, whole batches only; the seed gives weights and order."""
    torch.manual_seed(seed)
    model, (samples, _), places = build(), data(), torch.from_numpy(np.flatnonzero(members))
    optimizer = torch.optim.Adam(model.parameters(), lr=RECIPE["rate"], fused=True)
    for _ in range(RECIPE["epochs"]):
        order = places[torch.randperm(len(places))]
        for part in order.split(RECIPE["batch"])[: len(places) // RECIPE["batch"]]:
            optimizer.zero_grad()
            F.cross_entropy(model(samples["x"][part]), samples["y"][part]).backward()
            optimizer.step()
    return model


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (B, 10)."""
    return model(batch["x"])


def sample_losses(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch["y"], reduction="none")


def represent(model: nn.Module, batch: Batch) -> Tensor:
    """Input of the last layer."""
    return model[:-1](batch["x"])


@functools.cache
def task() -> Task:
    samples, queries = data()
    return Task(
        name="digits_cnn",
        train=samples,
        queries=queries,
        fit=fit,
        build=build,
        outputs=outputs,
        sample_losses=sample_losses,
        represent=represent,
        labels=(samples["y"].numpy(), queries["y"].numpy()),
        **load_truth(TRUTH, len(samples["y"])),
    )


def train(members: np.ndarray, seed: int) -> np.ndarray:
    return query_losses(task(), fit(members, seed))


def again(arguments: Any) -> Task:
    folder = arguments.folder or Path("runs") / "truth-digits_cnn"
    made = measure(task(), train, halves=60, seeds=3, workers=arguments.workers, folder=folder, recipe=RECIPE)
    save_truth(made, TRUTH)
    return made


if __name__ == "__main__":
    main(task, again, __doc__)
