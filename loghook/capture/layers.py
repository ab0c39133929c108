"""Which layers are watched, what they cover, and what is refused by name."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from loghook.capture.adapters import Adapter, find_adapter, registered_type
from loghook.capture.experts import ExpertProjection, projections
from loghook.capture.segments import Documents
from loghook.errors import ConfigError, UnsupportedError
from loghook.log.format import LayerSpec, checksum
from loghook.project.projection import Side, draw_side, shared_input_name

_WRAPPER_PARTS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
FUSED_EXPERTS = "fused experts are watched only where a pattern such as '*experts*' names them"
_TRUSTED = {"torch", "torchao", "bitsandbytes", "transformers", "peft", "loghook"}
_REDUCTIONS = (None, "mean", "sum")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own model under DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def canonical_name(name: str) -> str:
    """Remove what wrappers add to a module's name, so that it is the same however the model is wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the unwrapped model with canonical names, wrappers left out, shared modules once."""
    seen: set[str] = set()
    for name, module in unwrap(model).named_modules():
        canonical = canonical_name(name)
        children = dict(module.named_children())
        if not (children.keys() & _WRAPPER_PARTS) and canonical not in seen:
            seen.add(canonical)
            yield canonical, module
            for part, projection in projections(module).items():
                yield f"{canonical}.{part}".lstrip("."), projection


def parameters_digest(model: nn.Module) -> str | None:
    """Digest of a few values of every parameter: tells checkpoints apart; None where they are sharded."""
    values = []
    for parameter in unwrap(model).parameters():
        sharded = type(parameter).__name__ == "DTensor" or _in_flat(parameter)
        if sharded or parameter.is_meta:
            return None
        for plain in _plain(parameter.detach()):
            flat = plain.reshape(-1)
            step = max(1, flat.numel() // 8)
            values.append(flat[::step][:8].to(torch.float64))
    return checksum(torch.cat([v.cpu() for v in values]).numpy().tobytes()) if values else None


def _plain(t: Tensor) -> Iterator[Tensor]:
    """Yield a tensor, or the tensors that a wrapper subclass (a quantised weight) is made of."""
    if is_traceable_wrapper_subclass(t):
        for name in t.__tensor_flatten__()[0]:
            yield from _plain(getattr(t, name))
    else:
        yield t


@dataclass(eq=False)
class Shared:
    """What the layers of a block have in common.

    Attributes:
        source: the last input that was projected, so that layers which read the same tensor project it once.
        key: which tensor that was, and by which side it was projected.
        projected: the result.
        delivered: whether any row has been delivered yet.
        restarted: whether a layer ran forward after that, outside the backward pass.
    """

    source: Tensor | None = None
    key: tuple[Any, ...] | None = None
    projected: Tensor | None = None
    delivered: bool = False
    restarted: bool = False


@dataclass(eq=False)
class Slots:
    """The leaves of one layer in one block; autograd puts what was captured into their ``.grad``.

    Attributes:
        rows: leaf (B, k_out, k_in).
        moments: leaf, flat (see ``Tap``), or None.
        activations: leaf (B, channels + 1), or None.
        outputs: leaf (B, out_features + 1), or None.
        documents: which tokens make a row, where rows are not samples.
        mask: (B, S) what each token counts in moments and means, or None.
        keep: (B,) 0 for samples that were logged before, or None (with documents it is part of the mask).
        shared: what the block's layers have in common.
        deliveries: how often autograd accumulated a row.
        quiet: how often the layer ran without a graph, as it does in the first forward of a reentrant checkpoint.
        recomputed: how often it ran inside the backward pass, as it does when a checkpoint recomputes.
        masked: whether the mask fitted this layer.
    """

    rows: Tensor
    moments: Tensor | None
    activations: Tensor | None
    outputs: Tensor | None
    documents: Documents | None
    mask: Tensor | None
    keep: Tensor | None
    shared: Shared
    deliveries: int = 0
    quiet: int = 0
    recomputed: int = 0
    masked: bool = False


@dataclass(eq=False)
class Layer:
    """A watched layer: its module, how it is read, and the leaves that wait for its rows while a block is open."""

    spec: LayerSpec
    module: nn.Module
    adapter: Adapter
    input_side: Side
    output_side: Side
    key: int = field(default_factory=itertools.count().__next__)  # its place in the table of open leaves
    fired: bool = False  # its forward ran in this block
    computes_in: torch.dtype | None = None  # dtype of its last output

    @property
    def name(self) -> str:
        """Canonical name."""
        return self.spec.name

    @property
    def gain(self) -> float:
        """What the row is multiplied by, so that inner products are unbiased."""
        return self.input_side.gain * self.output_side.gain

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where the layer computes, and the dtype in which its rows are summed: float32, or float64."""
        # FSDP1 may leave a layer its weight as a plain attribute, a view into the flat parameter.
        for tensor in (*self.module.parameters(), getattr(self.module, "weight", None)):
            if tensor is None:
                continue
            device = _execution_device(self.module) if tensor.is_meta else tensor.device
            return device, torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return torch.device("cpu"), torch.float32

    def place(self, device: torch.device) -> None:
        """Keep the projections where the layer computes."""
        self.input_side, self.output_side = self.input_side.to(device), self.output_side.to(device)


def _execution_device(module: nn.Module) -> torch.device:
    """Where accelerate lets a layer compute whose weights it fetches for each forward."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise UnsupportedError(
        f"the weights of a watched {type(module).__name__} are on the meta device and hold no values: load or "
        "materialise the model first."
    )


