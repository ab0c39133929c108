"""What a block makes of its layers' calls: rows as a log has them, rows of updates, or a job on whole gradients.

A job says how a layer's inputs are projected, what shapes its leaves have, what it makes of a call and takes besides,
and what becomes of what arrived. Where nothing is compiled, calls may wait for others in a ``Place``:

- Rows of several layers are formed together: one product of many matrices in place of many small products. A layer's
  own are so small that waking the threads, or a launch on a GPU, costs more than the arithmetic. A compiled backward
  has no use for this: it fuses by itself.
- What is no sum over a layer's calls is made of all of them at once.

Shape suffixes as in ``loghook.project.outer``; n layers.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from loghook.capture.adapters import Adapter
from loghook.capture.layers import Layer, Leaves, Slots, deliver
from loghook.capture.work import Call, Held, sum_tokens, wide_context
from loghook.project.linear import UNITS
from loghook.project.projection import Side

Result = TypeVar("Result")


LARGER = 8  # times as much may wait on a GPU, which has the memory, and where each launch costs the loop's time


@dataclass(eq=False)
class Block:
    """What the layers of a block share, and what their hooks tell one another."""

    job: "Job[Any]"
    scale: float | Tensor  # what gradients are multiplied by: a number, or (B,)
    kept: Tensor | None  # (B,) bool, which samples count in sums over them (repeats do not), or None: all
    passes: set[int] = field(default_factory=set)  # autograd's numbers of outermost backward passes that delivered
    outermost: dict[int, int] = field(default_factory=dict)  # {a backward pass in which layers ran: the one around it}
    restarted: bool = False  # whether a layer ran forward after a delivery, outside of backward passes
    # {part of the model, such as "layers.3": how many tokens of the batch its layers have seen, experts left out}, or
    # None where no experts are watched
    seen: dict[str, set[int]] | None = None


class Shared(NamedTuple):
    """An input, with what tells it from others and by what it was projected, and the result."""

    x: Tensor  # kept alive, so that its address is its own
    version: int
    precision: torch.dtype | None  # autocast's
    adapter: Adapter
    side: Side
    projected: Tensor

    def serves(self, x: Tensor, precision: torch.dtype | None, adapter: Adapter, side: Side) -> bool:
        """Whether this is the same tensor, as it was then, projected in the same way."""
        if self.side is not side or self.adapter is not adapter or self.precision != precision:
            return False
        mine = self.x
        if self.version != x._version or mine.data_ptr() != x.data_ptr():
            return False
        return mine is x or (
            mine.shape == x.shape
            and mine.stride() == x.stride()
            and mine.dtype == x.dtype
            and mine.is_neg() == x.is_neg()
        )


@dataclass(eq=False)
class Place:
    """What the layers of a block share that compute on one device and in one dtype, and their calls that wait."""

    block: Block
    device: torch.device
    dtype: torch.dtype
    _moved: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _waiting: dict[Hashable, list[tuple[Slots, Call]]] = field(default_factory=dict)
    _bytes: int = 0  # how many wait
    # {address: stream} of a GPU in which calls were taken; the address alone is had quickly
    _streams: dict[int, torch.cuda.Stream] = field(default_factory=dict)
    _zeros: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # by shape
    shared: Shared | None = None  # the last input that layers may share

    def __post_init__(self) -> None:
        self.zero = torch.zeros((), device=self.device, dtype=self.dtype)
        with torch.inference_mode(False):  # where a graph has no nodes
            self.anchor = torch.zeros((), device=self.device, dtype=self.dtype, requires_grad=True)
            self.anchored = get_gradient_edge(self.anchor).node
        if self.device.type == "cuda":
            UNITS.ask()

    def to(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor on the device; from another one than the CPU that may wait."""
        key = id(t), dtype or t.dtype
        if key not in self._moved:
            source = t
            if t.device.type == "cpu" and self.device.type == "cuda":
                source = t.to(dtype or t.dtype).pin_memory()
            # The tensor as well, so that its id stays its own.
            self._moved[key] = t, source.to(self.device, dtype, non_blocking=source is not t)
        return self._moved[key][1]

    def leaf(self, *shape: int) -> Tensor:
        """A leaf. Nobody reads it, so that one stored value serves for all of them."""
        if shape not in self._zeros:
            self._zeros[shape] = self.zero.expand(shape)
        return self._zeros[shape].detach().requires_grad_()

    @cached_property
    def scale_here(self) -> Tensor:
        """The scale as a number, or (B, 1, 1); filled there, since to copy it waits for what the device has to do."""
        scale = self.block.scale
        if not isinstance(scale, Tensor):
            return torch.full((), scale, device=self.device, dtype=self.dtype)
        return (scale[:, None, None] if scale.dim() else scale).to(self.device, self.dtype)

    def take(self, slots: Slots, call: Call, activations: Tensor | None) -> None:
        """Deliver what the job makes of a layer's call, or let it wait for those that have an equal key."""
        job, leaves = self.block.job, slots.leaves
        if self.device.type == "cuda" and not torch.compiler.is_compiling():  # compiled, backward has one stream
            address = torch._C._cuda_getCurrentRawStream(self.zero.get_device())
            if address not in self._streams:
                self._streams[address] = torch.cuda.current_stream(self.device)
        waits = job.defer(slots, call)
        if waits is None:
            made = job.work(call, slots.held, self.dtype, leaves.moments is not None)
            outputs = None
            if leaves.outputs is not None:
                outputs = sum_tokens(call.g_BSO.to(self.dtype), call.weight_BS, call.documents_DL)
            for leaf, value in zip(leaves[:4], (*made, activations, outputs), strict=True):
                if leaf is not None and value is not None:
                    deliver(leaf, value)
            slots.delivered_calls += 1
            slots.count()  # only now: the program may go on after an error
            return
        alike, call = waits
        slots.waited += 1
        slots.count()
        self._waiting.setdefault(alike, []).append((slots, call))
        self._bytes += call.x.nbytes + call.g_BSO.nbytes
        if self._bytes >= job.limit * (1 if self.device.type == "cpu" else LARGER):
            self.form()

    def _meet(self) -> None:
        """Let a GPU's current stream and those in which calls were taken wait for one another.

        Autograd lets it wait only for those of the parameters that are trained.
        """
        if self._streams:
            current = torch.cuda.current_stream(self.device)
            for stream in self._streams.values():
                if stream != current:
                    current.wait_stream(stream)
                    stream.wait_stream(current)

    def close(self) -> None:
        """Let go of tensors, as ``Slots.close`` does."""
        self._meet()  # others must not write to what it still reads
        self._moved, self._waiting = {}, {}
        self.shared = None

    def form(self) -> None:
        """Make what is to be made of all calls that wait; of those where that fails it can be tried again."""
        self._meet()
        self._bytes = 0
        for alike in list(self._waiting):
            with torch.no_grad(), wide_context(self.device.type):
                self.block.job.form(self._waiting[alike])
            del self._waiting[alike]


