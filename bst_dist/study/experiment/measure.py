"""The measurements of one finished run, for each column of the table.

Values from the run's metrics are read again each time. Results of extra evaluations are stored beside the runs, so each
evaluation runs once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from bst_dist.config import Recipe
from bst_dist.study.evaluation.trained import open_run, open_validation
from bst_dist.study.experiment.config import MeasureConfig
from bst_dist.study.experiment.readings import ByDocument, Reading
from bst_dist.study.lengths.measure import How, LengthError, how, measure
from bst_dist.study.runs.results import Result, read_result
from bst_dist.study.runs.state import State
from bst_dist.study.sweep.shape import count
from bst_dist.train.config import TrainConfig
from bst_dist.train.rundir import read_recipe

MIB = 2**20


class Column(NamedTuple):
    """A column of the table."""

    key: str
    title: str
    digits: int
    """Number of decimals."""
    family: str
    """Columns of one family have the same unit and share a panel of the figure."""
    relative: bool = False
    """Whether a difference is shown as a percentage of the reference's value."""


def columns(measure: MeasureConfig) -> list[Column]:
    """Return the columns that an experiment asks for, in the order of the table."""
    found = []
    if measure.validation:
        found.append(Column("bits_per_byte", "validation, bits/byte", 4, "bits/byte"))
    if measure.task:
        found += [
            Column("accuracy", "accuracy", 4, "accuracy"),
            Column("loss_nats", "loss, nats/label", 4, "nats/label"),
        ]
    if measure.task_beyond:
        far = f"{measure.task_beyond:,} back and more"
        found += [
            Column("accuracy_beyond", f"accuracy, {far}", 4, "accuracy"),
            Column("loss_nats_beyond", f"nats/label, {far}", 4, "nats/label"),
        ]
    for length in measure.lengths:
        title = f"bits/byte at {length:,}"
        found.append(Column(_at(length), title, 4, "length" if len(measure.lengths) > 1 else title))
    if measure.speed:
        found += [
            _relative("tokens_per_s", "tokens/s"),
            _relative("tokens_per_s_fastest", "tokens/s, fastest tenth"),
            _relative("memory_mib", "peak memory, MiB"),
        ]
    if measure.time_to is not None:
        found += [
            _relative("tokens_to_loss", f"tokens to {measure.time_to:g} bits/byte"),
            _relative("seconds_to_loss", f"s to {measure.time_to:g} bits/byte", 1),
        ]
    return found


def _relative(key: str, title: str, digits: int = 0) -> Column:
    return Column(key, title, digits, family=title, relative=True)


@dataclass(frozen=True)
class Measured:
    """The measurements of one run."""

    parameters: int
    readings: dict[str, Reading] = field(default_factory=dict)
    """Column key -> value."""
    notes: dict[str, str] = field(default_factory=dict)
    """Column key -> why there is no value, or a remark about how it was measured."""
    versions: dict[str, str | None] = field(default_factory=dict)
    """Versions of the software and hardware it was trained with."""
    corpora: str = ""
    """SHA-256 of the text that it was trained on; empty if unknown, as in older results."""


def measure_run(name: str, asked: MeasureConfig, state: State, say: Callable[[str], None]) -> Measured:
    """Return all measurements of a finished run."""
    run_dir = state.directory(name)
    recipe = read_recipe(run_dir)
    result = read_result(run_dir)
    found = Measured(
        count(recipe.model, recipe.train.sequence_length).total, versions=result.versions, corpora=result.corpora
    )
    if asked.validation:
        _validation(result.final, found)
    if asked.task:
        found.readings.update({key: Reading(result.final[key]) for key in ("accuracy", "loss_nats")})
    if asked.task_beyond:
        _beyond(asked.task_beyond, result.final, found)
    if asked.speed:
        typical, fastest = result.speeds
        found.readings.update(
            tokens_per_s=Reading(typical),
            tokens_per_s_fastest=Reading(fastest),
            memory_mib=Reading(result.memory_bytes / MIB),
        )
    if asked.time_to is not None:
        _time_to(asked.time_to, result, recipe.train, found)
    if asked.lengths:
        _lengths(run_dir, recipe, asked, state, found, say)
    return found


def _validation(final: dict[str, Any], found: Measured) -> None:
    if np.isnan(final["bits_per_byte"]):
        found.notes["bits_per_byte"] = "the ids stand for no text"
    else:
        found.readings["bits_per_byte"] = Reading(final["bits_per_byte"])


