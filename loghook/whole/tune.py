"""``tune``: choose layers, projection, rank, dtype, method and damping by what they keep of whole-gradient scores.

How well a log's scores correlate with those of a better method that stores nothing, query by query, predicts how well
they predict retraining: the noise that a projection adds has nothing to do with the truth (docs/methods.md has the
figures). It is measured on a few hundred samples; the log itself is then made once, with the choice.
"""

import contextlib
import glob
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loghook.arguments import choose, whole
from loghook.capture.config import Config
from loghook.capture.plan import parse_size
from loghook.capture.run import Run
from loghook.errors import ConfigError
from loghook.influence.engine import influence
from loghook.influence.fidelity import likeness
from loghook.influence.precondition import Metric
from loghook.influence.scores import Scores
from loghook.log import maintain
from loghook.log.codec import DTYPES
from loghook.log.format import Layout, grouped
from loghook.log.query import Query
from loghook.log.reader import Reader
from loghook.processes import all_gather, broadcast, on_first
from loghook.progress import bar
from loghook.project.projection import FITTED, KINDS
from loghook.whole.candidates import PROJECTIONS, ROW, SCORINGS, Candidate, plans, shortened
from loghook.whole.fit import Fit
from loghook.whole.refine import OutputLoss, Outputs
from loghook.whole.scoring import Scoring, Walk, walked

LEAST = 10  # samples
SLACK = 0.005  # fidelities that differ by less are taken for equal, and the smaller row wins
# Of the refined reference. Of 0.1, 1, 3 and 10 the one by which no choice was clearly worse on any shipped truth.
DAMPING = 1.0
Batches = Callable[[], Walk]
Judge = Callable[[np.ndarray], float]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What ``tune`` found; print it.

    Attributes:
        candidates: the best scoring of every projection, rank, dtype and choice of layers within the budget, cheapest
            first.
        best: the choice among them.
        samples: training samples that it was measured on.
        queries: questions.
        reference: what the scores were compared with.
        factors: folder of the factors.
        watched: arguments of ``Fit.watch``.
    """

    candidates: tuple[Candidate, ...]
    best: Candidate
    samples: int
    queries: int
    reference: str
    factors: str
    watched: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for ``loghook.init``: the choice, and its fidelity, which the log keeps."""
        fidelity = {
            "pearson": round(self.best.fidelity, 4),
            "reference": self.reference,
            "samples": self.samples,
            "queries": self.queries,
            "scoring": self.best.scoring,
        }
        return _with_factors(self.best.init, self.factors) | {"fidelity": fidelity}

    @property
    def watch(self) -> dict[str, Any]:
        """Arguments for ``run.watch``: those of the factors, with the layers that were chosen."""
        return self.watched | {"include": [glob.escape(name) for name in self.best.layers], "exclude": ()}

    def __str__(self) -> str:
        """A table of what nothing cheaper is as good as, cheapest first."""
        lines = [
            f"fidelity to {self.reference}: {self.samples} samples, {self.queries} queries",
            ROW.format("projection", "rank", "dtype", "bytes", "fidelity", "scored by", "layers"),
        ]
        short, top = shortened(grouped(name for c in self.candidates for name in c.layers)), -np.inf
        for candidate in self.candidates:
            if candidate.fidelity > top or candidate is self.best:
                lines.append(candidate.line(short) + "  <-- chosen" * (candidate is self.best))
            top = max(top, candidate.fidelity)
        return "\n".join(lines)


