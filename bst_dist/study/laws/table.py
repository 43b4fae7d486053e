"""The table of a sweep: one row a measurement, the same columns whatever was swept."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from bst_base.errors import UserError
from bst_base.files import atomic_file
from bst_base.settings import Config
from bst_dist.study.laws.law import Points

# Not a number until the run is done; JSON says null.
Measured = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
Status = Literal["done", "running", "waiting", "failed", "diverged"]


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
    """The size asked for: training FLOPs a token / 6."""
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
    """N, the headline count: exact training FLOPs a token / 6."""
    parameters_total: int
    parameters_non_embedding: int
    parameters_matrices: int
    """Matrices and the head, which is what multiplies."""
    parameters_kernel: int
    """Dynamics of the state space models."""
    flops_per_token: dict[str, float]
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
    """By validation document, of its first tokens, in nats a token; empty unless `bst sweep collect --documents`."""
    time_s: Measured = math.nan
    """Time of all steps, those of the shared trunk included, without starts, checkpoints and evaluations."""
    micro_sequences: int = 0
    """As it ran; less than the recipe's where memory ran out."""
    versions: dict[str, str | None] = Field(default_factory=dict)
    """Of what it ran on."""


ROWS = TypeAdapter(list[Row])


class TableError(UserError):
    """A table that does not have the columns it must have."""


def write(rows: list[Row], path: Path) -> None:
    """Write a table as JSON, a row a line; the file appears whole or not at all."""
    lines = ",\n".join(row.model_dump_json() for row in rows)
    with atomic_file(path) as file:
        file.write(f"[\n{lines}\n]\n".encode())


def write_csv(rows: list[Row], path: Path) -> None:
    """The same table for a spreadsheet, without the columns that hold several values."""
    nested = ("flops_per_token", "loss_by_block", "loss_by_document", "versions")
    data = [row.model_dump(mode="json", exclude=set(nested)) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, [name for name in Row.model_fields if name not in nested], lineterminator="\n")
    writer.writeheader()
    writer.writerows(data)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def read(path: Path) -> list[Row]:
    """Read a table, every column checked; raises TableError naming the row and the column."""
    try:
        return ROWS.validate_python(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise TableError(f"{path}: no such file: `bst sweep collect` writes it") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise TableError(f"{path}: row {first['loc'][0]}, column {first['loc'][-1]}: {first['msg']}") from None
    except ValueError as error:
        raise TableError(f"{path}: not readable as JSON: {error}") from None


def points(rows: list[Row]) -> Points:
    """The finished rows as points to fit."""
    done = [row for row in rows if row.status == "done" and row.role == "grid"]
    if not done:
        raise TableError("no run of the sweep has finished: there is nothing to fit")
    return Points(
        loss=np.array([row.loss_nats for row in done]),
        parameters=np.array([row.parameters for row in done]),
        tokens=np.array([float(row.tokens) for row in done]),
        aspect=np.array([row.width / row.depth for row in done]),
        run=np.array([row.trunk for row in done]),
        shape=np.array([f"{row.width} x {row.depth}" for row in done]),
        group=np.array([row.architecture for row in done]),
    )
