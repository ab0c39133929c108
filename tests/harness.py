"""One oracle for every mode: what a run logs against one-sample-at-a-time autograd in float64."""

import contextlib
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import loghook
from loghook.project.projection import Side, draw_side, shared_input_name
from tests.oracle import batch_size, one_sample_gradients, project, relative_error

Loss = Callable[[nn.Module, Any], Tensor]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


class Largest(TorchDispatchMode):
    """Within it, the bytes of the largest tensor that PyTorch makes or looks at are kept in ``bytes``."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        if isinstance(made, Tensor):
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


@contextlib.contextmanager
def benchmarks() -> Iterator[Callable[[str], Any]]:
    """Give a function that imports a script of benchmarks/, on one thread; scripts and their path end with it."""
    folder, threads, before = Path(__file__).parents[1] / "benchmarks", torch.get_num_threads(), set(sys.modules)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder / "truths"))
        patch.syspath_prepend(str(folder))
        yield importlib.import_module
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(folder) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def log_batch(
    model: nn.Module, loss_fn: Loss, batch: Any, *, frozen: bool = False, rank: Any = 4, projection: str = "random",
    seed: int = 0, dtype: str = "float64", scale: Any = 1.0, mask: Tensor | None = None, **watch: Any,
) -> loghook.Log:  # fmt: skip
    """Log one batch through the public face and return the finished log."""
    folder = tempfile.mkdtemp(prefix="loghook-test-")
    run = loghook.init(folder, rank=rank, projection=projection, seed=seed, dtype=dtype)
    with contextlib.redirect_stdout(None):
        run.watch(model, **watch)
    with loghook.frozen(model) if frozen else contextlib.nullcontext():
        for _ in run.passes():
            with run(data_id=list(range(batch_size(batch))), scale=scale, mask=mask):
                loss_fn(model, batch).backward()
    run.finalize()
    run.close()
    return loghook.load(folder)


def sides(log: loghook.Log, name: str) -> tuple[Side, Side]:
    """Output and input side of a layer's projection, drawn anew from the manifest alone."""
    spec = next(s for s in log.manifest.layers if s.name == name)
    asked = log.manifest.rank
    rank = asked if isinstance(asked, int) else next(k for pattern, k in asked.items() if fnmatchcase(name, pattern))
    common = {"seed": log.manifest.seed, "rank": rank}
    kind = log.manifest.projection
    return (
        draw_side(kind, name=name, side="out", width=spec.out_features, **common),
        draw_side(kind, name=shared_input_name(name), side="in", width=spec.in_features + spec.bias, **common),
    )


def whole(side: Side) -> Tensor | None:
    return None if side.matrix is None else side.matrix.double() * side.gain


def assert_rows_exact(log: loghook.Log, model: nn.Module, loss_fn: Loss, batch: Any, tolerance: float) -> None:
    gradients = {n: g.cpu() for n, g in one_sample_gradients(model, loss_fn, batch, log.layers).items()}
    for name in log.layers:
        p_out, p_in = sides(log, name)
        expected = project(gradients[name], whole(p_out), whole(p_in))
        assert expected.abs().max() > 0, f"the oracle's rows of {name} are all zero: the test would compare nothing"
        sizes = gradients[name].flatten(1).norm(dim=1)
        error = relative_error(torch.from_numpy(log.rows(name)[:].copy()), expected, sizes=sizes)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def check_against_oracle(
    model: nn.Module, loss_fn: Loss, batch: Any, dtype: torch.dtype, **options: Any
) -> loghook.Log:
    log = log_batch(model, loss_fn, batch, **options)
    assert_rows_exact(log, model, loss_fn, batch, TOLERANCE[dtype])
    return log
