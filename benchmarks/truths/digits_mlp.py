"""The MLP of benchmarks/digits.py on scikit-learn's digits, as a task: 100 halves, five seeds each.

`python benchmarks/digits.py --retrain --save` measures this truth; so does `--retrain` here.
"""

import dataclasses
import functools
from typing import Any

import base  # puts benchmarks/ on the path
import digits
import numpy as np
import torch
from base import Batch, Task, main
from torch import Tensor, nn
from torch.func import functional_call

from loghook.evaluate.replay import Adam, Training

RECIPE = digits.Recipe()


def build() -> nn.Module:
    untrained = digits.train(torch.zeros(1, 1, dtype=torch.long), digits.digits(), digits.Recipe(epochs=0), seed=0)
    return digits.module(untrained, 0)


def fit(members: np.ndarray, seed: int) -> nn.Module:
    places = torch.from_numpy(np.flatnonzero(members))[None]
    return digits.module(digits.train(places, digits.digits(), RECIPE, seed), 0).eval()


def optimizer(model: nn.Module, seed: int) -> torch.optim.Optimizer:
    """That of `model`, which `fit` made of all samples, with its moments."""
    every = torch.arange(len(digits.digits().x))[None]
    used, made = digits.trained(every, digits.digits(), RECIPE, seed), RECIPE.build(model.parameters())
    for parameter, stacked in zip(model.parameters(), used.param_groups[0]["params"], strict=True):
        state = used.state[stacked].items()
        made.state[parameter] = {key: value.view_as(parameter) if value.dim() else value for key, value in state}
    return made


def training(seed: int) -> Training:
    """What `fit` does with all samples, for exact replay."""
    data, noise = digits.digits(), torch.Generator().manual_seed(seed)
    model = digits.module(digits.initial(1, data, RECIPE, noise), 0)
    every = torch.arange(len(data.x))[None]
    steps = [
        (ids[0].tolist(), {"x": data.x[ids[0]], "y": data.y[ids[0]]}) for ids in digits.batches(every, RECIPE, noise)
    ]

    def losses(parameters: dict[str, Tensor], batch: Batch) -> Tensor:
        return base.cross_entropies(functional_call(model, parameters, (batch["x"],)), batch)

    return Training(
        parameters={name: values.detach() for name, values in model.named_parameters()},
        losses=losses,
        batches=steps,
        rates=[RECIPE.rate] * len(steps),
        optimizer=Adam(weight_decay=RECIPE.decay),
    )


def checkpoint(seed: int, share: float) -> nn.Module:
    """The rate is constant and the order follows from the seed: a shorter training is how the longer one begins."""
    places, recipe = torch.arange(1200)[None], dataclasses.replace(RECIPE, epochs=round(share * RECIPE.epochs))
    return digits.module(digits.train(places, digits.digits(), recipe, seed), 0).eval()


@functools.cache
def task() -> Task:
    data = digits.digits()
    return Task(
        name="digits_mlp",
        train={"x": data.x, "y": data.y},
        queries={"x": data.query_x, "y": data.query_y},
        fit=fit,
        optimizer=optimizer,
        training=training,
        build=build,
        outputs=base.logits,
        sample_losses=base.cross_entropies,
        represent=base.last_input,
        checkpoint=checkpoint,
        labels=(data.y.numpy(), data.query_y.numpy()),
        **digits.load()._asdict(),
    )


def again(_: Any) -> Task:
    digits.retrain(digits.digits(), RECIPE).save(digits.TRUTH)
    task.cache_clear()
    return task()


if __name__ == "__main__":
    main(task, again, __doc__)
