"""Compare runs: what differs in their recipes, what they have reached, and by how much they differ on the same text.

    bst compare runs/demo runs/sliding
    bst compare runs/demo runs/sliding runs/longer --plot compared.png
    bst compare runs/demo runs/demo-uninterrupted --equal

Differences are to the first run. Where both read the same text they are paired: over the last training steps that both
took (± the standard error over these steps), on the sequences that both were evaluated on (without an error: the
metrics do not say what each sequence gave), and over whole documents of each corpus (± over documents), where
`bst eval` has scored them after each run's last step.

--equal checks that two runs are equal to the last bit, at every step and in every weight: a run that was stopped and
resumed must equal one that never stopped. Exit status: 1 when they are not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from bst_base.errors import UserError
from bst_dist.report.metrics import duration
from bst_dist.study.comparison import pairs
from bst_dist.study.comparison.equality import equality
from bst_dist.study.comparison.figure import draw
from bst_dist.study.comparison.outline import LAST_STEPS, Outline, outline
from bst_dist.study.report.style import save
from bst_dist.study.runs.results import named
from bst_dist.study.statistics import Estimate

ABREAST = 4
"""Runs side by side in a table; with more of them there are several, each beginning with the first run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="directories of two runs or more")
    parser.add_argument("--plot", metavar="PATH", type=Path, help="also draw the curves, over tokens and over time: "
                        "a png, pdf or svg")  # fmt: skip
    parser.add_argument("--equal", action="store_true", help="check that two runs are equal to the last bit")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.equal:
        if len(args.runs) != 2 or args.plot:
            raise UserError("--equal takes two runs, and nothing else")
        return _equal(*args.runs)
    runs = {name: outline(path) for name, path in named(args.runs).items()}
    if len(runs) < 2:
        raise UserError("give the directories of two runs or more")
    report, console = compare(runs), Console(highlight=False)
    show(report, console)
    if args.plot:
        save(lambda: draw(runs), args.plot)
        console.print(f"drew the curves to {args.plot}", markup=False)
    return report


def compare(runs: dict[str, Outline]) -> dict[str, Any]:
    """All that is compared, for machines: units in the names, only what there is."""
    first, *others = runs.values()
    return {
        "recipe_differences": _recipe_differences(runs),
        "runs": [{"name": name, "run": str(one.run_dir), "status": one.standing.status, "standing": one.standing.text,
                  **one.figures(), **(pairs.differences(first, one) if one in others else {})}
                 for name, one in runs.items()],
    }  # fmt: skip


def _recipe_differences(runs: dict[str, Outline]) -> dict[str, list[Any]]:
    """Fields that are not the same in all runs, a value a run; None where a run has no such field."""
    recipes = [one.recipe for one in runs.values()]
    found = {field: [recipe.get(field) for recipe in recipes] for recipe in recipes for field in recipe}
    return {field: values for field, values in found.items()
            if field != "name" and any(value != values[0] for value in values)}  # fmt: skip


def show(report: dict[str, Any], console: Console) -> None:
    """Tables of at most ABREAST runs."""
    first, *others = range(len(report["runs"]))
    for begin in range(0, len(others), ABREAST - 1):
        shown = [first, *others[begin : begin + ABREAST - 1]]
        runs = [report["runs"][number] for number in shown]
        fields = {name: [values[number] for number in shown] for name, values in report["recipe_differences"].items()}
        _show_recipes(fields, runs, console)
        _show_figures(runs, console)


def _show_recipes(fields: dict[str, list[Any]], runs: Sequence[dict[str, Any]], console: Console) -> None:
    if not fields:
        console.print("the recipes are the same but for their names\n")
        return
    table = _table("what differs in the recipes", runs)
    for name, values in fields.items():
        table.add_row(name, *("–" if value is None else yaml.safe_dump(value, default_flow_style=True, width=1e9)
                              .removesuffix("\n...\n").strip() for value in values))  # fmt: skip
    console.print(table, markup=False)


def _show_figures(runs: Sequence[dict[str, Any]], console: Console) -> None:
    table = _table("what they have reached", runs)
    table.caption, table.caption_justify = _notes(runs), "left"
    for title, cell in (*ROWS, *_rows_by_corpus(runs), *SPEED):
        cells = [cell(one) for one in runs]
        if any(cells):
            table.add_row(title, *(text or "–" for text in cells))
    console.print(table, markup=False)
    for one in runs:
        if one["status"] != "finished":
            console.print(f"{one['name']}: {one['standing']}", markup=False)