KINDS: "dict[str, type[Job[Any]]]" = {}  # by name, since a compiled backward can hold names and tensors only


class Job(Generic[Result]):
    kind: ClassVar[str]
    limit: float = float("inf")  # how many bytes may wait
    at_once = False  # whether what it makes of a layer's gradient is no sum over the layer's calls
    sums = True  # whether it adds samples up, so that each must count alike
    projects = False  # whether it uses the layers' projections

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    @staticmethod
    def work(call: Call, held: Held, wide: torch.dtype, moments: bool) -> tuple[Tensor, Tensor | None]:
        """Make of a call, in ``wide``, what goes to the main leaf, and its moments if they are asked for.

        A pure function, which the compiler traces; ``held`` is what ``open`` returned.
        """
        raise NotImplementedError

    def open(self, layer: Layer, place: Place) -> tuple[Side, Held]:
        """The projection of the layer's inputs in a block, and what the work takes besides calls."""
        return Side(layer.input_side.width, None), ()

    def leaves(self, layer: Layer, size: int, leaf: Callable[..., Tensor]) -> Leaves:
        """Make the leaves of a block of ``size`` rows; ``leaf`` makes one of a shape."""
        raise NotImplementedError

    def defer(self, slots: Slots, call: Call) -> tuple[Hashable, Call] | None:
        """A key that those calls share that are formed together, and what is to wait; None: it is made at once."""
        raise NotImplementedError

    def form(self, group: Sequence[tuple[Slots, Call]]) -> None:
        """Fill the leaves with what is made of calls that waited."""
        raise NotImplementedError

    def collect(self, opened: Sequence[Slots], scale: float | Tensor) -> Result:
        """Make the block's result of what its layers' leaves received."""
        raise NotImplementedError


def scale_for(rows: Tensor, scale: float | Tensor) -> float | Tensor:
    """The scale for rows: a number of the CPU may multiply them anywhere, nothing else of another device may."""
    if not isinstance(scale, Tensor) or (scale.device.type == "cpu" and not scale.dim()):
        return scale
    return scale[:, None].to(rows) if scale.dim() else scale.to(rows.device)
