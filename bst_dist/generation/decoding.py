"""Autoregressive generation from a model's state, one token at a time for each of several rows.

The cost of a token does not depend on the number of tokens before it: each layer's state is one window of keys and
values and the state of its SSM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bst_dist.generation.rows import Rows
from bst_dist.generation.sampling import SamplingConfig, draw, draws_of
from bst_dist.model.lm import LanguageModel


@dataclass
class _Row:
    """One sample of one prompt."""

    prompt: int
    sample: int
    draws: torch.Generator
    unread: list[int]
    """The rest of the prompt, or the token drawn last."""


class Generation:
    """Several samples of several prompts, generated together until `end` is called for each.

    Whole blocks of each prompt are read at once. All rows read the rest, at most one block, together: a row at the end
    of its prompt continues with the tokens it draws, while others still read theirs. So all rows are at the same place
    in their blocks, and a step is one forward pass. Rows still in their first block have shorter states and need a
    second forward pass.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Mapping[int, Sequence[int]],
        samples: Sequence[tuple[int, int]],
        sampling: SamplingConfig,
        never: Tensor | None = None,
    ) -> None:
        """
        Args:
            prompts: token ids by prompt number; at least one token each.
            samples: the samples to generate, (prompt number, sample number) each. The draws of a sample depend on these
                numbers and the seed only, not on other samples.
            sampling: how tokens are drawn.
            never: (V,) bool, ids that are never drawn.
        """
        if not all(prompts.values()):
            raise ValueError("no token to read: the logits are those after the last token")
        self.model = model.eval()
        self.sampling, self._never = sampling, never
        self._running = [
            _Row(prompt, sample, draws_of(sampling.seed, prompt, sample), list(prompts[prompt]))
            for prompt, sample in samples
        ]
        self._seen = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(self._running), model.config.vocab_size, dtype=torch.bool)
        self._rows = self._read_whole_blocks(prompts)

    @property
    def running(self) -> bool:
        """Whether any row is still generating."""
        return bool(self._running)

    @property
    def state_bytes(self) -> int:
        """Bytes of state that all rows carry from one token to the next."""
        return self._rows.state_bytes

    def step(self) -> list[tuple[int, int, int]]:
        """Read on, and draw a token for every row at the end of its prompt. Return (prompt, sample, token) for each.

        The list is empty while no row has reached the end of its prompt.
        """
        count = min(len(row.unread) for row in self._running)
        logits = self._read([row.unread[:count] for row in self._running])
        for row in self._running:
            del row.unread[:count]
        drawing = [place for place, row in enumerate(self._running) if not row.unread]
        seen = None if self._seen is None else self._seen[drawing]
        rows = [self._running[place] for place in drawing]
        tokens = draw(logits[drawing], self.sampling, [row.draws for row in rows], seen).tolist() if rows else []
        for row, token in zip(rows, tokens, strict=True):
            row.unread = [token]
        return [(row.prompt, row.sample, token) for row, token in zip(rows, tokens, strict=True)]

    def end(self, prompt: int, sample: int) -> None:
        """End this row."""
        kept = [place for place, row in enumerate(self._running) if (row.prompt, row.sample) != (prompt, sample)]
        self._running = [self._running[place] for place in kept]
        self._rows.select(kept)
        if self._seen is not None:
            self._seen = self._seen[kept]

    @torch.no_grad()
    def _read_whole_blocks(self, prompts: Mapping[int, Sequence[int]]) -> Rows:
        """Read the whole blocks of each prompt, once for all its samples, and leave at least one token unread."""
        block = self.model.config.block
        order = list(prompts)
        heads = [list(prompts[number][: (len(prompts[number]) - 1) // block * block]) for number in order]
        rows = Rows(len(order))
        rows.read(self.model, [torch.tensor(head, dtype=torch.long) for head in heads])
        origins = [order.index(row.prompt) for row in self._running]
        rows.select(origins)
        for place, (row, origin) in enumerate(zip(self._running, origins, strict=True)):
            del row.unread[: len(heads[origin])]
            if self._seen is not None:
                self._seen[place, heads[origin]] = True
        return rows

    @torch.no_grad()
    def _read(self, tokens: list[list[int]]) -> Tensor:
        """Read equally many tokens of each row. Return the logits of the next tokens, (B, V) in host memory."""
        ids = torch.tensor(tokens)
        if self._seen is not None:
            self._seen.scatter_(1, ids, True)
        logits = self.model.logits(torch.stack(self._rows.read(self.model, list(ids)))).float().cpu()
        return logits if self._never is None else logits.masked_fill(self._never, -torch.inf)
