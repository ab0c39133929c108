"""``Probe``: what ``loghook.check`` compares, the rows of a batch and of each of its samples (or documents) alone."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from loghook.capture.batch import Given, Segments, documents, samples
from loghook.capture.config import Recipe
from loghook.capture.frozen import fsdp1_modules, requiring_grad, sharded_groups, under_zero
from loghook.capture.hooked import Hooked
from loghook.capture.layers import Layer
from loghook.capture.select import Watch
from loghook.errors import BatchError, UnsupportedError
from loghook.processes import all_gather

LossFunction = Callable[[nn.Module, Any], Tensor]


class Found(NamedTuple):
    rows: dict[str, Tensor]  # by layer, (B, k_out, k_in) in float64
    inputs: dict[str, Tensor]  # by layer, summed over tokens: (B, channels) in float64
    loss: float
    silent: set[str]  # layers that delivered nothing


class Alone(NamedTuple):
    """What each sample or document gave alone."""

    rows: dict[str, Tensor]  # by layer, from ``parameter.grad``, (B, k_out, k_in) in float64
    hooked: dict[str, Tensor]  # the same, as hooks captured it
    losses: list[float]
    # Layers of which autograd gives no gradient (quantised, sharded or parametrised weights, weights tied to another
    # module): their rows are those that hooks captured, so that samples are at least compared with themselves alone.
    captured: set[str]


class Probe(Hooked):
    """Hooks that only look, and write nothing."""

    def __init__(
        self,
        model: nn.Module,
        watch: Watch,
        rank: int,
        loss_fn: LossFunction,
        batch: Any,
        segments: Segments | Callable[[Any], Segments] | None = None,
        alone: Sequence[Any] | None = None,
        scale: Callable[[Any], float | Tensor] | None = None,
    ) -> None:
        super().__init__(Recipe(rank=rank))
        self.model, self._loss_fn, self._batch, self.scale = model, loss_fn, batch, scale
        of_batch = segments if callable(segments) else lambda _: segments
        self._segments, self.unit = of_batch(batch), "sample"
        # Each sample or document as a batch of its own, and its segments there.
        self._alone: Sequence[tuple[Any, Segments | None]]
        if alone is None and self._segments is not None and not isinstance(self._segments, Mapping):
            self._alone, self.unit = documents(batch, self._segments), "document"
        else:
            self._alone = [(own, of_batch(own)) for own in (samples(batch) if alone is None else alone)]
        # Whether a forward pass is something that all processes do together, and so equally often.
        self.sharded = bool(fsdp1_modules(model)) or any(type(p).__name__ == "DTensor" for p in model.parameters())
        sizes = all_gather(len(self._alone)) if self.sharded else [len(self._alone)]
        if min(sizes) < 2:
            raise BatchError(f"check got a batch of one {self.unit}: pass at least two.")
        if len(set(sizes)) > 1:
            raise BatchError(
                f"the processes check batches of {sizes} {self.unit}s with a model that they hold together: give all "
                "of them as many, or check the model before it is sharded."
            )
        self.watched, self.coverage = self._select(model, watch)
        self._hook(model, self.watched)

    def together(self, *, advance: bool = False, synchronised: bool = True) -> Found:
        """Run the batch; ``advance`` draws other random numbers, ``synchronised`` needs all processes of DDP."""
        with _random_state(advance=advance), nullcontext() if synchronised else _unsynchronised(self.model):
            return self._run(self._batch, len(self._alone), self._segments)

    def each_alone(self) -> Iterator[Found]:
        """Run each sample or document alone, from the same random numbers; ``parameter.grad`` is then its own."""
        for sample, segments in self._alone:
            for p in self.model.parameters():
                p.grad = None
            with _random_state(), _unsynchronised(self.model):
                captured = self._run(sample, 1, segments)
            yield captured

    def gradients_alone(self) -> Alone:
        """Projected gradients of each sample or document alone, as autograd has them and as hooks capture them."""
        captured: set[str] = set()
        rows: dict[str, list[Tensor]] = {layer.name: [] for layer in self.watched}
        hooked: dict[str, list[Tensor]] = {layer.name: [] for layer in self.watched}
        losses = []
        parameters = [p for layer in self.watched for p in layer.module.parameters(recurse=False)]
        # In how many modules a parameter is, watched or not.
        uses = Counter(id(p) for module in self.model.modules() for p in module.parameters(recurse=False))
        with requiring_grad((p for p in parameters if p.is_floating_point()), True):
            for alone in self.each_alone():
                losses.append(alone.loss)
                for layer in self.watched:
                    own = _from_parameters(layer, uses)
                    captured |= {layer.name} if own is None else set()
                    hooked[layer.name].append(alone.rows[layer.name][0])
                    rows[layer.name].append(alone.rows[layer.name][0] if own is None else own)
        stacked, caught = ({name: torch.stack(values) for name, values in of.items()} for of in (rows, hooked))
        return Alone(stacked, caught, losses, captured)

    @contextmanager
    def rounded_otherwise(self) -> Iterator[None]:
        """Let each watched layer's output differ by what rounding may change in it, as another batch size would."""

        def disturb(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            size = y.detach().flatten(1).square().mean(1).sqrt().view(-1, *[1] * (y.dim() - 1))
            return y + torch.finfo(y.dtype).eps * size * torch.randn_like(y)

        handles = [layer.module.register_forward_hook(disturb) for layer in self.watched]
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, batch: Any, size: int, segments: Any) -> Found:
        scale, given = 1.0 if self.scale is None else self.scale(batch), Given(segments=segments)
        if isinstance(scale, Tensor) and scale.numel() == 1:
            scale = scale.reshape(())
        elif isinstance(scale, Tensor):  # one for each row, which a batch of one never has
            scale, given = 1.0, Given(segments=segments, scale=scale)
        with _same_buffers(self.model), self._capture(size, given, self._rows(logs=False)) as captured:
            # Of the loss, so that it is in the gradients of parameters too.
            loss = self._loss_fn(self.model, batch) * scale
            loss.backward()
        rows, kinds = captured[0].rows.cpu().double(), self._layout.kinds
        shapes = {spec.name: (spec.k_out, spec.k_in) for spec in self.specs}
        return Found(
            {name: rows[:, kinds["gradients"][name]].unflatten(1, shape) for name, shape in shapes.items()},
            {name: rows[:, columns] for name, columns in kinds["activations"].items()},
            float(loss.detach()),
            set(captured[0].asleep),
        )


