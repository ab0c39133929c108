"""Log inside training, in a loop that Accelerate prepares: a mean loss, gradient accumulation, one process or many.

    python examples/accelerate_loop.py
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/accelerate_loop.py

Every rank writes its own part of the log; the question is asked afterwards from the finished log.
"""

import argparse
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import loghook

LENGTH, BATCH, ACCUMULATE = 96, 8, 2


def make_samples(count):
    """Passages of Python's own reference, as bytes."""
    samples = []
    for name, text in topics.items():
        data = text.encode()
        for start in range(0, len(data) - LENGTH, LENGTH):
            samples.append(
                {"id": len(samples), "name": name, "tokens": torch.tensor(list(data[start : start + LENGTH]))}
            )
    return samples[:: max(1, len(samples) // count)][:count]


def collate(samples):
    # Ids are a list: as a tensor they would go to the device, which each block would then wait for.
    return {"id": [s["id"] for s in samples], "tokens": torch.stack([s["tokens"] for s in samples])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="batches of all processes together")
    parser.add_argument("--out", default="runs/accelerate", help="folder of the log")
    arguments = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=ACCUMULATE)
    set_seed(0)
    samples = make_samples(arguments.steps * BATCH + 1)
    question = samples.pop(len(samples) // 2)  # a passage that is held out
    config = GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH, bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(samples, batch_size=BATCH, shuffle=True, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    run = loghook.init(arguments.out, rank=16, overwrite=True)
    run.watch(model)  # the prepared model: names in the log are those of your own
    for _ in run.passes():
        for batch in loader:
            tokens = batch["tokens"]
            # The loss is a mean over the batch's targets, and `accelerator.backward` divides it once more: `scale`
            # takes both back, so that a row is the gradient of its own sample's summed loss.
            targets = tokens[:, 1:].numel()
            with accelerator.accumulate(model):
                with run(data_id=batch["id"], scale=targets * ACCUMULATE):
                    loss = model(input_ids=tokens, labels=tokens).loss
                    accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    run.finalize()  # on every rank
    run.close()
    accelerator.print(f"trained; loss of the last batch {loss.item():.2f} nats a byte")

    # From here on one process is enough, once they do not work together any more: while they do, all of them score. It
    # might as well be another one, tomorrow, with the checkpoint loaded.
    first = accelerator.is_main_process
    accelerator.end_training()
    if first:
        log = loghook.load(arguments.out)
        asker = log.attach(accelerator.unwrap_model(model))
        tokens = question["tokens"][None].to(accelerator.device)
        with loghook.frozen(model), asker.query(data_id=["question"], scale=LENGTH - 1) as query:
            accelerator.unwrap_model(model)(input_ids=tokens, labels=tokens).loss.backward()
        asker.close()
        by_id = {sample["id"]: sample for sample in samples}
        print(f"question: {question['name']} {bytes(question['tokens'].tolist()).decode(errors='replace')!r}")
        for data_id, score in log.influence(query, method="ekfac", top=5).top(5)[0]:
            text = bytes(by_id[data_id]["tokens"].tolist()).decode(errors="replace")
            print(f"{score:+10.2f}  {by_id[data_id]['name']:<20} {text!r}")


if __name__ == "__main__":
    main()
