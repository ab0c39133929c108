"""Train on many subsets of the data, in parallel processes, and keep every result as it comes."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from loghook.arguments import plain, whole
from loghook.errors import ConfigError, RetrainingError
from loghook.log.disk import absolute, lock, replacing, write_atomically

Train = Callable[[NDArray[np.bool_], int], ArrayLike]
Job = tuple[int, int]  # place of the subset, and the seed
PLAN = "plan.json"


def retrain(
    train: Train,
    subsets: ArrayLike,
    seeds: Sequence[int],
    path: str | Path,
    *,
    workers: int = 1,
    recipe: Mapping[str, object] | None = None,
) -> NDArray[np.float64]:
    """Call ``train(members, seed)`` for every subset and seed, and collect what it returns.

    Each result is written to ``path`` at once. After a crash or Ctrl-C, call again with the same arguments: what is
    done is not done again. Nor is it with other seeds, or more subsets behind the old ones, as ``random_subsets`` of
    the same seed draws them: so a truth grows.

    Args:
        train: takes which samples to train on, (N,) bool, and a seed; returns a 1-D array of outputs, one for each
            query, usually losses (see ``lds`` for their sign). With workers it runs in fresh processes on one torch
            thread each, so it must be importable: a function of a module or script, or a ``functools.partial`` of
            one. A script that calls this needs ``if __name__ == "__main__":``.
        subsets: (m, N) bool, as ``random_subsets`` or ``without_top`` make them.
        seeds: what ``train`` is called with for each subset; all different.
        path: folder for the results, made if it is missing.
        workers: how many processes train at the same time. 0 trains in this one, where ``train`` may be anything and
            torch keeps its threads.
        recipe: what the results depend on besides (rates, sizes, versions), as JSON: kept beside them, and another one
            is refused; numpy's numbers are taken for Python's.

    Returns:
        (m, seeds, Q) float64.

    Raises:
        ConfigError: arguments that cannot work, as a ``train`` that no other process can import, or another plan than
            the one that ``path`` was begun with.
        RetrainingError: if a training raised, died, or returned something else than finite numbers, as many as the
            others did. It names subset and seed; the others' results are kept.
        LogLockedError: if another process works on ``path``.
    """
    subsets_mN = np.asarray(subsets)
    if subsets_mN.ndim != 2 or subsets_mN.dtype != bool or not subsets_mN.size:
        raise ConfigError(f"subsets {subsets_mN.shape} {subsets_mN.dtype} must be (subsets, samples) of bool.")
    if not hasattr(seeds, "__len__") or not len(seeds) or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds={seeds!r} must be a list of at least one, all different: equal ones measure alike.")
    workers = whole("workers", workers, 0, hint=": of processes, or 0 for this one")
    folder = absolute(path)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "lock"):
        _check_plan(folder, subsets_mN, recipe)
        jobs = [(i, seed) for i in range(len(subsets_mN)) for seed in seeds]
        missing = [job for job in jobs if not _result_file(folder, *job).exists()]
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="retraining", unit=" trainings")
        advice = f"What was done is kept in {folder}: call again with the same arguments"
        with bar, _trainings(train, subsets_mN, missing, workers) as calls:
            for (subset, seed), call in calls:
                try:
                    result = call()
                except BrokenProcessPool as error:  # which job it was is not known: all that had begun are lost
                    raise RetrainingError(
                        "a training process died (killed for memory?), or could not import train: see its output "
                        f"above. {advice}, or with fewer workers."
                    ) from error
                except Exception as error:
                    raise RetrainingError(
                        f"training on subset {subset} with seed {seed} raised {type(error).__name__}: {error}. "
                        f"Mend it. {advice}."
                    ) from error
                _save_result(result, subset, seed, folder)
                bar.update()
        results = [np.load(_result_file(folder, *job), allow_pickle=False) for job in jobs]
    for (subset, seed), result in zip(jobs, results, strict=True):
        if result.shape != results[0].shape:
            raise RetrainingError(
                f"training on subset {subset} with seed {seed} returned {len(result)} outputs and the first one "
                f"{len(results[0])}: train must return one number for each query. Delete {folder} and mend it."
            )
    return np.stack(results).reshape(len(subsets_mN), len(seeds), -1)


def _check_plan(folder: Path, subsets_mN: NDArray[np.bool_], recipe: Mapping[str, object] | None) -> None:
    file = folder / PLAN
    if file.exists():
        old_plan = json.loads(file.read_text())
        same_part = json.loads(_plan(subsets_mN[: old_plan["shape"][0]], recipe))
        changed = [key for key in same_part if old_plan.get(key) != same_part[key]]
        if changed:
            raise ConfigError(f"{folder} was begun with other {' and '.join(changed)} (see {PLAN}): take another path.")
    write_atomically(file, _plan(subsets_mN, recipe).encode())


def _plan(subsets_mN: NDArray[np.bool_], recipe: Mapping[str, object] | None) -> str:
    digest = hashlib.sha256(np.packbits(subsets_mN, axis=1).tobytes()).hexdigest()
    try:
        return json.dumps({"subsets": digest, "shape": subsets_mN.shape, "recipe": recipe}, indent=1, default=plain)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"recipe={recipe!r} is not JSON: pass numbers, texts, lists and dicts of them.") from error


@contextmanager
def _trainings(
    train: Train, subsets_mN: NDArray[np.bool_], jobs: list[Job], workers: int
) -> Iterator[Iterator[tuple[Job, Callable[[], NDArray[np.float64]]]]]:
    """Jobs, each with a call that returns its result: that trains, or asks a process that has."""
    if not workers or not jobs:
        yield ((job, partial(_train_once, train, subsets_mN[job[0]], job[1])) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork after torch has started its threads can hang
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (train, subsets_mN))
    try:
        try:
            futures = {pool.submit(_train_in_worker, *job): job for job in jobs}
        except Exception as error:
            raise ConfigError(
                f"train={train!r} cannot be handed to another process ({error}): pass a function of a module or "
                "script, or a functools.partial of one; or workers=0, which trains in this one."
            ) from error
        yield ((futures[future], future.result) for future in as_completed(futures))
    except BaseException:  # Ctrl-C as well: nobody waits for trainings whose results would be thrown away
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _train_once(train: Train, members_N: NDArray[np.bool_], seed: int) -> NDArray[np.float64]:
    result = train(members_N.copy(), seed)
    if isinstance(result, torch.Tensor):  # on any device, with its graph
        result = result.detach().cpu().double()
    return np.asarray(result, dtype=np.float64)


def _save_result(outputs_Q: NDArray[np.float64], subset: int, seed: int, folder: Path) -> None:
    if outputs_Q.ndim != 1 or not outputs_Q.size or not np.isfinite(outputs_Q).all():
        raise RetrainingError(
            f"training on subset {subset} with seed {seed} returned an array of shape {outputs_Q.shape} with "
            f"{np.count_nonzero(~np.isfinite(outputs_Q))} values that are not finite: train must return a 1-D array of "
            "finite numbers, one for each query."
        )
    with replacing(_result_file(folder, subset, seed)) as temporary, open(temporary, "wb") as handle:
        np.save(handle, outputs_Q)


def _result_file(folder: Path, subset: int, seed: int) -> Path:
    return folder / f"subset{subset:05d}-seed{seed}.npy"


_train: Train
_subsets_mN: NDArray[np.bool_]


def _start_worker(train: Train, subsets_mN: NDArray[np.bool_]) -> None:
    """Runs once in each worker, so that subsets travel once."""
    global _train, _subsets_mN
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _train, _subsets_mN = train, subsets_mN


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train_in_worker(subset: int, seed: int) -> NDArray[np.float64]:
    return _train_once(_train, _subsets_mN[subset], seed)
