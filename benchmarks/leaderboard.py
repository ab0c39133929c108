"""All methods on the shipped ground truths, beside controls and peers: LDS, time, memory, bytes a sample.

    python benchmarks/leaderboard.py --task text --models 2 --peers --save

Every method sees the gradients of the same models, trained on all samples with seeds that the truth does not use. LDS
(of planted facts the mean reciprocal rank, of wrong labels the mislabel AUC) is the mean over queries, and over models
where there are several; the interval is a bootstrap over queries. Seconds are for one model, all stages, one thread;
bytes are what is kept for each sample. Peers run in an environment of their own (`make peers`) on the same weights and
samples; where one cannot run a task, the table says why.

Shapes: N training samples, Q queries.
"""

import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import Parser, Peak, silent, truth, write, written
from _judge import among, held_out, judge, measure
from _whole import State, Whole, ask, source, walk
from base import FIRST_SEED
from torch import nn

import loghook
from loghook.evaluate import controls
from loghook.evaluate.judges import mrr
from loghook.evaluate.lds import interval
from loghook.evaluate.replay import replay
from loghook.influence.fidelity import likeness

TASKS = ("digits_mlp", "digits_cnn", "text", "facts", "labels")
ROOTS = (1e-16, 1e-5, 1e-4, 1e-3)  # the first leaves the training as it was, the others make it smoother
# Dampings of refined questions, among which half of the queries choose for the other half where there is an LDS.
REFINED = {"digits_mlp": (3, 10, 30), "digits_cnn": (3, 10, 30), "text": (0.1, 1, 10)}
CURVATURE = {"digits_mlp": 1200, "digits_cnn": 1200}  # samples that it is taken from; 300 of the other tasks
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the training, where SOURCE has its checkpoints
TIMES = (0.3, 1.0, 3.0, 10.0, 30.0)  # of the training, as `source` takes them; half of the queries choose
REFERENCE = "whole, empirical Fisher, ekfac damping 0.1"


class Scored(NamedTuple):
    method: str
    scores: np.ndarray | None  # (Q, N)
    seconds: float
    bytes: float  # a sample
    peak_mb: float = math.nan  # of the whole process
    reason: str = ""  # why there are no scores


def logged(
    task: Any, model: nn.Module, folder: str, watch: dict[str, Any], **options: Any
) -> tuple[loghook.Log, loghook.Query, float]:
    """Log the training samples and ask the queries."""
    start = time.perf_counter()
    run = loghook.init(folder, overwrite=True, **options)
    with silent(), loghook.frozen(model):
        run.watch(model, **watch)
        for current in run.passes():
            walk(task, model, run, current)
        run.finalize()
        query = ask(task, model, run)
    run.close()
    return loghook.load(folder), query, time.perf_counter() - start


def _rows(
    kind: str, ranks: Sequence[int], methods: str, dtypes: Sequence[str] = ("float32",), layers: Sequence[str] = ()
) -> dict[str, tuple[dict[str, Any], Sequence[str], list[dict[str, Any]]]]:
    """Options of some logs, the layers that they keep (all without), and how they are scored.

    Args:
        kind: a projection; or "whitened" with its whitening; or a ``gradient`` other than the plain one.
        ranks: a log for each,
        methods: separated by commas, each with its damping and normalisation if any.
        dtypes: and for each of these.
        layers: ends of names of layers.
    """
    projection, _, whitening = kind.partition(" ")
    options = {"gradient": kind} if kind in ("normalized", "adam") else {"projection": projection}
    options |= {"whitening": float(whitening)} if whitening else {}
    scored = [dict(zip(("method", "damping", "normalize"), parts, strict=False)) for parts in (
        [float(word) if word[0].isdigit() else word for word in how.split()] for how in methods.split(", ")
    )]  # fmt: skip
    return {
        f"{kind} {rank}" + f" {dtype}" * (dtype != "float32") + f" ({_named(layers)})" * bool(layers): (
            options | {"rank": rank, "dtype": dtype}, layers, scored,
        )
        for rank in ranks
        for dtype in dtypes
    }  # fmt: skip


def _named(layers: Sequence[str]) -> str:
    return "no q_proj, k_proj" if layers == NO_QK else " + ".join(layers)


