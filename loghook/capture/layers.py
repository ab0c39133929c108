"""A watched layer, and the leaves that wait for its rows while a block is open."""

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loghook.capture.adapters import Adapter
from loghook.capture.segments import Documents
from loghook.errors import UnsupportedError
from loghook.log.format import LayerSpec
from loghook.project.projection import Side

if TYPE_CHECKING:
    from loghook.capture.optimizer import Moments
    from loghook.capture.tap import Pending
    from loghook.capture.whole import Job, Together


@dataclass(eq=False)
class Shared:
    """What the layers of a block have in common."""

    # the last input that was projected, so that layers which read the same tensor project it once
    source: Tensor | None = None
    key: tuple[Any, ...] | None = None  # which tensor that was, and by which side it was projected
    projected: Tensor | None = None  # the result
    delivered: bool = False  # whether any row has been delivered yet
    restarted: bool = False  # whether a layer ran forward after that, outside the backward pass


@dataclass(eq=False)
class Leaves:
    """What autograd fills: the ``.grad`` of each."""

    rows: Tensor  # what every layer delivers once: rows (B, k_out, k_in), or what the block's job says
    moments: Tensor | None  # flat (see ``Tap``), or None
    activations: Tensor | None  # (B, channels + 1), or None
    outputs: Tensor | None  # (B, out_features + 1), or None
    calls: Tensor | None  # (1,) how many calls delivered; None where nobody asks

    def clear(self) -> None:
        for leaf in (self.rows, self.moments, self.activations, self.outputs, self.calls):
            if leaf is not None:
                leaf.grad = None


@dataclass(eq=False)
class Deliveries:
    """How often one layer ran in one block, and how often autograd took what it made.

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

    ran: int = 0  # forward, with a graph, outside the backward pass
    quiet: int = 0  # forward, without a graph, as it does first in a reentrant checkpoint
    recomputed: int = 0  # inside the backward pass, as it does when a checkpoint recomputes
    counted: int = 0  # rows that autograd accumulated
    accepted: int = 0  # rows whose tokens it accepted instead, to be formed later

    @property
    def number(self) -> int:
        """How many; a layer that is called both compiled and not delivers both ways at once."""
        return max(self.counted, self.accepted)

    @property
    def too_many(self) -> bool:
        return self.number > max(1, min(self.quiet, self.recomputed) + (self.ran > 0))

    @property
    def several_calls(self) -> bool:
        """Whether there may be several to one backward pass."""
        return self.ran + self.quiet > 1


@dataclass(eq=False)
class Slots:
    """One layer in one block: its leaves, what its hook has to know, and what the hook counts."""

    leaves: Leaves  # where what is captured arrives
    # (B,), one for each row of the block. A tensor, since the compiler takes a number for fixed and compiles anew for
    # every other one.
    samples: Tensor
    input_side: Side  # the projection of the layer's inputs in this block
    output_side: Side  # that of its output gradients
    job: "Job | None"  # what is computed instead of rows, or None
    update: tuple[Tensor | None, ...]  # what makes rows of an optimiser's update (see ``Tap``), or nothing
    documents: Documents | None  # which tokens make a row, where rows are not samples
    mask: Tensor | None  # (B, S) what each token counts in moments and means, or None
    keep: Tensor | None  # (B,) 0 for samples that were logged before, or None (with documents it is part of the mask)
    kept: Tensor | None  # the same for rows, also with documents
    shared: Shared  # what the block's layers have in common
    # where what calls bring waits, to be formed with that of other layers or with that of the layer's other calls
    pending: "Pending | Together | None"
    # what calls brought that autograd has not accepted yet, with the number of the backward pass
    offers: list[tuple[int, Any]] = field(default_factory=list)
    # an input that was projected before the layer's forward, its version, and the result
    early: tuple[Tensor, int, Tensor] | None = None
    rows: Tensor | None = None  # rows, or what the job makes of them, and moments, as ``pending`` formed them
    moments: Tensor | None = None
    deliveries: Deliveries = field(default_factory=Deliveries)
    masked: bool = False  # whether the mask fitted this layer
    misfit: Exception | None = None  # what is wrong with a call that has no rows

    @property
    def size(self) -> int:
        return self.samples.shape[0]

    def offer(self, brought: Any) -> None:
        """Take what a call brings in a backward pass that may or may not be one for gradients of leaves."""
        self.offers.append((torch._C._current_graph_task_id(), brought))

    def count(self) -> None:
        self.deliveries.counted += 1
        self.shared.delivered = True

    def accept(self) -> None:
        """Count the row that this backward pass's offers will make, and let them wait."""
        assert self.pending is not None
        self.deliveries.accepted += 1
        self.shared.delivered = True
        offers, self.offers = self.offers, []
        for task, brought in offers:
            if task == torch._C._current_graph_task_id():
                self.pending.add(self, brought)

    def clear(self) -> None:
        self.offers, self.early, self.rows, self.moments, self.misfit = [], None, None, None, None
        self.shared.source = self.shared.key = self.shared.projected = None
        self.leaves.clear()


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

    @property
    def batch_dim(self) -> int:
        """The axis of samples in the module's output: the first also of a sequence-first model's flattened layers."""
        return 0 if self.spec.flattened else self.spec.batch_dim

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
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise UnsupportedError(f"a watched {type(module).__name__} has weights on the meta device: load the model first.")
