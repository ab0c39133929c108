"""What a trainer's loss is divided by, which nothing but the loss knows: it is tried on the first micro-batch."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from loghook.errors import UnsupportedError, warn
from loghook.processes import all_gather, process_rank

IGNORED = -100  # the label that transformers' losses leave out
TRIALS = 32  # of labels with other classes
TOLERANCE = 1e-5  # by which losses may differ that are taken for equal: less than an auxiliary loss adds

Count = Callable[[Mapping[str, Any], Any], Any]  # of the batch and num_items_in_batch
Entries = Mapping[str, Tensor]
Trial = tuple[Entries, Entries, Entries]  # of a batch, and of two parts that have each of its labels once between them


def is_multiplied(trainer: Any, inputs: Mapping[str, Any], num_items: Any) -> bool:
    """Whether the loss is times the processes. ``Trainer.compute_loss`` may do that, and one of the user's own too.

    It is tried with states that count one process. Of labels there may be none on any process, so that nothing is seen.
    """
    processes = trainer.accelerator.num_processes
    if processes == 1:
        return False
    with _without_trace(trainer, trainer.args.device):
        loss = float(trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=num_items))
        with replaced(PartialState(), num_processes=1), replaced(trainer.accelerator.state, num_processes=1):
            once = float(trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=num_items))
    ratios = [r for r in all_gather(loss / once if once else math.nan) if math.isfinite(r)]
    if ratios:
        return abs(ratios[0] - processes) < abs(ratios[0] - 1)
    means_to = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    return trainer.args.average_tokens_across_devices and means_to and num_items is not None


def trainer_divisor(trainer: Any, num_items: Any, *, multiplied: bool) -> float:
    """What Trainer divides the model's loss by: accumulation steps, unless it is scaled, over processes.

    transformers 5.2 to 5.5 tell accelerate of the steps too, which then divides once more.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and num_items is not None) or trainer.compute_loss_func is not None
    steps = 1 if scaled else trainer.current_gradient_accumulation_steps
    steps *= trainer.accelerator.gradient_accumulation_steps
    return steps / (trainer.accelerator.num_processes if multiplied else 1)


def find_count(trainer: Any, inputs: Mapping[str, Any], num_items: Any) -> Count:
    """Measure what the loss is divided by: ``num_items_in_batch``, or the micro-batch's own labels.

    A model that accepts ``num_items_in_batch`` need not use it (those for sequence classification do not), and only
    the loss knows whether it shifts the labels.
    """
    labels = inputs.get("labels")
    name = type(trainer.model).__name__
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        trained_on = f"{labels.dtype} labels" if isinstance(labels, Tensor) else "no labels"
        raise UnsupportedError(
            f"{name} trains on {trained_on}, and the items of a loss are counted for integer labels only: pass "
            "log_training(..., scale=lambda batch, num_items: n), with which the loss is a sum over samples."
        )
    cause = None
    with _without_trace(trainer, labels.device):
        decoder_inputs = _run_as_in_training(trainer, inputs, num_items)
        if not bool((labels != IGNORED).any()):
            labels = torch.zeros_like(labels)  # without any, all losses agree
        try:
            if count := _explain(_Loss(trainer, {**inputs, **decoder_inputs}, labels, num_items)):
                return count
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError) as error:  # a loss to which -100 is a class like others
            cause = error
    raise UnsupportedError(
        f"the loss of {name} is neither a sum over labels (all but {IGNORED}) divided by num_items_in_batch nor their "
        "mean (an auxiliary loss, a weighted mean, smoothing with torch_compile?): if it is a sum over samples divided "
        "by n, pass log_training(..., scale=lambda batch, num_items: n)."
    ) from cause


@dataclass(frozen=True)
class _Loss:
    """A trainer's loss of one micro-batch, to be run with other entries of the batch or for more items."""

    trainer: Any
    inputs: Mapping[str, Any]
    labels: Tensor  # the micro-batch's own
    num_items: Any  # Trainer's num_items_in_batch, or None

    def __call__(self, entries: Entries, times_items: int = 1) -> Tensor:
        num_items = None if self.num_items is None else times_items * self.num_items
        inputs = {**self.inputs, **entries}
        return self.trainer.compute_loss(self.trainer.model, inputs, num_items_in_batch=num_items)


