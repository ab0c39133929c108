"""Which tokens make a row, where a row is not a sample but a document or a token; see ``loghook.segments``."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loghook.errors import BatchError


class Documents(NamedTuple):
    """The checked form of ``segments``."""

    number_BS: Tensor  # (B, S) place in ``data_id`` of each token's document; -1 for none. Of whole entries (B, 1)
    index_DL: Tensor  # (D, L) places of each document's tokens among B * S; B * S for padding

    @property
    def entries(self) -> int:
        """Length of the batch's first axis, in which several documents may be one entry, or one several."""
        return self.number_BS.shape[0]

    def places(self, layer: str, shape: tuple[int, int]) -> Tensor:
        """``index_DL`` among the tokens of a layer that sees (B, S) of them."""
        (B, S), ours = shape, tuple(self.number_BS.shape)
        if shape == ours:
            return self.index_DL
        if ours == (B, 1):
            tokens = self.index_DL[:, :, None] * S + torch.arange(S, device=self.index_DL.device)
            return tokens.clamp(max=B * S).flatten(1)
        if ours == (S, B) and B == 1:  # all entries side by side, as patches of several images
            return self.index_DL
        raise BatchError(
            f"layer {layer!r} has (batch, tokens) = {shape} where segments has {ours}, and they cannot be told apart: "
            "exclude it, or pass segments for what it sees, or (batch, 1) where documents are whole entries (pairs)."
        )


