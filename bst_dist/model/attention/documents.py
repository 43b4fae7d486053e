"""The document of each key of a window, and how attention hides the keys of other documents.

Shapes: B rows, l tokens of the slice, p positions before it, H heads, dh head width, W block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bst_dist.model.attention.tiles import HIDDEN
from bst_dist.model.document_mask import Borders, Starts
from bst_dist.parallel.sequence.past import Past


class Documents(NamedTuple):
    """The document that each key belongs to."""

    number: Tensor
    """(B, p + l) int32: the number of the key's document, never decreasing along a row."""
    kinds: int
    """Upper bound on the documents in one window. Sets how many binary digits of the numbers are compared."""
    begin: Tensor
    """(B, l) int32: the first key of each query's document."""


def documents_by(number: Tensor, kinds: int, length: int) -> Documents:
    """Return the `Documents` of keys with these document numbers (B, p + l). The last `length` keys have queries."""
    number = number.contiguous()
    begin = torch.searchsorted(number, number[:, number.shape[1] - length :].contiguous(), out_int32=True)
    return Documents(number, kinds, begin)


def documents_of(starts: Tensor, length: int, keys: int, window: int) -> Documents:
    """Return the document of each of p + l keys, from the blocks of the slice that begin one, (B, l / W).

    Only for windows of one block: all positions before the slice belong to the document that the slice begins in,
    unless its first block begins one.
    """
    block = length // starts.shape[1]
    number = F.pad(starts.cumsum(1, dtype=torch.int32).repeat_interleave(block, dim=1), (keys - length, 0))
    return documents_by(number, min(-(-window // block), starts.shape[1]) + 1, length)


def documents_further_back(starts: Starts, past: Past, length: int, keys: int, window: int) -> Documents:
    """Return the same as `documents_of`, when documents may also begin in the window before the slice.

    This is so for windows of several blocks, and for documents that begin at any token.

    The position in the stream where each token's document begins is left to the next call, like the keys.
    """
    starts = starts.begins if isinstance(starts, Borders) else starts
    block = length // starts.shape[1]
    places = past.position + block * torch.arange(starts.shape[1], device=starts.device)
    begin = torch.where(starts, places, -1).repeat_interleave(block, dim=1)  # -1: no document begins here
    begin = past.extend("documents", begin, before=window)
    begin = F.pad(begin, (keys - begin.shape[1], 0), value=-1).cummax(dim=1).values
    number = F.pad(begin.diff(dim=1) > 0, (1, 0)).cumsum(1, dtype=torch.int32)
    return documents_by(number, min(-(-window // block), keys) + 1, length)


def separate_documents(q: Tensor, k: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """Add channels that hide keys of other documents from each query, exactly and without a mask for each row.

    Two channels for each binary digit of a document's number. The query has a 1 in the channel of its own digit. There
    a key has 0 if its digit is the same, else -HIDDEN.
    """
    digits = torch.arange(max(1, (documents.kinds - 1).bit_length()), device=q.device)
    digit = (documents.number.unsqueeze(-1) >> digits) & 1  # (B, p + l, digits)
    digit = torch.cat((digit, 1 - digit), dim=-1)
    own = digit[:, k.shape[1] - q.shape[1] :]
    other = (1 - digit) * -int(HIDDEN)
    return torch.cat((q, _for_heads(own, q)), dim=-1), torch.cat((k, _for_heads(other, k)), dim=-1)


def _for_heads(channels: Tensor, like: Tensor) -> Tensor:
    return channels.to(like.dtype).unsqueeze(2).expand(-1, -1, like.shape[2], -1)
