"""A run's model behind the interface of EleutherAI's lm-evaluation-harness; needs the package `lm_eval`.

The model has no maximum input length, because a context is read with carried state. The whole blocks of a context are
read once, and all its continuations start from the same state. From there on all rows are at a block boundary, so rows
with contexts of different lengths form one batch. Padding follows the continuation, where it has no effect.

As in training, a document follows the end of another document, unless documents were isolated or masked. In that case
no token precedes the first one, which is scored as a uniform guess, as in `bst eval`.
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
"""Number of texts generated in one batch."""
LOGITS_AT_ONCE = 1024
"""Number of tokens of a continuation whose logits are in memory at once."""
OF_GENERATION = ("until", "max_gen_toks", "do_sample")
"""Generation settings of a task that are not settings of `SamplingConfig`."""


class Request(NamedTuple):
    """A continuation to score. `head` and `tail` are the inputs before and after the context's last block boundary."""

    number: int
    head: tuple[int, ...]
    tail: list[int]
    first: int
    """Index in `tail` of the last input before the continuation; -1 if there is none (empty context)."""
    continuation: list[int]


class HarnessModel(TemplateLM):
    """The harness's interface to a run's model: log-likelihoods, rolling log-likelihoods and generation."""

    def __init__(self, trained: Trained, tokenizer: Tokenizer):
        super().__init__()
        self.trained, self.model, self.text = trained, trained.model.eval(), tokenizer
        self._begin = begin_token(trained.recipe, tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text at the start of a document; with `add_special_tokens` False, inside of one."""
        return ([] if add_special_tokens is False else self._begin) + self.text.encode(string).tolist()

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy decoding would write it) of each continuation of a context.

        A continuation may change the last tokens of its context: "for" + "est" may be one token, "forest". The score is
        then ``ln p(tokens of both) - ln p(tokens of the context)``, given the tokens that both share. So choices are
        ranked like their whole texts. The harness's own split would leave too few tokens for such a continuation, or
        none at all, which would then count as certain.
        """
        scored: list[tuple[tuple[str, str], list[int], list[int]]] = []
        of_context: dict[int, int] = {}  # request -> index in `found` of the score of the changed tokens of its context
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
        """Return the log-likelihoods of whole texts; each token is predicted from all tokens before it."""
        texts = _Texts([self.text.encode(request.args[0]) for request in requests])
        if not texts.lengths.all():
            raise UserError("a task has an empty text: there is nothing to predict in it")
        train = self.trained.recipe.train
        with tqdm(total=int(texts.lengths.sum()), desc="Scoring tokens of texts") as bar:
            scored = score(
                self.model,
                texts,
                texts.lengths,
                self.text.token_bytes,
                begin=self._begin[0] if self._begin else None,
                slice_length=train.sequence_length,
                precision=train.precision,
                progress=lambda tokens: bar.update(tokens - bar.n),
            )
        found = (-scored.nats).tolist()
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy decoding would write it) of each continuation."""
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
        """Return the result of a request from the hidden states (width, D) of its tail."""
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
        """Return the text generated after each context; decoding is greedy unless the task sets sampling options."""
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
        """Generate at most `most` tokens after each prompt, until the end of the document or a stop text."""
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
    """Documents in memory, for `score`."""

    def __init__(self, texts: list[np.ndarray]):
        self._texts = texts
        self.lengths = np.array([len(text) for text in texts])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return self._texts[document][start:stop]


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two token sequences."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _batches(requests: Sequence[Request], block: int) -> Iterator[list[Request]]:
    """Yield batches of sorted requests, so that a context's requests are together, within TOKENS_AT_ONCE per pass."""
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
    """Return the sampling settings, the stop texts and the maximum number of tokens of a task.

    Raises UserError for an unknown setting.
    """
    settings = normalize_gen_kwargs(of_task)
    stops = [stop for stop in settings["until"] if stop]
    most = int(settings["max_gen_toks"])
    sampling = {"temperature": 1.0 if settings["do_sample"] else 0.0, "top_p": 1.0} | {
        name: value for name, value in settings.items() if name not in OF_GENERATION
    }
    return parse(SamplingConfig, sampling, where="the task's generation_kwargs"), stops, most
