"""What goes wrong goes wrong out loud: the error's class, its message (value, rule, remedy), and that nothing is lost.

Everything goes through the public face. Good rows are judged by the oracle (`assert_log`), never by loghook itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loghook
from loghook.capture.rows import Captured
from loghook.capture.session import pack
from loghook.errors import (
    BatchError,
    ConfigError,
    CorruptLogError,
    DeliveryError,
    LogExistsError,
    LogLockedError,
    MismatchError,
    NotFiniteError,
    StateError,
    UnfinishedWarning,
    UnsupportedError,
    VersionError,
    WriteError,
)
from loghook.log import disk
from loghook.log.writer import Batch
from tests.oracle import one_sample_gradients

TOKENS, WIDTH = 3, 6
ROW_BYTES = 4 * (5 * 7 + 3 * 6)  # of a Net, whole gradients in float32


class Net(nn.Module):
    """Two linear layers: gradients (5, 7) and (3, 6) with the bias."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(WIDTH, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Branched(Net):
    """A Net with an expert that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(5, 3)
        self.awake = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden) + (self.expert(hidden) if self.awake else 0)


class Checkpointed(Net):
    """A Net whose first layer is recomputed in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return self.second(torch.tanh(checkpoint(self.first, x, use_reentrant=self.reentrant)))


class TwoHeads(Checkpointed):
    """A checkpointed trunk under two heads."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__(reentrant)
        self.other = nn.Linear(5, 3)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        hidden = torch.tanh(checkpoint(self.first, x, use_reentrant=self.reentrant))
        return self.second(hidden), self.other(hidden)


class Recurrent(nn.Module):
    """One layer called twice, each time under a checkpoint."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.reentrant = nn.Linear(WIDTH, WIDTH), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        for _ in range(2):
            x = torch.tanh(checkpoint(self.cell, x, use_reentrant=self.reentrant))
        return x


