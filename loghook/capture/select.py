"""Which layers are watched: the arguments of ``run.watch``, or the layers of a log, against a model's modules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from loghook.arguments import choose
from loghook.capture.adapters import Adapter, Geometry, find_adapter, registered_type
from loghook.capture.config import Rank, Recipe, rank_of
from loghook.capture.experts import ExpertProjection, projections
from loghook.capture.layers import Layer
from loghook.capture.models import coverage, named_modules
from loghook.errors import ConfigError, MismatchError
from loghook.log.format import LayerSpec, Manifest, draw_sides, fits, listed

HEAD = "*lm_head"  # what is left out by default: wide, and often bypassed by fused losses
FUSED_EXPERTS = "fused experts are watched only where a pattern such as '*experts*' names them"
# Subclasses whose own forward is still x W^T + b, of weights that are stored or multiplied in another way.
_FAITHFUL = {
    "bitsandbytes.Linear4bit", "bitsandbytes.Linear8bitLt", "torchao.Float8Linear", "transformers.FalconLinear",
    "transformers.FP8Linear", "transformers.FbgemmFp8Linear", "transformers.CompressedTensorsFP8Linear",
    "transformers.MetalLinear", "whisper.Conv1d", "whisper.Linear", "loghook.ExpertProjection",
}  # fmt: skip


@dataclass(frozen=True)
class Watch:
    """The arguments of ``run.watch``, checked at birth; single patterns become tuples."""

    include: str | Sequence[str]
    exclude: str | Sequence[str]
    may_sleep: str | Sequence[str] = ()
    flattened: str | Sequence[str] = ()
    bias: bool = True
    batch_dim: int = 0
    activations: str | None = None
    output_gradients: str | None = None

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "may_sleep", "flattened"):
            value = getattr(self, name)
            value = () if value is None else (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, name, value)
        for name in ("activations", "output_gradients"):
            choose(name, getattr(self, name), (None, "mean", "sum"))
        if self.batch_dim not in (0, 1):
            raise ConfigError(f"batch_dim={self.batch_dim} is unknown: 0 (batch first) or 1 (sequence first).")


def matches(name: str, wanted: Sequence[str]) -> bool:
    return any(fits(name, pattern) for pattern in wanted)


def select(model: nn.Module, watch: Watch, recipe: Recipe) -> tuple[list[Layer], dict[str, Any]]:
    """Choose the layers to watch, in module order, and draw their projections; returns the coverage record as well."""
    modules = dict(named_modules(model))
    _require_found(modules, watch)
    _require_used(modules, recipe.rank)
    # PEFT's modules_to_save: the adapter trains a copy, which runs in the original's place.
    originals = tuple(
        f"{name}.original_module.".lstrip(".") for name, module in modules.items() if hasattr(module, "modules_to_save")
    )
    bypassed = {
        f"{name}.out_proj".lstrip(".") for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)
    }
    chosen: dict[str, tuple[nn.Module, Adapter]] = {}
    reasons: dict[str, str] = {}
    for name, module in modules.items():
        adapter = find_adapter(module)
        if name in bypassed:
            reasons[name] = "nn.MultiheadAttention reads its weight without calling it"
        elif "*" in watch.include and f"{name}.".startswith(originals):
            reasons[name] = "an adapter trains a copy that runs in its place"
        elif (reason := _why_not(name, module, adapter, watch)) is not None:
            reasons[name] = reason
        elif adapter is not None:
            chosen[name] = (module, adapter)
    if not chosen:
        left_out = [name for name in reasons if find_adapter(modules[name]) is not None]
        left = "".join(f" {name or '(model)'}: {reasons[name]}." for name in left_out[:3])
        raise ConfigError(
            f"include={list(watch.include)} with exclude={list(watch.exclude)} selects no linear or convolution layer: "
            f"widen include or narrow exclude.{left}"
        )
    specs = [_specify(name, module, adapter, watch, recipe) for name, (module, adapter) in chosen.items()]
    sides = draw_sides(specs, recipe.projection, recipe.seed)
    layers = [Layer(spec, *chosen[spec.name], *sides[spec.name]) for spec in specs]
    return layers, coverage(model, chosen, reasons)


def require_reduction(layers: Sequence[Layer], recipe: Recipe) -> None:
    """Raise for a rank that is above the width of every layer."""
    widths = {layer.name: max(side.width for side in layer.sides) for layer in layers}
    if recipe.projection != "none" and all(width < rank_of(name, recipe.rank) for name, width in widths.items()):
        raise ConfigError(
            f"rank={recipe.rank} exceeds the width of every watched layer (largest: {max(widths.values()):,}), so it "
            "would reduce nothing: choose a smaller rank, or projection='none'."
        )


def _require_found(modules: Mapping[str, nn.Module], watch: Watch) -> None:
    """Raise for a pattern that names no module, or none that could be watched."""
    for pattern in (*watch.include, *watch.may_sleep, *watch.flattened):
        named = [module for name, module in modules.items() if _named_by(name, module, pattern)]
        if named and pattern != "*" and not any(find_adapter(module) for module in named):
            types = ", ".join(sorted({type(module).__name__ for module in named})[:4])
            raise ConfigError(
                f"pattern {pattern!r} matches only modules without an adapter ({types}): write an @loghook.adapter."
            )
        if not named:
            watchable = [(name, adapter) for name, m in modules.items() if (adapter := find_adapter(m))]
            likely = listed(name for name, adapter in sorted(watchable, key=lambda item: not item[1].default))
            raise ConfigError(
                f"pattern {pattern!r} matches no module: it must fit a whole name (fnmatch), such as {likely}."
            )


def _require_used(modules: Mapping[str, nn.Module], rank: Rank) -> None:
    """Raise for ranks by pattern of which one is never used; it may be for modules that are not watched."""
    patterns = list(rank) if isinstance(rank, Mapping) else []
    used = {next((p for p in patterns if fits(name, p)), None) for name in modules}
    for pattern in patterns:
        if pattern not in used:
            named = any(fits(name, pattern) for name in modules)
            why = (
                "serves no layer: the first that fits a name is used"
                if named
                else "fits no module: look at the pattern"
            )
            raise ConfigError(f"rank={{{pattern!r}: ...}} {why}.")


def _why_not(name: str, module: nn.Module, adapter: Adapter | None, watch: Watch) -> str | None:
    """Why a module with this adapter is not watched, or None where it is."""
    if projections(module):
        return FUSED_EXPERTS
    if adapter is not None and (why := _unlike_its_base(module)):
        return why
    if any(p.is_complex() for p in module.parameters(recurse=False)):
        return "complex parameters"
    if adapter is None:
        return f"no adapter for {type(module).__name__}"
    if 0 in (getattr(module, "in_features", 1), getattr(module, "out_features", 1)):
        return "no inputs, or no outputs"
    wanted = [p for p in watch.include if _named_by(name, module, p) and (p != "*" or adapter.default)]
    if not wanted:
        return "not included" if adapter.default else "an embedding is watched only where a pattern names it"
    return "excluded" if _left_out(name, wanted, watch.exclude) else None


def _specify(name: str, module: nn.Module, adapter: Adapter, watch: Watch, recipe: Recipe) -> LayerSpec:
    shape = adapter.geometry(module)
    bias = shape.bias and watch.bias
    k_in, k_out = shape.in_features + bias, shape.out_features
    if recipe.projection != "none":
        k_in, k_out = (min(width, rank_of(name, recipe.rank)) for width in (k_in, k_out))
    return LayerSpec(
        name=name, **_sizes(adapter, shape), bias=bias, k_in=k_in, k_out=k_out,
        activations=watch.activations if shape.channels else None,  # indices have none
        output_gradients=watch.output_gradients, batch_dim=watch.batch_dim,
        may_sleep=matches(name, watch.may_sleep) or isinstance(module, ExpertProjection),
        flattened=matches(name, watch.flattened),
    )  # fmt: skip


def _sizes(adapter: Adapter, shape: Geometry) -> dict[str, Any]:
    """Those fields of a layer's record that a model has to have in common with the log."""
    keys = ("in_features", "out_features", "groups", "channels")
    return {"type": type(adapter).__name__} | {key: getattr(shape, key) for key in keys}