@dataclass(frozen=True, kw_only=True)
class Watch:
    """The arguments of ``run.watch``, checked at birth."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    may_sleep: tuple[str, ...]
    flattened: tuple[str, ...]
    bias: bool
    batch_dim: int
    activations: str | None
    output_gradients: str | None

    def __post_init__(self) -> None:
        for name in ("activations", "output_gradients"):
            if getattr(self, name) not in _REDUCTIONS:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown: choose None, 'mean' or 'sum'.")
        if self.batch_dim not in (0, 1):
            raise ConfigError(f"batch_dim={self.batch_dim} is unknown: 0 (batch first) or 1 (sequence first).")


def patterns(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """One pattern or several, as a tuple."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def matches(name: str, wanted: Sequence[str]) -> bool:
    """Whether a whole module name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in wanted)


def refuse(model: nn.Module) -> None:
    """Raise for models whose rows could not be exact."""
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            raise UnsupportedError(
                "nn.DataParallel replicates modules in every forward, so hooks see pieces of a batch in no fixed "
                "order: use DistributedDataParallel (one process per device), or pass model.module."
            )
    if not isinstance(model, nn.Module):
        raise ConfigError(f"watch() takes an nn.Module, not {type(model).__name__}: pass the model itself.")
    sharded = [m for m in model.modules() if type(m).__name__.startswith("FSDP")]
    for name, parameter in model.named_parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and (not sharded or {"tp", "sp", "cp", "pp"} & set(mesh.mesh_dim_names or ())):
            raise UnsupportedError(
                f"parameter {name!r} is split by tensor, sequence, context or pipeline parallelism (mesh dimensions "
                f"{mesh.mesh_dim_names}): each rank sees a part of a layer's inputs or outputs, so its rows would be "
                "partial. Use data parallelism (DDP or FSDP) for the logging pass."
            )


def mixing_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that mix the samples of a batch while they are in training mode."""
    batch_norms = (nn.modules.batchnorm._BatchNorm,)
    return [(name, module) for name, module in named_modules(model) if isinstance(module, batch_norms)]


def select(
    model: nn.Module, watch: Watch, *, projection: str, rank: int, seed: int
) -> tuple[list[Layer], dict[str, Any]]:
    """Choose the layers to watch and draw their projections.

    Returns:
        The layers in module order, and the coverage record (see ``Manifest.coverage``).

    Raises:
        ConfigError: if a pattern matches nothing, or the rank would reduce nothing.
    """
    modules = dict(named_modules(model))
    bypassed = {
        f"{name}.out_proj".lstrip(".") for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)
    }
    for pattern in (*watch.include, *watch.may_sleep, *watch.flattened):
        found_by = [module for name, module in modules.items() if _named_by(name, module, pattern)]
        if found_by and pattern != "*" and not any(find_adapter(module) for module in found_by):
            types = ", ".join(sorted({type(module).__name__ for module in found_by})[:4])
            raise ConfigError(
                f"pattern {pattern!r} matches only modules of types that have no adapter ({types}): register one with "
                "@loghook.adapter, or take the pattern out."
            )
        if not found_by:
            sample = ", ".join([name for name, m in modules.items() if find_adapter(m)][:6])
            raise ConfigError(
                f"pattern {pattern!r} matches no module. Patterns are fnmatch patterns over whole names, such as "
                f"{sample}."
            )
    chosen: dict[str, tuple[nn.Module, Adapter]] = {}
    reasons: dict[str, str] = {}
    for name, module in modules.items():
        found = find_adapter(module)
        wanted = [
            p for p in watch.include if _named_by(name, module, p) and (p != "*" or found is None or found.default)
        ]
        if name in bypassed:
            reasons[name] = "nn.MultiheadAttention reads its weight without calling it"
        elif projections(module):
            reasons[name] = FUSED_EXPERTS
        elif found is not None and _overrides_forward(module):
            kind = type(module).__name__
            reasons[name] = f"{kind} overrides forward; vouch for it with @loghook.adapter({kind})"
        elif any(p.is_complex() for p in module.parameters(recurse=False)):
            reasons[name] = "complex parameters"
        elif found is None:
            reasons[name] = f"no adapter for {type(module).__name__}"
        elif not wanted:
            reasons[name] = (
                "an embedding is watched only where a pattern names it" if not found.default else "not included"
            )
        elif matches(name, watch.exclude):
            reasons[name] = "excluded"
        else:
            chosen[name] = (module, found)
    if not chosen:
        raise ConfigError(
            f"include={list(watch.include)} with exclude={list(watch.exclude)} selects no linear or convolution layer: "
            "widen include or narrow exclude."
        )
    layers = _draw(chosen, watch, projection=projection, rank=rank, seed=seed)
    return layers, coverage(model, layers, reasons)


