"""How good scores are: judged by retraining (``lds``), tuned (``sweep``), and how far to rely on them (``trust``)."""

from loghook.evaluate.sweep import Setting, Sweep, sweep
from loghook.evaluate.trust import Trust, trust

__all__ = ["Setting", "Sweep", "Trust", "sweep", "trust"]