def fits_record(spec: LayerSpec, module: nn.Module, adapter: Adapter) -> bool:
    """Whether a module has the shape that is recorded, and the bias if that is logged."""
    shape = adapter.geometry(module)
    sizes = _sizes(adapter, shape)
    return sizes == {key: getattr(spec, key) for key in sizes} and (shape.bias or not spec.bias)


def _named_by(name: str, module: nn.Module, pattern: str) -> bool:
    """Whether a pattern names a module; an expert's projection also answers to the name of the whole."""
    owner = name.rsplit(".", 2)[0] if isinstance(module, ExpertProjection) else name
    return fits(name, pattern) or fits(owner, pattern)


def _left_out(name: str, wanted: Sequence[str], exclude: str | Sequence[str]) -> bool:
    """Whether a layer is excluded; what is left out by default is not where a pattern of ``wanted`` names it."""
    named = exclude == (HEAD,) and any(pattern.endswith(HEAD.lstrip("*")) for pattern in wanted)
    return matches(name, exclude) and not named


def _unlike_its_base(module: nn.Module) -> str | None:
    """Why a module may compute something else than the known layer that it is a kind of, or None."""
    base, kind = registered_type(module), type(module)
    if base is None:
        return None
    for name in ("forward", "_conv_forward"):  # the second is what a convolution's own forward calls
        replacement = vars(module).get(name)
        replacement = getattr(replacement, "_torchdynamo_orig_callable", replacement)  # torch.compile(layer.forward)
        calls_it = hasattr(module, "_hf_hook") or hasattr(module, "_original_forward")  # accelerate's own
        function = getattr(replacement, "__func__", replacement)
        if replacement is not None and not calls_it and function is not getattr(kind, name, None):
            return f"{name} was replaced on the module"
        if getattr(kind, name, None) is not getattr(base, name, None):
            definer = next(cls for cls in kind.__mro__ if name in vars(cls))
            if f"{definer.__module__.partition('.')[0]}.{definer.__name__}" not in _FAITHFUL:
                return f"{kind.__name__} overrides {name}; vouch for it with @loghook.adapter({kind.__name__})"
    return None


def find_logged(model: nn.Module, manifest: Manifest, origin: Path) -> list[Layer]:
    """Find the layers of the log at ``origin`` in a model, by name; raise where they are not those that were logged."""
    sides = draw_sides(manifest.layers, manifest.projection, manifest.seed)
    modules, layers = dict(named_modules(model)), []
    for spec in manifest.layers:
        module = modules.get(spec.name)
        adapter = None if module is None or _unlike_its_base(module) else find_adapter(module)
        if module is None or adapter is None:
            raise MismatchError(f"the model has no layer {spec.name!r} as in {origin}: attach the one that was logged.")
        if not fits_record(spec, module, adapter):
            now = adapter.geometry(module)
            raise MismatchError(
                f"layer {spec.name!r} takes {spec.in_features} to {spec.out_features} features (bias: {spec.bias}) in "
                f"{origin}, and {now.in_features} to {now.out_features} (bias: {now.bias}) here: attach the model that "
                "was logged."
            )
        layers.append(Layer(spec, module, adapter, *sides[spec.name]))
    return layers
