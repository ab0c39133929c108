"""The door: ``init``, ``load`` and the ``Log`` that they lead to. The only place where capture and influence meet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from loghook.capture.config import Config
from loghook.capture.hooked import Asker
from loghook.capture.run import Run
from loghook.errors import CheckpointWarning, StateError, warn
from loghook.influence import engine
from loghook.influence import index as indexes
from loghook.influence.fidelity import Fidelity, check_sample, compare
from loghook.influence.index import Index
from loghook.influence.precondition import Metric
from loghook.influence.scores import Scores
from loghook.log import maintain
from loghook.log.disk import absolute
from loghook.log.files import load_sides
from loghook.log.format import SEVERAL, differ, draw_sides
from loghook.log.query import Query
from loghook.log.reader import Reader
from loghook.processes import on_cpu, on_first
from loghook.project.projection import FITTED
from loghook.whole.fit import Fit


def init(
    path: str | Path,
    rank: int | Mapping[str, int] = 64,
    *,
    projection: str = "random",
    whitening: float = 0.1,
    fitted: str | Path | None = None,
    seed: int = 0,
    dtype: str = "float32",
    resume: bool = False,
    overwrite: bool = False,
    on_repeat: str | None = None,
    shard_bytes: int = 256 * 2**20,
    commit_seconds: float = 30.0,
    fidelity: dict[str, Any] | None = None,
    gradient: str = "plain",
) -> Run:
    """Open a run that logs.

    Args:
        path: folder of the run.
        rank: each layer logs at most rank x rank values a sample; sides no wider than this are kept whole. A dict
            {fnmatch pattern of layer names: rank} gives layers ranks of their own, by the first pattern that fits.
        projection: "random"; "pca" or "whitened", which ``run.passes()`` fits in one more pass; or "none" (whole
            gradients). docs/methods.md has the formulas, docs/choosing.md says which to take.
        whitening: damping of each second moment that "whitened" inverts, times its mean eigenvalue.
        fitted: take the fitted projection of another run, or the factors of ``loghook.fit``, instead of a pass.
        seed: of the random projection.
        dtype: how rows are stored: "float64", "float32", "bfloat16" or "float16"; "int8", "int4" or "int1", whole
            numbers of so many bits with a scale for each layer and row; or "lowrank1", "lowrank2", "lowrank4" or
            "lowrank8", the best approximation of so many outer products. "int1" keeps most of whitened rows.
        resume: go on with an interrupted run at ``path``, or start one if there is none.
        overwrite: delete what is there.
        on_repeat: what happens to a data_id that comes again: "first" keeps the first row, "all" keeps every row,
            "error" raises. By default "first" inside ``passes()`` and "all" outside, where steps tell rows apart; a
            run that was begun with a rule keeps it.
        shard_bytes: size of a shard file, about.
        commit_seconds: at least how often rows are committed.
        fidelity: what ``loghook.tune`` measured of this choice; kept with the log and shown with its scores.
        gradient: what rows are of: "plain" gradients; "normalized", divided by the root of Adam's second moment
            (TrackStar); or "adam", the step that Adam would make of the sample alone (LESS). The last two want
            ``watch(..., optimizer=)``, and the methods kfac and ekfac have no meaning for them.

    Raises:
        LogExistsError: a run is there already and neither ``resume`` nor ``overwrite`` was given, or there are factors.
    """
    config = Config(
        path=absolute(path), rank=rank, projection=projection, whitening=whitening,
        fitted=None if fitted is None else absolute(fitted), seed=seed, dtype=dtype, on_repeat=on_repeat,
        shard_bytes=shard_bytes, commit_seconds=commit_seconds, fidelity=fidelity, gradient=gradient,
    )  # fmt: skip
    return Run(config, resume=resume, overwrite=overwrite)


def fit(path: str | Path, *, fisher: str = "empirical", resume: bool = False, overwrite: bool = False) -> Fit:
    """Open a folder for EK-FAC factors of whole gradients: no rows, two passes over the data, then questions.

    Args:
        path: folder of the factors.
        fisher: "empirical": gradients of the data's own labels; "true": of labels drawn from the model, which
            ``Pass.labels`` draws in your loop.
        resume: use or complete the factors at ``path``, if there are any; complete passes are skipped.
        overwrite: fit anew.

    Raises:
        LogExistsError: factors are there already and neither ``resume`` nor ``overwrite`` was given, or there is a log.
    """
    return Fit(absolute(path), fisher=fisher, resume=resume, overwrite=overwrite)


def load(path: str | Path) -> "Log":
    """Open a log for reading and scoring; needs no model.

    Raises:
        FileNotFoundError: if ``path`` holds no run; says what else it holds.
        VersionError: if a later format wrote it.
        CorruptLogError: if it does not match its own records.
    """
    return Log(path)


class Log(Reader):
    """A run's rows and what can be asked of them.

    Attributes:
        path, manifest: the run's folder, and its ``loghook.json``.
        layers, data_ids: names of the layers, and one id for each row, in the order of the rows.
        keys: ``pass_index``, ``step`` and ``rank`` of each row, int64 arrays (rows,).
        flagged: ids of samples left out because their rows were not finite.
        repeats: how many rows were left out because their id came before.
        unmeasured: how many rows are not in the statistics that kfac and ekfac use.
        asleep: {layer: rows that are zero because the layer, which may sleep, did not run}.
        finished, fingerprint: whether the run came to its end, and what identifies its rows.
    """

    def influence(
        self,
        query: Query,
        method: str = "ekfac",
        *,
        damping: float = 0.1,
        damping_abs: float | None = None,
        normalize: str | None = None,
        layers: Sequence[str] | None = None,
        top: int | None = None,
        per_layer: bool = False,
        query_dtype: str | None = None,
    ) -> Scores:
        """Score every row for every question: the sum over layers of <H^-1 G_query, G_row>.

        Under torch.distributed every process makes the call, reads its share of the log and gets all scores.

        Args:
            query: rows of the questions, from ``run.query`` or ``log.attach(model).query``.
            method: "dot": H = I. "cosine": dot at unit norm. "fisher": H = mean vec(G) vec(G)^T (LoGra's default).
                "kfac": H = S kron A from the streamed statistics. "ekfac": the same eigenbasis with eigenvalues
                corrected from the rows (George et al. 2018; Grosse et al. 2023). "shampoo": like ekfac, with the
                eigenbases of mean G G^T and mean G^T G (Gupta et al. 2018), which need the rows alone.
            damping: added to H, times the mean eigenvalue of the layer.
            damping_abs: added to H as it is, instead.
            normalize: "unit" divides by the roots of both sides' self-influence; "relatif" by that of the row only
                (RelatIF, Barshan et al. 2020). Over the whole row, in the method's own metric.
            layers: names of layers to score; all by default.
            top: keep only the best so many rows of each question, in flat memory.
            per_layer: also return the scores of every layer.
            query_dtype: None for questions in full precision. "int1", for a log of that dtype: after preconditioning
                keep only signs and a scale for each layer, as in the rows; faster and less exact (docs/choosing.md).

        Returns:
            Scores: float32 (queries, rows). The same call gives the same numbers.

        Raises:
            MismatchError: if the query was made with other layers or another projection.
            ConfigError: for an argument that is not among those above, scores that are not finite, or an empty log.
            StateError: for kfac and ekfac, if the log has no statistics: after maintenance, or of other gradients.

        Warns:
            UnfinishedWarning: once for an open log, if its run is not finished, so that rows may be missing.
            CheckpointWarning: if the query was made with other parameter values than the log ended with.
        """
        metric = Metric(method=method, damping=damping, damping_abs=damping_abs, normalize=normalize)
        return engine.influence(
            self, query, metric, layers=layers, top=top, per_layer=per_layer, query_dtype=query_dtype
        )

    def self_influence(
        self,
        method: str = "ekfac",
        *,
        damping: float = 0.1,
        damping_abs: float | None = None,
        layers: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Influence of each row on itself, <H^-1 G, G>: float32 (rows,). Large for mislabelled or unusual samples.

        Arguments are as in ``influence``; "cosine" has that of "dot".
        """
        metric = Metric(method=method, damping=damping, damping_abs=damping_abs)
        return engine.self_influence(self, metric, layers)

    @on_cpu
    def projection(self, layer: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What a layer's gradients G were multiplied by: rows are ``P_out @ G @ P_in.T``.

        Returns:
            P_out (k_out, out_features) and P_in (k_in, in_features), with one column more for the bias where there is
            one; float64. None for a side that is kept whole.

        Raises:
            StateError: if the projection is not fitted yet.
        """
        spec, _ = self.layout.find(layer)
        m = self.manifest
        if m.fitted is None and m.projection in FITTED:
            raise StateError(f"{self.path}: the {m.projection} projection is not fitted yet.")
        sides = load_sides(self.path, m.fitted) if m.fitted else draw_sides([spec], m.projection, m.seed)
        inputs, outputs = sides[layer]
        p_out, p_in = (None if s.matrix is None else s.matrix.double().numpy() * s.gain for s in (outputs, inputs))
        return p_out, p_in

    def compress(self, path: str | Path, dtype: str = "int8", *, queries: int = 16, seed: int = 0) -> Fidelity:
        """Write a finished log again in a smaller dtype, and say what is left of its scores; this log stays.

        Under torch.distributed every process makes the call.

        Args:
            path: folder of the new run.
            dtype: how its rows are stored, as in ``init``.
            queries: how many rows, drawn at random, are asked as questions of both logs.
            seed: of the draw.

        Raises:
            LogExistsError: if ``path`` exists.
            StateError: if this log is not finished.
            NotFiniteError: for rows that the dtype cannot hold.
        """
        check_sample(self, queries)
        on_first(lambda: maintain.compress(self.path, path, dtype))
        return compare(self, Reader(path), queries=queries, seed=seed)

    @on_cpu
    def index(self, dimensions: int = 1024, factory: str = "HNSW32", *, sample: int = 2048, seed: int = 0) -> Index:
        """Index the rows, reduced to few dimensions, so that a question need not scan the log; needs the faiss extra.

        The dimensions are the leading right singular vectors of a sample of rows. Prints which share of the best rows
        ``Index.search`` finds for some of the log's rows as questions. docs/choosing.md says when it pays.

        Args:
            dimensions: of the reduced rows; fewer where the sample has fewer.
            factory: of the faiss index, of inner products.
            sample: how many rows, drawn at random, the dimensions are found from; they are held in memory.
            seed: of the draw.
        """
        return indexes.build(self, dimensions, factory, sample, seed)

    def load_index(self, path: str | Path) -> Index:
        """Read an index of this log that ``Index.save`` wrote.

        Raises:
            MismatchError: if the log's rows are not those that were indexed.
            CorruptLogError: if the file is something else.
        """
        return indexes.load(self, path)

    def attach(self, model: nn.Module, optimizer: Any = None) -> Asker:
        """Put this log's hooks on a model, for queries in a new process.

        Args:
            model: the model whose rows were logged, with its parameters as they were then.
            optimizer: for a log of ``gradient="normalized"``, the optimizer with its moments as they were then.
                Questions to a log of ``gradient="adam"`` are plain gradients and need none.

        Raises:
            MismatchError: if the model's layers are not those of the log.
        """
        asker = Asker(model, self.manifest, self.path, optimizer)
        if self.manifest.values == SEVERAL:
            warn("the log holds rows of several parameter values, and no model fits all of them.", CheckpointWarning)
        elif differ(asker.digest(), self.manifest.values):
            warn(
                "the model's parameter values, or the optimizer's moments, are not those that the log ended with: load "
                "that checkpoint first.",
                CheckpointWarning,
            )
        return asker
