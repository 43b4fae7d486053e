"""A run's model as EleutherAI's lm-evaluation-harness asks for one; needs the package `lm_eval`.

The model has no longest input: a context is read through the carried state. What requests have in common is read once:
the whole blocks of a context, after which all its continuations start from the same state. From there all rows stand at
the same place in their blocks, so they are one batch however long their contexts were; and as nothing is read after a
continuation, they are padded behind it.

As in training, a document follows the end of another one, unless documents were isolated or masked. Then nothing stands
before the first token, which is charged a uniform guess, as `bst eval` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

from bst_base.errors import UserError
from bst_base.settings import parse
from bst_dist.generation.decoding import Generation
from bst_dist.generation.rows import BLOCKS_AT_ONCE, Rows
from bst_dist.generation.sampling import SamplingConfig, without_text
from bst_dist.generation.text_stream import TextStream
from bst_dist.study.evaluation.prompts import begin_token
from bst_dist.study.evaluation.scoring import TOKENS_AT_ONCE, score
from bst_dist.study.evaluation.trained import Trained
from data_pipeline.format.tokenizer import Tokenizer

ROWS = 32
"""Texts written together."""
LOGITS_AT_ONCE = 1024
"""Tokens of a continuation whose logits are held together."""
OF_GENERATION = ("until", "max_gen_toks", "do_sample")
"""Settings of a task's generation beside those of the sampling."""


class Request(NamedTuple):
    """A continuation to score; `head` and `tail` are the inputs, cut after the context's last whole block."""

    number: int
    head: tuple[int, ...]
    tail: list[int]
    first: int
    """Where in the tail the input stands after which the continuation begins; -1: before it, with nothing read."""
    continuation: list[int]


