"""Every task compared with a literal reading of its rows, and its best loss with brute force."""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from bst_base.settings import parse
from data_pipeline.synthetic.config import SyntheticConfig
from data_pipeline.synthetic.draws import Draws
from data_pipeline.synthetic.loader import draw
from data_pipeline.synthetic.task import TaskConfig

LENGTH = 64
SETTINGS: dict[str, dict[str, Any]] = {
    "latent-unigram": {"symbols": 5, "concentration": 0.4},
    "copy": {"lag": 7, "symbols": 9},
    "selective-copy": {"items": 3, "symbols": 4, "span": 15},
    "induction": {"symbols": 6, "span": 13},
    "associative-recall": {"pairs": 3, "queries": 2, "keys": 5, "symbols": 4, "fillers": 3, "span": 16},
    "needle": {"digits": 3, "symbols": 4, "hay": 5},
    "in-context-recall": {"keys": 4, "symbols": 5, "noises": 3, "span": 21},
    "memorisation": {"keys": 12, "symbols": 5, "span": 9},
}


def make(task: str, **changes: Any) -> TaskConfig:
    return parse(SyntheticConfig, {"synthetic": {"task": task, **SETTINGS[task], **changes}}).synthetic


def answers_of_copy(task, tokens) -> dict[int, tuple[int, int]]:
    return {i: (tokens[i - task.lag], task.lag) for i in range(task.lag, len(tokens))}


def answers_of_selective_copy(task, tokens) -> dict[int, tuple[int, int]]:
    """Return the answers: read an episode from its beginning, collect items up to the marker, then repeat them."""
    found = {}
    for begin in range(0, len(tokens) - task.span + 1, task.span):
        seen = []
        place = begin
        while tokens[place] != 1:
            if tokens[place] > 1:
                seen.append(place)
            place += 1
        for item in seen:
            place += 1
            found[place] = (tokens[item], place - item)
        assert len(seen) == task.items
        assert place == begin + task.span - 1
    return found


def answers_of_induction(task, tokens) -> dict[int, tuple[int, int]]:
    found = {}
    for begin in range(0, len(tokens) - task.span + 1, task.span):
        last = begin + task.span - 1
        (first, second) = [i for i in range(begin, last + 1) if tokens[i] == 0]
        assert second == last - 1
        found[last] = (tokens[first + 1], last - (first + 1))
    return found


def answers_of_associative_recall(task, tokens) -> dict[int, tuple[int, int]]:
    found = {}
    for begin in range(0, len(tokens) - task.span + 1, task.span):
        known: dict[int, int] = {}
        place = begin
        while place < begin + task.span - 1:
            token = tokens[place]
            if task.fillers <= token < task.fillers + task.keys:
                if token in known:
                    found[place + 1] = (tokens[known[token]], place + 1 - known[token])
                else:
                    known[token] = place + 1
                place += 1
            place += 1
        assert len(known) == task.pairs
    return found


def answers_of_needle(task, tokens) -> dict[int, tuple[int, int]]:
    key, question = tokens.index(task.hay), tokens.index(task.hay + 1)
    assert all(token < task.hay for token in tokens[question + task.digits + 1 :])
    return {question + i: (tokens[key + i], question - key) for i in range(1, task.digits + 1)}


def answers_of_in_context_recall(task, tokens) -> dict[int, tuple[int, int]]:
    """Return the answers: read words by their first tokens, and remember what followed each key."""
    found, of_values = {}, task.noises + task.keys

    def word(place: int, first: int, end: int) -> tuple[int, ...] | None:
        length = 1 + (tokens[place] - first) % task.longest
        return tuple(tokens[place : place + length]) if place + length <= end else None

    for begin in range(0, len(tokens) - task.span + 1, task.span):
        known: dict[tuple[int, ...], int] = {}
        place, end = begin, begin + task.span
        while place < end:
            if tokens[place] < task.noises:
                place += 1
                continue
            key = word(place, task.noises, end)
            at = place + len(key)
            value = word(at, of_values, end)
            assert all(task.noises <= token < of_values for token in key)
            assert all(of_values <= token for token in value)
            if key in known:
                for offset in range(len(value)):
                    found[at + offset] = (tokens[known[key] + offset], at - known[key])
            known[key] = at
            place = at + len(value)
    return found