def _explain(loss: _Loss) -> Count | None:
    """Return what the loss is divided by, or None if it is neither of the two that can be told."""
    if loss.num_items is not None:
        zeros = {"labels": torch.zeros_like(loss.labels)}
        once, twice = loss(zeros), loss(zeros, times_items=2)
        if math.isclose(once, 2 * twice, rel_tol=TOLERANCE):
            return lambda _, num_items: num_items
        if not math.isclose(once, twice, rel_tol=TOLERANCE):
            return None
    if not _is_nothing(loss({"labels": torch.full_like(loss.labels, IGNORED)})):
        return None  # it divides by something else than the number of labels
    shift = _shift(loss)
    # transformers does not see a causal model under the compiler's wrapper, and smooths labels unshifted.
    if shift and loss.trainer.label_smoother is not None and loss.trainer.args.torch_compile:
        return None
    if not _counts_labels_alike(loss, shift) or not _has_only_terms_of_labels(loss, shift):
        return None
    # A micro-batch without labels has rows of zeros, whatever their scale.
    return lambda inputs, _: _number_of_labels(inputs["labels"], shift).clamp(min=1)


def _number_of_labels(labels: Tensor, shift: int) -> Tensor:
    return (labels[..., shift:] != IGNORED).sum()


def _is_nothing(loss: Tensor) -> bool:
    """Whether a mean is over no labels: 0 / 0, which is not a number; or 0, of losses that divide by 1 at least."""
    return not float(loss) or math.isnan(loss)


def _shift(loss: _Loss) -> int:
    """How many labels at a sample's front are not counted: with only the first, a loss that shifts has none."""
    only_first = torch.full_like(loss.labels, IGNORED)
    only_first[..., 0] = 0
    return int(loss.labels.dim() > 1 and _is_nothing(loss({"labels": only_first})))


def _adds_up(loss: _Loss, trial: Trial, shift: int, tolerance: float) -> bool:
    """Whether the sum over all labels, the loss times their number, is the sum over those of both parts."""
    sums = []
    for entries in trial:
        number, mean = int(_number_of_labels(entries["labels"], shift)), loss(entries)
        sums.append(number * float(mean) if number else 0.0)
        tolerance = max(tolerance, 4 * torch.finfo(mean.dtype).eps)  # a loss may be in half precision
    return math.isclose(sums[0], sums[1] + sums[2], rel_tol=tolerance)


def _counts_labels_alike(loss: _Loss, shift: int) -> bool:
    """Whether all labels have the same weight: a weighted mean, or one of samples' own means, does not add up."""
    classes = getattr(getattr(loss.trainer.model, "config", None), "num_labels", 0)
    # All trials, and one answer for all processes, which may hold other labels and run a sharded model together.
    add_up = [_adds_up(loss, trial, shift, TOLERANCE) for trial in label_trials(loss.labels, classes)]
    return all(all_gather(all(add_up)))


def label_trials(labels: Tensor, classes: int) -> Iterator[Trial]:
    """Labels of several classes where there are some, cut into parts that differ in classes and in samples.

    All of the model's classes (or the first ones) have their turn, as each may have a weight.
    """
    counted = labels != IGNORED
    place = (counted.flatten().cumsum(0) - 1).view(labels.shape)
    row = torch.arange(len(labels), device=labels.device).view(-1, *[1] * (labels.dim() - 1))
    # A share that differs from sample to sample, and from process to process: some losses count the labels of all.
    in_first = place % ((3 + row) * (1 + process_rank() % 4)) == 0
    mixtures = [torch.where(place % 3 == 2, labels, place % 3)]
    # As often on all processes: a sharded model's forward passes are something that they do together.
    fewest = min(all_gather(int(counted.sum())))
    mixtures += [(place + start) % classes for start in range(2, classes, max(1, fewest))][:TRIALS]
    for mixture in mixtures:
        whole, first, second = (mixture.where(counted & part, IGNORED) for part in (counted, in_first, ~in_first))
        yield {"labels": whole}, {"labels": first}, {"labels": second}


