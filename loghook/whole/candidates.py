"""What ``tune`` tries: projections, ranks, dtypes and groups of layers that fit a budget, and ways to score them."""

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loghook.errors import ConfigError
from loghook.log.format import LayerSpec, Layout, grouped

PROJECTIONS: tuple[dict[str, Any], ...] = (
    {"projection": "random"},
    {"projection": "pca"},
    *({"projection": "whitened", "whitening": whitening} for whitening in (0.01, 0.1, 1.0)),
)
SCORINGS: tuple[dict[str, Any], ...] = (
    {"method": "dot"},
    *({"method": "ekfac", "damping": damping} for damping in (0.01, 0.1, 1.0)),
    {"method": "fisher", "damping": 0.1},  # dear, and its damping matters less
)

ROW = "{:<16}{:>5} {:<9}{:>9}  {:>8}  {:<12} {}"  # of ``Tuned``'s table


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to log and to score.

    Attributes:
        init: arguments of ``loghook.init``.
        layers: names of the layers that are logged.
        scoring: arguments of ``Log.influence``.
        bytes: of a stored row.
        fidelity: mean over queries of the Pearson correlation with the reference's scores of the same samples.
    """

    init: dict[str, Any]
    layers: tuple[str, ...]
    scoring: dict[str, Any]
    bytes: int
    fidelity: float

    def line(self, short: Mapping[str, str]) -> str:
        """A line of ``Tuned``'s table; ``short`` are the layers' names there, by pattern."""
        kind = self.init["projection"] + (f" {self.init['whitening']:g}" if "whitening" in self.init else "")
        scoring = " ".join(str(value) for value in self.scoring.values())
        kinds = ", ".join(short[pattern] for pattern in grouped(self.layers))
        size, fidelity = f"{self.bytes:,}", f"{self.fidelity:.3f}"
        return ROW.format(kind, self.init["rank"], self.init["dtype"], size, fidelity, scoring, kinds)


def shortened(patterns: Collection[str]) -> dict[str, str]:
    """Of each pattern the shortest end, of whole parts, that no other has."""
    ends = {p: [".".join(p.split(".")[at:]) for at in reversed(range(p.count(".") + 1))] for p in patterns}
    often = Counter(itertools.chain(*ends.values()))
    return {p: next((end for end in ends[p] if often[end] == 1), p) for p in patterns}


def plans(
    specs: Sequence[LayerSpec],
    projections: Sequence[dict[str, Any]],
    ranks: Sequence[int],
    dtypes: Sequence[str],
    limit: float,
    subsets: bool,
) -> list[tuple[dict[str, Any], list[str]]]:
    """Arguments of ``loghook.init`` and the dtypes in which such rows, or those of some layers, fit the budget."""
    widest = max(max(spec.widths) for spec in specs)
    names = [spec.name for spec in specs]
    smallest_sets = list(grouped(names).values()) if subsets else [names]
    fitting: list[tuple[dict[str, Any], list[str]]] = []
    sizes: list[int] = []  # bytes of the smallest row of each kind, whether it fits or not
    for projection, rank in itertools.product(projections, ranks):
        whole = projection["projection"] == "none"  # of which a rank makes nothing else
        if rank > widest or (whole and rank > min(ranks)):
            continue
        most = widest if whole else rank
        projected = [replace(s, k_in=min(most, s.k_in), k_out=min(most, s.k_out)) for s in specs]
        layouts = [Layout(s for s in projected if s.name in group) for group in smallest_sets]
        tried = [dtype for dtype in dtypes if dtype != "int1" or projection["projection"] == "whitened"]
        smallest = {dtype: min(layout.codec(dtype).row_bytes for layout in layouts) for dtype in tried}
        sizes += smallest.values()
        if fits := [dtype for dtype, size in smallest.items() if size <= limit]:
            fitting.append((projection | {"rank": rank}, fits))
    if not sizes:
        raise ConfigError(
            f"nothing to try: ranks={list(ranks)} must not be above the widest layer's {widest:,}, and 'int1' takes a "
            f"whitened projection (dtypes={list(dtypes)}, projections={[p['projection'] for p in projections]})."
        )
    if not fitting:
        raise ConfigError(
            f"bytes_per_sample={limit:,} is less than the smallest row to be tried takes ({min(sizes):,}): allow more, "
            "or try lower ranks or fewer bits."
        )
    return fitting
