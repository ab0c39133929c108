"""Inverse curvature from factors on disk: rotations into eigenbases, and solvers for every layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from loghook.errors import ConfigError
from loghook.influence.precondition import PLAIN, Curvature
from loghook.influence.solvers import Diagonal
from loghook.project.projection import Side
from loghook.statistics import Eigenbasis, FactorStore

METHODS = ("ekfac", "kfac", *PLAIN)


def rotations(bases: Mapping[str, Eigenbasis]) -> dict[str, tuple[Side, Side]]:
    """Sides that rotate inputs and output gradients into the eigenbases; layers of one input share theirs."""
    found: dict[str, tuple[Side, Side]] = {}
    recent: list[Side] = []
    for name, basis in bases.items():
        inputs, outputs = (Side(len(q), q.T.float().contiguous()) for q in (basis.q_in, basis.q_out))
        same = (s for s in recent if s.width == inputs.width and torch.equal(s.matrix, inputs.matrix))  # type: ignore[arg-type]
        inputs = next(same, inputs)
        recent = [*recent[-2:], inputs]
        found[name] = inputs, outputs
    return found


def solvers(store: FactorStore, bases: Mapping[str, Eigenbasis], curvature: Curvature) -> dict[str, Diagonal]:
    """The damped inverse of every layer; a layer that never got a gradient contributes nothing."""
    if curvature.method not in METHODS or curvature.plain:
        raise ConfigError(
            f"method={curvature.method!r} has no whole-gradient form: choose one of {', '.join(METHODS)}."
        )
    values = (
        {name: basis.products for name, basis in bases.items()} if curvature.method == "kfac" else store.eigenvalues()
    )
    return {
        name: Diagonal(basis, values[name].to(basis.q_in.device), curvature.amount(float(values[name].double().mean())))
        for name, basis in bases.items()
    }


def unroll(
    rows: Tensor, columns: Mapping[str, slice], store: FactorStore, bases: Mapping[str, Eigenbasis], time: float
) -> tuple[Tensor, Tensor]:
    """Go back over a segment of training with rows (Q, width): the direction to score with, and what is left of them.

    In the eigenbasis of curvature H with eigenvalues l: ``(1 - exp(-t l)) / l * q`` and ``exp(-t l) * q``.
    """
    direction, carried = torch.empty_like(rows), torch.empty_like(rows)
    for name, eigenvalues in store.eigenvalues().items():
        basis, values = bases[name], eigenvalues.double()
        rotated = basis.rotate(rows[:, columns[name]].unflatten(1, values.shape))
        moved = torch.where(values > 0, -torch.expm1(-time * values) / values, torch.full_like(values, time))
        direction[:, columns[name]] = basis.rotate_back(rotated * moved.to(rows.dtype)).flatten(1)
        carried[:, columns[name]] = basis.rotate_back(rotated * torch.exp(-time * values).to(rows.dtype)).flatten(1)
    return direction, carried
