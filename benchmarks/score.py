"""What scoring costs: a scan of the log over a bare matrix product of the same shapes, with the log in memory.

The floor is ``queries @ rows.T`` on tensors that lie in memory already, in blocks of the same size. The scan includes
everything a user waits for once the log is open: preconditioned queries, the memory map, conversion, top-k.
"""

import tempfile
from pathlib import Path

import torch
from _common import alternate, parser, ratio, report

import loghook
from loghook.log.reader import BLOCK_BYTES


def make_log(folder: Path, rows: int, layers: int, width: int) -> tuple[loghook.Log, torch.nn.Module]:
    """A real log of random data: `layers` linears whose rows have `width` values each."""
    side = int(width**0.5)
    model = torch.nn.Sequential(*[torch.nn.Linear(side, side, bias=False) for _ in range(layers)])
    run = loghook.init(folder, projection="none")
    run.watch(model)
    batch = 256
    with loghook.frozen(model):
        for start in range(0, rows, batch):
            ids = list(range(start, min(start + batch, rows)))
            with run(data_id=ids):
                model(torch.randn(len(ids), side)).pow(2).sum().backward()
    run.finalize()
    return loghook.load(folder), model


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=8192)
    made.add_argument("--layers", type=int, default=28)
    made.add_argument("--width", type=int, default=1024, help="values of a row in one layer: rank 32 has 1,024")
    made.add_argument("--queries", type=int, default=64)
    a = made.parse_args()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as folder:
        log, model = make_log(Path(folder) / "log", a.rows, a.layers, a.width)
        asker = log.attach(model)
        with asker.query(data_id=list(range(a.queries))) as query:
            model(torch.randn(a.queries, int(a.width**0.5))).pow(2).sum().backward()
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
    seconds = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    pairs = a.rows * a.queries / seconds["dot"]
    flops = 2 * a.rows * a.queries * a.layers * a.width / seconds["matrix product"]
    print(f"\n{pairs:,.0f} pairs/s; {2 * a.layers * a.width:,} operations a pair; floor {flops / 1e9:.0f} GFLOP/s")
    result = {
        "setting": {key: getattr(a, key) for key in ("rows", "layers", "width", "queries")},
        "seconds": seconds,
        "ratios": ratios,
        "pairs_per_second": pairs,
        "operations_per_pair": 2 * a.layers * a.width,
        "log_bytes": a.rows * a.layers * a.width * 4,
    }
    # The first target; 80 % of a bare product is the aim.
    targets = {"dot / matrix product": (1.25, "<=")}
    report("score", result, save=a.save, targets=targets, require=a.require)


if __name__ == "__main__":
    main()
