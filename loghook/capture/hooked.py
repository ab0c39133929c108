"""``Hooked``: layers of a model under inert hooks, one open block at a time, and queries through them.

``Asker``: those of a finished log, for queries only.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from loghook.capture.batch import Given, Ids, Mask, Segments, check_ids, check_masks, check_segments, unscaled
from loghook.capture.block import block, nothing_delivered, prepare
from loghook.capture.compiling import BLOCKS, unwatched_twins
from loghook.capture.config import Recipe
from loghook.capture.experts import ExpertProjection, watched
from loghook.capture.hook import Hook, do_nothing, make_hook, project_early
from loghook.capture.jobs import Block, Job, Result
from loghook.capture.layers import Layer
from loghook.capture.models import (
    drawn_masks,
    mixing_modules,
    named_modules,
    parameters_digest,
    refuse,
    unwrap,
    values_digest,
)
from loghook.capture.optimizer import bind
from loghook.capture.rows import Rows, Updates
from loghook.capture.select import Watch, find_logged, fits_record, select
from loghook.errors import ConfigError, DeliveryError, MismatchError, StateError, UnsupportedError, some, warn
from loghook.log.files import Sides, load_sides
from loghook.log.format import LayerSpec, Layout, Made, Manifest
from loghook.log.query import Query
from loghook.log.writer import finite_rows, not_finite
from loghook.project.projection import FITTED

Self = TypeVar("Self", bound="Hooked")


class Hooked:
    """Layers of a model under inert hooks, and queries through them."""

    _again = "go on with loghook.init(path, resume=True), or ask with log.attach(model)"  # once it was closed

    def __init__(self, recipe: Recipe) -> None:
        self._config = recipe
        self._asked = "plain" if recipe.gradient == "adam" else recipe.gradient  # what the rows of questions are of
        self._fitted: str | None = None  # checksum of a fitted projection that the layers have
        self._layers: list[Layer] = []
        # Held until ``close``: of a container that was made for watch() alone nobody else would know the BatchNorms.
        self._model: nn.Module | None = None
        self._mixing: list[tuple[str, nn.Module]] | None = None  # looked for when a block opens, and in each pass anew
        self._hooks = ExitStack()  # what ``close`` undoes
        self._names: tuple[str, ...] = ()
        self._open = False
        self._segmented = False  # whether a block had segments

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the watched layers, in row order."""
        return self._names

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """What is watched, layer by layer."""
        return tuple(layer.spec for layer in self._layers)

    @property
    def _made(self) -> Made:
        return Made(self.specs, self._config.projection, self._config.seed, self._fitted, self._config.gradient)

    def _select(self, model: nn.Module, watch: Watch) -> tuple[list[Layer], dict[str, Any]]:
        """Choose layers of a model; returns the coverage record as well."""
        if self._layers:
            raise StateError(
                "a model is watched already: one watch() call takes several patterns, and two models are watched as "
                "parts of one, nn.ModuleDict({'a': a, 'b': b})."
            )
        refuse(model)
        return select(model, watch, self._config)

    def _hook(self, model: nn.Module, layers: list[Layer], optimizer: Any = None, gradient: str = "plain") -> None:
        """Hook layers of a model, with the moments of ``optimizer`` for rows of this ``gradient``."""
        bind(model, layers, optimizer, gradient)
        for layer in layers:
            # Taps run inside FSDP2's own post-forward hook, whatever the order of wrapping. Among taps it is free, and
            # torch 2.11's compiler takes hooks that changed places for one another.
            others = any(not isinstance(hook, Hook) for hook in layer.module._forward_hooks.values())
            handle = layer.module.register_forward_hook(make_hook(layer), prepend=others, with_kwargs=True)
            self._hooks.callback(handle.remove)
            # On a GPU it would do nothing, and cost a call.
            if layer.adapter.shares_input and not any(p.is_cuda for p in layer.module.parameters()):
                handle = layer.module.register_forward_pre_hook(Hook(project_early, layer))
                self._hooks.callback(handle.remove)
        for module in unwatched_twins(model, layers):
            self._hooks.callback(module.register_forward_hook(Hook(do_nothing)).remove)
        BLOCKS.watch()
        self._hooks.callback(BLOCKS.unwatch)
        self._model, self._layers = unwrap(model), layers
        self._names = tuple(layer.name for layer in layers)
        self._layout = Layout(self.specs)

    def _project_with(self, sides: Sides, checksum: str, layers: Sequence[Layer]) -> None:
        for layer in layers:
            pair = sides.get(layer.name)
            if pair is None or [s.width for s in pair] != [s.width for s in layer.sides]:
                raise MismatchError(f"the fitted projection was made for other layers or widths than {layer.name!r}.")
            layer.input_side, layer.output_side = pair
        self._fitted = checksum

    def close(self) -> None:
        """Remove the hooks. The model is then as it was before ``watch``."""
        self._require_outside()
        self._hooks.close()
        self._layers, self._mixing, self._model = [], None, None

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def digest(self) -> str | None:
        """Digest of sampled parameter values of the watched model, or None where there is none, or they are sharded.

        One of the optimizer's moments follows after a hyphen where rows are made with them; see ``differ``.
        """
        digests = [None if self._model is None else parameters_digest(self._model)]
        if digests[0] and (moments := [t for layer in self._layers if layer.moments for t in layer.moments.held()]):
            digests.append(values_digest(moments))
        return "-".join(digest[:16] for digest in digests if digest) or None

    @contextmanager
    def _capture(
        self, size: int, given: Given, job: Job[Result], keep: np.ndarray | None = None
    ) -> Iterator[list[Result]]:
        """Open the layers for one batch; the list holds the job's result once the context ends without an error."""
        self._require_outside()
        if self._names and not self._layers:
            raise StateError(f"this run was closed: {self._again}.")
        self._require_watched()
        if self._mixing is None:
            if self._model is not None:
                refuse(self._model, watched=True)
                if dropouts := drawn_masks(self._model):
                    warn(
                        f"dropout is on ({some(dropouts)}) although nothing is trained, and rows are of the masks that "
                        "are drawn: call model.eval() first."
                    )
            for layer in self._layers:
                if not fits_record(layer.spec, layer.module, layer.adapter):
                    raise StateError(
                        f"layer {layer.name!r} has changed since it was watched: it was {layer.spec}, and is "
                        f"{layer.adapter.geometry(layer.module)}. Watch the model again with a new run."
                    )
            self._mixing = [] if self._model is None else mixing_modules(self._model)
        require_apart(self._mixing)
        self._segmented |= given.segments is not None
        documents = check_segments(given.segments, size, self._names, self._module_names)
        masks = check_masks(given.mask, size, self._names, self._module_names, documents)
        factor = unscaled(given.scale, given.scaler, None if job.sums else size)
        if job.projects:
            self._require_projection()
        kept = None if keep is None or keep.all() else torch.from_numpy(keep)
        experts = [layer.module.owner for layer in self._layers if isinstance(layer.module, ExpertProjection)]
        common = Block(job, factor, kept, seen={} if experts else None)
        opened = prepare(self._layers, size, common, masks, documents)
        self._open = True
        try:
            with block(opened, masks) as captured, watched(experts), _kept_apart(self._mixing):
                yield captured
        except RuntimeError as error:
            if "does not require grad" in str(error) and not any(layer.fired for layer in self._layers):
                raise DeliveryError(nothing_delivered(self._layers)) from error  # backward() failed for want of a graph
            raise
        finally:
            self._open = False

    def _module_names(self) -> Sequence[str]:
        return () if self._model is None else [name for name, _ in named_modules(self._model)]

    def _rows(self, *, logs: bool) -> Rows:
        """The job of a block that logs, or asks."""
        gradient = self._config.gradient if logs else self._asked
        return Rows(moments=logs) if gradient == "plain" else Updates(linear=gradient == "normalized")

    def _require_projection(self) -> None:
        projection = self._config.projection
        if projection in FITTED and self._fitted is None:
            raise StateError(
                f"projection={projection!r} is not fitted yet: go through `for _ in run.passes():`, whose first pass "
                "fits it; inside training, pass init(..., fitted=path of a run that has it)."
            )

    def _require_watched(self) -> None:
        if not self._layers:
            raise StateError("nothing is watched yet: call run.watch(model) first.")

    def _require_outside(self) -> None:
        if self._open:
            raise StateError("a block of this run is open already: leave it first; blocks and queries do not nest.")

    @contextmanager
    def query(
        self, data_id: Ids, *, mask: Mask | None = None, scale: float | Tensor = 1.0, segments: Segments | None = None
    ) -> Iterator[Query]:
        """Capture the rows of questions, to be scored against a log; nothing is written.

        Arguments are as in ``run(...)``; where ``segments`` is given, a question is what it says instead of a sample.

        Yields:
            A Query that holds its rows once the block ends.
        """
        ids = check_ids(data_id)
        query = Query(ids)
        with self._capture(len(ids), Given(mask, scale, None, segments), self._rows(logs=False)) as captured:
            yield query
        rows = captured[0].rows
        if not bool(finite_rows(rows).all()) and not bool(torch.isfinite(rows).all()):
            raise not_finite(ids, rows)
        rows = rows.cpu()
        query.fill(rows, self._made, self.digest())


