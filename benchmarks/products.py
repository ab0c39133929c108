"""Matrix products by oneDNN, as loghook takes them on processors with AVX-512, over PyTorch's own.

Shapes: tokens projected to a rank, tokens rotated by a square matrix and their second moments (EK-FAC on whole
gradients), rows of a log times questions. "GFLOP/s" counts a multiplication and an addition as two.
"""

from collections.abc import Callable
from typing import Any

import torch
from _common import Parser, alternate, medians, ratio, report, setting

from loghook.project.linear import gram, linear

TOKENS = 1024


def cases(hidden: int, rank: int) -> dict[str, tuple[int, Callable[[], Any], Callable[[], Any]]]:
    """{name: (operations, ours, PyTorch's)}."""
    wide = int(hidden * 8 / 3) // 64 * 64
    found: dict[str, tuple[int, Callable[[], Any], Callable[[], Any]]] = {}

    def against_linear(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        operations = 2 * x.numel() * len(weight)
        found[name] = operations, lambda: linear(x, weight), lambda: torch.nn.functional.linear(x, weight)

    for width in (hidden, wide):
        x = torch.randn(TOKENS, width)
        against_linear(f"{TOKENS} tokens, {width} to rank {rank}", x, torch.randn(rank, width))
        against_linear(f"{TOKENS} tokens, {width} to {width}", x, torch.randn(width, width))
        moments = 2 * TOKENS * width**2, lambda x=x: gram(x, x), lambda x=x: x.T @ x
        found[f"second moment of {TOKENS} tokens, {width}"] = moments
    rows = torch.randn(256, 28 * 1024)
    for questions in (4, 16, 64):
        against_linear(f"256 rows of 28,672 values, {questions} questions", rows, torch.randn(questions, 28 * 1024))
    return found


def main() -> None:
    made = Parser(__doc__, timed=True, threads=2)
    made.add_argument("--hidden", type=int, default=512)
    made.add_argument("--rank", type=int, default=32)
    a = made.start()
    ratios, speeds = {}, {}
    for name, (operations, ours, theirs) in cases(a.hidden, a.rank).items():
        times = alternate({"ours": ten(ours), "PyTorch's": ten(theirs)}, a.repeats)
        ratios[name] = ratio(times, "ours", "PyTorch's")
        speeds[name] = {key: 10 * operations / seconds / 1e9 for key, seconds in medians(times).items()}
        print(f"  {name:<48}" + ", ".join(f"{key} {speed:6.0f} GFLOP/s" for key, speed in speeds[name].items()))
    result = {"setting": setting(a, "hidden", "rank", "repeats"), "gflops": speeds, "ratios": ratios}
    report("products", result, a, {})


def ten(product: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: [product() for _ in range(10)]


if __name__ == "__main__":
    main()
