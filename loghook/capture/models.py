"""What a user's model is made of under whatever wraps it, what is refused by name, and what watched layers cover."""

import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from loghook.capture.experts import projections
from loghook.errors import ConfigError, UnsupportedError
from loghook.log.format import checksum

_WRAPPER_PARTS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
# Classes that hold a model whole, and where. Fabric's and DeepSpeed's answer for the attributes of their model too.
_WRAPPERS = {
    "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod", "_FabricModule": "_forward_module",
    "DeepSpeedEngine": "module",
}  # fmt: skip
# Dimensions of device meshes over which samples or layers are split, as torchtitan, accelerate, transformers and
# Lightning name them. Not "ep": experts that take tokens of other ranks have no adapter, and the rows of other layers
# are whole.
_KINDS = ("tensor", "sequence", "context", "pipeline")
_SPLITTING = {"tp", "sp", "cp", "pp", *_KINDS, *(f"{kind}_parallel" for kind in _KINDS)}


def unwrap(model: nn.Module) -> nn.Module:
    while part := next((_WRAPPERS[c.__name__] for c in type(model).__mro__ if c.__name__ in _WRAPPERS), None):
        model = getattr(model, part)
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
    parameters = list(unwrap(model).parameters())
    if any(
        type(p).__name__ == "DTensor" or in_flat_parameter(p) or p.is_meta or p.numel() < _size(p) for p in parameters
    ):
        return None
    return values_digest(plain for p in parameters for plain in _plain(p.detach()))


