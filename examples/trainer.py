"""Log inside transformers' Trainer: a byte-level language model of Python's own reference, then one question.

    python examples/trainer.py
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/trainer.py

Trainer averages over tokens, accumulation steps and processes; `log_training` undoes all of that, so that each row is
the gradient of its own passage's summed loss. The model never sees the column with the ids.
"""

import argparse
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import loghook
from loghook.integrations.transformers import log_training

LENGTH, BATCH = 96, 8


def make_passages(count):
    """{id: passage}; an id is a topic and a place in it."""
    passages = {}
    for name, text in topics.items():
        data = text.encode()
        for start in range(0, len(data) - LENGTH, LENGTH):
            passages[f"{name}:{start}"] = list(data[start : start + LENGTH])
    return dict(list(passages.items())[:: max(1, len(passages) // count)][:count])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps, of two batches each")
    parser.add_argument("--out", default="runs/trainer", help="folder of the log")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    passages = make_passages(arguments.steps * 2 * BATCH + 1)
    asked = list(passages)[len(passages) // 2]
    question = torch.tensor([passages.pop(asked)])  # held out
    config = GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    trainer = Trainer(
        GPT2LMHeadModel(config),
        TrainingArguments(
            output_dir=f"{arguments.out}-checkpoints",
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            learning_rate=3e-3,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=[{"key": k, "input_ids": tokens, "labels": tokens} for k, tokens in passages.items()],
    )

    run = loghook.init(arguments.out, rank=16, overwrite=True)
    run.watch(trainer.model)
    with log_training(trainer, run, id_column="key"):
        for _ in run.passes():  # keeps each id once
            trainer.train()
    run.finalize()  # on every rank
    run.close()

    # From here on one process is enough, once they do not work together any more: while they do, all of them score. It
    # might as well be another one, tomorrow, with the checkpoint loaded.
    first = trainer.is_world_process_zero()
    trainer.accelerator.end_training()
    if first:
        log, model = loghook.load(arguments.out), trainer.model.eval()
        asker = log.attach(model)
        question = question.to(model.device)
        with loghook.frozen(model), asker.query(data_id=["question"], scale=LENGTH - 1) as query:
            model(input_ids=question, labels=question).loss.backward()
        asker.close()
        print(f"question: {asked} {bytes(question[0].tolist()).decode(errors='replace')!r}")
        for data_id, score in log.influence(query, method="ekfac", top=5).top(5)[0]:
            print(f"{score:+10.2f}  {data_id:<24} {bytes(passages[data_id]).decode(errors='replace')!r}")


if __name__ == "__main__":
    main()