def _notes(runs: Sequence[dict[str, Any]]) -> str:
    """What the figures are of, and what their errors are over."""
    documents = sorted({of["documents"] for one in runs for of in one.get("scored", {}).values() if "documents" in of})
    notes = {
        "train_loss_nats": f"¹ mean of the last steps, at most {LAST_STEPS}",
        "train_difference_nats": "² nats per token on the same batches, the last steps that both took, at most "
        f"{LAST_STEPS}, ± standard error over them",
        "validation_difference_nats": "³ nats per token on the same sequences, after the last step at which both were "
        "evaluated; its error is not known from sums over sequences",
        "scored": f"⁴ `bst eval` of {' or '.join(map(str, documents))} whole documents, ± over documents",
        "scored_difference": "⁵ bits per byte on the same documents, ± over documents",
    }
    return "\n".join(text for key, text in notes.items() if any(key in one for one in runs))


def _number(one: dict[str, Any], key: str, form: str) -> str:
    return form.format(one[key]) if key in one else ""


def _estimate(one: dict[str, Any], key: str) -> str:
    return str(Estimate(one[key], one.get(f"{key}_standard_error"))) if key in one else ""


def _difference(one: dict[str, Any], key: str, step: int | None) -> str:
    """With its sign, and the step that it is of where the run has gone on from there."""
    text = _estimate(one, key)
    sign = "+" if text and one[key] > 0 else ""
    return f"{sign}{text}" + (f" (at {step:,})" if text and step != one["step"] else "")


def _table(title: str, runs: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for one in runs:
        table.add_column(one["name"], justify="right", overflow="fold")
    return table


def _train_difference(one: dict[str, Any]) -> str:
    return _difference(one, "train_difference_nats", one.get("train_difference_steps", [None])[-1])


def _memory(one: dict[str, Any]) -> str:
    return f"{one['peak_memory_bytes'] / 2**30:,.2f} GiB" if "peak_memory_bytes" in one else ""


ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("", lambda one: one["status"]),
    ("parameters", lambda one: _number(one, "parameters", "{:,}")),
    ("ranks", lambda one: _number(one, "ranks", "{}")),
    ("steps", lambda one: _number(one, "step", "{:,}")),
    ("tokens", lambda one: _number(one, "tokens", "{:,}")),
    ("training, nats per token ¹", lambda one: _number(one, "train_loss_nats", "{:.4f}")),
    ("training, bits per byte ¹", lambda one: _number(one, "train_bits_per_byte", "{:.4f}")),
    ("  above the first run ²", _train_difference),
    ("validation, nats per token", lambda one: _number(one, "validation_loss_nats", "{:.4f}")),
    ("validation, bits per byte", lambda one: _number(one, "validation_bits_per_byte", "{:.4f}")),
    ("validation, accuracy", lambda one: _number(one, "validation_accuracy", "{:.4f}")),
    ("  above the first run ³", lambda one: _difference(one, "validation_difference_nats",
                                                        one.get("validation_difference_step"))),
)  # fmt: skip
"""Titles, and what stands under them for a run; empty where there is nothing to say."""
SPEED: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("tokens/s, median", lambda one: _number(one, "tokens_per_s", "{:,.0f}")),
    ("peak memory of a rank", _memory),
    ("time in steps, evaluations", lambda one: duration(one["time_s"]) if "time_s" in one else ""),
)  # fmt: skip


def _rows_by_corpus(runs: Sequence[dict[str, Any]]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Two rows for each corpus whose documents were scored: runs scored on other text never share one."""
    rows = []
    for name in dict.fromkeys(name for one in runs for name in one.get("scored", {})):
        rows += [
            (f"documents of {name}, bits per byte ⁴", lambda one, n=name: _estimate(one.get("scored", {}).get(n, {}),
                                                                                   "bits_per_byte")),
            ("  above the first run ⁵", lambda one, n=name: _scored_difference(one, n)),
        ]  # fmt: skip
    return rows


def _scored_difference(one: dict[str, Any], name: str) -> str:
    found = one.get("scored_difference", {}).get(name)
    return "" if found is None else _difference({**found, "step": one["step"]}, "bits_per_byte", one["step"])


def _equal(one: Path, other: Path) -> dict[str, Any]:
    report = equality(one, other)
    console = Console()
    title = f"{one} and {other}: {report['steps']:,} steps, {report['evaluations']} evaluations"
    table = Table("", "largest difference", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name, difference in report["largest_difference"].items():
        where = f"weights at {report['checkpoint']}" if name == "weights" else f"{name.replace('_', ' ')}, any step"
        table.add_row(where, f"{difference}")
    console.print(table)
    for line in report["recipe_differences"]:
        console.print(f"the recipes differ in {line}", markup=False)
    console.print("[green]equal to the last bit" if report["passed"] else "[red]NOT equal")
    return report
