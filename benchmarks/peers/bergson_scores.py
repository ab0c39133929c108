"""Bergson on an exchange, through the functions that its own pipelines call, with model and data in memory.

Methods: ekfac and kfac on whole gradients; fisher (its "autocorrelation" Hessian, as in LoGra), dot and cosine on
projected rows; log (gradients of the training rows to its index on disk, nothing else).
"""

import types
from pathlib import Path

import numpy as np
import torch
from bergson import GradientProcessor, IndexConfig, PreprocessConfig, ScoreConfig, collect_gradients
from bergson.collector.collector import CollectorComputer
from bergson.config.config import HessianConfig, InversionConfig
from bergson.data import load_scores
from bergson.hessians.apply_hessian import EkfacConfig, apply_worker
from bergson.hessians.autocorrelation import AutocorrelationCollector
from bergson.hessians.hessian_approximations import fit_factored_hessians
from bergson.score.score import create_scorer
from datasets import Dataset
from torch import Tensor, nn

from peers.exchange import Batch, Costs, Exchange, Options, main


class TwoTokens(nn.Module):
    """A classifier as the causal language model that Bergson asks for: sequences (index of a sample, its label).

    Position 0 is the sample and predicts position 1, which Bergson leaves out as every sequence's last.
    """

    def __init__(self, body: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.body = body
        self.embeddings = nn.Embedding.from_pretrained(x, freeze=False)  # trainable, as Bergson asks of one parameter
        self.device, self.dtype = x.device, x.dtype

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, ids_B2: Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(logits=self.body(self.embeddings(ids_B2)))


def as_language_model(exchange: Exchange) -> tuple[nn.Module, dict[str, Dataset]]:
    """Return the model, and the train, query and Fisher data as Bergson's data sets."""
    sides = {"train": exchange.train, "query": exchange.query, "fisher": exchange.fisher_data()}
    model = exchange.model.requires_grad_(False)
    if exchange.kind == "mlp":
        model = TwoTokens(model, torch.cat([exchange.train["x"], exchange.query["x"]]))
        start = {"train": 0, "query": len(exchange.train["x"]), "fisher": 0}
        for name, side in sides.items():
            ids_B2 = torch.stack([torch.arange(len(side["y"])) + start[name], side["y"]], 1)
            sides[name] = {"input_ids": ids_B2, "labels": ids_B2}
    else:
        model.get_input_embeddings().requires_grad_(True)  # as Bergson's own set-up does
    return model, {name: dataset(side) for name, side in sides.items()}


def dataset(side: Batch) -> Dataset:
    columns = {name: side[name].tolist() for name in ("input_ids", "labels")}
    return Dataset.from_dict(columns | {"length": [len(row) for row in columns["input_ids"]]})


def batches(data: Dataset, size: int) -> list[list[int]]:
    return [part.tolist() for part in torch.arange(len(data)).split(size)]


def work(exchange: Exchange, options: Options, costs: Costs, scratch: Path) -> Tensor | None:
    model, data = as_language_model(exchange)
    bias = exchange.kind == "mlp"
    whole = options.method in ("ekfac", "kfac")
    if whole and options.rank:
        raise ValueError(f"Bergson's {options.method} needs whole gradients (rank 0), not rank {options.rank}")

    def config(name: str) -> IndexConfig:
        made = IndexConfig(str(scratch / name), projection_dim=options.rank, include_bias=bias)
        made.partial_run_path.mkdir()
        return made

    def processor() -> GradientProcessor:
        return GradientProcessor(projection_dim=options.rank or None, include_bias=bias)

    def collect(name: str, side: str, size: int, **more: object) -> Path:
        cfg = config(name)
        collect_gradients(model, data[side], processor(), cfg, batches=batches(data[side], size), **more)
        return cfg.partial_run_path

    if options.method == "log":
        with costs.stage("log"):
            index = collect("log", "train", options.batch)
        costs.facts["bytes_per_sample"] = (index / "gradients.bin").stat().st_size / len(data["train"])
        return None

    inversion = InversionConfig("absolute_damped_inverse" if options.absolute else "damped_inverse", options.damping)
    preprocess = PreprocessConfig(unit_normalize=options.method == "cosine")
    with costs.stage("query"):
        query = collect("query", "query", options.query_batch)
    with costs.stage("fit"):
        cfg = config("hessian")
        if whole:
            fit_factored_hessians(
                model,
                data["fisher"],
                cfg,
                HessianConfig("kfac", ev_correction=options.method == "ekfac", use_dataset_labels=True),
                target_modules=None,
                attention_cfgs={},
                batches=batches(data["fisher"], options.batch),
                path=str(cfg.partial_run_path),
                do_eigendecomposition=True,
            )
        elif options.method == "fisher":
            collector = AutocorrelationCollector(
                model=model.base_model, data=data["fisher"], path=str(cfg.partial_run_path), processor=processor()
            )
            CollectorComputer(
                model, data["fisher"], collector=collector, batches=batches(data["fisher"], options.batch), cfg=cfg
            ).run_with_collector_hooks(desc="fisher")
            preprocess = PreprocessConfig(hessian_path=str(cfg.partial_run_path), inversion_cfg=inversion)
    if whole:
        with costs.stage("precondition"):
            applied = scratch / "applied"
            apply_worker(
                0,
                0,
                1,
                EkfacConfig(str(cfg.partial_run_path), str(query), str(applied), options.method == "ekfac"),
                inversion,
            )
            query = applied
    with costs.stage("score"):
        target = config("scores")
        scorer = create_scorer(
            target.partial_run_path,
            data["train"],
            ScoreConfig(query_path=str(query)),
            preprocess,
            torch.device(options.device),
            torch.float32,
        )
        rows = batches(data["train"], options.batch)
        collect_gradients(model, data["train"], processor(), target, batches=rows, scorer=scorer)
        scorer.writer.flush()
    # Both score as they stream. A row of an index takes as much for a training sample as for a query.
    index = 0 if whole else (query / "gradients.bin").stat().st_size
    costs.facts["bytes_per_sample"] = index / len(data["query"])
    return torch.from_numpy(np.asarray(load_scores(target.partial_run_path)[:]).astype(np.float32)).T


if __name__ == "__main__":
    main(work)
