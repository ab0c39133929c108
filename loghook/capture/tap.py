"""The tap: an identity in the graph whose backward makes a sample's row of the output gradient that passes it.

The life of a row, in a block:

1. ``block`` makes ``Slots`` for each watched layer: the leaves that wait for its rows, and what its hook has to know.
2. The layer runs. Its hook (``loghook.capture.hook``) projects the input, (B, S, I) to (B, S, k_in), and returns the
   layer's output through a tap, which keeps the projected input and nothing of the layer.
3. Backward reaches the tap with the output's gradient, which goes on unchanged.
4. The block's ``Job`` projects that gradient too, (B, S, O) to (B, S, k_out), and sums outer products over tokens: the
   row of a sample is (k_out, k_in), and its whole gradient is never formed.
5. The rows are added to the ``.grad`` of the layer's leaf. Or the call waits in a ``Place``, where rows of several
   layers are formed at once, in larger products. Compiled, the tap returns them as the leaf's gradient.
6. The block ends, checks that every layer delivered once, and the job collects the leaves into one matrix of rows.

A leaf is a tensor that nobody reads. Taps are nodes of autograd's own graph, so that it does the bookkeeping: each call
that reaches the loss delivers, a recomputed forward counts once, frozen parameters still build a graph from the first
tap on, and ``torch.compile`` traces it without a break.
"""

from typing import Any

import torch
from torch import Tensor

from loghook.capture.adapters import as_tokens
from loghook.capture.jobs import KINDS
from loghook.capture.layers import Slots
from loghook.capture.work import Call, sum_tokens, wide_context
from loghook.errors import UnsupportedError


class Tap(torch.autograd.Function):
    """Identity on a layer's output whose backward does a job's work on the call, or lets the call wait for others.

    Where nothing is compiled: what it delivers goes to the leaves directly, and ``anchor`` is a leaf that all layers of
    a place share, for a graph also where the model is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # the layer's output
        anchor: Tensor,
        slots: Slots,
        x: Tensor,  # like the next two as in ``Call``
        weight_BS: Tensor | None,
        documents_DL: Tensor | None,
        activations: Tensor | None,  # inputs summed over tokens, if they are logged
    ) -> Tensor:
        ctx.save_for_backward(x, weight_BS, documents_DL, activations)
        ctx.slots, ctx.ran_in = slots, slots.ran_in
        return y.data  # see ``alias``, which takes ten times as long

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), slots = grads, ctx.slots
        # Compiled autograd cannot add up what is None.
        nothing = slots.place.anchor.detach() if torch.compiler.is_compiling() else None
        passed = (g, nothing, None, None, None, None, None)
        if slots.closed:  # nobody will collect what is made of it
            slots.count()
            return passed
        place, layer = slots.place, slots.layer
        try:
            x, weight_BS, documents_DL, activations = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise UnsupportedError(
                f"the input of {layer.name}, or the block's mask, was changed in place after the layer ran, and its "
                "row needs it as it was: write x = x + y for x += y, or log projected rows, which keep no input."
            ) from error
        if ctx.ran_in != -1:
            place.block.outermost[torch._C._current_graph_task_id()] = ctx.ran_in
        # Sums over tokens run in float32 or wider, also where the user calls backward() under autocast.
        with wide_context(g.device.type):
            g_BSO = output_gradient(layer.adapter.channel_dim, layer.batch_dim, g, x)
            # Not in autograd.grad, nor in backward(inputs=...).
            if torch._C._will_engine_execute_node(place.anchored):
                place.take(slots, Call(g_BSO, x, weight_BS, documents_DL), activations)
        return passed


# Tap.apply without what it does for torch.func, where no hook of ours comes so far, and which takes longer than the tap
apply_tap = super(torch.autograd.Function, Tap).apply


class CompiledTap(torch.autograd.Function):
    """The same for the compiler to trace: a pure function, whose results autograd adds up as gradients of leaves."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # like the next four as a ``Tap`` takes them
        x: Tensor,
        weight_BS: Tensor | None,
        documents_DL: Tensor | None,
        activations: Tensor | None,
        how: tuple[str, int, int],  # kind of job; axes of features and of samples in `y`
        main: Tensor,  # like the next four a leaf, see ``Leaves``
        moments: Tensor | None,
        activation_sums: Tensor | None,
        output_sums: Tensor | None,
        calls: Tensor | None,
        *held: Tensor | None,  # what the job takes besides
    ) -> Tensor:
        ctx.save_for_backward(x, weight_BS, documents_DL, activations, *held)
        ctx.how, ctx.wide = how, main.dtype
        return alias(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), (kind, channel_dim, batch_dim) = grads, ctx.how
        x, weight_BS, documents_DL, activations, *held = ctx.saved_tensors
        with wide_context(g.device.type):
            call = Call(output_gradient(channel_dim, batch_dim, g, x), x, weight_BS, documents_DL)
            _, need_moments, _, need_outputs, need_calls = ctx.needs_input_grad[6:11]
            main, moments = KINDS[kind].work(call, held, ctx.wide, need_moments)
            outputs = sum_tokens(call.g_BSO.to(ctx.wide), weight_BS, documents_DL) if need_outputs else None
            calls = x.new_ones(1) if need_calls else None
        return g, *(None,) * 5, main, moments, activations, outputs, calls, *(None,) * len(held)


class Misfit(torch.autograd.Function):
    """Identity on the output of a call that has no rows, which raises if a gradient comes for it all the same."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, slot: Tensor, error: Exception) -> Tensor:
        """The leaf is there for a graph also where the model is frozen."""
        ctx.error = error
        return alias(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ctx.error


def alias(y: Tensor) -> Tensor:
    """Return a tensor as it is, without a copy, for a tap to return.

    Autograd does not track this alias as a view: in-place code after the layer stays legal (with a view it raises, with
    a tensor hook it silently loses the gradient).
    """
    return torch.ops.aten._unsafe_view.default(y, y.shape)


def output_gradient(channel_dim: int, batch_dim: int, g: Tensor, x: Tensor) -> Tensor:
    """Arrange an output gradient with these axes of channels and batch as (B, S, O), given inputs (B, S, ...)."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UnsupportedError(
            "backward ran with create_graph=True (a gradient penalty, a Hessian product): the second-order part of a "
            "gradient does not pass a layer's output, so rows would miss it. Take that term out of the logged loss."
        )
    if g.dim() == 3 and not batch_dim and channel_dim == -1 and g.shape[:2] == x.shape[:2]:
        return g  # as it is nearly always
    g_BSO = as_tokens(g.movedim(batch_dim, 0) if batch_dim and g.dim() > 2 else g, channel_dim)
    return g_BSO.reshape(*x.shape[:2], g_BSO.shape[-1])  # batch and tokens may share an axis in the module
