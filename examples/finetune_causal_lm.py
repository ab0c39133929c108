"""Fine-tune a small language model in a plain PyTorch loop, log it in a frozen pass, ask what made it say something.

Runs in about half a minute on a CPU and downloads nothing: the text is Python's own reference.

    python examples/finetune_causal_lm.py
"""

import argparse
import re
from collections import Counter
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import loghook

PAD, UNKNOWN, LENGTH = 0, 1, 64


def passages():
    """Cut every topic into passages of LENGTH words; a passage's id says where it is from."""
    for name, text in topics.items():
        words = re.findall(r"\w+|[^\w\s]", text)
        for start in range(0, len(words) - 16, LENGTH):
            yield f"{name}:{start}", words[start : start + LENGTH]


def collate(samples):
    ids, token_lists = zip(*samples, strict=True)
    tokens = torch.full((len(ids), LENGTH), PAD)
    for row, token_list in zip(tokens, token_lists, strict=True):
        row[: len(token_list)] = torch.tensor(token_list)
    return {"id": list(ids), "input_ids": tokens, "attention_mask": (tokens != PAD).long()}


def summed_loss(model, batch):
    """Sum, not mean, over tokens: a row is then the gradient of its own sample's loss, whatever the batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--passages", type=int, default=800, help="training passages")
    parser.add_argument("--out", default="runs/causal_lm", help="folder of the log")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    texts = dict(passages())
    counts = Counter(word for words in texts.values() for word in words)
    vocabulary = {word: i + 2 for i, (word, _) in enumerate(counts.most_common(2000))}
    samples = [(name, [vocabulary.get(word, UNKNOWN) for word in words]) for name, words in texts.items()]
    order = torch.randperm(len(samples)).tolist()
    training = [samples[i] for i in order[: arguments.passages]]
    question = collate([samples[order[arguments.passages]]])  # a passage that is held out

    config = LlamaConfig(
        vocab_size=len(vocabulary) + 2,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)

    # 1. Your training loop, as it is.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(training, batch_size=16, shuffle=True, collate_fn=collate)
    step = 0
    while step < arguments.steps:
        for batch in loader:
            loss = summed_loss(model, batch) / batch["attention_mask"].sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == arguments.steps:
                break
    print(f"trained for {step} steps; loss of the last batch {float(loss.detach()):.2f} nats a token")

    # 2. Log every sample once, with the trained model: no optimiser, and no weight gradient is computed.
    model.eval()
    run = loghook.init(arguments.out, rank=32, overwrite=True)
    run.watch(model)
    with loghook.frozen(model):
        for _ in run.passes():
            for batch in DataLoader(training, batch_size=16, collate_fn=collate):
                with run(data_id=batch["id"], mask=batch["attention_mask"]):
                    summed_loss(model, batch).backward()
        run.finalize()

        # 3. Ask: which training passages made the model expect this one?
        with run.query(data_id=question["id"]) as query:
            summed_loss(model, question).backward()
    run.close()

    scores = loghook.load(arguments.out).influence(query, method="ekfac")
    for name, records in (("question", None), ("proponents", scores.top(5)[0]), ("opponents", scores.bottom(2)[0])):
        print(f"\n{name}")
        for data_id, score in records or [(question["id"][0], None)]:
            text = " ".join(texts[data_id])[:100]
            print(f"  {'' if score is None else format(score, '+10.2f')}  {data_id:<24} {text}")


if __name__ == "__main__":
    main()
