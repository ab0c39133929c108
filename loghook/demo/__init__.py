"""The main job on real text: fine-tune, log, attribute, and prove it by fine-tuning again without the proponents."""

from loghook.demo.config import DemoConfig
from loghook.demo.run import DemoResult, run_demo

__all__ = ["DemoConfig", "DemoResult", "run_demo"]