class Scaler:
    """What loghook needs of torch.amp.GradScaler."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def model() -> Net:
    return Net()


@pytest.fixture
def run(path: Path, model: Net) -> Iterator[loghook.Run]:
    with watched(path, model) as run:
        yield run


@pytest.fixture
def finished(path: Path, model: Net) -> loghook.Query:
    """A finished run of six rows in three shards at `path`, and a question for it."""
    return make_finished(path, model)


def make_finished(path: Path, model: nn.Module) -> loghook.Query:
    with watched(path, model, shard_bytes=2 * ROW_BYTES) as run:
        for start in range(0, 6, 2):
            log(run, model, [start, start + 1])
        run.finalize()
        return ask(run, model)


def watched(path: Path, model: nn.Module, *, watch: dict[str, Any] | None = None, **arguments: Any) -> loghook.Run:
    run = loghook.init(path, **({"projection": "none"} | arguments))
    run.watch(model, **(watch or {}))
    return run


def samples(ids: Sequence[Any]) -> Tensor:
    """(B, TOKENS, WIDTH): a sample depends on its id alone."""
    return torch.stack(
        [torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(repr(i).encode()))) for i in ids]
    )


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def log(run: Any, model: nn.Module, ids: Any, x: Tensor | None = None, **arguments: Any) -> None:
    with run(data_id=ids, **arguments):
        loss_of(model, samples(list(ids)) if x is None else x).backward()


def ask(asker: Any, model: nn.Module) -> loghook.Query:
    with asker.query(data_id=["q0", "q1"]) as query:
        loss_of(model, samples(["q0", "q1"])).backward()
    return query


def assert_log(path: Path, model: nn.Module, ids: Sequence[Any]) -> loghook.Log:
    """The log is sound and holds the rows of these samples and no others."""
    opened = loghook.load(path)
    assert opened.verify() == []
    assert opened.data_ids == list(ids)
    for name, expected in one_sample_gradients(model, loss_of, samples(ids), opened.layers).items():
        np.testing.assert_allclose(opened.rows(name), expected, rtol=1e-4, atol=1e-5, err_msg=name)
    return opened


def assert_goes_on(
    run: loghook.Run, model: nn.Module, before: Sequence[Any] = (), new: Sequence[Any] = (100, 101)
) -> None:
    """After an error: the next batch is logged, and the finished log holds exactly the good rows."""
    log(run, model, list(new))
    run.finalize()
    assert_log(run.path, model, [*before, *new])


def says(error: Any, *fragments: Any) -> None:
    """The message has the value, the rule and the remedy."""
    text = str(error.value)
    for fragment in fragments:
        assert str(fragment) in text, f"{fragment!r} is not in: {text}"


@contextlib.contextmanager
def refused(kind: Any, *fragments: Any) -> Iterator[Any]:
    """What is in the block raises an error that says so."""
    with pytest.raises(kind) as error:
        yield error
    says(error, *fragments)


# Arguments of init and watch


@pytest.mark.parametrize("rank", [0, -3, 2.5, True, {}, {1: 2}])
def test_rank_that_is_no_positive_number_is_refused(path: Path, rank: Any) -> None:
    with refused(ConfigError, f"rank={rank!r}", "whole number of at least 1"):
        loghook.init(path, rank=rank)
    assert not path.exists()


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("seed", 1.0, "whole number"),
        ("seed", True, "whole number"),
        ("seed", "1", "whole number"),
        ("whitening", "a", "positive, finite number"),
        ("whitening", True, "positive, finite number"),
        ("whitening", 0, "positive, finite number"),
        ("whitening", float("nan"), "positive, finite number"),
        ("whitening", float("inf"), "positive, finite number"),
        ("commit_seconds", "a", "positive, finite number"),
        ("commit_seconds", -1, "positive, finite number"),
        ("shard_bytes", 0, "whole number of at least 1"),
        ("shard_bytes", 1e9, "whole number of at least 1"),
        ("fidelity", [1], "tune"),
        ("fidelity", {"pearson": 0.9}, "tune"),
        ("fidelity", {"pearson": object(), "reference": "", "scoring": {}}, "tune"),
    ],
)
def test_arguments_of_init_that_no_log_could_hold_are_refused(path: Path, argument: str, value: Any, rule: str) -> None:
    with refused(ConfigError, f"{argument}={value!r}"[:50], rule):
        loghook.init(path, **{"projection": "whitened", argument: value})


@pytest.mark.parametrize("rank", [0, 2.0])
def test_rank_of_a_pattern_that_is_no_positive_number_is_refused(path: Path, rank: Any) -> None:
    with refused(ConfigError, f"rank['*']={rank!r}", "whole number of at least 1"):
        loghook.init(path, rank={"a*": 8, "*": rank})
    assert not path.exists()


def test_numbers_of_any_type_make_a_log_that_opens(path: Path, model: Net) -> None:
    options = {
        "rank": {"*first": np.int64(2), "*": torch.tensor(3)}, "seed": np.int64(3), "whitening": np.float32(0.5),
        "shard_bytes": np.int64(10**6), "commit_seconds": 30,
    }  # fmt: skip
    run = loghook.init(path, projection="whitened", **options)
    run.watch(model)
    for _ in run.passes():
        log(run, model, range(20))
    run.finalize()
    manifest = loghook.load(path).manifest
    assert (manifest.seed, manifest.whitening, manifest.rank) == (3, 0.5, {"*first": 2, "*": 3})
    assert loghook.init(path, projection="whitened", resume=True, **options).path == path

    run = loghook.init(path, projection="whitened", whitening=1, overwrite=True, rank=2)
    run.watch(model)
    for _ in run.passes():
        log(run, model, range(20))
    run.finalize()
    assert loghook.load(path).manifest.whitening == 1.0


def test_ranks_by_pattern_that_leave_a_layer_out_are_refused(path: Path, model: Net) -> None:
    run = loghook.init(path, rank={"*first": 2})
    with refused(ConfigError, "{'*first': 2}", "no pattern that fits layer", "'*': 32"):
        run.watch(model)
    assert not model.first._forward_hooks and run.layers == ()


@pytest.mark.parametrize(
    "rank, says",
    [({"frist": 4, "*": 2}, "'frist'.* fits no module"), ({"*": 2, "first": 4}, "'first'.* serves no layer")],
)
def test_ranks_by_pattern_of_which_one_is_never_used_are_refused(path: Path, model: Net, rank: Any, says: str) -> None:
    """They used to be passed over; one for modules that are not watched may stay."""
    with pytest.raises(ConfigError, match=says):
        loghook.init(path, rank=rank).watch(model)
    with loghook.init(path, rank={"first": 4, "*": 2}) as run:
        run.watch(model, exclude=["first"])
        assert {layer.k_in for layer in run._layout.layers} == {2}


def test_rank_above_every_width_is_refused_and_the_path_stays_free(path: Path, model: Net) -> None:
    run = loghook.init(path, rank=64)
    with refused(ConfigError, "rank=64", "largest: 7", "smaller rank", "projection='none'"):
        run.watch(model)
    assert not model.first._forward_hooks and run.layers == ()
    again = loghook.init(path, rank=7)
    again.watch(model)
    log(again, model, [1])
    again.finalize()
    assert_log(path, model, [1])


def test_rank_above_some_widths_keeps_those_sides_whole(path: Path, model: Net) -> None:
    with watched(path, model, projection="random", rank=6) as run:
        log(run, model, [1])
        run.finalize()
    assert loghook.load(path).rows("first").shape == (1, 5, 6)
    assert loghook.load(path).rows("second").shape == (1, 3, 6)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("projection", ("random", "none")),
        ("dtype", ("float64", "float32", "bfloat16", "float16")),
        ("on_repeat", ("'error'", "'first'", "'all'")),
    ],
)
def test_unknown_word_is_refused_with_the_choices(path: Path, name: str, choices: tuple[str, ...]) -> None:
    with refused(ConfigError, f"{name}='sideways'", "unknown", "choose", *choices):
        loghook.init(path, **{name: "sideways"})
    assert not path.exists()


@pytest.mark.parametrize("name", ["include", "may_sleep"])
def test_pattern_that_matches_nothing_is_refused(path: Path, model: Net, name: str) -> None:
    run = loghook.init(path, projection="none")
    with refused(ConfigError, "'*experts*'", "matches no module", "fnmatch", "first, second"):
        run.watch(model, **{name: "*experts*"})
    run.watch(model)
    assert_goes_on(run, model)


def test_layers_in_a_message_are_those_that_are_watched_first_and_few(path: Path) -> None:
    blocks = [nn.ModuleDict({"attn": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}) for _ in range(40)]
    deep = nn.ModuleDict({"wte": nn.Embedding(3, 2), "h": nn.ModuleList(blocks), "head": nn.Linear(2, 3)})
    with pytest.raises(ConfigError) as error:
        watched(path, deep, watch={"include": "*o_proj"})
    assert str(error.value).endswith("such as h.*.attn, head, wte.")


def test_include_and_exclude_that_leave_nothing_are_refused(path: Path, model: Net) -> None:
    run = loghook.init(path, projection="none")
    with pytest.raises(ConfigError) as error:
        run.watch(model, include="first", exclude=["f*", "second"])
    says(error, "['first']", "['f*', 'second']", "selects no linear or convolution layer", "narrow exclude")
    run.watch(model)
    assert_goes_on(run, model)


def test_exclude_that_matches_nothing_is_fine(path: Path, model: Net) -> None:
    with watched(path, model, watch={"exclude": "*nothing*"}) as run:
        assert run.layers == ("first", "second")
        assert_goes_on(run, model)


# Ids


@pytest.mark.parametrize("ids", [[1, 2, 3], [1]])
def test_number_of_ids_that_differs_from_the_batch_is_refused(run: loghook.Run, model: Net, ids: list[int]) -> None:
    log(run, model, [0])
    with pytest.raises(BatchError) as error:
        log(run, model, ids, x=samples([1, 2]))
    assert str(error.value).startswith(f"2 samples, {len(ids)} ids: ")
    says(error, "'second'", (2, TOKENS, 5), "Pass one id for each sample")  # it gets its gradient first
    assert_goes_on(run, model, before=[0])


@pytest.mark.parametrize(
    ("ids", "fragments"),
    [
        ([1, "b"], ("int, str", "all int or all str", "convert")),
        ([1.0, 2.0], ("float", "all int or all str")),
        ([True, False], ("bool", "all int or all str")),
        (np.array([True, False]), ("bool", "all int or all str")),
        ([1, True], ("bool, int", "all int or all str")),
        ([None, None], ("NoneType", "all int or all str")),
        ([], ("empty", "one id for each sample")),
        (torch.tensor([], dtype=torch.int64), ("empty", "one id for each sample")),
        (torch.tensor([1.0, 2.0]), ("float32", "1-D integer tensor")),
        (torch.tensor([True, False]), ("bool", "1-D integer tensor")),
        (torch.tensor([[1, 2]]), ((1, 2), "1-D integer tensor")),
        (torch.tensor(1), ("()", "1-D integer tensor")),
        (np.array([[1], [2]]), ("all int or all str",)),
        (np.array(1), ("1", "list")),
        ([torch.tensor([1, 2]), torch.tensor([3, 4])], ("all int or all str",)),
        ("ab", ("'ab'", "single value", "['ab']")),
        (7, ("7", "single value", "[7]")),
        (None, ("None", "single value")),
    ],
    ids=lambda value: str(value).replace("\n", "")[:40],
)
def test_ids_that_are_no_list_of_int_or_str_are_refused(
    run: loghook.Run, model: Net, ids: Any, fragments: tuple[Any, ...]
) -> None:
    with refused(BatchError, "data_id", *fragments):
        log(run, model, ids, x=samples([1, 2]))
    assert_goes_on(run, model)


def test_ids_of_another_type_in_a_later_batch_are_refused(run: loghook.Run, model: Net) -> None:
    log(run, model, [1, 2])
    with refused(BatchError, "str here", "was int", "one type throughout"):
        log(run, model, ["3", "4"])
    assert_goes_on(run, model, before=[1, 2])


def test_ids_of_another_type_after_a_restart_are_refused(path: Path, run: loghook.Run, model: Net) -> None:
    log(run, model, [1, 2])
    run.close()
    with watched(path, model, resume=True) as resumed:
        with pytest.raises(BatchError, match="was int"):
            log(resumed, model, ["3", "4"])
        assert_goes_on(resumed, model, before=[1, 2])


# Repeats


@pytest.mark.parametrize("ids", [[5, 5], [3, 1]], ids=["within a batch", "across batches"])
def test_repeated_id_is_refused_under_on_repeat_error(path: Path, model: Net, ids: list[int]) -> None:
    with watched(path, model, on_repeat="error") as run:
        log(run, model, [1, 2])
        with refused(BatchError, f"data_id {ids[1]}", "was logged before", "on_repeat='first'", "'all'"):
            log(run, model, ids)
        assert_goes_on(run, model, before=[1, 2])


def test_first_inside_passes_keeps_the_first_row_and_counts_the_rest(run: loghook.Run, model: Net) -> None:
    batches = [[1, 2], [2, 3], [3, 4, 4]]
    for _ in run.passes():
        for batch in batches:
            log(run, model, batch)
    run.finalize()
    assert assert_log(run.path, model, [1, 2, 3, 4]).repeats == 3


def test_first_keeps_the_row_that_came_first_also_where_the_repeat_differs(run: loghook.Run, model: Net) -> None:
    for _ in run.passes():
        log(run, model, [1, 2])
        log(run, model, [2, 3], x=torch.stack([7 * samples([2])[0], samples([3])[0]]))
        log(run, model, [4, 4], x=torch.stack([samples([4])[0], 7 * samples([4])[0]]))
    run.finalize()
    assert_log(run.path, model, [1, 2, 3, 4])


def test_batch_of_nothing_but_repeats_is_counted_and_harmless(run: loghook.Run, model: Net) -> None:
    for _ in run.passes():
        for batch in ([1, 2], [1, 2], [3, 4]):
            log(run, model, batch)
    run.finalize()
    assert assert_log(run.path, model, [1, 2, 3, 4]).repeats == 2


def test_shard_that_starts_with_nothing_but_repeats_is_harmless(path: Path, model: Net) -> None:
    with watched(path, model, shard_bytes=2 * ROW_BYTES, commit_seconds=1e-6) as run:
        for _ in run.passes():
            for batch in ([1, 2], [1, 2], [1, 2], [3, 4]):
                log(run, model, batch)
        run.finalize()
    assert_log(path, model, [1, 2, 3, 4])


def test_repeats_do_not_count_in_the_statistics(tmp_path: Path, model: Net) -> None:
    for name, batches in {"once": [[1, 2], [3]], "repeated": [[1, 2, 2], [1, 3]]}.items():
        with watched(tmp_path / name, model) as run:
            for _ in run.passes():
                for batch in batches:
                    log(run, model, batch)
            run.finalize()
    once, repeated = (loghook.load(tmp_path / name) for name in ("once", "repeated"))
    np.testing.assert_allclose(repeated.moments(), once.moments(), rtol=1e-5, atol=1e-6)


def test_a_block_that_failed_counts_no_repeats(path: Path, model: Net) -> None:
    """Three samples come again, and once more since their block failed: no sign of ids that are places in a batch."""
    with watched(path, model) as run, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in run.passes():
            log(run, model, [0, 1, 2, 3])
            with pytest.raises(DeliveryError), run(data_id=[0, 1, 2]):
                pass
            log(run, model, [0, 1, 2])
        run.finalize()
    assert_log(path, model, [0, 1, 2, 3])
    assert loghook.load(path).repeats == 3


def test_outside_passes_all_rows_are_kept_and_keyed_by_step(run: loghook.Run, model: Net) -> None:
    for batch in ([1, 2], [2, 1], [3, 3]):
        log(run, model, batch)
    run.finalize()
    opened = assert_log(run.path, model, [1, 2, 2, 1, 3, 3])
    assert opened.keys.step.tolist() == [0, 0, 1, 1, 2, 2] and opened.repeats == 0


# Mask and scale


@pytest.mark.parametrize("shape", [(3, TOKENS), (3,), (2, TOKENS, 1), ()])
def test_mask_of_another_batch_size_is_refused(run: loghook.Run, model: Net, shape: tuple[int, ...]) -> None:
    with refused(BatchError, "mask", shape, "2 ids", "pass (batch, tokens)"):
        log(run, model, [1, 2], mask=torch.ones(shape))
    assert_goes_on(run, model)


def test_mask_with_a_number_of_tokens_that_no_layer_has_is_refused(run: loghook.Run, model: Net) -> None:
    log(run, model, [0])
    with refused(BatchError, (2, TOKENS + 1), "none has 4 tokens", "Pass the mask with the shape (batch, tokens)"):
        log(run, model, [1, 2], mask=torch.ones(2, TOKENS + 1))
    with refused(BatchError, (2, TOKENS + 1), "fits no layer that it is for"):
        log(run, model, [1, 2], mask={"first": torch.ones(2, TOKENS), "second": torch.ones(2, TOKENS + 1)})
    with refused(BatchError, "mask={'second': ...} serves no layer", "the first that fits"):
        log(run, model, [1, 2], mask={"*": torch.ones(2, TOKENS), "second": torch.ones(2, TOKENS)})
    assert_goes_on(run, model, before=[0])


@pytest.mark.parametrize(
    "scale",
    [0, 0.0, float("nan"), float("inf"), "much", None, torch.ones(2), torch.tensor(0.0), torch.tensor(float("nan"))],
    ids=str,
)
def test_scale_that_is_no_finite_number_but_zero_is_refused(run: loghook.Run, model: Net, scale: Any) -> None:
    log(run, model, [0])
    with refused(BatchError, "scale", (2,) if isinstance(scale, Tensor) and scale.dim() else "pass n"):
        log(run, model, [1, 2], scale=scale)
    assert_goes_on(run, model, before=[0])


def test_scale_undoes_a_mean(run: loghook.Run, model: Net) -> None:
    for scale, ids in ((2 * TOKENS * 3, [1, 2]), (torch.tensor(2.0 * TOKENS * 3), [3, 4])):
        with run(data_id=ids, scale=scale):
            model(samples(ids)).square().mean().backward()
    assert_goes_on(run, model, before=[1, 2, 3, 4])


# Delivery

CHECKPOINTING = pytest.mark.parametrize(
    "make", [Net, lambda: Checkpointed(False), lambda: Checkpointed(True)], ids=["plain", "checkpoint", "reentrant"]
)


@CHECKPOINTING
def test_one_backward_pass_is_not_taken_for_two(path: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    with watched(path, model) as run:
        log(run, model, [1, 2])
        run.finalize()
    assert_log(path, Net(), [1, 2])


@pytest.mark.parametrize("reentrant", [False, True])
def test_shared_layer_under_checkpoints_is_not_taken_for_two_backward_passes(path: Path, reentrant: bool) -> None:
    model = Recurrent(reentrant)
    with watched(path, model) as run:
        log(run, model, [1, 2])
        run.finalize()
    assert_log(path, Recurrent(False), [1, 2])


def two_forwards(model: nn.Module) -> None:
    loss_of(model, samples([1, 2])).backward()
    loss_of(model, samples([3, 4])).backward()


def one_graph_twice(model: nn.Module) -> None:
    loss = loss_of(model, samples([1, 2]))
    loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.parametrize("go_back", [two_forwards, one_graph_twice])
@CHECKPOINTING
def test_two_backward_passes_in_a_block_are_refused(
    path: Path, make: Callable[[], nn.Module], go_back: Callable[[nn.Module], None]
) -> None:
    model = make()
    with watched(path, model) as run:
        log(run, model, [0])
        with refused(DeliveryError, "two backward passes", "one block", "add the losses"), run(data_id=[1, 2]):
            go_back(model)
        log(run, model, [100, 101])
        run.finalize()
    assert_log(path, Net(), [0, 100, 101])


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_backward_passes_from_two_heads_are_refused(path: Path, reentrant: bool) -> None:
    model = TwoHeads(reentrant)
    with watched(path, model) as run:
        with refused(DeliveryError, "two backward passes", "one block"), run(data_id=[1, 2]):
            model.heads(samples([1, 2]))[0].square().sum().backward()
            model.heads(samples([1, 2]))[1].square().sum().backward()
        with run(data_id=[100]):
            sum(head.square().sum() for head in model.heads(samples([100]))).backward()
        run.finalize()
    assert loghook.load(path).data_ids == [100]


def test_block_without_backward_is_refused(run: loghook.Run, model: Net) -> None:
    log(run, model, [0])
    with pytest.raises(DeliveryError) as error, run(data_id=[1, 2]):
        loss = loss_of(model, samples([1, 2]))
    says(error, "no backward pass reached a watched layer", "call loss.backward() inside")
    loss.backward()  # too late, and without effect
    assert_goes_on(run, model, before=[0])


def test_forward_under_no_grad_is_refused(run: loghook.Run, model: Net) -> None:
    with pytest.raises(DeliveryError) as error, run(data_id=[1, 2]), torch.no_grad():
        loss_of(model, samples([1, 2]))
    says(error, "no watched layer ran", "gradients enabled", "inside the block")
    assert_goes_on(run, model)


def test_forward_outside_the_block_is_refused(run: loghook.Run, model: Net) -> None:
    loss = loss_of(model, samples([1, 2]))
    with refused(DeliveryError, "no watched layer ran", "forward and backward inside"), run(data_id=[1, 2]):
        loss.backward()
    assert_goes_on(run, model)


def test_layer_that_does_not_run_is_named(path: Path) -> None:
    model = Branched()
    with watched(path, model) as run:
        log(run, model, [1, 2])
        model.awake = False
        with pytest.raises(DeliveryError) as error:
            log(run, model, [3, 4])
        says(error, "1 of 3", "'expert'", "branch not taken", "may_sleep", "Nothing of this batch was written")
        model.awake = True
        assert_goes_on(run, model, before=[1, 2])


def test_layer_whose_output_is_detached_is_named(path: Path) -> None:
    model = Branched()
    with watched(path, model) as run:
        with refused(DeliveryError, "'expert'", "no gradient came back", "detached", "Exclude"), run(data_id=[1, 2]):
            hidden = torch.tanh(model.first(samples([1, 2])))
            (model.second(hidden) + model.expert(hidden).detach()).square().sum().backward()
        assert_goes_on(run, model)


def test_layer_that_may_sleep_gets_rows_of_zeros(path: Path) -> None:
    model = Branched()
    with watched(path, model, watch={"may_sleep": "exp*"}) as run:
        log(run, model, [1, 2])
        model.awake = False
        log(run, model, [3, 4])
        run.finalize()
    opened = loghook.load(path)
    assert opened.verify() == [] and opened.data_ids == [1, 2, 3, 4]
    assert np.all(np.any(opened.rows("expert")[:2], axis=(1, 2))) and not np.any(opened.rows("expert")[2:])
    asleep = one_sample_gradients(model, loss_of, samples([3, 4]), ["first", "second", "expert"])
    for name, expected in asleep.items():
        np.testing.assert_allclose(opened.rows(name)[2:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_exception_inside_the_block_is_not_replaced_and_nothing_is_written(
    run: loghook.Run, model: Net, where: str
) -> None:
    log(run, model, [0])
    boom = KeyError("the user's own")
    with pytest.raises(KeyError) as error, run(data_id=[1, 2]):
        if where == "before":
            raise boom
        loss = loss_of(model, samples([1, 2]))
        if where == "between":
            raise boom
        loss.backward()
        raise boom
    assert error.value is boom and boom.__cause__ is None
    log(run, model, [1, 2])  # the same batch again
    assert_goes_on(run, model, before=[0, 1, 2])


def test_exception_inside_a_pass_does_not_complete_it(path: Path, run: loghook.Run, model: Net) -> None:
    with pytest.raises(KeyError):
        for _ in run.passes():
            log(run, model, [1, 2])
            raise KeyError("the user's own")
    run.close()
    with watched(path, model, resume=True) as resumed:
        for _ in resumed.passes():
            log(resumed, model, [1, 2])
            log(resumed, model, [3, 4])
        resumed.finalize()
    assert_log(path, model, [1, 2, 3, 4])


# Not finite


def spoilt(ids: Sequence[int], bad: int, value: float) -> Tensor:
    x = samples(ids)
    x[list(ids).index(bad)] *= value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused_by_id_on_cpu(run: loghook.Run, model: Net, value: float) -> None:
    log(run, model, [0])
    with pytest.raises(NotFiniteError) as error:
        log(run, model, [1, 2, 3], x=spoilt([1, 2, 3], 2, value))
    says(error, "1 samples are not finite", "data_id 2)", "nothing of this batch was written", "scaler=scaler")
    assert_goes_on(run, model, before=[0])


def test_rows_that_are_finite_but_whose_sum_is_not_are_good(path: Path, model: Net) -> None:
    with watched(path, model, watch={"include": "second"}) as run:
        with run(data_id=[1]):
            (model(samples([1])) * 1e38).sum().backward()  # three tokens: 3e38 in each bias, 9e38 in all
        run.finalize()
    assert np.isfinite(loghook.load(path).rows("second")[:]).all()


def test_rows_too_large_for_float16_are_refused_by_id(path: Path, model: Net) -> None:
    with watched(path, model, dtype="float16") as run:
        log(run, model, ["a", "b"])
        with torch.no_grad():
            model.second.bias.fill_(1e5)
        with pytest.raises(NotFiniteError) as error:
            log(run, model, ["c", "d"])
        says(error, "2 samples", "data_id 'c', 'd'", "storage dtype is too narrow", "bfloat16 or float32")
        with torch.no_grad():
            model.second.bias.fill_(0.1)
        log(run, model, ["e"])
        run.finalize()
    opened = loghook.load(path)
    assert opened.data_ids == ["a", "b", "e"] and opened.verify() == []


def test_rows_too_small_for_float16_warn_once(path: Path, model: Net) -> None:
    with watched(path, model, dtype="float16") as run, pytest.warns(UserWarning, match="underflow in float16") as told:
        for ids, scale in (([1, 2], 1.0), ([3, 4], 0.0), ([5, 6], 1e-7), ([7, 8], 1e-9)):
            assert bool(told) == (ids[0] > 5)  # rows of zeros lose nothing
            with run(data_id=ids):
                (scale * model(samples(ids)).pow(2).sum()).backward()
        run.finalize()
    assert len(told) == 1 and told[0].filename == __file__


@pytest.fixture
def found_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as a GPU hands them over: nobody has looked at them before the writer does."""

    def unchecked(captured: Captured, ids: Any, keep: np.ndarray, **options: Any) -> Batch:
        clean = dataclasses.replace(captured, rows=captured.rows.nan_to_num())
        return dataclasses.replace(pack(clean, ids, keep, **options), rows=captured.rows[keep], checked=False)

    monkeypatch.setattr("loghook.capture.run.pack", unchecked)