def tune(
    fit: Fit,
    samples: Batches,
    queries: Batches,
    loss: Callable[[Any], Any],
    *,
    outputs: Outputs | None = None,
    output_loss: OutputLoss | None = None,
    judge: Judge | None = None,
    bytes_per_sample: float | str | None = None,
    subsets: bool = True,
    projections: Sequence[dict[str, Any] | str] = PROJECTIONS,
    ranks: Sequence[int] = (16, 32, 64),
    dtypes: Sequence[str] = ("float32", "int8", "int1"),
    methods: Sequence[dict[str, Any] | str] = SCORINGS,
    damping: float | None = None,
) -> Tuned:
    """Measure how well small logs reproduce whole-gradient scores, and choose the best within a budget.

    All small logs are made in one walk over the samples.

    Args:
        fit: finished factors of the model, from ``loghook.fit``.
        samples: called for each walk over a few hundred training samples, ``lambda: ...``; yields (ids, batch), or
            (ids, batch, arguments of the batch's block) such as ``{"mask": mask}``.
        queries: the same for some questions.
        loss: batch -> summed loss through the watched model.
        outputs: with ``output_loss``, as in ``Fit.refine``: the reference is then the refined questions, whose
            curvature is taken from the samples, instead of EK-FAC. It costs more, and is nearer to retraining.
        output_loss: see ``outputs``.
        judge: what is known of the answers: scores (Q, N), in the order of the walks, -> a number, more is better, like
            ``lambda scores: judges.mrr(scores, relevant).mean``. The reference is then made of the groups of layers
            (see ``subsets``) whose EK-FAC scores it likes best. Report on other queries than it saw.
        bytes_per_sample: the most that a stored row may take, a number or as "50 kB"; None for no limit.
        subsets: whether groups of layers may be left out. A group is what differs in numbers only, such as
            ``model.layers.*.mlp.down_proj``; they are added one by one, the one that helps most first.
        projections: names of projections to try, or arguments of ``loghook.init``: projection, whitening and seed.
        ranks: ranks to try with each.
        dtypes: dtypes to try with each; "int1" is tried on whitened rows only.
        methods: arguments of ``Log.influence``, or names of methods, to try with each.
        damping: of the reference; by default that of ``Fit.score`` or, for refined questions, 1.

    Returns:
        The measured candidates and the choice: the smallest row whose fidelity is within 0.005 of the best.

    Raises:
        ConfigError: if nothing fits the budget, the two losses differ, or ``judge`` has nothing to choose.
    """
    for name, walk in (("samples", samples), ("queries", queries)):
        if not callable(walk):
            raise ConfigError(f"{name}= is a function here, called several times, that yields (ids, batch).")
    _ = fit.model  # raises where none is watched
    limit = math.inf if bytes_per_sample in (None, math.inf) else parse_size(bytes_per_sample, "bytes_per_sample")
    ranks = [whole("ranks", rank) for rank in np.atleast_1d(np.asarray(ranks, dtype=object))]
    for dtype in dtypes:
        choose("dtypes", dtype, DTYPES)
    projected = [{"projection": p} if isinstance(p, str) else p for p in projections]
    for projection in projected:
        choose("projections", projection.get("projection"), KINDS)
        for name in projection:
            choose("projections, argument", name, ("projection", "whitening", "seed"))
    tried = plans(fit.specs, projected, ranks, dtypes, limit, subsets)
    damped: dict[str, Any] = {} if damping is None else {"damping": damping}
    refining = None if outputs is None or output_loss is None else (outputs, output_loss)
    if (outputs is None) != (output_loss is None):
        raise ConfigError("the refined reference takes both outputs= and output_loss=: pass the two, or neither.")
    if judge is not None and not subsets:
        raise ConfigError("judge= chooses layers, which subsets=False leaves no choice of: pass one of the two.")
    if judge is not None and refining:
        raise ConfigError(
            "judge= chooses among the layers' scores, and refined questions belong to all layers together: pass "
            "judge=, or outputs= and output_loss=."
        )
    if refining:
        _check_losses(samples, loss, *refining)
    print(f"loghook tries {len(tried)} projections and ranks in {', '.join(dtypes)}, scored in {len(methods)} ways")
    questions = _questions([fit], queries, loss)[0]
    if refining:
        questions = _refined(fit, questions, samples, *refining, **{"damping": DAMPING} | damped)
    scoring = fit.score(questions, per_layer=judge is not None, **damped)
    scorings = [{"method": one} if isinstance(one, str) else one for one in methods]
    candidates: list[Candidate] = []
    with tempfile.TemporaryDirectory(prefix="loghook-tune-") as folder:
        folder = broadcast(folder)  # one for all processes
        logs = _small_logs(fit, scoring, [init for init, _ in tried], Path(folder), samples, queries, loss)
        reference = scoring.scores()
        if reference.values.shape[1] < LEAST:
            raise ConfigError(
                f"samples() yields {reference.values.shape[1]} samples, of which no correlation is known: yield a few "
                "hundred, each with an id of its own."
            )
        wanted, judged = (reference.values, "") if judge is None else _best_liked(judge, reference)
        for (path, query), (init, fitting) in zip(bar(logs, "tuning", "logs"), tried, strict=True):
            for dtype in fitting:
                stored = path if dtype == "float32" else path.with_name(f"{path.name}-{dtype}")
                if stored != path:
                    on_first(partial(maintain.compress, path, stored, dtype))
                candidates += _measured(
                    Reader(stored), query, init | {"dtype": dtype}, scorings, wanted, subsets, limit
                )
        all_gather(None)  # nobody reads there any more
    candidates.sort(key=lambda candidate: (candidate.bytes, -candidate.fidelity))
    if not candidates:
        raise ConfigError(
            f"bytes_per_sample={limit:,} leaves no room for all layers, which normalised scores need: allow more."
        )
    top = max(candidate.fidelity for candidate in candidates)
    return Tuned(
        candidates=tuple(candidates),
        best=next(candidate for candidate in candidates if candidate.fidelity >= top - SLACK),
        samples=wanted.shape[1],
        queries=len(questions),
        reference=reference.method + (f", damping {reference.damping:g}" if reference.damping else "") + judged,
        factors=str(fit.path),
        watched=fit.watched,
    )