def _named_by(name: str, module: nn.Module, pattern: str) -> bool:
    """Whether a pattern names a module; an expert's projection also answers to the name of the whole."""
    owner = name.rsplit(".", 2)[0] if isinstance(module, ExpertProjection) else name
    return fnmatchcase(name, pattern) or fnmatchcase(owner, pattern)


def _overrides_forward(module: nn.Module) -> bool:
    """Whether a subclass of a known layer computes something of its own, so that the base's adapter may not fit it.

    Libraries that store a linear layer's weight in another way keep what it computes, and are trusted.
    """
    known = registered_type(module)
    if known is None or type(module).forward is known.forward:
        return False
    return type(module).__module__.partition(".")[0] not in _TRUSTED


def _draw(
    chosen: dict[str, tuple[nn.Module, Adapter]], watch: Watch, *, projection: str, rank: int, seed: int
) -> list[Layer]:
    shared: dict[tuple[str, int], Side] = {}
    layers = []
    for name, (module, found) in chosen.items():
        shape = found.geometry(module)
        bias = shape.bias and watch.bias
        group, width = shared_input_name(name), shape.in_features + bias
        if (group, width) not in shared:
            shared[group, width] = draw_side(projection, seed=seed, name=group, side="in", width=width, rank=rank)
        inputs = shared[group, width]
        outputs = draw_side(projection, seed=seed, name=name, side="out", width=shape.out_features, rank=rank)
        spec = LayerSpec(
            name=name,
            type=type(found).__name__,
            in_features=shape.in_features,
            out_features=shape.out_features,
            groups=shape.groups,
            channels=shape.channels,
            bias=bias,
            k_in=inputs.k,
            k_out=outputs.k,
            activations=watch.activations if shape.channels else None,  # indices have none
            output_gradients=watch.output_gradients,
            batch_dim=watch.batch_dim,
            may_sleep=matches(name, watch.may_sleep) or isinstance(module, ExpertProjection),
            flattened=matches(name, watch.flattened),
        )
        layers.append(Layer(spec, module, found, inputs, outputs))
    return layers


def coverage(model: nn.Module, layers: Sequence[Layer], reasons: dict[str, str]) -> dict[str, Any]:
    """Count the parameters that the watched layers hold, and list the modules whose own parameters are left out."""
    watched = {layer.spec.name for layer in layers}
    flattened = _flattened(model)
    counted: set[Any] = set()
    covered = 0
    left_out: list[dict[str, Any]] = []
    modules = sorted(named_modules(model), key=lambda item: item[0] not in watched)  # a tied weight counts as covered
    for name, module in modules:
        own: dict[Any, int] = {id(p): p.numel() for p in module.parameters(recurse=False) if not _in_flat(p)}
        own.update(flattened.get(module, {}))
        size = sum(n for key, n in own.items() if key not in counted)
        counted.update(own)
        if name in watched:
            covered += size
        elif size:
            left_out.append({"name": name, "parameters": size, "reason": reasons.get(name, "not included")})
    left_out.sort(key=lambda item: -item["parameters"])
    return {
        "covered": covered,
        "total": covered + sum(item["parameters"] for item in left_out),
        "not_covered": left_out,
    }


def _in_flat(parameter: Tensor) -> bool:
    """Whether FSDP1 keeps this parameter's values, so that its own shape is that of a shard."""
    return getattr(parameter, "_fsdp_flattened", False)


def _flattened(model: nn.Module) -> dict[nn.Module, dict[Any, int]]:
    """What FSDP1 took from each module: a key that tied parameters share, and how many values it has in full."""
    taken: dict[nn.Module, dict[Any, int]] = {}
    for wrapper in model.modules():
        flat: Any = getattr(getattr(wrapper, "_handle", None), "flat_param", None)
        if flat is None:
            continue
        sizes = {
            (info.module, info.param_name): shape.numel()
            for info, shape in zip(flat._param_infos, flat._shapes, strict=True)
        }
        for key, size in sizes.items():
            taken.setdefault(key[0], {})[key] = size
        for info in flat._shared_param_infos:
            key = (info.prim_module, info.prim_param_name)
            taken.setdefault(info.module, {})[key] = sizes[key]
    return taken


def describe_coverage(layers: int, coverage: dict[str, Any]) -> str:
    """Say in a few lines what is watched and what is not."""
    total = max(1, coverage["total"])
    lines = [
        f"loghook watches {layers} layers with {coverage['covered'] / total:.1%} of {coverage['total']:,} parameters"
    ]
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for item in coverage["not_covered"]:
        by_reason.setdefault(item["reason"], []).append(item)
    for reason, items in by_reason.items():
        names = ", ".join(item["name"] or "(model)" for item in items[:3]) + (", ..." if len(items) > 3 else "")
        share = sum(item["parameters"] for item in items) / total
        lines.append(f"  not covered, {share:.1%}: {names} ({reason})")
    return "\n".join(lines)
