"""``log_training``: transformers' ``Trainer`` logs each micro-batch that it trains on, and stays as it was."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor

from loghook.capture.run import Run
from loghook.capture.segments import from_cu_seqlens, from_position_ids
from loghook.errors import BatchError, ConfigError, UnsupportedError, user_line
from loghook.processes import all_gather

IGNORED = -100  # the label that transformers' losses leave out
TRIALS = 32  # of labels with other classes
TOLERANCE = 1e-5  # by which losses may differ that are taken for equal: less than an auxiliary loss adds

# Labels of all, of one part and of the other, each with the inputs that differ from the batch's.
Trial = tuple[tuple[Tensor, Mapping[str, Any]], ...]
Count = Callable[[Mapping[str, Any], Any], Any]


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
        ConfigError: the training set has no such column, its batches come through accelerate's dispatcher, or rows
            are of ``gradient="adam"`` and there is no ``scale``.
        UnsupportedError: a loss that no rule explains, or a way of parallel training without exact rows.
    """
    _refuse(trainer)
    if scale is None and run._config.gradient == "adam":
        raise ConfigError(
            "gradient='adam' is not linear: each sample needs a scale, that of its loss as if it were the batch. Pass "
            "log_training(..., scale=lambda batch, num_items: a number or a (B,) tensor), such as num_items over the "
            "sample's number of labels, or log a checkpoint in a pass of its own."
        )
    load, step, count = trainer.get_train_dataloader, trainer.training_step, scale

    def get_train_dataloader() -> Any:
        trainer._set_signature_columns_if_needed()
        columns = [*trainer._signature_columns, id_column]  # what `remove_unused_columns` keeps
        alone = trainer.accelerator.num_processes == 1  # so that nothing need be dispatched, which ids do not survive
        with (
            _replaced(trainer, data_collator=_Collate(trainer.data_collator, id_column), _signature_columns=columns),
            _replaced(trainer.accelerator.dataloader_config, **({"dispatch_batches": False} if alone else {})),
        ):
            loader = load()
        if isinstance(loader, DataLoaderDispatcher):
            raise ConfigError(
                "batches of an iterable dataset are dispatched from rank 0, which carries tensors and no ids: pass "
                "TrainingArguments(accelerator_config={'dispatch_batches': False}), so that each rank reads its own."
            )
        return loader

    def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        nonlocal count
        if id_column not in inputs:
            raise BatchError(
                f"the batch has no {id_column!r} (it has {', '.join(map(repr, inputs))}): a get_train_dataloader or "
                "dataset of your own must bring one id for each sample under this name, or name another id_column."
            )
        data_id = inputs.pop(id_column)
        count = count or _find_count(trainer, inputs, num_items_in_batch)
        with run(
            data_id,
            mask=inputs.get(mask) if mask else None,
            scale=count(inputs, num_items_in_batch) * _divided_by(trainer, num_items_in_batch),
            scaler=trainer.accelerator.scaler,
            segments=_documents(inputs, len(data_id)) if segments is None else segments(inputs),
        ):
            return step(model, inputs, num_items_in_batch)

    with _replaced(trainer, get_train_dataloader=get_train_dataloader, training_step=training_step):
        yield


class _Collate:
    """The trainer's collator, which never sees the ids; they join the batch after it."""

    def __init__(self, collate: Callable[[list[Any]], Any], column: str) -> None:
        self._collate, self._column = collate, column

    def __call__(self, features: list[Any]) -> Any:
        column, first = self._column, features[0]
        if not isinstance(first, Mapping) or column not in first:
            has = ", ".join(map(repr, first)) if isinstance(first, Mapping) else type(first).__name__
            raise ConfigError(
                f"id_column={column!r} is no column of the training set (it has {has}): add one with an int or str "
                "for each sample, or name another with id_column=."
            )
        batch = self._collate([{k: v for k, v in feature.items() if k != column} for feature in features])
        # Plain values stay on the CPU when the batch moves to a device, so that nobody waits for them.
        entries = [entry.tolist() if hasattr(entry := feature[column], "tolist") else entry for feature in features]
        batch[column] = [one for entry in entries for one in (entry if isinstance(entry, list) else [entry])]
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
            "return position_ids, seq_idx or cu_seq_lens_q, as DataCollatorWithFlattening can, or pad instead."
        )
    found = int(numbers.max()) + 1
    if found != size:
        raise BatchError(
            f"{size} ids came with {found} packed documents: an entry that was packed beforehand brings a list with an "
            "id for each, and tokens that fill a row up count as documents where their position is 0 "
            "(pad_to_multiple_of). Or pass log_training(..., segments=)."
        )
    return numbers