def _from_parameters(layer: Layer, uses: Counter[int]) -> Tensor | None:
    """The row of one sample from autograd's own gradient, (k_out, k_in) in float64, or None where it has none."""
    module, spec = layer.module, layer.spec
    names = ("weight", "bias")[: 1 + spec.bias]
    if any(is_parametrized(module, name) for name in names):  # reading them would make them anew
        return None
    parameters: list[Any] = [getattr(module, name, None) for name in names]
    if not all(isinstance(p, Tensor) and p.is_leaf and p.grad is not None for p in parameters):
        return None
    weight = parameters[0]
    # FSDP1's flat one holds, on a process alone, all values in one dimension.
    flat = weight.dim() == 1 and spec.in_features > 1 and spec.out_features > 1
    if flat or uses[id(weight)] > 1 or any(type(p).__name__ == "DTensor" for p in parameters):
        return None
    if weight.numel() != spec.in_features * spec.out_features:  # quantised, or a shard
        return None
    dense, *bias = ((p.grad.to_dense() if p.grad.is_sparse else p.grad).cpu().double() for p in parameters)
    gradient = layer.adapter.gradient(module, dense, *(bias or [None]))
    p_in, p_out = (None if s.matrix is None else s.matrix.cpu().double() * s.gain for s in layer.sides)
    gradient = gradient if p_out is None else p_out @ gradient
    return gradient if p_in is None else gradient @ p_in.T


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Give a model its gradients back, and keep optimisers that live in hooks from training it."""
    _require_no_deepspeed(model)
    _require_no_waiting(model)
    gradients = [(p, p.grad) for p in model.parameters()]
    # DDP may have them in buffers of its own, which backward fills anew.
    views = any(getattr(module, "gradient_as_bucket_view", False) for module in model.modules())
    values = [None if p.grad is None or not views else p.grad.clone() for p, _ in gradients]
    hooks = [(table, dict(table)) for p in model.parameters() if (table := p._post_accumulate_grad_hooks)]
    for p, _ in gradients:
        p.grad = None  # backward adds in place to what is there
    for table, _ in hooks:
        table.clear()
    try:
        yield
    finally:
        for (p, gradient), value in zip(gradients, values, strict=True):
            p.grad = gradient
            if gradient is not None and value is not None:
                gradient.copy_(value)
        for table, before in hooks:
            table.update(before)


def _require_no_deepspeed(model: nn.Module) -> None:
    """Raise where DeepSpeed has a hand in backward: it fails for plain losses, or makes training another one."""
    if under_zero(model) or any(c.__name__ == "DeepSpeedEngine" for m in model.modules() for c in type(m).__mro__):
        raise UnsupportedError(
            "DeepSpeed takes gradients away before they can be compared: check before deepspeed.initialize()."
        )


def _require_no_waiting(model: nn.Module) -> None:
    """Raise where FSDP keeps gradients that wait for others, out of reach; backward would add to them."""
    waits = any(
        not module._sync_gradients or any(p.grad is not None for p in module.parameters())
        for module in fsdp1_modules(model)
    )
    for _, group in sharded_groups(model):
        waits |= not group.reduce_grads
        for p in group.fsdp_params:
            unsharded = getattr(p, "_unsharded_param", None)
            waits |= p.unsharded_accumulated_grad is not None or getattr(unsharded, "grad", None) is not None
    if waits:
        raise UnsupportedError(
            "FSDP holds gradients that wait to be reduced, or for a step: check before a step's first micro-batch."
        )


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Put buffers back that a forward pass moves (spectral_norm) or replaces, so that the next begins where it did."""
    tables = [(module._buffers, dict(module._buffers)) for module in model.modules() if module._buffers]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta and b.layout is torch.strided]
    try:
        yield
    finally:
        for table, before in tables:
            table.update(before)
        with torch.no_grad():
            for b, value in buffers:
                if not torch.equal(b, value):
                    b.copy_(value)


@contextmanager
def _unsynchronised(model: nn.Module) -> Iterator[None]:
    """Keep gradients of this process to itself: DDP would average them over all processes."""
    composable = sys.modules.get("torch.distributed._composable.replicate")  # imported by those who use it
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                stack.enter_context(module.no_sync())
            elif composable is not None and (state := composable.replicate.state(module)) is not None:
                stack.callback(setattr, state, "_no_sync", state._no_sync)  # it has no context manager for that
                state._no_sync = True
        yield


@contextmanager
def _random_state(*, advance: bool = False) -> Iterator[None]:
    """Run something from the same random state each time, and leave the state as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if advance:
            torch.manual_seed(torch.initial_seed() + 1)
        yield
