"""Our side: run peers' programs on an exchange folder, in turn, each in a process of the peers' environment."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from peers.exchange import Options

BENCHMARKS = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("LOGHOOK_PEERS", BENCHMARKS.parent / ".peers")) / "bin" / "python"
OURS = "loghook"  # run by this interpreter, with the loghook that it imports
PEERS = ("kronfluence", "bergson", "dattri", "logix")


@dataclass(frozen=True)
class Outcome:
    """What a peer's program gave.

    Attributes:
        peer: its name, one of PEERS, or OURS.
        options: what it was asked.
        scores: (Q, N), or None where it logs only or could not run.
        about: "seconds" and "cpu_seconds" {stage: [s, ...]}, "peak_mb", "before_mb", "bytes_per_sample"; empty if it
            could not run.
        reason: why it could not run; empty if it could.
    """

    peer: str
    options: Options
    scores: np.ndarray | None
    about: dict[str, Any]
    reason: str = ""

    @property
    def seconds(self) -> float:
        """Seconds of all stages; the median turn of each if there were several. nan if it could not run."""
        return self._total("seconds")

    @property
    def cpu_seconds(self) -> float:
        """The same of processor time, all threads of the process together: less disturbed by a busy machine."""
        return self._total("cpu_seconds")

    def _total(self, clock: str) -> float:
        stages = self.about.get(clock)
        return float(sum(np.median(turns) for turns in stages.values())) if stages else float("nan")


def run(peer: str, folder: Path, options: Options, *, timeout: float = 3600) -> Outcome:
    """Run one peer once. A failure is not raised: the result says what the program said last."""
    python = Path(sys.executable) if peer == OURS else PYTHON
    if not python.exists():
        return Outcome(peer, options, None, {}, "not installed: make peers")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        command = [str(python), "-m", f"peers.{peer}_scores", str(folder), str(out)]
        command.append(json.dumps(dataclasses.asdict(options)))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
        paths = f"{BENCHMARKS}{os.pathsep}{BENCHMARKS.parent}" if peer == OURS else str(BENCHMARKS)
        environment = os.environ | {"PYTHONPATH": paths} | threads
        try:
            done = subprocess.run(
                command, env=environment, cwd=scratch, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return Outcome(peer, options, None, {}, f"stopped after {timeout:g} s")
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            return Outcome(peer, options, None, {}, said[-1].strip() if said else f"ended with {done.returncode}")
        kept = out.with_suffix(".safetensors")
        scores = safetensors.numpy.load_file(kept)["scores"] if kept.exists() else None
        return Outcome(peer, options, scores, json.loads(out.with_suffix(".json").read_text()))


def alternate(cases: Sequence[tuple[str, Options]], folder: Path, turns: int = 1) -> list[list[Outcome]]:
    """Run the cases in turn, forwards and backwards; the outcomes of each case. One that cannot run is not repeated."""
    outcomes: list[list[Outcome]] = [[] for _ in cases]
    for turn in range(turns):
        order = range(len(cases)) if turn % 2 == 0 else reversed(range(len(cases)))
        for i in order:
            if not (outcomes[i] and outcomes[i][-1].reason):
                outcomes[i].append(run(cases[i][0], folder, cases[i][1]))
                said = outcomes[i][-1].reason or f"{outcomes[i][-1].seconds:.3f} s"
                print(f"  {cases[i][0]}, {cases[i][1].method}: {said}", file=sys.stderr, flush=True)
    return outcomes
