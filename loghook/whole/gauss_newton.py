"""Products with the generalised Gauss-Newton matrix (Schraudolph 2002), many vectors at a time, through a user's model.

GGN is the mean over samples of ``J^T H J``, J the derivative of a sample's outputs by the watched parameters and H the
second derivative of its loss by its outputs; for cross-entropy that is the true Fisher. One vector costs about twice a
forward and backward pass: J by differentiating the backward pass, which is linear in the output's gradient, and J^T by
going backwards once more.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from loghook.capture.layers import Layer
from loghook.capture.probe import batch_size
from loghook.errors import UnsupportedError
from loghook.log.format import Layout
from loghook.processes import combine

Outputs = Callable[[Any], Tensor]
OutputLoss = Callable[[Tensor, Any], Tensor]
GRAPH_BYTES = 2**28  # what the saved activations of a batch may take, times the vectors that go through them together


@dataclass
class GaussNewton:
    """The generalised Gauss-Newton matrix of the watched parameters over some batches, as a product.

    Attributes:
        layers: the watched layers, in the order of the vectors' columns.
        layout: where each layer's values are.
        batches: batches of samples, gone through once for each product.
        outputs: batch -> the model's outputs, through the watched model.
        loss: (outputs, batch) -> summed loss, a convex function of the outputs.
    """

    layers: Sequence[Layer]
    layout: Layout
    batches: Sequence[Any]
    outputs: Outputs
    loss: OutputLoss

    def __post_init__(self) -> None:
        self._parameters: list[tuple[Layer, list[nn.Parameter]]] = []
        for layer in self.layers:
            found = [layer.module.weight, layer.module.bias if layer.spec.bias else None]
            parameters = [p for p in found if p is not None]
            if not all(type(p) is nn.Parameter and p.is_floating_point() and not p.is_meta for p in parameters):
                raise UnsupportedError(
                    f"layer {layer.name!r} holds no plain weight (quantised or sharded), and Gauss-Newton products "
                    "differentiate by it: refine on one process with an unquantised model."
                )
            self._parameters.append((layer, parameters))  # type: ignore[arg-type]

    def times(self, vectors: Tensor, batches: Sequence[Any] | None = None) -> Tensor:
        """Multiply (Q, width) vectors with the matrix: (Q, width), where they are, float32 or float64."""
        batches = self.batches if batches is None else batches
        parameters = [p for _, group in self._parameters for p in group]
        before = [p.requires_grad for p in parameters]
        out, samples = torch.zeros_like(vectors), 0
        try:
            for p in parameters:
                p.requires_grad_(True)
            # Fused attention kernels have no second derivative.
            with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
                for batch in tqdm(batches, "Gauss-Newton", unit=" batches", delay=2, leave=False, disable=None):
                    self._add(vectors, batch, parameters, out)
                    samples += batch_size(batch)
        finally:
            for p, was in zip(parameters, before, strict=True):
                p.requires_grad_(was)
        counted = combine(torch.tensor(samples, dtype=torch.float64, device=out.device))
        return combine(out) / float(counted)

    def _add(self, vectors: Tensor, batch: Any, parameters: Sequence[Tensor], out: Tensor) -> None:
        y, saved = _with_size(self.outputs, batch)
        dummy = torch.zeros_like(y, requires_grad=True)
        # Linear in the dummy, so that its derivative by it is J itself.
        back = torch.autograd.grad(y, parameters, dummy, create_graph=True, allow_unused=True)
        leaf = y.detach().requires_grad_()
        slope = torch.autograd.grad(self.loss(leaf, batch), leaf, create_graph=True)[0]
        step = max(1, GRAPH_BYTES // max(1, saved))
        for part, total in zip(vectors.split(step), out.split(step), strict=True):
            used = [(b, v) for b, v in zip(back, self._split(part), strict=True) if b is not None]
            (forward,) = _pull([b for b, _ in used], [dummy], [v for _, v in used])
            (curved,) = _pull([slope], [leaf], [forward])
            self._join(_pull([y], parameters, [curved]), total)

    def _split(self, vectors: Tensor) -> list[Tensor]:
        """Rows as they are laid out in a log -> tensors shaped as the parameters, (q, ...)."""
        values: list[Tensor] = []
        for layer, group in self._parameters:
            rows = vectors[:, self.layout.kinds["gradients"][layer.name]].unflatten(1, (layer.spec.k_out, -1))
            # The adapter's arrangement of a gradient moves values about; its transpose puts them back.
            blank = [torch.zeros_like(p, requires_grad=True) for p in group]
            values += _pull([_arrange(layer, *blank)], blank, [rows.to(group[0])])
        return values

    def _join(self, gradients: Sequence[Tensor], out: Tensor) -> None:
        """Add gradients shaped as the parameters, (q, ...), to rows as they are laid out in a log."""
        place = iter(gradients)
        for layer, group in self._parameters:
            rows = torch.vmap(functools.partial(_arrange, layer))(*(next(place) for _ in group))
            out[:, self.layout.kinds["gradients"][layer.name]] += rows.flatten(1).to(out)


def _arrange(layer: Layer, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return layer.adapter.gradient(layer.module, weight, bias)


def _with_size(outputs: Outputs, batch: Any) -> tuple[Tensor, int]:
    """The outputs of a batch, and how many bytes its graph saves for the backward pass."""
    saved = 0

    def count(t: Tensor) -> Tensor:
        nonlocal saved
        saved += t.nbytes
        return t.detach()  # an operation that saves its own output would hold itself, and its graph, for ever

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        y = outputs(batch)
    return y, saved


def _pull(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Products of q vectors with a Jacobian's transpose: (q, ...) for each input, zero where it plays no part."""
    q = len(cotangents[0])
    if q == 1:  # also for operations that know no batches of vectors
        alone = torch.autograd.grad(outputs, inputs, [c[0] for c in cotangents], retain_graph=True, allow_unused=True)
        found = [None if f is None else f[None] for f in alone]
    else:
        found = list(
            torch.autograd.grad(
                outputs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        )
    return [x.new_zeros(q, *x.shape) if f is None else f for f, x in zip(found, inputs, strict=True)]
