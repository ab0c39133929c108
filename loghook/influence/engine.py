"""The scan: preconditioned queries against every row of the log, in blocks, with flat memory."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from loghook.arguments import choose, whole
from loghook.errors import ConfigError, UnfinishedWarning, warn
from loghook.influence.precondition import Metric, progress, solvers, working_dtype
from loghook.influence.products import Product, products
from loghook.influence.scores import Scores
from loghook.influence.solvers import Solver, nonzero
from loghook.log.disk import canonical_json, checksum
from loghook.log.files import load_kept, save_kept
from loghook.log.format import LayerSpec, fits, listed
from loghook.log.query import Query, require_match, require_one_log, require_one_query
from loghook.log.source import Source
from loghook.processes import all_gather, all_reduce, on_cpu, rank_and_size

SCORES_AT_A_TIME = 2**22  # many rows of a narrow log fit in a block, and a product takes several times its result

# preconditioned questions (Q, gradient_width) -> the best scores of each, and their places
Scan = Callable[[Tensor], tuple[np.ndarray, np.ndarray]]


@on_cpu
def influence(
    reader: Source,
    query: Query,
    metric: Metric,
    *,
    layers: Sequence[str] | None = None,
    top: int | None = None,
    per_layer: bool = False,
    query_dtype: str | None = None,
    scan: Scan | None = None,
) -> Scores:
    """Score every row of a log, or those that another ``scan`` chooses, for every question; see ``Log.influence``."""
    top = None if top is None else whole("top", top, hint=", or None for all scores")
    if top is not None and per_layer:
        raise ConfigError("top and per_layer exclude each other: per-layer scores need all rows; drop one.")
    choose("query_dtype", query_dtype, (None, "int1"))
    if query_dtype is not None and reader.codec.name != query_dtype:
        raise ConfigError(
            f"query_dtype={query_dtype!r} compares signs with signs, but {reader.path} is stored as "
            f"{reader.codec.name}: leave it out, or make a log of signs with log.compress(path, 'int1')."
        )
    require_match(query, reader.made, reader.manifest.values, str(reader.path), "log.attach(model)")
    metric.require_fit_for(query.direction)
    if scan is None:  # which reads a share of the log; an index holds all of it
        require_one_log(reader.path, len(reader))
        require_one_query(query, reader.path)
    require_rows(reader)
    chosen = choose_layers(reader, layers)
    questions, of_questions, of_rows = _prepare(reader, metric, chosen, query, with_rows=metric.normalize is not None)
    # What scores are divided by: the roots of both sides' quadratics, or of the rows' only.
    if metric.normalize == "unit":  # at once: products of small questions and small rows would not fit in float32
        questions /= _roots(of_questions)[:, None]
    questions = questions.to(working_dtype(reader))
    norms = None if of_rows is None else _roots(of_rows).to(questions)
    if scan is None:
        values, places, by_layer = _scan(reader, questions, chosen, query_dtype, norms, top, per_layer)
    else:
        values, places, by_layer = *scan(questions), None
    if not all(np.isfinite(scores).all() for scores in values):
        raise _not_finite("scores are", metric)
    return Scores(
        values=values,
        query_ids=query.data_ids,
        data_ids=reader.data_ids,
        places=places,
        by_layer=by_layer,
        layers=tuple(spec.name for spec in chosen),
        method=_named(query.direction or metric.method, reader, query_dtype),
        normalize=metric.normalize,
        **metric.stated,
        fingerprint=reader.fingerprint,
        log=str(reader.path),
        fidelity=_fidelity(reader, metric, query_dtype) if layers is None else None,
    )


def _roots(squares: Tensor) -> Tensor:
    return nonzero(squares.clamp(min=0).sqrt())


def _not_finite(what: str, metric: Metric) -> ConfigError:
    if metric.plain:
        return ConfigError(
            f"{what} not finite: products of these gradients do not fit in float32. Log and ask with a smaller scale=."
        )
    amount = metric.damping_abs or metric.damping
    return ConfigError(
        f"{what} not finite with method={metric.method!r} and damping {amount:.3g}: take a larger one (0.1 is usual)."
    )


def _named(method: str, reader: Source, query_dtype: str | None) -> str:
    """The method with what else decides the scores."""
    space = "whitened" if reader.manifest.projection == "whitened" else reader.manifest.gradient
    notes = [space] * (space != "plain") + ["1-bit questions"] * (query_dtype is not None)
    return f"{method} ({', '.join(notes)})" if notes else method


def _fidelity(reader: Source, metric: Metric, query_dtype: str | None) -> float | None:
    """What was measured of this scoring, if it was just this one that was measured."""
    tuned = reader.manifest.fidelity
    if tuned is None:
        return None
    try:
        measured, others = Metric.among(tuned["scoring"])
        pearson = float(tuned["pearson"])
    except (ConfigError, KeyError, TypeError, AttributeError, ValueError):  # from a later loghook, or a stranger
        return None
    same = (measured.method, measured.normalize, measured.stated) == (metric.method, metric.normalize, metric.stated)
    return pearson if same and {"query_dtype": None} | others == {"query_dtype": query_dtype} else None


@on_cpu
def self_influence(reader: Source, metric: Metric, layers: Sequence[str] | None) -> np.ndarray:
    """<H^-1 G, G> for each row of a log, summed over layers: (rows,) float32; kept with the log."""
    require_one_log(reader.path, len(reader))
    require_rows(reader)
    of_rows = _prepare(reader, metric, choose_layers(reader, layers), None, with_rows=True)[2]
    assert of_rows is not None
    values = of_rows.float().numpy()
    if not np.isfinite(values).all():
        raise _not_finite("self-influence is", metric)
    return values


def require_rows(reader: Source) -> None:
    """Raise if a log is empty, and warn, once for each open one, if it is not finished."""
    if not len(reader):
        hint = "log some first" if reader.finished else "let its run come to finalize(), or commit, and load it again"
        raise ConfigError(f"{reader.path} holds no rows yet: {hint}.")
    if reader.finished or reader.warned:
        return
    reader.warned = True
    warn(
        f"{reader.path} is not finished: only the {len(reader):,} rows so far are scored. To have all, let its run "
        "come to finalize(), with resume=True if it was interrupted, and load it again.",
        UnfinishedWarning,
    )


def choose_layers(reader: Source, layers: Sequence[str] | None) -> list[LayerSpec]:
    """The specs of some layers, or of all, in row order."""
    if layers is None:
        return list(reader.layout.layers)
    wanted = [layers] if isinstance(layers, str) else list(layers)
    unknown = [pattern for pattern in wanted if not any(fits(name, pattern) for name in reader.layers)]
    if not wanted:
        raise ConfigError(f"layers=[] leaves nothing to score: name some of {listed(reader.layers)}, or pass None.")
    if unknown:
        raise ConfigError(f"layers={wanted}: {unknown[0]!r} fits no layer of the log: {listed(reader.layers)}.")
    return [spec for spec in reader.layout.layers if any(fits(spec.name, pattern) for pattern in wanted)]


def _prepare(
    reader: Source,
    metric: Metric,
    chosen: Sequence[LayerSpec],
    query: Query | None,
    *,
    with_rows: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fit the curvature once for all that is made of it.

    Questions times H^-1 (Q, gradient_width), zero in layers that are left out; <q, H^-1 q> of each (Q,) and, if asked
    for, of each row (rows,), both float64.
    """
    width, columns = reader.layout.gradient_width, reader.layout.columns
    questions = (torch.zeros(0, width) if query is None else query.matrix[:, :width]).double()
    preconditioned, of_questions = torch.zeros_like(questions), questions.new_zeros(len(questions))
    kept_as = {
        "what": "self-influence",
        "method": "dot" if metric.plain else metric.method,
        "layers": checksum(json.dumps([spec.name for spec in chosen]).encode()),
        "scheme": 1,  # raised when the same arguments mean something else
    }
    key = canonical_json(kept_as | metric.stated).decode()
    of_rows = _recall(reader, key) if with_rows else None
    fresh = torch.zeros(len(reader), dtype=torch.float64) if with_rows and of_rows is None else None
    if query is not None or fresh is not None:
        for group in solvers(reader, metric, chosen):
            for name, solver in group.items():
                gradients = questions[:, columns[name]]
                preconditioned[:, columns[name]] = solver.apply(gradients)
                of_questions += solver.quadratic(gradients)
            if fresh is not None:
                _add_quadratics(reader, group, fresh)
    if fresh is not None:
        of_rows = reader.cache[key] = all_reduce(fresh)
        if reader.seal is not None and rank_and_size()[0] == 0:
            save_kept(reader.path, reader.seal, key, of_rows.numpy())
    return preconditioned, of_questions, of_rows


