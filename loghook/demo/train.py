"""Training as a user would write it: a model, sequences of ids, an optimiser and a loop. Nothing here knows loghook."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loghook.demo.config import DemoConfig

Sequences = Sequence[Sequence[int]]


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
    """Batches of an epoch or several, in an order that depends on the seed alone.

    What ``keep`` leaves out is passed over, so that a removal changes nothing else.
    """
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