def _check_losses(samples: Batches, loss: Callable[[Any], Any], outputs: Outputs, output_loss: OutputLoss) -> None:
    """Refined questions and rows must speak of one loss."""
    _, batch, _ = next(walked("samples", samples()))
    with torch.no_grad():
        whole, of_outputs = float(loss(batch)), float(output_loss(outputs(batch), batch))
    if abs(whole - of_outputs) > 1e-3 * abs(whole):
        raise ConfigError(
            f"loss(batch) is {whole:.6g} and output_loss(outputs(batch), batch) is {of_outputs:.6g}: both must be the "
            "same sum over the batch, of the model in eval mode."
        )


def _refined(
    fit: Fit, questions: Query, samples: Batches, outputs: Outputs, output_loss: OutputLoss, **damping: Any
) -> Query:
    """The questions refined on the samples, which are counted by their ids: a batch may hold packed documents."""
    counted = ((len(ids), batch) for ids, batch, _ in walked("samples", samples()))
    return fit.refine(
        questions, counted, lambda pair: outputs(pair[1]), lambda y, pair: output_loss(y, pair[1]),
        samples=itemgetter(0), **damping,
    )  # fmt: skip


def _with_factors(init: dict[str, Any], factors: str | Path) -> dict[str, Any]:
    return init | {"fitted": factors} if init["projection"] in FITTED else init


def _questions(runs: Sequence[Fit | Run], queries: Batches, loss: Callable[[Any], Any]) -> list[Query]:
    """The questions of each of several runs, in one walk."""
    batches: list[list[Query]] = []
    for ids, batch, given in walked("queries", queries()):
        with contextlib.ExitStack() as stack:
            batches.append([stack.enter_context(run.query(data_id=ids, **given)) for run in runs])
            loss(batch).backward()
    return [Query.concat(list(of_run)) for of_run in zip(*batches, strict=True)]


def _small_logs(
    fit: Fit, scoring: Scoring, inits: Sequence[dict[str, Any]], folder: Path, samples: Batches, queries: Batches,
    loss: Callable[[Any], Any],
) -> list[tuple[Path, Query]]:  # fmt: skip
    """Log the samples with every projection, and score them, in one walk; then ask the questions in another."""
    with contextlib.ExitStack() as stack:
        runs = []
        for i, init in enumerate(inits):
            # The first of an id alone, as the reference has it: a sampler may pad with repeats.
            config = Config(path=folder / str(i), **({"on_repeat": "first"} | _with_factors(init, fit.path)))
            run = Run(config, resume=False, overwrite=False)
            runs.append(stack.enter_context(run))
            with contextlib.redirect_stdout(io.StringIO()):
                run.watch(fit.model, **fit.watched)
        for ids, batch, given in walked("samples", samples()):
            with contextlib.ExitStack() as blocks:
                for block in (scoring, *runs):
                    blocks.enter_context(block(data_id=ids, **given))
                loss(batch).backward()
        for run in runs:
            run.finalize()
        questions = _questions(runs, queries, loss)
    return [(run.path, query) for run, query in zip(runs, questions, strict=True)]