def _has_only_terms_of_labels(loss: _Loss, shift: int) -> bool:
    """Whether a loss has no terms without labels, such as an auxiliary loss.

    They are the same for all parts of the labels. They do not add up over parts of the samples that have unlike numbers
    of labels.
    """
    adds_up, cause = None, None
    try:
        if (trial := _sample_trial(loss)) is not None:
            adds_up = _adds_up(loss, trial, shift, _roughness(loss.trainer))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of whatever the model says to a batch that is cut like this
        cause = error
    if adds_up is None:
        warn(
            "whether the loss has terms without labels (distillation, an auxiliary loss) could not be tried, since the "
            f"first micro-batch cannot be cut into samples{f' ({type(cause).__name__}: {cause})' if cause else ''}. If "
            "it has none, pass log_training(..., scale=lambda batch, num_items: the batch's number of labels)."
        )
    return all(all_gather(adds_up is not False))


def _sample_trial(loss: _Loss) -> Trial | None:
    """All of a batch, and two halves of its samples; the first has half of its labels. None if it cannot be cut.

    One sample alone gets a second beside it, with the same tokens turned by one place, so that terms without labels
    differ.
    """
    # Numbers and strings hold for all samples.
    entries = {k: v for k, v in loss.inputs.items() if not isinstance(v, int | float | str | None)}
    entries["labels"] = labels = loss.labels
    if not all(isinstance(v, Tensor) and v.dim() and len(v) == len(labels) for v in entries.values()):
        return None  # packed, or with parts of another batch axis, or lists
    if len(labels) == 1:
        name = getattr(loss.trainer.model, "main_input_name", "input_ids")
        turned = entries[name].roll(1, -1)
        # Flash attention looks for packed documents in one row alone, by its position_ids.
        if "position_ids" in entries or torch.equal(turned, entries[name]):
            return None
        entries = {k: torch.cat([v, turned if k == name else v]) for k, v in entries.items()}
    half = len(entries["labels"]) // 2
    if labels.dim() > 1:
        every_other = torch.arange(labels[0].numel(), device=labels.device).view(labels.shape[1:]) % 2 == 0
        thinned = entries["labels"][:half].where(every_other, IGNORED)
        entries["labels"] = torch.cat([thinned, entries["labels"][half:]])
    first, second = ({k: v[rows] for k, v in entries.items()} for rows in (slice(half), slice(half, None)))
    return entries, first, second


def _roughness(trainer: Any) -> float:
    """By how much losses of some samples may differ when others run beside them."""
    dtypes = {p.dtype for p in trainer.model.parameters() if p.dtype.is_floating_point}
    dtypes |= {torch.bfloat16} if trainer.args.bf16 else {torch.float16} if trainer.args.fp16 else set()
    eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize > 1), default=0.0)
    tf32 = 5e-3 if any(p.is_cuda for p in trainer.model.parameters()) else 0.0
    return max(TOLERANCE, 4 * eps, tf32)


@contextmanager
def _without_trace(trainer: Any, device: torch.device) -> Iterator[None]:
    """Let a trainer's loss be tried: in eval mode, without gradients, no trace left in random numbers or metrics."""
    training = trainer.model.training
    # TRL's trainers keep what goes through their loss.
    kept = {"_metrics": copy.deepcopy(trainer._metrics)} if "_metrics" in vars(trainer) else {}
    trainer.model.eval()
    try:
        devices = [device] if device.type == "cuda" else []
        with replaced(trainer, **kept), torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        trainer.model.train(training)


def _run_as_in_training(trainer: Any, inputs: Mapping[str, Any], num_items: Any) -> dict[str, Tensor]:
    """Run the loss, so that what fails in training fails here, and return inputs that trial labels must not change.

    They are what an encoder-decoder makes of its labels for the decoder to read.
    """
    model = trainer.model
    decoder_inputs: dict[str, Tensor] = {}

    def note(_: Any, args: Any, options: Mapping[str, Any]) -> None:
        tokens = args[0] if args else options.get("input_ids")
        if isinstance(tokens, Tensor):
            decoder_inputs["decoder_input_ids"] = tokens

    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_decoder")
    makes = decodes and not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys()
    with model.get_decoder().register_forward_pre_hook(note, with_kwargs=True) if makes else nullcontext():
        trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_items)
    return decoder_inputs


@contextmanager
def replaced(target: Any, **attributes: Any) -> Iterator[None]:
    """Give an object other attributes of its own for a while."""
    current = vars(target)
    before = {name: current[name] for name in attributes if name in current}
    current.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            current.pop(name, None)
        current.update(before)
