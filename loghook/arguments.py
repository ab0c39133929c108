"""Checks of arguments that say what each should be. Numbers of any library become Python's own, which JSON has."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from loghook.errors import ConfigError


def choose(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise unless a value is one of the choices."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}.")


def whole(name: str, value: Any, least: float = 1, most: float = math.inf, *, hint: str = "") -> int:
    """Return a whole number of any type but bool, within its bounds, as an int; ``hint`` follows in the error."""
    try:
        if not isinstance(value, bool) and least <= (number := operator.index(value)) <= most:
            return number
    except TypeError:
        pass
    bounds = f"from {least} to {most}" if most < math.inf else f"of at least {least}" if least > -math.inf else ""
    raise ConfigError(f"{name}={value!r} must be a whole number {bounds}".rstrip() + f"{hint}.")


def positive(name: str, value: Any, *, hint: str = "") -> float:
    """Return a positive, finite number of any type but bool as a float."""
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"{name}={value!r} must be a positive, finite number{hint}.")
    return number


def plain(number: Any) -> Any:
    """A number of numpy's or torch's as Python's own: JSON knows no others. Anything else is as it was."""
    return number.item() if isinstance(number, np.generic | Tensor) and number.ndim == 0 else number