def answers_of_memorisation(task, tokens) -> dict[int, tuple[int, int]]:
    """Return the answers by a table of all rows: a key always has the same value, and occurs once per episode."""
    table: dict[int, int] = {}
    for number in range(40):
        row = draw(task, "train", 9, number, LENGTH).tokens.tolist()
        for begin in range(0, len(row) - task.span + 1, task.span):
            for place in range(begin, begin + task.span - 1, 2):
                assert table.setdefault(row[place], row[place + 1]) == row[place + 1]
    found = {}
    for begin in range(0, len(tokens) - task.span + 1, task.span):
        keys = tokens[begin : begin + task.span - 1 : 2]
        assert len(set(keys)) == len(keys)
        found |= {begin + 2 * i + 1: (table[key], 1) for i, key in enumerate(keys)}
    return found


READERS = {
    "copy": answers_of_copy,
    "selective-copy": answers_of_selective_copy,
    "induction": answers_of_induction,
    "associative-recall": answers_of_associative_recall,
    "needle": answers_of_needle,
    "in-context-recall": answers_of_in_context_recall,
    "memorisation": answers_of_memorisation,
}


@pytest.mark.parametrize(
    "task",
    [
        *(make(name) for name in READERS),
        make("needle", distance=20),
        make("selective-copy", items=7),
        make("associative-recall", fillers=1, queries=None),
        make("induction", span=4),
        make("in-context-recall", noise=0.4),
        make("in-context-recall", longest=3, noise=0.2, span=32),
    ],
    ids=lambda task: task.model_dump_json(exclude_defaults=True)[9:60],
)
def test_counted_labels_equal_those_of_a_literal_reader(task):
    for number in range(50):
        row = draw(task, "train", 3, number, LENGTH)
        tokens = row.tokens.tolist()
        assert len(tokens) == len(row.distance) == LENGTH + 1
        assert min(tokens) >= 0
        assert max(tokens) < task.vocabulary
        expected = READERS[task.task](task, tokens)
        assert {i: (tokens[i], int(d)) for i, d in enumerate(row.distance) if d} == expected


def test_first_word_of_a_copy_is_uniform():
    task = make("copy", lag=60)
    words = np.concatenate([draw(task, "train", 0, number, LENGTH).tokens[:60] for number in range(200)])
    counts = np.bincount(words, minlength=9)
    assert (np.abs(counts - 12000 / 9) < 5 * math.sqrt(12000 / 9)).all()


def test_needle_occurs_at_every_position_and_at_the_requested_distance():
    places = [draw(make("needle"), "train", 0, n, 15).tokens.tolist().index(5) for n in range(400)]
    assert sorted(set(places)) == list(range(9))  # 16 tokens: the question and digits are the last four
    fixed = [draw(make("needle", distance=6), "train", 0, n, 15).tokens.tolist() for n in range(200)]
    assert {row.index(6) - row.index(5) for row in fixed} == {6}
    assert sorted({row.index(5) for row in fixed}) == list(range(7))


def test_latent_unigram_rows_equal_an_urn_model():
    """The rows equal those of a literal urn model with the same random numbers: a token is new or repeats one."""
    task = make("latent-unigram")
    for number in range(20):
        draws = Draws("synthetic/1/train", 0, number)
        first, second = draws.uniforms(LENGTH + 1), draws.uniforms(LENGTH + 1)
        fresh = draws.below(5, LENGTH + 1)
        tokens: list[int] = []
        for place in range(LENGTH + 1):
            new = first[place] * (0.4 * 5 + place) < 0.4 * 5
            tokens.append(int(fresh[place]) if new else tokens[int(second[place] * place)])
        row = draw(task, "train", 0, number, LENGTH)
        assert row.tokens.tolist() == tokens
        assert row.distance.tolist() == list(range(LENGTH + 1))


