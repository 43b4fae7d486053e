"""The table of a sweep: one row per measurement, with the same columns in every sweep; conversion to observations."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from bst_base.errors import UserError
from bst_base.files import write_text
from bst_base.settings import Config
from bst_dist.study.laws.observation import Observation
from bst_dist.study.runs.state import Status

# NaN until the run is done, or if there is nothing to measure; null in JSON.
Measured = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Row(Config):
    """One measurement: a branch of a trunk, or a run without a trunk."""

    run: str
    """Run directory, relative to the sweep's directory. The name ends in the hash of the recipe."""
    trunk: str
    """The run whose constant-rate steps it shares, or its own name if it has no trunk."""
    status: Status
    reason: str = ""
    """Why it failed or diverged."""
    architecture: str
    arm: str
    role: Literal["grid", "hold-out", "audit"] = "grid"
    """grid: compared and fitted; hold-out: only predicted; audit: trained at another learning rate."""
    size: float
    """The requested size: training FLOPs per token / 6."""
    depth: int
    width: int
    seed: int
    learning_rate: Measured = math.nan
    rate_factor: float = 1.0
    """The learning rate divided by the rate of the sweep's rule."""
    tokens_per_parameter: float
    """The requested length; the compute of the run is 6 size^2 times this."""
    stratum: str
    """Arm, size, depth and seed; the runs of a pair have the same stratum."""
    parameters: float
    """N of the laws and comparisons: training FLOPs per token / 6, as `plan.flops` counts them."""
    ln_n_over_baseline: Measured = math.nan
    """ln N - ln N of the baseline in the same stratum; 0 for the baseline itself."""
    parameters_total: int
    parameters_non_embedding: int
    """All parameters except those of embedding and head."""
    parameters_matrices: int
    """Parameters in matrices, including the head."""
    parameters_kernel: int
    """Parameters of the SSM dynamics."""
    flops_per_token: dict[str, float] = Field(default_factory=dict)
    """FLOPs of the forward pass per token, by term."""
    tokens: int = 0
    flops: float = 0.0
    """C, training FLOPs of all tokens, including those of the shared trunk."""
    loss_nats: Measured = math.nan
    """Loss on the validation sequences after the last step, in nats per token."""
    bits_per_byte: Measured = math.nan
    loss_by_block: tuple[Measured, ...] = ()
    """The same loss by position in the sequence, one value per block of W tokens; NaN for one without valid tokens."""
    loss_by_document: tuple[float, ...] = ()
    """Nats per token of the first tokens of each validation document; empty without `bst sweep collect --documents`."""
    time_s: Measured = math.nan
    """Time of all steps, including those of the shared trunk, without starts, compilation, checkpoints and evaluations.
    The first steps of each start, which compile, count as long as its median step."""
    step_time_excess: Measured = math.nan
    """Median step time / 10 % quantile of the step times - 1: the largest of its own steps, of those shared with the
    trunk, and of both together. Above 0.1 the machine had other work, and there is no verdict at equal time."""
    micro_sequences: int = 0
    """Micro-batch size of the run, which is less than the recipe's if memory ran out."""
    corpora: str = ""
    """SHA-256 of each corpus that it was trained on, in the recipe's order; empty if unknown, as in older tables."""
    versions: dict[str, str | None] = Field(default_factory=dict)
    """Versions of the software and hardware that it ran on."""


ROWS = TypeAdapter(list[Row])
RENAMED = {"block": "stratum", "slowed": "step_time_excess"}
"""Columns of older tables -> their names now."""
OPTIONAL = {name for name, column in Row.model_fields.items() if not column.is_required()}


class TableError(UserError):
    """The table is missing, unreadable, or lacks required columns."""


def write(rows: list[Row], path: Path) -> None:
    """Write a table as JSON, one row per line. The write is atomic."""
    lines = ",\n".join(row.model_dump_json() for row in rows)
    write_text(path, f"[\n{lines}\n]\n")


def write_csv(rows: list[Row], path: Path) -> None:
    """Write the table as CSV for a spreadsheet, without the columns that hold several values."""
    nested = ("flops_per_token", "loss_by_block", "loss_by_document", "versions")
    data = [row.model_dump(mode="json", exclude=set(nested)) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, [name for name in Row.model_fields if name not in nested], lineterminator="\n")
    writer.writeheader()
    writer.writerows(data)
    write_text(path, text.getvalue())


def read(path: Path) -> list[Row]:
    """Read a table as JSON or CSV and check it; raises TableError with the row and the column, or with the run."""
    rows = _parsed(path)
    repeated = [name for name, count in Counter(row.run for row in rows).items() if count > 1]
    if repeated:
        raise TableError(f"{path}: the run {repeated[0]} has more than one row")
    if lost := [row.run for row in rows if row.status == "done" and not row.flops > 0]:
        raise TableError(f"{path}: the run {lost[0]} is done, but its flops are not above 0")
    return rows


def _parsed(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            cells = [renamed(row) for row in csv.DictReader(io.StringIO(text))]
            return ROWS.validate_python(
                [{k: v or None for k, v in row.items() if v or k not in OPTIONAL} for row in cells]
            )
        rows = json.loads(text)
        return ROWS.validate_python([renamed(row) for row in rows] if isinstance(rows, list) else rows)
    except FileNotFoundError:
        raise TableError(f"{path}: no such file: `bst sweep collect` writes it") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise TableError(f"{path}: row {first['loc'][0]}, column {first['loc'][-1]}: {first['msg']}") from None
    except ValueError as error:
        raise TableError(f"{path}: not readable as JSON: {error}") from None


def renamed(row: Any) -> Any:
    """Return the row of a table with the present names of its columns; anything but a row as it is."""
    return {RENAMED.get(name, name): value for name, value in row.items()} if isinstance(row, dict) else row


def observations(rows: list[Row]) -> list[Observation]:
    """Return the planned measurements, finished or not, as observations for the laws and the verdict."""
    return [
        Observation(
            name=row.run,
            architecture=row.architecture,
            arm=row.arm,
            stratum=row.stratum,
            run=row.trunk,
            seed=row.seed,
            width=float(row.width),
            depth=float(row.depth),
            parameters=row.parameters,
            non_embedding=float(row.parameters_non_embedding),
            tokens=float(row.tokens),
            length=row.tokens_per_parameter,
            flops=row.flops,
            time_s=row.time_s,
            loss=row.loss_nats,
            by_block=row.loss_by_block,
            by_document=row.loss_by_document,
            held_out=row.role == "hold-out",
            rate_factor=row.rate_factor,
            step_time_excess=row.step_time_excess,
            status=row.status,
            reason=row.reason,
            corpora=row.corpora,
        )
        for row in rows
    ]
