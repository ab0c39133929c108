"""Which share of a model's parameters the watched layers hold, and what is left out and why."""

from collections.abc import Collection
from typing import Any

from torch import nn

from loghook.capture.models import in_flat_parameter, named_modules


def coverage(model: nn.Module, watched: Collection[str], reasons: dict[str, str]) -> dict[str, Any]:
    """Make the record of what the watched layers hold and what is left out; see ``Manifest.coverage``."""
    flattened = _flattened(model)
    counted: set[Any] = set()
    covered = 0
    left_out: list[dict[str, Any]] = []
    modules = sorted(named_modules(model), key=lambda item: _owner(item[0]) not in watched)  # tied weights are covered
    for name, module in modules:
        own: dict[Any, int] = {id(p): p.numel() for p in module.parameters(recurse=False) if not in_flat_parameter(p)}
        own.update(flattened.get(module, {}))
        size = sum(n for key, n in own.items() if key not in counted)
        counted.update(own)
        if _owner(name) in watched:
            covered += size
        elif size:
            left_out.append({"name": name, "parameters": size, "reason": reasons.get(name, "not included")})
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
    """What is not covered, by the reason why."""
    found: dict[str, list[dict[str, Any]]] = {}
    for item in coverage["not_covered"]:
        found.setdefault(item["reason"], []).append(item)
    return found


def describe_coverage(layers: int, coverage: dict[str, Any]) -> str:
    """Say in a few lines what is watched and what is not."""
    total = max(1, coverage["total"])
    lines = [
        f"loghook watches {layers} layers with {coverage['covered'] / total:.1%} of {coverage['total']:,} parameters"
    ]
    for reason, items in by_reason(coverage).items():
        names = ", ".join(item["name"] or "(model)" for item in items[:3]) + (", ..." if len(items) > 3 else "")
        share = sum(item["parameters"] for item in items) / total
        lines.append(f"  not covered, {share:.1%}: {names} ({reason})")
    return "\n".join(lines)
