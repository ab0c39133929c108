"""The command line: ``loghook info``, ``score``, ``report`` and so on; ``loghook --help`` lists all."""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

import loghook
from loghook.capture.models import by_reason
from loghook.errors import ConfigError, LoghookError
from loghook.log import maintain
from loghook.log.files import place_of
from loghook.log.format import SEVERAL
from loghook.processes import process_rank, world_size
from loghook.project.projection import describe_projection

app = typer.Typer(
    name="loghook",
    help="Log a projected gradient of every training sample, then ask which data made the model say this.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)
Run = Annotated[Path, typer.Argument(help="The run's folder, as given to loghook.init.", metavar="RUN")]
Query = Annotated[Path, typer.Argument(help="A query saved with query.save(...).", metavar="QUERY")]
Method = Annotated[str, typer.Option(help="dot, cosine, fisher, kfac, ekfac or shampoo.")]
Damping = Annotated[float, typer.Option(help="Times the mean eigenvalue of each layer.")]
Normalize = Annotated[str | None, typer.Option(help="unit or relatif.")]
Top = Annotated[int, typer.Option(min=1, help="Proponents shown for each question.")]
Bottom = Annotated[int, typer.Option(min=0, help="Opponents shown for each question.")]
_LINES = 'a JSON object with "id" and "text"'


@contextmanager
def _processes() -> Iterator[bool]:
    """Join the processes of a launcher for the length of a command; yields whether this one prints."""
    if world_size() == 1:
        yield True
        return
    import torch

    torch.distributed.init_process_group("gloo")
    try:
        yield process_rank() == 0
    finally:
        torch.distributed.destroy_process_group()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if process_rank() == 0:
        typer.secho(f"warning: {message}", fg="yellow", err=True)


def _command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command that shows warnings, and what loghook raises on purpose, as one line without source code."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return function(*args, **kwargs)
        except BrokenPipeError as error:  # whoever reads has enough
            raise typer.Exit(1) from error
        except (LoghookError, OSError, UnicodeError) as error:
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from error

    return app.command()(wrapped)


def _print_version(asked_for: bool) -> None:
    if asked_for:
        typer.echo(f"loghook {loghook.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@_command
def info(
    run: Run, as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON instead.")] = False
) -> None:
    """Say what a run holds: rows, layers, coverage, projection, statistics, where it came from."""
    log = loghook.load(run)
    m = log.manifest
    size = sum(file.stat().st_size for file in log.path.iterdir() if file.is_file())
    facts = {
        "path": str(log.path), "rows": len(log), "finished": log.finished,
        "bytes": size,
        "values_a_row": log.layout.width, "layers": log.layers,
        "covered": m.coverage["covered"] / max(1, m.coverage["total"]), "not_covered": m.coverage["not_covered"],
        "projection": m.projection, "rank": m.rank, "seed": m.seed, "whitening": m.whitening, "gradient": m.gradient,
        "dtype": m.dtype,
        "writers": m.world_size,
        "repeats_left_out": log.repeats, "flagged": log.flagged, "not_in_statistics": log.unmeasured,
        "no_statistics": m.no_statistics,
        "asleep": log.asleep, "parameters": m.parameters, "fidelity": m.fidelity,
        "unfinished_records": log.torn,
        "fingerprint": log.fingerprint, "provenance": m.provenance,
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        typer.echo("\n  ".join(_describe(log, size)))


def _describe(log: loghook.Log, size: int) -> Iterator[str]:
    """Yield the lines of ``info``; all but the first are indented."""
    m = log.manifest
    state = "finished" if log.finished else "not finished (rows so far; resume=True goes on)"
    yield f"{log.path}: {len(log):,} rows, {state}, {size / 1e6:,.1f} MB on disk"
    kind = describe_projection(m.projection, m.rank)
    kind += f", seed {m.seed}" if m.projection != "none" else ""
    kind += f", whitening {m.whitening:g}" if m.whitening is not None else ""
    kind += f", gradient {m.gradient}" if m.gradient != "plain" else ""
    yield f"{log.layout.width:,} values a row in {m.dtype}; {kind}"
    if m.fidelity is not None:
        yield f"fidelity {m.fidelity['pearson']:.3f} to {m.fidelity['reference']}, as tuned"
    if not len(log):
        yield "nothing is committed yet"
    share = m.coverage["covered"] / max(1, m.coverage["total"])
    yield f"{len(log.layers)} layers with {share:.1%} of {m.coverage['total']:,} parameters (--json: all)"
    for reason, items in by_reason(m.coverage).items():
        more = f" and {len(items) - 1} more" if len(items) > 1 else ""
        parameters = sum(item["parameters"] for item in items)
        yield f"  not covered: {items[0]['name'] or '(model)'}{more}, {parameters:,} parameters ({reason})"
    yield f"{log.repeats:,} repeats left out, {len(log.flagged):,} samples flagged as not finite"
    first, last = m.parameters.get("first"), m.parameters.get("last")
    if last == SEVERAL:
        yield "rows of several parameter values: of merged runs, or of one that went on with another checkpoint"
    elif first and last:
        yield f"parameters {'unchanged while logging' if first == last else 'changed while logging (as in training)'}"
    if m.no_statistics is not None:
        yield f"no statistics, so that kfac and ekfac cannot score it: {m.no_statistics}"
    elif any(entry["what"] == "delete" for entry in m.history):
        yield "rows were deleted, and still count in the statistics of kfac and ekfac"
    if log.unmeasured:
        yield f"{log.unmeasured:,} rows are not in the statistics: their batches held values or squares not finite"
    if log.asleep:
        yield f"{len(log.asleep)} layers slept in some batches; their rows there are zero (--json: how many)"
    yield from log.torn
    versions = ", ".join(f"{package} {version}" for package, version in m.provenance.get("versions", {}).items())
    yield f"made {m.provenance.get('created', '?')} with {versions}"
    yield f"fingerprint {log.fingerprint}"


@_command
def verify(run: Run) -> None:
    """Read every committed byte against its checksum; ends with status 1 if something is wrong."""
    log = loghook.load(run)
    problems = log.verify()
    for problem in problems:
        typer.secho(problem, fg="red", err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{log.path}: {len(log):,} rows, every checksum matches")


@_command
def repair(run: Run) -> None:
    """Drop what is damaged, keep what is good, and list the ids to log again (one JSON value a line)."""
    repaired = maintain.repair(run)
    for note in repaired.notes:
        typer.secho(note, fg="red", err=True)
    if not repaired.rewritten:
        typer.echo(f"{run}: {repaired.rows:,} rows, {'all good now' if repaired.notes else 'nothing to repair'}")
        return
    typer.secho(
        f"{run}: {repaired.rows:,} rows are good; to log again: {len(repaired.ids):,} ids\n"
        "`loghook append` opens a finished run, loghook.init(..., resume=True) logs them.\n"
        "The statistics are given up: shampoo and fisher score this log, kfac and ekfac do not any more.",
        err=True,
    )
    for data_id in repaired.ids:
        typer.echo(json.dumps(data_id))


@_command
def append(run: Run) -> None:
    """Open a finished run for more rows: the same script with resume=True then logs the ids that are not there."""
    maintain.reopen(run)
    typer.echo(f"{run} is open: log into it with loghook.init(..., resume=True) and finalise it again")


@_command
def merge(
    out: Annotated[Path, typer.Argument(help="Folder of the new run.", metavar="OUT")],
    runs: Annotated[list[Path], typer.Argument(help="Finished runs with the same layers.", metavar="RUN...")],
) -> None:
    """Join finished runs, for instance of several machines, into a new one; the old ones stay."""
    merged = maintain.merge(out, runs)
    for note in merged.notes:
        typer.secho(note, fg="yellow", err=True)
    repeats = merged.rows - len(loghook.load(out))
    left_out = f", of which {repeats:,} are repeats that readers leave out" if repeats else ""
    typer.echo(f"{out}: {merged.rows:,} rows of {len(runs)} runs{left_out}")


@_command
def compress(
    source: Annotated[Path, typer.Argument(help="Folder of a finished run; it stays.", metavar="SOURCE")],
    destination: Annotated[Path, typer.Argument(help="Folder of the new run.", metavar="DESTINATION")],
    dtype: Annotated[str, typer.Option(help="int8, int4, int1, lowrank1 (2, 4, 8); or a float dtype.")] = "int8",
    queries: Annotated[int, typer.Option(help="Rows asked as questions of both logs.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the draw of these rows.")] = 0,
) -> None:
    """Write a finished run again in a smaller dtype, and print what is left of its scores."""
    typer.echo(f"{destination}: {loghook.load(source).compress(destination, dtype, queries=queries, seed=seed)}")


@_command
def plan(
    model: Annotated[str, typer.Argument(help="A folder with config.json, such a file, or a model's name.")],
    samples: Annotated[int, typer.Option(help="Rows to log.")],
    tokens: Annotated[int, typer.Option(help="Of a sample.")] = 512,
    rank: Annotated[int, typer.Option(help="Of the projection.")] = 64,
    dtype: Annotated[str, typer.Option(help="How rows are stored; the table shows all.")] = "float32",
    projection: Annotated[str, typer.Option(help="random, pca, whitened or none.")] = "random",
    batch: Annotated[int, typer.Option(help="Samples of a block.")] = 1,
    disk: Annotated[str | None, typer.Option(help="What there is, such as '500 GB': says what fits.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Pattern of layers, as in watch(); may repeat.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="The same for layers left out.")] = None,
) -> None:
    """Say what logging a transformers model would cost, from its configuration: disk, memory, arithmetic."""
    from loghook.capture.plan import plan_config
    from loghook.capture.select import HEAD

    typer.echo(
        plan_config(
            model, samples=samples, tokens=tokens, rank=rank, dtype=dtype, projection=projection, batch=batch,
            disk=disk, include=include or "*", exclude=exclude or HEAD,
        )
    )  # fmt: skip


@_command
def delete(
    run: Run,
    ids: Annotated[list[str] | None, typer.Option(help="A data_id whose rows go; may be repeated.")] = None,
    ids_file: Annotated[
        Path | None, typer.Option(help="More of them, a JSON value on each line, as `repair` prints.")
    ] = None,
    keep_statistics: Annotated[
        bool, typer.Option(help="Keep the statistics of kfac and ekfac, in which the deleted rows still count.")
    ] = False,
) -> None:
    """Take rows out, for instance because a provider withdraws data; their bytes are gone afterwards.

    Without --keep-statistics the statistics go too: kfac and ekfac, which need them, can then score the log no more.
    """
    id_type = loghook.load(run).manifest.id_type
    if not ids and ids_file is None:
        raise ConfigError("nothing names the rows to delete: pass --ids or --ids-file.")
    listed = [] if ids_file is None else _read_lines(ids_file, "an id")
    if not all(type(data_id) in (int, str) for data_id in listed):
        raise ConfigError(f'{ids_file} must hold an id on each line, as 17 or "a17", and nothing else.')
    data_ids = [_parse_id(id_type, str(data_id)) for data_id in (*(ids or ()), *listed)]
    changed = maintain.delete(run, data_ids, keep_statistics=keep_statistics)
    typer.echo(f"{run}: {changed.dropped:,} rows deleted, {changed.rows:,} left")
    if not keep_statistics:
        typer.echo("the statistics went with them, so that kfac and ekfac cannot score it: take fisher or shampoo")


def _parse_id(id_type: str, text: str) -> int | str:
    if id_type == "int" and not re.fullmatch(r"[+-]?[0-9]+", text):  # int() would take 1_20 for 120
        raise ConfigError(f"data_id {text!r} is no whole number, and the ids of this log are: give each its own --ids.")
    return int(text) if id_type == "int" else text


def _printable(data_id: object) -> str:
    """An id as a terminal may show it: one line, and no commands to it."""
    return str(data_id) if str(data_id).isprintable() else ascii(data_id)


@_command
def score(
    run: Run,
    query: Query,
    method: Method = "ekfac",
    damping: Damping = 0.1,
    normalize: Normalize = None,
    top: Top = 10,
    bottom: Bottom = 0,
    out: Annotated[Path | None, typer.Option(help="Also write all scores to this safetensors file.")] = None,
) -> None:
    """Score a log against a saved query and print the strongest proponents of each question.

    On many processes, `torchrun --nproc_per_node N -m loghook score ...` (or accelerate launch): each reads its share.
    """
    out = out and place_of(out)  # before anything is computed
    with _processes() as first:
        log, questions = loghook.load(run), loghook.Query.load(query)
        only_best = None if out or bottom else top
        scores = log.influence(questions, method, damping=damping, normalize=normalize, top=only_best)
        if not first:
            return
        if out:
            scores.save(out)
            typer.echo(f"scores written to {out}")
        opponents = scores.bottom(bottom) if bottom else [[]] * len(scores.query_ids)
        for query_id, best, worst in zip(scores.query_ids, scores.top(top), opponents, strict=True):
            typer.echo(_printable(query_id))
            for record in (*best, *worst):
                typer.echo(f"  {record.score:+.6g}  {_printable(record.data_id)}")


@_command
def report(
    run: Run,
    query: Query,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    texts: Annotated[Path | None, typer.Option(help=f"Texts of rows, {_LINES} on each line.")] = None,
    questions: Annotated[Path | None, typer.Option(help="Texts of questions, in the same form.")] = None,
    method: Method = "ekfac",
    damping: Damping = 0.1,
    normalize: Normalize = None,
    top: Top = 10,
    bottom: Bottom = 5,
) -> None:
    """Score a log against a saved query and write an HTML page of the strongest proponents and opponents."""
    place_of(out)  # raises before anything is computed
    row_texts, question_texts = (None if file is None else _read_texts(file) for file in (texts, questions))
    scores = loghook.load(run).influence(
        loghook.Query.load(query), method, damping=damping, normalize=normalize, top=None if bottom else top
    )
    scores.report(out, texts=row_texts, questions=question_texts, top=top, bottom=bottom)
    typer.echo(f"{out}: {len(scores.query_ids):,} questions")


def _read_texts(file: Path) -> dict[int | str, str]:
    records = _read_lines(file, _LINES)
    for record in records:
        if (
            not isinstance(record, dict)
            or type(record.get("id")) not in (int, str)
            or type(record.get("text")) is not str
        ):
            raise ConfigError(f"{file} has {json.dumps(record)[:100]}: it must hold {_LINES} on each line.")
    return {record["id"]: record["text"] for record in records}


def _read_lines(file: Path, rule: str) -> list[Any]:
    """Read a JSON value from each line; ``rule`` says in an error what they must be."""
    values, number = [], 1
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    values.append(json.loads(line))
                number += 1
    except ValueError as error:
        raise ConfigError(f"{file}, line {number}: {error}. Each line must hold {rule}.") from error
    return values


@_command
def demo(
    prompt: Annotated[list[str] | None, typer.Option(help="A text for the model to continue; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the log, the small model and the page.")] = Path("loghook-demo"),
    model: Annotated[str | None, typer.Option(help="A Hugging Face model instead of the small one.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A Hugging Face dataset or a text, JSON or CSV file.")] = None,
    rank: Annotated[int, typer.Option(help="Of the log's projection.")] = 64,
    seed: Annotated[int, typer.Option(help="Of weights, orders and projections.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, mps.")] = "cpu",
    proof: Annotated[bool, typer.Option(help="Fine-tune again without the strongest proponents.")] = True,
    lds: Annotated[int, typer.Option(help="Random halves for the linear datamodelling score; 0: none.")] = 0,
    fast: Annotated[bool, typer.Option(help="A smoke test of the same code in seconds; no numbers to keep.")] = False,
) -> None:
    """Fine-tune on Python's reference, log it, ask what made the model say this, and prove it: about five minutes."""
    from loghook.demo import DemoConfig, run_demo

    make: Callable[..., DemoConfig] = DemoConfig.fast if fast else DemoConfig
    config = make(
        out=out, prompts=tuple(prompt or ()), model=model, dataset=dataset, rank=rank, seed=seed, device=device,
        prove=proof, lds_subsets=lds,
    )  # fmt: skip
    run_demo(config)
