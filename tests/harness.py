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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

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


def squares(model: nn.Module, x: Any) -> Tensor:
    """A loss: the sum of the outputs' squares."""
    return model(x).square().sum()


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


def log_and_ask(
    path: Any, model: nn.Module, loss_fn: Loss, x: Any, asked: Any = None, *,
    ids: Any = None, query_ids: Any = None, size: int | None = None,
    watch: dict[str, Any] | None = None, block: dict[str, Any] | None = None, **options: Any,
) -> tuple[loghook.Log, Any]:  # fmt: skip
    """Log samples in all passes, in one block or in blocks of a size, and ask others: the finished log and the query.

    ``watch`` and ``block`` are arguments of the two (those of a block are a query's too), the others of ``init``.
    """
    block, ids = block or {}, list(range(batch_size(x)) if ids is None else ids)
    with loghook.init(path, **options) as run:
        run.watch(model, **watch or {})
        for _ in run.passes():
            for start in range(0, len(ids), size or len(ids)):
                part = slice(start, start + size) if size else slice(None)
                with run(data_id=ids[part], **block):
                    loss_fn(model, x[part] if size else x).backward()
        query = None
        if asked is not None:
            query_ids = range(batch_size(asked)) if query_ids is None else query_ids
            with run.query(data_id=list(query_ids), **block) as query:
                loss_fn(model, asked).backward()
        run.finalize()
    return loghook.load(path), query


def fitted(
    model: nn.Module, x: Any, loss_fn: Loss, folder: Any = None, size: int | None = None, fisher: str = "empirical",
    **block: Any,
) -> Any:  # fmt: skip
    """Factors of whole gradients, in one block or in blocks of a size; what is not named is an argument of a block."""
    fit = loghook.fit(folder or tempfile.mkdtemp(prefix="loghook-test-"), fisher=fisher)
    fit.watch(model)
    for _ in fit.passes():
        for ids in torch.arange(batch_size(x)).split(size or batch_size(x)):
            with fit(data_id=ids, **block):
                loss_fn(model, x[ids] if size else x).backward()
    return fit


def log_batch(
    model: nn.Module, loss_fn: Loss, batch: Any, *, frozen: bool = False, rank: Any = 4, projection: str = "random",
    seed: int = 0, dtype: str = "float64", scale: Any = 1.0, mask: Tensor | None = None, **watch: Any,
) -> loghook.Log:  # fmt: skip
    """Log one batch in a folder of its own; what is not named here is an argument of ``watch``."""
    options = {"rank": rank, "projection": projection, "seed": seed, "dtype": dtype}
    block = {"scale": scale, "mask": mask}
    with loghook.frozen(model) if frozen else contextlib.nullcontext():
        folder = tempfile.mkdtemp(prefix="loghook-test-")
        return log_and_ask(folder, model, loss_fn, batch, watch=watch, block=block, **options)[0]


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


def tiny_llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, **({"num_hidden_layers": 2} | changes),
    )  # fmt: skip
    return LlamaForCausalLM(config)


def causal_loss(model, batch):
    ids, mask = batch
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * mask[:, 1:]).sum()


def text_batch(batch=4, tokens=9):
    torch.manual_seed(1)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    for i in range(batch):
        mask[i, tokens - i :] = 0
    return torch.randint(0, 60, (batch, tokens)), mask
