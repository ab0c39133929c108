"""LogIX on an exchange: rows through its random LoRA (weights only, no biases), then scores from its log.

Methods: fisher (its "raw" Hessian), kfac, ekfac, dot; log (gradients of the training rows to disk, nothing else).
Its damping is the absolute one that it is given, or 0.1 x mean eigenvalue if none is (of the first layer: its bug).
"""

import os
from pathlib import Path

import torch
from logix import LogIX, LogIXScheduler
from logix.config import LoRAConfig
from torch import Tensor

from peers.exchange import Batch, Costs, Exchange, Options, Rows, linears, main, size

HESSIANS = {"fisher": "raw", "kfac": "kfac", "ekfac": "ekfac"}


def work(exchange: Exchange, options: Options, costs: Costs, scratch: Path) -> Tensor | None:
    if exchange.fisher is not None and options.method in HESSIANS:
        raise ValueError("LogIX fits its Hessian to the rows that it logs: it has no other labels (fisher)")
    if options.method in HESSIANS and not options.absolute and options.damping != 0.1:
        raise ValueError(f"LogIX's relative damping is 0.1 x mean, not {options.damping:g} x: use absolute=True")
    os.chdir(scratch)  # it writes to ./logix
    model = exchange.model
    run = LogIX(project="run")
    names = linears(model)
    run.watch(model, name_filter=names)
    if options.rank:
        run.add_lora(lora_config=LoRAConfig(rank=options.rank))
    if exchange.kind == "llama":
        model.get_input_embeddings().requires_grad_(True)

    def backward(side: Batch, rows: Tensor) -> None:
        model.zero_grad()
        exchange.loss(model, Rows(side)[rows]).backward()

    n, q = (len(side[exchange.label]) for side in (exchange.train, exchange.query))
    with costs.stage("log"):
        for _ in LogIXScheduler(run, hessian=HESSIANS.get(options.method, "none"), save="grad"):
            for rows in torch.arange(n).split(options.batch):
                with run(data_id=[str(i) for i in rows.tolist()]):
                    backward(exchange.train, rows)
            run.finalize()
    costs.facts["bytes_per_sample"] = size(scratch) / n
    if options.method == "log":
        return None
    run.eval()
    run.setup({"grad": ["log"]})
    # All queries in one block: EK-FAC's eigenvalues are damped in place, so a second call would give other scores.
    with costs.stage("query"), run(data_id=[str(i) for i in range(q)]):
        backward(exchange.query, torch.arange(q))
    with costs.stage("score"):
        result = run.influence.compute_influence_all(
            run.get_log(),
            run.build_log_dataloader(batch_size=options.batch),
            precondition=options.method in HESSIANS,
            damping=options.damping if options.absolute else None,
        )
    order = torch.tensor([int(i) for i in result["tgt_ids"]]).argsort()
    return result["influence"][:, order]


if __name__ == "__main__":
    main(work)
