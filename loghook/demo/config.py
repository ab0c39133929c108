"""What a demo is made of: every knob in one place."""

import hashlib
import json
import os
import platform
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from loghook.arguments import positive, whole
from loghook.errors import ConfigError

_PRETRAINING = (
    "vocabulary", "hidden", "layers", "heads", "intermediate", "corpus_bytes", "batch_size",
    "pretrain_steps", "pretrain_tokens", "pretrain_lr", "seed",
)  # fmt: skip
_LEAST = {"workers": 0, "seed": 0, "lds_subsets": 0, "hold_out": 2, "chunk_tokens": 8, "pretrain_tokens": 8}  # else 1


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """A demo run: by default what ``loghook demo`` does; ``DemoConfig.fast()`` is a smoke test of the same code."""

    out: Path = Path("loghook-demo")  # folder for the log, the pre-trained model and the page
    # texts that the fine-tuned model continues; both prompt and continuation are attributed
    prompts: tuple[str, ...] = ()
    model: str | None = None  # name or folder of a Hugging Face model; None builds and pre-trains a small one
    # name of a Hugging Face dataset, or a .jsonl, .json, .csv, .parquet or .txt file; None: Python's own reference
    dataset: str | None = None
    seed: int = 0  # of weights, orders, random removals and projections
    device: str = "cpu"  # where to train: "cpu", "cuda", "mps", ...
    # processes that fine-tune again at the same time, one thread each on a CPU; 0 means one for each core, at most 8
    workers: int = 0
    rank: int = 64  # of the log's projection
    # patterns of the layers that are logged; None: of the small model those that write into its residual stream, which
    # tell more than all (docs/choosing.md), and all linear layers of a named one
    include: tuple[str, ...] | None = None
    damping: float = 0.1  # of EK-FAC, relative to each layer's mean eigenvalue

    vocabulary: int = 2048  # size of the byte-pair vocabulary
    hidden: int = 96  # width of the small model
    layers: int = 3  # its depth
    heads: int = 4  # its attention heads
    intermediate: int = 256  # width of its MLPs
    corpus_bytes: int = 6_000_000  # how much of the standard library's source is read
    pretrain_steps: int = 700  # optimiser steps on it
    pretrain_tokens: int = 128  # length of a pre-training sequence
    pretrain_lr: float = 4e-3  # peak learning rate there

    chunk_tokens: int = 128  # longest fine-tuning passage, with its start token
    passages: int = 1200  # at most so many passages are fine-tuned on; documents beyond are left out
    batch_size: int = 8  # sequences of a step
    epochs: float = 1.0  # passes over the fine-tuning passages
    # peak learning rate there; None means 8e-3 for the small model and 5e-5 for a named one
    finetune_lr: float | None = None

    hold_out: int = 8  # every so many-th passage is held out
    groups: int = 4  # topics whose held-out passages are asked about
    group_size: int = 6  # held-out passages of each
    fraction: float = 0.05  # share of the fine-tuning passages that is removed
    prove: bool = True  # fine-tune again without the strongest proponents; False leaves that out and is quick
    random_removals: int = 2  # how many random removals make the control
    lds_subsets: int = 0  # random halves for the linear datamodelling score; 0 leaves it out
    show: int = 5  # how many proponents and opponents are shown of each question
    new_tokens: int = 32  # length of what the model generates
    resamples: int = 4000  # of the bootstrap

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        if isinstance(self.prompts, str):
            raise ConfigError(f"prompts={self.prompts!r} is one string: pass a tuple of them, even for one.")
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if not all(map(str.strip, self.prompts)):
            raise ConfigError(f"a prompt of {self.prompts} is empty: give a few words for the model to continue.")
        for field in fields(self):
            if field.type is int:
                whole(field.name, getattr(self, field.name), _LEAST.get(field.name, 1))
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ConfigError(f"hidden={self.hidden} over heads={self.heads} must be an even width for each head.")
        if not 0 < self.fraction < 0.5:
            raise ConfigError(f"fraction={self.fraction} must lie between 0 and 0.5: it is the share that is removed.")
        for name in ("epochs", "pretrain_lr", "learning_rate", "damping"):
            positive(name, getattr(self, name))
        try:
            torch.empty(0, device=self.device)
        except (AssertionError, RuntimeError) as error:
            raise ConfigError(f"device={self.device!r} is not available here ({error}): take cpu.") from error
        if self.lds_subsets in (1, 2, 3):
            raise ConfigError(f"lds_subsets={self.lds_subsets} is too few to correlate: pass 0 for none, or 4 or more.")

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
        default = 8e-3 if self.model is None else 5e-5
        return default if self.finetune_lr is None else self.finetune_lr

    @property
    def watched(self) -> tuple[str, ...]:
        default = ("*o_proj", "*down_proj") if self.model is None else ("*",)
        return default if self.include is None else self.include

    @property
    def processes(self) -> int:
        if self.device != "cpu":
            return 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or min(8, cores)

    def digest(self) -> str:
        """Names what pre-training depends on: a pre-trained model with this digest need not be made again."""
        values = {name: getattr(self, name) for name in _PRETRAINING} | {"python": platform.python_version()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
