"""The scan: preconditioned queries against every row of the log, in blocks, with flat memory."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loghook.errors import ConfigError, MismatchError, UnfinishedWarning
from loghook.influence.precondition import Curvature, progress, solvers, working_dtype
from loghook.influence.products import products
from loghook.influence.scores import Scores
from loghook.influence.solvers import Solver, nonzero
from loghook.log.files import kept_name, load_kept, save_kept
from loghook.log.format import LayerSpec, checksum, listed
from loghook.log.query import Query, require_one_query, require_query
from loghook.log.reader import Reader
from loghook.processes import combine, gather, on_cpu, share

NORMALIZE = (None, "unit", "relatif")
# (reader, prepared, chosen layers, top, per_layer) -> values, places, scores by layer
Scan = Callable[..., tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]


@dataclass
class Prepared:
    """Queries made ready for the scan.

    Attributes:
        matrix: (Q, gradient_width) preconditioned, zero in layers that are left out.
        query_norms: (Q,) roots of the queries' self-influence, or None where not asked for.
        row_norms: (rows,) roots of the rows' self-influence, or None.
        query_dtype: None for questions in full precision, or "int1": they are cut to signs for the scan.
    """

    matrix: Tensor
    query_norms: Tensor | None
    row_norms: Tensor | None
    query_dtype: str | None


@on_cpu
def influence(
    reader: Reader,
    query: Query,
    *,
    method: str,
    damping: float = 0.1,
    damping_abs: float | None = None,
    normalize: str | None = None,
    layers: Sequence[str] | None = None,
    top: int | None = None,
    per_layer: bool = False,
    query_dtype: str | None = None,
    scan: Scan | None = None,
) -> Scores:
    """Score every row of a log, or those that another ``scan`` chooses, for every question; see ``Log.influence``."""
    if normalize not in NORMALIZE:
        raise ConfigError(f"normalize={normalize!r} is unknown: choose None, 'unit' or 'relatif'.")
    if top is not None and (type(top) is not int or top < 1):
        raise ConfigError(f"top={top!r} must be a whole number of at least 1, or None for all scores.")
    if top is not None and per_layer:
        raise ConfigError("top and per_layer exclude each other: per-layer scores need all rows; drop one.")
    if query_dtype not in (None, "int1"):
        raise ConfigError(f"query_dtype={query_dtype!r} is unknown: choose None (full precision) or 'int1'.")
    if query_dtype is not None and reader.codec.name != query_dtype:
        raise ConfigError(
            f"query_dtype={query_dtype!r} compares signs with signs, but the rows of {reader.path} are stored as "
            f"{reader.codec.name}: leave it out, or make a log of signs with log.compress(path, 'int1')."
        )
    check_match(reader, query)
    require_one_query(query, reader.path)
    if not len(reader):
        raise ConfigError(f"{reader.path} holds no rows yet: log some first.")
    normalize = normalize or ("unit" if method == "cosine" else None)
    curvature = Curvature(method=method, damping=damping, damping_abs=damping_abs)
    chosen = choose_layers(reader, layers)
    _warn_unfinished(reader)
    prepared = prepare(reader, query, curvature, chosen, normalize, query_dtype)
    scan = scan or (_scan_top if top is not None else _scan_all)
    values, places, by_layer = scan(reader, prepared, chosen, top or 0, per_layer)
    if not np.isfinite(values).all():
        raise ConfigError(
            f"scores are not finite with method={method!r} and damping "
            f"{curvature.damping_abs or curvature.damping:.3g}: "
            "choose a larger damping (0.1 of the mean eigenvalue is usual)."
        )
    return Scores(
        values=values,
        query_ids=query.data_ids,
        data_ids=reader.data_ids,
        places=places,
        by_layer=by_layer,
        layers=tuple(spec.name for spec in chosen),
        method=_named(method, reader, query_dtype),
        normalize=normalize,
        **curvature.stated,
        fingerprint=reader.fingerprint,
        log=str(reader.path),
        fidelity=_fidelity(reader, method, damping, damping_abs, normalize) if layers is query_dtype is None else None,
    )


def _named(method: str, reader: Reader, query_dtype: str | None) -> str:
    """Return the method with what else decides the scores."""
    space = "whitened" if reader.manifest.projection == "whitened" else reader.manifest.gradient
    notes = [space] * (space != "plain") + ["1-bit questions"] * (query_dtype is not None)
    return f"{method} ({', '.join(notes)})" if notes else method


def _fidelity(
    reader: Reader, method: str, damping: float, damping_abs: float | None, normalize: str | None
) -> float | None:
    """What was measured of this scoring, if it was just this one that was measured."""
    tuned = reader.manifest.fidelity
    if tuned is None or damping_abs is not None or normalize is not None:
        return None
    scoring = {"damping": damping} | tuned["scoring"]
    return float(tuned["pearson"]) if scoring == {"method": method, "damping": damping} else None


@on_cpu
def self_influence(reader: Reader, curvature: Curvature, layers: Sequence[str] | None) -> np.ndarray:
    """Return <H^-1 G, G> for each row of a log, summed over layers: (rows,) float32; kept with the log."""
    _warn_unfinished(reader)
    return _row_quadratics(reader, curvature, choose_layers(reader, layers)).to(torch.float32).numpy()


def _warn_unfinished(reader: Reader) -> None:
    """Warn once for each open log; the line that is shown is that which called ``on_cpu``'s function."""
    if reader.finished or reader.warned:
        return
    reader.warned = True
    warnings.warn(
        f"{reader.path} is not finished: only the {len(reader):,} rows so far are scored. To have all, let its run "
        "come to finalize(), with resume=True if it was interrupted, and load it again.",
        UnfinishedWarning,
        stacklevel=5,
    )