def _measured(
    log: Reader,
    query: Query,
    init: dict[str, Any],
    methods: Sequence[dict[str, Any]],
    wanted: np.ndarray,
    subsets: bool,
    limit: float,
) -> list[Candidate]:
    """The best scoring of one log, for all its layers or for each number of groups of them, of rows within a limit."""
    groups = grouped(log.layers)
    best: dict[int, Candidate] = {}  # by the number of groups

    def fits(patterns: list[str]) -> bool:
        return _layout(log, groups, patterns).codec(init["dtype"]).row_bytes <= limit

    for scoring in methods:
        metric, others = Metric.among(scoring)
        scores = influence(log, query, metric, per_layer=True, **others)
        # Norms are over all layers, so that normalised scores do not add up to those of some.
        if subsets and scores.normalize is None:
            grown = _grown(_by_group(scores), partial(likeness, wanted), fits)
            choices = [(patterns, fidelity) for patterns, _, fidelity in grown]
        else:
            choices = [(list(groups), likeness(wanted, scores.values))] if fits(list(groups)) else []
        for patterns, fidelity in choices:
            if len(patterns) not in best or fidelity > best[len(patterns)].fidelity:
                layout = _layout(log, groups, patterns)
                # The same rows: a side no wider than the rank is kept whole.
                rank = min(init["rank"], max(max(spec.widths) for spec in layout.layers))
                best[len(patterns)] = Candidate(
                    init=init | {"rank": rank},
                    layers=tuple(spec.name for spec in layout.layers),
                    scoring=scoring,
                    bytes=layout.codec(init["dtype"]).row_bytes,
                    fidelity=fidelity,
                )
    return list(best.values())


def _layout(log: Reader, groups: dict[str, list[str]], patterns: Sequence[str]) -> Layout:
    """The layout of rows that hold some groups of layers."""
    names = {name for pattern in patterns for name in groups[pattern]}
    return Layout(spec for spec in log.layout.layers if spec.name in names)


def _best_liked(judge: Judge, reference: Scores) -> tuple[np.ndarray, str]:
    """Scores (Q, N) of the groups of layers that a judge likes best, added up, and what to say of them."""
    patterns, scores, judgement = max(_grown(_by_group(reference), judge), key=itemgetter(2))
    kinds = ", ".join(pattern.rpartition(".")[2] for pattern in patterns)
    return scores, f", of {kinds}, judged {judgement:.3f}"


def _by_group(scores: Scores) -> dict[str, np.ndarray]:
    """Scores (Q, N) of each group of layers."""
    assert scores.by_layer is not None
    by_layer = dict(zip(scores.layers, scores.by_layer, strict=True))
    return {
        pattern: np.sum([by_layer[name] for name in names], axis=0) for pattern, names in grouped(scores.layers).items()
    }


def _grown(
    by_group: dict[str, np.ndarray], judge: Judge, fits: Callable[[list[str]], bool] = lambda patterns: True
) -> Iterator[tuple[list[str], np.ndarray, float]]:
    """Add up scores (Q, N) of groups, the one that helps most of those that fit: groups so far, scores, judgement."""
    chosen: list[str] = []
    total: Any = 0
    while rest := [pattern for pattern in by_group if pattern not in chosen and fits([*chosen, pattern])]:
        judgements = {pattern: float(judge(total + by_group[pattern])) for pattern in rest}
        if not all(map(math.isfinite, judgements.values())):
            raise ConfigError(f"judge(scores) returns {min(judgements.values())!r}, which says nothing: look at it.")
        best = max(rest, key=judgements.__getitem__)
        chosen, total = [*chosen, best], total + by_group[best]
        yield chosen, total, judgements[best]
