"""How good scores are: judged by retraining and planted facts on plain arrays, tuned, and how far to rely on them."""

from loghook.evaluate import controls, judges, lds, replay, retrain
from loghook.evaluate.sweep import Setting, Sweep, sweep
from loghook.evaluate.trust import Trust, trust

__all__ = ["Setting", "Sweep", "Trust", "controls", "judges", "lds", "replay", "retrain", "sweep", "trust"]
