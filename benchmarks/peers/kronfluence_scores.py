"""Kronfluence on an exchange: factors fitted and pairs scored. Methods: ekfac, kfac, dot (its "identity")."""

from pathlib import Path

from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn

from peers.exchange import Batch, Costs, Exchange, Options, Rows, linears, main, size

STRATEGIES = {"ekfac": "ekfac", "kfac": "kfac", "dot": "identity"}


class SummedLoss(Task):
    """The sum of cross-entropies; "sampled" labels are those that the exchange gives."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange, self.modules = exchange, linears(exchange.model)

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        label = self.exchange.label
        return self.exchange.loss(model, batch | {label: batch["fisher"]} if sample else batch)

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        return self.exchange.loss(model, batch)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.modules


def damping(options: Options) -> float | None:
    if options.absolute:
        return options.damping
    if options.damping != 0.1:
        raise ValueError(f"Kronfluence's relative damping is 0.1 x mean, not {options.damping:g} x: use absolute=True")
    return None


def work(exchange: Exchange, options: Options, costs: Costs, scratch: Path) -> Tensor:
    task = SummedLoss(exchange)
    model = prepare_model(exchange.model, task)
    sampled = {} if exchange.fisher is None else {"fisher": exchange.fisher}
    train, query = Rows(exchange.train | sampled), Rows(exchange.query)
    analyzer = Analyzer("run", model, task, cpu=options.device == "cpu", disable_tqdm=True, output_dir=str(scratch))
    factors = FactorArguments(strategy=STRATEGIES[options.method], use_empirical_fisher=not sampled)
    with costs.stage("fit"):
        analyzer.fit_all_factors("factors", train, per_device_batch_size=options.batch, factor_args=factors)
    with costs.stage("score"):
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query,
            train,
            per_device_query_batch_size=options.query_batch,
            per_device_train_batch_size=options.batch,
            score_args=ScoreArguments(damping_factor=damping(options)),
        )
    costs.facts |= {"bytes_per_sample": 0, "factor_bytes": size(scratch)}
    return analyzer.load_pairwise_scores("scores")["all_modules"]


if __name__ == "__main__":
    main(work)
