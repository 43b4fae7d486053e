"""`bst eval --needle`: whether a language model retrieves a pass key that appeared far back in a text.

The task is that of Landmark Attention (arXiv 2305.16300, section 4.2), but with validation text as the filler. A row is
a piece of this text with a sentence in it that gives a pass key of random digits. A question at the end of the row asks
for the key. No text is generated: the key counts as found if each of its tokens has the highest logit, given the tokens
before it. Rows without the sentence show the result of guessing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bst_base.errors import UserError
from bst_base.terminal import Sheet, print_table
from bst_dist.study.evaluation.corpora import open_text
from bst_dist.study.evaluation.scoring import TOKENS_AT_ONCE
from bst_dist.study.evaluation.synthetic import read_rows
from bst_dist.study.evaluation.trained import Trained, open_run
from bst_dist.study.statistics import Estimate, ratio, share_report, share_text
from data_pipeline.format.tokenizer import Tokenizer
from data_pipeline.serve.reader import Corpus

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Positions of the sentence: 0 at the beginning of the row, 1 directly before the question."""
ROWS, DIGITS = 32, 5
SENTENCE = "\nThe pass key is {key}. Remember it.\n"
QUESTION = "\nWhat is the pass key? The pass key is {key}"


class Needle(NamedTuple):
    """One row: its tokens, and the position of the answer."""

    tokens: np.ndarray
    """(L,)"""
    first: int
    """Index of the first token of the answer, the key. The answer ends with the row."""
    distance: int
    """Number of tokens from the key in the sentence to the answer; 0 in a row without the sentence."""


class Batch(NamedTuple):
    """Rows for `read_rows`; each array is (b, l)."""

    input_ids: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray


