"""A watched layer, and the leaves that wait for its rows while a block is open."""

import itertools
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


# The slots of open blocks by layer. They lie in a global of their own, because the compiler takes whatever it reaches
# through a module's hooks for fixed in size, and would compile the model anew for every batch size.
OPEN: "dict[int, Slots]" = {}


@dataclass(eq=False)
class Layer:
    """A watched layer: its module, and how it is read."""

    spec: LayerSpec
    module: nn.Module
    adapter: Adapter
    input_side: Side
    output_side: Side
    moments: "Moments | None" = None  # where its optimiser's moments are, if rows are of an update
    key: int = field(default_factory=itertools.count().__next__)  # its place in the table of open leaves
    fired: bool = False  # its forward ran in this block
    computes_in: torch.dtype | None = None  # dtype of its last output

    @property
    def name(self) -> str:
        return self.spec.name

    @cached_property
    def part(self) -> str:
        """The part of the model that it is in, such as "layers.3"; of one without numbered parts its own name."""
        numbered = re.search(r"\.\d+(?=\.)", self.name)
        return self.name[: numbered.end()] if numbered else self.name

    @property
    def batch_dim(self) -> int:
        """The axis of samples: in a sequence-first model too it is the first of convolutions and flattened layers."""
        return 0 if self.spec.flattened or self.adapter.channel_dim == 1 else self.spec.batch_dim

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.input_side, self.output_side

    @property
    def gain(self) -> float:
        """What the row is multiplied by, so that inner products are unbiased."""
        return self.input_side.gain * self.output_side.gain

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where the layer computes, and the dtype in which its rows are summed: float32, or float64."""
        tensor: Tensor | None = next(self.module.parameters(), None)
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

    main: Tensor  # rows (B, k_out, k_in), or what the job makes instead
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
    leaf.grad = value if leaf.grad is None else leaf.grad + value


def arrived(leaf: Tensor) -> Tensor:
    """What a leaf received: zeros if nothing."""
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if leaf.grad is None else leaf.grad


@dataclass(eq=False)
class Slots:
    """One layer in one block: its leaves, what its hook has to know, and what hook and tap count.

    What the cases count, n being the number of checkpoints around one layer, and how often it then may deliver:

        case                                     ran  quiet  recomputed  deliveries
        eager, once or several times             1..      0           0           1
        compiled, where hooks count nothing        0      0           0           1
        checkpoint without reentrance              1      0         0, 1           1
        n reentrant checkpoints                    0      n           n        1..n
        both, n reentrant ones and plain calls    1..     n           n      1..n + 1
        under torch.no_grad, or a reentrant
        checkpoint whose input needs no gradient   0    1..           0           0
    """

    layer: Layer
    place: "Place"  # where it computes, and the block's job
    leaves: Leaves
    input_side: Side  # the projection of the layer's inputs in this block
    held: Held  # what the job takes besides
    tokens: Tokens
    # an input that was projected before the layer's forward, its version, and the result
    early: tuple[Tensor, int, Tensor] | None = None
    misfit: Exception | None = None  # what is wrong with a call that has no rows
    ran: int = 0  # forward, with a graph, outside the backward pass
    quiet: int = 0  # forward, without a graph, as it does first in a reentrant checkpoint
    recomputed: int = 0  # inside the backward pass, as it does when a checkpoint recomputes
    passes: set[int] = field(default_factory=set)  # autograd's numbers of backward passes that delivered
    waited: int = 0  # calls that waited for others
    closed: bool = False  # whether the block is over
    stale: bool = False  # whether a backward pass in this block delivered to the layer in an earlier one

    def count(self) -> None:
        """Note that the backward pass that is under way delivers."""
        if self.closed and self.layer.key in OPEN:
            OPEN[self.layer.key].stale = True
        self.passes.add(torch._C._current_graph_task_id())
        self.place.block.delivered = True

    @property
    def delivered(self) -> bool:
        return bool(self.passes)

    @property
    def too_many(self) -> bool:
        return len(self.passes) > max(1, min(self.quiet, self.recomputed) + (self.ran > 0))

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
