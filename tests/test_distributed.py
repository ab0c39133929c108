"""The same rows on two gloo ranks as in one process: wrappers, sharding, samplers that repeat."""

import contextlib
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import loghook

SAMPLES, BATCH = 14, 4  # two ranks of 4: the last round is filled up with the first samples again


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return x + self.down(torch.relu_(self.up(x)))


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), Block(), Block(), nn.Linear(12, 5, bias=False))


def make_data():
    torch.manual_seed(1)
    return torch.randn(SAMPLES, 3, 8)


def loss_of(model, x):
    return model(x).pow(2).sum()


def batches(rank, world):
    """What a distributed sampler with even batches gives one rank: the shortfall is filled from the front."""
    order = list(range(SAMPLES))
    order += order[: -len(order) % (BATCH * world)]
    mine = order[rank::world]
    return [mine[k : k + BATCH] for k in range(0, len(mine), BATCH)]


def log_pass(run, model, data, rank, world, *, frozen=False, train=False):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0) if train else None
    for _ in run.passes():
        for ids in batches(rank, world):
            with run(data_id=ids):
                loss_of(model, data[ids]).backward()
            if optimizer:
                optimizer.step()
                optimizer.zero_grad()
    run.finalize()
    run.close()


def ddp(model):
    return DistributedDataParallel(model)


def fsdp1(model, original=True, policy=None):
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.FULL_SHARD, auto_wrap_policy=policy,
        use_orig_params=original,
    )  # fmt: skip


def fsdp2(model, leaves=True, **options):
    mesh = init_device_mesh("cpu", (2,))
    for module in model if leaves else ():
        fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def hsdp(model):
    """Two replicas, on a mesh that has a dimension for tensor parallelism, of one."""
    mesh = init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    return fully_shard(model, mesh=mesh["dp_replicate", "dp_shard"])


def replicated(model):
    """DDP by hooks, without a wrapper."""
    return replicate(model)


def replicated_by_fsdp(model):
    """The same made of FSDP2's parts, of whole parameters."""
    from torch.distributed._composable.replicate_with_fsdp import replicate

    for module in model:
        replicate(module)
    return replicate(model)


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    return model


def compiled(model):
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    return model