def choose_layers(reader: Reader, layers: Sequence[str] | None) -> list[LayerSpec]:
    """Return the specs of some layers, or of all, in row order."""
    if layers is None:
        return list(reader.layout.layers)
    wanted = [layers] if isinstance(layers, str) else list(layers)
    unknown = [name for name in wanted if name not in reader.layers]
    if not wanted:
        raise ConfigError(f"layers=[] leaves nothing to score: name some of {listed(reader.layers)}, or pass None.")
    if unknown:
        raise ConfigError(
            f"layers={wanted}: {unknown[0]!r} is not in the log, which has {listed(reader.layers)}: see log.layers."
        )
    return [spec for spec in reader.layout.layers if spec.name in wanted]


def check_match(reader: Reader, query: Query) -> None:
    """Raise unless query and log share layers and projection."""
    require_query(query)
    if query.fingerprint == reader.fingerprint:
        return
    mine, theirs = set(reader.layers), set(query.layers)
    if mine != theirs:
        odd = sorted(mine ^ theirs)[0]
        what = f"other layers (for instance {odd!r} is in one of the two only)"
    else:
        what = "another rank, projection, seed or kind of gradient"
    raise MismatchError(
        f"the query was made with {what} than {reader.path}: make it with log.attach(model).query(...), on the same "
        "model."
    )


def prepare(
    reader: Reader,
    query: Query,
    curvature: Curvature,
    chosen: Sequence[LayerSpec],
    normalize: str | None,
    query_dtype: str | None,
) -> Prepared:
    """Fit the curvature and apply its inverse to the queries, with the norms that ``normalize`` needs."""
    width, columns = reader.layout.gradient_width, reader.layout.kinds["gradients"]
    rows = query.matrix[:, :width].double()
    matrix = torch.zeros_like(rows)
    own = torch.zeros(len(query), dtype=torch.float64)
    want_rows = normalize is not None and _recall(reader, curvature, chosen) is None
    total = torch.zeros(len(reader), dtype=torch.float64)
    for group in solvers(reader, curvature, chosen):
        for name, solver in group.items():
            part = rows[:, columns[name]]
            matrix[:, columns[name]] = solver.apply(part)
            own += solver.quadratic(part)
        if want_rows:
            _add_quadratics(reader, group, total)
    if want_rows:
        _keep(reader, curvature, chosen, combine(total))
    query_norms = own.clamp(min=0).sqrt() if normalize == "unit" else None
    kept = _recall(reader, curvature, chosen) if normalize is not None else None
    row_norms = None if kept is None else kept.clamp(min=0).sqrt()
    return Prepared(matrix.to(working_dtype(reader)), query_norms, row_norms, query_dtype)


def _row_quadratics(reader: Reader, curvature: Curvature, chosen: Sequence[LayerSpec]) -> Tensor:
    kept = _recall(reader, curvature, chosen)
    if kept is None:
        total = torch.zeros(len(reader), dtype=torch.float64)
        for group in solvers(reader, curvature, chosen):
            _add_quadratics(reader, group, total)
        kept = _keep(reader, curvature, chosen, combine(total))
    return kept


