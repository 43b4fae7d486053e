"""Evaluation on additional corpora (evaluation.corpora), each reported separately, beside the run's own corpora.

As in the run's own evaluation, the first sequences of each corpus's validation split are read once. The standard error
is over sequences, because the losses of the tokens of one sequence are not independent. It is that of a ratio of sums
(delta method), ``sqrt(m / (m - 1) sum (n_i - r t_i)^2) / sum t_i``, for m sequences with n_i nats and t_i tokens each,
and ``r = sum n_i / sum t_i``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from bst_base.errors import UserError
from bst_dist.config import Recipe
from bst_dist.report.metrics import CorpusReport, bits_per_byte, nats_per_token
from bst_dist.train.evaluation import Evaluation
from bst_dist.train.step import nats_and_labels, sum_of_batch
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import open_corpora
from data_pipeline.serve.reader import Corpus, NoCorpusError
from data_pipeline.serve.slices import slices_of

if TYPE_CHECKING:
    from torch import Tensor

    from bst_dist.train.context import Context
    from data_pipeline.serve.slices import MicroBatch


class CorpusEvaluation(Evaluation):
    """Measures the loss on one additional corpus, with its standard error over sequences."""

    def __init__(self, context: Context, batches: Sequence[MicroBatch], name: str) -> None:
        super().__init__(context, batches)
        self.name = name

    def evaluate(self, step: int) -> CorpusReport | None:
        """Return the loss of the current weights, or None when the ranks agree to stop; every rank must call it."""
        start = time.perf_counter()
        device = self.ranks.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        highest = max(int(slices_of(batch)[0].rows.max()) for batch in self.batches)
        (rows,) = self.ranks.all_gather_numbers([highest]).max(0).values.tolist()
        of_rows = torch.zeros(int(rows) + 1, 2, dtype=torch.float64, device=device)
        for part, inputs, losses in self.forward(step):
            sums += sum_of_batch(losses, inputs, self.context.token_bytes)
            by_row = nats_and_labels(losses.per_token, inputs["loss_mask"]).sum(1)
            row = torch.from_numpy(part.rows).clamp(min=0)  # masked rows have a negative number and no valid token
            of_rows.index_add_(0, row.to(device), by_row)
        if self.stop.stopping:
            return None
        nats, text_bytes, *parts = self.ranks.all_reduce_numbers([*sums.tolist(), *of_rows.flatten().tolist()])
        sequences = torch.tensor(parts, dtype=torch.float64).view(-1, 2)
        tokens = float(sequences[:, 1].sum())
        return CorpusReport(
            step=step,
            split=self.name,
            tokens=int(tokens),
            loss_nats=nats_per_token(nats, tokens),
            bits_per_byte=bits_per_byte(nats, text_bytes),
            loss_by_block=[],
            time_s=time.perf_counter() - start,
            loss_nats_standard_error=standard_error(sequences),
        )


def standard_error(sequences: Tensor) -> float:
    """Return the standard error of nats per token, from (m, 2) nats and tokens of each sequence.

    nan when fewer than two sequences have a token.
    """
    nats, tokens = sequences[sequences[:, 1] > 0].unbind(1)
    count = len(tokens)
    if count < 2:
        return math.nan
    left = nats - nats.sum() / tokens.sum() * tokens
    return float((count / (count - 1) * left.square().sum()).sqrt() / tokens.sum())


def open_sets(recipe: Recipe, corpora: Sequence[Corpus], checked: slice) -> dict[str, list[Corpus]]:
    """Open the validation split of each additional corpus; raises UserError for another tokenizer than `corpora`'s.

    `checked`: the shards of each corpus whose sizes are checked (`open_corpora`).
    """
    found = {}
    for name, url in recipe.evaluation.corpora.items():
        try:
            found[name] = open_corpora(with_corpus(recipe.data, url), "validation", checked)
        except NoCorpusError as error:
            raise UserError(f"{error}; if it has moved, set evaluation.corpora.{name} to where it is now") from None
        (corpus,), own = found[name], corpora[0]
        if corpus.manifest.tokenizer.sha256 != own.manifest.tokenizer.sha256:
            raise UserError(
                f"evaluation.corpora.{name}: {corpus.where} has another tokenizer than {own.where}: prepare it with "
                "tokenizer.reuse set to that one"
            )
    return found


def with_corpus(data: DataConfig, url: str) -> DataConfig:
    """Return the data settings `data` with the corpus at `url` in place of the run's own."""
    return data.model_copy(update={"corpus": url, "weight_changes": ()})