def _divided_by(trainer: Any, items: Any) -> float:
    """What Trainer divides the model's loss by: accumulation steps, unless it is scaled, over processes.

    transformers 5.2 to 5.5 tell accelerate of the steps too, which then divides once more.
    """
    accepts, function = trainer.model_accepts_loss_kwargs, trainer.compute_loss_func is not None
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = (accepts and items is not None) or function
    multiplied = trainer.args.average_tokens_across_devices and (accepts or function) and items is not None
    steps = 1 if scaled else trainer.current_gradient_accumulation_steps
    steps *= trainer.accelerator.gradient_accumulation_steps
    return steps / (trainer.accelerator.num_processes if multiplied else 1)


def _find_count(trainer: Any, inputs: Mapping[str, Any], items: Any) -> Count:
    """Measure what the loss is divided by: ``num_items_in_batch``, or the micro-batch's own labels.

    A model that accepts ``num_items_in_batch`` need not use it (those for sequence classification do not), and only
    the loss knows whether it shifts the labels.
    """
    labels = inputs.get("labels")
    name = type(trainer.model).__name__
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        found = f"{labels.dtype} labels" if isinstance(labels, Tensor) else "no labels"
        raise UnsupportedError(
            f"{name} trains on {found}: how many items its loss is a mean of is known for integer labels only. Say it "
            "with log_training(..., scale=lambda batch, num_items: n), n times the loss being a sum over samples."
        )

    def loss(labels: Tensor, items: Any, **cut: Any) -> Tensor:
        return trainer.compute_loss(trainer.model, {**inputs, **cut, "labels": labels}, num_items_in_batch=items)

    none = torch.full_like(labels, IGNORED)
    first = none.clone()
    first[..., 0] = 0
    cause = None
    with _trials(trainer, labels.device):
        with _decoder_inputs(trainer.model, inputs) as made:
            loss(labels, items)  # what fails here would fail in training as well
        inputs = {**inputs, **made}
        if not bool((labels != IGNORED).any()):
            labels = torch.zeros_like(labels)  # without any, all losses agree
        try:
            known = items is None
            if not known:
                whole, half = loss(torch.zeros_like(labels), items), loss(torch.zeros_like(labels), 2 * items)
                if math.isclose(whole, 2 * half, rel_tol=TOLERANCE):
                    return lambda _, items: items
                known = math.isclose(whole, half, rel_tol=TOLERANCE)
            if known and math.isnan(loss(none, items)):
                shift = int(labels.dim() > 1 and math.isnan(loss(first, items)))
                # transformers does not see a causal model under the compiler's wrapper, and smooths labels unshifted.
                unlike = shift and trainer.label_smoother is not None and trainer.args.torch_compile
                classes = getattr(getattr(trainer.model, "config", None), "num_labels", 0)
                tokens, rough = getattr(trainer.model, "main_input_name", "input_ids"), _roughness(trainer)
                tried = partial(_adds_up, partial(loss, items=items), labels, inputs, tokens, shift, classes, rough)
                if not unlike and all(all_gather(tried())):
                    # A micro-batch without labels has rows of zeros, whatever their scale.
                    return lambda inputs, _: (inputs["labels"][..., shift:] != IGNORED).sum().clamp(min=1)
        except (IndexError, RuntimeError) as error:  # a loss to which -100 is a class like others
            if isinstance(error, torch.OutOfMemoryError):
                raise
            cause = error
    raise UnsupportedError(
        f"the loss of {name} is neither a sum over labels divided by num_items_in_batch nor a mean over the labels of "
        f"a micro-batch that are not {IGNORED} (an auxiliary loss, a weighted mean, smoothing with torch_compile?). If "
        "it is a sum over samples divided by n, pass log_training(..., scale=lambda batch, num_items: n)."
    ) from cause


@contextmanager
def _trials(trainer: Any, device: torch.device) -> Iterator[None]:
    """Let a trainer's loss be tried: in eval mode, without gradients, no trace left in random numbers or metrics."""
    training = trainer.model.training
    # TRL's trainers keep what goes through their loss.
    kept = {name: copy.deepcopy(vars(trainer)[name]) for name in ("_metrics",) if name in vars(trainer)}
    trainer.model.eval()
    try:
        devices = [device] if device.type == "cuda" else []
        with _replaced(trainer, **kept), torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        trainer.model.train(training)


