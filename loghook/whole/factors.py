"""``Factors``: EK-FAC on whole gradients (George et al. 2018; Grosse et al. 2023), fitted through a user's own loop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loghook.capture.batch import Blocks, Given, Ids, check_ids
from loghook.capture.coverage import describe_coverage
from loghook.capture.hooked import Hooked
from loghook.capture.layers import Layer
from loghook.capture.passes import Gathering, Pass
from loghook.capture.select import HEAD, Watch
from loghook.capture.sums import decompose
from loghook.capture.whole import Covariance, Eigenvalues
from loghook.errors import ConfigError, LogExistsError, StateError
from loghook.influence.precondition import Curvature
from loghook.influence.solvers import Diagonal
from loghook.log.disk import lock, writing
from loghook.log.format import MANIFEST, LayerSpec, Made
from loghook.log.kinds import FACTORS
from loghook.processes import process_rank, shared
from loghook.statistics import Eigenbasis, FactorStore, pack_factors
from loghook.whole.inverse import rotations

FISHERS = ("empirical", "true")
PASSES = ("covariance", "eigenvalues")


class Factors(Blocks, Hooked):
    """EK-FAC factors of a model's whole gradients: watching, passes, and the folder that keeps them."""

    def __init__(self, path: Path, *, fisher: str, resume: bool, overwrite: bool) -> None:
        """See ``loghook.fit``."""
        super().__init__("none", rank=1, seed=0)
        if fisher not in FISHERS:
            raise ConfigError(f"fisher={fisher!r} is unknown: choose 'empirical' or 'true'.")
        if resume and overwrite:
            raise ConfigError("resume=True and overwrite=True exclude each other: keep one.")
        self.path, self.fisher = path, fisher
        if (path / MANIFEST).exists():
            raise LogExistsError(f"{path} holds a log, which loghook.load opens: choose another path for the factors.")
        if (path / FACTORS).exists() and not resume and not overwrite:
            raise LogExistsError(
                f"{path} holds factors already: pass resume=True to use or complete them, or overwrite=True."
            )
        self._store: FactorStore | None = None
        if (path / FACTORS).exists() and not overwrite:
            self._store = FactorStore.load(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            if overwrite and process_rank() == 0:
                (path / FACTORS).unlink(missing_ok=True)  # or a later resume would take the old ones for these
        self._pass: Pass | None = None
        self._began_with: str | None = None  # digest of sampled parameter values when the pass began
        self._bases: dict[str, Eigenbasis] = {}
        self._solvers: dict[Curvature, dict[str, Diagonal]] = {}
        self.watched: dict[str, Any] = {}  # the arguments of watch(), for other runs that shall see the same layers

    def watch(
        self,
        model: nn.Module,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = HEAD,
        *,
        bias: bool = True,
        may_sleep: str | Sequence[str] = (),
        flattened: str | Sequence[str] = (),
        batch_dim: int = 0,
    ) -> None:
        """Put inert hooks on a model's layers; arguments as in ``Run.watch``."""
        self._require_outside()
        if self._layers:
            raise StateError("a model is watched already: one watch() call takes several patterns.")

        def settle(layers: list[Layer]) -> None:
            if self._store is not None:
                self._store.check_same(tuple(layer.spec for layer in layers), self.fisher)

        watch = Watch(include, exclude, may_sleep, flattened, bias, batch_dim)
        coverage = self._hook(model, watch, settle=settle)
        self.watched = {
            "include": include, "exclude": exclude, "bias": bias, "may_sleep": may_sleep, "flattened": flattened,
            "batch_dim": batch_dim,
        }  # fmt: skip
        if self._store is None:
            self._store = FactorStore(path=self.path, layers=self.specs, fisher=self.fisher)
        if process_rank() == 0:
            print(describe_coverage(len(self.layers), coverage))

    @property
    def model(self) -> nn.Module:
        """The watched model.

        Raises:
            StateError: if none is, or if it is gone.
        """
        model = self._models[0]() if self._models else None
        if model is None:
            raise StateError("no model is watched, or nobody holds it any more: call watch(model) and keep the model.")
        return model

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """What is watched, layer by layer."""
        return tuple(layer.spec for layer in self._layers)

    def passes(self) -> Iterator[Pass]:
        """Yield the passes over the data that are not done yet: "covariance", then "eigenvalues".

        Each is committed when it is complete, and skipped by a later ``loghook.fit(..., resume=True)``. In every one of
        them each data_id counts once. All ranks go through it together; their sums are brought together at its end.
        """
        store = self._require_store()
        held = lock(self.path / f"lock-{process_rank():05d}")
        try:
            for index, kind in enumerate(PASSES):
                if shared(store.done(kind)):
                    continue
                gathering = Gathering(
                    self, Covariance() if kind == "covariance" else Eigenvalues(rotations(self._eigenbases()))
                )
                self._pass = Pass(index, kind, self.fisher, gathering)
                try:
                    yield self._pass
                finally:
                    self._pass = None
                self._commit(kind, store, gathering)
        finally:
            held.close()

    def _commit(self, kind: str, store: FactorStore, gathering: Gathering) -> None:
        sums = gathering.reduce()
        if kind == "covariance":
            tensors = pack_factors(decompose(self._layers, sums))
        else:
            tensors = {
                layer.name: (sums.totals[layer.name] / sums.samples).float().cpu()
                if layer.name in sums.totals
                else torch.zeros(layer.output_side.width, layer.input_side.width)  # it may sleep, and always did
                for layer in self._layers
            }
        parameters = self.digest()
        store.parameters = parameters if parameters == self._began_with else None
        if process_rank() == 0:
            with writing(self.path):
                store.commit(kind, tensors, sums.samples)
        # Other ranks find on the disk what rank 0 wrote.
        store.files, store.samples = shared((store.files, store.samples))
        self._bases, self._solvers = {}, {}

    @contextmanager
    def _block(self, data_id: Ids, given: Given) -> Iterator[None]:
        """Gather the statistics of one batch."""
        if self._pass is None or self._pass._gathering is None:
            raise StateError(
                "no pass is under way: put the loop over batches inside `for _ in run.passes():`, or score with "
                "run.score(query)."
            )
        gathering = self._pass._gathering
        if not gathering.sums.samples:
            self._began_with = self.digest()
        with gathering.block(check_ids(data_id), given):
            yield

    def _eigenbases(self) -> dict[str, Eigenbasis]:
        if not self._bases:
            self._bases = {
                name: Eigenbasis(inputs.basis, outputs.basis, outputs.values[:, None] * inputs.values)
                for name, (inputs, outputs) in self._require_store().factors().items()
            }
        return self._bases

    def __repr__(self) -> str:
        done = [kind for kind in PASSES if self._store is not None and self._store.done(kind)]
        state = "finished" if len(done) == len(PASSES) else f"passes done: {', '.join(done) or 'none'}"
        where = f"{type(self).__name__}({str(self.path)!r}, {len(self.layers)} layers"
        return f"{where}, fisher={self.fisher!r}, {state})"

    @property
    def fingerprint(self) -> str:
        """Digest of the watched layers; a question must have the same."""
        return Made(self.specs, self._projection, self._seed).fingerprint

    def _require_store(self) -> FactorStore:
        if self._store is None or not self._layers:
            raise StateError("nothing is watched yet: call watch(model) first.")
        return self._store
