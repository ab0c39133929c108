"""Find mislabelled training data: flip a tenth of the labels of scikit-learn's digits and rank by self-influence.

    python examples/mislabelled_digits.py     (needs scikit-learn)

A sample whose label contradicts its like pulls the model by itself alone, so that its influence on its own loss is
large. The sample's loss is printed beside it: it is the control that every such method has to be compared with.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

import loghook


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--out", default="runs/digits", help="folder of the log")
    arguments = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    random = np.random.default_rng(0)
    wrong = random.random(len(y)) < 0.1
    shifts = torch.from_numpy(random.integers(1, 10, len(y)))
    y = torch.where(torch.from_numpy(wrong), (y + shifts) % 10, y)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(arguments.steps):
        batch = torch.randint(len(y), (64,))
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()

    losses = torch.zeros(len(y))
    with loghook.init(arguments.out, rank=32, overwrite=True) as run, loghook.frozen(model):
        run.watch(model)
        for _ in run.passes():
            for batch in torch.arange(len(y)).split(256):
                with run(data_id=batch):
                    loss = F.cross_entropy(model(x[batch]), y[batch], reduction="none")
                    loss.sum().backward()
                losses[batch] = loss.detach()
        run.finalize()

    log = loghook.load(arguments.out)
    order = np.array(log.data_ids)
    rankings = {"self-influence, ekfac": log.self_influence("ekfac"), "self-influence, dot": log.self_influence("dot")}
    rankings["loss (control)"] = losses.numpy()[order]
    print(f"{wrong.sum()} of {len(y)} labels are wrong")
    for name, values in rankings.items():
        worst = order[np.argsort(-values)[: wrong.sum()]]
        auc = roc_auc_score(wrong[order], values)
        print(f"{name:<22} AUC {auc:.3f}   {wrong[worst].sum()} of the {wrong.sum()} highest are wrong")


if __name__ == "__main__":
    main()
