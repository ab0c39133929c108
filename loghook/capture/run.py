"""``Run``: the user's handle around a training loop. It conducts capture and writer and holds no mathematics."""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from loghook.capture.batch import Blocks, Given, Ids, check_ids
from loghook.capture.config import Config
from loghook.capture.hooked import Hooked
from loghook.capture.models import describe_coverage, describe_trainable
from loghook.capture.passes import Gathering, Pass, decompose, fit_sides
from loghook.capture.plan import Plan, parse_size
from loghook.capture.select import FUSED_EXPERTS, HEAD, Watch, require_reduction
from loghook.capture.session import Session, pack
from loghook.capture.whole import Covariance
from loghook.errors import CheckpointWarning, LoghookError, MismatchError, StateError, warn
from loghook.factors import FactorStore
from loghook.log.disk import writing
from loghook.log.files import Sides, load_sides, save_sides
from loghook.log.folder import ARGUMENTS, check_same
from loghook.log.format import MANIFEST, SEVERAL, Manifest, differ
from loghook.log.writer import Writer
from loghook.processes import broadcast, process_rank, provenance, world_size
from loghook.project.projection import FITTED


class Run(Blocks, Hooked):
    """A run that logs; made by ``loghook.init``."""

    _config: Config

    def __init__(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        super().__init__(config)
        self.path = config.path
        self._session = Session(config, resume=resume, overwrite=overwrite)
        self._was_sealed = self._session.sealed  # the same script, started again, has nothing left to do
        self._coverage: dict[str, Any] = {}
        steps = self._session.repeats.committed.steps
        self._step = max(steps.values(), default=0)  # number of the next block
        self._fresh_step = steps.get(process_rank(), 0)  # the first that no earlier process committed
        self._pass: Pass | None = None
        self._completed: set[int] = set()  # passes that this process went through
        self._rehearsal: Plan | None = None  # a plan that measures blocks, which then write nothing
        self._id_type = ""
        self._closed = False
        self._elsewhere: str | None = None  # digest of values that the run did not begin with

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
        activations: str | None = None,
        output_gradients: str | None = None,
        optimizer: Any = None,
    ) -> None:
        """Put inert hooks on a model's layers and print what they cover.

        Args:
            model: the model; call this before ``torch.compile`` where you can. It is held until ``close()``.
            include: fnmatch patterns over whole module names; ``*`` selects linear and convolution layers.
            exclude: patterns left out; replaces the default, which yields where ``include`` names ``lm_head``.
            bias: whether a module's bias is logged as the last column.
            may_sleep: patterns of layers that may rightly not run in a batch; they then get zero rows.
            flattened: patterns of layers whose inputs have batch and tokens in one axis, batch first and as many
                tokens for each sample, as the shared experts of some mixture-of-experts models have.
            batch_dim: axis of samples in the layers' inputs: 0, or 1 for sequence-first models, whose inputs without
                tokens, (batch, features), are batch first all the same.
            activations: "mean" or "sum" over tokens logs each layer's input as well, unprojected.
            output_gradients: the same for the gradients of each layer's output.
            optimizer: for ``init(gradient="normalized")`` or ``"adam"``, the Adam (AdamW, ...) that trains the layers.
                Its moments are read when a block opens, so that they are those of the step or of the checkpoint.

        Raises:
            ConfigError: a pattern that matches nothing, a rank above every layer's width, or no such optimizer.
            UnsupportedError: a wrapper or layer for which rows cannot be exact.
            StateError: after ``finalize`` or the first block, or if a model is watched already. Two models that run in
                the same blocks are watched as parts of one: ``nn.ModuleDict({"a": a, "b": b})``.
            MismatchError: if a resumed run was begun with other arguments of ``init``.
        """
        self._require_outside()
        if not self._was_sealed or self._closed:
            self._require_open()
        if self._session.writer is not None:
            raise StateError("rows of a fixed set of layers are being logged: call watch() before the first block.")
        arguments = Watch(include, exclude, may_sleep, flattened, bias, batch_dim, activations, output_gradients)
        manifest = self._session.manifest
        if manifest is not None:
            check_same(manifest, self._config, ARGUMENTS)
        layers, coverage = self._select(model, arguments)
        require_reduction(layers, self._config)
        if manifest is not None and manifest.fitted is not None:
            self._project_with(load_sides(self.path, manifest.fitted), manifest.fitted, layers)
        self._hook(model, layers, optimizer, self._config.gradient)
        self._coverage = coverage
        experts = sum(item["parameters"] for item in coverage["not_covered"] if item["reason"] == FUSED_EXPERTS)
        if experts:
            warn(
                f"fused experts with {experts / coverage['total']:.0%} of the parameters are not covered: pass watch("
                "..., include=['*', '*experts*']) to log a row for every expert.",
            )
        if process_rank() == 0:
            print(describe_coverage(len(self.layers), coverage) + describe_trainable(model, self.layers))
            row_bytes = self._layout.codec(self._config.dtype).row_bytes
            print(f"  {self._layout.width:,} values a sample, {row_bytes:,} bytes")

    def plan(self, samples: int, tokens: int = 1, *, batch: int = 1, disk: str | float | None = None) -> Plan:
        """Say what logging will cost: disk, memory, arithmetic and, with measured blocks, time.

        ``print(run.plan(...))`` shows it. ``with run.plan(...) as plan:`` around a few ordinary blocks, outside
        ``passes()``, measures them: nothing is written, their samples can be logged afterwards, and ``plan.seconds``
        and ``plan.batch`` are filled in. A projection that is not fitted yet is replaced by zeros, which cost the same.

        Args:
            samples: how many there are.
            tokens: of a sample.
            batch: samples of a block, where none is measured.
            disk: what there is, such as "500 GB", to be told what fits.
        """
        self._require_watched()
        size = None if disk is None else parse_size(disk)
        return Plan(
            config=self._config, layers=tuple(self._layers), coverage=self._coverage, samples=samples, tokens=tokens,
            batch=batch, disk=size, _run=self,
        )  # fmt: skip

    def passes(self) -> Iterator[Pass]:
        """Yield one pass over the data, or as many as the projection and statistics need.

        Inside, each data_id is kept once, so that a sampler which repeats samples to fill up a batch does no harm.
        On a resumed run, passes that were completed are skipped.
        """
        self._require_watched()
        if self._rehearsal is not None:
            raise StateError("a plan is being measured: run a few blocks inside it, without passes().")
        if self._was_sealed and process_rank() == 0:
            print(f"{self.path} is finished: nothing is logged. `loghook append {self.path}` opens it for more data.")
        done = self._session.passes_done()
        fits = self._config.projection in FITTED
        if fits and self._config.fitted is not None:
            self._require_projection()
        if not self._was_sealed:
            self._require_open()
        last = int(fits)  # index of the pass that logs
        if last in self._completed:
            raise StateError(
                "the passes of this run are over: put the epochs inside `for _ in run.passes():`, or log without it."
            )
        if last in done and process_rank() == 0:
            print(f"{self.path}: an earlier process completed all passes. run.finalize() seals the run.")
        first = last
        if fits and not (self._fitted or self._session.sealed or 0 in done):
            first = 0
            yield from self._fitting_pass()
        if not (self._session.sealed or last in done):
            yield from self._logging_pass(last, second=first < last)

    def _fitting_pass(self) -> Iterator[Pass]:
        with self._under_way(Pass(0, "covariance")) as fitting:
            fitting._gathering = Gathering(self, Covariance(), self._rule)
            yield fitting
            fitting._warn_at_end()
            factors = decompose(self._layers, fitting._gathering.reduce())
            self._settle_projection(fit_sides(self._layers, factors, self._config))

    def _logging_pass(self, index: int, *, second: bool) -> Iterator[Pass]:
        """The pass that logs; ``second``: this process went through the data for another before."""
        committed = self._session.repeats.committed
        with self._under_way(Pass(index, "log")) as logging:
            if self._rule != "all":
                # The blocks of an interrupted pass have the numbers that they had.
                self._step = committed.starts.get(index, self._step)
            yield logging
            if second and not logging._largest and not committed.ids and self._id_type:
                raise StateError(
                    "the first pass saw batches and this one none: can the loader be gone through only once?"
                )
            logging._warn_at_end()
            if self._session.manifest is None:
                self._ready(self._id_type)  # with the others, on a rank that had no block
            if self._session.writer is not None:
                self._session.writer.settle()  # a pass that misses rows is not over
                self._session.writer.record({"pass_end": index})
            if self._elsewhere is not None and self._elsewhere == self.digest():
                self._warn_of_other_values()  # training would have moved them on
            committed.done.add(index)
            self._completed.add(index)

    @contextmanager
    def _under_way(self, started: Pass) -> Iterator[Pass]:
        self._pass, self._mixing = started, None
        try:
            yield started
        finally:
            self._pass = None

    @contextmanager
    def _block(self, data_id: Ids, given: Given) -> Iterator[None]:
        if self._rehearsal is not None:
            self._require_open()
            with self._capture(len(check_ids(data_id)), given, self._rows(logs=True)) as captured:
                yield
            self._rehearsal.count(captured[0].rows)
            return
        if self._was_sealed and self._rule == "first" and not self.pending(data_id):
            yield  # training goes once more through steps that a finished log has
            return
        self._require_open()
        if self._session.writer is not None:
            self._session.writer.check()
        ids = check_ids(data_id)
        self._id_type = type(ids[0]).__name__
        self._session.require_id_type(self._id_type)
        if self._pass is not None and self._pass._gathering is not None:
            with self._pass._gather(ids, given):
                yield
            return
        keep, repeats = self._session.repeats.keep(ids, self._rule)
        if keep.any():
            self._step = max(self._step, self._fresh_step)
        with self._capture(len(ids), given, self._rows(logs=True), keep) as captured:
            yield
        writer = self._ready(self._id_type)
        assert writer is not None
        self._session.warn_of_underflow(captured[0].rows[:, : self._layout.gradient_width])
        batch = pack(
            captured[0], ids, keep, dtype=writer.dtype, flag=given.scaler is not None, step=self._step,
            pass_index=self._pass.index if self._pass else -1,
            dropped=repeats if self._step >= self._fresh_step else 0,  # what is committed was counted then
        )  # fmt: skip
        writer.put(batch)
        if self._rule != "all":
            self._session.repeats.met(ids)
        if self._pass is not None:
            self._pass._count(len(ids), repeats)
        self._step += 1

    def pending(self, data_id: Ids) -> list[int | str]:
        """Say which samples a block would log now, so that a resumed loop need not compute the others.

        Those that are left out were logged before, by this process or by the interrupted one; where every row counts
        (outside ``passes()``, or ``on_repeat="all"``) all are pending. Processes answer each for itself, and differ
        after a kill: where they run a model together (FSDP, or any training), a batch may be skipped if it is empty on
        all of them.

        Args:
            data_id: ids, as ``run(...)`` takes them.
        """
        gathering = self._pass._gathering if self._pass else None
        repeats = gathering.repeats if gathering else self._session.repeats
        return repeats.pending(check_ids(data_id), self._rule)

    def finalize(self) -> None:
        """End logging and seal the run. Harmless when called again; queries still work afterwards.

        Every rank calls it, and it returns when rank 0, which waits for the others' last commit, has sealed the run.

        Raises:
            StateError: if nothing was logged, or ranks are missing after the timeout.
            NotFiniteError: of the last blocks, as in ``run(...)``; the run is still open then.
        """
        if self._session.sealed:
            return
        self._require_outside()
        self._require_open()
        manifest = self._session.manifest
        # An interrupted run may have nothing left to log, and a rank of several no batch.
        if self._ready(manifest.id_type if manifest else self._id_type) is None:
            raise StateError("nothing was logged, so nothing is to finalise: run the loop with `with run(...)` first.")
        self._session.end(self.digest if self._model else None)

    def close(self) -> None:
        """Remove the hooks and commit what was logged; without ``finalize`` the run can be resumed."""
        super().close()
        self._closed = True
        self._session.close()

    def _require_open(self) -> None:
        if self._session.sealed:
            raise StateError(
                f"{self.path} is finalised: open another run, or append to it (loghook append); run.query asks it."
            )
        if self._closed:
            raise StateError(f"this run was closed: go on with loghook.init({str(self.path)!r}, resume=True).")

    def __repr__(self) -> str:
        state = "finished" if self._session.sealed else "closed" if self._closed else "open"
        return f"Run({str(self.path)!r}, {len(self.layers)} layers, {self._step} blocks, {state})"

    def __exit__(self, *raised: object) -> None:
        """Close; an error on the way out never hides the one that is being raised."""
        try:
            self.close()
        except LoghookError:
            if raised[0] is None:
                raise

    @property
    def _rule(self) -> str:
        """What happens to an id that comes again, here and now."""
        return self._session.rule or ("first" if self._pass is not None else "all")

    def _settle_projection(self, sides: Sides) -> None:
        """Keep a fitted projection in the run's folder, where from then on all ranks and later processes find it."""
        checksum = None
        if process_rank() == 0:
            with writing(self.path):
                checksum = save_sides(self.path, sides)
        checksum, id_type = broadcast((checksum, self._id_type))
        self._project_with(load_sides(self.path, checksum), checksum, self._layers)
        if id_type:  # known after a pass; then the projection is committed with the manifest
            self._ready(id_type)

    def _require_projection(self) -> None:
        """Take the projection that another run fitted, or make one from factors, where the user named them."""
        if self._rehearsal is not None:
            return  # place-holders have its shape
        source = self._config.fitted
        if source is None or self._fitted is not None:
            return super()._require_projection()
        if (source / MANIFEST).exists():
            other = Manifest.load(source)
            mine = {key: getattr(self._config, key) for key in ("projection", "rank", "seed", "whitening")}
            theirs = {key: getattr(other, key) for key in mine}
            if other.fitted is None or theirs != mine:
                raise MismatchError(
                    f"fitted={str(source)!r} has {_named(theirs)}, where this run has {_named(mine)}: take its "
                    "arguments."
                )
            self._settle_projection(load_sides(source, other.fitted))
        else:
            factors = FactorStore.load(source).factors()
            self._settle_projection(fit_sides(self._layers, factors, self._config))

    def _ready(self, id_type: str) -> Writer | None:
        """Return the writer, opening it (and the manifest) at the first block, or None before any rank's first."""
        if self._session.writer is not None:
            return self._session.writer
        old = fresh = self._session.manifest
        if old is None:
            if not self._layers:
                return None
            self._require_projection()  # a rank without a block has none yet
        if old is None or self._layers:
            c, plain = self._config, self._config.gradient == "plain"
            fresh = Manifest(
                run_id=old.run_id if old else uuid.uuid4().hex, projection=c.projection,
                rank=c.rank if isinstance(c.rank, int) else dict(c.rank), seed=c.seed, dtype=c.dtype, layers=self.specs,
                coverage=self._coverage, id_type=id_type or "int", on_repeat=c.on_repeat, world_size=world_size(),
                provenance=provenance(), parameters={"first": self.digest()}, fitted=self._fitted, fidelity=c.fidelity,
                gradient=c.gradient, whitening=c.whitening,
                no_statistics=None if plain else f"its rows are of gradient={c.gradient!r}",
            )  # fmt: skip
        assert fresh is not None
        writer = self._session.open(fresh, begun=bool(id_type))
        now, was = fresh.parameters["first"], old.parameters.get("first") if old else None
        if self._pass is not None and differ(now, was):
            if self._model is not None and any(p.requires_grad for p in self._model.parameters()):
                self._elsewhere = now  # right in training, which moves them; the end of the pass shows it
            else:
                self._warn_of_other_values()
        return writer

    def _warn_of_other_values(self) -> None:
        """Say that rows of a pass are gradients at several points, and let the log remember it."""
        self._elsewhere, manifest = None, self._session.manifest
        assert manifest is not None
        manifest.parameters["last"] = SEVERAL
        if process_rank() == 0:
            with writing(self.path):
                manifest.save(self.path)
        warn(
            f"{self.path} was begun with other parameter values than it goes on with (or moments of the optimizer), "
            "and nothing trains them here. Rows from here on are of these values, and stay: stop, and start again with "
            "overwrite=True, or load the checkpoint that the run began with before it logs any.",
            CheckpointWarning,
        )


def _named(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items() if value is not None)
