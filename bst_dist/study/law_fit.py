"""Fit scaling laws to your own table: CSV or JSON Lines, with one row per measurement.

    bst law fit points.csv --n parameters --d tokens --loss loss
    bst law fit points.csv --n params --flops flops --loss nll --width d_model --depth layers --run run --plot laws.png
    bst law fit docs/study/table.csv --n parameters --d tokens --loss loss_nats --width width --depth depth \\
        --run trunk --group architecture --where role=grid

Fits three forms under two objectives (docs/sweeps.md). The forms aspect and additive need width and depth. Intervals
come from resampling runs, so --run should name a column with the same value for all points of a run, or of a trunk and
its branches. Rows that match --held-out are predicted, not fitted. With --group every group gets its own laws. Losses
are in nats.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

from bst_base.arguments import at_least, picture
from bst_base.errors import UserError
from bst_base.terminal import say
from bst_dist.study.laws.observation import Observation
from bst_dist.study.laws.scaling import fit_laws
from bst_dist.study.report import laws
from bst_dist.study.report.figures import loss_figure
from bst_dist.study.report.formatting import plain
from bst_dist.study.report.style import save_afterwards
from bst_dist.study.report.terminal import show

NUMBERS = ("n", "d", "flops", "loss", "width", "depth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, metavar="TABLE", help="a CSV with a line of column names, or a .jsonl")
    parser.add_argument("--n", required=True, metavar="COLUMN", help="column with the parameters N")
    tokens = parser.add_mutually_exclusive_group(required=True)
    tokens.add_argument("--d", metavar="COLUMN", help="column with the training tokens D")
    tokens.add_argument(
        "--flops", metavar="COLUMN", help="column with the training FLOPs, in place of --d: D = FLOPs / 6N"
    )
    parser.add_argument("--loss", required=True, metavar="COLUMN", help="column with the loss in nats per token")
    parser.add_argument("--width", metavar="COLUMN", help="column with the model's width")
    parser.add_argument("--depth", metavar="COLUMN", help="column with the number of layers")
    parser.add_argument(
        "--run",
        metavar="COLUMN",
        help="column that names the run of each point (default: every point is a run of its own)",
    )
    parser.add_argument(
        "--group", metavar="COLUMN", help="column of groups, such as architectures; each gets its own law"
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="use only rows with this value; may be given several times, all must match",
    )
    parser.add_argument("--held-out", metavar="COLUMN=VALUE", help="rows to predict instead of fitting")
    parser.add_argument(
        "--drop-largest",
        type=at_least(0),
        default=0,
        metavar="K",
        help="leave out the K points with the largest losses (default: 0)",
    )
    parser.add_argument(
        "--draws",
        type=at_least(2),
        default=200,
        metavar="N",
        help="number of bootstrap resamples for the intervals (default: %(default)s)",
    )
    parser.add_argument("--plot", type=picture, metavar="PATH", help="also draw losses and laws: a png, pdf or svg")


def run(args: argparse.Namespace) -> dict[str, Any]:
    observed = read(args)
    found = fit_laws(observed, None, "", args.draws)
    held = sum(o.held_out for o in observed)
    say(f"{args.table}: {found.points} points of {found.runs} runs" + (f", {held} held out" if held else ""))
    show(laws.blocks(found))
    if not (args.width and args.depth):
        say("the aspect and additive forms need the model's width and depth: name their columns by --width and --depth")
    if args.plot:
        save_afterwards(args, lambda: loss_figure(observed, found), args.plot)
    return {**plain(found), "passed": any(fit.law for of in found.architectures.values() for fit in of.fits)}


def read(args: argparse.Namespace) -> list[Observation]:
    """Return the points of the table. Raises UserError for a missing column or a cell that is not a number above 0."""
    rows, names = _rows(args.table)
    asked = {key: getattr(args, key) for key in (*NUMBERS, "run", "group")}
    conditions = [_condition(text, args.table) for text in args.where]
    out = _condition(args.held_out, args.table) if args.held_out else None
    for name in (*asked.values(), *(name for name, _ in conditions), *([out[0]] if out else [])):
        if name is not None and name not in names:
            raise UserError(f"{args.table}: no column {name!r}; there are {', '.join(names) or 'none'}")
    found = [
        _observation(line, row, asked, args.table, out is not None and row[out[0]] == out[1])
        for line, row in rows
        if all(row[name] == value for name, value in conditions)
    ]
    if out is not None and not any(o.held_out for o in found):
        raise UserError(f"{args.table}: --held-out {args.held_out} matches no row")
    dropped = sorted(found, key=lambda o: o.loss)[len(found) - args.drop_largest :] if args.drop_largest else []
    kept = [o for o in found if o not in dropped]
    if not kept:
        raise UserError(f"{args.table}: no row is left to fit")
    return kept


def _rows(table: Path) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """Return the rows with their line numbers, and the column names. A .jsonl has one JSON object per line."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix != ".jsonl":
                reader = csv.DictReader(file)
                return list(enumerate(reader, 2)), list(reader.fieldnames or [])
            objects = [(line, json.loads(text)) for line, text in enumerate(file, 1) if text.strip()]
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not UTF-8 or not JSON
        raise UserError(
            f"{table}: not readable as {'JSON Lines' if table.suffix == '.jsonl' else 'CSV'}: {error}"
        ) from None
    for line, one in objects:
        if not isinstance(one, dict):
            raise UserError(f"{table}: line {line} is not a JSON object")
    names = list(dict.fromkeys(name for _, one in objects for name in one))
    # As text, so that conditions and numbers are read as from a CSV. A name missing on a line becomes an empty cell.
    return [
        (line, {name: "" if one.get(name) is None else str(one[name]) for name in names}) for line, one in objects
    ], names


def _condition(text: str, table: Path) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"{table}: {text!r}: expected COLUMN=VALUE")
    return name, value


def _observation(line: int, row: dict[str, str], asked: dict[str, str | None], table: Path, held: bool) -> Observation:
    numbers = {}
    for key in NUMBERS:
        name = asked[key]
        if name is not None:
            try:
                numbers[key] = float(row[name])
            except (TypeError, ValueError):
                numbers[key] = math.nan
            if not (math.isfinite(numbers[key]) and numbers[key] > 0):
                raise UserError(f"{table}: line {line}, column {name}: {row[name]!r} is not a number above 0")
    for name in filter(None, (asked["run"], asked["group"])):
        if not row[name]:  # None: the line has too few cells
            raise UserError(f"{table}: line {line}, column {name}: the cell is empty")
    n = numbers["n"]
    tokens = numbers.get("d", numbers.get("flops", 0.0) / (6 * n))
    return Observation(
        name=f"line {line}",
        architecture=row[asked["group"]] if asked["group"] else "",
        arm="",
        stratum=str(line),
        run=row[asked["run"]] if asked["run"] else str(line),
        seed=0,
        width=numbers.get("width", 1.0),
        depth=numbers.get("depth", 1.0),
        parameters=n,
        non_embedding=math.nan,
        tokens=tokens,
        length=tokens / n,
        flops=6 * n * tokens,
        time_s=math.nan,
        loss=numbers["loss"],
        held_out=held,
    )