NAN = float("nan")


@pytest.mark.usefixtures("found_late")
def test_rows_found_late_are_raised_once_and_their_ids_can_come_again(path: Path, run: loghook.Run, model: Net) -> None:
    with pytest.raises(NotFiniteError) as error:
        for _ in run.passes():
            log(run, model, [0])
            log(run, model, [1, 2], x=spoilt([1, 2], 2, NAN))
            assert run._session.writer is not None
            run._session.writer.commit_now()
            assert run.pending([1, 2]) == []  # nobody knows yet
            log(run, model, [3])
    says(error, "data_id 2)", "nothing of their batch of 2 was written", "in the background", "the error's ids")
    assert error.value.ids == [1, 2]
    for _ in run.passes():
        assert run.pending([0, 1, 2, 3]) == [1, 2, 3]
        for ids in ([0], [1, 2], [3]):
            log(run, model, ids)
    run.finalize()
    assert_log(path, model, [0, 1, 2, 3])


@pytest.mark.usefixtures("found_late")
def test_a_pass_with_rows_found_late_is_not_over(path: Path, run: loghook.Run, model: Net) -> None:
    """Also where they are those of its last blocks; one error speaks of all of them."""
    with refused(NotFiniteError, "data_id 2)", "data_id 3)") as error:
        for _ in run.passes():
            with open_gate(run, model):
                log(run, model, [1, 2], x=spoilt([1, 2], 2, NAN))
                log(run, model, [3], x=spoilt([3], 3, NAN))
    assert error.value.ids == [1, 2, 3]
    run.close()
    with watched(path, model, resume=True) as resumed:
        for _ in resumed.passes():
            log(resumed, model, [0, 1])
            log(resumed, model, [2, 3])
        resumed.finalize()
    assert_log(path, model, [0, 1, 2, 3])


