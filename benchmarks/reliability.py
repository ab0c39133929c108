"""What needs no retraining, judged on digits: a damping chosen from held-out rows, and what `trust` foretells of seeds.

Damping: for each log the LDS at the damping that held-out likelihood takes, at the default of 0.1, and at the best of
those tried. For EK-FAC, which `sweep` refuses without truth, the same rule is applied here to show why.

Trust: the correlation and the shared top 10 of two projection seeds as `trust` estimates them from one log, beside what
five seeds of the same model show.
"""

import itertools
from typing import Any

import numpy as np
import torch
from _common import Parser, write
from digits import Recipe, digits, load, logged, models
from tqdm import tqdm

import loghook
from loghook.evaluate import trust
from loghook.evaluate.lds import lds
from loghook.evaluate.sweep import held_out_likelihood
from loghook.factors import eigenbasis
from loghook.influence.fidelity import correlations

DAMPINGS = (1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ASKED = (("dot", 0.1), ("cosine", 0.1), ("fisher", 0.1), ("ekfac", 0.1), ("ekfac", 0.01))


def ekfac_likelihood(log: loghook.Log) -> np.ndarray:
    """Log-likelihood of half of the rows under EK-FAC with the other half's eigenvalues, for each damping."""
    fit = np.random.default_rng(0).permutation(len(log)) < len(log) // 2
    total, moments = np.zeros(len(DAMPINGS)), log.moments()
    for name in log.layers:
        basis = eigenbasis(log.layout, moments, name)
        squares = basis.rotate(torch.tensor(log.rows(name)[:]).double()).square()
        mine, others = squares[fit].mean(0), squares[~fit].mean(0)
        damped = [mine + d * mine.mean() for d in DAMPINGS]
        total -= [float((values.log() + others / values).sum()) for values in damped]
    return total


def main() -> None:
    a = Parser(__doc__).start()
    data, truth = digits(), load()
    trained = models(data, Recipe(), 3)
    dampings: list[dict[str, Any]] = []
    cases = [(0, 8), (0, 16), (0, 32), (1, 32), (2, 32), (0, None)]
    for which, rank in tqdm(cases, desc="dampings", unit=" logs", delay=2, leave=False):
        with logged(trained[which], data, rank=rank, seed=which) as (log, query):
            for method in ("fisher", "ekfac") if rank else ("ekfac",):
                judged = [
                    lds(log.influence(query, method, damping=d).values, truth.members, truth.losses, resamples=1).mean
                    for d in DAMPINGS
                ]
                fisher = method == "fisher"
                values = [v for _, v in held_out_likelihood(log, DAMPINGS)] if fisher else ekfac_likelihood(log)
                place = int(np.argmax(values))
                row = {"model": which, "rank": rank, "method": method, "chosen": DAMPINGS[place]}
                dampings.append(
                    row | {"lds": judged[place], "default": judged[DAMPINGS.index(0.1)], "best": max(judged)}
                )
    print("damping from held-out rows: LDS at the chosen one, at 0.1, at the best of ten")
    for row in dampings:
        print(
            f"model {row['model']} rank {row['rank'] or 'none':<5}{row['method']:<8}{row['chosen']:<8g}"
            f"{row['lds']:.3f}  {row['default']:.3f}  {row['best']:.3f}"
        )
    seeds: list[dict[str, Any]] = []
    for rank in (16, 32):
        values: dict[tuple[str, float], list[np.ndarray]] = {}
        foretold: dict[tuple[str, float], list[Any]] = {}
        for seed in tqdm(range(5), desc=f"trust, rank {rank}", unit=" seeds", delay=2, leave=False):
            with logged(trained[0], data, rank=rank, seed=seed) as (log, query):
                for method, damping in ASKED:
                    values.setdefault((method, damping), []).append(
                        log.influence(query, method, damping=damping).values.astype(np.float64)
                    )
                    if seed < 3:
                        found = trust(log, query, method, damping=damping, nulls=0)
                        foretold.setdefault((method, damping), []).append(found)
        for (method, damping), scores in values.items():
            tops = [np.argsort(-one, axis=1)[:, :10] for one in scores]
            pairs = list(itertools.combinations(range(5), 2))
            shared = [[len(np.intersect1d(*both)) for both in zip(tops[a], tops[b], strict=True)] for a, b in pairs]
            found = foretold[method, damping]
            seeds.append(
                {
                    "rank": rank,
                    "method": method,
                    "damping": damping,
                    "correlation": float(np.median([correlations(scores[a], scores[b]) for a, b in pairs])),
                    "foretold_correlation": [float(np.median(one.correlation)) for one in found],
                    "top_10": float(np.mean(shared)),
                    "foretold_top_10": [float(one.overlap.mean()) for one in found],
                }
            )
    print("trust: correlation of two seeds, seen and foretold by three; shared top 10, seen and foretold")
    for row in seeds:
        r, ten = (
            " ".join(f"{v:.{n}f}" for v in row[key]) for key, n in (("foretold_correlation", 3), ("foretold_top_10", 1))
        )
        print(
            f"rank {row['rank']:<4}{row['method']:<8}{row['damping']:<6g}{row['correlation']:.3f} ({r})  "
            f"{row['top_10']:.1f} ({ten})"
        )
    if a.save:
        write("reliability", {"dampings": dampings, "seeds": seeds})


if __name__ == "__main__":
    main()