EKFAC, RESIDUAL = "dot, ekfac 0.1, ekfac 0.01", ("o_proj", "down_proj")
NO_QK = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS = {
    **_rows("random", (16, 32, 64), "dot, cosine, ekfac 0.1, ekfac 0.01, fisher 0.1"),
    **_rows("pca", (16, 32, 64), "ekfac 0.1, ekfac 0.01, fisher 0.1"),
    **_rows("whitened 0.01", (32, 64), "dot, ekfac 0.1", ("float32", "int1")),
    **_rows("whitened 0.1", (16, 32, 64), "dot, ekfac 0.1", ("float32", "int8", "int1")),
    **_rows("whitened 0.01", (128,), "dot, ekfac 0.1", ("int1",)),
    **_rows("whitened 1", (32, 64), "dot, ekfac 0.1"),
    # As many bytes as all layers at rank 32 and at 64, and a rank in one bit.
    **_rows("random", (59, 119), EKFAC, layers=RESIDUAL),
    **_rows("whitened 0.01", (32, 59, 119), EKFAC, layers=RESIDUAL),
    **_rows("whitened 0.01", (64, 119), EKFAC, ("int1",), layers=RESIDUAL),
    **_rows("whitened 0.01", (84,), EKFAC, layers=("down_proj",)),
    **_rows("whitened 0.01", (32, 64), "dot, ekfac 0.1", ("float32", "int1"), layers=NO_QK),
    **_rows("normalized", (32,), "dot, cosine, fisher 0.1"),
    **_rows("adam", (32,), "dot, cosine, fisher 0.1"),
}
for gradient in ("normalized", "adam"):
    ROWS[f"{gradient} 32"][2].append({"method": "fisher", "normalize": "unit"})


def rows(task: Any, model: nn.Module, folder: str, names: Iterable[str], seed: int) -> Iterator[Scored]:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        (options, layers, methods), peak, watch = ROWS[name], Peak(), {}
        if layers:
            watch["include"] = [linear for linear in linears if linear.endswith(tuple(layers))]
            if not watch["include"]:
                continue
        if "gradient" in options:
            if task.optimizer is None:
                continue
            watch["optimizer"] = task.optimizer(model, FIRST_SEED + seed)
        log, query, seconds = logged(task, model, folder, watch, **options)
        for method in methods:
            start = time.perf_counter()
            values = log.influence(query, **method).values
            label = f"{name}, " + " ".join(f"{value:g}" if key == "damping" else value for key, value in method.items())
            took = seconds + time.perf_counter() - start
            yield Scored(label, values, took, log.codec.row_bytes, peak.mb)
            if task.flipped is not None and method["method"] != "cosine" and "normalize" not in method:
                itself = log.self_influence(**method)
                yield Scored(f"{label}, on itself", itself, took, log.codec.row_bytes, peak.mb)


def tuned(task: Any, model: nn.Module, folder: str, rank: int) -> Iterator[Scored]:
    """What `loghook.tune` chooses within a rank's bytes, logged and scored: by fidelity, and by known answers.

    It sees 600 samples and 20 queries. Where facts are planted, each half of the queries is scored with what is chosen
    by the right answers to the other half.
    """
    start, peak = time.perf_counter(), Peak()
    one = Whole(task, model, "empirical", f"{folder}-factors")
    fitted = time.perf_counter() - start
    label = f"tuned within the bytes of rank {rank}"
    places = np.sort(np.random.default_rng(1).choice(task.n_query, 20, replace=False))
    ids = np.sort(np.random.default_rng(0).choice(task.n_train, 600, replace=False))
    yield from _chosen(task, model, folder, one, rank, ids, [(places, np.arange(task.n_query))], label, peak, fitted)
    if task.relevant is not None:
        halves = np.array_split(np.random.default_rng(0).permutation(task.n_query), 2)
        answers = np.unique([i for relevant in task.relevant for i in relevant])
        others = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(task.n_train), answers))
        ids = np.sort(np.concatenate([answers, others[: max(0, 600 - len(answers))]]))
        pairs = [(np.sort(choose), report) for choose, report in (halves, halves[::-1])]
        label += ", by known answers"
        yield from _chosen(task, model, folder, one, rank, ids, pairs, label, Peak(), fitted, known=True)
    one.fit.close()


