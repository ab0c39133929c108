"""What low-bit rows cost and save: bytes, scan speed from disk and from memory, and what the arithmetic allows.

Logs of the same random rows in every dtype. "From disk": before each scan the files' pages are dropped from the page
cache (``posix_fadvise(POSIX_FADV_DONTNEED)``, which needs no rights for clean pages) and the log is opened anew, so
that the scan reads every byte twice, once for its checksum (from the disk) and once for the scores (from the cache
again). "In memory": the log is open, checked and in the page cache.

Floors: bytes over the sequential read rate, measured beside; and for arithmetic a bare ``torch._int_mm`` on codes that
are unpacked already. Fidelity is no matter of this script: random rows have none (``loghook compress`` prints it).
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _common import alternate, parser, ratio, report
from score import make_log

import loghook
from loghook.log.maintain import compress


def drop_from_cache(folder: Path) -> None:
    """Let the system forget the pages of a folder's files."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_rate(folder: Path) -> float:
    """Bytes a second of reading a folder's files from the disk, one after the other."""
    drop_from_cache(folder)
    start, size = time.perf_counter(), 0
    for file in folder.iterdir():
        with open(file, "rb", buffering=0) as handle:
            while part := handle.read(8 * 2**20):
                size += len(part)
    return size / (time.perf_counter() - start)


def popcount(log: loghook.Log, signs: np.ndarray) -> np.ndarray:
    """Scores of 1-bit questions: XOR and population count, (Q, rows) int64, without the scales."""
    parts = log.codec.alike(range(len(log.layers)))
    codes = slice(parts[0].codes.start, parts[-1].codes.stop)
    out = np.empty((len(signs), len(log)), np.int64)
    for place, block in log.blocks(stored=True):
        words = block[:, codes].numpy().view(np.uint64)
        for q, question in enumerate(signs):
            for start in range(0, len(words), 256):
                counts = np.bitwise_count(words[start : start + 256] ^ question)
                out[q, place.start + start : place.start + start + len(counts)] = counts.sum(1, dtype=np.int64)
    return log.layout.gradient_width - 2 * out


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=16384)
    made.add_argument("--layers", type=int, default=28)
    made.add_argument("--width", type=int, default=1024, help="values of a row in one layer: rank 32 has 1,024")
    made.add_argument("--many", type=int, default=64, help="questions of the scan in memory")
    a = made.parse_args()
    torch.set_num_threads(a.threads)
    side, dtypes = int(a.width**0.5), ("bfloat16", "int8", "int4", "int1")
    with tempfile.TemporaryDirectory(dir=os.environ.get("LOGHOOK_BENCH_DIR")) as name:
        folder = Path(name)
        log, model = make_log(folder / "float32", a.rows, a.layers, a.width)
        for dtype in dtypes:
            compress(folder / "float32", folder / dtype, dtype)
        logs = {dtype: loghook.load(folder / dtype) for dtype in ("float32", *dtypes)}
        asker, query = log.attach(model), {}
        for n in (1, 4, a.many):
            with asker.query(data_id=list(range(n))) as query[n]:
                model(torch.randn(n, side)).pow(2).sum().backward()
        rate = read_rate(folder / "bfloat16")
        seconds: dict[str, float] = {}
        ratios = {}

        def measure(cases: dict, under: dict[str, str], repeats: int = a.repeats) -> None:
            times = alternate(cases, repeats)
            seconds.update({case: sorted(values)[len(values) // 2] for case, values in times.items()})
            ratios.update({f"{over} / {name}": ratio(times, over, name) for over, name in under.items()})

        def from_disk(dtype: str, n: int):
            def scan() -> None:
                drop_from_cache(folder / dtype)
                loghook.load(folder / dtype).influence(query[n], "dot", top=10)

            return scan

        for n in (1, 4):
            cases = {f"{dtype}, {n} from disk": from_disk(dtype, n) for dtype in dtypes}
            measure(cases, {f"bfloat16, {n} from disk": f"int1, {n} from disk"})
        for n in (1, 4, a.many):
            cases = {f"{d}, {n}": lambda d=d, n=n: logs[d].influence(query[n], "dot", top=10) for d in logs}
            if n < a.many:
                signs = np.packbits(query[n].matrix.numpy() > 0, axis=1, bitorder="little").view(np.uint64)
                cases[f"int1 with 1-bit questions, {n}"] = lambda signs=signs: popcount(logs["int1"], signs)
            measure(cases, {f"{d}, {n}": f"float32, {n}" for d in dtypes})
        codes = torch.randint(-1, 2, (1024, a.width), dtype=torch.int8)
        halves = {n: torch.randint(-127, 128, (a.width, 2 * n), dtype=torch.int8) for n in query}
        times = alternate({n: lambda n=n: torch._int_mm(codes, halves[n]) for n in halves}, 50)
        floors = {n: a.rows / 1024 * a.layers * sorted(times[n])[25] for n in halves}
        size = {d: logs[d].codec.row_bytes for d in logs}
    print(f"\n{'':<34}{'rows/s':>12}{'values/s':>12}{'bytes/s':>12}")
    for case, value in seconds.items():
        speed = a.rows / value
        each = size[case.split(",")[0].split(" ")[0]]
        print(f"{case:<34}{speed:>12,.0f}{speed * a.layers * a.width:>12.2e}{speed * each:>12.2e}")
    print(f"sequential read {rate:.2e} bytes/s; bytes a row {size}")
    print("bare integer products, seconds: " + ", ".join(f"{n} questions {s:.3f}" for n, s in floors.items()))
    report(
        "lowbit",
        {
            "setting": {key: getattr(a, key) for key in ("rows", "layers", "width", "many")},
            "bytes_a_row": size, "seconds": seconds, "ratios": ratios,
            "floors": {"read_bytes_a_second": rate, "integer_products_seconds": floors},
        },
        save=a.save,
        targets={
            "bfloat16, 1 from disk / int1, 1 from disk": (8, ">="),
            "bfloat16, 4 from disk / int1, 4 from disk": (8, ">="),
            f"int1, {a.many} / float32, {a.many}": (1, "<="),
        },
        require=a.require,
    )  # fmt: skip


if __name__ == "__main__":
    main()
