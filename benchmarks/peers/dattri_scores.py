"""dattri-llm on an exchange. With rank 0 whole gradients, otherwise rows of its LoGra projection ("logra").

Methods: ekfac, kfac, fisher (its direct dense Fisher of the rows, which must be projected), dot, cosine; log (gradients
of the training rows to its store on disk, nothing else).
"""

from pathlib import Path

import dattri.func.projection  # noqa: F401 - dattri-llm imports both within its first pass, which is timed
import transformers.trainer_utils  # noqa: F401
from dattri_llm import (
    AttributionArguments,
    AttributionTask,
    EKFACAttributor,
    GradientStorageManager,
    HookManagerConfig,
    KFACAttributor,
    TracInAttributor,
)
from dattri_llm.attribution.base import BaseInnerProductAttributor
from torch import Tensor

from peers.exchange import Batch, Costs, Exchange, Options, Rows, linears, main, size

ATTRIBUTORS = {"ekfac": EKFACAttributor, "kfac": KFACAttributor, "fisher": EKFACAttributor}


def hooks(exchange: Exchange, options: Options) -> HookManagerConfig:
    projection = {"style": "logra", "proj_dim": options.rank, "proj_seed": options.seed, "proj_max_batch_size": 8}
    return HookManagerConfig(
        hook_types=dict.fromkeys(linears(exchange.model), "linear_io"),
        projection_kwargs={"__default__": projection} if options.rank else None,
        capture_style="materialized" if options.rank else "factorized",
        include_frozen=True,
    )


def work(exchange: Exchange, options: Options, costs: Costs, scratch: Path) -> Tensor | None:
    model = exchange.model
    if exchange.kind == "llama":  # a probe: no weight gradients, as its documentation advises
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
    arguments = AttributionArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.query_batch,
        use_cpu=options.device == "cpu",
    )
    task = AttributionTask(exchange.loss, model)
    plain = TracInAttributor(arguments, task=task)  # collects gradients; the others collect covariances with them
    attributor = ATTRIBUTORS[options.method](arguments, task=task) if options.method in ATTRIBUTORS else plain
    config = hooks(exchange, options)

    def collect(name: str, side: Batch, by: BaseInnerProductAttributor = plain) -> str:
        represent = by.generate_test_rep if name == "query" else by.generate_train_rep
        by.collect_gradients(represent(Rows(side), hook_config=config), GradientStorageManager(str(scratch / name)))
        return str(scratch / name)

    if options.method == "log":
        with costs.stage("log"):
            store = collect("train", exchange.train)
        costs.facts["bytes_per_sample"] = size(Path(store)) / len(exchange.train[exchange.label])
        return None
    more: dict[str, object] = {}
    with costs.stage("log"):
        train = collect("train", exchange.train, attributor if exchange.fisher is None else plain)
    with costs.stage("query"):
        query = collect("query", exchange.query)
    if options.method in ATTRIBUTORS:
        with costs.stage("fit"):
            fisher = train if exchange.fisher is None else collect("fisher", exchange.fisher_data(), attributor)
            kronecker = options.method != "fisher"
            attributor.fit(fisher, str(scratch / "factors"), covariances_at_capture=kronecker)
        more = {"fisher_dir": str(scratch / "factors"), "damping": options.damping}
        more |= {"relative_damping": not options.absolute, "covariances_at_capture": kronecker}
    elif options.method == "cosine":
        more = {"normalized_grad": True}
    with costs.stage("score"):
        result = attributor.attribute_from_cache(train, query, **more)
    costs.facts["bytes_per_sample"] = size(Path(train)) / len(exchange.train[exchange.label])
    return result.scores.T


if __name__ == "__main__":
    main(work)
