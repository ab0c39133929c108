"""How a row lies in a shard: one codec for each kind of dtype. Pure, on tensors."""

from collections.abc import Sequence

from loghook.log.codec.base import FLOATS, Codec, FloatCodec
from loghook.log.codec.lowbit import BITS, LowBitCodec
from loghook.log.codec.lowrank import TERMS, LowRankCodec

_CODECS: dict[str, type[Codec]] = {
    **dict.fromkeys(FLOATS, FloatCodec),
    **dict.fromkeys(BITS, LowBitCodec),
    **dict.fromkeys(TERMS, LowRankCodec),
}
DTYPES = tuple(_CODECS)


def make_codec(dtype: str, shapes: Sequence[tuple[int, int]], rest: int) -> Codec:
    """Lay out rows of gradients (k_out, k_in) for each layer, and behind them ``rest`` values that are never coded."""
    return _CODECS[dtype](dtype, shapes, rest)
