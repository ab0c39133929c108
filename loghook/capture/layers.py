"""A watched layer, and the leaves that wait for its rows while a block is open."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from loghook.capture.adapters import Adapter
from loghook.capture.segments import Tokens
from loghook.capture.work import Held
from loghook.errors import UnsupportedError
from loghook.log.format import LayerSpec
from loghook.project.projection import Side

if TYPE_CHECKING:
    from loghook.capture.jobs import Place
    from loghook.capture.optimizer import Moments


@dataclass(eq=False)
class Layer:
    """A watched layer: its module, and how it is read."""

    spec: LayerSpec
    module: nn.Module
    adapter: Adapter
    input_side: Side
    output_side: Side
    moments: "Moments | None" = None  # where its optimiser's moments are, if rows are of an update
    slots: "Slots | None" = None  # what waits for its rows while a block is open
    fired: bool = False  # its forward ran in this block
    computes_in: torch.dtype | None = None  # dtype of its last output

    def __post_init__(self) -> None:
        # The axis of samples: in a sequence-first model too it is the first of convolutions and flattened layers.
        self.batch_dim = 0 if self.spec.flattened or self.adapter.channel_dim == 1 else self.spec.batch_dim

    @property
    def name(self) -> str:
        return self.spec.name

    @cached_property
    def part(self) -> str:
        """The part of the model that it is in, such as "layers.3"; of one without numbered parts its own name."""
        numbered = re.search(r"\.\d+(?=\.)", self.name)
        return self.name[: numbered.end()] if numbered else self.name

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.input_side, self.output_side

    @property
    def gain(self) -> float:
        """What the row is multiplied by, so that inner products are unbiased."""
        return self.input_side.gain * self.output_side.gain

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where the layer computes, and the dtype in which its rows are summed: float32, or float64."""
        tensor = self.module._parameters.get("weight")  # for most layers, and quicker
        if tensor is None:
            tensor = next(self.module.parameters(), None)
        if tensor is None:
            # FSDP1 may leave a layer its weight as a plain attribute, a view into the flat parameter. Others' are not
            # read: a parametrized weight is made anew each time, and spectral_norm then changes.
            tensor = getattr(self.module, "weight", None)
        if tensor is None:
            return torch.device("cpu"), torch.float32
        mesh = getattr(tensor, "device_mesh", None)
        device = _execution_device(self.module) if tensor.is_meta else tensor.device
        if mesh is not None and mesh.device_type != device.type:  # FSDP2's offloaded shards: gathered elsewhere
            device = torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
        return device, torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _execution_device(module: nn.Module) -> torch.device:
    """Where accelerate lets a layer compute whose weights it fetches for each forward."""
    hook = getattr(module, "_hf_hook", None)
    for step in getattr(hook, "hooks", (hook,)):
        device = getattr(step, "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise UnsupportedError(f"a watched {type(module).__name__} has weights on the meta device: load the model first.")


class Leaves(NamedTuple):
    """Where arrives what is made of a layer's calls: the ``.grad`` of each; None where nobody asks for it."""

    main: Tensor  # rows (B, k_out * k_in), or what the job makes instead
    moments: Tensor | None = None  # see ``sum_moments``
    activations: Tensor | None = None  # inputs summed over tokens, (B, channels + 1): the last value counts tokens
    outputs: Tensor | None = None  # the same of output gradients, (B, O + 1)
    calls: Tensor | None = None  # (1,) how many calls delivered that did not wait

    def clear(self) -> None:
        for leaf in self:
            if leaf is not None:
                leaf.grad = None


def deliver(leaf: Tensor, value: Tensor) -> None:
    """Do what autograd does with a leaf's gradient."""
    before = leaf.grad
    leaf.grad = value if before is None else before + value


def arrived(leaf: Tensor) -> Tensor:
    """What a leaf received: zeros if nothing."""
    value = leaf.grad
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if value is None else value


@dataclass(eq=False)
class Slots:
    """One layer in one block: its leaves, what its hook has to know, and what hook and tap count.

    A row is of one loss, so that a layer may deliver in one backward pass alone. Autograd numbers these, but a
    reentrant checkpoint starts passes of its own inside one: its layers run without a graph first, run again inside the
    outer pass, and deliver in the inner one. A call therefore keeps the outermost pass that it ran in, and counts for
    it.
    """

    layer: Layer
    place: "Place"  # where it computes
    leaves: Leaves
    input_side: Side  # the projection of the layer's inputs in this block
    held: Held  # what the job takes besides
    tokens: Tokens
    # an input that was projected before the layer's forward, its version, and the result
    early: tuple[Tensor, int, Tensor] | None = None
    misfit: Exception | None = None  # what is wrong with a call that has no rows
    ran: int = 0  # forward, with a graph, outside of backward passes
    quiet: int = 0  # forward, without a graph, as it does first in a reentrant checkpoint
    quiet_in: int = -1  # autograd's number of the backward pass in which it last did, or -1
    ran_in: int = -1  # the outermost backward pass in which it last ran with a graph, or -1
    passes: set[int] = field(default_factory=set)  # outermost backward passes that delivered
    waited: int = 0  # calls that waited for others
    delivered_calls: int = 0  # calls that delivered at once, where nothing is compiled
    closed: bool = False  # whether the block is over
    stale: bool = False  # whether a backward pass in this block delivered to the layer in an earlier one

    def run(self, *, graph: bool) -> None:
        """Note that the layer runs forward."""
        block, backward = self.place.block, torch._C._current_graph_task_id()
        if backward == -1:  # a call of the program's own, of which nothing that ran before is a part
            self.quiet_in = self.ran_in = -1
        else:  # a checkpoint recomputes: what runs in an inner pass ran before in the one around it
            around = self.ran_in if self.quiet_in == -1 else self.quiet_in
            block.outermost.setdefault(backward, block.outermost.get(around, backward))
        if not graph:
            self.quiet, self.quiet_in = self.quiet + 1, backward
        elif backward == -1:
            self.ran += 1
            block.restarted |= bool(block.passes)
        elif self.quiet:  # else it is a loss of its own that the program computes in a hook
            self.ran_in = block.outermost[backward]

    def count(self, leaf: Tensor | None = None) -> None:
        """Note that the backward pass that is under way delivers, to a leaf where it is compiled."""
        if self.closed and self.layer.slots is not None:
            self.layer.slots.stale = True
        backward = torch._C._current_graph_task_id()
        outermost = self.place.block.outermost.get(backward, backward)
        self.passes.add(outermost)
        self.place.block.passes.add(outermost)
        self.quiet_in = self.ran_in = -1

    @property
    def delivered(self) -> bool:
        return bool(self.passes)

    @property
    def several_calls(self) -> bool:
        """Whether there may be several to one backward pass."""
        return self.ran + self.quiet > 1

    def close(self) -> None:
        """Let go of tensors: the user may keep the loss, and with it the graph and what its nodes hold."""
        self.closed, self.held = True, ()
        self.early = self.misfit = None
        self.leaves.clear()
        del self.leaves  # a hook of one of them holds these slots