@dataclass(eq=False)
class Tokens:
    """Which tokens of a layer make which row of a block, and how much each counts in moments and means."""

    # (B,), one for each row of the block. A tensor, since the compiler takes a number for fixed and compiles anew for
    # every other one.
    samples: Tensor
    documents: Documents | None  # where rows are not samples
    mask: Tensor | None  # what ``count`` returns
    keep: Tensor | None  # (B,) 0 for samples that were logged before, or None (with documents it is part of the mask)
    fitted: bool = False  # whether the mask had as many tokens as the layer

    @property
    def size(self) -> int:
        """How many rows there are."""
        return self.samples.shape[0]

    @property
    def entries(self) -> int:
        """Length of the batch's first axis."""
        return self.size if self.documents is None else self.documents.entries

    def weight(self, tokens: Tensor) -> Tensor | None:
        """What each token of a layer, (B, S, ...), counts in sums over tokens: (B, S), or None where all count once.

        A mask speaks of the model's tokens. A layer with as many tokens uses it as it is, one with a single token
        (a pooled head) counts samples that have any, and one with its own positions (patches) counts all of them. A
        mask of samples holds for all their tokens.
        """
        mask, keep = self.mask, self.keep
        if mask is None and keep is None:
            return None
        B, S = tokens.shape[:2]
        if mask is not None and mask.shape[1] == S:
            self._fit()
            return mask
        if mask is not None and mask.shape[1] == 1:
            return mask.expand(B, S) if mask.shape[0] == B else mask.view(B, S)
        if mask is not None and S == 1:
            return mask.amax(1, keepdim=True)
        return None if keep is None else keep[:, None].expand(B, S)

    def places(self, layer: str, tokens: Tensor) -> Tensor | None:
        """Which tokens of a layer, (B, S, ...), make a row, see ``Documents.places``; None: those of a sample."""
        if self.documents is None:
            return None
        B, S = tokens.shape[:2]
        return self.documents.places(layer, (B, S))

    def routed(self, layer: str, token_N: Tensor, total: int, seen: Collection[int]) -> tuple[Tensor, Tensor | None]:
        """Both for a layer that gets, as an expert, some of the batch's ``total`` tokens: the weights are (1, N).

        ``seen``: how many tokens layers around it have seen, if any did.
        """
        documents, mask, rows = self.documents, self.mask, self.entries
        weight: Tensor | None
        if seen and total not in seen:
            raise BatchError(
                f"layer {layer!r} is an expert of {total} tokens, where layers beside it see {max(seen)}: whose tokens "
                "those are is not known. Exclude these experts."
            )
        if total % rows:
            raise BatchError(
                f"layer {layer!r} got {total} tokens for {rows} entries of the batch: pass one id each, or segments=."
            )
        row_N = token_N // (total // rows)
        if documents is None:
            number_N = row_N
        elif documents.number_BS.shape[1] == 1:  # of whole entries
            number_N = documents.number_BS[row_N, 0]
        else:
            documents.places(layer, (rows, total // rows))  # which raises where these are other tokens
            number_N = documents.number_BS.flatten()[token_N]
        if mask is not None and mask.shape[1] == 1:  # of whole entries
            weight = mask[row_N, 0].unsqueeze(0)
        elif mask is not None and mask.numel() == total:
            self._fit()
            weight = mask.flatten()[token_N].unsqueeze(0)
        else:
            weight = None if self.keep is None else self.keep[number_N].unsqueeze(0)
        return list_tokens(number_N, self.size), weight

    def _fit(self) -> None:
        """Remember that the mask fitted; inside a compiled checkpoint nothing may be changed."""
        if not torch.compiler.is_compiling():
            self.fitted = True


def count(mask: Tensor | None, keep: Tensor | None, documents: Documents | None) -> Tensor | None:
    """What each token counts: (B, S), or (B, 1) for whole entries of the batch; None: once, in samples that are kept.

    Args:
        mask: as the user gave it, (B, S) or (B,), or None.
        keep: (B,) bool, which samples (or documents) are not logged before, or None for all.
        documents: which tokens make a row, or None: those of a sample. A token of no document does not count.
    """
    kept = None
    if documents is not None:
        number_BS = documents.number_BS
        kept = number_BS >= 0 if keep is None else torch.cat([keep, keep.new_zeros(1)])[number_BS]
    elif keep is not None:
        kept = keep[:, None]
    if mask is None:
        return None if documents is None else kept
    mask = mask[:, None] if mask.dim() == 1 else mask
    return mask if kept is None else mask * kept.to(mask.device)


def arrange(segments: Any, size: int, *, all_present: bool = True) -> Documents:
    """Check ``segments`` against the number of ids, each of which has tokens if all are present, and list them."""
    numbers = torch.as_tensor(segments)
    integers = not numbers.is_floating_point() and numbers.dtype != torch.bool
    if not integers or numbers.dim() != 2 or (all_present and not numbers.numel()):
        raise BatchError(
            f"segments is a {numbers.dtype} tensor of shape {tuple(numbers.shape)}: pass a (batch, tokens) integer "
            "tensor with each token's place in data_id, such as loghook.segments.from_position_ids(position_ids)."
        )
    numbers = numbers.cpu().long()
    flat = numbers.flatten()
    counts = torch.bincount(flat[flat >= 0], minlength=size)
    if len(counts) > size or (flat < -1).any() or (all_present and (counts == 0).any()):
        named = sorted(set(flat.tolist()) - {-1})
        raise BatchError(
            f"segments names {len(named)} documents ({named[:1]} to {named[-1:]}) in a block of {size} ids: number "
            f"them 0 to {size - 1}, each with a token or more (but in a dict by layer), and -1 for tokens of none."
        )
    return Documents(numbers, list_tokens(flat, size))


def list_tokens(number_N: Tensor, size: int) -> Tensor:
    """List the tokens of each of ``size`` documents, numbered from 0 (-1 for none): (size, L) places, N for padding.

    It is listed on the CPU, so that a device is waited for once.
    """
    device, number_N = number_N.device, number_N.cpu()
    order = torch.argsort(number_N, stable=True)
    order = order[int((number_N < 0).sum()) :]
    document = number_N[order]
    counts = torch.bincount(document, minlength=size)
    index = number_N.new_full((size, max(1, int(counts.max()))), len(number_N))
    starts = counts.cumsum(0) - counts
    index[document, torch.arange(len(order), device="cpu") - starts[document]] = order
    return index.to(device)