WRAPPERS = {
    "ddp": ddp,
    "replicate": replicated,
    "replicate_fsdp": replicated_by_fsdp,
    "fsdp1": fsdp1,
    "fsdp1_flat_blocks": lambda m: fsdp1(m, original=False, policy=ModuleWrapPolicy({Block})),
    "fsdp2_root": lambda m: fsdp2(m, leaves=False),
    "fsdp2_leaves": fsdp2,
    "fsdp2_hybrid": hsdp,
    "fsdp2_offload": lambda m: fsdp2(m, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "fsdp2_checkpoint_compile": lambda m: compiled(fsdp2(checkpointed(m))),
}
BFLOAT16 = {
    "fsdp2_bf16": lambda m: fsdp2(m, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
}
WATCH_FIRST = ("ddp", "replicate_fsdp", "fsdp2_leaves", "fsdp2_checkpoint_compile")


def worker(rank, world, folder):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    data = make_data()
    for name, wrap in (WRAPPERS | BFLOAT16).items():
        for first in (False, True) if name in WATCH_FIRST else (False,):
            model = make_model()
            run = loghook.init(f"{folder}/{name}-{first}", rank=6, dtype="float32")
            if first:
                run.watch(model)
            wrapped = wrap(model)
            if not first:
                run.watch(wrapped)
            log_pass(run, wrapped, data, rank, world, train=not name.startswith("fsdp1"))
        report = loghook.check(wrap(make_model()), loss_of, data[BATCH * rank : BATCH * rank + BATCH])
        Path(folder, f"check-{name}-{rank}").write_text("\n".join(report.problems))
    mixing = lambda model, x: loss_of(model, x) + model(x).sum().pow(2) * (rank == 0)  # noqa: E731
    report = loghook.check(ddp(make_model()), mixing, data[BATCH * rank : BATCH * rank + BATCH])
    Path(folder, f"mixing-{rank}").write_text("\n".join(report.problems))
    for name in ("ddp", "fsdp2_leaves", "fsdp2_checkpoint_compile"):
        train(f"{folder}/train_{name}", WRAPPERS[name](make_model()), data, rank, world)
    no_sync(f"{folder}/no_sync", ddp(make_model()), data, rank, world)
    for _ in range(3):  # at once after finalize(), when other ranks are about to let go
        run = loghook.init(f"{folder}/again", rank=6, overwrite=True)
        run.watch(model := ddp(make_model()))
        with run(data_id=[rank]):
            loss_of(model, data[:1]).backward()
        run.finalize()
    for name, (wrap, look) in LOOKS.items():
        mine = data[BATCH * rank : BATCH * rank + BATCH]
        plain, looked = losses(wrap(make_model()), mine), losses(wrap(make_model()), mine, look)
        Path(folder, f"looked-{name}-{rank}").write_text(looked if isinstance(looked, str) else str(looked == plain))
    dist.barrier()
    dist.destroy_process_group()


def frozen_pass(model, x, step):
    if step == 0:
        with loghook.frozen(model):
            loss_of(model, x.clone().requires_grad_()).backward()


def frozen_in_mid_step(model, x, step):
    if step == 1.5:
        with loghook.frozen(model):
            loss_of(model, x.clone().requires_grad_()).backward()


def check_in_mid_step(model, x, step):
    if step == 1.5:
        loghook.check(model, loss_of, x)


def check_while_gradients_wait(model, x, step):
    if step == 1:
        with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(False)
            loss_of(model, x).backward()
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(True)
        loghook.check(model, loss_of, x)


def losses(model, x, look=lambda *_: None):
    """Those of a few steps, with a look at the model in between; or why it was refused."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for step in range(4):
        try:
            look(model, x, step)
            loss = loss_of(model, x)
            loss.backward()
            look(model, x, step + 0.5)
        except loghook.errors.UnsupportedError as error:
            return str(error)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


LOOKS = {
    "ddp": (ddp, frozen_pass),
    "ddp static": (lambda m: DistributedDataParallel(m, static_graph=True), frozen_pass),
    "ddp static, later": (lambda m: DistributedDataParallel(m, static_graph=True), frozen_in_mid_step),
    "fsdp1": (fsdp1, frozen_pass),
    "fsdp1 without shards": (
        lambda m: FullyShardedDataParallel(
            m, device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.NO_SHARD, use_orig_params=True
        ),
        frozen_pass,
    ),
    "fsdp1 in mid-step": (fsdp1, frozen_in_mid_step),
    "fsdp2": (fsdp2, frozen_pass),
    "fsdp2 bf16": (BFLOAT16["fsdp2_bf16"], frozen_pass),
    "fsdp2 in mid-step": (fsdp2, frozen_in_mid_step),
    "check, ddp": (lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True), check_in_mid_step),
    "check, fsdp2": (fsdp2, check_in_mid_step),
    "check, fsdp1": (fsdp1, check_in_mid_step),
    "check, fsdp1 no_sync": (fsdp1, check_while_gradients_wait),
    "check, fsdp2 no_sync": (fsdp2, check_while_gradients_wait),
}
REFUSED = {
    "ddp static": "static_graph", "fsdp1 without shards": "without shards", "fsdp1 in mid-step": "drops the gradients",
    "check, fsdp1": "wait to be reduced", "check, fsdp1 no_sync": "wait to be reduced",
    "check, fsdp2 no_sync": "wait to be reduced",
}  # fmt: skip


def train(folder, model, data, rank, world):
    """Two epochs with real steps: the optimiser sees the sum over ranks, whatever the wrapper averages."""
    run = loghook.init(folder, rank=6, dtype="float32")
    run.watch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3 * world)
    for ids in batches(rank, world) * 2:
        with run(data_id=ids):
            loss_of(model, data[ids]).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.finalize()
    run.close()


def no_sync(folder, model, data, rank, world):
    """Gradient accumulation: only the last micro-batch synchronises."""
    run = loghook.init(folder, rank=6, dtype="float32")
    run.watch(model)
    rounds = batches(rank, world)
    for _ in run.passes():
        for index, ids in enumerate(rounds):
            last = index == len(rounds) - 1
            with contextlib.nullcontext() if last else model.no_sync():
                with run(data_id=ids, scale=len(rounds)):
                    (loss_of(model, data[ids]) / len(rounds)).backward()
    run.finalize()
    run.close()


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, args=(2, str(folder)), nprocs=2)
    for name, dtype in (("one", torch.float32), ("one_bf16", torch.bfloat16)):
        run = loghook.init(folder / name, rank=6, dtype="float32")
        model = make_model().to(dtype)
        run.watch(model)
        log_pass(run, model, make_data().to(dtype), 0, 1)
    run = loghook.init(folder / "train_one", rank=6, dtype="float32")
    model, data, rounds = make_model(), make_data(), [batches(rank, 2) for rank in (0, 1)]
    run.watch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for ids in [a + b for a, b in zip(*rounds, strict=True)] * 2:
        with run(data_id=ids):
            loss_of(model, data[ids]).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.finalize()
    run.close()
    return folder


@pytest.mark.parametrize("name", WRAPPERS | BFLOAT16)
def test_check_agrees_on_two_ranks(logs, name):
    assert [(logs / f"check-{name}-{rank}").read_text() for rank in (0, 1)] == ["", ""]


def test_a_rank_that_finds_a_problem_alone_waits_for_nobody(logs):
    assert "samples influence each other" in (logs / "mixing-0").read_text()
    assert (logs / "mixing-1").read_text() == ""


@pytest.mark.parametrize("name", LOOKS)
def test_training_is_the_same_after_a_look_or_the_look_is_refused(logs, name):
    for rank in (0, 1):
        assert REFUSED.get(name, "True") in (logs / f"looked-{name}-{rank}").read_text()


def by_id(log, layer):
    rows = log.rows(layer)[:]
    return rows[np.argsort(log.data_ids)]


CELLS = [(name, first) for name in WRAPPERS for first in ((False, True) if name in WATCH_FIRST else (False,))]


@pytest.mark.parametrize("name,first", CELLS, ids=[f"{n}-{'watched' if f else 'wrapped'}-first" for n, f in CELLS])
def test_rows_of_two_ranks_equal_those_of_one_process(logs, name, first):
    one, two = loghook.load(logs / "one"), loghook.load(logs / f"{name}-{first}")
    assert sorted(two.data_ids) == list(range(SAMPLES)) and two.repeats == 2
    assert two.layers == one.layers and two.fingerprint == one.fingerprint
    assert set(two.keys.rank) == {0, 1} and two.manifest.sealed and not two.verify()
    for layer in one.layers:
        expected = by_id(one, layer)
        assert np.abs(by_id(two, layer) - expected).max() <= 1e-5 * np.abs(expected).max()


def by_step(log, layer):
    """Rows of a training log in an order that has nothing to do with ranks: by step, then by id."""
    return log.rows(layer)[:][np.lexsort((log.data_ids, log.keys.step))]


@pytest.mark.parametrize("name", ["ddp", "fsdp2_leaves", "fsdp2_checkpoint_compile"])
def test_rows_inside_training_on_two_ranks_equal_those_of_one_process(logs, name):
    one, two = loghook.load(logs / "train_one"), loghook.load(logs / f"train_{name}")
    assert len(one) == len(two) == 2 * BATCH * len(batches(0, 2)) * 2 and not two.verify()
    for layer in one.layers:
        expected = by_step(one, layer)
        first = expected[: 2 * BATCH]
        again = expected[len(expected) // 2 :][: 2 * BATCH]
        assert np.abs(first - again).max() > 1e-3 * np.abs(first).max()  # the parameters did move
        assert np.abs(by_step(two, layer) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_accumulation_under_no_sync(logs):
    one, two = loghook.load(logs / "one"), loghook.load(logs / "no_sync")
    assert sorted(two.data_ids) == list(range(SAMPLES))
    for layer in one.layers:
        expected = by_id(one, layer)
        assert np.abs(by_id(two, layer) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name,first", CELLS, ids=[f"{n}-{'watched' if f else 'wrapped'}-first" for n, f in CELLS])
def test_sharded_models_report_whole_layers_and_an_honest_digest(logs, name, first):
    one, two = loghook.load(logs / "one").manifest, loghook.load(logs / f"{name}-{first}").manifest
    assert {k: two.coverage[k] for k in ("covered", "total")} == {k: one.coverage[k] for k in ("covered", "total")}
    # A digest speaks of whole parameters; where a rank holds shards of them it is left out.
    assert two.parameters["first"] == (one.parameters["first"] if name in ("ddp", "replicate") else None)


def test_mixed_precision_of_fsdp2_is_that_of_a_bfloat16_model(logs):
    one, two = loghook.load(logs / "one_bf16"), loghook.load(logs / "fsdp2_bf16-False")
    assert sorted(two.data_ids) == list(range(SAMPLES))
    for layer in one.layers:
        expected = by_id(one, layer)
        assert np.abs(by_id(two, layer) - expected).max() <= 1e-2 * np.abs(expected).max()


def test_scores_read_the_logs_of_two_ranks_in_place(logs):
    one, two = loghook.load(logs / "one"), loghook.load(logs / "ddp-False")
    model = make_model()
    asker = one.attach(model)
    with asker.query(data_id=["q"]) as query:
        loss_of(model, make_data()[:1]).backward()
    asker.close()
    order = np.argsort(two.data_ids)
    for method in ("dot", "fisher"):
        a, b = one.influence(query, method).values, two.influence(query, method).values[:, order]
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3 * np.abs(a).max())
    best = two.influence(query, "dot", top=3).top(3)[0]
    assert [r.data_id for r in best] == [r.data_id for r in one.influence(query, "dot").top(3)[0]]
