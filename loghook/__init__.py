"""loghook: log a projected gradient for every training sample through hooks, then ask which data made the model say it.

The public names are the ones below; everything else is private or a submodule's own.
"""

from loghook import evaluate, segments
from loghook.api import Log, fit, init, load
from loghook.capture.adapters import Adapter, Geometry, adapter
from loghook.capture.frozen import frozen
from loghook.capture.passes import Pass
from loghook.capture.run import Run
from loghook.check import CheckReport, check
from loghook.errors import LoghookError
from loghook.influence.scores import Record, Scores
from loghook.log.query import Query
from loghook.whole.candidates import Candidate
from loghook.whole.fit import Fit
from loghook.whole.scoring import Scoring
from loghook.whole.tune import Tuned, tune

__version__ = "0.1.0"
__all__ = [
    # logging
    "init", "Run", "Pass", "frozen", "segments", "check", "CheckReport",
    # whole gradients
    "fit", "Fit", "Scoring", "tune", "Tuned", "Candidate",
    # asking
    "load", "Log", "Query", "Scores", "Record", "evaluate",
    # extending
    "Adapter", "Geometry", "adapter",
    # errors: the rest are in loghook.errors
    "LoghookError",
]  # fmt: skip