def values_digest(tensors: Iterable[Tensor]) -> str | None:
    """Digest of a few values of each tensor; None where there are none."""
    values = []
    for t in tensors:
        flat = t.reshape(-1)
        step = max(1, flat.numel() // 8)
        few = flat[::step][:8]
        values.append(few.float() if few.itemsize < 4 else few)
    if not values:
        return None
    # A device is waited for once, and not for each parameter; Apple's have no float64.
    alike = itertools.groupby(values, lambda v: (v.device, v.dtype))
    parts = [torch.cat(list(part)).cpu().to(torch.float64) for _, part in alike]
    return checksum(torch.cat(parts).numpy().tobytes())


def _plain(t: Tensor) -> Iterator[Tensor]:
    """Yield a tensor of real numbers, or those that a sparse one or a wrapper subclass (a quantised one) is made of."""
    if is_traceable_wrapper_subclass(t):
        for name in t.__tensor_flatten__()[0]:
            yield from _plain(getattr(t, name))
    elif t.layout is not torch.strided:
        yield t.values() if t.layout is not torch.sparse_coo else t.coalesce().values()
    else:
        yield torch.view_as_real(t) if t.is_complex() else t


def in_flat_parameter(parameter: Tensor) -> bool:
    """Whether FSDP1 keeps this parameter's values, so that its own shape is that of a shard."""
    return getattr(parameter, "_fsdp_flattened", False)


def _size(parameter: Tensor) -> int:
    """How many values a parameter has in full: DeepSpeed's ZeRO-3 keeps it empty, and the number beside it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def refuse(model: nn.Module, *, watched: bool = False) -> None:
    """Raise for what is no model, and for models whose rows could not be exact.

    ``watched``: it may be a part of what has been wrapped since, so that a parameter without FSDP may be FSDP's all the
    same; where it is not, its layer's hook raises.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"watch() takes an nn.Module, not {type(model).__name__}: pass the model itself.")
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            raise UnsupportedError(
                "nn.DataParallel shows hooks pieces of a batch: use DistributedDataParallel, or pass model.module."
            )
        offload = getattr(getattr(module, "cpu_offload", None), "offload_params", False)
        if offload and getattr(module, "compute_device", torch.device("cpu")).type != "cpu":
            raise UnsupportedError(
                "FSDP1 with offloaded parameters does not say where a layer computes: use FSDP2, or no offloading."
            )
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise UnsupportedError(f"{lazy[0]!r} has no shape yet (a lazy module): run one batch through the model first.")
    # The second is torch's DDP of FSDP2's parts (replicate_with_fsdp), whose parameters are DTensors too.
    sharded = any(c.__name__ in ("FSDPModule", "ReplicateModule") for m in model.modules() for c in type(m).__mro__)
    for name, parameter in model.named_parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            continue
        splitting = _splitting(mesh)
        if splitting or not (sharded or watched):
            raise UnsupportedError(
                f"parameter {name!r} belongs to tensor, sequence, context or pipeline parallelism (mesh dimensions "
                f"{splitting or mesh.mesh_dim_names}), and a rank's rows would be partial: use data parallelism (DDP "
                "or FSDP) for the logging pass."
            )


def _splitting(mesh: Any) -> tuple[str, ...]:
    """The dimensions over which a mesh, or the one that it was cut out of, splits samples or layers.

    accelerate and torchtitan flatten data and context parallelism into one dimension, over which FSDP shards: only the
    root mesh then tells.
    """
    if hasattr(mesh, "_get_root_mesh"):
        root = mesh._get_root_mesh()
    else:  # torch 2.9
        root = torch.distributed.device_mesh._mesh_resources.get_root_mesh(mesh)
    sizes = {name: size for m in (root, mesh) for name, size in zip(m.mesh_dim_names or (), m.shape, strict=False)}
    return tuple(name for name, size in sizes.items() if size > 1 and name in _SPLITTING)


def drawn_masks(model: nn.Module) -> list[str]:
    """Names of dropouts that are on although nothing is trained, as where ``model.eval()`` was forgotten."""
    if any(p.requires_grad for p in model.parameters()):
        return []
    dropouts = nn.modules.dropout._DropoutNd
    return [name for name, m in named_modules(model) if isinstance(m, dropouts) and m.training and m.p > 0]


def mixing_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that mix the samples of a batch while they are in training mode."""
    return [(name, m) for name, m in named_modules(model) if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def coverage(model: nn.Module, watched: Collection[str], reasons: dict[str, str]) -> dict[str, Any]:
    """Make the record of what the watched layers hold, and what is left out and why; see ``Manifest.coverage``."""
    flattened = _flattened(model)
    counted: dict[Any, str] = {}  # by which module
    covered = 0
    left_out: list[dict[str, Any]] = []
    modules = sorted(named_modules(model), key=lambda item: _owner(item[0]) not in watched)  # tied weights are covered
    for name, module in modules:
        own: dict[Any, int] = {id(p): _size(p) for p in module.parameters(recurse=False) if not in_flat_parameter(p)}
        own.update(flattened.get(module, {}))
        size = sum(n for key, n in own.items() if key not in counted)
        shared = [counted[key] for key in own if key in counted]
        counted |= dict.fromkeys(own.keys() - counted.keys(), name)
        if _owner(name) in watched:
            covered += size
        elif size:
            left_out.append({"name": name, "parameters": size, "reason": reasons.get(name, "not included")})
        elif shared and _owner(shared[0]) in watched:
            reason = f"tied to {shared[0]}, whose rows are of its own use of the weight"
            left_out.append({"name": name, "parameters": 0, "reason": reason})
    left_out.sort(key=lambda item: -item["parameters"])
    total = covered + sum(item["parameters"] for item in left_out)
    return {"covered": covered, "total": total, "not_covered": left_out}


def _owner(name: str) -> str:
    """The module whose weight torch.nn.utils.parametrize makes of a module's parameters, or the module itself."""
    return f".{name}".partition(".parametrizations.")[0][1:]


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


def by_reason(coverage: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    items: dict[str, list[dict[str, Any]]] = {}
    for item in coverage["not_covered"]:
        items.setdefault(item["reason"], []).append(item)
    return items


def describe_coverage(layers: int, coverage: dict[str, Any]) -> str:
    total = max(1, coverage["total"])
    lines = [
        f"loghook watches {layers} layers with {coverage['covered'] / total:.1%} of {coverage['total']:,} parameters"
    ]
    for reason, items in by_reason(coverage).items():
        names = ", ".join(item["name"] or "(model)" for item in items[:3]) + (", ..." if len(items) > 3 else "")
        share = sum(item["parameters"] for item in items) / total
        lines.append(f"  not covered, {share:.1%}: {names} ({reason})")
    return "\n".join(lines)


def describe_trainable(model: nn.Module, watched: Collection[str]) -> str:
    """Say how much of what is trained the watched layers hold, where other parameters are frozen; else nothing.

    Adapters that are no layers (IA3, VeRA) may leave all of it uncovered under layers that are.
    """
    trainable = {p for p in unwrap(model).parameters() if p.requires_grad}
    if not trainable or len(trainable) == sum(1 for _ in unwrap(model).parameters()) or _flattened(model):
        return ""
    modules = [module for name, module in named_modules(model) if _owner(name) in watched]
    covered = trainable & {p for module in modules for p in module.parameters(recurse=False)}
    part, whole = (sum(_size(p) for p in parameters) for parameters in (covered, trainable))
    return f"\n  and {part:,} of {whole:,} trainable parameters"