class Asker(Hooked):
    """A model under the hooks of a log: asks questions, writes nothing.

    ``with log.attach(model) as asker`` or ``asker.close()`` removes the hooks, and so does letting go of it.
    """

    def __init__(self, model: nn.Module, manifest: Manifest, origin: Path, optimizer: Any = None) -> None:
        super().__init__(
            Recipe(projection=manifest.projection, rank=manifest.rank, seed=manifest.seed, gradient=manifest.gradient)
        )
        try:
            refuse(model)
            layers = find_logged(model, manifest, origin)
            if manifest.fitted is not None:
                self._project_with(load_sides(origin, manifest.fitted), manifest.fitted, layers)
            self._hook(model, layers, optimizer, self._asked)
            weakref.finalize(self, self._hooks.close)
        except ConfigError as error:
            raise MismatchError(f"{origin} cannot be asked with these arguments: {error}") from error


@contextmanager
def _kept_apart(mixing: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """Look again when a module runs, and at the end, where it may be compiled: a training step may call train()."""

    def look(module: nn.Module, _: Any) -> None:
        # A shallow copy has the same hooks.
        if module in names and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            require_apart([(names[module], module)])

    names = {module: name for name, module in mixing}
    with ExitStack() as hooks:
        for module in names:
            hooks.callback(module.register_forward_pre_hook(Hook(look)).remove)
        yield
        require_apart(mixing)


def require_apart(mixing: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise where a module mixes the samples of a batch."""
    for name, module in mixing:
        if module.training or module.running_mean is None:
            state = "is in training mode" if module.training else "keeps no running statistics"
            raise UnsupportedError(
                f"{type(module).__name__} {name!r} {state} and mixes the samples of a batch: call eval() on it, with "
                "running statistics, for the logging pass, or use GroupNorm or LayerNorm."
            )