def _chosen(
    task: Any, model: nn.Module, folder: str, one: Whole, rank: int, ids: np.ndarray,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], label: str, peak: Peak, fitted: float, known: bool = False,
) -> Iterator[Scored]:  # fmt: skip
    """Scores of queries by what others, the first of each pair, choose."""
    start, values, notes = time.perf_counter(), np.zeros((task.n_query, task.n_train)), []
    limit = sum(4 * min(rank, spec.in_features + spec.bias) * min(rank, spec.out_features) for spec in one.fit.specs)
    size = 0.0
    for number, (choose, report) in enumerate(pairs):
        by: dict[str, Any]
        if known:
            relevant = [np.searchsorted(ids, task.relevant[place]) for place in choose]
            by = {"judge": lambda scores, relevant=relevant: mrr(scores, relevant).mean}
        else:
            by = {"outputs": lambda batch: task.outputs(model, batch), "output_loss": task.loss_from_outputs}
        parts = np.split(ids, range(100, len(ids), 100))
        with silent(), loghook.frozen(model):
            choice = loghook.tune(
                one.fit,
                lambda: zip((p.tolist() for p in parts), task.batches("train", ids.tolist(), 100), strict=True),  # noqa: B023
                lambda: [(choose.tolist(), *task.batches("query", choose.tolist(), len(choose)))],  # noqa: B023
                lambda batch: task.loss(model, batch),
                bytes_per_sample=limit,
                ranks=(16, 32, 64, 128),
                dtypes=("float32", "int8", "int1"),
                mask=lambda batch: batch.get("mask"),
                **by,
            )
        print(choice, file=sys.stderr)
        log, query, _ = logged(task, model, f"{folder}-{number}", choice.watch, **choice.arguments)
        values[report] = log.influence(query, **choice.best.scoring).values[report]
        size += log.codec.row_bytes / len(pairs)
        notes.append(" ".join(str(choice.best).split()))
    took = fitted + time.perf_counter() - start
    yield Scored(label, values, took, size, peak.mb, "; ".join(notes))
    if task.flipped is not None:
        yield Scored(f"{label}, on itself", log.self_influence(**choice.best.scoring), took, size, peak.mb)


def whole(
    task: Any, model: nn.Module, folder: str, refine: bool, fast: bool, seed: int = FIRST_SEED
) -> Iterator[Scored]:
    for fisher in ("empirical",) if fast else ("empirical", "true"):
        peak, one = Peak(), Whole(task, model, fisher, folder)
        settings: list[dict[str, Any]] = [{"damping": 0.1}]
        settings += [] if fast else [{"method": "kfac"}, {"damping": 0.01}]
        settings += [{"method": "dot"}] if fisher == "empirical" else []
        settings += [{"damping": 1.0}, {"rank": 16}] if fisher == "empirical" and not fast else []
        for options in settings:
            values, seconds = one.score(**options)
            label = " ".join(f"{key} {value}" for key, value in ({"method": "ekfac"} | options).items())
            label = f"whole, {fisher} Fisher, {label.replace('method ', '')}"
            yield Scored(label, values, one.seconds + seconds, 0, peak.mb)
            if task.flipped is not None and "rank" not in options:
                yield Scored(f"{label}, on itself", *one.itself(**options), 0, peak.mb)
        if refine and fisher == "true":
            yield from refined(task, one, along(task, seed), peak)


def along(task: Any, seed: int) -> list[State]:
    """Checkpoints of the training that made a model."""
    return [task.checkpoint(seed, share).state_dict() for share in SHARES] if task.checkpoint else []


def refined(task: Any, one: Whole, states: list[State], peak: Peak) -> Iterator[Scored]:
    """Refined questions, with a damping that other questions chose; samples are scored at the end, and on the way."""
    dampings = REFINED.get(task.name, (10,))
    start = time.perf_counter()
    questions = [one.refine(CURVATURE.get(task.name, 300), damping=damping) for damping in dampings]
    made = one.seconds + (time.perf_counter() - start) / len(dampings)
    for name, where in (("whole, refined", None), (f"whole, refined, at {len(states)} checkpoints", states)):
        if where != []:
            found = [one.score(query, where) for query in questions]
            values = held_out(task, [values for values, _ in found]) if len(found) > 1 else found[0][0]
            yield Scored(name, values, made + found[0][1], 0, peak.mb)


def unrolled(task: Any, model: nn.Module, seed: int, folder: str) -> Iterator[Scored]:
    """SOURCE, with a time that other questions chose."""
    states = along(task, seed)
    for segments in (1, 2) if states else ():
        peak, start, size = Peak(), time.perf_counter(), len(states) // segments
        parts = [Whole(task, model, "true", f"{folder}-{i}", states[i * size :][:size]) for i in range(segments)]
        fitted = time.perf_counter() - start
        candidates = [source(parts, total) for total in TIMES]
        took = fitted + (time.perf_counter() - start - fitted) / len(TIMES)
        name = f"SOURCE, segments: {segments}, checkpoints: {len(states)}"
        yield Scored(name, held_out(task, candidates), took, 0, peak.mb)


