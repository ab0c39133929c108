"""``Run``: the user's handle around a training loop. It conducts capture and writer and holds no mathematics."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from loghook.capture.batch import Ids, Mask, check_ids, unscaled
from loghook.capture.config import Config
from loghook.capture.coverage import describe_coverage
from loghook.capture.hooked import Hooked
from loghook.capture.pack import pack
from loghook.capture.passes import Pass
from loghook.capture.plan import Plan, parse_size
from loghook.capture.processes import process_rank, provenance, shared, shared_run_id, world_size
from loghook.capture.repeats import Repeats
from loghook.capture.select import FUSED_EXPERTS, Watch, patterns
from loghook.capture.sums import Sums, fit_sides
from loghook.capture.whole import Covariance
from loghook.errors import (
    BatchError,
    CheckpointWarning,
    LogExistsError,
    LoghookError,
    MismatchError,
    NotFiniteError,
    StateError,
    WriteError,
)
from loghook.log.codec import FLOATS
from loghook.log.disk import writing
from loghook.log.fitted import Sides, load_sides, save_sides
from loghook.log.folder import check_same, claim, seal
from loghook.log.format import MANIFEST, Layout, Manifest
from loghook.log.recovery import ranks_on_disk, read_back
from loghook.log.writer import Writer
from loghook.project.projection import FITTED
from loghook.statistics.store import FactorStore


class Run(Hooked):
    """A run that logs; made by ``loghook.init``."""

    def __init__(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """See ``loghook.init``."""
        super().__init__(config.projection, config.rank, config.seed)
        self.path = config.path
        self._config = config
        self._resumed = resume and (config.path / MANIFEST).exists()
        if process_rank() == 0:
            claim(config.path, resume=resume, overwrite=overwrite)
        self._coverage: dict[str, Any] = {"covered": 0, "total": 0, "not_covered": []}
        self._manifest: Manifest | None = None
        self._writer: Writer | None = None
        self._repeats = Repeats()
        self._step = self._fresh_step = 0  # number of the next block, and the first that no earlier process committed
        self._pass: Pass | None = None
        self._rehearsal: Plan | None = None  # a plan that measures blocks, which then write nothing
        self._sums = Sums()
        self._id_type = ""
        self._finalized = self._closed = False
        self._elsewhere: str | None = None  # digest of parameters that are not those which the run began with
        self._was_sealed = False  # by an earlier process: the same script, started again, has nothing left to do
        if self._resumed:
            self._read_back()

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
        activations: str | None = None,
        output_gradients: str | None = None,
    ) -> None:
        """Put inert hooks on a model's layers and print what they cover.

        Args:
            model: the model; call this before ``torch.compile`` where you can.
            include: fnmatch patterns over whole module names; ``*`` selects linear and convolution layers.
            exclude: patterns left out; replaces the default.
            bias: whether a module's bias is logged as the last column.
            may_sleep: patterns of layers that may rightly not run in a batch; they then get zero rows.
            flattened: patterns of layers whose inputs have batch and tokens in one axis, batch first, as the shared
                experts of some mixture-of-experts models have.
            batch_dim: axis of samples in the layers' inputs: 0, or 1 for sequence-first models.
            activations: "mean" or "sum" over tokens logs each layer's input as well, unprojected.
            output_gradients: the same for the gradients of each layer's output.

        Raises:
            ConfigError: a pattern that matches nothing, or a rank above every layer's width.
            UnsupportedError: a wrapper or layer for which rows cannot be exact.
            StateError: after ``finalize`` or the first block, or for a model watched before.
        """
        self._require_outside()
        if not self._was_sealed or self._closed:
            self._require_open()
        if self._writer is not None:
            raise StateError(
                "rows are being logged already, with a fixed set of layers: call watch() before the first block."
            )
        arguments = Watch(
            include=patterns(include),
            exclude=patterns(exclude),
            may_sleep=patterns(may_sleep),
            flattened=patterns(flattened),
            bias=bias,
            batch_dim=batch_dim,
            activations=activations,
            output_gradients=output_gradients,
        )
        if isinstance(model, nn.Module) and self._watches(model):
            raise StateError("this model is watched by this run already: one watch() call takes several patterns.")
        coverage = self._hook(model, arguments, check_rank=True)
        if self._manifest is not None and self._manifest.fitted is not None:
            self._project_with(load_sides(self.path, self._manifest.fitted), self._manifest.fitted)
        for key in ("covered", "total", "not_covered"):
            self._coverage[key] += coverage[key]
        experts = sum(item["parameters"] for item in coverage["not_covered"] if item["reason"] == FUSED_EXPERTS)
        if experts:
            warnings.warn(
                f"fused experts with {experts / coverage['total']:.0%} of the parameters are not covered: scores "
                "will not "
                "speak of them. Pass watch(..., include=['*', '*experts*']) to log a row for every expert.",
                stacklevel=2,
            )
        if process_rank() == 0:
            print(describe_coverage(len(self.layers), coverage))
            print(
                f"  {self._layout.width:,} values a sample, {self._layout.codec(self._config.dtype).row_bytes:,} bytes"
            )

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
        if not self._layers:
            raise StateError("nothing is watched yet: call run.watch(model) first.")
        size = None if disk is None else parse_size(disk)
        return Plan(
            config=self._config,
            layers=tuple(self._layers),
            coverage=self._coverage,
            samples=samples,
            tokens=tokens,
            batch=batch,
            disk=size,
            _run=self,
        )

    def passes(self) -> Iterator[Pass]:
        """Yield one pass over the data, or as many as the projection and statistics need.

        Inside, each data_id is kept once, so that a sampler which repeats samples to fill up a batch does no harm.
        On a resumed run, passes that were completed are skipped.
        """
        if not self._layers:
            raise StateError("nothing is watched yet: call run.watch(model) first.")
        if self._rehearsal is not None:
            raise StateError("a plan is being measured: run a few blocks inside it, without passes().")
        done = self._repeats.committed.done
        if self._resumed:
            done |= shared(done)  # all ranks skip a pass or none does: loops may hold collectives
        fits = self._projection in FITTED
        if fits and self._config.fitted is not None:
            self._require_projection()
        for current in (Pass(0, "covariance"), Pass(1, "log")) if fits else (Pass(0, "log"),):
            if current.index in done or self._finalized or (current.kind == "covariance" and self._fitted):
                continue
            self._pass = current
            if current.kind == "covariance":
                self._sums, counted, self._repeats = Sums(), self._repeats, Repeats()
                current._error = lambda: self._sums.error(self._layers)
                try:
                    yield current
                    self._settle_projection(fit_sides(self._layers, self._sums, self._config))
                finally:
                    self._pass, self._repeats = None, counted
                continue
            if self._rule != "all":
                # The blocks of an interrupted pass have the numbers that they had.
                self._step = self._repeats.committed.starts.get(current.index, self._step)
            try:
                yield current
                if self._writer is not None:
                    with self._heeding():
                        self._writer.settle()  # a pass that misses rows is not over
                        self._writer.put({"pass_end": current.index})
                if self._elsewhere is not None and self._elsewhere == self.digest():
                    self._warn_of_other_values()  # training would have moved them on
                done.add(current.index)
            finally:
                self._pass = None

    @contextmanager
    def __call__(
        self,
        data_id: Ids,
        *,
        mask: Mask | None = None,
        scale: float | Tensor = 1.0,
        scaler: Any = None,
        segments: Tensor | None = None,
    ) -> Iterator[None]:
        """Log the samples of one batch: run its forward and backward inside.

        Args:
            data_id: one int or str for each sample of the batch: a list, an array or a 1-D tensor.
            mask: (B, S), which tokens count in the statistics and in activation means; never changes a row. Where
                layers see other tokens than others do (encoder and decoder), a dict {fnmatch pattern of names: mask};
                the first pattern that fits a layer is its own, and one that none fits counts all tokens.
            scale: what rows are multiplied by: n if the loss is a mean over n items, so that a row is the gradient
                of its own summed loss.
            scaler: the GradScaler that scaled the loss; its scale is divided out and rows that are not finite are
                flagged and left out instead of raising.
            segments: (B, S) integers, for packed batches: each token's place in ``data_id``, -1 for none. A row is
                then a document (or whatever the numbers say) instead of a sample; ``loghook.segments`` makes it from
                ``position_ids`` or ``cu_seqlens``, or for single tokens.

        Raises:
            BatchError: ids, mask or scale that do not fit the batch.
            DeliveryError: a watched layer delivered nothing, or two backward passes ran.
            NotFiniteError: rows with infinities; on a device they are found in the background, and a later block, the
                end of the pass or ``finalize`` raises it, once. Its ``ids`` can be logged again.
            StateError: after ``finalize``, or inside another block.
        """
        self._require_open()
        if self._writer is not None:
            with self._heeding():
                self._writer.check()
        ids = check_ids(data_id)
        if self._rehearsal is not None:
            factor = unscaled(scale, scaler)
            with self._capture(
                len(ids), mask=mask, scale=factor, keep=None, moments=True, segments=segments
            ) as captured:
                yield
            self._rehearsal.count(captured[0].rows)
            return
        self._id_type = type(ids[0]).__name__
        if self._manifest is not None and self._manifest.id_type != type(ids[0]).__name__:
            raise BatchError(
                f"data_id is {type(ids[0]).__name__} here and was {self._manifest.id_type} before: use one type "
                "throughout the run."
            )
        keep, repeats = self._repeats.keep(ids, self._rule)
        if self._pass is not None and self._pass.kind == "covariance":
            factor = unscaled(scale, scaler)
            with self._capture(
                len(ids), mask=mask, scale=factor, keep=keep, moments=False, segments=segments, job=Covariance()
            ) as captured:
                yield
            self._sums.add(captured[0].results, int(keep.sum()))
            self._repeats.met(ids)
            return
        if keep.any():
            self._step = max(self._step, self._fresh_step)
        scale = unscaled(scale, scaler)
        with self._capture(len(ids), mask=mask, scale=scale, keep=keep, moments=True, segments=segments) as captured:
            yield
        writer = self._ready(type(ids[0]).__name__)
        batch = pack(
            captured[0],
            ids,
            keep,
            dtype=FLOATS.get(self._config.dtype, torch.float32),  # the writer makes low-bit rows of it
            flag=scaler is not None,
            pass_index=self._pass.index if self._pass else -1,
            step=self._step,
        )
        with self._heeding():
            # What an interrupted run has committed was counted there.
            writer.put(dataclasses.replace(batch, dropped=repeats if self._step >= self._fresh_step else 0))
        if self._rule != "all":
            self._repeats.met(ids)
        self._step += 1

    def pending(self, data_id: Ids) -> list[int | str]:
        """Say which samples a block would log now, so that a resumed loop need not compute the others.

        Those that are left out were logged before, by this process or by the interrupted one; where every row counts
        (outside ``passes()``, or ``on_repeat="all"``) all are pending.

        Args:
            data_id: ids, as ``run(...)`` takes them.
        """
        return self._repeats.pending(check_ids(data_id), self._rule)

    def finalize(self) -> None:
        """End logging and seal the run. Harmless when called again; queries still work afterwards.

        Every rank calls it; rank 0 waits for the others' last commit and then seals.

        Raises:
            StateError: if nothing was logged, or ranks are missing after the timeout.
            NotFiniteError: of the last blocks, as in ``run(...)``; the run is still open then.
        """
        if self._finalized:
            return
        self._require_outside()
        self._require_open()
        if self._manifest is None:
            raise StateError(
                "nothing was logged, so there is nothing to finalise: run the loop with `with run(...)` first."
            )
        writer = self._ready(self._manifest.id_type)  # an interrupted run may have nothing left to log
        try:
            with self._heeding():
                writer.settle()  # while this rank can still go on, and before the others are told that it ended
        except WriteError:
            self._writer = None
            writer.close()  # which raises it again and lets others write
            raise
        session = self._agree_to_end()
        self._writer = None
        try:
            writer.put({"end": session})
            writer.close(keep_lock=True)
            if process_rank() == 0:
                if self._models:
                    self._manifest.parameters["last"] = self.digest()
                with writing(self.path):
                    self._manifest.sealed = seal(self.path, self._manifest, session, world_size())
                    self._manifest.save(self.path)
        finally:
            writer.unlock()
        self._finalized = True

    @contextmanager
    def _heeding(self) -> Iterator[None]:
        """Let ids come again whose batches the writer rejects."""
        try:
            yield
        except NotFiniteError as error:
            self._repeats.forget(error.ids)
            raise

    def _agree_to_end(self) -> str:
        """Draw an id for this end, the same on all ranks, so that the end of an interrupted run is not taken for it."""
        try:
            return shared_run_id()
        except RuntimeError as error:
            raise StateError(
                f"another process is gone before it came to finalize() ({error}). What was committed is kept: start "
                "all of them again with resume=True."
            ) from error

    def close(self) -> None:
        """Remove the hooks and commit what was logged; without ``finalize`` the run can be resumed."""
        super().close()
        self._closed = True
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _require_open(self) -> None:
        if self._finalized:
            raise StateError("this run is finalised: open another run, or ask questions with run.query(...).")
        if self._closed:
            raise StateError(f"this run was closed: go on with loghook.init({str(self.path)!r}, resume=True).")

    def __enter__(self) -> "Run":
        """Use the run as a context manager that closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; an error on the way out never hides the one that is being raised."""
        try:
            self.close()
        except LoghookError:
            if error is None:
                raise

    @property
    def _rule(self) -> str:
        """What happens to an id that comes again, here and now."""
        return self._config.on_repeat or ("first" if self._pass is not None else "all")

    def _settle_projection(self, sides: Sides) -> None:
        """Keep a fitted projection in the run's folder, where from then on all ranks and later processes find it."""
        checksum = None
        if process_rank() == 0:
            with writing(self.path):
                checksum = save_sides(self.path, sides)
        checksum, id_type = shared((checksum, self._id_type))
        self._project_with(load_sides(self.path, checksum), checksum)
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
            if other.fitted is None or (other.projection, other.rank) != (self._projection, self._rank):
                raise MismatchError(
                    f"fitted={str(source)!r} has projection={other.projection!r} and rank={other.rank}, where this run "
                    f"has {self._projection!r} and {self._rank}: fit another, or take its arguments."
                )
            self._settle_projection(load_sides(source, other.fitted))
        else:
            factors = FactorStore.load(source).factors()
            self._settle_projection(fit_sides(self._layers, factors, self._config))

    def _ready(self, id_type: str) -> Writer:
        """Return the writer, opening it (and the manifest) at the first block."""
        if self._writer is not None:
            return self._writer
        manifest = self._manifest
        if manifest is None or self._layers:
            manifest = Manifest(
                run_id=self._manifest.run_id if self._manifest else shared_run_id(),
                projection=self._projection,
                rank=self._rank,
                seed=self._seed,
                dtype=self._config.dtype,
                layers=tuple(layer.spec for layer in self._layers),
                coverage=self._coverage,
                id_type=id_type,
                on_repeat=self._config.on_repeat,
                world_size=world_size(),
                provenance=provenance(),
                parameters={"first": self.digest()},
                fitted=self._fitted,
            )
        if self._manifest is not None:
            check_same(self._manifest, manifest)
            was, now = self._manifest.parameters.get("first"), manifest.parameters.get("first")
            if self._pass is not None and was and now and was != now:
                if any(p.requires_grad for ref in self._models if (model := ref()) for p in model.parameters()):
                    self._elsewhere = now  # right in training, which moves parameters; the end of the pass shows it
                else:
                    self._warn_of_other_values()
        layout = Layout(manifest.layers)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            writer = Writer(
                self.path,
                run_id=manifest.run_id,
                rank=process_rank(),
                codec=layout.codec(manifest.dtype),
                moments_width=layout.moments_width,
                shard_bytes=self._config.shard_bytes,
                commit_seconds=self._config.commit_seconds,
                generation=self._manifest.generation if self._manifest else 0,
            )
            try:
                # Under the lock: whoever comes second must not put a manifest of its own in place of the first one's.
                self._manifest = self._settle(manifest)
            except BaseException:
                writer.close()
                raise
        self._writer = writer
        return writer

    def _warn_of_other_values(self) -> None:
        self._elsewhere = None
        warnings.warn(
            f"{self.path} was begun with other parameter values than it goes on with, and nothing trains them here, "
            "but the rows of one pass should be gradients at one point: load the checkpoint that the run began with; "
            "if you mean these values, start again with overwrite=True.",
            CheckpointWarning,
            stacklevel=2,
        )

    def _settle(self, fresh: Manifest) -> Manifest:
        """Return the run's manifest, written by rank 0 if it is new or more ranks write now than before."""
        old = self._manifest
        if process_rank() != 0:
            return old or fresh
        if old is None and (self.path / MANIFEST).exists():
            raise LogExistsError(f"{self.path} was taken by another run meanwhile: choose another path.")
        writers = max(fresh.world_size, len(ranks_on_disk(self.path, fresh)))
        if old is None or old.world_size < writers:
            settled = dataclasses.replace(old or fresh, world_size=writers)
            settled.save(self.path)
            return settled
        return old

    def _read_back(self) -> None:
        """On resume: the manifest, which ids are committed and which passes are done."""
        self._manifest = Manifest.load(self.path)
        self._finalized = self._was_sealed = self._manifest.sealed is not None
        found = read_back(self.path, self._manifest, outside_too=self._config.on_repeat is not None)
        self._repeats.committed = found
        self._step = max(found.steps.values(), default=0)
        self._fresh_step = found.steps.get(process_rank(), 0)