class Texts:
    """Makes the rows from the corpora and their tokenizer."""

    def __init__(self, corpora: Sequence[Corpus], tokenizer: Tokenizer) -> None:
        self.corpora, self.tokenizer = corpora, tokenizer

    def row(self, number: int, length: int, depth: float | None) -> Needle:
        """Return row `number` of `length` tokens, with the sentence at `depth`, or without it if `depth` is None.

        The key and the start of the text depend only on the number and the length. Raises UserError if the
        sentence and the question do not fit.
        """
        draws = np.random.default_rng([0, number, length])
        key = "".join(map(str, draws.integers(0, 10, DIGITS)))
        question, asked = self._with_key(QUESTION, key)
        sentence, told = self._with_key(SENTENCE, key)
        if depth is None:
            sentence = sentence[:0]
        room = length - len(question) - len(sentence)
        if room < 0:
            raise UserError(f"--needle {length}: the sentence and the question alone have {length - room} tokens")
        hay, before = self._hay(draws, room), round((depth or 0.0) * room)
        tokens = np.concatenate([hay[:before], sentence, hay[before:], question]).astype(np.int64)
        first = length - len(question) + asked
        return Needle(tokens, first, 0 if depth is None else first - before - told)

    def _with_key(self, template: str, key: str) -> tuple[np.ndarray, int]:
        """Return the tokens of the template with the key, and the index of the first token with part of the key."""
        whole = self.tokenizer.encode(template.format(key=key))
        without = self.tokenizer.encode(template.partition("{key}")[0])
        same = min(len(whole), len(without))
        differing = np.flatnonzero(whole[:same] != without[:same])
        return whole, int(differing[0]) if len(differing) else same

    def _hay(self, draws: np.random.Generator, tokens: int) -> np.ndarray:
        """Return text from a random position, continued with the next documents; the first follows after the last."""
        corpus = self.corpora[int(draws.integers(len(self.corpora)))]
        document = int(draws.choice(len(corpus), p=corpus.lengths / corpus.lengths.sum()))
        start, parts, left = int(draws.integers(corpus.lengths[document])), [], tokens
        while left > 0:
            stop = min(int(corpus.lengths[document]), start + left)
            parts.append(corpus.tokens(document, start, stop))
            left -= stop - start
            document, start = (document + 1) % len(corpus), 0
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def batches(rows: Sequence[Needle], begin: int | None, block: int) -> Iterator[Batch]:
    """Yield rows of one length in batches for one forward pass each, padded to whole blocks, each after `begin`."""
    length = len(rows[0].tokens)
    padded = -(-length // block) * block
    for at in range(0, len(rows), max(1, TOKENS_AT_ONCE // padded)):
        some = rows[at : at + max(1, TOKENS_AT_ONCE // padded)]
        ids, labels = np.zeros((len(some), padded), np.int64), np.zeros((len(some), padded), np.int64)
        counts = np.zeros((len(some), padded), bool)
        for place, row in enumerate(some):
            inputs, targets = row.tokens[:-1], row.tokens[1:]
            if begin is not None:
                inputs, targets = np.concatenate(([begin], inputs)), row.tokens
            ids[place, : len(inputs)], labels[place, : len(targets)] = inputs, targets
            counts[place, len(targets) - (length - row.first) : len(targets)] = True
        yield Batch(ids, labels, counts)


@dataclass(frozen=True)
class Place:
    """Results on rows of one length with the sentence at one depth; errors are over rows."""

    length: int
    depth: float | None
    """None: rows without the sentence."""
    rows: int
    distance: float
    """Mean over the rows, in tokens."""
    keys: Estimate
    """Share of the keys of which every token has the highest logit."""
    tokens: Estimate
    """Share of the keys' tokens that have the highest logit."""
    loss: Estimate
    """Nats per token of the keys."""

    def report(self) -> dict[str, Any]:
        """Return the machine-readable report."""
        return {
            "length_tokens": self.length,
            "depth": self.depth,
            "rows": self.rows,
            "distance_tokens": self.distance,
            **share_report(self.keys, "keys"),
            **share_report(self.tokens, "tokens"),
            **self.loss.report("loss_nats"),
        }


def read(
    model: Any, rows: Sequence[Needle], begin: int | None, slice_length: int, precision: str, depth: float | None
) -> Place:
    """Evaluate rows of one length, all with the sentence at `depth`."""
    tokens, correct, nats = [], [], []
    for batch in batches(rows, begin, model.config.block):
        right, cost = read_rows(model, batch, slice_length, precision)
        tokens += batch.loss_mask.sum(1).tolist()
        correct += (right & batch.loss_mask).sum(1).tolist()
        nats += np.where(batch.loss_mask, cost, 0.0).sum(1).tolist()
    whole, asked = np.equal(tokens, correct).astype(float), np.array(tokens, float)
    return Place(
        len(rows[0].tokens),
        depth,
        len(rows),
        float(np.mean([row.distance for row in rows])),
        ratio(whole, np.ones(len(whole))),
        ratio(np.array(correct, float), asked),
        ratio(np.array(nats), asked),
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    trained = open_run(args.run, args.checkpoint, args.precision, args.averaged)
    corpora = open_text(trained, args.split, args.corpus)
    length, count = trained.recipe.train.sequence_length, args.rows or ROWS
    texts = Texts(corpora, corpora[0].tokenizer())
    places = []
    for asked in args.needle or [length]:
        for depth in (*DEPTHS, None):
            rows = [texts.row(number, asked, depth) for number in range(count)]
            places.append(
                read(
                    trained.model,
                    rows,
                    trained.begin(corpora[0]),
                    min(length, _whole(asked, trained)),
                    trained.recipe.train.precision,
                    depth,
                )
            )
    _show(args, trained, places)
    return {
        "run": str(args.run),
        "step": trained.step,
        "split": args.split,
        "digits": DIGITS,
        "trained_tokens": length,
        "places": [place.report() for place in places],
    }


def _whole(length: int, trained: Trained) -> int:
    block = trained.recipe.model.block
    return -(-length // block) * block


def _show(args: argparse.Namespace, trained: Trained, places: Sequence[Place]) -> None:
    rows = [
        [
            f"{place.length:,}",
            "no key" if place.depth is None else f"{place.depth:.0%}",
            "" if place.depth is None else f"{place.distance:,.0f}",
            share_text(place.keys),
            share_text(place.tokens),
            str(place.loss),
        ]
        for place in places
    ]
    print_table(
        Sheet(
            ("tokens of a row", "key stands at", "distance", "keys found", "their tokens", "loss, nats per token"), rows
        ),
        f"{args.run} after {trained.step:,} steps: pass keys in {args.split} text",
        f"{places[0].rows} rows per line, keys of {DIGITS} digits; ± standard error over rows, or a 95 % interval; "
        f"trained on {trained.recipe.train.sequence_length:,} tokens; 'no key': result of guessing",
    )