@pytest.mark.parametrize(("symbols", "concentration"), [(2, 1.0), (3, 0.3), (4, 2.5)])
def test_best_loss_of_latent_unigram_equals_enumeration(symbols, concentration):
    """By enumeration: the probability of each short row by the chain rule, and the mean cost of each token."""
    task, length = make("latent-unigram", symbols=symbols, concentration=concentration), 6
    costs = np.zeros(length)
    for tokens in itertools.product(range(symbols), repeat=length):
        each = [(tokens[:n].count(tokens[n]) + concentration) / (n + concentration * symbols) for n in range(length)]
        costs -= math.prod(each) * np.log(each)
    for n in range(length):
        assert task.best_loss(n, n) == pytest.approx(costs[n], rel=1e-10)
    assert task.best_loss(1, length - 1) == pytest.approx(costs[1:].mean(), rel=1e-10)
    assert task.best_loss(0, 0) == pytest.approx(task.chance_loss)


def test_predictor_from_counts_reaches_the_best_loss():
    task, rows, length = make("latent-unigram", symbols=8, concentration=0.5), 400, 128
    tokens = np.stack([draw(task, "train", 0, number, length).tokens for number in range(rows)])
    counts = np.cumsum(np.eye(8)[tokens], axis=1)[:, :-1]  # of each symbol before places 1, 2, ...
    predicted = (counts + 0.5) / (counts.sum(-1, keepdims=True) + 4)
    nats = -np.log(np.take_along_axis(predicted, tokens[:, 1:, None], -1))[..., 0].mean(1)
    assert nats.mean() == pytest.approx(task.best_loss(1, length), abs=4 * nats.std() / math.sqrt(rows))
    assert task.best_loss(127, 127) < task.best_loss(64, 64) < task.best_loss(8, 8)


@pytest.mark.parametrize(
    ("task", "changes", "length", "message"),
    [
        ("copy", {"lag": 65}, 64, "lag 65 leaves nothing to copy in rows of 64 inputs"),
        ("selective-copy", {"items": 8, "span": 16}, 64, "an episode needs 17 tokens and has 16"),
        ("selective-copy", {"span": 66}, 64, "span 66 does not fit into a row of 64 inputs and the last label"),
        ("induction", {"span": 3}, 64, "needs 4 tokens"),
        ("needle", {"distance": 62}, 64, "the key and its question need 65 inputs"),
    ],
)
def test_impossible_row_settings_give_the_reason(task, changes, length, message):
    assert message in make(task, **changes).problem(length)


@pytest.mark.parametrize(
    ("task", "changes", "length"),
    [
        ("copy", {"lag": 64}, 64),
        ("selective-copy", {"items": 8, "span": 17}, 64),
        ("selective-copy", {"span": 65}, 64),
        ("induction", {"span": 4}, 64),
        ("needle", {"distance": 61}, 64),
        ("needle", {"distance": 4}, 64),
        ("needle", {}, 7),
        ("associative-recall", {"span": 10}, 64),
    ],
)
def test_shortest_rows_can_be_drawn(task, changes, length):
    made = make(task, **changes)
    assert made.problem(length) is None
    assert (draw(made, "train", 0, 0, length).distance > 0).any()


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("associative-recall", {"pairs": 6}, "keys 5 for 6 pairs"),
        ("associative-recall", {"queries": 4}, "queries 4 of 3 pairs"),
        ("needle", {"distance": 3}, "at least 4, or the key meets its question"),
        ("induction", {"span": 0}, "greater than or equal to 1"),
    ],
)
def test_contradictory_task_settings_are_refused(task, changes, message):
    with pytest.raises((ValidationError, ValueError), match=message):
        make(task, **changes)


GOLDEN = {
    "latent-unigram": "3cff9576b3f41616",
    "copy": "149e0c15e0004cfd",
    "selective-copy": "b59e429c13f98cf8",
    "induction": "054889c4df20bac5",
    "associative-recall": "fce227d6f1dc86f5",
    "needle": "be9ddaa219ffc80e",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_task_rows_are_pinned(name):
    """A change needs a new TASK_VERSION, because checkpoints depend on the following rows."""
    rows = [
        draw(make(name), split, 5, number, LENGTH).tokens for split in ("train", "validation") for number in range(9)
    ]
    assert hashlib.sha256(np.stack(rows).astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN[name]
