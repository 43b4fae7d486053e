"""The table of a sweep: one row a measurement, the same columns whatever was swept, and what the laws take of it."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from bst_base.errors import UserError
from bst_base.files import write_text
from bst_base.settings import Config
from bst_dist.study.laws.observation import Observation
from bst_dist.study.runs.state import Status

# Not a number until the run is done; JSON says null.
Measured = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Row(Config):
    """One run: a trunk's branch, or a run of its own."""

    run: str
    """Its directory, relative to the sweep's; ends in the hash of its recipe."""
    trunk: str
    """The run whose constant-rate steps it shares; its own name when it shares none."""
    status: Status
    reason: str = ""
    """Why it failed or diverged."""
    architecture: str
    arm: str
    role: Literal["grid", "hold-out", "audit"] = "grid"
    """grid: compared and fitted; hold-out: predicted; audit: at another learning rate."""
    size: float
    """The size asked for: training FLOPs per token / 6."""
    depth: int
    width: int
    seed: int
    learning_rate: Measured = math.nan
    rate_factor: float = 1.0
    """The learning rate over the rule's."""
    tokens_per_parameter: float
    """As asked for; the compute it stands for is 6 size^2 times this."""
    block: str
    """What a pair shares: arm, size, depth and seed."""
    parameters: float
    """N, the headline count: exact training FLOPs per token / 6."""
    ln_n_over_baseline: Measured = math.nan
    """ln N - ln N of the baseline in the same block; 0 for the baseline itself."""
    parameters_total: int
    parameters_non_embedding: int
    parameters_matrices: int
    """Matrices and the head, which is what multiplies."""
    parameters_kernel: int
    """Dynamics of the state space models."""
    flops_per_token: dict[str, float] = Field(default_factory=dict)
    """Of the forward pass, by term."""
    tokens: int = 0
    flops: float = 0.0
    """C, training FLOPs of all tokens, those of the shared trunk included."""
    loss_nats: Measured = math.nan
    """On the validation sequences, after the last step."""
    bits_per_byte: Measured = math.nan
    loss_by_block: tuple[float, ...] = ()
    """The same loss by the position in the sequence, a value a block of W tokens."""
    loss_by_document: tuple[float, ...] = ()
    """By validation document, of its first tokens, in nats per token; empty unless `bst sweep collect --documents`."""
    time_s: Measured = math.nan
    """Time of all steps, those of the shared trunk included, without starts, checkpoints and evaluations."""
    slowed: Measured = math.nan
    """How much longer a median step took than the fastest tenth: above 0.1 the machine had other work, and there is no
    verdict at equal time."""
    micro_sequences: int = 0
    """As it ran; less than the recipe's where memory ran out."""
    versions: dict[str, str | None] = Field(default_factory=dict)
    """Of what it ran on."""


ROWS = TypeAdapter(list[Row])
OPTIONAL = {name for name, column in Row.model_fields.items() if not column.is_required()}


class TableError(UserError):
    """A table that does not have the columns it must have."""


def write(rows: list[Row], path: Path) -> None:
    """Write a table as JSON, a row a line; the file appears whole or not at all."""
    lines = ",\n".join(row.model_dump_json() for row in rows)
    write_text(path, f"[\n{lines}\n]\n")


def write_csv(rows: list[Row], path: Path) -> None:
    """The same table for a spreadsheet, without the columns that hold several values."""
    nested = ("flops_per_token", "loss_by_block", "loss_by_document", "versions")
    data = [row.model_dump(mode="json", exclude=set(nested)) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, [name for name in Row.model_fields if name not in nested], lineterminator="\n")
    writer.writeheader()
    writer.writerows(data)
    write_text(path, text.getvalue())


def read(path: Path) -> list[Row]:
    """Read a table as JSON or CSV, every column checked; raises TableError naming the row and the column."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return ROWS.validate_python([{k: v or None for k, v in row.items() if v or k not in OPTIONAL}
                                         for row in csv.DictReader(io.StringIO(text))])  # fmt: skip
        return ROWS.validate_python(json.loads(text))
    except FileNotFoundError:
        raise TableError(f"{path}: no such file: `bst sweep collect` writes it") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise TableError(f"{path}: row {first['loc'][0]}, column {first['loc'][-1]}: {first['msg']}") from None
    except ValueError as error:
        raise TableError(f"{path}: not readable as JSON: {error}") from None


def observations(rows: list[Row]) -> list[Observation]:
    """The finished measurements, as the laws and the verdict take them."""
    return [
        Observation(
            name=row.run, architecture=row.architecture, arm=row.arm, block=row.block, run=row.trunk, seed=row.seed,
            width=float(row.width), depth=float(row.depth), parameters=row.parameters,
            non_embedding=float(row.parameters_non_embedding), tokens=float(row.tokens),
            length=row.tokens_per_parameter, flops=row.flops, time_s=row.time_s, loss=row.loss_nats,
            by_block=row.loss_by_block, by_document=row.loss_by_document, held_out=row.role == "hold-out",
            rate_factor=row.rate_factor, slowed=row.slowed,
        )
        for row in rows if row.status == "done"
    ]  # fmt: skip
