"""The loss of a finished run by validation document, kept beside the sweep: made once, and read again after.

Two runs are compared on the same documents, so what a document is worth cancels; what is left says how much of an
advantage hangs on which documents were held out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bst_base.files import atomic_file
from bst_dist.study.evaluation.scoring import score
from bst_dist.study.evaluation.trained import open_run
from bst_dist.study.runs.state import State
from bst_dist.study.sweep.design import Run
from data_pipeline.serve.loader import open_corpora


def losses_by_document(run: Run, state: State, at_most: int) -> tuple[float, ...]:
    """Nats a token of the first `at_most` tokens of each validation document, forgetting after a training length.

    Raises UserError when the run's checkpoint or the corpus cannot be read.
    """
    path = state.path("documents", run.name)
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("tokens") != at_most:
        known = {"tokens": at_most, "loss_nats": _score(state.directory(run.name), at_most)}
        with atomic_file(path) as file:
            file.write(json.dumps(known).encode() + b"\n")
    return tuple(known["loss_nats"])


def _score(run_dir: Path, at_most: int) -> list[float]:
    trained = open_run(run_dir)
    recipe, losses = trained.recipe, []
    for corpus in open_corpora(recipe.data, "validation"):
        length = recipe.train.sequence_length
        scored = score(
            trained.model, corpus, np.minimum(corpus.lengths, at_most), corpus.token_bytes(),
            begin=None if recipe.data.documents == "isolated" else corpus.manifest.tokenizer.eos_id,
            context=length, slice_length=length, precision=recipe.train.precision,
        )  # fmt: skip
        losses += (scored.nats / scored.tokens).tolist()
    return losses
