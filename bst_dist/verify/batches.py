"""Made-up tokens of one step, the same global batch whatever the ranks it is spread over.

Many labels do not count, and fewer in some rows than in others, so that a mean over ranks of means is not the mean.
"""

from __future__ import annotations

import numpy as np

from bst_dist.config import Recipe
from bst_dist.parallel.mesh import Mesh
from data_pipeline.serve.batch import Batch
from data_pipeline.serve.stream import Pieces


def batches(recipe: Recipe, step: int, mesh: Mesh, micro_rows: int) -> list[Batch]:
    """The micro-batches of one rank of `mesh` in step 0, 1, ..., as a loader would give them."""
    length, rows, block = recipe.train.sequence_length, recipe.train.sequences, recipe.model.block
    generator = np.random.default_rng((recipe.seed, step))
    ids = generator.integers(0, recipe.model.vocab_size, (rows, length + 1))
    mask = generator.random((rows, length)) < np.linspace(0.1, 0.9, rows)[:, None]
    starts = generator.random((rows, length // block)) < 0.3
    share, slice_ = rows // mesh.dp, length // mesh.sp
    begin = mesh.sp_rank * slice_
    tokens, blocks = slice(begin, begin + slice_), slice(begin // block, (begin + slice_) // block)
    found = []
    for first in range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share, micro_rows):
        own = slice(first, first + micro_rows)
        found.append(
            Batch(
                input_ids=ids[own, :-1][:, tokens],
                labels=ids[own, 1:][:, tokens],
                loss_mask=mask[own, tokens],
                starts=starts[own, blocks] if recipe.data.documents == "isolated" else None,
                continues=np.ones(micro_rows, bool),
                rows=np.arange(first, first + micro_rows),
                corpora=np.zeros(micro_rows, np.int64),
                epochs=np.zeros(micro_rows, np.int64),
                pieces=Pieces(*(np.zeros(0, np.int64) for _ in Pieces._fields)),
                begin=begin,
            )
        )
    return found
