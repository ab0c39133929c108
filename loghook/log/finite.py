"""Rows that hold infinities or not-a-numbers: found in one pass, named in the error."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loghook.errors import NotFiniteError


def finite_rows(rows: Tensor) -> Tensor:
    """Which rows (B, width) hold neither infinities nor not-a-numbers: (B,) bool, on the rows' device.

    A sum is finite only if its terms are, and takes one pass. On the CPU a suspect sum is looked at closely, since it
    may have overflowed by itself.
    """
    finite = torch.isfinite(rows.sum(1, dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32))
    if rows.device.type == "cpu" and not finite.all():
        finite = torch.isfinite(rows).all(1)
    return finite


def not_finite(ids: Sequence[int | str], rows: Tensor, *, late: bool = False) -> NotFiniteError:
    """Return the error for rows (B, width) that must not be written; ``late``: found after their block had ended."""
    bad = (~torch.isfinite(rows)).any(1).tolist()
    names = [i for i, wrong in zip(ids, bad, strict=True) if wrong]
    found = "nothing of this batch was written"
    if late:
        found = (
            f"nothing of their batch of {len(ids)} was written. This was found in the background: log the samples in "
            "the error's ids again, and the batch of the block that raises it now, which was not written either"
        )
    return NotFiniteError(
        f"the rows of {len(names)} samples are not finite (data_id "
        f"{', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}), so {found}. "
        "Look at the loss of these samples; if the storage dtype is too narrow for them choose bfloat16 or float32; "
        "under a GradScaler pass run(..., scaler=scaler), which flags such rows and leaves them out.",
        ids,
    )
