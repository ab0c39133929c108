"""``log_training``: transformers' ``Trainer`` logs each micro-batch that it trains on, and stays as it was."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor

from loghook.capture.run import Run
from loghook.errors import BatchError, ConfigError, UnsupportedError
from loghook.integrations.loss_scale import Count, find_count, is_multiplied, replaced, trainer_divisor
from loghook.segments import from_cu_seqlens, from_position_ids


@contextmanager
def log_training(
    trainer: Any,
    run: Run,
    *,
    id_column: str = "id",
    mask: str | None = "attention_mask",
    scale: Count | None = None,
    segments: Callable[[Mapping[str, Any]], Tensor] | None = None,
) -> Iterator[None]:
    """Log every sample that ``trainer.train()`` trains on inside this context, one block for each micro-batch.

    A row is the gradient of its own sample's loss summed over labels: what Trainer divides and multiplies the loss by
    (labels, accumulation steps, processes, GradScaler) is undone. Which labels the loss counts is found once, by
    running it without gradients on the first micro-batch; where that cannot be cut into samples, a warning says what
    could not be tried. Samples that ``DataCollatorWithFlattening`` joins get a row in the log each. Evaluation logs
    nothing. On leaving, also by an error, the trainer is as it was.

    Args:
        trainer: a ``transformers.Trainer``, or a subclass of it.
        run: a run that watches the trainer's model.
        id_column: the training set's column with the ids; the model never sees it. An entry that was packed beforehand
            may bring a list of them, one for each document.
        mask: the batch's entry that says which tokens count in the statistics, or None for all.
        scale: for a loss that is no sum or mean over ``labels``: called with the batch and ``num_items_in_batch``,
            returns what ``trainer.compute_loss`` must be multiplied by to be a sum over the batch's samples; for
            ``gradient="adam"``, to be each sample's loss as if it were the batch: a number or (B,).
        segments: batch -> (B, S) as ``run(..., segments=)`` takes it, where a row of the model's batch is no sample:
            pairs that go through it one after the other (DPO), packs without position ids.

    Raises:
        ConfigError: the trainer is logged already, the training set has no such column, its batches come through
            accelerate's dispatcher, or rows are of ``gradient="adam"`` and there is no ``scale``.
        UnsupportedError: a loss that no rule explains, or a way of parallel training without exact rows.
    """
    _refuse(trainer)
    if getattr(trainer.training_step, "__module__", None) == __name__:  # the function below, of another call
        raise ConfigError("this trainer is logged already: one log_training at a time.")
    if scale is None and run._config.gradient == "adam":
        raise ConfigError(
            "gradient='adam' is not linear, so each sample needs the scale of its loss as if it were the batch: pass "
            "log_training(..., scale=lambda batch, num_items: (B,) tensor), or log a checkpoint in a pass of its own."
        )
    load, step, count = trainer.get_train_dataloader, trainer.training_step, scale
    multiplied: bool | None = None  # known from the first micro-batch on

    def get_train_dataloader() -> Any:
        trainer._set_signature_columns_if_needed()
        columns = [*trainer._signature_columns, id_column]  # what `remove_unused_columns` keeps
        # One process need dispatch nothing to others, which ids would not survive.
        undispatched = {"dispatch_batches": False} if trainer.accelerator.num_processes == 1 else {}
        with (
            replaced(trainer, data_collator=_Collate(trainer.data_collator, id_column), _signature_columns=columns),
            replaced(trainer.accelerator.dataloader_config, **undispatched),
        ):
            loader = load()
        if isinstance(loader, DataLoaderDispatcher):
            raise ConfigError(
                "ids are not dispatched from rank 0: TrainingArguments(accelerator_config={'dispatch_batches': False})."
            )
        return loader

    def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        nonlocal count, multiplied
        if id_column not in inputs:
            raise BatchError(
                f"the batch has no {id_column!r} (it has {', '.join(map(repr, inputs))}): a get_train_dataloader or "
                "dataset of your own must bring an id for each sample, or name another id_column."
            )
        data_id = inputs.pop(id_column)
        count = count or find_count(trainer, inputs, num_items_in_batch)
        if multiplied is None:
            multiplied = is_multiplied(trainer, inputs, num_items_in_batch)
        with run(
            data_id,
            mask=inputs.get(mask) if mask else None,
            scale=count(inputs, num_items_in_batch)
            * trainer_divisor(trainer, num_items_in_batch, multiplied=multiplied),
            scaler=trainer.accelerator.scaler,
            segments=_documents(inputs, len(data_id)) if segments is None else segments(inputs),
        ):
            return step(model, inputs, num_items_in_batch)

    with replaced(trainer, get_train_dataloader=get_train_dataloader, training_step=training_step):
        yield


class _Collate:
    """The trainer's collator, which never sees the ids; they join the batch after it."""

    def __init__(self, collate: Callable[[list[Any]], Any], column: str) -> None:
        self._collate, self._column = collate, column

    def __getattr__(self, name: str) -> Any:
        """What a trainer asks of its collator; but not what is asked of one that is being unpickled."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._collate, name)

    def __call__(self, features: list[Any]) -> Any:
        column, first = self._column, features[0]
        if not isinstance(first, Mapping) or column not in first:
            columns = ", ".join(map(repr, first)) if isinstance(first, Mapping) else type(first).__name__
            raise ConfigError(
                f"id_column={column!r} is no column of the training set (it has {columns}): add one of int or str."
            )
        batch = self._collate([{k: v for k, v in feature.items() if k != column} for feature in features])
        if not isinstance(batch, MutableMapping):
            raise UnsupportedError(
                f"the trainer's collator makes a {type(batch).__name__} and no batch of tensors, as where a trainer "
                "makes what it trains on inside its step (GRPO, RLOO): log what it generated in a loop of your own."
            )
        ids: list[Any] = []
        for feature in features:
            # Plain values stay on the CPU when the batch moves to a device, so that nobody waits for them.
            entry = feature[column].tolist() if hasattr(feature[column], "tolist") else feature[column]
            ids += entry if isinstance(entry, list) else [entry]
        batch[column] = ids
        return batch


def _documents(inputs: Mapping[str, Any], size: int) -> Tensor | None:
    """Where a collator joined ``size`` samples into fewer rows: each token's place among them, (B, S)."""
    tokens = inputs.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or len(tokens) >= size:
        return None
    bounds = next((inputs[name] for name in ("cu_seq_lens_q", "cu_seqlens") if inputs.get(name) is not None), None)
    if bounds is not None:
        numbers = from_cu_seqlens(bounds, (tokens.shape[0], tokens.shape[1]))
    elif inputs.get("seq_idx") is not None:
        numbers = inputs["seq_idx"]
    elif inputs.get("position_ids") is not None:
        numbers = from_position_ids(inputs["position_ids"])
    else:
        raise BatchError(
            f"the collator joined {size} samples into {len(tokens)} rows and does not say where each begins: let it "
            "return position_ids, seq_idx or cu_seq_lens_q, or pad instead."
        )
    documents = int(numbers.max()) + 1
    if documents != size:
        raise BatchError(
            f"{size} ids came with {documents} packed documents: an entry that was packed beforehand brings a list "
            "of ids, and tokens that fill a row up (pad_to_multiple_of) want log_training(..., segments=)."
        )
    return numbers


def _refuse(trainer: Any) -> None:
    """Raise for ways of training whose rows could not be exact."""
    if trainer.args.n_gpu > 1:
        raise UnsupportedError(
            f"Trainer sees {trainer.args.n_gpu} devices from one process and would use nn.DataParallel: start one "
            "process for each with torchrun, or set CUDA_VISIBLE_DEVICES to one."
        )
    kind = str(trainer.accelerator.distributed_type).split(".")[-1]
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if kind in ("DEEPSPEED", "MEGATRON_LM") or any(
        getattr(parallel, f"{name}_enabled", False) for name in ("tp", "cp", "sp")
    ):
        raise UnsupportedError(
            f"Trainer runs on {kind} with {parallel or 'an engine of its own'}, where a rank sees parts of samples or "
            "another scale of the loss: use data parallelism (DDP or FSDP) for the logged training."
        )
