"""``Asker``: a model under the hooks of a finished log, for questions only."""

from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

from torch import nn

from loghook.capture.hooked import Hooked
from loghook.capture.select import Watch
from loghook.errors import ConfigError, MismatchError
from loghook.log.files import load_sides
from loghook.log.format import LayerSpec, Manifest


class Asker(Hooked):
    """A model under the hooks of a log: asks questions, writes nothing."""

    def __init__(self, model: nn.Module, manifest: Manifest, origin: Path, optimizer: Any = None) -> None:
        """Hook the layers that the manifest of the log at ``origin`` names; see ``Log.attach``."""
        super().__init__(manifest.projection, manifest.rank, manifest.seed, manifest.gradient)
        try:
            for arguments, specs in _by_arguments(manifest.layers):
                names = tuple(escape(spec.name) for spec in specs)
                sleepers = tuple(escape(spec.name) for spec in specs if spec.may_sleep)
                flattened = tuple(escape(spec.name) for spec in specs if spec.flattened)
                watch = Watch(include=names, exclude=(), may_sleep=sleepers, flattened=flattened, **arguments)
                self._hook(model, watch, optimizer, self._asked)
            place = {spec.name: i for i, spec in enumerate(manifest.layers)}
            self._arrange(sorted(self._layers, key=lambda layer: place[layer.name]))
            for mine, theirs in zip(self._layers, manifest.layers, strict=True):
                if mine.spec != theirs:
                    raise MismatchError(f"{origin} has {theirs}, not {mine.spec}: attach the model that was logged.")
            if manifest.fitted is not None:
                self._project_with(load_sides(origin, manifest.fitted), manifest.fitted, self._layers)
        except ConfigError as error:
            self.close()
            raise MismatchError(f"the model does not have the layers of {origin}: {error}") from error
        except BaseException:
            self.close()
            raise


def _by_arguments(specs: Sequence[LayerSpec]) -> list[tuple[dict[str, Any], list[LayerSpec]]]:
    """Group layers by the arguments of ``watch`` that made them."""
    keys = ("bias", "batch_dim", "activations", "output_gradients")
    groups: dict[tuple[Any, ...], list[LayerSpec]] = {}
    for spec in specs:
        groups.setdefault(tuple(getattr(spec, key) for key in keys), []).append(spec)
    return [(dict(zip(keys, values, strict=True)), group) for values, group in groups.items()]
