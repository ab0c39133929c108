"""``Fit``: EK-FAC on whole gradients (George et al. 2018; Grosse et al. 2023), fitted through a user's own loop."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loghook.arguments import choose, positive, whole
from loghook.capture.batch import Blocks, Given, Ids, batch_size, check_ids
from loghook.capture.config import Recipe
from loghook.capture.hooked import Hooked, require_apart
from loghook.capture.models import describe_coverage, mixing_modules
from loghook.capture.passes import Gathering, Pass, decompose
from loghook.capture.select import HEAD, Watch
from loghook.capture.whole import Covariance, Eigenvalues
from loghook.errors import CheckpointWarning, ConfigError, LogExistsError, MismatchError, StateError, warn
from loghook.factors import Eigenbasis, FactorStore, in_float32, pack_factors
from loghook.influence.precondition import PLAIN, Metric
from loghook.influence.scores import Scores
from loghook.influence.solvers import Diagonal, Identity
from loghook.log.disk import lock, lock_name, writing
from loghook.log.files import FACTORS
from loghook.log.format import MANIFEST, differ
from loghook.log.query import Query, require_match, require_one_query, require_query
from loghook.processes import broadcast, process_rank
from loghook.whole.refine import Damped, GaussNewton, OutputLoss, Outputs, require_batches, require_sum, solve, unrolled
from loghook.whole.scoring import Scoring, Walk, rotations, walked

FISHERS = ("empirical", "true")
PASSES = ("covariance", "eigenvalues")
CARRIED = "carried over time"  # what ``unroll`` calls questions for the segment before
WHOLE_METHODS = ("ekfac", "kfac", *PLAIN)


class Fit(Blocks, Hooked):
    """EK-FAC factors of whole gradients, and what can be asked of them; made by ``loghook.fit``."""

    _again = "watch the model again"

    def __init__(self, path: Path, *, fisher: str, resume: bool, overwrite: bool) -> None:
        """See ``loghook.fit``."""
        super().__init__(Recipe(projection="none"))
        choose("fisher", fisher, FISHERS)
        if resume and overwrite:
            raise ConfigError("resume=True and overwrite=True exclude each other: keep one.")
        self.path, self.fisher = path, fisher
        if (path / MANIFEST).exists():
            raise LogExistsError(f"{path} holds a log, which loghook.load opens: choose another path for the factors.")
        fitted = (path / FACTORS).exists()
        if fitted and not resume and not overwrite:
            raise LogExistsError(f"{path} holds factors: pass resume=True to use or complete them, or overwrite=True.")
        self._store = FactorStore.load(path) if fitted and not overwrite else None
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            if overwrite and process_rank() == 0:
                with lock(path / lock_name(0)):  # nobody may be fitting what goes away
                    (path / FACTORS).unlink(missing_ok=True)  # or a later resume would take the old ones for these
        self._pass: Pass | None = None  # that is under way
        self._began_with: str | None = None  # digest of sampled parameter values when the pass began
        self._solvers: dict[Metric, dict[str, Diagonal]] = {}
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
        arguments: dict[str, Any] = {
            "include": include, "exclude": exclude, "bias": bias, "may_sleep": may_sleep, "flattened": flattened,
            "batch_dim": batch_dim,
        }  # fmt: skip
        layers, coverage = self._select(model, Watch(**arguments))
        if self._store is not None:
            self._store.check_same(tuple(layer.spec for layer in layers), self.fisher)
        self._hook(model, layers)
        self.watched = arguments
        if self._store is None:
            self._store = FactorStore(path=self.path, layers=self.specs, fisher=self.fisher)
        if process_rank() == 0:
            print(describe_coverage(len(self.layers), coverage))

    @property
    def model(self) -> nn.Module:
        """The watched model.

        Raises:
            StateError: if none is.
        """
        if self._model is None:
            raise StateError("no model is watched: call watch(model) first.")
        return self._model

    def passes(self) -> Iterator[Pass]:
        """Yield the passes over the data that are not done yet: "covariance", then "eigenvalues".

        Each is committed when it is complete, and skipped by a later ``loghook.fit(..., resume=True)``. In every one of
        them each data_id counts once, on each rank. All ranks go through it together; their sums are brought together
        at its end.
        """
        store = self._require_store()
        with lock(self.path / lock_name(process_rank())):
            try:
                for index, kind in enumerate(PASSES):
                    if broadcast(store.done(kind)):
                        continue
                    job = Covariance() if kind == "covariance" else Eigenvalues(rotations(store.bases))
                    self._mixing, gathering = None, Gathering(self, job)  # BatchNorms are looked for in each pass anew
                    self._pass = Pass(index, kind, self.fisher, gathering)
                    yield self._pass
                    self._pass._warn_at_end()
                    self._commit(kind, store, gathering)
            finally:
                self._pass = None

    def _commit(self, kind: str, store: FactorStore, gathering: Gathering) -> None:
        sums = gathering.reduce()
        store.segmented |= self._segmented
        if kind == "covariance":
            tensors = pack_factors(decompose(self._layers, sums, torch.float32))
        else:
            tensors = {}
            for layer in self._layers:
                tensors[layer.name] = in_float32(layer.name, sums.take(layer) / sums.samples).cpu()
        parameters = self.digest()
        store.parameters = parameters if parameters == self._began_with else None
        if process_rank() == 0:
            with writing(self.path):
                store.commit(kind, tensors, sums.samples)
        # Other ranks find on the disk what rank 0 wrote.
        store.files, store.samples = broadcast((store.files, store.samples))

    @contextmanager
    def _block(self, data_id: Ids, given: Given) -> Iterator[None]:
        if self._pass is None or self._pass._gathering is None:
            raise StateError(
                "no pass is under way: put the loop inside `for _ in this.passes():`, or open blocks of "
                "this.score(query)."
            )
        if not self._pass._gathering.samples:
            self._began_with = self.digest()
            of_covariances = self._require_store().parameters
            if of_covariances and self._began_with and of_covariances != self._began_with:
                warn(
                    f"{self.path} has covariances of other parameter values than eigenvalues are now gathered with: "
                    "load those first, or fit again with overwrite=True.",
                    CheckpointWarning,
                )
        with self._pass._gather(check_ids(data_id), given):
            yield

    def __repr__(self) -> str:
        done = [kind for kind in PASSES if self._store is not None and self._store.done(kind)]
        state = "finished" if len(done) == len(PASSES) else f"passes done: {', '.join(done) or 'none'}"
        return f"Fit({str(self.path)!r}, {len(self.layers)} layers, fisher={self.fisher!r}, {state})"

    @property
    def fingerprint(self) -> str:
        """Digest of the watched layers; a question must have the same."""
        return self._made.fingerprint

    def score(
        self,
        query: Query,
        method: str | None = None,
        *,
        damping: float = 0.1,
        damping_abs: float | None = None,
        normalize: str | None = None,
        rank: int | None = None,
        per_layer: bool = False,
    ) -> Scoring:
        """Prepare to score training samples against questions, in one pass and without storing rows.

        Args:
            query: whole gradients of the questions, from this object's ``query``, or what ``refine`` made of them.
            method: "ekfac" (the default), "kfac", "dot" (no curvature; the only one for refined questions) or "cosine"
                (dot at unit norm).
            damping: added to the eigenvalues, times the layer's mean eigenvalue.
            damping_abs: added as it is, instead.
            normalize: "unit" divides by the roots of both sides' self-influence; "relatif" by that of the sample only
                (Barshan et al. 2020). Over all layers, in the method's own metric, from the same backward pass.
            rank: replace each question's preconditioned gradient, layer by layer, by its best approximation of this
                rank; where that takes less arithmetic no sample's gradient is formed (Grosse et al. 2023, 3.2.2).
            per_layer: keep the scores of every layer as well.

        Returns:
            A Scoring: ``with scoring(data_id=...):`` around forward and backward, then ``scoring.scores()``.

        Raises:
            ConfigError: an argument that cannot work, as curvature or norms of questions that have theirs already.
        """
        self._require_match(query)
        if query.direction is not None and query.direction.startswith(CARRIED):
            raise ConfigError(f"these questions are carried ({query.direction}): score the direction beside them.")
        method = method or ("ekfac" if query.direction is None else "dot")
        metric = Metric(method=method, damping=damping, damping_abs=damping_abs, normalize=normalize)
        metric.require_fit_for(query.direction)
        rank = None if rank is None else whole("rank", rank, hint=", or None for whole questions")
        return Scoring(self, query, metric, rank=rank, per_layer=per_layer)

    def self_influence(
        self, method: str = "ekfac", *, damping: float = 0.1, damping_abs: float | None = None, per_layer: bool = False
    ) -> Scoring:
        """Prepare to measure each sample's influence on itself, ``<G, H^-1 G>``: large for mislabelled or odd ones.

        Arguments are as in ``score``. The Scoring's scores have one question, "self": ``values[0]`` is one number for
        each sample, ``top(10)[0]`` the ten largest.
        """
        metric = Metric(method=method, damping=damping, damping_abs=damping_abs)
        return Scoring(self, None, metric, per_layer=per_layer)

    def refine(
        self,
        query: Query,
        batches: Iterable[Any],
        outputs: Outputs,
        loss: OutputLoss,
        *,
        samples: Callable[[Any], int] | None = None,
        solver: str = "cg",
        iterations: int | None = None,
        damping: float = 3.0,
        damping_abs: float | None = None,
        tolerance: float = 0.05,
        step: float = 0.5,
        momentum: float = 0.9,
    ) -> Query:
        """Solve ``(GGN + damping) u = g`` for each question, preconditioned with EK-FAC; then ``score(u)``.

        Args:
            query: whole gradients of the questions.
            batches: training data that the curvature is taken from, a few hundred samples or more; gone through once
                for each iteration of "cg", one batch for each of "astra". On several processes each has its own.
            outputs: batch -> the outputs of the watched modules, called as usual, in eval mode.
            loss: (outputs, batch) -> the batch's summed loss, convex in the outputs (cross-entropy, squared error).
            samples: batch -> how many samples it has, where that is not the common length of its tensors (packed
                documents, images).
            solver: "cg": conjugate gradients, exact products; "astra": stochastic steps.
            iterations: of the solver. By default two for "cg", enough for tens of questions (take four or five for a
                few), and 300 for "astra".
            damping: added to GGN, times ``mean_eigenvalue``: one amount for all layers. docs/methods.md has what was
                measured.
            damping_abs: the damping itself, instead.
            tolerance: "cg" stops earlier, with the iteration that brings less than this share of what all have brought.
            step: of "astra", over the largest stable one.
            momentum: of "astra".

        Returns:
            A query that holds u; ``query.direction`` says how it was made, the damping added and the mean residual
            included (which rises and falls in the first iterations of "cg", and is no measure of them).
        """
        self._require_match(query)
        require_one_query(query, "the curvature")
        if query.direction is not None:
            raise ConfigError(f"these questions are refined already ({query.direction}): pass those that were asked.")
        if samples is None and (self._segmented or self._require_store().segmented or self.watched["batch_dim"]):
            raise ConfigError("pass samples=, batch -> how many samples it has: segments= or batch_dim= hide it.")
        if differ(self.digest(), query.parameters):
            warn(
                "the curvature is taken at other parameter values than the questions were asked at: load that "
                "checkpoint first.",
                CheckpointWarning,
            )
        require_apart(mixing_modules(self.model))
        amount = Metric(method="ekfac", damping=damping, damping_abs=damping_abs).amount(self.mean_eigenvalue)
        g = query.matrix.to(self._layers[0].device_and_dtype()[0])
        bases = {name: basis.to(g) for name, basis in self._require_store().bases.items()}
        preconditioner = self._inverses(bases, Metric(method="ekfac", damping_abs=amount))
        matrix = GaussNewton(self._layers, self._layout, require_batches(batches), outputs, loss, samples or batch_size)
        require_sum(matrix)
        u, taken, residual = solve(
            Damped(matrix, amount, preconditioner), g, solver=solver, iterations=iterations, tolerance=tolerance,
            step=step, momentum=momentum,
        )  # fmt: skip
        added = f"damping {damping:g}" if damping_abs is None else f"damping_abs {damping_abs:g}"
        return query.with_rows(u.cpu(), f"{solver}, {added}, {taken} iterations, residual {residual:.2g}")

    @property
    def mean_eigenvalue(self) -> float:
        """Mean of EK-FAC's eigenvalues over the parameters of all layers: the unit of ``refine``'s damping."""
        values = self._require_store().eigenvalues().values()
        return sum(float(v.double().sum()) for v in values) / sum(v.numel() for v in values)

    def unroll(self, query: Query, time: float) -> tuple[Query, Query]:
        """Carry questions back over a segment of training that these factors describe: SOURCE (Bae et al. 2024).

        Factors of a segment are fitted over its checkpoints, with ids that tell them apart. Begin with the last segment
        and the questions of the final model; hand what is carried on to the segment before. Score each segment's
        direction at its checkpoints, ``score(direction)``, and add up the means over checkpoints with
        ``Scores.combine``. docs/methods.md has it in full.

        Args:
            query: whole gradients of the questions, or what the following segment carried.
            time: sum of the segment's learning rates where a step's loss is a mean over samples; over T tokens of
                each, 1 / T of it. Roughly 1 / ``mean_eigenvalue``, and a little more, where training has settled.

        Returns:
            The direction to score the segment's samples with, and the questions carried to its beginning.

        Raises:
            ConfigError: a time that is not positive and finite.
        """
        time = positive("time", time, hint=": the sum of the segment's learning rates")
        self._require_match(query, at_any_values=True)
        if query.direction is not None and not query.direction.startswith(CARRIED):
            raise ConfigError(f"these questions are preconditioned ({query.direction}): pass those that were carried.")
        directions, remaining = unrolled(query.matrix, self._require_store(), self._layout.columns, time)
        direction = query.with_rows(directions, f"source, time {time:.3g}")
        carried = query.with_rows(remaining, f"{CARRIED} {time:.3g}")
        direction.parameters = carried.parameters = None  # they are meant for other checkpoints than the questions'
        return direction, carried

    def rerank(
        self,
        scores: Scores,
        query: Query,
        batches: Callable[[list[Any]], Walk],
        loss: Callable[[Any], Tensor],
        *,
        top: int = 300,
        **options: Any,
    ) -> Scores:
        """Score the best samples of a log once more, with whole gradients.

        Args:
            scores: of the same questions, from ``Log.influence``.
            query: whole gradients of the questions, or refined ones.
            batches: ids -> batches that hold those samples, as (ids, batch) or (ids, batch, arguments of its block).
            loss: batch -> its summed loss, through the watched model.
            top: how many candidates of each question are taken from ``scores``, each id once.
            options: as in ``score``.

        Returns:
            The candidates of each question, best first: (queries, top).
        """
        require_query(query)
        if not callable(batches):
            raise ConfigError("batches= is a function here: of a list of ids it yields (ids, batch) of those samples.")
        if list(scores.query_ids) != list(query.data_ids):
            raise MismatchError("scores and query hold different questions: pass both in the same order.")
        if options.get("per_layer"):
            raise ConfigError("per_layer=True has no place here, where only the best rows are kept: leave it out.")
        candidates = scores.distinct(top)
        wanted = list(dict.fromkeys(i for ids in candidates for i in ids))
        scoring = self.score(query, **options)
        for ids, batch, given in walked("batches", batches(wanted), may_be_empty=True):
            with scoring(data_id=ids, **given):
                loss(batch).backward()
        return scoring.scores().among(candidates)

    def solvers(self, metric: Metric) -> dict[str, Diagonal] | dict[str, Identity]:
        """The inverse curvature of every layer: {name: solver}, kept for the next call."""
        if metric.plain:
            return {name: Identity() for name in self.layers}
        metric = replace(metric, normalize=None)  # which changes nothing here
        if metric not in self._solvers:
            self._solvers = {metric: self._inverses(self._require_store().bases, metric)}
        return self._solvers[metric]

    def _inverses(self, bases: Mapping[str, Eigenbasis], metric: Metric) -> dict[str, Diagonal]:
        """A layer that never got a gradient contributes nothing."""
        if metric.method not in WHOLE_METHODS:
            raise ConfigError(
                f"method={metric.method!r} has no whole-gradient form: choose from {', '.join(WHOLE_METHODS)}."
            )
        corrected = self._require_store().eigenvalues() if metric.method == "ekfac" else None
        solvers = {}
        for name, basis in bases.items():
            values = basis.products if corrected is None else corrected[name]
            damping = metric.amount(float(values.double().mean()))
            solvers[name] = Diagonal(basis, values.to(basis.products.device), damping)
        return solvers

    def _require_match(self, query: Query, *, at_any_values: bool = False) -> None:
        values = None if at_any_values else self._require_store().parameters
        require_match(query, self._made, values, f"the whole gradients of {self.path}", "the fit")

    def _require_store(self) -> FactorStore:
        if self._store is None or not self._layers:
            raise StateError("nothing is watched yet: call watch(model) first.")
        return self._store