def _beyond(distance: int, final: dict[str, Any], found: Measured) -> None:
    """Add accuracy and nats over the octaves of distance that begin at `distance` or later."""
    labels = {name: n for name, n in final["labels_by_distance"].items() if int(name.split("-")[0]) >= distance}
    if not labels:
        missing = f"no label has its answer {distance:,} tokens back or more"
        found.notes.update(accuracy_beyond=missing, loss_nats_beyond=missing)
        return
    for key, by in (("accuracy_beyond", "accuracy_by_distance"), ("loss_nats_beyond", "loss_by_distance")):
        mean = sum(n * final[by][name] for name, n in labels.items()) / sum(labels.values())
        found.readings[key] = Reading(mean)


def _time_to(target: float, result: Result, train: TrainConfig, found: Measured) -> None:
    """Add the tokens and the time until the evaluations reach the target, interpolated between two evaluations."""
    evaluations = [(line["step"], line["bits_per_byte"]) for line in result.evaluations]
    step = reached(target, evaluations)
    if step is None:
        best = min(loss for _, loss in evaluations)
        found.notes.update(dict.fromkeys(("tokens_to_loss", "seconds_to_loss"), f"not reached: at best {best:.3f}"))
        return
    steps, tokens, seconds = progress(result, train)
    found.readings["tokens_to_loss"] = Reading(float(np.interp(step, steps, tokens)))
    found.readings["seconds_to_loss"] = Reading(float(np.interp(step, steps, seconds)))


def progress(result: Result, train: TrainConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the steps, tokens and seconds of training at the start and after each step, (steps + 1,) each.

    A step takes the median time of the steps with its batch and length, without the first ones of a start. So the
    seconds exclude evaluations, checkpoints and compilation.
    """

    def batch(line: dict[str, Any]) -> tuple[int, int]:
        step = line["step"] - 1
        return train.batches.at(step), train.lengths.at(step)

    times: dict[tuple[int, int], list[float]] = {}
    for line in result.warm:
        times.setdefault(batch(line), []).append(line["step_time_s"])
    seconds = [median(times[batch(line)]) if batch(line) in times else result.step_s for line in result.train]
    steps, tokens = ([0, *(line[key] for line in result.train)] for key in ("step", "tokens"))
    return np.array(steps), np.array(tokens), np.cumsum([0.0, *seconds])


def reached(target: float, evaluations: list[tuple[int, float]]) -> float | None:
    """Return the step at which the loss first reaches the target, linear between evaluations; None if it never does."""
    for index, (step, loss) in enumerate(evaluations):
        if loss <= target:
            if index == 0:
                return float(step)
            before, above = evaluations[index - 1]
            return before + (step - before) * (above - target) / (above - loss)
    return None


def _lengths(
    run_dir: Path, recipe: Recipe, asked: MeasureConfig, state: State, found: Measured, say: Callable[[str], None]
) -> None:
    """Add the loss at each length that the model supports, and a note for each other length."""
    possible = []
    for length in asked.lengths:
        try:
            how(recipe.model, length)
            possible.append(length)
        except LengthError as error:
            found.notes[_at(length)] = f"refused: {error}"
    if not possible:
        return
    results = state.cached(
        "lengths",
        run_dir.name,
        f"at-{'-'.join(map(str, possible))}-of-{asked.tokens or 'all'}",
        found.corpora,
        lambda: [asdict(one) for one in _evaluate(run_dir, possible, asked.tokens, say)],
    )
    for length, result in zip(possible, (AtLength(**one) for one in results), strict=True):
        documents = ByDocument(np.array(result.bits), np.array(result.bytes))
        found.readings[_at(length)] = Reading(float(documents.cost.sum() / documents.size.sum()), documents)
        if result.how == "fir":
            found.notes[_at(length)] = f"as a FIR of the trained length, {recipe.model.ssm.length:,} tokens"


@dataclass(frozen=True)
class AtLength:
    """The loss at one length, as stored beside the runs."""

    length: int
    how: How
    bits: list[float]
    """Bits of each document, over all corpora of the validation split."""
    bytes: list[int]


def _evaluate(run_dir: Path, lengths: list[int], tokens: int | None, say: Callable[[str], None]) -> list[AtLength]:
    say(f"evaluating {run_dir.name} at {', '.join(f'{length:,}' for length in lengths)}")
    trained = open_run(run_dir)
    found = [measure(trained, corpus, lengths, tokens=tokens) for corpus in open_validation(trained)]
    return [
        AtLength(
            of_length[0].length,
            of_length[0].how,
            [bits for result in of_length for bits in (result.score.nats / np.log(2)).tolist()],
            [size for result in of_length for size in result.score.bytes.tolist()],
        )
        for of_length in zip(*found, strict=True)
    ]


def _at(length: int) -> str:
    return f"bits_per_byte_at_{length}"
