"""One small adapter for each layer type: how its inputs and outputs become tokens.

Past an adapter there is one layout only: inputs (B, S, I) or, in groups, (B, S, G, I); output gradients (B, S, O).
A new type is a new class under ``@adapter(Type)``; nothing else changes (docs/adapters.md shows RMSNorm's scale).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loghook.errors import UnsupportedError
from loghook.project.projection import Side


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shape of a layer's gradient.

    Attributes:
        in_features: columns of the gradient, without the bias: the inputs of one group.
        out_features: rows of the gradient: the outputs of all groups.
        groups: 1, or the number of groups of outputs that see inputs of their own.
        bias: whether the module has one; it becomes the last column.
        channels: features of the module's input, where its activations can be logged; 0 where it has none,
            by default ``in_features * groups``.
    """

    in_features: int
    out_features: int
    groups: int = 1
    bias: bool = False
    channels: int = -1

    def __post_init__(self) -> None:
        if self.channels < 0:
            object.__setattr__(self, "channels", self.in_features * self.groups)


class Adapter:
    """How one module type turns a call into tokens; subclass it and register with ``@loghook.adapter(Type)``.

    Widths come from the module's attributes, never from ``weight.shape``: under FSDP the weight may be flat.
    The module must not save its own output for backward, because code after it may change that output in place.

    Attributes:
        channel_dim: axis of features in the module's input and output: -1, or 1 for convolutions.
        default: whether the pattern ``*`` selects this type; otherwise a pattern has to name the module.
        shares_input: whether ``project`` depends on nothing of the module, so that siblings which read the same
            tensor (q, k and v) may project it once.
    """

    channel_dim: int = -1
    default: bool = True
    shares_input: bool = False

    def geometry(self, module: nn.Module) -> Geometry:
        """Return the shape of this module's gradient; raise UnsupportedError where it has no exact rows."""
        raise NotImplementedError

    def project(self, module: nn.Module, x: Tensor, side: Side, bias: bool) -> Tensor:
        """Project the module's input ``x``, batch first, to (B, S, k_in), or (B, S, G, k_in) for a module with groups.

        ``side`` is the projection of the input side, ``bias`` says whether the run logs this module's bias.
        """
        return side.project(self.tokens(x), bias)

    def tokens(self, x: Tensor) -> Tensor:
        """Arrange a batch-first tensor with features along ``channel_dim`` as (B, S, features)."""
        return as_tokens(x, self.channel_dim)

    def gradient(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Arrange what has the shapes of the parameters, as their gradients, as (O, I [+ 1]); only moves values."""
        matrix = weight.flatten(1)
        return matrix if bias is None else torch.cat([matrix, bias[:, None]], 1)


def as_tokens(t: Tensor, channel_dim: int) -> Tensor:
    """Arrange (B, ..., C) or, with ``channel_dim=1``, (B, C, ...) as (B, S, C)."""
    if t.dim() == 2:
        return t.unsqueeze(1)
    if channel_dim == 1:
        return t.flatten(2).transpose(1, 2)
    return t if t.dim() == 3 else t.flatten(1, -2)


_REGISTRY: dict[type[nn.Module], Adapter] = {}


def adapter(*types: type[nn.Module]) -> Callable[[type[Adapter]], type[Adapter]]:
    """Class decorator: register an adapter for module types and their subclasses (the nearest base wins)."""

    def register(cls: type[Adapter]) -> type[Adapter]:
        for module_type in types:
            _REGISTRY[module_type] = cls()
        return cls

    return register


def registered_type(module: nn.Module) -> type[nn.Module] | None:
    return next((cls for cls in type(module).__mro__ if cls in _REGISTRY), None)


def find_adapter(module: nn.Module) -> Adapter | None:
    """Return the adapter of the nearest class in the module's method resolution order, or None."""
    nearest = registered_type(module)
    if nearest is not None:
        return _REGISTRY[nearest]
    # transformers' Conv1D is recognised by name and attribute, so that ``import loghook`` needs no transformers.
    kind = type(module)
    known_by_name = kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
    return _CONV1D if known_by_name and hasattr(module, "nf") else None


@adapter(nn.Linear)
class LinearAdapter(Adapter):
    """``nn.Linear`` and its subclasses, quantised ones included: only ``in_features`` and ``out_features`` are read."""

    shares_input = True

    def geometry(self, module: nn.Module) -> Geometry:
        assert isinstance(module, nn.Linear)
        return Geometry(in_features=module.in_features, out_features=module.out_features, bias=module.bias is not None)


class TransposedLinearAdapter(Adapter):
    """transformers' ``Conv1D``: a linear layer whose weight is stored as (in, out)."""

    shares_input = True

    def geometry(self, module: nn.Module) -> Geometry:
        return Geometry(in_features=int(module.nx), out_features=int(module.nf), bias=True)  # type: ignore[arg-type]

    def gradient(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super().gradient(module, weight.T, bias)


_CONV1D = TransposedLinearAdapter()
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@adapter(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvAdapter(Adapter):
    """Convolutions with any stride, padding, dilation and groups; columns follow ``weight.flatten(1)``.

    Output positions are the tokens. The input side is projected by a convolution with the projection itself as
    its kernel, so that patches are never laid out in memory.
    """

    channel_dim = 1

    def geometry(self, module: nn.Module) -> Geometry:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        return Geometry(
            in_features=module.in_channels // module.groups * math.prod(module.kernel_size),
            out_features=module.out_channels,
            groups=module.groups,
            bias=module.bias is not None,
            channels=module.in_channels,
        )

    def project(self, module: nn.Module, x: Tensor, side: Side, bias: bool) -> Tensor:
        """Convolve with the projection's rows, or lay out the (narrow) patches where there is no projection."""
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        n, groups = len(module.kernel_size), module.groups
        if x.dim() != n + 2:
            raise UnsupportedError(
                f"a convolution got an input of shape {tuple(x.shape)} without a batch axis: make it (1, ...)."
            )
        strides, gaps = _each(module.stride, n), _each(module.dilation, n)
        if any(padding := _padding(module, gaps)):
            x = F.pad(x, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        x = x.reshape(-1, x.shape[1] // groups, *x.shape[2:])  # groups as samples: each sees the same projection
        if side.matrix is None:
            for i, (size, step, gap) in enumerate(zip(module.kernel_size, strides, gaps, strict=True)):
                x = x.unfold(2 + i, (size - 1) * gap + 1, step)[..., ::gap]
            patches = x.movedim(1, 1 + n)  # a view, and many times the input: it is laid out once, with the bias's 1
            z = x.new_empty(len(x), math.prod(patches.shape[1 : 1 + n]), side.width)
            laid = z[..., :-1] if bias else z
            z[..., laid.shape[2] :] = 1
            laid.unflatten(2, patches.shape[1 + n :]).unflatten(1, patches.shape[1 : 1 + n]).copy_(patches)
        else:
            matrix = side.matrix.to(x.dtype)
            kernels = (matrix[:, :-1] if bias else matrix).reshape(side.k, x.shape[1], *module.kernel_size)
            offset = matrix[:, -1] if bias else None
            z = _CONVOLVE[n](x, kernels, offset, strides, 0, gaps)
            z = z.flatten(2).transpose(1, 2)
        return z if groups == 1 else z.unflatten(0, (-1, groups)).transpose(1, 2)


def _each(value: int | tuple[int, ...], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, gaps: tuple[int, ...]) -> Sequence[int]:
    """How a convolution pads now, as ``F.pad`` takes it, the last axis first.

    Of zeros torch reads ``padding`` at each call, as strides and dilations, which segmentation models set afterwards;
    of other modes what the constructor made of it.
    """
    if module.padding_mode != "zeros":
        return module._reversed_padding_repeated_twice
    if module.padding == "valid":
        return ()
    sizes = zip(module.kernel_size, gaps, strict=True)
    if module.padding == "same":
        ends = [(gap * (size - 1) // 2, gap * (size - 1) - gap * (size - 1) // 2) for size, gap in sizes]
    else:
        ends = [(p, p) for p in _each(module.padding, len(gaps))]  # type: ignore[arg-type]
    return [p for pair in reversed(ends) for p in pair]


@adapter(nn.Embedding)
class EmbeddingAdapter(Adapter):
    """``nn.Embedding`` as a linear layer on one-hot inputs: the row is (features, vocabulary), projected."""

    default = False  # wide and seldom wanted: only where a pattern names it

    def geometry(self, module: nn.Module) -> Geometry:
        assert isinstance(module, nn.Embedding)
        if module.scale_grad_by_freq:
            raise UnsupportedError(
                "scale_grad_by_freq=True: a gradient per sample does not exist; unset it, or exclude the embedding."
            )
        return Geometry(in_features=module.num_embeddings, out_features=module.embedding_dim, channels=0)

    def project(self, module: nn.Module, x: Tensor, side: Side, bias: bool) -> Tensor:
        """Look up the projection's columns; the padding index has no gradient and gives zeros."""
        assert isinstance(module, nn.Embedding)
        ids = x.reshape(x.shape[0], -1)
        wide = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
        z = F.one_hot(ids, side.width).to(wide) if side.matrix is None else side.matrix.T.to(wide)[ids]
        return z if module.padding_idx is None else z * (ids != module.padding_idx).unsqueeze(-1)

    def gradient(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
        return weight.T
