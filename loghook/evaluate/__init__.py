"""How good scores are: judged by retraining and planted facts on plain arrays, tuned, and how far to rely on them."""

from loghook.evaluate.sweep import Setting, Sweep, sweep
from loghook.evaluate.trust import Trust, trust

__all__ = ["Setting", "Sweep", "Trust", "sweep", "trust"]
