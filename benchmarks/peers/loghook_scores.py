"""loghook itself on an exchange, by the rules that peers go by; run by the interpreter that runs the benchmark.

Methods: ekfac on whole gradients (rank 0); log (rows of the training data to its log on disk, nothing else); floor
(the passes that log makes over a language model, without hooks: forward, and backward to the embeddings alone).
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import loghook
from peers.exchange import Batch, Costs, Exchange, Options, Rows, linears, main, size


def work(exchange: Exchange, options: Options, costs: Costs, scratch: Path) -> Tensor | None:
    model = exchange.model

    def batches(side: Batch, step: int) -> Iterator[tuple[list[int], Batch]]:
        for rows in torch.arange(len(side[exchange.label])).split(step):
            yield rows.tolist(), Rows(side)[rows]

    if options.method == "floor":
        with loghook.frozen(model), costs.stage("floor"):
            model.get_input_embeddings().requires_grad_(True)
            for _, batch in batches(exchange.train, options.batch):
                exchange.loss(model, batch).backward()
                model.zero_grad(set_to_none=True)
        costs.facts["bytes_per_sample"] = 0
        return None
    if options.method == "log":
        with costs.stage("log"), loghook.frozen(model):
            run = loghook.init(scratch / "log", rank=options.rank, seed=options.seed, dtype=options.dtype)
            run.watch(model, include=linears(model))
            for ids, batch in batches(exchange.train, options.batch):
                with run(data_id=ids):
                    exchange.loss(model, batch).backward()
            run.finalize()
        run.close()
        costs.facts["bytes_per_sample"] = size(scratch) / len(exchange.train[exchange.label])
        return None
    if options.method != "ekfac" or options.rank:
        raise ValueError(
            f"this program has ekfac at rank 0, log and floor, not {options.method} at rank {options.rank}"
        )
    with loghook.frozen(model):
        with costs.stage("fit"):
            fit = loghook.fit(scratch / "factors")
            fit.watch(model, include=linears(model))
            for _ in fit.passes():
                for ids, batch in batches(exchange.fisher_data(), options.batch):
                    with fit(data_id=ids):
                        exchange.loss(model, batch).backward()
        damping = {"damping_abs" if options.absolute else "damping": options.damping}
        with costs.stage("score"):
            parts = []
            for ids, batch in batches(exchange.query, options.query_batch):
                with fit.query(data_id=ids) as query:
                    exchange.loss(model, batch).backward()
                parts.append(query)
            scoring = fit.score(loghook.Query.concat(parts), **damping)
            for ids, batch in batches(exchange.train, options.batch):
                with scoring(data_id=ids):
                    exchange.loss(model, batch).backward()
            scores = scoring.scores()
    fit.close()
    costs.facts |= {"bytes_per_sample": 0, "factor_bytes": size(scratch)}
    return torch.from_numpy(scores.values)


if __name__ == "__main__":
    main(work)