def replayed(task: Any, seed: int) -> Iterator[Scored]:
    """Exact derivatives through the training of the model, as it was and with Adam's roots smoothed."""
    if task.training is None:
        return
    training = task.training(FIRST_SEED + seed)
    for root in ROOTS:
        peak = Peak()
        one = dataclasses.replace(training, optimizer=dataclasses.replace(training.optimizer, eps_root=root))
        one.run()  # the first one warms up
        start = time.perf_counter()
        one.run()
        once, start = time.perf_counter() - start, time.perf_counter()
        scores = replay(one, lambda parameters, one=one: one.losses(parameters, task.queries))
        seconds = time.perf_counter() - start
        values = np.zeros((task.n_query, task.n_train))  # a sample that was in no batch did nothing
        values[:, scores.data_ids] = scores.values
        reason = f"{seconds / once:.0f} trainings of {once:.2f} s"
        yield Scored(f"replay (MAGIC), eps_root {root:g}", values, seconds, 0, peak.mb, reason)


def unlearned(task: Any, model: nn.Module, seed: int) -> Iterator[Scored]:
    found = {"random": controls.random(task.n_query, task.n_train, seed)}
    ours, theirs = (task.representations(model, which) for which in ("query", "train"))
    found["representations"] = controls.cosine(ours, theirs)
    if task.labels is not None:
        found["same label"] = controls.same_label(task.labels[1], task.labels[0])
    if task.texts is not None:
        found["BM25"] = controls.bm25(task.texts[1], task.texts[0])
    if task.flipped is not None:
        found["loss"] = task.losses_of(model, "train")
    for name, scores in found.items():
        yield Scored(f"control: {name}", scores, 0, 0)


EXCHANGED = ("digits_mlp", "text", "facts")  # tasks whose models peers.exchange can hand over
PEERS = (
    ("kronfluence", {"method": "ekfac"}),
    ("bergson", {"method": "ekfac"}),
    ("dattri", {"method": "ekfac"}),
    *(("bergson", {"method": method, "rank": 32}) for method in ("dot", "cosine", "fisher")),
    *(("dattri", {"method": method, "rank": 32}) for method in ("dot", "cosine", "fisher", "ekfac")),
)


