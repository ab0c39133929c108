"""What the ground truths share: the task as a method sees it, its file, and the command line.

A script beside this one makes one task. Its truth is a small file, so that nobody retrains without `--retrain`.

Shapes: N training samples, Q queries, m subsets, B samples of a batch.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from loghook.demo.train import one_thread
from loghook.evaluate.lds import lds, random_subsets
from loghook.evaluate.replay import Training
from loghook.evaluate.retrain import Train, retrain

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # benchmarks/digits.py

FIRST_SEED = 1000  # of the models that are attributed; the truth's trainings have seeds below
Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that a method needs to be judged.

    Attributes:
        name: of the task.
        train: tensors of the training samples, each with the samples first; batches are cut from them.
        queries: the same for the queries.
        fit: trains a model on the samples that `members` (N,) bool holds, from a seed; leaves it in eval mode.
        build: makes a model of the same shape with any weights.
        outputs: of a model on a batch, sample by sample (logits).
        sample_losses: summed loss of each sample, from outputs and batch: (B,).
        represent: what a model makes of a batch, a vector for each sample: (B, D).
        optimizer: that of a model which `fit` made of all samples from a seed, with its moments; or None.
        training: what `fit` does with all samples and a seed, as pure functions; or None.
        checkpoint: makes the model of a training on all samples from a seed, after a share of it; or None.
        members: (m, N) bool, or None where the truth is not from retraining.
        losses: (m, Q) float32, loss of each query after training on each subset, mean over seeds; or None.
        flipped: (N,) bool, which training labels are wrong; or None.
        relevant: for each query the places of the training samples that state its fact; or None.
        labels: classes of training samples and queries, for the same-label control; or None.
        texts: of training samples and queries, for BM25; or None.
        about: recipe, seeds, ceiling of the LDS, and what the attributed model's mean query loss was.
    """

    name: str
    train: Batch
    queries: Batch
    fit: Callable[[np.ndarray, int], nn.Module]
    build: Callable[[], nn.Module]
    outputs: Callable[[nn.Module, Batch], Tensor]
    sample_losses: Callable[[Tensor, Batch], Tensor]
    represent: Callable[[nn.Module, Batch], Tensor]
    optimizer: Callable[[nn.Module, int], torch.optim.Optimizer] | None = None
    training: Callable[[int], Training] | None = None
    checkpoint: Callable[[int, float], nn.Module] | None = None
    members: np.ndarray | None = None
    losses: np.ndarray | None = None
    flipped: np.ndarray | None = None
    relevant: Sequence[Sequence[int]] | None = None
    labels: tuple[np.ndarray, np.ndarray] | None = None
    texts: tuple[Sequence[str], Sequence[str]] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def n_train(self) -> int:
        return len(next(iter(self.train.values())))

    @property
    def n_query(self) -> int:
        return len(next(iter(self.queries.values())))

    def batches(self, which: str, ids: Iterable[int] | None = None, size: int = 50) -> Iterator[Batch]:
        """Cut some samples of "train" or "query" into batches, in order; all by default."""
        data, count = (self.train, self.n_train) if which == "train" else (self.queries, self.n_query)
        places = torch.arange(count) if ids is None else torch.as_tensor(list(ids), dtype=torch.long)
        for part in places.split(size):
            yield {key: values[part] for key, values in data.items()}

    def loss_from_outputs(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.sample_losses(outputs, batch).sum()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the batch."""
        return self.loss_from_outputs(self.outputs(model, batch), batch)

    @torch.no_grad()
    def losses_of(self, model: nn.Module, which: str) -> np.ndarray:
        """(N,) or (Q,) float64."""
        losses = [self.sample_losses(self.outputs(model, batch), batch) for batch in self.batches(which)]
        return torch.cat(losses).double().numpy()

    @torch.no_grad()
    def representations(self, model: nn.Module, which: str) -> np.ndarray:
        """(N, D) or (Q, D) float32."""
        return torch.cat([self.represent(model, batch) for batch in self.batches(which)]).numpy()

    def model(self, seed: int = FIRST_SEED, folder: Path | None = None) -> nn.Module:
        """A model trained on all samples, kept in a folder for the next time."""
        folder = folder or Path(tempfile.gettempdir()) / "loghook-truths"
        digest = zlib.crc32(json.dumps([self.about, torch.__version__]).encode())
        file = folder / f"{self.name}-{digest:08x}-{seed}.safetensors"
        if file.exists():
            model = self.build()
            load_model(model, file)
            return model.eval()
        with one_thread("cpu"):
            model = self.fit(everything(self), seed)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, str(file.with_suffix(".tmp")))
        file.with_suffix(".tmp").replace(file)
        self._compare(model, seed)
        return model

    def models(self, count: int = 1, folder: Path | None = None) -> list[nn.Module]:
        """Models trained on all samples, with seeds that the truth does not use."""
        return [self.model(FIRST_SEED + i, folder) for i in range(count)]

    def _compare(self, model: nn.Module, seed: int) -> None:
        """Notice libraries or hardware that train quite another model: rounding alone changes a few per cent."""
        known, found = self.about.get("query_loss"), float(query_losses(self, model).mean())
        if known and seed == FIRST_SEED and abs(found - known) > 0.2 * known:
            warnings.warn(
                f"{self.name}: the model trained on everything has a mean query loss of {found:.4f}, and {known:.4f} "
                "where the truth was measured: its scores may not fit the truth; --retrain measures it anew.",
                stacklevel=3,
            )


def query_losses(task: Task, model: nn.Module) -> np.ndarray:
    """(Q,) float64: what the truth measures."""
    return task.losses_of(model, "query")


def everything(task: Task) -> np.ndarray:
    return np.ones(task.n_train, dtype=bool)


class Truth(NamedTuple):
    """What retraining on random halves showed: a small file."""

    members: np.ndarray  # (m, N) bool
    losses: np.ndarray  # (m, Q) float32, mean over seeds
    about: dict[str, Any]  # recipe, seeds, ceiling

    def save(self, file: Path) -> None:
        arrays = {"members": np.packbits(self.members, axis=1), "losses": self.losses}
        safetensors.numpy.save_file(arrays, file, {"about": json.dumps(self.about)})

    @classmethod
    def load(cls, file: Path) -> "Truth":
        with safetensors.safe_open(file, framework="np") as opened:
            about = json.loads(opened.metadata()["about"])
            members = np.unpackbits(opened.get_tensor("members"), axis=1, count=1200).astype(bool)
            return cls(members, opened.get_tensor("losses"), about)


def truth_file(name: str) -> Path:
    return HERE / f"{name}.safetensors"


def known_truth(name: str) -> dict[str, Any]:
    """Fields of a task from its file; none before it is first measured."""
    file = truth_file(name)
    return Truth.load(file)._asdict() if file.exists() else {}


def measure(
    task: Task, train: Train, arguments: argparse.Namespace, *, halves: int, seeds: int, recipe: dict[str, Any]
) -> Task:
    """Retrain on random halves and write the file: the task with its truth. What is done is kept if interrupted."""
    members = random_subsets(task.n_train, halves, 0.5, seed=0)
    folder = arguments.folder or Path("runs") / f"truth-{task.name}"
    measured_mSQ = retrain(train, members, range(seeds), folder, workers=arguments.workers, recipe=recipe)
    about = {
        "recipe": recipe,
        "halves": halves,
        "seeds": seeds,
        "ceiling": ceiling(measured_mSQ.transpose(1, 0, 2)),
        "query_loss": float(query_losses(task, task.fit(everything(task), FIRST_SEED)).mean()),
        "torch": torch.__version__,
    }
    truth = Truth(members, measured_mSQ.mean(axis=1).astype(np.float32), about)
    truth.save(truth_file(task.name))
    return dataclasses.replace(task, **truth._asdict())


def ceiling(measured_SmQ: np.ndarray) -> float:
    """LDS of a perfect prediction, which the retrainings' own noise keeps below 1.

    Spearman and Brown: with r between single seeds, the mean of S of them has reliability S r / (1 + (S - 1) r), and
    what it correlates with at most is the root of that.
    """
    halves = np.eye(measured_SmQ.shape[1], dtype=bool)  # one "sample" a half: its score is what one seed measured
    pairs = itertools.combinations(measured_SmQ, 2)
    r = float(np.mean([lds(-one.T, halves, other, resamples=1).mean for one, other in pairs]))
    return float(np.sqrt(len(measured_SmQ) * r / (1 + (len(measured_SmQ) - 1) * r)))


# Of classifiers whose samples are "x" and whose labels are "y"


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """(B, classes)."""
    return model(batch["x"])


def cross_entropies(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch["y"], reduction="none")


def last_input(model: nn.Module, batch: Batch) -> Tensor:
    """Input of the last layer of a sequence."""
    return model[:-1](batch["x"])  # type: ignore[index]


def fit_classifier(
    build: Callable[[], nn.Module], x: Tensor, y: Tensor, members: np.ndarray, seed: int, recipe: dict[str, Any],
    whole_batches: bool = False,
) -> nn.Module:  # fmt: skip
    """Adam at a constant rate on the mean loss; the seed gives weights and order."""
    torch.manual_seed(seed)
    model, places, size = build(), torch.from_numpy(np.flatnonzero(members)), recipe["batch"]
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe["rate"], fused=True)
    steps = len(places) // size if whole_batches else None
    for _ in range(recipe["epochs"]):
        for part in places[torch.randperm(len(places))].split(size)[:steps]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model


def pack_texts(texts: Sequence[str]) -> np.ndarray:
    """Texts as compressed bytes, which a safetensors file can hold."""
    return np.frombuffer(zlib.compress(json.dumps(list(texts)).encode(), 9), dtype=np.uint8)


def unpack_texts(data: np.ndarray) -> list[str]:
    return json.loads(zlib.decompress(data.tobytes()))


def tail_patch_logs(task: Task, model: nn.Module, top_QK: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Arguments of `judges.tail_patch`: log-probabilities before, (Q,), and after one step of SGD on each top sample.

    The step is on a sample's summed loss, and is taken back.
    """
    parameters = list(model.parameters())
    kept = [parameter.detach().clone() for parameter in parameters]
    after = np.zeros(top_QK.shape)
    for i, place in tqdm(list(np.ndenumerate(top_QK)), "tail-patch", delay=2, leave=False):
        (batch,) = task.batches("train", [place])
        gradients = torch.autograd.grad(task.loss(model, batch), parameters)
        (query,) = task.batches("query", [i[0]])
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * gradient
            after[i] = -float(task.loss(model, query))
            for parameter, values in zip(parameters, kept, strict=True):
                parameter.copy_(values)
    return -query_losses(task, model), after


def describe(task: Task) -> str:
    """A few lines about what a task holds."""
    lines = [f"{task.name}: {task.n_train} training samples, {task.n_query} queries"]
    if task.losses is not None and task.members is not None:
        spread = task.losses.std(axis=0).mean()
        lines.append(f"truth: {task.losses.shape[0]} subsets of {task.members[0].sum()}, losses {task.losses.shape},")
        lines.append(f"  mean {task.losses.mean():.4f}, spread over subsets {spread:.4f} (mean over queries)")
    if task.flipped is not None:
        lines.append(f"{task.flipped.sum()} training labels are wrong")
    if task.relevant is not None:
        counts = [len(places) for places in task.relevant]
        lines.append(f"each query's fact is stated by {min(counts)} to {max(counts)} training samples")
    return "\n".join([*lines, f"about: {json.dumps(task.about)}"])


def main(task: Callable[[], Task], again: Callable[[argparse.Namespace], Task] | None, doc: str | None) -> None:
    """The command line of a truth: say what it holds; with `--retrain`, make it anew first."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--retrain", action="store_true", help="measure the truth anew and write its file")
    made.add_argument("--workers", type=int, default=1, help="processes that train at the same time (default: 1)")
    made.add_argument("--folder", type=Path, help="where results are kept until all are there (default: runs/truth-*)")
    arguments = made.parse_args()
    if arguments.retrain and again is None:
        made.error("this truth is known beforehand: there is nothing to retrain.")
    print(describe(again(arguments) if arguments.retrain and again else task()))