@contextlib.contextmanager
def open_gate(run: loghook.Run, model: Net) -> Iterator[None]:
    """Hold the writer's thread until the end of this context."""
    log(run, model, [0])
    assert run._session.writer is not None
    gate, write = threading.Event(), run._session.writer._write

    def waiting(batch: Batch) -> None:
        gate.wait(30)
        write(batch)

    run._session.writer._write = waiting  # type: ignore[method-assign]
    yield
    gate.set()


@pytest.mark.usefixtures("found_late")
@pytest.mark.parametrize("again", [True, False])
def test_finalize_after_rows_found_late_works_the_second_time(
    path: Path, run: loghook.Run, model: Net, again: bool
) -> None:
    log(run, model, [0])
    log(run, model, [1, 2], x=spoilt([1, 2], 2, NAN))
    with pytest.raises(NotFiniteError):
        run.finalize()
    with watched(path, model, resume=True) as other, pytest.raises(LogLockedError):  # the run is still open
        log(other, model, [5])
    if again:
        log(run, model, [1, 2])
    run.finalize()
    assert_log(path, model, [0, 1, 2] if again else [0])


def test_question_that_is_not_finite_is_refused(run: loghook.Run, model: Net) -> None:
    with refused(NotFiniteError, "data_id 2)"), run.query(data_id=[1, 2]) as query:
        loss_of(model, spoilt([1, 2], 2, float("nan"))).backward()
    with pytest.raises(StateError):
        query.rows("first")
    assert_goes_on(run, model)


def test_scaler_is_divided_out_of_the_rows(run: loghook.Run, model: Net) -> None:
    with run(data_id=[1, 2], scaler=Scaler(1024.0)):
        (1024.0 * loss_of(model, samples([1, 2]))).backward()
    with run(data_id=[3, 4], scaler=Scaler(8.0), scale=2.0):
        (4.0 * loss_of(model, samples([3, 4]))).backward()
    assert_goes_on(run, model, before=[1, 2, 3, 4])


def test_sample_that_overflows_under_a_scaler_is_flagged_and_left_out(run: loghook.Run, model: Net) -> None:
    log(run, model, [0])
    log(run, model, [1, 2, 3], x=spoilt([1, 2, 3], 2, float("inf")), scaler=Scaler(1.0))
    log(run, model, [4], scaler=Scaler(1.0))
    query = ask(run, model)
    run.finalize()
    opened = assert_log(run.path, model, [0, 1, 3, 4])
    assert opened.flagged == [2]
    assert np.isfinite(opened.influence(query, "ekfac").values).all()


def test_batch_that_overflows_whole_under_a_scaler_is_flagged(run: loghook.Run, model: Net) -> None:
    log(run, model, [0])
    log(run, model, [1, 2], x=samples([1, 2]) * float("nan"), scaler=Scaler(1.0))
    assert_goes_on(run, model, before=[0])
    assert loghook.load(run.path).flagged == [1, 2]


# Runs that are there already


@pytest.mark.parametrize("end", ["finalize", "close"])
def test_existing_run_is_not_touched_without_resume_or_overwrite(
    path: Path, run: loghook.Run, model: Net, end: str
) -> None:
    log(run, model, [1, 2])
    getattr(run, end)()
    with refused(LogExistsError, path, "resume=True", "overwrite=True", "another path") as error:
        loghook.init(path)
    assert isinstance(error.value, FileExistsError)
    assert_log(path, model, [1, 2])


def test_resume_and_overwrite_together_are_refused(path: Path, finished: loghook.Query, model: Net) -> None:
    with refused(ConfigError, "resume=True", "overwrite=True", "keep one"):
        loghook.init(path, resume=True, overwrite=True)
    assert_log(path, model, range(6))