def peers(task: Any, model: nn.Module, folder: str, names: Sequence[str]) -> Iterator[Scored]:
    from peers import driver, exchange

    def tensors(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "input_ids" not in data:
            return {"x": data["x"], "y": data["y"]}
        return {"input_ids": data["input_ids"], "labels": data["targets"].clone()}

    known = task.name in EXCHANGED
    if known:
        exchange.write(Path(folder), model, tensors(task.train), tensors(task.queries))
    for name, options in PEERS:
        if names and name not in names:
            continue
        label = f"{name}, {options['method']}" + (f" rank {options['rank']}" if "rank" in options else "")
        if not known:
            reason = "models are exchanged with peers as MLPs or Llamas"
            yield Scored(label, None, math.nan, math.nan, reason=reason)
            continue
        outcome = driver.run(name, Path(folder), exchange.Options(batch=100, query_batch=50, **options))
        kept, most = (outcome.about.get(key, math.nan) for key in ("bytes_per_sample", "peak_mb"))
        yield Scored(label, outcome.scores, outcome.seconds, kept, most, outcome.reason)


def judged(task: Any, by_method: dict[str, list[Scored]]) -> list[dict[str, Any]]:
    table = []
    reference = [one.scores for one in by_method.get(REFERENCE, [])]
    for name, found in by_method.items():
        scored = [one.scores for one in found if one.scores is not None]
        row: dict[str, Any] = {"method": name, "reason": found[0].reason}
        if len(scored) == len(found):
            each = [judge(task, values).per_query for values in scored]
            low, high = interval(np.mean(each, 0))
            row |= {"lds": float(np.mean(each)), "low": low, "high": high}
            row["models"] = [float(one.mean()) for one in each]
            if reference and scored[0].ndim == 2:
                row["pearson"] = float(np.mean([likeness(a, b) for a, b in zip(scored, reference, strict=True)]))
                row["recall"] = float(np.mean([among(a, b) for a, b in zip(scored, reference, strict=True)]))
        for key in ("seconds", "bytes", "peak_mb"):
            row[key] = float(np.median([getattr(one, key) for one in found]))
        table.append(row)
    return table


def show(task: Any, table: list[dict[str, Any]]) -> None:
    print(f"{task.name}: {task.n_train} samples, {task.n_query} queries, {json.dumps(task.about)}")
    print(f"'like': mean correlation with {REFERENCE}; 'top': share of its ten best among the best tenth")
    print(
        f"{'method':<46}{measure(task):>7}  {'95 % interval':<17}{'like':>6}{'top':>6}"
        f"{'seconds':>9}{'bytes':>10}{'peak MB':>9}"
    )
    for row in table:
        if "lds" not in row:
            print(f"{row['method']:<46}cannot run: {row['reason'][-120:]}")
            continue
        print(
            f"{row['method']:<46}{row['lds']:>7.3f}  {row['low']:>6.3f} to {row['high']:<7.3f}"
            f"{_number(row, 'pearson'):>6.3f}{_number(row, 'recall'):>6.2f}{_number(row, 'seconds'):>9.1f}"
            f"{_number(row, 'bytes'):>10,.0f}{_number(row, 'peak_mb'):>9,.0f}"
        )


def _number(row: dict[str, Any], key: str) -> float:
    """A value of a row, or nan where there is none, which is null in the file."""
    value = row.get(key)
    return math.nan if value is None else value


def markdown(task: Any, rows: list[dict[str, Any]]) -> str:
    """The table for docs/leaderboard.md: controls, rows, whole gradients, peers."""
    kinds = ("control", "", "tuned", "whole", "SOURCE", "replay", *dict.fromkeys(name for name, _ in PEERS))
    rows = sorted(rows, key=lambda row: max(i for i, kind in enumerate(kinds) if row["method"].startswith(kind)))
    lines = [
        f"| method | {measure(task)} | 95 % | like | top | seconds | bytes | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "lds" not in row:
            lines.append(f"| {row['method']} | cannot run: {row['reason'][-80:]} | | | | | | |")
            continue
        cells = [row["method"], f"{row['lds']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"]
        forms = {"pearson": ".3f", "recall": ".2f", "seconds": ".1f", "bytes": ",.0f", "peak_mb": ",.0f"}
        for key, form in forms.items():
            value = _number(row, key)
            cells.append(
                "" if math.isnan(value) or (key in ("seconds", "bytes") and not value) else format(value, form)
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    made = Parser(__doc__)
    made.add_argument("--task", choices=TASKS, default="digits_mlp")
    made.add_argument("--models", type=int, default=1, help="models that are attributed")
    made.add_argument("--rows", nargs="*", help="projections to judge, instead of all")
    made.add_argument("--tune", type=int, nargs="*", default=[32, 64], help="ranks at which to tune")
    made.add_argument("--no-whole", action="store_true", help="leave out whole gradients")
    made.add_argument("--no-refine", action="store_true", help="leave out refined questions")
    made.add_argument("--no-replay", action="store_true", help="leave out exact replay")
    made.add_argument("--peers", nargs="*", help="run these peers as well, or all (make peers)")
    made.add_argument("--fast", action="store_true", help="of whole gradients only the reference and dot")
    made.add_argument("--markdown", action="store_true", help="print the saved JSON as a table for the documents")
    a = made.start()
    task = truth(a.task)
    if a.markdown:
        print(markdown(task, written(f"leaderboard_{a.task}")["rows"]))
        return
    by_method: dict[str, list[Scored]] = {}
    makers: list[Callable[[nn.Module, str, int], Iterator[Scored]]] = [
        lambda model, folder, seed: unlearned(task, model, seed),
        lambda model, folder, seed: rows(task, model, folder, ROWS if a.rows is None else a.rows, seed),
    ]
    for rank in a.tune:
        makers.append(lambda model, folder, seed, rank=rank: tuned(task, model, folder, rank))  # type: ignore[misc]
    if not a.no_whole:
        makers.append(
            lambda model, folder, seed: whole(task, model, folder, not a.no_refine, a.fast, FIRST_SEED + seed)
        )
    if not a.no_whole and not a.fast:
        makers.append(lambda model, folder, seed: unrolled(task, model, FIRST_SEED + seed, folder))
    if not a.no_replay:
        makers.append(lambda model, folder, seed: replayed(task, seed))
    if a.peers is not None:
        makers.append(lambda model, folder, seed: peers(task, model, folder, a.peers))
    for seed, model in enumerate(task.models(a.models)):
        for make in makers:
            with tempfile.TemporaryDirectory() as folder:
                for one in make(model, f"{folder}/run", seed):
                    by_method.setdefault(one.method, []).append(one)
                    print(f"  {one.method}: {one.seconds:.1f} s {one.reason}", file=sys.stderr)
    table = judged(task, by_method)
    show(task, table)
    if a.save:
        name, fresh = f"leaderboard_{a.task}", {row["method"]: row for row in table}
        known = written(name)  # whose rows of other methods stay
        kept = [fresh.pop(row["method"], row) for row in known.get("rows", []) if known["models"] == a.models]
        result = {"task": a.task, "models": a.models, "rows": [*kept, *fresh.values()]}
        write(name, {"benchmark": "leaderboard"} | result)


if __name__ == "__main__":
    main()