@contextmanager
def _decoder_inputs(model: Any, inputs: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Note what an encoder-decoder makes of its labels for the decoder to read, which trial labels must not change."""
    made: dict[str, Tensor] = {}
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_decoder")
    if not decodes or {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        yield made
        return

    def note(_: Any, args: Any, options: Mapping[str, Any]) -> None:
        tokens = args[0] if args else options.get("input_ids")
        if isinstance(tokens, Tensor):
            made["decoder_input_ids"] = tokens

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield made
    finally:
        handle.remove()


def _adds_up(
    loss: Callable[..., Tensor],
    labels: Tensor,
    inputs: Mapping[str, Any],
    tokens: str,
    shift: int,
    classes: int,
    rough: float,
) -> bool:
    """Whether a loss is the plain mean over labels: the sum over all is that of its parts.

    Not so for a mean with weights, or of samples' own means. Terms without labels see no difference in parts of the
    labels; they do in parts of the samples that have unlike numbers of them, which are as exact as ``rough``.
    """

    def sums(trial: Trial, exact: float) -> bool:
        found = []
        for part, cut in trial:
            n, mean = int((part[..., shift:] != IGNORED).sum()), loss(part, **cut)
            found.append(n * float(mean) if n else 0.0)
            exact = max(exact, 4 * torch.finfo(mean.dtype).eps)  # a loss may be in half precision
        return math.isclose(found[0], found[1] + found[2], rel_tol=exact)

    # All trials, and one answer for all processes, which may hold other labels and run a sharded model together.
    fine = [sums(trial, TOLERANCE) for trial in _in_labels(labels, classes)]
    if not all(all_gather(all(fine))):
        return False
    try:
        trial = _in_samples(labels, inputs, tokens)
        if trial is not None:
            return sums(trial, rough)
        cause = None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of whatever the model says to a batch that is cut like this
        cause = error
    warnings.warn(
        "log_training takes the loss for a plain mean over labels; whether it has terms without labels (distillation, "
        "an auxiliary loss) could not be tried, since the first micro-batch cannot be cut into samples"
        f"{f' ({type(cause).__name__}: {cause})' if cause else ''}. If it has none, pass "
        "log_training(..., scale=lambda batch, num_items: the batch's number of labels), and nothing is tried.",
        stacklevel=user_line(),
    )
    return True


def _roughness(trainer: Any) -> float:
    """By how much losses of some samples may differ when others run beside them."""
    dtypes = {p.dtype for p in trainer.model.parameters() if p.dtype.is_floating_point}
    dtypes |= {torch.bfloat16} if trainer.args.bf16 else {torch.float16} if trainer.args.fp16 else set()
    eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize > 1), default=0.0)
    tf32 = 5e-3 if any(p.is_cuda for p in trainer.model.parameters()) else 0.0
    return max(TOLERANCE, 4 * eps, tf32)


def _in_labels(labels: Tensor, classes: int) -> Iterator[Trial]:
    """Labels of several classes where there are some, and two parts of them that differ in classes and in samples.

    All of the model's classes (or the first ones) have their turn, as each may have a weight.
    """
    counted = labels != IGNORED
    place = (counted.flatten().cumsum(0) - 1).view(labels.shape)
    row = torch.arange(len(labels), device=labels.device).view(-1, *[1] * (labels.dim() - 1))
    one = place % (3 + row) == 0
    made = [torch.where(place % 3 == 2, labels, place % 3)]
    # As often on all processes: a sharded model's forward passes are something that they do together.
    fewest = min(all_gather(int(counted.sum())))
    made += [(place + start) % classes for start in range(2, classes, max(1, fewest))][:TRIALS]
    for mixed in (m.where(counted, IGNORED) for m in made):
        yield (mixed, {}), (mixed.where(one, IGNORED), {}), (mixed.where(~one, IGNORED), {})


def _in_samples(labels: Tensor, inputs: Mapping[str, Any], tokens: str) -> Trial | None:
    """All of a batch, and two halves of its samples; the first has half of its labels. None if it cannot be cut.

    One sample alone gets a second beside it, with the same ``tokens`` (the name of the model's main input) turned by
    one place, so that terms without labels differ.
    """
    others = {k: v for k, v in inputs.items() if k != "labels" and not isinstance(v, int | float | str | None)}
    tensors = {k: v for k, v in others.items() if isinstance(v, Tensor) and v.dim() and len(v) == len(labels)}
    if len(tensors) < len(others):
        return None  # packed, or with parts of another batch axis, or lists
    if len(labels) == 1:
        turned = tensors | {tokens: tensors[tokens].roll(1, -1)}
        # Flash attention looks for packed documents in one row alone, by its position_ids.
        if "position_ids" in tensors or torch.equal(turned[tokens], tensors[tokens]):
            return None
        tensors = {k: torch.cat([v, turned[k]]) for k, v in tensors.items()}
        labels = torch.cat([labels, labels])
    cut = len(labels) // 2
    every = torch.arange(labels[0].numel(), device=labels.device).view(labels.shape[1:]) % 2 == 0
    thinned = torch.cat([labels[:cut].where(every, IGNORED), labels[cut:]]) if labels.dim() > 1 else labels
    halves = ((thinned[part], {k: v[part] for k, v in tensors.items()}) for part in (slice(0, cut), slice(cut, None)))
    return ((thinned, tensors), *halves)


def _refuse(trainer: Any) -> None:
    """Raise for ways of training whose rows could not be exact."""
    if trainer.args.n_gpu > 1:
        raise UnsupportedError(
            f"Trainer sees {trainer.args.n_gpu} devices from one process and would use nn.DataParallel, which has no "
            "rows per sample: start one process for each with torchrun, or set CUDA_VISIBLE_DEVICES to one."
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


@contextmanager
def _replaced(target: Any, **attributes: Any) -> Iterator[None]:
    own = vars(target)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)
