"""How a row lies in a shard: one codec for each kind of dtype, found by ``make_codec``. Pure, on tensors."""

from collections.abc import Sequence

from loghook.log.codec.base import Codec, FloatCodec
from loghook.log.codec.lowbit import LowBitCodec
from loghook.log.codec.lowrank import LowRankCodec

KINDS: tuple[type[Codec], ...] = (FloatCodec, LowBitCodec, LowRankCodec)
DTYPES = tuple(name for kind in KINDS for name in kind.names)


def make_codec(name: str, shapes: Sequence[tuple[int, int]], rest: int) -> Codec:
    """Lay out rows in a dtype of ``DTYPES``.

    Args:
        name: the dtype.
        shapes: (k_out, k_in) of each layer's gradient, in row order.
        rest: how many other values a row has behind the gradients; they are never coded.
    """
    return next(kind for kind in KINDS if name in kind.names)(name, shapes, rest)
