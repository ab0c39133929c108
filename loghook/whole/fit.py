"""``Fit``: factors of whole gradients and what can be asked of them; made by ``loghook.fit``."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from loghook.capture.batch import Ids
from loghook.errors import CheckpointWarning, ConfigError, MismatchError
from loghook.influence.precondition import Curvature
from loghook.influence.scores import Scores
from loghook.influence.solvers import Diagonal, Identity
from loghook.log.query import Query, require_query
from loghook.whole.factors import Factors
from loghook.whole.gauss_newton import GaussNewton, OutputLoss, Outputs
from loghook.whole.inverse import solvers, unroll
from loghook.whole.refine import Damped, listed, solve
from loghook.whole.scoring import Scoring


class Fit(Factors):
    """EK-FAC factors of whole gradients, and what can be asked of them; made by ``loghook.fit``."""

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
        self._require_whole(query)
        method = method or ("ekfac" if query.direction is None else "dot")
        curvature = Curvature(method=method, damping=damping, damping_abs=damping_abs)
        normalize = curvature.normalize(normalize)
        if query.direction is not None and (method != "dot" or normalize):
            raise ConfigError(
                f"this query is preconditioned already ({query.direction}): score it with method='dot' and without "
                "normalize, since what its curvature says of samples is not known."
            )
        return Scoring(self, query, curvature, rank=rank, normalize=normalize, per_layer=per_layer)

    def self_influence(
        self, method: str = "ekfac", *, damping: float = 0.1, damping_abs: float | None = None, per_layer: bool = False
    ) -> Scoring:
        """Prepare to measure each sample's influence on itself, ``<G, H^-1 G>``: large for mislabelled or odd ones.

        Arguments are as in ``score``. The Scoring's scores have one question, "self": ``values[0]`` is one number for
        each sample, ``top(10)[0]`` the ten largest.
        """
        curvature = Curvature(method=method, damping=damping, damping_abs=damping_abs)
        return Scoring(self, None, curvature, per_layer=per_layer)

    def refine(
        self,
        query: Query,
        batches: Iterable[Any],
        outputs: Outputs,
        loss: OutputLoss,
        *,
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
            outputs: batch -> the watched model's outputs, in eval mode.
            loss: (outputs, batch) -> the batch's summed loss, convex in the outputs (cross-entropy, squared error).
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
            A query that holds u; ``query.direction`` says how it was made, residual included.
        """
        self._require_whole(query)
        amount = Curvature(method="ekfac", damping=damping, damping_abs=damping_abs).amount(self.mean_eigenvalue)
        g = query.matrix.to(self._layers[0].device_and_dtype()[0])
        bases = {name: basis.to(g) for name, basis in self._eigenbases().items()}
        preconditioner = solvers(self._require_store(), bases, Curvature(method="ekfac", damping_abs=amount))
        matrix = GaussNewton(self._layers, self._layout, listed(batches), outputs, loss)
        u, residuals = solve(
            Damped(matrix, amount, preconditioner), g, solver=solver, iterations=iterations, tolerance=tolerance,
            step=step, momentum=momentum,
        )  # fmt: skip
        return query.with_rows(u.cpu(), f"{solver}, {len(residuals) - 1} iterations, residual {residuals[-1]:.2g}")

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
        if not 0 < time < float("inf"):
            raise ConfigError(f"time={time!r} must be positive and finite: the sum of the segment's learning rates.")
        self._require_layers(query)
        rows = unroll(query.matrix, self._layout.kinds["gradients"], self._require_store(), self._eigenbases(), time)
        direction = query.with_rows(rows[0], f"source, time {time:.3g}")
        carried = query.with_rows(rows[1], f"carried over time {time:.3g}")
        direction.parameters = carried.parameters = None  # they are meant for other checkpoints than the questions'
        return direction, carried

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
        require_query(query)
        if not callable(batches):
            raise ConfigError("batches= is a function here: of a list of ids it yields (ids, batch) of those samples.")
        if list(scores.query_ids) != list(query.data_ids):
            raise MismatchError("scores and query hold different questions: pass both in the same order.")
        candidates = [[record.data_id for record in ranked] for ranked in scores.top(top)]
        wanted = list(dict.fromkeys(i for ids in candidates for i in ids))
        scoring = self.score(query, **options)
        for ids, batch in batches(wanted):
            with scoring(data_id=ids):
                loss(batch).backward()
        return scoring.scores().among(candidates)

    def solvers(self, curvature: Curvature) -> dict[str, Diagonal] | dict[str, Identity]:
        """Return the inverse curvature of every layer: {name: solver}, kept for the next call."""
        if curvature.plain:
            return {name: Identity() for name in self.layers}
        if curvature not in self._solvers:
            self._solvers = {curvature: solvers(self._require_store(), self._eigenbases(), curvature)}
        return self._solvers[curvature]

    def _require_whole(self, query: Query) -> None:
        self._require_layers(query)
        fitted = self._require_store().parameters
        if fitted and query.parameters and fitted != query.parameters:
            warnings.warn(
                "the query was made with other parameter values than the factors were fitted with: load those first.",
                CheckpointWarning,
                stacklevel=3,
            )

    def _require_layers(self, query: Query) -> None:
        require_query(query)
        if query.fingerprint != self.fingerprint:
            raise MismatchError(
                "the query does not hold whole gradients of these layers: make it with this object's query(...)."
            )