def _key(curvature: Curvature, chosen: Sequence[LayerSpec]) -> str:
    """Name of the rows' self-influence in the cache of an open log and in the file beside a finished one."""
    return kept_name(
        what="self-influence",
        method="dot" if curvature.plain else curvature.method,
        **curvature.stated,
        layers=checksum(json.dumps([spec.name for spec in chosen]).encode()),
        scheme=1,  # raised when the same arguments mean something else
    )


def _recall(reader: Reader, curvature: Curvature, chosen: Sequence[LayerSpec]) -> Tensor | None:
    """The rows' self-influence, (rows,) float64, if it was computed before: from memory, or from the file."""
    key = _key(curvature, chosen)
    if key not in reader.cache and reader.seal is not None:
        found = torch.zeros(len(reader) + 1, dtype=torch.float64)  # the last says whether there is one
        if share()[0] == 0:  # the others take what it found, so that all or none compute
            kept = load_kept(reader.path, reader.seal).get(key)
            if kept is not None and kept.shape == (len(reader),) and kept.dtype == np.float64:
                found[:-1], found[-1] = torch.from_numpy(kept), 1
        if combine(found)[-1] > 0:
            reader.cache[key] = found[:-1]
    return reader.cache.get(key)


def _keep(reader: Reader, curvature: Curvature, chosen: Sequence[LayerSpec], values: Tensor) -> Tensor:
    key = _key(curvature, chosen)
    reader.cache[key] = values
    if reader.seal is not None and share()[0] == 0:
        save_kept(reader.path, reader.seal, key, values.numpy())
    return values


def _add_quadratics(reader: Reader, group: dict[str, Solver], total: Tensor) -> None:
    columns = reader.layout.kinds["gradients"]
    for place, block in progress(reader, "self-influence"):
        for name, solver in group.items():
            total[place] += solver.quadratic(block[:, columns[name]])


def _normalised(scores: Tensor, prepared: Prepared, place: slice) -> Tensor:
    """Divide the scores of a block, (Q, n), by the norms that were asked for."""
    if prepared.query_norms is not None:
        scores /= nonzero(prepared.query_norms)[:, None].to(scores.dtype)
    if prepared.row_norms is not None:
        scores /= nonzero(prepared.row_norms[place])[None, :].to(scores.dtype)
    return scores


def _scan_all(
    reader: Reader, prepared: Prepared, chosen: Sequence[LayerSpec], _: int, per_layer: bool
) -> tuple[np.ndarray, None, np.ndarray | None]:
    queries = len(prepared.matrix)
    values = torch.zeros(queries, len(reader))
    by_layer = torch.zeros(len(chosen), queries, len(reader)) if per_layer else None
    product = products(reader, prepared.matrix, chosen, prepared.query_dtype)
    parts = [products(reader, prepared.matrix, [spec], prepared.query_dtype) for spec in chosen] if per_layer else []
    for place, block in progress(reader, "scoring", stored=product.stored):
        values[:, place] = _normalised(product(block), prepared, place).float()
        if by_layer is not None:
            for i, part in enumerate(parts):
                by_layer[i, :, place] = _normalised(part(block), prepared, place).float()
    return combine(values).numpy(), None, None if by_layer is None else combine(by_layer).numpy()


def _scan_top(
    reader: Reader, prepared: Prepared, chosen: Sequence[LayerSpec], top: int, _: bool
) -> tuple[np.ndarray, np.ndarray, None]:
    """Keep the best ``top`` of every question, merging block by block."""
    queries = len(prepared.matrix)
    best = torch.empty(queries, 0, dtype=prepared.matrix.dtype)
    places = torch.empty(queries, 0, dtype=torch.int64)
    product = products(reader, prepared.matrix, chosen, prepared.query_dtype)
    for place, block in progress(reader, "scoring", stored=product.stored):
        scores = _normalised(product(block), prepared, place)
        index = torch.arange(place.start, place.stop)
        if best.shape[1] == top:  # what cannot be among the best need not be sorted
            near = ~(scores < best[:, -1:]).all(0)
            scores, index = scores[:, near], index[near]
        best, places = _best(torch.cat([best, scores], 1), torch.cat([places, index.expand(queries, -1)], 1), top)
    best, places = _best(gather(best, 1), gather(places, 1), top)
    return best.float().numpy(), places.numpy(), None


def _best(scores: Tensor, places: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The ``top`` best of each row, equal scores in the order of the log."""
    by_place = places.argsort(dim=1, stable=True)
    ranked, order = scores.gather(1, by_place).sort(dim=1, descending=True, stable=True)
    return ranked[:, :top], places.gather(1, by_place).gather(1, order[:, :top])
