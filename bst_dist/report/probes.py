"""Probes of the model at evaluations, for TensorBoard: use of context by layer, time scales, a sample of text.

Probes only read: they use none of the run's random generators and change no weight, gradient or optimizer state. So a
run is bitwise equal with and without probes. Every rank takes part, because under sequence parallelism each holds a
part of the activations, and under ZeRO-3 a part of the weights.
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
from bst_dist.report.metrics import ProbeReport, Writer

if TYPE_CHECKING:
    from collections.abc import Callable

    from bst_dist.parallel.ranks import Ranks
    from data_pipeline.format.tokenizer import Tokenizer

PROMPT = 32
"""Number of tokens of the validation text that a sample continues."""


RANKS_A_STEP = 16
"""With this many ranks, one token of a sample per step is generated, on average. With 512 ranks it is one token in 32
steps: 0.3 % of the time if a token takes a tenth of a step."""


class Inspected(Protocol):
    """The part of the engine (`train.engine.Engine`) that probes use."""

    module: nn.Module
    stage: int
    """ZeRO stage."""

    def gathered_parameters(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Return a context manager inside which these parameters are whole on every rank."""


class Probes:
    """Probes the model during and after an evaluation."""

    def __init__(
        self,
        config: LogConfig,
        engine: Inspected,
        ranks: Ranks,
        writers: Sequence[Writer],
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        evaluated: tuple[int, int],
        say: Callable[[str], None],
    ) -> None:
        """`tokenizer`, `prompt`: for samples; no samples without a tokenizer. `evaluated`: the steps between two
        evaluations (0: only the last one), and the steps of the run."""
        self.config, self.engine, self.ranks, self.writers = config, engine, ranks, writers
        self.tokenizer = tokenizer
        self.prompt = list(prompt)[:PROMPT]
        self.sampling = bool(config.sample_tokens) and tokenizer is not None and tokenizer.has_text
        if self.sampling and engine.stage == 3:
            self.sampling = False
            say("no text samples under ZeRO-3 (log.sample_tokens): each token would gather all weights again")
        self._every, self._steps = evaluated
        self._context = ContextProbe(engine.module)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager that probes the first forward pass inside it."""
        self._context = ContextProbe(self.engine.module)
        with self._context if self.config.probes else nullcontext():
            yield

    def report(self, step: int) -> None:
        """Write the results of the probed forward pass, the time scales and a sample.

        Every rank must call it.
        """
        scalars, scales = (self._contexts(), self._time_scales()) if self.config.probes else ({}, {})
        if self.ranks.first:
            report = ProbeReport(step, scalars, scales, self._sample() if self.samples(step) else None)
            for writer in self.writers:
                writer.write_probes(report)

    def samples(self, step: int) -> bool:
        """Whether the evaluation after `step` steps has a sample of text.

        The first rank generates it while all others wait, so with more ranks there are fewer samples. The first and the
        last evaluation always have one. Otherwise there is at most one in (tokens of a sample * ranks / RANKS_A_STEP)
        steps.
        """
        if not self.sampling:
            return False
        apart = max(1, self.config.sample_tokens * self.ranks.world // RANKS_A_STEP)
        return step in (self._every, self._steps) or step // apart > (step - self._every) // apart

    def _contexts(self) -> dict[str, float]:
        """Return the share and the entropy of context attention by layer, over all ranks."""
        layers = list(self._context.sums)
        if not layers:
            return {}
        found = {}
        totals = self.ranks.all_reduce_numbers(torch.cat([self._context.sums[layer] for layer in layers]).tolist())
        for place, layer in enumerate(layers):
            own, cross, entropy, tokens = totals[4 * place : 4 * place + 4]
            found[f"context share/{_name(layer)}"] = sqrt(cross) / max(sqrt(own) + sqrt(cross), 1e-30)
            if tokens:
                found[f"context entropy/{_name(layer)}"] = entropy / tokens
        return found

    def _time_scales(self) -> dict[str, Tensor]:
        """Return the time scales of the SSMs by layer, as decimal logarithms of tokens."""
        found = {}
        for layer, kernel in kernels(self.engine.module).items():
            with self.engine.gathered_parameters(list(kernel.parameters())):
                found[f"log10 time scales/{_name(layer)}"] = time_scales(kernel).log10().float().cpu()
        return found

    def _sample(self) -> str:
        """Generate a continuation of the beginning of the validation text; return it as Markdown."""
        model, tokenizer = self.engine.module, self.tokenizer
        training, checkpoint = model.training, model.checkpoint
        model.checkpoint = None  # there is no backward pass, so nothing is recomputed
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
    """Return Markdown that shows a text unchanged."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _name(layer: int) -> str:
    return f"layer {layer:02}"