class HarnessModel(TemplateLM):
    """Log-likelihoods, rolling log-likelihoods and generation of a run's model."""

    def __init__(self, trained: Trained, tokenizer: Tokenizer):
        super().__init__()
        self.trained, self.model, self.text = trained, trained.model.eval(), tokenizer
        self._begin = begin_token(trained.recipe, tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text that begins a document, or with `add_special_tokens` false of one that continues."""
        return ([] if add_special_tokens is False else self._begin) + self.text.encode(string).tolist()

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding would write it) of each continuation of a context.

        A continuation may change the tokens at the end of its context: "for" + "est" may be one token, "forest". What
        is scored is then ``ln p(tokens of both) - ln p(tokens of the context)``, given the tokens that both share, so
        choices are ranked as their whole texts are. The harness's own cut would leave such a continuation fewer tokens
        than it has, or none, and no tokens are certain.
        """
        scored: list[tuple[tuple[str, str], list[int], list[int]]] = []
        of_context: dict[int, int] = {}  # request -> the score of its context's tokens that the continuation changes
        for number, (context, continuation) in enumerate(request.args for request in requests):
            kept = context.rstrip()
            alone, both = self.tok_encode(kept) if context else self._begin, self.tok_encode(context + continuation)
            shared = _common_length(alone, both)
            scored.append(((context, continuation), both[:shared], both[shared:]))
            if shared < len(alone):
                of_context[number] = len(requests) + len(of_context)
        for number in of_context:
            (context, _), shared, _ = scored[number]
            scored.append((("", context), shared, self.tok_encode(context.rstrip())[len(shared) :]))
        found = self._loglikelihood_tokens(scored)
        values = [
            (value - found[of_context[number]][0] if number in of_context else value, greedy)
            for number, (value, greedy) in enumerate(found[: len(requests)])
        ]
        for request, value in zip(requests, values, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, value)
        return values

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token predicted from all before it in its text."""
        texts = _Texts([self.text.encode(request.args[0]) for request in requests])
        if not texts.lengths.all():
            raise UserError("a task has an empty text: there is nothing to predict in it")
        train = self.trained.recipe.train
        with tqdm(total=int(texts.lengths.sum()), desc="Scoring tokens of texts") as bar:
            scored = score(
                self.model, texts, texts.lengths, self.text.token_bytes, begin=self._begin[0] if self._begin else None,
                slice_length=train.sequence_length, precision=train.precision,
                progress=lambda tokens: bar.update(tokens - bar.n),
            )  # fmt: skip
        found = (-scored.nats).tolist()
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is what greedy decoding would write) of each continuation."""
        cut = [self._cut(number, *tokens) for number, (_, *tokens) in enumerate(requests)]
        found: dict[int, tuple[float, bool]] = {}
        cut.sort(key=lambda request: (len(request.head), request.head, len(request.tail)))
        with tqdm(total=len(cut), desc="Scoring continuations") as bar:
            for batch in _batches(cut, self.model.config.block):
                for request, value in zip(batch, self._score(batch), strict=True):
                    found[request.number] = value
                bar.update(len(batch))
        return [found[number] for number in range(len(requests))]

    def _cut(self, number: int, context: list[int], continuation: list[int]) -> Request:
        inputs, block = (context + continuation)[:-1], self.model.config.block
        head = max(0, len(context) - 1) // block * block
        return Request(number, tuple(inputs[:head]), inputs[head:], len(context) - 1 - head, continuation)

    def _score(self, batch: Sequence[Request]) -> list[tuple[float, bool]]:
        heads = list(dict.fromkeys(request.head for request in batch))
        rows = Rows(len(heads))
        width = max(1, *(len(request.tail) for request in batch))
        tails = torch.zeros(len(batch), width, dtype=torch.long)
        for row, request in zip(tails, batch, strict=True):
            row[: len(request.tail)] = torch.tensor(request.tail)
        device = self.model.embedding.weight.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.trained.recipe.train.precision == "bf16"):
            rows.read(self.model, [torch.tensor(head, dtype=torch.long) for head in heads])
            rows.select([heads.index(request.head) for request in batch])
            hidden = rows.read(self.model, list(tails), every=True)
        return [self._of_continuation(request, states) for request, states in zip(batch, hidden, strict=True)]

    def _of_continuation(self, request: Request, states: Tensor) -> tuple[float, bool]:
        """From the hidden states (width, D) of a request's tail."""
        targets = torch.tensor(request.continuation, dtype=torch.long, device=states.device)
        guessed = request.first < 0 and len(targets) > 0
        if guessed:
            targets = targets[1:]
        first = max(0, request.first)
        value, greedy = -guessed * math.log(self.text.vocab_size), not guessed
        for part, wanted in zip(states[first:].split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=False):
            logits = self.model.logits(part[: len(wanted)].float()).float()  # (n, V)
            value += float(logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).double().sum())
            greedy &= bool((logits.argmax(-1) == wanted).all())
        return value, greedy

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, greedily unless the task says otherwise."""
        prompts = {number: self.tok_encode(request.args[0]) for number, request in enumerate(requests)}
        if not all(prompts.values()):
            raise UserError("a task has an empty context: a model of documents that are not joined needs a beginning")
        alike: dict[str, list[int]] = {}
        for number in sorted(prompts, key=lambda number: len(prompts[number])):
            alike.setdefault(json.dumps(requests[number].args[1], sort_keys=True), []).append(number)
        found: dict[int, str] = {}
        with tqdm(total=len(requests), desc="Writing texts") as bar:
            for numbers in alike.values():
                settings = _settings(requests[numbers[0]].args[1])
                for first in range(0, len(numbers), ROWS):
                    part = numbers[first : first + ROWS]
                    found |= self._write({number: prompts[number] for number in part}, *settings)
                    bar.update(len(part))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[number])
        return [found[number] for number in range(len(requests))]

    def _write(
        self, prompts: dict[int, list[int]], sampling: SamplingConfig, stops: list[str], most: int
    ) -> dict[int, str]:
        """At most so many tokens after each prompt, up to the end of the document or the first of the stops."""
        never = without_text(self.model.config.vocab_size, self.text)
        generation = Generation(self.model, prompts, [(number, 0) for number in prompts], sampling, never)
        pieces: dict[int, list[str]] = {number: [] for number in prompts}
        streams = {number: TextStream(pieces[number].append, stops) for number in prompts}
        drawn = dict.fromkeys(prompts, 0)
        while generation.running:
            for number, _, token in generation.step():
                drawn[number] += 1
                if token != self.text.eos_id:
                    streams[number].add(self.text.bytes_of(token))
                if token == self.text.eos_id or streams[number].stopped or drawn[number] == most:
                    streams[number].close()
                    generation.end(number, 0)
        return {number: "".join(written) for number, written in pieces.items()}


class _Texts:
    """Documents in memory."""

    def __init__(self, texts: list[np.ndarray]):
        self._texts = texts
        self.lengths = np.array([len(text) for text in texts])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return self._texts[document][start:stop]


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _batches(requests: Sequence[Request], block: int) -> Iterator[list[Request]]:
    """Requests to score together: those of one context are neighbours, and no forward pass is larger than allowed."""
    batch: list[Request] = []
    heads: set[tuple[int, ...]] = set()
    width = 0
    for request in requests:
        of_head = min(len(request.head), BLOCKS_AT_ONCE * block)
        cost = max((len(batch) + 1) * max(width, len(request.tail)), len(heads | {request.head}) * of_head)
        if batch and cost > TOKENS_AT_ONCE:
            yield batch
            batch, heads, width = [], set(), 0
        batch.append(request)
        heads.add(request.head)
        width = max(width, len(request.tail))
    if batch:
        yield batch


def _settings(of_task: dict[str, Any]) -> tuple[SamplingConfig, list[str], int]:
    """How to draw, where to stop, and after how many tokens; raises UserError for a setting that is not known here."""
    settings = normalize_gen_kwargs(of_task)
    stops = [stop for stop in settings["until"] if stop]
    most = int(settings["max_gen_toks"])
    sampling = {"temperature": 0.0, "top_p": 1.0} | {
        name: value for name, value in settings.items() if name not in OF_GENERATION
    }
    return parse(SamplingConfig, sampling, where="the task's generation_kwargs"), stops, most
