"""Text from a model's carried state, one token at a time.

What a token costs does not depend on how many came before it: the state is one window of keys and values and the
SSM's state for each layer.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.past import State
from data_pipeline.config import Config

BLOCKS_AT_ONCE = 16
"""Blocks of a prompt in one forward pass, so that a long prompt needs no more memory than that."""


class SamplingConfig(Config):
    """How the next token is drawn."""

    temperature: float = Field(0.8, ge=0, allow_inf_nan=False)
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Only the likeliest tokens whose probabilities together reach this are drawn from (nucleus sampling, Holtzman et
    al. 2020, arXiv 1904.09751); 1: all."""
    seed: int = 0
    """Seed of the draws."""


class Decoder:
    """A model reading tokens in any portions, for one row; knows the logits of the next token after each."""

    def __init__(self, model: LanguageModel):
        self.model = model.eval()
        self.position = 0
        self._state: State | None = None

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Take in `ids` after all that was read before; the logits of the token that follows, (V,)."""
        if not ids:
            raise ValueError("nothing to read: the logits are those after a token")
        device = self.model.embedding.weight.device
        at = 0
        for length in portions(self.position, len(ids), self.model.config.block, self.model.config.ssm.chunk):
            past = self.model.carry(self._state, self.position)
            logits = self.model(torch.tensor([ids[at : at + length]], device=device), past=past)
            self._state = past.after
            self.position += length
            at += length
        return logits[0]


def portions(position: int, count: int, block: int, chunk: int) -> Iterator[int]:
    """Lengths of the slices in which `count` tokens from `position` on can be given to a model.

    A slice is whole blocks from a block's boundary, or lies within one block; there it is a multiple of the SSM's
    chunk or shorter than one.
    """
    chunk = min(chunk, block)
    while count:
        left = block - position % block
        if left == block and count >= block:
            length = min(count // block, BLOCKS_AT_ONCE) * block
        else:
            length = min(count, left)
            length -= length % chunk if length > chunk else 0
        yield length
        position += length
        count -= length


def generate(
    decoder: Decoder, prompt: Sequence[int], sampling: SamplingConfig, never: Tensor | None = None
) -> Iterator[int]:
    """Tokens that follow the prompt, without end.

    Args:
        decoder: what it has read already comes before the prompt.
        prompt: at least one token.
        sampling: how tokens are drawn; the same seed draws the same tokens.
        never: (V,) bool, ids that are not to be drawn.
    """
    draws = torch.Generator().manual_seed(sampling.seed)
    logits = decoder.read(prompt)
    while True:
        logits = logits.float().cpu()
        token = draw(logits if never is None else logits.masked_fill(never, -torch.inf), sampling, draws)
        yield token
        logits = decoder.read([token])


def draw(logits: Tensor, sampling: SamplingConfig, draws: torch.Generator) -> int:
    """One id from (V,) logits."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities  # the likeliest is always kept
    kept = probabilities * (before < sampling.top_p)
    return int(ids[torch.multinomial(kept, 1, generator=draws)])


class TextStream:
    """Text as its bytes arrive: a character whose bytes are spread over several tokens appears once it is whole."""

    def __init__(self, write: Callable[[str], object]):
        self._write = write
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, piece: bytes) -> None:
        """Write what `piece` completes."""
        if text := self._decoder.decode(piece):
            self._write(text)

    def close(self) -> None:
        """Write U+FFFD for a character that was left unfinished."""
        if text := self._decoder.decode(b"", final=True):
            self._write(text)


def printable(text: str) -> str:
    """The text with control characters shown as symbols, so that a model cannot command the terminal."""
    return text.translate(_VISIBLE)


_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
