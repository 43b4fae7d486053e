"""The text that a run is evaluated on: the corpora of its recipe or another one, with the run's tokenizer."""

from __future__ import annotations

from pathlib import Path

from bst_base.errors import UserError
from bst_dist.config import Recipe
from bst_dist.study.evaluation.trained import Trained, require_text, require_tokenizer, tokenizer_of
from bst_dist.train import rundir
from data_pipeline.serve.loader import open_corpora
from data_pipeline.serve.reader import Corpus, NoCorpusError


def open_text(trained: Trained, split: str, corpus: str | None = None) -> list[Corpus]:
    """Open a split of the given corpus, or by default of the corpora that the run was trained on.

    Raises OtherTokenizerError if a corpus has another tokenizer, UserError if it cannot be read.
    """
    return text_of(trained.run_dir, trained.recipe, split, corpus)


def text_of(run_dir: Path, recipe: Recipe, split: str, corpus: str | None = None) -> list[Corpus]:
    """Do the same as `open_text`, without the run's model."""
    require_text(run_dir, recipe)
    data = recipe.data
    if corpus is not None:
        data = data.model_copy(update={"corpus": corpus, "weight_changes": ()})
    try:
        opened = open_corpora(data, split)
    except NoCorpusError as error:
        if corpus is not None:
            raise
        raise UserError(f"{error}; if the corpus of {run_dir} lies elsewhere, name it with --corpus") from None
    own = rundir.tokenizer_of(run_dir) or tokenizer_of(run_dir, recipe).sha256
    for each in opened:
        require_tokenizer(run_dir, each, own)
        each.require_vocabulary(recipe.model.vocab_size)
    return opened