@pytest.mark.parametrize("arguments", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_path_that_is_a_file_is_refused(tmp_path: Path, arguments: dict[str, bool]) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with refused(LogExistsError, file, "is a file", "another path"):
        loghook.init(file, **arguments)
    assert file.read_text() == "mine"


def test_overwrite_leaves_the_files_of_others_alone(path: Path, finished: loghook.Query, model: Net) -> None:
    (path / "notes.txt").write_text("mine")
    with watched(path, model, overwrite=True) as run:
        assert_goes_on(run, model)
    assert (path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("change", [{"rank": 5}, {"seed": 1}, {"dtype": "float16"}, {"projection": "none"}], ids=str)
def test_resume_with_other_arguments_is_refused(path: Path, model: Net, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"projection": "random", "rank": 4}
    with watched(path, model, **arguments) as run:
        log(run, model, [1, 2])
    with loghook.init(path, resume=True, **(arguments | change)) as run, pytest.raises(MismatchError) as error:
        run.watch(model)
    assert not model.first._forward_hooks
    (name, value) = next(iter(change.items()))
    says(error, "cannot resume", name, repr(value), "first run")
    with watched(path, model, resume=True, **arguments) as run:
        log(run, model, [3, 4])
        run.finalize()
    assert loghook.load(path).data_ids == [1, 2, 3, 4] and loghook.load(path).verify() == []


def test_a_log_and_factors_do_not_share_a_folder(tmp_path: Path, path: Path, finished: loghook.Query) -> None:
    files, model = set(path.iterdir()), Net()
    for choice in ({}, {"resume": True}, {"overwrite": True}):
        with refused(LogExistsError, path, "holds a log", "another path"):
            loghook.fit(path, **choice)
    assert set(path.iterdir()) == files
    fit = loghook.fit(tmp_path / "factors")
    fit.watch(model)
    for _ in fit.passes():
        log(fit, model, [1, 2])
    opens = f"loghook.fit({str(fit.path)!r}, resume=True) opens"
    for choice in ({}, {"resume": True}, {"overwrite": True}):
        with refused(LogExistsError, "holds factors", opens, "another path"):
            loghook.init(fit.path, **choice)
    with refused(FileNotFoundError, "holds factors", opens, "no log"):
        loghook.load(fit.path)
    assert "finished" in repr(loghook.fit(fit.path, resume=True))


def test_a_file_of_another_kind_is_named(tmp_path: Path, path: Path, finished: loghook.Query) -> None:
    query, scores = tmp_path / "q.safetensors", tmp_path / "s.safetensors"
    finished.save(query)
    loghook.load(path).influence(finished, "dot").save(scores)
    shard = path / "rows-00000-00000.safetensors"
    for load, file, words in (
        (loghook.Scores.load, query, "a saved query: open it with loghook.Query.load"),
        (loghook.Query.load, scores, "saved scores: open them with loghook.Scores.load"),
        (loghook.Query.load, shard, "a part of a log: open its folder with loghook.load"),
        (loghook.Query.load, path, "is a folder, which loghook.load opens if it is a log: it is no query file"),
    ):
        with refused(ConfigError, file, words):
            load(file)
    with pytest.raises(FileNotFoundError, match="missing"):
        loghook.Query.load(tmp_path / "missing")
    for data in (b"nonsense", query.read_bytes()[:-1]):  # cut short: damaged, whatever it was
        query.write_bytes(data)
        with pytest.raises(CorruptLogError, match="no query file"):
            loghook.Query.load(query)


def test_load_of_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with refused(FileNotFoundError, tmp_path, "no loghook run", "check the path"):
        loghook.load(tmp_path)


# Questions


@pytest.mark.parametrize("change", [{"seed": 1}, {"rank": 3}, {"projection": "none"}], ids=str)
def test_question_from_another_projection_is_refused(tmp_path: Path, model: Net, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"projection": "random", "rank": 4}
    with watched(tmp_path / "log", model, **arguments) as run:
        log(run, model, [1, 2])
        run.finalize()
    with watched(tmp_path / "other", model, **(arguments | change)) as other:
        query = ask(other, model)
    with pytest.raises(MismatchError) as error:
        loghook.load(tmp_path / "log").influence(query, "dot")
    says(error, "another rank, projection, seed or kind of gradient", tmp_path / "log", "log.attach(model)")


def test_question_from_another_model_is_refused(tmp_path: Path, path: Path, finished: loghook.Query) -> None:
    other = Branched()
    with watched(tmp_path / "other", other) as run:
        query = ask(run, other)
    with refused(MismatchError, "other layers", "'expert'", path, "same model"):
        loghook.load(path).influence(query, "dot")


def test_attach_to_another_model_is_refused(path: Path, finished: loghook.Query, model: Net) -> None:
    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(8, 3)

    opened = loghook.load(path)
    with refused(MismatchError, "'first'", path):
        opened.attach(nn.Sequential(nn.Linear(WIDTH, 5)))
    wider = Wider()
    with refused(MismatchError, "'first'", "attach the model that was logged"):
        opened.attach(wider)
    assert not wider.first._forward_hooks  # a failed attach leaves nothing behind
    assert len(opened.influence(ask(opened.attach(model), model), "dot").values) == 2


def test_question_used_before_its_block_ended_is_refused(path: Path, finished: loghook.Query, model: Net) -> None:
    opened = loghook.load(path)
    asker = opened.attach(model)
    with asker.query(data_id=["q"]) as query:
        uses: list[Callable[[], Any]] = [
            lambda: query.matrix,
            lambda: query.rows("first"),
            lambda: opened.influence(query, "dot"),
            lambda: query + finished,
            lambda: finished + query,
            lambda: query.save(path / "query.safetensors"),
        ]
        for use in uses:
            with refused(StateError, "block has not ended", "after the `with`"):
                use()
        loss_of(model, samples(["q"])).backward()
    assert opened.influence(query, "dot").values.shape == (1, 6)


def test_question_without_its_with_is_refused(tmp_path: Path, path: Path, finished: loghook.Query, model: Net) -> None:
    opened, fit = loghook.load(path), loghook.fit(tmp_path / "factors")
    fit.watch(model)
    asked, scores = opened.attach(model).query(data_id=["q0", "q1"]), opened.influence(finished, "dot")
    uses: list[Callable[[], Any]] = [
        lambda: opened.influence(asked),
        lambda: fit.score(asked),
        lambda: fit.refine(asked, [], None, None),
        lambda: fit.unroll(asked, 1.0),
        lambda: fit.rerank(scores, asked, None, None),
    ]
    for use in uses:
        with refused(ConfigError, "is no query", "with run.query(data_id=...) as query:", "after the block"):
            use()


def test_what_is_there_is_shown(tmp_path: Path, path: Path, run: loghook.Run, model: Net) -> None:
    log(run, model, [1, 2])
    run.close()
    assert (
        repr(loghook.load(path))
        == f"Log({str(path)!r}, not finished: 2 rows so far, 2 layers, float32, whole gradients)"
    )
    question = make_finished(tmp_path / "whole", model)
    opened = loghook.load(tmp_path / "whole")
    assert opened.finished and "6 rows, finished, 2 layers" in repr(opened)
    assert repr(question) == "Query(2 questions, 53 values in 2 layers)"
    assert repr(question.with_rows(question.matrix, "cg, 2 iterations")).endswith("2 layers, cg, 2 iterations)")
    with opened.attach(model).query(data_id=[1]) as question:
        assert "no rows" in repr(question)
        loss_of(model, samples([1])).backward()
    fit = loghook.fit(tmp_path / "factors")
    assert repr(fit) == f"Fit({str(fit.path)!r}, 0 layers, fisher='empirical', passes done: none)"
    fit.watch(model)
    for current in fit.passes():
        assert "finished" not in repr(fit) and ("passes done: covariance" in repr(fit)) == (
            current.kind != "covariance"
        )
        log(fit, model, [1, 2])
    assert repr(fit) == f"Fit({str(fit.path)!r}, 2 layers, fisher='empirical', finished)"


def test_scoring_a_log_that_is_not_finished_warns_once_where_it_is_called(
    path: Path, run: loghook.Run, model: Net
) -> None:
    log(run, model, [1, 2])
    question = ask(run, model)
    run.close()
    for use in (lambda log: log.influence(question, "dot"), lambda log: log.self_influence("dot")):
        opened = loghook.load(path)
        assert not opened.finished
        with pytest.warns(UnfinishedWarning) as caught:
            use(opened), use(opened)
        assert len(caught) == 1 and caught[0].filename == __file__
        assert all(word in str(caught[0].message) for word in (str(path), "2 rows so far", "finalize", "resume=True"))


def test_offloaded_fsdp1_is_refused(path: Path) -> None:
    """By what its wrapper says of itself: nothing here computes on a GPU."""
    model = Net()
    model.cpu_offload, model.compute_device = SimpleNamespace(offload_params=True), torch.device("cuda", 0)
    with refused(UnsupportedError, "FSDP1 with offloaded parameters", "FSDP2"):
        loghook.init(path / "fsdp1").watch(model)


def test_blocks_do_not_nest_and_the_outer_one_goes_on(run: loghook.Run, model: Net) -> None:
    with run(data_id=[1, 2]):
        for inner in (lambda: run.query(data_id=["q"]), lambda: run(data_id=[3])):
            with refused(StateError, "open already", "do not nest"), inner():
                pass
        loss_of(model, samples([1, 2])).backward()
    assert_goes_on(run, model, before=[1, 2])


def test_logging_inside_a_question_is_refused(run: loghook.Run, model: Net) -> None:
    with run.query(data_id=["q"]) as query:
        with pytest.raises(StateError, match="do not nest"), run(data_id=[3]):
            pass
        loss_of(model, samples(["q"])).backward()
    assert query.rows("first").shape == (1, 5, 7)
    assert_goes_on(run, model)


# Logs that were damaged


def assert_caught(path: Path, query: loghook.Query, name: str, methods: Sequence[str] = ("dot", "ekfac")) -> None:
    """Opening, verifying and every use of what is damaged says so and names the file."""
    try:
        opened = loghook.load(path)
    except CorruptLogError as error:
        assert name in str(error) and "from a copy" in str(error), str(error)
        return
    problems = opened.verify()
    assert problems and all(name in line and "from a copy" in line for line in problems), problems
    uses: list[Callable[[loghook.Log], Any]] = [
        *((lambda log, method=method: log.influence(query, method)) for method in methods),
        *((lambda log, method=method: log.self_influence(method)) for method in methods),
    ]
    if "dot" in methods:
        uses += [
            lambda log: log.rows("first")[:],
            lambda log: np.asarray(log.rows("second")),
            lambda log: [row for i in range(len(log)) for row in log.rows("first")[i]],
            lambda log: log.rows("first")[[5, 3, 1]],
            lambda log: log.influence(query, "dot", top=1),
        ]
    for use in uses:
        with pytest.raises(CorruptLogError, match=name):
            use(loghook.load(path))
        with pytest.raises(CorruptLogError, match=name):  # also from a log that is open already, and again
            use(opened)


def flip(file: Path, position: int, bit: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= bit
    file.write_bytes(bytes(data))


def truncate(file: Path, size: int) -> None:
    with open(file, "r+b") as handle:
        handle.truncate(size)


SHARD = "rows-00000-00001.safetensors"
DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated by a byte": lambda shard: truncate(shard, shard.stat().st_size - 1),
    "truncated by half": lambda shard: truncate(shard, shard.stat().st_size // 2),
    "empty": lambda shard: truncate(shard, 0),
    "longer": lambda shard: shard.write_bytes(shard.read_bytes() + b"x"),
    "first byte altered": lambda shard: flip(shard, -2 * ROW_BYTES),
    "last byte altered": lambda shard: flip(shard, -1, 0x80),
    "header altered": lambda shard: flip(shard, 60),
    "header's padding altered": lambda shard: flip(shard, 500),
    "header's length altered": lambda shard: flip(shard, 0),
    "missing": lambda shard: shard.unlink(),
    "a folder": lambda shard: (shard.unlink(), shard.mkdir()),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_shard_is_never_read_as_good(
    path: Path, finished: loghook.Query, model: Net, damage: Callable[[Path], None]
) -> None:
    damage(path / SHARD)
    assert_caught(path, finished, SHARD)
    good = one_sample_gradients(model, loss_of, samples([0, 1]), ["first"])["first"]
    np.testing.assert_allclose(loghook.load(path).rows("first")[:2], good, rtol=1e-4, atol=1e-5)  # shard 0 still reads


def test_shard_of_another_run_is_never_read_as_good(tmp_path: Path, path: Path, finished: loghook.Query) -> None:
    make_finished(tmp_path / "other", Net())  # the same samples, even
    shutil.copy(tmp_path / "other" / SHARD, path / SHARD)
    assert_caught(path, finished, SHARD)


def test_shard_in_the_place_of_another_is_never_read_as_good(path: Path, finished: loghook.Query) -> None:
    shutil.copy(path / SHARD.replace("1.", "0."), path / SHARD)
    assert_caught(path, finished, SHARD)


def lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


COMMITS_DAMAGE: dict[str, Callable[[Path], Any]] = {
    "first byte altered": lambda file: flip(file, 0),
    "a byte of an id altered": lambda file: flip(file, file.read_bytes().index(b'"ids":[2,3]') + 7),
    "last byte altered": lambda file: flip(file, -1),
    "a line end in the middle": lambda file: flip(file, 50, file.read_bytes()[50] ^ 10),
    "last line missing": lambda file: file.write_bytes(b"".join(lines(file)[:-1])),
    "two last lines missing": lambda file: file.write_bytes(b"".join(lines(file)[:-2])),
    "first line missing": lambda file: file.write_bytes(b"".join(lines(file)[1:])),
    "middle line missing": lambda file: file.write_bytes(b"".join([lines(file)[0], *lines(file)[2:]])),
    "a line twice": lambda file: file.write_bytes(b"".join([lines(file)[0], *lines(file)])),
    "torn": lambda file: truncate(file, file.stat().st_size - 3),
    "empty": lambda file: truncate(file, 0),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", COMMITS_DAMAGE.values(), ids=COMMITS_DAMAGE.keys())
def test_damaged_commit_log_is_refused(path: Path, finished: loghook.Query, damage: Callable[[Path], Any]) -> None:
    damage(path / "commits-00000.jsonl")
    with refused(CorruptLogError, path, "commit", "from a copy"):
        loghook.load(path)


def test_commit_log_of_another_run_is_refused(tmp_path: Path, path: Path, finished: loghook.Query) -> None:
    make_finished(tmp_path / "other", Net())
    shutil.copy(tmp_path / "other" / "commits-00000.jsonl", path)
    with refused(CorruptLogError, "commits-00000.jsonl", "another run", "from a copy"):
        loghook.load(path)


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing", "replaced"])
def test_damaged_statistics_are_never_used(
    tmp_path: Path, path: Path, finished: loghook.Query, model: Net, damage: str
) -> None:
    (file,) = path.glob("statistics-*")
    if damage == "altered":
        flip(file, -3)
    elif damage == "truncated":
        truncate(file, file.stat().st_size - 8)
    elif damage == "missing":
        file.unlink()
    else:
        make_finished(tmp_path / "other", Net(seed=1))
        shutil.copy(tmp_path / "other" / file.name, file)
    assert_caught(path, finished, file.name, methods=("kfac", "ekfac"))
    opened = loghook.load(path)  # what needs no statistics still works
    assert opened.data_ids == list(range(6))
    assert opened.influence(finished, "dot").values.shape == (2, 6)


def alter_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    body = json.loads((path / "loghook.json").read_text())
    change(body)
    (path / "loghook.json").write_text(json.dumps(body, indent=1))


MANIFEST_DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format": lambda body: body.update(format="other"),
    "run_id": lambda body: body.update(run_id="0" * 32),
    "projection": lambda body: body.update(projection="random"),
    "seed": lambda body: body.update(seed="1"),
    "rank": lambda body: body.update(rank=3),
    "dtype to a wider one": lambda body: body.update(dtype="float64"),
    "dtype to a narrower one": lambda body: body.update(dtype="float16"),
    "dtype unknown": lambda body: body.update(dtype="complex"),
    "id_type": lambda body: body.update(id_type="str"),
    "on_repeat": lambda body: body.update(on_repeat="first"),
    "world_size": lambda body: body.update(world_size=2),
    "sealed removed": lambda body: body.update(sealed=None),
    "sealed rows": lambda body: body["sealed"].update(rows=3),
    "a layer's name": lambda body: body["layers"][0].update(name="second"),
    "a layer's k": lambda body: body["layers"][0].update(k_in=6),
    "layers swapped": lambda body: body["layers"].reverse(),
    "a layer removed": lambda body: body["layers"].pop(),
    "activations": lambda body: body["layers"][0].update(activations="mean"),
    "may_sleep": lambda body: body["layers"][0].update(may_sleep=True),
    "batch_dim": lambda body: body["layers"][0].update(batch_dim=1),
    "parameters": lambda body: body["parameters"].update(last="0" * 16),
    "coverage": lambda body: body["coverage"].update(total=10**9),
    "a field removed": lambda body: body.pop("rank"),
    "a field added": lambda body: body.update(extra=1),
}


@pytest.mark.parametrize("change", MANIFEST_DAMAGE.values(), ids=MANIFEST_DAMAGE.keys())
def test_altered_manifest_is_caught(path: Path, model: Net, change: Callable[[dict[str, Any]], Any]) -> None:
    with watched(path, model, seed=0) as run:  # an id twice, so that on_repeat matters
        log(run, model, [1, 2])
        log(run, model, [2, 1])
        query = ask(run, model)
        run.finalize()
    alter_manifest(path, change)
    try:
        opened = loghook.load(path)
    except CorruptLogError as error:
        assert str(path) in str(error) and "from a copy" in str(error), str(error)
        return
    assert opened.verify(), "an altered manifest is neither refused nor reported"
    with pytest.raises(CorruptLogError):
        opened.rows("first")[:]
    with pytest.raises(CorruptLogError):
        opened.influence(query, "dot")


@pytest.mark.parametrize("damage", ["truncated", "empty", "not json", "a list", "not utf-8"])
def test_manifest_that_is_no_manifest_is_refused(path: Path, finished: loghook.Query, damage: str) -> None:
    file = path / "loghook.json"
    good = file.read_bytes()
    bad = {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "not json": b"loghook",
        "a list": b"[1]",
        "not utf-8": b"\xff",
    }
    file.write_bytes(bad[damage])
    with refused(CorruptLogError, file, "not a valid manifest", "from a copy"):
        loghook.load(path)


@pytest.mark.parametrize("version", [1, 2, 99])
@pytest.mark.parametrize("opener", [loghook.load, lambda path: loghook.init(path, resume=True)], ids=["load", "resume"])
def test_other_versions_of_the_format_are_refused(
    path: Path, finished: loghook.Query, opener: Callable[[Path], Any], version: int
) -> None:
    before = (path / "loghook.json").read_text()
    alter_manifest(path, lambda body: body.update(version=version, unheard_of=1))
    with pytest.raises(VersionError) as error:
        opener(path)
    says(error, "loghook.json", f"version {version}", "reads version 3", "upgrade loghook", "log the data again")
    (path / "loghook.json").write_text(before)
    assert loghook.load(path).verify() == []


@pytest.mark.parametrize("damage", ["commits", "shard", "statistics"])
def test_resume_of_a_damaged_run_is_refused(path: Path, run: loghook.Run, model: Net, damage: str) -> None:
    log(run, model, [1, 2])
    run.close()
    file = next(path.glob({"commits": "commits-*", "shard": "rows-*", "statistics": "statistics-*"}[damage]))
    if damage == "shard":
        truncate(file, file.stat().st_size - 1)
    else:
        flip(file, 60)
    before = file.read_bytes()
    with refused(CorruptLogError, file.name, "from a copy"), watched(path, model, resume=True) as resumed:
        log(resumed, model, [3, 4])
    assert file.read_bytes() == before


# The order of calls


def test_after_finalize_logging_and_watching_are_refused_and_questions_work(run: loghook.Run, model: Net) -> None:
    log(run, model, [1, 2])
    run.finalize()
    run.finalize()  # harmless
    with refused(StateError, "finalised", "another run", "run.query"):
        log(run, model, [3, 4])
    with refused(StateError, "finalised", "another run"):
        run.watch(Net())
    query = ask(run, model)
    assert assert_log(run.path, model, [1, 2]).influence(query).values.shape == (2, 2)


def test_watch_after_the_first_block_is_refused(run: loghook.Run, model: Net) -> None:
    log(run, model, [1, 2])
    with refused(StateError, "fixed set of layers", "before the first block"):
        run.watch(Branched())
    assert_goes_on(run, model, before=[1, 2])


def test_watching_the_same_model_twice_is_refused(run: loghook.Run, model: Net) -> None:
    for again in (model, torch.compile(model, backend="eager")):
        with refused(StateError, "watched already", "several patterns"):
            run.watch(again, include="second")
    assert_goes_on(run, model)


def test_two_models_are_watched_and_attached_as_parts_of_one(run: loghook.Run, model: Net, path: Path) -> None:
    other = Branched()
    with refused(StateError, "watched already", "nn.ModuleDict({'a': a, 'b': b})"):
        run.watch(other)
    assert not other.first._forward_hooks
    assert_goes_on(run, model)

    both = nn.ModuleDict({"a": Net(seed=1), "b": Net(seed=2)})
    run = loghook.init(path, rank=7, overwrite=True)
    run.watch(both)
    x = samples([1, 2])
    with run(data_id=[1, 2]):
        (both["a"](x).square().sum() + both["b"](x).square().sum()).backward()
    run.finalize()
    run.close()
    log = loghook.load(path)
    with log.attach(both) as asker:
        with asker.query(data_id=[1]) as query:
            (both["a"](x[:1]).square().sum() + both["b"](x[:1]).square().sum()).backward()
    for layer, columns in log.layout.kinds["gradients"].items():
        assert torch.allclose(query.matrix[0, columns], torch.tensor(log.rows(layer)[0]).flatten(), atol=1e-5), layer


@pytest.mark.parametrize("thing", [nn.Linear, "model", None])
def test_watching_what_is_no_module_is_refused(path: Path, model: Net, thing: Any) -> None:
    run = loghook.init(path, projection="none")
    with refused(ConfigError, "nn.Module", type(thing).__name__, "pass the model itself"):
        run.watch(thing)
    run.watch(model)
    assert_goes_on(run, model)


def test_block_before_watch_is_refused(path: Path, model: Net) -> None:
    run = loghook.init(path, projection="none")
    uses: list[Callable[[], Any]] = [lambda: log(run, model, [1]), lambda: ask(run, model), lambda: list(run.passes())]
    for use in uses:
        with refused(StateError, "nothing is watched yet", "run.watch(model)"):
            use()
    run.watch(model)
    assert_goes_on(run, model)


def test_finalize_without_any_block_is_refused(run: loghook.Run, model: Net) -> None:
    with refused(StateError, "nothing was logged", "with run(...)"):
        run.finalize()
    assert_goes_on(run, model)


def test_after_close_logging_and_questions_are_refused_and_resume_works(
    path: Path, run: loghook.Run, model: Net
) -> None:
    log(run, model, [1, 2])
    run.close()
    run.close()
    assert not model.first._forward_hooks
    for use in (log, lambda run, model, _: ask(run, model)):
        with refused(StateError, "closed", "loghook.init"):
            use(run, model, [3, 4])
    with watched(path, model, resume=True) as resumed:
        assert_goes_on(resumed, model, before=[1, 2])


def test_finalize_after_close_does_not_pretend_that_the_run_is_sealed(path: Path, run: loghook.Run, model: Net) -> None:
    log(run, model, [1, 2])
    run.close()
    try:
        run.finalize()
    except StateError as error:
        assert "closed" in str(error) and "resume=True" in str(error)
    else:
        assert loghook.load(path).manifest.sealed is not None
    assert_log(path, model, [1, 2])


# Refused by name


def test_data_parallel_is_refused(path: Path, model: Net) -> None:
    run = loghook.init(path, projection="none")
    for wrapped in (nn.DataParallel(model), nn.Sequential(nn.DataParallel(model))):
        with refused(UnsupportedError, "nn.DataParallel", "DistributedDataParallel", "model.module"):
            run.watch(wrapped)
    run.watch(model)
    assert_goes_on(run, model)


class Normed(Net):
    """A Net with a batch norm between its layers."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x).transpose(1, 2)).transpose(1, 2))


def test_batch_norm_is_refused_in_training_mode_and_fine_in_eval_mode(path: Path) -> None:
    model = Normed()
    with watched(path, model) as run:
        for use in (log, lambda run, model, _: ask(run, model)):
            with refused(UnsupportedError, "BatchNorm1d", "'norm'", "training mode", "eval()", "LayerNorm"):
                use(run, model, [1, 2])
        model.eval()
        assert_goes_on(run, model)


def test_batch_norm_without_running_statistics_mixes_samples_in_eval_mode_too(path: Path) -> None:
    model = Normed(track_running_stats=False).eval()
    with watched(path, model) as run, pytest.raises(UnsupportedError) as error:
        log(run, model, [1, 2])
    says(error, "BatchNorm1d", "'norm'", "mixes the samples")


class Embedded(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 4, **arguments), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def test_embedding_that_scales_by_frequency_is_refused_where_it_is_watched(path: Path) -> None:
    model = Embedded(scale_grad_by_freq=True)
    run = loghook.init(path, projection="none")
    with pytest.raises(UnsupportedError) as error:
        run.watch(model, include=["*", "embedding"])
    says(error, "scale_grad_by_freq=True", "gradient per sample does not exist", "exclude the embedding")
    run.watch(model)
    assert run.layers == ("head",)
    with run(data_id=[1, 2]):
        loss_of(model, torch.tensor([[1, 2, 2], [2, 3, 4]])).backward()
    run.finalize()
    assert loghook.load(path).data_ids == [1, 2]


def test_input_whose_first_axis_is_not_the_batch_is_refused(path: Path, model: Net) -> None:
    with watched(path, model) as run:
        with pytest.raises(BatchError) as error:
            log(run, model, [1, 2], x=samples([1, 2]).transpose(0, 1))
        says(
            error,
            "'second'",
            (TOKENS, 2, 5),
            "its first axis must be the batch",
            "batch_dim=1",
            "exclude the layer",
        )
        assert_goes_on(run, model)


def test_sequence_first_input_is_fine_with_batch_dim(path: Path, model: Net) -> None:
    with watched(path, model, watch={"batch_dim": 1}) as run:
        log(run, model, [1, 2], x=samples([1, 2]).transpose(0, 1))
        run.finalize()
    assert_log(path, model, [1, 2])


@contextlib.contextmanager
def process_group(world: int = 1) -> Iterator[None]:
    """One process as a group of its own, or as the first of several, where nobody hears what it says to the others."""
    from torch import distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    backend, store = ("gloo", dist.HashStore()) if world == 1 else ("fake", FakeStore())
    dist.init_process_group(backend, store=store, rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def flattened(mesh: Any) -> Any:
    """Data and context parallelism on one axis, as accelerate's and torchtitan's FSDP shards over both."""
    return mesh["dp_shard", "cp"]._flatten("dp_shard_cp")


# Shape, names, and the part of the mesh that parameters are sharded over. No two parts are alike: of equal meshes torch
# may take one for the other.
MESHES = {
    "context parallel": ((2, 2), ("dp_shard", "cp"), flattened),
    "context parallel alone": ((1, 2), ("dp_shard", "cp"), flattened),
    "context parallel of one": ((3, 1), ("dp_shard", "cp"), flattened),
    "tensor parallel in the root": ((2, 2), ("dp", "tp"), lambda mesh: mesh["dp"]),
    "tensor parallel of one": ((2, 1), ("dp", "tp"), lambda mesh: mesh["dp"]),
    "pipeline of two": ((2, 2), ("pp", "fsdp"), lambda mesh: mesh["fsdp"]),
    "pipeline of one": ((1, 3, 1), ("pp", "fsdp", "tp"), lambda mesh: mesh["fsdp"]),
    "hybrid": ((2, 2), ("dp_replicate", "dp_shard"), lambda mesh: mesh),
    "experts": ((1, 2), ("efsdp", "ep"), lambda mesh: mesh),
    "without names": ((2,), None, lambda mesh: mesh),
}
SPLIT = {  # what is said of those that split samples or layers
    "context parallel": "('cp',)",
    "context parallel alone": "('cp',)",
    "tensor parallel in the root": "('tp',)",
    "pipeline of two": "('pp',)",
}


@pytest.mark.parametrize("name", MESHES)
def test_meshes_that_split_samples_or_layers_are_refused_and_others_pass(path: Path, name: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shape, names, shards = MESHES[name]
    with process_group(torch.Size(shape).numel()):
        model = Net()
        fully_shard(model, mesh=shards(init_device_mesh("cpu", shape, mesh_dim_names=names)))
        run = loghook.init(path, projection="none")
        if name not in SPLIT:
            return run.watch(model)
        with refused(UnsupportedError, "'first.weight'", "context", SPLIT[name], "partial", "DDP or FSDP"):
            run.watch(model)


def tensor_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})


def test_tensor_parallel_model_is_refused(path: Path, model: Net) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    with process_group():
        split = tensor_parallel(Net(), init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
        run = loghook.init(path, projection="none")
        with refused(UnsupportedError, "'first.weight'", "tensor", "('tp',)", "partial", "DDP or FSDP"):
            run.watch(split)
        run.watch(model)
        assert_goes_on(run, model)


def test_what_becomes_parallel_after_watch_is_refused_in_the_first_block(path: Path, model: Net) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with process_group(2), watched(path, model) as run:
        fully_shard(model, mesh=flattened(init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "cp"))))
        with refused(UnsupportedError, "'first.weight'", "('cp',)", "partial", "DDP or FSDP"):
            log(run, model, [1, 2])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(
    "names,when", [(("tp",), "after"), (("data", "model"), "after"), (("data", "model"), "before")]
)
def test_tensor_parallelism_that_no_name_tells_is_refused_where_a_layer_runs(
    path: Path, model: Net, names: tuple[str, ...], when: str, rank: int | None, compiled: bool
) -> None:
    """After watch(), or before it on a mesh with names of one's own, under FSDP; of one rank here."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with process_group():
        run = loghook.init(path, **({"projection": "none"} if rank is None else {"rank": rank}))
        if when == "after":
            run.watch(model)
        mesh = init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)
        tensor_parallel(model, mesh[names[-1]])
        if len(names) > 1:
            fully_shard(model, mesh=mesh[names[0]])
        if when == "before":
            run.watch(model)
        with refused(UnsupportedError, "'first'", "DTensor", "tensor", "partial", "DDP or FSDP"):
            log(run, torch.compile(model, backend="aot_eager") if compiled else model, [1, 2])
        run.close()


def test_a_part_of_a_model_that_is_sharded_as_a_whole_is_no_tensor_parallelism(path: Path, model: Net) -> None:
    """Seen from the part, nothing tells FSDP's shards from those of tensor parallelism before its layers run."""
    from torch.distributed.fsdp import fully_shard

    with process_group(), watched(path, model) as run:
        log(run, fully_shard(nn.Sequential(model)), [1, 2])
        run.finalize()
    assert_log(path, Net(), [1, 2])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(WIDTH, 2, batch_first=True), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_out_proj_of_multihead_attention_is_left_out_and_reported(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Attending()
    run = loghook.init(path, projection="none")
    with pytest.raises(ConfigError):
        run.watch(model, include="*out_proj")
    run.watch(model)
    printed = capsys.readouterr().out
    assert "attention.out_proj" in printed and "not covered" in printed and "nn.MultiheadAttention" in printed
    assert run.layers == ("head",)
    assert_goes_on(run, model)
    left_out = {item["name"]: item for item in loghook.load(path).manifest.coverage["not_covered"]}
    assert left_out["attention.out_proj"]["parameters"] == WIDTH * (WIDTH + 1)


# The disk and other processes


def fill_disk_after(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """From now on, only so many bytes fit: a write that crosses the line comes back short, the next one fails."""
    real, left = os.pwrite, room

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(descriptor, data[:left], offset)
        left -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)


def wait_for_rows(path: Path, rows: int) -> None:
    """Until the writer's thread has committed so many."""
    for _ in range(1000):
        if (path / "commits-00000.jsonl").exists() and len(loghook.load(path)) == rows:
            return
        time.sleep(0.01)
    raise AssertionError(f"{rows} rows were not committed within 10 s")


# The disk fills up in the rows of the next batch, in its record, and in the header of a shard at its end or beginning.
@pytest.mark.parametrize("room", [0, 100, 600, 1000, 1500, 2500])
def test_full_disk_is_an_error_that_loses_nothing_committed(
    path: Path, model: Net, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [[start, start + 1] for start in range(0, 40, 2)]
    run = watched(path, model, commit_seconds=1e-3, shard_bytes=4 * ROW_BYTES)
    with pytest.raises(WriteError) as error:
        for _ in run.passes():
            for number, batch in enumerate(batches):
                if number == 3:
                    wait_for_rows(path, 6)
                    fill_disk_after(monkeypatch, room)
                log(run, model, batch)
        run.finalize()
    says(error, path, "No space left on device", "committed is intact", "Make room", "resume=True")
    assert isinstance(error.value, OSError)
    with pytest.raises(WriteError):
        run.close()
    monkeypatch.undo()
    committed = loghook.load(path).data_ids
    assert len(committed) >= 6 and committed == list(range(len(committed)))
    assert_log(path, model, committed)
    with watched(path, model, resume=True, shard_bytes=4 * ROW_BYTES) as resumed:
        for _ in resumed.passes():
            for batch in batches:
                log(resumed, model, batch)
        resumed.finalize()
    assert_log(path, model, range(40))


@pytest.mark.parametrize("known", [True, False])
def test_macos_is_asked_to_empty_the_disks_cache(path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """There fsync leaves it full; network file systems, which do not know the call, get an fsync."""
    asked, synced = [], []

    def control(descriptor: int, command: int) -> None:
        asked.append(command)
        if not known:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(disk.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(disk.fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", synced.append)
    disk.write_atomically(path.with_name("file"), b"data")  # the file, and its folder
    assert asked == [51, 51] and len(synced) == (0 if known else 2)


def test_full_disk_at_the_first_block_is_a_write_error(
    path: Path, run: loghook.Run, model: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with refused(WriteError, path, "No space left on device"):
        log(run, model, [1, 2])
        run.finalize()
    monkeypatch.undo()
    run.close()
    with watched(path, model, resume=True) as resumed:
        assert_goes_on(resumed, model)


def test_folder_that_disappears_is_a_write_error(path: Path, model: Net) -> None:
    run = watched(path, model, commit_seconds=1e-3)
    log(run, model, [1, 2])
    wait_for_rows(path, 2)
    shutil.rmtree(path)
    with refused(WriteError, path, "was deleted, or replaced", "log again"):
        for start in range(3, 100):
            log(run, model, [start])
        run.finalize()
    with pytest.raises(WriteError):
        run.close()


def test_file_size_limit_is_an_error_that_loses_nothing_committed(path: Path, model: Net) -> None:
    """The real thing, in a process of its own: the kernel refuses to make files larger than 4 KB."""
    program = """
        import resource, signal, sys
        from pathlib import Path
        from tests.test_errors import Net, log, watched
        from loghook.errors import WriteError

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        model, path = Net(), Path(sys.argv[1])
        run = watched(path, model, commit_seconds=1e-6)
        log(run, model, [0, 1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            for start in range(2, 60, 2):
                log(run, model, [start, start + 1])
            run.finalize()
        except WriteError as error:
            print(error)
            sys.exit(7)
    """
    done = python(program, path)
    assert done.returncode == 7, done.stderr
    assert "File too large" in done.stdout and "resume=True" in done.stdout
    committed = loghook.load(path).data_ids
    assert 0 < len(committed) < 60 and committed == list(range(len(committed)))
    assert_log(path, model, committed)
    with watched(path, model, resume=True, on_repeat="first") as resumed:
        for start in range(0, 60, 2):
            log(resumed, model, [start, start + 1])
        resumed.finalize()
    assert_log(path, model, range(60))


def python(program: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        cwd=root, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_second_writer_is_refused_by_process_and_host(path: Path, run: loghook.Run, model: Net) -> None:
    log(run, model, [1, 2])
    with refused(LogLockedError, path, "this process", "run.close()"), watched(path, model, resume=True) as second:
        log(second, model, [3, 4])
    (path / "lock-00000").write_text('{"process": 123456, "host": "elsewhere"}')
    with pytest.raises(LogLockedError) as error, watched(path, model, resume=True) as second:
        log(second, model, [3, 4])
    says(error, path, "123456", "elsewhere", "wait until it ends", "another path")
    (path / "lock-00000").write_text('{"pro')  # as while it is being written
    with pytest.raises(LogLockedError) as error, watched(path, model, resume=True) as second:
        log(second, model, [3, 4])
    says(error, path, "an unknown process", "wait until it ends")
    assert_goes_on(run, model, before=[1, 2])


def test_second_writer_that_opened_the_folder_while_it_was_empty_spoils_nothing(
    path: Path, run: loghook.Run, model: Net
) -> None:
    second = watched(path, model, seed=1)
    log(run, model, [1, 2])
    manifest = (path / "loghook.json").read_bytes()
    with refused((LogLockedError, LogExistsError), path):
        log(second, model, [3, 4])
    assert (path / "loghook.json").read_bytes() == manifest, (
        "the loser replaced the manifest of the run that is going on"
    )
    assert_goes_on(run, model, before=[1, 2])


def test_overwrite_of_a_run_that_is_being_written_is_refused(path: Path, run: loghook.Run, model: Net) -> None:
    log(run, model, [1, 2])
    with refused(LogLockedError, path, "this process"), watched(path, model, overwrite=True) as second:
        log(second, model, [3, 4])
    assert_goes_on(run, model, before=[1, 2])


def test_lock_of_another_process_is_respected_and_dies_with_it(path: Path, run: loghook.Run, model: Net) -> None:
    log(run, model, [1, 2])
    run.close()
    program = """
        import fcntl, json, os, socket, sys, time
        lock = open(sys.argv[1], "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        lock.flush()
        print("locked", flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(path / "lock-00000")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "locked\n"
            with pytest.raises(LogLockedError) as error, watched(path, model, resume=True) as second:
                log(second, model, [3, 4])
            says(error, path, other.pid, socket.gethostname())
        finally:
            other.send_signal(signal.SIGKILL)
    with watched(path, model, resume=True) as resumed:
        assert_goes_on(resumed, model, before=[1, 2])


# Arguments of scoring


def test_unknown_layer_of_many_is_refused_with_a_short_list(tmp_path: Path) -> None:
    deep = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(40)))
    query = make_finished(tmp_path / "deep", deep)
    for ask_for in (["foo"], []):
        with refused(ConfigError, "*") as error:
            loghook.load(tmp_path / "deep").influence(query, "dot", layers=ask_for)
        assert len(str(error.value)) < 120


@pytest.mark.parametrize("name", ["damping", "damping_abs"])
@pytest.mark.parametrize("value", [0, 0.0, -0.1, float("nan"), float("inf")])
def test_damping_that_is_not_positive_is_refused(path: Path, finished: loghook.Query, name: str, value: float) -> None:
    opened = loghook.load(path)
    uses: list[Callable[[], Any]] = [
        lambda: opened.influence(finished, "ekfac", **{name: value}),
        lambda: opened.self_influence("fisher", **{name: value}),
    ]
    for use in uses:
        with refused(ConfigError, f"{name}={value!r}", "positive, finite number", "0.1"):
            use()


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"method": "tracin"}, ("method='tracin'", "dot", "cosine", "fisher", "kfac", "ekfac")),
        ({"normalize": "l2"}, ("normalize='l2'", "None", "'unit'", "'relatif'")),
        ({"layers": ["third"]}, ("'third'", "first, second")),
        ({"layers": "first."}, ("'first.'", "first, second")),
        ({"layers": []}, ("layers=[]", "first, second")),
        ({"top": 0}, ("top=0", "at least 1", "None")),
        ({"top": -1}, ("top=-1", "at least 1")),
        ({"top": 2.5}, ("top=2.5", "whole number")),
        ({"top": 2, "per_layer": True}, ("top and per_layer exclude each other", "drop one")),
    ],
    ids=str,
)
def test_unknown_argument_of_influence_is_refused(
    path: Path, finished: loghook.Query, arguments: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    with refused(ConfigError, *fragments):
        loghook.load(path).influence(finished, **arguments)


def test_unknown_layer_or_kind_of_rows_is_refused(path: Path, finished: loghook.Query) -> None:
    for rows in (loghook.load(path).rows, finished.rows):
        with refused(ConfigError, "'third'", "first, second"):
            rows("third")
        with refused(ConfigError, "kind='hessians'", "gradients", "activations", "output_gradients"):
            rows("first", kind="hessians")
        with refused(ConfigError, "'first'", "without activations", "watch(..., activations='mean')"):
            rows("first", kind="activations")


def test_opponents_of_scores_that_keep_only_the_best_are_refused(path: Path, finished: loghook.Query) -> None:
    scores = loghook.load(path).influence(finished, "dot", top=2)
    with refused(ConfigError, "top=...", "score again without top"):
        scores.bottom(1)
    with pytest.raises(ConfigError, match="k=0"):
        scores.top(0)


def test_log_without_rows_yet_is_refused_for_scoring(path: Path, run: loghook.Run, model: Net) -> None:
    with pytest.raises(NotFiniteError):
        log(run, model, [1], x=samples([1]) * float("nan"))
    with refused(ConfigError, path, "holds no rows yet", "come to finalize()"):
        loghook.load(path).influence(ask(run, model), "dot")


# The import


def test_importing_loghook_imports_no_heavy_optional_package() -> None:
    program = """
        import sys
        import loghook
        names = ("transformers", "datasets", "pandas", "faiss", "matplotlib", "plotly", "peft", "scipy", "sklearn")
        print([name for name in names if name in sys.modules])
    """
    done = python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", ["/proc/loghook-run", "/sys/loghook-run"])
def test_a_folder_that_cannot_be_written_is_a_clear_error(path):
    with pytest.raises(loghook.errors.WriteError) as caught:
        loghook.init(path, rank=2)
    assert path in str(caught.value) and "Make room or mend the folder" in str(caught.value)


def test_a_folder_that_becomes_read_only_keeps_what_was_committed(tmp_path, monkeypatch):
    """As root no permission bit stops a write, so the system's answer is put in its place."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    run = loghook.init(tmp_path / "run", rank=2, commit_seconds=1e-3, shard_bytes=1)
    run.watch(model)
    with run(data_id=[0]):
        model(torch.randn(1, 3)).sum().backward()
    deadline = time.monotonic() + 20
    while len(loghook.load(tmp_path / "run")) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)

    def refuse(*arguments, **keywords):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(loghook.errors.WriteError, match="Read-only file system"):
        with run(data_id=[1]):
            model(torch.randn(1, 3)).sum().backward()
        run.finalize()
    monkeypatch.undo()
    loghook.log.disk.lock(tmp_path / "run" / "lock-00000").close()  # others may write
    log = loghook.load(tmp_path / "run")
    assert log.data_ids == [0] and not log.verify()


@pytest.mark.parametrize("path", [b"/runs", None, ""])
def test_a_path_that_names_no_folder(path):
    with pytest.raises(ConfigError, match="names no folder"):
        loghook.init(path)


def test_layers_that_got_no_batch_are_named_as_patterns(path: Path) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(3, 4), "fc2": nn.Linear(4, 3)}) for _ in "ab")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.flatten(0, 1)
            for block in self.blocks:
                flat = block["fc2"](block["fc1"](flat).relu())
            return flat.view_as(x)

    model = Routed()
    run = loghook.init(path, rank=2)
    run.watch(model)
    with pytest.raises(BatchError) as error, run(data_id=[0, 1]):
        model(torch.randn(2, 5, 3)).sum().backward()
    says(error, "10 samples, 2 ids", "There are 4 such layers: blocks.*.fc1, blocks.*.fc2.")
    with pytest.raises(BatchError) as error, run(data_id=[0, 1]):
        model.blocks[1]["fc2"](torch.randn(3, 4)).sum().backward()
    assert "such layers" not in str(error.value)


def test_layers_that_delivered_nothing_are_named_as_patterns(path: Path) -> None:
    model = nn.Sequential(*(nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)}) for _ in "ab"))
    run = loghook.init(path, rank=2)
    run.watch(model)
    with pytest.raises(DeliveryError) as error, run(data_id=[0, 1]):
        model[1]["used"](model[0]["used"](torch.randn(2, 3))).sum().backward()
    says(error, "2 of 4 watched layers", "0.idle, 1.idle", "exclude=['*lm_head', '*.idle']", "in place of the default")
    with refused(DeliveryError, "1 of 4 watched layers", "exclude=['*lm_head', '1.idle']"), run(data_id=[0, 1]):
        model[0]["idle"](model[1]["used"](model[0]["used"](torch.randn(2, 3)))).sum().backward()


def test_a_save_that_fails_leaves_nothing_behind(
    path: Path, finished: loghook.Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = loghook.load(path).influence(finished, "dot")

    def full(file: Path, data: bytes) -> None:
        with open(file, "wb") as handle:
            handle.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(path.parent.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        for save in (scores.save, finished.save):
            with refused(WriteError, path.parent / "saved", "No space left on device", "Make room", "save again"):
                save(path.parent / "saved")
        loghook.load(path).self_influence("dot")  # which would be kept, and is not
    assert sorted(path.parent.rglob("*")) == before


def test_dropout_where_nothing_is_trained_is_told_once(path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2), nn.Dropout(0.0))
    with loghook.init(path, rank=2) as run:
        run.watch(model)
        for frozen, training, told in ((True, True, 1), (True, False, 0), (False, True, 0)):
            model.train(training)
            with (
                warnings.catch_warnings(record=True) as met,
                loghook.frozen(model) if frozen else contextlib.nullcontext(),
            ):
                warnings.simplefilter("always")
                for _ in run.passes() if told else (0,):
                    for i in range(2):
                        with run(data_id=[f"{frozen}{training}{i}"]):
                            model(torch.randn(1, 4)).sum().backward()
            assert ["dropout is on ('1')" in str(w.message) for w in met] == [True] * told
