"""How the next token is drawn from a model's logits.

The filters work one after the other in the order that Hugging Face transformers applies them in: repetition penalty,
temperature, top-k, top-p, min-p. Each looks at what the ones before it have left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bst_base.settings import Config
from data_pipeline.format.tokenizer import Tokenizer


class SamplingConfig(Config):
    """How the next token is drawn."""

    temperature: float = Field(0.8, ge=0, allow_inf_nan=False)
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = Field(0, ge=0)
    """Only so many of the likeliest tokens are drawn from; 0: all."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Only the likeliest tokens whose probabilities together reach this are drawn from (nucleus sampling, Holtzman et
    al. 2020, arXiv 1904.09751); 1: all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Only tokens at least this many times as likely as the likeliest are drawn from (Nguyen et al. 2024, arXiv
    2407.01082); 0: all."""
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Logits of tokens read before, the prompt's too, are divided by this where positive and multiplied where negative
    (Keskar et al. 2019, arXiv 1909.05858); 1: none."""
    seed: int = Field(0, ge=0)
    """Seed of the draws; each prompt and sample has its own."""


def draws_of(seed: int, prompt: int, sample: int) -> torch.Generator:
    """The random numbers of one row: they depend on nothing else than these three."""
    (state,) = np.random.SeedSequence((seed, prompt, sample)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def draw(logits: Tensor, sampling: SamplingConfig, draws: Sequence[torch.Generator], seen: Tensor | None) -> Tensor:
    """One id a row from (B, V) logits in the host's memory, (B,).

    Args:
        draws: the random numbers of each row.
        seen: (B, V) bool, ids that a row has read; None when the sampling does not ask for them.
    """
    scores = filtered(logits.float(), sampling, seen)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    probabilities = torch.softmax(scores, dim=-1)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in zip(probabilities, draws, strict=True)])


def filtered(logits: Tensor, sampling: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """Logits after penalty and temperature, -inf for what is not to be drawn: (B, V) -> (B, V)."""
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    if sampling.min_p > 0:
        probabilities = torch.softmax(logits, dim=-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Ties with the least likely token that is kept are kept, too."""
    probabilities = torch.softmax(logits, dim=-1)
    ordered = torch.from_numpy(np.sort(probabilities.numpy(), axis=-1)).flip(-1)  # many times as fast as torch's sort
    before = ordered.cumsum(-1) - ordered  # 0 for the likeliest, which is always kept
    last = (before < top_p).sum(-1, keepdim=True) - 1
    return logits.masked_fill(probabilities < ordered.gather(-1, last), -torch.inf)


def without_text(vocab_size: int, tokenizer: Tokenizer) -> Tensor:
    """(V,) bool, ids that stand for nothing in a document: all without text, but its end; where no id is known to
    stand for text, those that the corpus does not have."""
    never = torch.ones(vocab_size, dtype=torch.bool)
    never[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.token_bytes == 0) & tokenizer.has_text
    never[tokenizer.eos_id] = False
    return never
