"""``plan_config``: what logging a transformers model would cost, from its configuration alone."""

from collections.abc import Sequence
from pathlib import Path

import torch

from loghook.capture.config import Config
from loghook.capture.plan import Plan, parse_size
from loghook.capture.select import HEAD, Watch, select
from loghook.errors import ConfigError


def plan_config(
    model: str | Path, *, samples: int, tokens: int, rank: int = 64, dtype: str = "float32",
    projection: str = "random", batch: int = 1, disk: str | float | None = None,
    include: str | Sequence[str] = "*", exclude: str | Sequence[str] = HEAD,
) -> Plan:  # fmt: skip
    """Plan for a transformers model on the meta device: no weights are read or made.

    Args:
        model: a folder with a ``config.json``, such a file, or a name that transformers knows.
        samples: how many.
        tokens: of a sample.
        rank: as in ``loghook.init``, like ``dtype`` and ``projection``.
        dtype: how rows are stored.
        projection: its kind.
        batch: samples of a block.
        disk: what there is, such as "500 GB", or None.
        include: as in ``run.watch``, like ``exclude``.
        exclude: patterns left out.

    Raises:
        ConfigError: without transformers, or for a configuration that it cannot use.
    """
    config = Config(path=Path(), rank=rank, projection=projection, dtype=dtype)
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("`loghook plan` needs transformers: pip install transformers.") from error
    try:
        found = transformers.AutoConfig.from_pretrained(model)
        kind = getattr(transformers, (found.architectures or ["AutoModelForCausalLM"])[0])
        with torch.device("meta"):
            made = kind._from_config(found) if found.architectures else kind.from_config(found)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{str(model)!r} is no configuration of a model that transformers can build: {error}"
        ) from error
    watch = Watch(include, exclude)
    with torch.device("meta"):  # place-holders serve: a random projection has the shape of a fitted one
        shape = "none" if projection == "none" else "pca"
        layers, coverage = select(made, watch, projection=shape, rank=rank, seed=0)
    return Plan(
        config=config, layers=layers, coverage=coverage, samples=samples, tokens=tokens, batch=batch,
        disk=None if disk is None else parse_size(disk),
    )  # fmt: skip
