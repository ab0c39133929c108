"""Which method and damping: chosen against retraining, or, for the Fisher, by the likelihood of held-out rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from loghook.arguments import positive
from loghook.errors import ConfigError
from loghook.evaluate.lds import Estimate, floats, lds, require_order
from loghook.influence import engine
from loghook.influence.precondition import Metric, in_memory
from loghook.log.format import LayerSpec
from loghook.log.query import Query
from loghook.log.reader import Reader
from loghook.processes import on_cpu
from loghook.progress import bar

DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Setting:
    """One method and damping.

    Attributes:
        method: of ``Log.influence``.
        damping: relative to each layer's mean eigenvalue.
        criterion: what the choice is made by, more is better; see ``Sweep.criterion``.
        held_out: the LDS on the queries that the choice did not see, or None without ground truth.
    """

    method: str
    damping: float
    criterion: float
    held_out: Estimate | None


@dataclass(frozen=True)
class Sweep:
    """What ``sweep`` found; print it.

    Attributes:
        settings: every method and damping, as tried.
        criterion: what ``Setting.criterion`` measures.
    """

    settings: tuple[Setting, ...]
    criterion: str

    @property
    def best(self) -> Setting:
        """The setting with the largest criterion."""
        return max(self.settings, key=lambda setting: setting.criterion)

    def __str__(self) -> str:
        """A table, its best line marked."""
        lines = [f"method   damping  {self.criterion}"]
        for setting in self.settings:
            line = f"{setting.method:<8} {setting.damping:<8g} {setting.criterion:.4f}"
            if (held_out := setting.held_out) is not None:
                line += f"; on the other queries {held_out.mean:.4f} ({held_out.low:.4f} to {held_out.high:.4f})"
            lines.append(line + ("  <- best" if setting is self.best else ""))
        return "\n".join(lines)


@on_cpu
def sweep(
    log: Reader,
    query: Query | None = None,
    *,
    methods: str | Sequence[str] | None = None,
    dampings: ArrayLike = DAMPINGS,
    members: ArrayLike | None = None,
    losses: ArrayLike | None = None,
    ids: Sequence[int | str] | None = None,
    normalize: str | None = None,
    seed: int = 0,
) -> Sweep:
    """Try dampings and find the best.

    With ``members`` and ``losses`` (ground truth, as for ``lds``) a random half of the queries chooses by LDS and the
    other half reports. Without them the damping of the Fisher is chosen that gives rows of one half of the data the
    largest likelihood under a Gaussian fitted on the other half; docs/methods.md says how far that goes.

    Args:
        log: an open log.
        query: at least four questions; not needed without ground truth.
        methods: "fisher" and "ekfac" by default; without ground truth "fisher" alone.
        dampings: relative to the mean eigenvalue: one or several.
        members: (m, N) bool, which samples each retraining used.
        losses: (m, queries) of each question after each retraining.
        ids: of the N samples in the order of ``members``; None: the log's rows in their own.
        normalize: as for ``Log.influence``; with ground truth only.
        seed: of the split in halves.

    Raises:
        ConfigError: too few queries or rows, one of ``members`` and ``losses`` alone or of a shape that does not fit,
            no dampings, or a method that cannot be tuned without ground truth.
    """
    tried = [positive("damping", damping) for damping in np.atleast_1d(dampings)]
    methods = [methods] if isinstance(methods, str) else None if methods is None else list(methods)
    if not tried or methods == []:
        empty, remedy = ("methods", "name some") if tried else ("dampings", "pass some positive numbers")
        raise ConfigError(f"{empty}=[] has none to try: {remedy}.")
    if (members is None) != (losses is None):
        raise ConfigError("ground truth is both members= and losses=: pass the two, or neither.")
    if members is None or losses is None:
        if methods not in (None, ["fisher"]):
            raise ConfigError(  # EK-FAC's eigenvalues are averages: the rule would always take the smallest damping
                f"methods={methods} cannot be tuned without retraining: pass members= and losses=, keep damping=0.1, "
                "or sweep method 'fisher'."
            )
        settings = [Setting("fisher", d, nats, None) for d, nats in held_out_likelihood(log, tried, seed)]
        return Sweep(tuple(settings), "log-likelihood of held-out rows, nats a value")
    if query is None or len(query) < 4:
        raise ConfigError("sweep against ground truth needs a query of at least 4 questions: half of them choose.")
    losses, expected = floats("losses", losses, 2), (len(np.atleast_1d(members)), len(query))
    if losses.shape != expected:
        raise ConfigError(
            f"losses {losses.shape} must be (retrainings, queries), here {expected}: a row for each row of "
            "members, a column for each question."
        )
    if ids is None:
        remedy = f"pass ids=range({len(log)}), or ids=log.data_ids if members= has the order of the log"
        require_order(log.data_ids, remedy)
    order = np.random.default_rng(seed).permutation(len(query))
    choose, report = order[: len(order) // 2], order[len(order) // 2 :]
    settings = []
    for method in methods or ("fisher", "ekfac"):
        for damping in tried:
            metric = Metric(method=method, damping=damping, normalize=normalize)
            values = engine.influence(log, query, metric).align(ids).values
            mean = lds(values[choose], members, losses[:, choose], resamples=1).mean
            settings.append(Setting(method, damping, mean, lds(values[report], members, losses[:, report])))
    return Sweep(tuple(settings), f"LDS on {len(choose)} queries")


def held_out_likelihood(log: Reader, dampings: Sequence[float], seed: int = 0) -> list[tuple[float, float]]:
    """Score dampings of the Fisher by a proper scoring rule, without any ground truth.

    With H = mean of vec(G) vec(G)^T over a random half of the rows, the mean over the other half of
    ``log N(vec(G); 0, H + d I)``, summed over layers.

    Returns:
        Each damping with its log-likelihood, in nats a value of a row.
    """
    if len(log) < 4:
        raise ConfigError(f"{log.path} holds {len(log)} rows: two halves of it need at least 4.")
    fit = np.zeros(len(log), dtype=bool)
    fit[np.random.default_rng(seed).permutation(len(log))[: len(log) // 2]] = True
    totals = np.zeros(len(dampings))
    with bar(None, "held-out rows", "layers", len(log.layers)) as progress:
        for group in in_memory(log.layout.layers, len(log)):
            for width, (held_out, fitted), outside in _second_moments(log, group, torch.from_numpy(fit)):
                totals += _log_likelihood(width, held_out, fitted, outside, dampings)
                progress.update()
    return list(zip(dampings, (totals / log.layout.gradient_width).tolist(), strict=True))


def _second_moments(log: Reader, group: Sequence[LayerSpec], fit: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The width of some layers, and means of ``vec(G) vec(G)^T`` over held-out and over fitted rows, in one scan.

    Of a layer with fewer fitted rows than values they are in coordinates of what these span. Last comes the mean square
    of held-out rows outside.
    """
    n, columns = int(fit.sum()), log.layout.columns
    counts = torch.tensor([len(fit) - n, n])[:, None, None]
    few: dict[str, list[Tensor]] = {spec.name: [] for spec in group if n < spec.width}
    sums = {spec.name: torch.zeros(2, *2 * (min(n, spec.width),), dtype=torch.float64) for spec in group}

    def add(name: str, rows: Tensor, fitted: Tensor) -> None:
        for total, half in zip(sums[name], (rows[~fitted], rows[fitted]), strict=True):
            total.addmm_(half.T, half)

    for place, block in log.blocks():
        for spec in group:
            rows = block[:, columns[spec.name]].double()
            if spec.name in few:
                few[spec.name].append(rows)
            else:
                add(spec.name, rows, fit[place])
    for spec in group:
        outside = torch.zeros((), dtype=torch.float64)
        if spec.name in few:
            rows = torch.cat(few.pop(spec.name))
            inside = rows @ torch.linalg.qr(rows[fit].T).Q
            add(spec.name, inside, fit)
            outside = (rows[~fit].square().sum() - inside[~fit].square().sum()).clamp(min=0) / counts[0, 0, 0]
        yield spec.width, sums.pop(spec.name) / counts, outside


def _log_likelihood(
    width: int, held_out: Tensor, fitted: Tensor, outside: Tensor, dampings: Sequence[float]
) -> np.ndarray:
    """Mean log-likelihood of held-out rows under the Gaussian of fitted ones, for each damping: (dampings,) float64."""
    values, vectors = torch.linalg.eigh(fitted)
    values, energy = values.clamp(min=0), (vectors * (held_out @ vectors)).sum(0)
    mean = values.sum() / width
    if mean == 0:  # a layer that slept: nothing to tell dampings apart by
        return np.zeros(len(dampings))
    rest = width - len(values)  # eigenvalues that are 0
    d = mean * torch.tensor(dampings, dtype=torch.float64)[:, None]
    logs = (2 * np.pi * (values + d)).log().sum(1) + rest * (2 * np.pi * d[:, 0]).log()
    return -0.5 * (logs + (energy / (values + d)).sum(1) + outside / d[:, 0]).numpy()
