"""What scoring costs: a scan of the log over a bare matrix product of the same shapes, with the log in memory.

The floor is ``queries @ rows.T`` on tensors that lie in memory already, in blocks of the same size. The scan includes
everything a user waits for once the log is open: preconditioned queries, the memory map, conversion, top-k.

With ``--disk-bytes``: a log of that size, of made-up rows that went through the real writer, scored from the disk by a
process that does nothing else, over reading the same files from the disk from end to end. Before each turn the files'
pages are dropped from the page cache. Opening the log and verifying its checksums are in the scan; the process's peak
of resident memory (VmHWM), which includes torch itself, is read after all turns.
"""

import multiprocessing
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import Parser, Peak, alternate, medians, ratio, report, setting

import loghook
from loghook.log.reader import BLOCK_BYTES
from loghook.log.writer import Batch

FEW = (1, 4)  # questions of a scan from the disk


def write_log(folder: Path, rows: int, layers: int, width: int, dtype: str, queries: int) -> loghook.Query:
    """A log of one real row and many that are made up, handed to the run's own writer; some questions for it."""
    side, batch = int(width**0.5), 1024
    model = torch.nn.Sequential(*[torch.nn.Linear(side, side, bias=False) for _ in range(layers)])
    with loghook.init(folder, projection="none", dtype=dtype) as run:
        run.watch(model)
        with run(data_id=[0]):
            model(torch.randn(1, side)).pow(2).sum().backward()
        with run.query(data_id=list(range(queries))) as query:
            model(torch.randn(queries, side)).pow(2).sum().backward()
        made_up = torch.randn(batch, layers * width)
        for step, start in enumerate(range(1, rows, batch), 1):
            n = min(batch, rows - start)
            values = made_up[:n].roll(step, 1).to(run._session.writer._codec.dtype)
            run._session.writer.put(Batch(values, list(range(start, start + n)), None, -1, step))
        run.finalize()
    return query


def first(query: loghook.Query, n: int) -> loghook.Query:
    """The first n questions."""
    return loghook.Query(query.data_ids[:n], query.matrix[:n], query.made, query.parameters)


def drop_from_cache(folder: Path) -> None:
    """Let the system forget the pages of a folder's files, which needs no rights for clean ones."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read(folder: Path) -> None:
    """Read a folder's files from the disk, one after the other, each from its beginning to its end."""
    drop_from_cache(folder)
    buffer = bytearray(2**20)
    for file in folder.iterdir():
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def scan(folder: Path, query: loghook.Query, n: int, **options: Any) -> None:
    """Open a log and score its rows from the disk for the first n questions."""
    drop_from_cache(folder)
    loghook.load(folder).influence(first(query, n), "dot", top=10, **options)


def timed(
    folder: Path, question_file: Path, threads: int, repeats: int, rest: float
) -> tuple[dict[str, list[float]], int]:
    """Seconds of reading and of scoring, turn by turn, and this process's peak of resident memory in bytes."""
    torch.set_num_threads(threads)
    query = loghook.Query.load(question_file)
    cases = {"read": partial(read, folder)} | {f"{n} questions": partial(scan, folder, query, n) for n in FEW}
    return alternate(cases, repeats, rest=rest), Peak.bytes()


def from_disk(a: Any) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("LOGHOOK_BENCH_DIR")) as name:
        folder, question_file = Path(name) / "log", Path(name) / "query.safetensors"
        rows = int(a.disk_bytes) // (2 * a.layers * a.width)
        write_log(folder, rows, a.layers, a.width, "bfloat16", max(FEW)).save(question_file)
        size = sum(file.stat().st_size for file in folder.iterdir())
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            times, peak = pool.apply(timed, (folder, question_file, a.threads, a.repeats, a.rest))
    ratios = {f"read / scan, {n} questions": ratio(times, "read", f"{n} questions") for n in FEW}
    rates = {case: size / seconds for case, seconds in medians(times).items()}
    print("\n" + ", ".join(f"{case} {rate / 1e9:.2f} GB/s" for case, rate in rates.items()))
    print(f"{size / 1e9:.2f} GB, {rows:,} rows; peak of resident memory {peak / 1e9:.3f} GB")
    targets: dict[str, tuple[float, str]] = dict.fromkeys(ratios, (0.8, ">="))
    ratios["peak of resident memory in GB"] = dict.fromkeys(("median", "low", "high"), peak / 1e9)
    about = {"rows": rows, "dtype": "bfloat16", "top": 10} | setting(a, "layers", "width", "rest")
    report(
        "score_disk",
        {"setting": about, "log_bytes": size, "bytes_per_second": rates, "seconds": times, "ratios": ratios},
        a,
        targets | {"peak of resident memory in GB": (1, "<=")},
    )


def main() -> None:
    made = Parser(__doc__, timed=True, threads=2)
    made.add_argument("--disk-bytes", type=float, help="score a log of so many bytes from the disk instead")
    made.add_argument("--rest", type=float, default=10.0, help="seconds before each turn that reads from the disk")
    made.add_argument("--rows", type=int, default=8192)
    made.add_argument("--layers", type=int, default=28)
    made.add_argument("--width", type=int, default=1024, help="values of a row in one layer: rank 32 has 1,024")
    made.add_argument("--queries", type=int, default=64)
    a = made.start()
    if a.disk_bytes:
        return from_disk(a)
    with tempfile.TemporaryDirectory() as folder:
        query = write_log(Path(folder) / "log", a.rows, a.layers, a.width, "float32", a.queries)
        log = loghook.load(Path(folder) / "log")
        rows = torch.cat([block for _, block in log.blocks()]).clone()
        step = max(1, BLOCK_BYTES // (rows.shape[1] * 4))

        def floor() -> None:
            out = torch.empty(a.queries, len(rows))
            for start in range(0, len(rows), step):
                out[:, start : start + step] = query.matrix @ rows[start : start + step].T

        log.influence(query, "ekfac")  # fit once: eigenvalues stay with the open log
        log.influence(query, "ekfac", normalize="unit")
        times = alternate(
            {
                "matrix product": floor,
                "dot": lambda: log.influence(query, "dot"),
                "dot, top 10": lambda: log.influence(query, "dot", top=10),
                "ekfac": lambda: log.influence(query, "ekfac"),
                "ekfac, unit": lambda: log.influence(query, "ekfac", normalize="unit"),
                "ekfac, first call": lambda: loghook.load(log.path).influence(query, "ekfac"),
            },
            a.repeats,
        )
    ratios = {
        f"{case} / matrix product": ratio(times, case, "matrix product") for case in times if case != "matrix product"
    }
    seconds = medians(times)
    pairs = a.rows * a.queries / seconds["dot"]
    flops = 2 * a.rows * a.queries * a.layers * a.width / seconds["matrix product"]
    print(f"\n{pairs:,.0f} pairs/s; {2 * a.layers * a.width:,} operations a pair; floor {flops / 1e9:.0f} GFLOP/s")
    result = {
        "setting": setting(a, "rows", "layers", "width", "queries"),
        "seconds": seconds,
        "ratios": ratios,
        "pairs_per_second": pairs,
        "operations_per_pair": 2 * a.layers * a.width,
        "log_bytes": a.rows * a.layers * a.width * 4,
    }
    # The first target; 80 % of a bare product is the aim.
    targets = {"dot / matrix product": (1.25, "<=")}
    report("score", result, a, targets)


if __name__ == "__main__":
    main()
