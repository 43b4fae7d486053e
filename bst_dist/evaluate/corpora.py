"""The text that a run is evaluated on: the corpora of its recipe or another one, in the tokens it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from bst_dist.evaluate.trained import Trained, tokenizer_of
from bst_dist.train.rundir import ENVIRONMENT
from data_pipeline.errors import UserError
from data_pipeline.loader import open_corpora
from data_pipeline.reader import Corpus


class OtherTokenizerError(UserError):
    """A corpus whose ids are not those that the model was trained on."""


def open_text(trained: Trained, split: str, corpus: str | None = None) -> list[Corpus]:
    """A split of the corpus given, or of those that the run was trained on.

    Raises OtherTokenizerError when their tokens are not the run's, UserError when they cannot be read.
    """
    data = trained.recipe.data
    if corpus is not None:
        data = data.model_copy(update={"corpus": corpus, "weight_changes": ()})
    opened = open_corpora(data, split)
    own = _recorded_tokenizer(trained.run_dir) or tokenizer_of(trained.run_dir, trained.recipe).sha256
    for each in opened:
        each.require_vocabulary(trained.model.config.vocab_size)
        if each.manifest.tokenizer.sha256 != own:
            raise OtherTokenizerError(
                f"{each.where}: its tokenizer ({each.manifest.tokenizer.sha256[:12]}...) is not the one that "
                f"{trained.run_dir} was trained with ({own[:12]}...), so its ids mean something else to this model: "
                "prepare the text with the run's tokenizer (tokenizer.reuse)"
            )
    return opened


def _recorded_tokenizer(run_dir: Path) -> str | None:
    """SHA-256 of the tokenizer that a run was trained with, as its last start wrote it down; None if none did."""
    path = run_dir / ENVIRONMENT
    starts = json.loads(path.read_text())["starts"] if path.exists() else []
    return starts[-1].get("tokenizer_sha256") if starts else None
