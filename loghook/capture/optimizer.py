"""Where an optimiser keeps the moments of watched layers, for rows of what it makes of a gradient."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from loghook.capture.layers import Layer
from loghook.capture.models import in_flat_parameter, unwrap
from loghook.errors import ConfigError, StateError, UnsupportedError


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments of one layer, read anew whenever a block opens."""

    gradient: str  # "normalized" or "adam"
    optimizer: Any
    parameters: Sequence[tuple[nn.Parameter, dict[str, Any]]]  # the weight, perhaps the bias; each with its options

    def held(self) -> list[Tensor]:
        states = [self.optimizer.state.get(parameter, {}) for parameter, _ in self.parameters]
        return [state[key] for state in states for key in ("exp_avg", "exp_avg_sq") if key in state]

    def read(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return what ``update_rows`` takes of them, arranged as the layer's gradient: mean, square and numbers."""
        moments: dict[str, list[Tensor]] = {
            key: [] for key in ("exp_avg", "exp_avg_sq")[self.gradient == "normalized" :]
        }
        numbers: list[Tensor] = []
        for parameter, group in self.parameters:
            state = self.optimizer.state.get(parameter, {})
            if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
                raise StateError(
                    f"the optimizer holds {sorted(state) or 'nothing'} of layer {layer.name!r}, and not step, exp_avg "
                    "and exp_avg_sq: load its state, or take its first step before the first block."
                )
            step = state["step"]
            seen = not isinstance(step, Tensor) or step.device.type == "cpu"  # a device would have to be waited for
            if self.gradient == "normalized" and seen and not step:
                raise StateError(
                    f"the optimizer has taken no step, so that its moments of layer {layer.name!r} are zero: load the "
                    "state of one that trained, or take the first step before the first block."
                )
            for key, values in moments.items():
                if type(state[key]) is not Tensor or state[key].shape != parameter.shape:
                    raise UnsupportedError(
                        f"the optimizer's moments of layer {layer.name!r} are sharded or quantised: log on one "
                        "process, from a checkpoint with plain Adam state."
                    )
                values.append(state[key].to(device, dtype))
            width = 1 if numbers else layer.spec.in_features  # a bias is the last column
            numbers.append(self._numbers(group, step, device, dtype)[:, None].expand(-1, width))
        arranged = {
            key: layer.adapter.gradient(layer.module, values[0], values[1] if len(values) > 1 else None)
            for key, values in moments.items()
        }
        return arranged.get("exp_avg"), arranged["exp_avg_sq"], torch.cat(numbers, 1)

    def _numbers(self, group: dict[str, Any], step: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        (beta1, beta2), eps = group["betas"], group["eps"]
        if self.gradient == "adam":
            return _constants((1 - float(beta1), 1 - float(beta2), float(eps)), device, dtype)
        numbers = _constants((math.log(beta2), float(eps)), device, dtype).clone()
        numbers[0].mul_(step).expm1_().neg_()  # 1 - beta2^step, with a step that may lie on the device
        return numbers


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers on a device, kept there: to bring them waits for all that the device has yet to do."""
    return torch.tensor(values, device=device, dtype=dtype)


def bind(model: nn.Module, layers: Sequence[Layer], optimizer: Any, gradient: str) -> None:
    """Tell layers where ``optimizer`` keeps their moments; raise where rows of its update could not be exact."""
    if gradient == "plain":
        if optimizer is not None:
            raise ConfigError(
                "optimizer= goes with gradient='normalized' or 'adam' only (questions to a log of 'adam' are plain "
                "gradients): leave it out."
            )
        return
    groups = {id(p): group for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
    uses = Counter(id(p) for module in unwrap(model).modules() for p in module.parameters(recurse=False))
    for layer in layers:
        held: list[tuple[nn.Parameter, dict[str, Any]]] = []
        for name in ("weight", "bias")[: 1 + layer.spec.bias]:
            parameter = getattr(layer.module, name, None)
            # An exact type: sharded and quantised weights are of others.
            if type(parameter) is not nn.Parameter or in_flat_parameter(parameter):
                raise UnsupportedError(
                    f"layer {layer.name!r} holds no plain {name} (sharded, quantised, fused or computed) with moments "
                    f"for gradient={gradient!r}: exclude it, or log gradient='plain'."
                )
            group = groups.get(id(parameter), {})
            if not {"betas", "eps"} <= group.keys() or group.get("maximize"):
                found = "does not hold" if not group else "does not train as Adam does"
                raise ConfigError(
                    f"gradient={gradient!r} reads Adam's moments, and optimizer={type(optimizer).__name__} {found} the "
                    f"{name} of layer {layer.name!r}: pass watch(..., optimizer=optimizer), or log.attach(model, "
                    "optimizer), the Adam or AdamW (minimising) that trains this very model, and exclude other layers."
                )
            if gradient == "adam" and uses[id(parameter)] > 1:
                raise UnsupportedError(
                    f"the {name} of layer {layer.name!r} belongs to other modules too, and gradient='adam' is no sum "
                    "of their parts: exclude the layer, or log gradient='normalized' or 'plain'."
                )
            held.append((parameter, group))
        layer.moments = Moments(gradient, optimizer, held)
