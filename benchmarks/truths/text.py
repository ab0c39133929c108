"""A small Llama, pre-trained and then fine-tuned on Python's documentation: which passages lower a passage's loss?

1,200 passages of 48 tokens of the language reference are fine-tuned on, 50 others of the same topics are the queries.
The truth: fine-tuned again on 60 random halves, two orders each, loss of each query. `text_data.safetensors` holds the
tokens, the texts and the pre-trained weights (bfloat16), since every Python carries another edition of its
documentation; `--rebuild` makes it anew from this one's and must be followed by `--retrain`.
"""

import functools
import sys
from typing import Any

import numpy as np
import safetensors.torch
import torch
from base import HERE, Batch, Task, known_truth, main, measure, pack_texts, query_losses, unpack_texts
from torch import Tensor, nn
from torch.nn import functional as F

from loghook.demo.config import DemoConfig
from loghook.demo.text import decode, language_reference, library_source, train_tokenizer
from loghook.demo.train import fit as fit_batches
from loghook.demo.train import one_thread, shuffled, small_llama

DATA = HERE / "text_data.safetensors"
TOPICS = ("specialnames", "compound", "types", "formatstrings", "string-methods", "debugger")  # fine-tuned on
MODEL = DemoConfig(vocabulary=1024, hidden=128, layers=4, heads=4, intermediate=344)
RECIPE: dict[str, Any] = {"epochs": 2, "rate": 2e-3, "batch": 8}
TOKENS, N, Q = 48, 1200, 50


@functools.cache
def data() -> dict[str, Tensor]:
    return safetensors.torch.load_file(DATA)


def build() -> nn.Module:
    """The pre-trained model."""
    model = small_llama(MODEL)
    weights = {name[5:]: values.float() for name, values in data().items() if name.startswith("base.")}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()


def fit(members: np.ndarray, seed: int, share: float = 1.0) -> nn.Module:
    """Fine-tune on some passages; the seed gives the order. With a share the last steps are left out."""
    model, tokens = build(), data()["tokens"][:N].tolist()
    batches = shuffled(tokens, members.tolist(), RECIPE["epochs"], RECIPE["batch"], seed)
    for _ in fit_batches(model, batches[: round(share * len(batches))], len(batches), RECIPE["rate"]):
        pass
    return model.eval()


def checkpoint(seed: int, share: float) -> nn.Module:
    with one_thread("cpu"):
        return fit(np.ones(N, dtype=bool), seed, share)


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (B, S, V)."""
    return model(input_ids=batch["input_ids"], use_cache=False).logits


def sample_losses(logits_BSV: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy summed over the targets that are not -100; the first token is never predicted."""
    targets_BS = batch["targets"][:, 1:]
    losses_BS = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), targets_BS.flatten(), reduction="none")
    return losses_BS.view(targets_BS.shape).sum(1)


def represent(model: nn.Module, batch: Batch) -> Tensor:
    """Mean of the last hidden states over the tokens."""
    states_BSH = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    mask_BS1 = batch["mask"][:, :, None]
    return (states_BSH * mask_BS1).sum(1) / mask_BS1.sum(1)


def tensors(tokens: Tensor) -> Batch:
    ids = tokens.long()
    return {"input_ids": ids, "mask": torch.ones_like(ids), "targets": ids}


@functools.cache
def task() -> Task:
    tokens, texts = data()["tokens"], unpack_texts(data()["texts"].numpy())
    return Task(
        name="text",
        train=tensors(tokens[:N]),
        queries=tensors(tokens[N:]),
        fit=fit,
        build=build,
        outputs=outputs,
        sample_losses=sample_losses,
        represent=represent,
        checkpoint=checkpoint,
        texts=(texts[:N], texts[N:]),
        **known_truth("text"),
    )


def train(members: np.ndarray, seed: int) -> np.ndarray:
    return query_losses(task(), fit(members, seed))


def again(arguments: Any) -> Task:
    return measure(task(), train, arguments, halves=60, seeds=2, recipe=RECIPE)


def cut() -> tuple[dict[str, Tensor], list[list[int]]]:
    """This Python's documentation as passages; sequences of 64 tokens of the rest and the library to pre-train on."""
    documents = {document.topic: " ".join(document.text.split()) for document in language_reference()}
    rest = [text for topic, text in documents.items() if topic not in TOPICS]
    library = [" ".join(text.split()) for text in library_source(3_000_000)]
    tokenizer = train_tokenizer([*documents.values(), *library[:20]], MODEL.vocabulary)
    passages, topics = [], []
    for number, topic in enumerate(TOPICS):
        ids = tokenizer(documents[topic])["input_ids"]
        begins = range(0, len(ids) - TOKENS + 2, TOKENS - 1)
        passages += [[1, *ids[i : i + TOKENS - 1]] for i in begins]
        topics += [number] * len(begins)
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(passages))[: N + Q])
    tokens = torch.tensor(passages)[order]
    texts = torch.from_numpy(pack_texts([decode(tokenizer, ids) for ids in tokens.tolist()]).copy())
    stream = [i for text in [*rest * 3, *library] for i in (1, *tokenizer(text)["input_ids"])]
    sequences = torch.tensor(stream[: len(stream) // 64 * 64]).view(-1, 64).tolist()
    topics_N = torch.tensor(topics, dtype=torch.uint8)[order]
    return {"tokens": tokens.to(torch.uint16), "texts": texts, "topics": topics_N}, sequences


def rebuild() -> None:
    torch.set_num_threads(1)
    made, sequences = cut()
    model = small_llama(MODEL)
    batches = shuffled(sequences, [True] * len(sequences), 1, 16, seed=0)[:900]
    for _ in fit_batches(model, batches, len(batches), 4e-3):
        pass
    weights = dict(model.named_parameters())  # tied ones once
    base = {f"base.{name}": values.detach().bfloat16() for name, values in weights.items()}
    safetensors.torch.save_file(made | base, DATA)


if __name__ == "__main__":
    if "--rebuild" in sys.argv:
        rebuild()
    else:
        main(task, again, __doc__)
