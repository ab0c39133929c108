"""From what a block delivered to what the writer takes, with the copy off the device under way."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from loghook.capture.block import Captured
from loghook.log.writer import Batch, finite_rows, not_finite


def pack(
    captured: Captured, ids: Any, keep: np.ndarray, *, dtype: torch.dtype, flag: bool, pass_index: int, step: int
) -> Batch:
    """Turn what a block delivered into what the writer takes, starting the copy off the device.

    Args:
        captured: rows and moments of a block.
        ids: one for each row.
        keep: (B,) bool, False for repeats.
        dtype: in which the writer takes rows: that of the storage, or float32 for low bits.
        flag: leave out rows that are not finite instead of raising.
        pass_index: which pass the block belongs to, -1 outside passes.
        step: which block of the run it is.
    """
    rows = captured.rows.to(dtype)
    moments, flagged, finite = captured.moments, [], None
    if flag or rows.device.type == "cpu":
        finite = finite_rows(rows).cpu().numpy()
        if not flag and not finite.all():
            raise not_finite(ids, rows)
        if not finite.all():
            flagged = [i for i, good, kept in zip(ids, finite, keep, strict=True) if kept and not good]
            moments = None  # they are sums over the whole block and hold its infinities too
            keep = keep & finite
    kept = [i for i, use in zip(ids, keep, strict=True) if use]
    dropped = len(ids) - len(kept) - len(flagged)
    if not keep.all():
        rows = rows[torch.from_numpy(keep).to(rows.device)]
    ready = None
    if rows.device.type == "cuda":
        with torch.cuda.device(rows.device):  # an event is of the current device's stream, and the copy of this one's
            rows, moments = _to_pinned(rows), None if moments is None else _to_pinned(moments)
            ready = torch.cuda.Event(blocking=True)  # the writer waits asleep, and takes no core from the loop
            ready.record()
    elif rows.device.type != "cpu":
        rows, moments = rows.cpu(), None if moments is None else moments.cpu()
    return Batch(
        rows=rows, ids=kept, moments=moments, pass_index=pass_index, step=step, flagged=flagged, dropped=dropped,
        asleep=captured.asleep, ready=ready, checked=finite is not None,
    )  # fmt: skip


def _to_pinned(t: Tensor) -> Tensor:
    """Start copying to page-locked memory on the current stream, without waiting."""
    return torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True).copy_(t, non_blocking=True)
