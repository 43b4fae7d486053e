"""Looks inside the model at evaluations, for TensorBoard: context by layer, time scales, a sample of text.

All of it is read off: nothing is drawn from the generators of the run, and no weight, gradient or state of the
optimizer is touched, so a run is the same to the last bit with probes and without. Every rank takes part, because under
sequence parallelism each has a part of what is looked at, and under ZeRO-3 a part of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import sqrt
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from bst_dist.generation.decoding import Generation
from bst_dist.generation.sampling import SamplingConfig, without_text
from bst_dist.model.probes import ContextProbe, kernels, time_scales
from bst_dist.report.config import LogConfig
from bst_dist.report.metrics import Seen, Writer

if TYPE_CHECKING:
    from collections.abc import Callable

    from bst_dist.parallel.ranks import Ranks
    from data_pipeline.format.tokenizer import Tokenizer

PROMPT = 32
"""Tokens of the validation text that a sample continues."""


RANKS_A_STEP = 16
"""Ranks that may wait for one token of a sample in every step, on average: with 512 ranks there is one token in 32
steps, which is 0.3 % of the time when a token takes a tenth of a step."""


class Inspected(Protocol):
    """The engine, as far as it is looked into (`train.engine.Engine`)."""

    module: nn.Module
    stage: int
    """ZeRO's."""

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """While it is entered, these parameters are whole on every rank."""


class Probes:
    """Looks at the model while it is evaluated, and after."""

    def __init__(self, config: LogConfig, engine: Inspected, ranks: Ranks, writers: Sequence[Writer],
                 tokenizer: Tokenizer | None, prompt: Sequence[int], evaluated: tuple[int, int],
                 say: Callable[[str], None]) -> None:  # fmt: skip
        """`tokenizer` and `prompt`: of the samples; without a tokenizer there are none. `evaluated`: the steps between
        two evaluations, 0 for none but the last, and the steps of the run."""
        self.config, self.engine, self.ranks, self.writers = config, engine, ranks, writers
        self.tokenizer, self.prompt = tokenizer, list(prompt)[:PROMPT]
        self.sampling = bool(config.sample_tokens) and tokenizer is not None and tokenizer.has_text
        if self.sampling and engine.stage == 3:
            self.sampling = False
            say("no text samples under ZeRO-3 (log.sample_tokens): each token would gather all weights again")
        self._every, self._steps = evaluated
        self._context = ContextProbe(engine.module)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The first forward pass of what happens inside is looked at."""
        self._context = ContextProbe(self.engine.module)
        with self._context if self.config.probes else nullcontext():
            yield

    def look(self, step: int) -> None:
        """Hand on what was seen, and what the model's weights and its own text say; every rank must call it."""
        scalars, scales = (self._contexts(), self._time_scales()) if self.config.probes else ({}, {})
        if self.ranks.first:
            seen = Seen(step, scalars, scales, self._sample() if self.samples(step) else None)
            for writer in self.writers:
                writer.see(seen)

    def samples(self, step: int) -> bool:
        """Whether the evaluation after `step` steps has a sample of text.

        The first rank writes it while all others wait, so the more ranks, the fewer samples: beside the first and the
        last evaluation no more than one in as many steps as it has tokens, for every RANKS_A_STEP ranks.
        """
        if not self.sampling:
            return False
        apart = max(1, self.config.sample_tokens * self.ranks.world // RANKS_A_STEP)
        return step in (self._every, self._steps) or step // apart > (step - self._every) // apart

    def _contexts(self) -> dict[str, float]:
        """By layer, over all ranks."""
        layers = list(self._context.sums)
        if not layers:
            return {}
        found = {}
        totals = self.ranks.sum(torch.cat([self._context.sums[layer] for layer in layers]).tolist())
        for place, layer in enumerate(layers):
            own, cross, entropy, tokens = totals[4 * place : 4 * place + 4]
            found[f"context share/{_name(layer)}"] = sqrt(cross) / max(sqrt(own) + sqrt(cross), 1e-30)
            if tokens:
                found[f"context entropy/{_name(layer)}"] = entropy / tokens
        return found

    def _time_scales(self) -> dict[str, Tensor]:
        """By layer, decimal logarithms of tokens."""
        found = {}
        for layer, kernel in kernels(self.engine.module).items():
            with self.engine.gathered(list(kernel.parameters())):
                found[f"log10 time scales/{_name(layer)}"] = time_scales(kernel).log10().float().cpu()
        return found

    def _sample(self) -> str:
        """The model's continuation of the beginning of the validation text, as Markdown."""
        model, tokenizer = self.engine.module, self.tokenizer
        training, checkpoint = model.training, model.checkpoint
        model.checkpoint = None  # nothing is run again: there is no backward pass
        try:
            never = without_text(model.config.vocab_size, tokenizer)
            generation = Generation(model, {0: self.prompt}, [(0, 0)], SamplingConfig(), never)
            drawn: list[int] = []
            while len(drawn) < self.config.sample_tokens and tokenizer.eos_id not in drawn:
                drawn += [token for *_, token in generation.step()]
        finally:
            model.checkpoint = checkpoint
            model.train(training)
        ended = "; the document ended" if tokenizer.eos_id in drawn else ""
        return (
            f"**Read** ({len(self.prompt)} tokens)\n\n{_as_code(tokenizer.decode(self.prompt))}\n\n"
            f"**Written** ({len(drawn)} tokens{ended})\n\n{_as_code(tokenizer.decode(drawn))}"
        )


def _as_code(text: str) -> str:
    """Markdown that shows a text as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _name(layer: int) -> str:
    return f"layer {layer:02}"
