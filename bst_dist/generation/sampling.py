"""Sampling of the next token from a model's logits.

The filters are applied one after the other, in the order of Hugging Face transformers: repetition penalty, temperature,
top-k, top-p, min-p. Each filter sees only the tokens that the filters before it have kept.
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
    """Divides the logits; 0: always take the most likely token."""
    top_k: int = Field(0, ge=0)
    """Draw only from this many most likely tokens; 0: from all."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Draw only from the most likely tokens whose probabilities sum to at least this (nucleus sampling, Holtzman et al.
    2020, arXiv 1904.09751); 1: from all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Draw only from tokens whose probability is at least this fraction of the highest one (Nguyen et al. 2024, arXiv
    2407.01082); 0: from all."""
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Logits of tokens that occurred before, also in the prompt, are divided by this if positive and multiplied if
    negative (Keskar et al. 2019, arXiv 1909.05858); 1: no penalty."""
    seed: int = Field(0, ge=0)
    """Seed of the draws; each prompt and sample has its own."""


def draws_of(seed: int, prompt: int, sample: int) -> torch.Generator:
    """Return the random generator of one row. It depends only on these three numbers."""
    (state,) = np.random.SeedSequence((seed, prompt, sample)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def draw(logits: Tensor, sampling: SamplingConfig, draws: Sequence[torch.Generator], seen: Tensor | None) -> Tensor:
    """Draw one id per row, (B,), from (B, V) logits in host memory.

    Args:
        draws: the random generator of each row.
        seen: (B, V) bool, ids that a row has read; None if there is no repetition penalty.
    """
    scores = filtered(logits.float(), sampling, seen)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    probabilities = torch.softmax(scores, dim=-1)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in zip(probabilities, draws, strict=True)])


def filtered(logits: Tensor, sampling: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """Return the logits after penalty and temperature, -inf for tokens that are filtered out: (B, V) -> (B, V)."""
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
    """Apply top-p. Tokens as likely as the least likely token that is kept are kept too."""
    probabilities = torch.softmax(logits, dim=-1)
    ordered = torch.from_numpy(np.sort(probabilities.numpy(), axis=-1)).flip(-1)  # many times faster than torch's sort
    before = ordered.cumsum(-1) - ordered  # 0 for the most likely, which is always kept
    last = (before < top_p).sum(-1, keepdim=True) - 1
    return logits.masked_fill(probabilities < ordered.gather(-1, last), -torch.inf)


def without_text(vocab_size: int, tokenizer: Tokenizer) -> Tensor:
    """Return the ids that cannot occur in a document, (V,) bool: all ids without text, except the end of a document.

    If the tokenizer has no text, they are the ids that the corpus does not have.
    """
    never = torch.ones(vocab_size, dtype=torch.bool)
    never[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.token_bytes == 0) & tokenizer.has_text
    never[tokenizer.eos_id] = False
    return never
