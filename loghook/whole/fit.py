"""``Fit``: EK-FAC on whole gradients (George et al. 2018; Grosse et al. 2023), fitted through a user's own loop."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loghook.capture.batch import Blocks, Given, Ids, check_ids
from loghook.capture.coverage import describe_coverage
from loghook.capture.hooked import Hooked
from loghook.capture.passes import Gathering, Pass
from loghook.capture.processes import process_rank, shared
from loghook.capture.select import Watch
from loghook.capture.sums import decompose
from loghook.capture.whole import Covariance, Eigenvalues
from loghook.errors import CheckpointWarning, ConfigError, LogExistsError, MismatchError, StateError
from loghook.influence.precondition import Curvature
from loghook.influence.scores import Scores
from loghook.influence.solvers import Diagonal, Identity, Solver, Zero
from loghook.log.disk import lock, writing
from loghook.log.format import LayerSpec, fingerprint
from loghook.log.query import Query
from loghook.project.projection import Side
from loghook.statistics.factors import Eigenbasis
from loghook.statistics.store import FACTORS, FactorStore, pack_factors
from loghook.whole.refine import Damped, GaussNewton, OutputLoss, Outputs, listed, solve
from loghook.whole.scoring import Scoring, low_rank

FISHERS = ("empirical", "true")


class Fit(Blocks, Hooked):
    """EK-FAC factors of whole gradients, and what can be asked of them; made by ``loghook.fit``."""

    def __init__(self, path: Path, *, fisher: str, resume: bool, overwrite: bool) -> None:
        """See ``loghook.fit``."""
        super().__init__("none", rank=1, seed=0)
        if fisher not in FISHERS:
            raise ConfigError(f"fisher={fisher!r} is unknown: choose 'empirical' or 'true'.")
        if resume and overwrite:
            raise ConfigError("resume=True and overwrite=True exclude each other: keep one.")
        self.path, self.fisher = path, fisher
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
        self._solvers: dict[Curvature, dict[str, Solver]] = {}
        self.watched: dict[str, Any] = {}  # the arguments of watch(), for other runs that shall see the same layers

    def watch(
        self,
        model: nn.Module,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = "*lm_head",
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
        coverage = self._hook(model, Watch(include, exclude, may_sleep, flattened, bias, batch_dim))
        self.watched = {
            "include": include, "exclude": exclude, "bias": bias, "may_sleep": may_sleep, "flattened": flattened,
            "batch_dim": batch_dim,
        }  # fmt: skip
        if self._store is None:
            self._store = FactorStore(path=self.path, layers=self.specs, fisher=self.fisher)
        self._store.check_same(self.specs, self.fisher)
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
            for index, kind in enumerate(("covariance", "eigenvalues")):
                if shared(store.done(kind)):
                    continue
                gathering = Gathering(self, Covariance() if kind == "covariance" else Eigenvalues(self._bases()))
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
        store.parameters = self.digest()
        if process_rank() == 0:
            with writing(self.path):
                store.commit(kind, tensors, sums.samples)
        # Other ranks find on the disk what rank 0 wrote.
        store.files, store.samples = shared((store.files, store.samples))
        self._solvers = {}

    @contextmanager
    def _block(self, data_id: Ids, given: Given) -> Iterator[None]:
        """Gather the statistics of one batch."""
        if self._pass is None or self._pass._gathering is None:
            raise StateError(
                "no pass is under way: put the loop over batches inside `for _ in run.passes():`, or score with "
                "run.score(query)."
            )
        with self._pass._gathering.block(check_ids(data_id), given):
            yield

    def score(
        self,
        query: Query,
        method: str | None = None,
        *,
        damping: float = 0.1,
        damping_abs: float | None = None,
        rank: int | None = None,
        per_layer: bool = False,
    ) -> Scoring:
        """Prepare to score training samples against questions, in one pass and without storing rows.

        Args:
            query: whole gradients of the questions, from this object's ``query``, or what ``refine`` made of them.
            method: "ekfac" (the default), "kfac", or "dot" (no curvature; the only one for refined questions).
            damping: added to the eigenvalues, times the layer's mean eigenvalue.
            damping_abs: added as it is, instead.
            rank: replace each question's preconditioned gradient, layer by layer, by its best approximation of this
                rank; then no sample's gradient is ever formed (Grosse et al. 2023, section 3.2.2).
            per_layer: keep the scores of every layer as well.

        Returns:
            A Scoring: ``with scoring(data_id=...):`` around forward and backward, then ``scoring.scores()``.
        """
        method = method or ("ekfac" if query.direction is None else "dot")
        if query.direction is not None and method != "dot":
            raise ConfigError(f"this query is preconditioned already ({query.direction}): score it with method='dot'.")
        curvature = Curvature(method=method, damping=damping, damping_abs=damping_abs)
        directions = self.precondition(query, curvature)
        columns = self._layout.kinds["gradients"]
        held: dict[str, tuple[Tensor, Tensor | None]] = {}
        lost: list[float] = []
        for layer in self._layers:
            device, dtype = layer.device_and_dtype()
            matrices = directions[:, columns[layer.name]].unflatten(1, (layer.spec.k_out, layer.spec.k_in))
            if rank is None:
                held[layer.name] = (matrices.to(device, dtype), None)
            else:
                left, right, error = low_rank(matrices, rank)
                held[layer.name] = (left.to(device, dtype), right.to(device, dtype))
                lost.append(error)
        return Scoring(self, query, held, curvature, per_layer=per_layer, lost=max(lost) if lost else None)

    def refine(
        self,
        query: Query,
        batches: Iterable[Any],
        outputs: Outputs,
        loss: OutputLoss,
        *,
        solver: str = "cg",
        iterations: int = 10,
        damping: float = 10.0,
        damping_abs: float | None = None,
        tolerance: float = 0.01,
        step: float = 0.5,
        momentum: float = 0.9,
    ) -> Query:
        """Solve ``(GGN + damping) u = g`` for each question, preconditioned with EK-FAC; then ``score(u)``.

        Args:
            query: whole gradients of the questions.
            batches: training data that the curvature is taken from, a few hundred samples or more; gone through once
                for each iteration of "cg", one batch for each of "astra". On several processes each has its own.
            outputs: batch -> the watched model's outputs, in eval mode.
            loss: (outputs, batch) -> the batch's summed loss, convex in the outputs (cross-entropy, squared error).
            solver: "cg": conjugate gradients, exact products; "astra": stochastic steps.
            iterations: of the solver.
            damping: added to GGN, times the mean EK-FAC eigenvalue over the parameters of *all* layers: one amount for
                all of them, larger than EK-FAC's own. docs/methods.md has what was measured.
            damping_abs: the damping itself, instead.
            tolerance: "cg" stops once the mean of |residual| / |g| is below it.
            step: of "astra", over the largest stable one.
            momentum: of "astra".

        Returns:
            A query that holds u; ``query.direction`` says how it was made, residual included.
        """
        self._require_whole(query)
        eigenvalues = self._require_store().eigenvalues().values()
        mean = sum(float(v.double().sum()) for v in eigenvalues) / sum(v.numel() for v in eigenvalues)
        amount = Curvature(method="ekfac", damping=damping, damping_abs=damping_abs).amount(mean)
        solvers = self.solvers(Curvature(method="ekfac", damping_abs=amount))
        matrix = GaussNewton(self._layers, self._layout, listed(batches), outputs, loss)
        u, residuals = solve(
            Damped(matrix, amount, solvers), query.matrix, solver=solver, iterations=iterations, tolerance=tolerance,
            step=step, momentum=momentum,
        )  # fmt: skip
        return query.with_rows(u, f"{solver}, {len(residuals) - 1} iterations, residual {residuals[-1]:.2g}")

    def rerank(
        self,
        scores: Scores,
        query: Query,
        batches: Callable[[list[Any]], Iterable[tuple[Ids, Any]]],
        loss: Callable[[Any], Tensor],
        *,
        top: int = 300,
        **options: Any,
    ) -> Scores:
        """Score the best samples of a log once more, with whole gradients.

        Args:
            scores: of the same questions, from ``Log.influence``.
            query: whole gradients of the questions, or refined ones.
            batches: ids -> (ids of a batch, batch) pairs that yield those samples.
            loss: batch -> its summed loss, through the watched model.
            top: how many candidates of each question are taken from ``scores``.
            options: as in ``score``.

        Returns:
            The candidates of each question, best first: (queries, top).
        """
        if list(scores.query_ids) != list(query.data_ids):
            raise MismatchError("scores and query hold different questions: pass both in the same order.")
        candidates = [[record.data_id for record in ranked] for ranked in scores.top(top)]
        wanted = list(dict.fromkeys(i for ids in candidates for i in ids))
        scoring = self.score(query, **options)
        for ids, batch in batches(wanted):
            with scoring(data_id=ids):
                loss(batch).backward()
        return scoring.scores().among(candidates)

    def precondition(self, query: Query, curvature: Curvature) -> Tensor:
        """Return H^-1 g for each question: (Q, width), float32 or float64."""
        self._require_whole(query)
        rows, columns = query.matrix, self._layout.kinds["gradients"]
        out = torch.empty_like(rows)
        for name, solver in self.solvers(curvature).items():
            out[:, columns[name]] = solver.apply(rows[:, columns[name]])
        return out

    def solvers(self, curvature: Curvature) -> dict[str, Solver]:
        """Return the inverse curvature of every layer: {name: Solver}, kept for the next call."""
        if curvature.method == "dot":
            return {name: Identity() for name in self.layers}
        if curvature.method not in ("kfac", "ekfac"):
            raise ConfigError(
                f"method={curvature.method!r} has no whole-gradient form: choose 'ekfac', 'kfac' or 'dot'."
            )
        if curvature not in self._solvers:
            store = self._require_store()
            corrected = store.eigenvalues() if curvature.method == "ekfac" else {}
            solvers: dict[str, Solver] = {}
            for name, (inputs, outputs) in store.factors().items():
                products = outputs.values[:, None] * inputs.values[None, :]
                values = corrected[name] if corrected else products
                basis, mean = Eigenbasis(inputs.basis, outputs.basis, products), float(values.double().mean())
                solvers[name] = Diagonal(basis, values, curvature.amount(mean)) if mean > 0 else Zero()
            self._solvers = {curvature: solvers}
        return self._solvers[curvature]

    def _bases(self) -> dict[str, tuple[Side, Side]]:
        sides: dict[str, tuple[Side, Side]] = {}
        shared_sides: list[Side] = []
        for name, pair in self._require_store().factors().items():
            matrices = [factor.basis.T.float().contiguous() for factor in pair]
            fresh = Side(matrices[0].shape[0], matrices[0])
            same = (s for s in shared_sides if s.width == fresh.width and torch.equal(s.matrix, fresh.matrix))  # type: ignore[arg-type]
            inputs = next(same, fresh)
            shared_sides = [*shared_sides[-2:], inputs]
            sides[name] = (inputs, Side(matrices[1].shape[0], matrices[1]))
        return sides

    def _require_whole(self, query: Query) -> None:
        fitted = self._require_store().parameters
        if fitted and query.parameters and fitted != query.parameters:
            warnings.warn(
                "the query was made with other parameter values than the factors were fitted with: load those first.",
                CheckpointWarning,
                stacklevel=3,
            )
        if query.fingerprint != fingerprint(self.specs, self._projection, self._seed):
            raise MismatchError(
                "the query does not hold whole gradients of these layers: make it with this object's query(...)."
            )

    def _require_store(self) -> FactorStore:
        if self._store is None or not self._layers:
            raise StateError("nothing is watched yet: call watch(model) first.")
        return self._store
