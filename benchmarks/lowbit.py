"""What low-bit rows cost and save: bytes, scan speed from disk and from memory, and what the arithmetic allows.

Logs of the same random rows in every dtype, the low-bit ones made by ``compress``. "From disk": before each scan the
files' pages are dropped from the page cache (``posix_fadvise(POSIX_FADV_DONTNEED)``, which needs no rights for clean
pages) and the log is opened anew, so that the scan waits for the disk and verifies checksums; with so many rows that
what is done once does not decide. "In memory": the log is open, checked and in the page cache.

Floors: bytes over the sequential read rate, measured beside; and for arithmetic a bare product with codes that are
unpacked already: ``torch._int_mm``, or one of floats on processors where that is quicker, whose results have a file of
their own. Fidelity is no matter of this script: random rows have none (``loghook compress`` prints it, and ``signs.py``
what 1-bit questions cost).
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import Parser, alternate, medians, ratio, report, setting
from score import FEW, first, read, scan, write_log

import loghook
from loghook.influence.products import has_integer_products
from loghook.log.maintain import compress
from loghook.project.linear import inner

LOW = ("int8", "int4", "int1")


def write_logs(folder: Path, base: str, rows: int, a: Any) -> tuple[dict[str, loghook.Log], loghook.Query]:
    """The same rows in a float dtype and in few bits, each in a folder of its dtype's name."""
    query = write_log(folder / base, rows, a.layers, a.width, base, a.many)
    for dtype in LOW:
        compress(folder / base, folder / dtype, dtype)
    return {dtype: loghook.load(folder / dtype) for dtype in (base, *LOW)}, query


def main() -> None:
    made = Parser(__doc__, timed=True, threads=2)
    made.add_argument("--rows", type=int, default=16384, help="of the logs in memory")
    made.add_argument("--disk-rows", type=int, default=131072, help="of the logs on the disk")
    made.add_argument("--rest", type=float, default=10.0, help="seconds before each turn that reads from the disk")
    made.add_argument("--layers", type=int, default=28)
    made.add_argument("--width", type=int, default=1024, help="values of a row in one layer: rank 32 has 1,024")
    made.add_argument("--many", type=int, default=64, help="questions of the scan in memory")
    a = made.start()
    seconds: dict[str, float] = {}
    rows: dict[str, int] = {}
    ratios = {}

    def measure(cases: dict[str, Callable[[], Any]], pairs: list[tuple[str, str]], n: int, rest: float = 0.0) -> None:
        times = alternate(cases, a.repeats, rest=rest)
        seconds.update(medians(times))
        rows.update(dict.fromkeys(cases, n))
        ratios.update({f"{over} / {under}": ratio(times, over, under) for over, under in pairs})

    with tempfile.TemporaryDirectory(dir=os.environ.get("LOGHOOK_BENCH_DIR")) as name:
        folder = Path(name)
        _, query = write_logs(folder, "bfloat16", a.disk_rows, a)

        for n in FEW:
            cases = {f"{dtype}, {n} from disk": partial(scan, folder / dtype, query, n) for dtype in ("bfloat16", *LOW)}
            wide, signs = f"bfloat16, {n} from disk", f"int1, 1-bit questions, {n} from disk"
            cases[signs] = partial(scan, folder / "int1", query, n, query_dtype="int1")
            cases["read"] = partial(read, folder / "bfloat16")
            measure(cases, [(wide, f"int1, {n} from disk"), (wide, signs), ("read", wide)], a.disk_rows, a.rest)
        rate = sum(f.stat().st_size for f in (folder / "bfloat16").iterdir()) / seconds.pop("read")
    with tempfile.TemporaryDirectory(dir=os.environ.get("LOGHOOK_BENCH_DIR")) as name:
        logs, query = write_logs(Path(name), "float32", a.rows, a)
        for n in (*FEW, a.many):
            cases = {f"{d}, {n}": lambda d=d, n=n: logs[d].influence(first(query, n), "dot", top=10) for d in logs}
            cases[f"int1, 1-bit questions, {n}"] = lambda n=n: logs["int1"].influence(
                first(query, n), "dot", top=10, query_dtype="int1"
            )
            measure(cases, [(f"{d}, {n}", f"float32, {n}") for d in LOW], a.rows)
        size = {d: logs[d].codec.row_bytes for d in logs} | {"bfloat16": 2 * a.layers * a.width}
    codes = torch.randint(-1, 2, (1024, a.width), dtype=torch.int8)
    halves = {n: torch.randint(-127, 128, (2 * n, a.width), dtype=torch.int8) for n in (*FEW, a.many)}
    bare: dict[str, Callable[[], Any]] = {}
    for n, half in halves.items():
        if has_integer_products():
            bare[str(n)] = partial(torch._int_mm, codes, half.T.contiguous())
        else:
            bare[str(n)] = partial(inner, half[:n].float(), codes.float())
    times = alternate(bare, 50)
    floors = {n: a.rows / 1024 * a.layers * sorted(times[n])[25] for n in times}
    print(f"\n{'':<34}{'rows/s':>12}{'values/s':>12}{'bytes/s':>12}")
    for case, value in seconds.items():
        speed = rows[case] / value
        each = size[case.split(",")[0].split(" ")[0]]
        print(f"{case:<34}{speed:>12,.0f}{speed * a.layers * a.width:>12.2e}{speed * each:>12.2e}")
    print(f"sequential read {rate:.2e} bytes/s; bytes a row {size}")
    print("bare products, seconds: " + ", ".join(f"{n} questions {s:.3f}" for n, s in floors.items()))
    report(
        "lowbit" if has_integer_products() else "lowbit_floats",
        {
            "setting": setting(a, "rows", "disk_rows", "layers", "width", "many", "rest"),
            "bytes_a_row": size, "seconds": seconds, "ratios": ratios,
            "floors": {"read_bytes_a_second": rate, "products_seconds": floors},
        },
        a,
        {
            "bfloat16, 1 from disk / int1, 1 from disk": (8, ">="),
            "bfloat16, 4 from disk / int1, 4 from disk": (8, ">="),
            "read / bfloat16, 1 from disk": (0.8, ">="),
            f"int1, {a.many} / float32, {a.many}": (1, "<="),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
