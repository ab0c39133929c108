"""Training as a user would write it: a model, sequences of ids, an optimiser and a loop. Nothing here logs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from loghook.demo.config import DemoConfig
from loghook.demo.text import (
    MODELS,
    language_reference,
    library_source,
    loading,
    start_tokens,
    tokenize,
    train_tokenizer,
)
from loghook.errors import ConfigError

Sequences = Sequence[Sequence[int]]


class Task(NamedTuple):
    """All that a fine-tuning needs but the passages to keep."""

    base: str  # folder or name of the model it starts from
    train: Sequences  # ids of the passages
    queries: Sequences  # ids of the passages whose loss is wanted
    config: DemoConfig  # steps, rates and seed


def small_llama(config: DemoConfig) -> nn.Module:
    """A randomly initialised Llama of the configured size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    sizes = LlamaConfig(
        vocab_size=config.vocabulary, hidden_size=config.hidden, intermediate_size=config.intermediate,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.heads,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(sizes)


def pretrained(config: DemoConfig) -> str:
    """Folder of the small model, pre-trained now or by an earlier run with the same settings."""
    folder = config.out / f"base-{config.digest()}"
    if folder.exists():
        return str(folder)
    library = library_source(config.corpus_bytes)
    tokenizer = train_tokenizer([*library, *(d.text for d in language_reference())], config.vocabulary)
    start, stream = start_tokens(tokenizer), []
    for text in tqdm(library, "reading", unit="module"):
        stream += [*start, *tokenize(tokenizer, text)[0]]
    size = config.pretrain_tokens
    sequences = [stream[k : k + size] for k in range(0, len(stream) - size + 1, size)]
    if not sequences:
        raise ConfigError(f"corpus_bytes={config.corpus_bytes} hold no sequence of {size} tokens: take more.")
    order = np.random.default_rng(config.seed).permutation(len(sequences))
    places = np.resize(order, (config.pretrain_steps, config.batch_size))  # again and again in one order
    batches = ([sequences[i] for i in batch] for batch in places)
    model: Any = small_llama(config).to(config.device)
    steps = fit(model, batches, config.pretrain_steps, config.pretrain_lr)
    with tqdm(steps, "pre-training", total=config.pretrain_steps, unit="step") as bar:
        for loss in bar:
            bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
    unfinished = folder.with_name(folder.name + ".tmp")
    tokenizer.save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    unfinished.rename(folder)  # a folder of this name is whole
    return str(folder)


def load_model(name: str, device: str) -> Any:
    """A causal language model in float32."""
    from transformers import AutoModelForCausalLM

    with loading(f"model={name!r}", MODELS):
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.to(device)


def finetune(task: Task, keep: Sequence[bool], progress: str | None = None) -> nn.Module:
    """Fine-tune the base on the kept passages; with ``progress``, under a bar of that name."""
    config = task.config
    torch.manual_seed(config.seed)
    model = load_model(task.base, config.device)
    batches = shuffled(task.train, keep, config.epochs, config.batch_size, config.seed)
    losses = fit(model, batches, len(batches), config.learning_rate)
    for _ in tqdm(losses, progress, total=len(batches), unit="step", disable=progress is None):
        pass
    return model


def collate(sequences: Sequences, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Pad sequences at the right: ids (B, S) and a mask (B, S) that is 1 where a token is."""
    ids_BS = nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    lengths_B = torch.tensor([len(s) for s in sequences])
    mask_BS = (torch.arange(ids_BS.shape[1]) < lengths_B[:, None]).long()
    return ids_BS.to(device), mask_BS.to(device)


def sequence_losses(model: nn.Module, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Cross-entropy of each sequence, summed over the tokens that the mask counts, in nats: (B,).

    The first token is never predicted. Padding is at the right, where a causal model cannot see it.
    """
    logits_BSV = model(input_ids=ids_BS, use_cache=False).logits[:, :-1]
    targets_BS = ids_BS[:, 1:].masked_fill(mask_BS[:, 1:] == 0, -100)
    return nn.functional.cross_entropy(
        logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), ignore_index=-100, reduction="none"
    ).view(targets_BS.shape).sum(1)  # fmt: skip


def fit(model: nn.Module, batches: Iterable[Sequences], steps: int, learning_rate: float) -> Iterator[float]:
    """AdamW on the mean loss of a token, warm-up over 5 % of the steps, then to zero in a line; yields the losses."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    warm = max(1, steps // 20)
    model.train()
    for step, batch in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        ids_BS, mask_BS = collate(batch, device)
        loss = sequence_losses(model, ids_BS, mask_BS).sum() / mask_BS[:, 1:].sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
    model.eval()


def shuffled(
    sequences: Sequences, keep: Sequence[bool], epochs: float, size: int, seed: int
) -> list[list[Sequence[int]]]:
    """Batches in an order that depends on the seed alone: what ``keep`` leaves out is passed over, the rest stays."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < epochs * len(sequences):
        order += torch.randperm(len(sequences), generator=generator).tolist()
    order = [i for i in order[: round(epochs * len(sequences))] if keep[i]]
    return [[sequences[i] for i in order[k : k + size]] for k in range(0, len(order), size)]


@torch.no_grad()
def mean_losses(model: nn.Module, sequences: Sequences, size: int) -> list[float]:
    """Loss of a token, in nats, of each sequence."""
    model.eval()
    device, losses = next(model.parameters()).device, []
    for k in range(0, len(sequences), size):
        ids_BS, mask_BS = collate(sequences[k : k + size], device)
        losses += (sequence_losses(model, ids_BS, mask_BS) / mask_BS[:, 1:].sum(1)).tolist()
    return losses


@torch.no_grad()
def generate(model: Any, start: Sequence[int], new_tokens: int, seed: int) -> list[int]:
    """Continue ``start`` by sampling at temperature 0.5 among the 40 likeliest tokens."""
    generator = torch.Generator().manual_seed(seed)
    device, ids = next(model.parameters()).device, list(start)
    for _ in range(new_tokens):
        logits_V = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1].float().cpu()
        top = torch.topk(logits_V, min(40, len(logits_V)))
        ids.append(int(top.indices[torch.multinomial(torch.softmax(top.values / 0.5, 0), 1, generator=generator)]))
    return ids


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """Compute on one CPU thread: sums come in one order, and small matrices are no faster on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars of loading and saving weights off the screen."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
