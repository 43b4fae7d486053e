"""Compare runs: their recipes, their results, and how their losses differ on the same text.

    bst compare runs/demo runs/sliding
    bst compare runs/demo runs/sliding runs/longer --plot compared.png
    bst compare runs/demo runs/demo-uninterrupted --equal

Each run is compared with the first one, paired on the same text: over the last training steps that both took (±
standard error over these steps); on the sequences that both evaluated (without an error, because the metrics have no
loss per sequence); and over whole documents of each corpus (± over documents), if `bst eval` has scored them after each
run's last step.

--equal checks that two runs are bitwise equal, at every step and in every weight: a run that was stopped and resumed
must equal one that never stopped. Exit status: 1 if they are not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from bst_base.arguments import picture
from bst_base.errors import UserError
from bst_base.outputs import write_afterwards
from bst_base.terminal import Sheet, print_table, say
from bst_dist.report.console import duration
from bst_dist.study.comparison import pairs
from bst_dist.study.comparison.equality import equality
from bst_dist.study.comparison.pairs import Differences
from bst_dist.study.comparison.run_summary import LAST_STEPS, Figures, RunSummary, Scored, summarise
from bst_dist.study.comparison.training_status import TrainingStatus
from bst_dist.study.runs.results import shortest_names
from bst_dist.study.statistics import Estimate, entries

ABREAST = 4
"""Maximum number of runs per table. More runs need several tables, each of which begins with the first run."""


@dataclass(frozen=True)
class Compared:
    """One run of a comparison."""

    name: str
    run_dir: Path
    status: TrainingStatus
    figures: Figures
    differences: Differences | None
    """Differences from the first run; None for the first run."""

    def report(self) -> dict[str, Any]:
        """Return the machine-readable report. Its names contain the units; unknown values are left out."""
        place = {"name": self.name, "run": str(self.run_dir), "status": self.status.word, "standing": self.status.text}
        return place | entries(self.figures) | (entries(self.differences) if self.differences else {})


@dataclass(frozen=True)
class Comparison:
    """The first run and the runs that are compared with it."""

    recipe_differences: dict[str, list[Any]]
    """Field that differs between recipes -> its value in each run, or None in a run without this field."""
    runs: list[Compared]

    def report(self) -> dict[str, Any]:
        """Return the machine-readable report."""
        return {"recipe_differences": self.recipe_differences, "runs": [one.report() for one in self.runs]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="directories of two runs or more")
    parser.add_argument(
        "--plot",
        metavar="PATH",
        type=picture,
        help="also draw the curves, over tokens and over time: a png, pdf or svg",
    )
    parser.add_argument("--equal", action="store_true", help="check that two runs are bitwise equal")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.equal:
        if len(args.runs) != 2 or args.plot:
            raise UserError("--equal takes two runs, and nothing else")
        return _equal(*args.runs)
    runs = {name: summarise(path) for name, path in shortest_names(args.runs).items()}
    if len(runs) < 2:
        raise UserError("give the directories of two runs or more")
    found = compare(runs)
    show(found)
    if args.plot:
        write_afterwards(args, lambda: _draw(runs, args.plot))
    return found.report()


def _draw(runs: dict[str, RunSummary], path: Path) -> None:
    from bst_dist.study.comparison.figure import draw  # both import matplotlib, which takes a second
    from bst_dist.study.report.style import save

    save(lambda: draw(runs), path)
    say(f"drew the curves to {path}")


def compare(runs: dict[str, RunSummary]) -> Comparison:
    """Compare the runs, given by name, with the first one."""
    first, *others = runs.values()
    return Comparison(
        _recipe_differences(runs),
        [
            Compared(
                name,
                one.result.directory,
                one.status,
                one.figures(),
                pairs.differences(first, one) if one in others else None,
            )
            for name, one in runs.items()
        ],
    )


def _recipe_differences(runs: dict[str, RunSummary]) -> dict[str, list[Any]]:
    """Return the fields that differ between recipes, except the name, with one value per run (None: no such field)."""
    recipes = [one.recipe for one in runs.values()]
    found = {field: [recipe.get(field) for recipe in recipes] for recipe in recipes for field in recipe}
    return {
        field: values
        for field, values in found.items()
        if field != "name" and any(value != values[0] for value in values)
    }


def show(found: Comparison) -> None:
    """Print tables of at most ABREAST runs."""
    first, *others = range(len(found.runs))
    for begin in range(0, len(others), ABREAST - 1):
        shown = [first, *others[begin : begin + ABREAST - 1]]
        runs = [found.runs[number] for number in shown]
        fields = {name: [values[number] for number in shown] for name, values in found.recipe_differences.items()}
        _show_recipes(fields, runs)
        _show_figures(runs)


def _show_recipes(fields: dict[str, list[Any]], runs: Sequence[Compared]) -> None:
    if not fields:
        say("the recipes are the same except for their names\n")
        return
    rows = [[name, *("–" if value is None else _yaml(value) for value in values)] for name, values in fields.items()]
    print_table(_sheet(runs, rows), "differences between the recipes")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1e9).removesuffix("\n...\n").strip()


def _show_figures(runs: Sequence[Compared]) -> None:
    lines = [(title, [cell(one) for one in runs]) for title, cell in (*ROWS, *_rows_by_corpus(runs), *SPEED)]
    shown = [(title, [text or "–" for text in cells]) for title, cells in lines if any(cells)]
    marks = [mark for mark in MARKS if any(title.endswith(mark) for title, _ in shown)]
    counted = str.maketrans(dict(zip(marks, MARKS, strict=False)))  # renumber the marks in use from 1
    rows = [[title.translate(counted), *cells] for title, cells in shown]
    print_table(_sheet(runs, rows), "results of the runs", _notes(runs).translate(counted))
    for one in runs:
        if one.status.word != "finished":
            say(f"{one.name}: {one.status.text}")


def _sheet(runs: Sequence[Compared], rows: Sequence[Sequence[str]]) -> Sheet:
    """Return a table with one column per run."""
    return Sheet(("", *(one.name for one in runs)), rows, flush_right=True)


def _notes(runs: Sequence[Compared]) -> str:
    """Return the footnotes: the meaning of the numbers and of their errors."""
    documents = sorted({of.documents for one in runs for of in (one.figures.scored or {}).values() if of.documents})
    differences = [one.differences for one in runs if one.differences]
    notes = (
        (
            any(one.figures.train_loss_nats is not None for one in runs),
            f"¹ mean of the last steps, at most {LAST_STEPS}",
        ),
        (
            any(of.train_difference_nats for of in differences),
            f"² nats per token on the same batches, the last steps that both took, at most {LAST_STEPS}, ± standard "
            "error over them",
        ),
        (
            any(of.validation_difference_nats is not None for of in differences),
            "³ nats per token on the same sequences, after the last step at which both were evaluated; its error is "
            "not known from sums over sequences",
        ),
        (
            any(one.figures.scored for one in runs),
            f"⁴ `bst eval` of {' or '.join(map(str, documents))} whole documents, ± over documents",
        ),
        (any(of.scored_difference for of in differences), "⁵ bits per byte on the same documents, ± over documents"),
    )
    return "\n".join(text for shown, text in notes if shown)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _difference(value: Estimate | float | None, step: int | None, one: Compared) -> str:
    """Format a difference with its sign, and with its step if the run has gone further."""
    if value is None:
        return ""
    estimate = value if isinstance(value, Estimate) else Estimate(value, None)
    return estimate.text(4, sign=estimate.value > 0) + ("" if step == one.figures.step else f" (at {step:,})")


def _train_difference(one: Compared) -> str:
    found = one.differences
    steps = found and found.train_difference_steps
    return _difference(found.train_difference_nats, steps[-1], one) if steps else ""


def _validation_difference(one: Compared) -> str:
    found = one.differences
    return _difference(found.validation_difference_nats, found.validation_difference_step, one) if found else ""


def _memory(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:,.2f} GiB"


MARKS = "¹²³⁴⁵"
"""Marks of the footnotes below the table of results."""
Row = tuple[str, Callable[[Compared], str]]
"""The title of a row and the function that returns its text for a run, empty if unknown."""
ROWS: tuple[Row, ...] = (
    ("", lambda one: one.status.word),
    ("parameters", lambda one: _number(one.figures.parameters, ",")),
    ("ranks", lambda one: _number(one.figures.ranks, "")),
    ("steps", lambda one: _number(one.figures.step, ",")),
    ("tokens", lambda one: _number(one.figures.tokens, ",")),
    ("training, nats per token ¹", lambda one: _number(one.figures.train_loss_nats, ".4f")),
    ("training, bits per byte ¹", lambda one: _number(one.figures.train_bits_per_byte, ".4f")),
    ("  minus the first run ²", _train_difference),
    ("validation, nats per token", lambda one: _number(one.figures.validation_loss_nats, ".4f")),
    ("validation, bits per byte", lambda one: _number(one.figures.validation_bits_per_byte, ".4f")),
    ("validation, accuracy", lambda one: _number(one.figures.validation_accuracy, ".4f")),
    ("  minus the first run ³", _validation_difference),
)
SPEED: tuple[Row, ...] = (
    ("tokens/s, median", lambda one: _number(one.figures.tokens_per_s, ",.0f")),
    ("peak memory of a rank", lambda one: _memory(one.figures.peak_memory_bytes)),
    ("time in steps, evaluations", lambda one: duration(one.figures.time_s) if one.figures.time_s else ""),
)


def _rows_by_corpus(runs: Sequence[Compared]) -> list[Row]:
    """Return two rows for each scored corpus. Results on different corpora never share a row."""
    rows: list[Row] = []
    for name in dict.fromkeys(name for one in runs for name in one.figures.scored or {}):
        rows += [
            (f"documents of {name}, bits per byte ⁴", lambda one, n=name: _scored(one.figures.scored, n)),
            ("  minus the first run ⁵", lambda one, n=name: _scored_difference(one, n)),
        ]
    return rows


def _scored(found: dict[str, Scored] | None, name: str) -> str:
    of = (found or {}).get(name)
    return "" if of is None or of.bits_per_byte is None else str(of.bits_per_byte)


def _scored_difference(one: Compared, name: str) -> str:
    of = ((one.differences and one.differences.scored_difference) or {}).get(name)
    return "" if of is None else _difference(of.bits_per_byte, one.figures.step, one)


def _equal(one: Path, other: Path) -> dict[str, Any]:
    found = equality(one, other)
    rows = []
    for name, difference in found.largest_difference.items():
        where = f"weights at {found.checkpoint}" if name == "weights" else f"{name.replace('_', ' ')}, any step"
        rows.append([where, f"{difference}"])
    print_table(
        Sheet(("", "largest difference"), rows),
        f"{one} and {other}: {found.steps:,} steps, {found.evaluations} evaluations",
    )
    for line in found.recipe_differences:
        say(f"the recipes differ in {line}")
    Console().print("[green]equal to the last bit" if found.passed else "[red]NOT equal")
    return asdict(found)
