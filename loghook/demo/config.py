"""What a demo is made of: every knob in one place, checked at birth."""

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from loghook.errors import ConfigError

METHODS = ("ekfac", "cosine", "dot", "bm25")
_PRETRAINING = (
    "vocabulary", "hidden", "layers", "heads", "intermediate", "corpus_bytes", "batch_size",
    "pretrain_steps", "pretrain_tokens", "pretrain_lr", "seed",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """A demo run. The defaults are what ``loghook demo`` does; ``DemoConfig.fast()`` is a smoke test of the same code.

    Attributes:
        out: folder for the log, the pre-trained model and the page.
        prompts: texts that the fine-tuned model continues; both prompt and continuation are attributed.
        model: name or folder of a Hugging Face model; None builds and pre-trains a small one.
        dataset: name of a Hugging Face dataset, or a .jsonl, .json, .csv, .parquet or .txt file; None takes Python's
            own reference.
        seed: of weights, orders, random removals and projections.
        device: where to train, "cpu" or a CUDA device.
        workers: processes that fine-tune again at the same time, one thread each on a CPU; 0 means one for each core,
            at most 8.
        rank: of the log's projection.
        damping: of EK-FAC, relative to each layer's mean eigenvalue.
        vocabulary: size of the byte-pair vocabulary.
        hidden: width of the small model.
        layers: its depth.
        heads: its attention heads.
        intermediate: width of its MLPs.
        corpus_bytes: how much of the standard library's source is read.
        pretrain_steps: optimiser steps on it.
        pretrain_tokens: length of a pre-training sequence.
        pretrain_lr: peak learning rate there.
        chunk_tokens: longest fine-tuning passage, with its start token.
        passages: at most so many passages are fine-tuned on; documents beyond are left out.
        batch_size: sequences of a step.
        epochs: passes over the fine-tuning passages.
        finetune_lr: peak learning rate there; None means 8e-3 for the small model and 5e-5 for a named one.
        hold_out: every so many-th passage is held out.
        groups: topics whose held-out passages are asked about.
        group_size: held-out passages of each.
        fraction: share of the fine-tuning passages that is removed.
        prove: fine-tune again without the strongest proponents; False leaves that out and is quick.
        random_removals: how many random removals make the control.
        lds_subsets: random halves for the linear datamodelling score; 0 leaves it out.
        show: how many proponents and opponents are shown of each question.
        new_tokens: length of what the model generates.
        resamples: of the bootstrap.
    """

    out: Path = Path("loghook-demo")
    prompts: tuple[str, ...] = ()
    model: str | None = None
    dataset: str | None = None
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    rank: int = 64
    damping: float = 0.1

    vocabulary: int = 2048
    hidden: int = 96
    layers: int = 3
    heads: int = 4
    intermediate: int = 256
    corpus_bytes: int = 6_000_000
    pretrain_steps: int = 700
    pretrain_tokens: int = 128
    pretrain_lr: float = 4e-3

    chunk_tokens: int = 128
    passages: int = 1200
    batch_size: int = 8
    epochs: float = 1.0
    finetune_lr: float | None = None

    hold_out: int = 8
    groups: int = 4
    group_size: int = 6
    fraction: float = 0.05
    prove: bool = True
    random_removals: int = 2
    lds_subsets: int = 0
    show: int = 5
    new_tokens: int = 32
    resamples: int = 4000

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is trained."""
        object.__setattr__(self, "out", Path(self.out))
        if isinstance(self.prompts, str):
            raise ConfigError(f"prompts={self.prompts!r} is one string: pass a tuple of them, even for one.")
        object.__setattr__(self, "prompts", tuple(self.prompts))
        for prompt in self.prompts:
            if not prompt.strip():
                raise ConfigError(f"prompt {prompt!r} is empty: give a few words for the model to continue.")
        for name in (
            "rank", "vocabulary", "hidden", "layers", "heads", "intermediate", "corpus_bytes", "pretrain_steps",
            "passages", "batch_size", "groups", "group_size", "random_removals", "show", "new_tokens", "resamples",
        ):  # fmt: skip
            _at_least(self, name, 1)
        for name, least in (("workers", 0), ("seed", 0), ("lds_subsets", 0), ("hold_out", 2)):
            _at_least(self, name, least)
        for name in ("chunk_tokens", "pretrain_tokens"):
            _at_least(self, name, 8)
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ConfigError(
                f"hidden={self.hidden} over heads={self.heads} is no even width for a head: choose hidden = heads x an "
                "even number."
            )
        if not 0 < self.fraction < 0.5:
            raise ConfigError(f"fraction={self.fraction} must lie between 0 and 0.5: it is the share that is removed.")
        for name in ("epochs", "pretrain_lr", "learning_rate", "damping"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive.")
        if self.lds_subsets in (1, 2, 3):
            raise ConfigError(
                f"lds_subsets={self.lds_subsets} is too few for a rank correlation: pass 0 for none, or at least 4."
            )

    @classmethod
    def fast(cls, **changes: object) -> "DemoConfig":
        """A tiny configuration that runs everything in seconds and proves nothing; ``changes`` are applied to it."""
        tiny = dict(
            rank=8, vocabulary=512, hidden=32, layers=2, heads=2, intermediate=80, corpus_bytes=100_000,
            pretrain_steps=10, pretrain_tokens=32, chunk_tokens=32, passages=96, group_size=2, groups=2,
            random_removals=1, show=2, new_tokens=8, resamples=200, hold_out=6,
        )  # fmt: skip
        return cls(**(tiny | changes))  # type: ignore[arg-type]

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of fine-tuning."""
        if self.finetune_lr is not None:
            return self.finetune_lr
        return 8e-3 if self.model is None else 5e-5

    @property
    def processes(self) -> int:
        """How many fine-tunings run at the same time."""
        if self.device != "cpu":
            return 1
        return self.workers or min(8, _cores())

    def digest(self) -> str:
        """Names what pre-training depends on: a pre-trained model with this digest need not be made again."""
        values = {name: getattr(self, name) for name in _PRETRAINING} | {"python": platform.python_version()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _at_least(config: DemoConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}.")


def _cores() -> int:
    """Cores this process may use; ``cpu_count`` where the system cannot say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