def _recall(reader: Source, key: str) -> Tensor | None:
    """The rows' self-influence, (rows,) float64, if it was computed before: from memory, or from the file."""
    if not all(all_gather(key in reader.cache)):
        # All take what rank 0 finds in the file, so that all or none compute, whatever each of them sees or has.
        reader.cache.pop(key, None)
        seal = reader.seal if rank_and_size()[0] == 0 else None
        values = all_gather(load_kept(reader.path, seal).get(key) if seal else None)[0]
        if values is not None and values.shape == (len(reader),) and values.dtype == np.float64:
            reader.cache[key] = torch.from_numpy(values)
    return reader.cache.get(key)


def _add_quadratics(reader: Source, group: dict[str, Solver], total: Tensor) -> None:
    columns = reader.layout.columns
    for place, block in progress(reader, "self-influence"):
        for name, solver in group.items():
            total[place] += solver.quadratic(block[:, columns[name]])


def _scan(
    reader: Source,
    questions: Tensor,
    chosen: Sequence[LayerSpec],
    query_dtype: str | None,
    norms: Tensor | None,
    top: int | None,
    per_layer: bool,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Scores of all rows, if asked for by layer too; or the best ``top`` of each question, merged block by block.

    They are divided by the rows' ``norms`` (rows,), if any.
    """
    queries = len(questions)
    product, stored = products(reader, questions, chosen, query_dtype)
    of_layers = [products(reader, questions, [spec], query_dtype)[0] for spec in chosen] if per_layer else []
    values = torch.zeros(queries, 0 if top else len(reader))
    by_layer = torch.zeros(len(of_layers), queries, len(reader))
    best, places = torch.empty(queries, 0, dtype=questions.dtype), torch.empty(queries, 0, dtype=torch.int64)

    def scored(multiply: Product, block: Tensor, place: slice) -> Tensor:
        scores = multiply(block)
        if norms is not None:
            scores /= norms[place]
        return scores

    step = max(1, SCORES_AT_A_TIME // max(1, queries))
    for place, block in progress(reader, "scoring", stored=stored):
        for start in range(0, len(block), step):
            part = block[start : start + step]
            chunk = slice(place.start + start, place.start + start + len(part))
            scores = scored(product, part, chunk)
            if top is None:
                values[:, chunk] = scores
                for layer_values, layer_product in zip(by_layer, of_layers, strict=True):
                    layer_values[:, chunk] = scored(layer_product, part, chunk)
                continue
            rows = torch.arange(chunk.start, chunk.stop)
            if best.shape[1] + len(rows) > top:  # what cannot be among the best need not be sorted
                near = ~(scores < torch.cat([best, scores], 1).topk(top).values[:, -1:]).all(0)
                scores, rows = scores[:, near], rows[near]
            best, places = _best(torch.cat([best, scores], 1), torch.cat([places, rows.expand(queries, -1)], 1), top)
    if top is None:
        return all_reduce(values).numpy(), None, all_reduce(by_layer).numpy() if per_layer else None
    best, places = _best(torch.cat(all_gather(best), 1), torch.cat(all_gather(places), 1), top)
    return best.float().numpy(), places.numpy(), None


def _best(scores: Tensor, places: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The ``top`` best of each row, equal scores in the order of the log."""
    by_place = places.argsort(dim=1, stable=True)
    ranked, order = scores.gather(1, by_place).sort(dim=1, descending=True, stable=True)
    return ranked[:, :top], places.gather(1, by_place).gather(1, order[:, :top])
