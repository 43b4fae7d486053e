"""Random tokens of one step: the same global batch for any number of ranks.

Many labels are masked, with different fractions in different rows, so that a mean of the ranks' means would be wrong.
"""

from __future__ import annotations

import numpy as np

from bst_dist.config import Recipe
from bst_dist.parallel.mesh import Mesh
from data_pipeline.serve.batch import Batch
from data_pipeline.serve.located_rows import LocatedRows
from data_pipeline.serve.slices import MicroBatch


def batches(recipe: Recipe, step: int, mesh: Mesh, micro_rows: int) -> list[MicroBatch]:
    """Return the micro-batches of one rank of `mesh` in step 0, 1, ..., as a loader would."""
    length, rows = recipe.train.sequence_length, recipe.train.sequences
    generator = np.random.default_rng((recipe.seed, step))
    ids = generator.integers(0, recipe.model.vocab_size, (rows, length + 1))
    mask = generator.random((rows, length)) < np.linspace(0.1, 0.9, rows)[:, None]
    starts, unit = _starts(recipe, generator)
    span, dp_share = recipe.train.slice_tokens or length, rows // mesh.dp
    share = span // mesh.sp
    found = []
    for first in range(mesh.dp_rank * dp_share, (mesh.dp_rank + 1) * dp_share, micro_rows):
        slices = [
            _batch(ids, mask, starts, range(first, first + micro_rows), range(begin, begin + share), unit)
            for begin in range(mesh.sp_rank * share, length, span)
        ]
        found.append(slices if recipe.train.slice_tokens else slices[0])
    return found


def _starts(recipe: Recipe, generator: np.random.Generator) -> tuple[np.ndarray | None, int]:
    """Return where documents begin, (rows, length / unit) bool, and the unit: a block, or a token for masked ones."""
    unit = 1 if recipe.data.documents == "masked" else recipe.model.block
    places = recipe.train.sequence_length // unit
    starts = generator.random((recipe.train.sequences, places)) < 0.3
    return None if recipe.data.documents == "joined" else starts, unit


def _batch(
    ids: np.ndarray, mask: np.ndarray, starts: np.ndarray | None, rows: range, tokens: range, unit: int
) -> Batch:
    """Return some rows and tokens of the global batch."""
    own = slice(rows.start, rows.stop)
    count = len(rows)
    at, blocks = slice(tokens.start, tokens.stop), slice(tokens.start // unit, tokens.stop // unit)
    return Batch(
        input_ids=ids[own, :-1][:, at],
        labels=ids[own, 1:][:, at],
        loss_mask=mask[own, at],
        starts=None if starts is None else starts[own, blocks],
        continues=np.ones(count, bool),
        rows=np.arange(rows.start, rows.stop),
        corpora=np.zeros(count, np.int64),
        epochs=np.zeros(count, np.int64),
        located=LocatedRows.none(count),
        begin=tokens.start,
    )
