"""`bst eval` without another form: loss, perplexity and bits per byte of a run's model on whole documents."""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import numpy as np
from rich.console import Console

from bst_base.errors import UserError
from bst_base.terminal import Sheet, print_table
from bst_dist.model.config import ModelConfig
from bst_dist.study.evaluation.corpora import open_text
from bst_dist.study.evaluation.scoring import Score, filter_length, score
from bst_dist.study.evaluation.trained import Trained, open_run
from bst_dist.study.statistics import Estimate, exponential, ratio
from data_pipeline.commands.progress import stages
from data_pipeline.serve.reader import Corpus


def evaluate(trained: Trained, corpus: Corpus, context: int | None, console: Console) -> Score:
    """Score every document of a split, saying how far it is; raises UserError for a context that is no whole blocks."""
    recipe, block = trained.recipe, trained.recipe.model.block
    if context is not None and (context < 1 or context % block):
        raise UserError(f"--context {context} is not a multiple of the model's block, {block}")
    length = recipe.train.sequence_length
    with stages(console) as report:
        return score(
            trained.model, corpus, corpus.lengths, corpus.token_bytes(),
            begin=trained.begin(corpus), context=context, slice_length=min(length, context or length),
            precision=recipe.train.precision,
            progress=lambda tokens: report("evaluate", tokens, corpus.tokens_total),
        )  # fmt: skip


def words_of(corpus: Corpus) -> np.ndarray:
    """(n,) words of each document's text, as PG-19 counts them: what white space separates (arXiv 1911.05507)."""
    tokenizer = corpus.tokenizer()
    return np.array([len(tokenizer.decode(corpus.document(number)).split()) for number in range(len(corpus))])


def summary(scored: Score, words: np.ndarray) -> dict[str, Any]:
    """The figures of a scored split, with their standard errors; `words` (n,) of each document's text."""
    nats = ratio(scored.nats, scored.tokens)
    by_word = exponential(ratio(scored.nats, words)) if words.sum() else Estimate(math.nan, None)
    bits = ratio(scored.nats / np.log(2), scored.bytes)
    return {
        "documents": len(scored.tokens),
        "tokens": int(scored.tokens.sum()),
        "bytes": int(scored.bytes.sum()),
        "words": int(words.sum()),
        **nats.report("loss_nats_per_token"),
        **exponential(nats).report("perplexity_per_token"),
        **by_word.report("perplexity_per_word"),
        **bits.report("bits_per_byte"),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    console = Console()
    trained = open_run(args.run, args.checkpoint)
    report: dict[str, Any] = {
        "run": str(args.run), "step": trained.step, "split": args.split, "context_tokens": args.context, "corpora": [],
    }  # fmt: skip
    for corpus in open_text(trained, args.split, args.corpus):
        started = time.perf_counter()
        scored = evaluate(trained, corpus, args.context, console)
        figures = summary(scored, words_of(corpus)) | {"time_s": time.perf_counter() - started}
        # For `bst compare`, which pairs runs by document.
        figures |= {"document_nats": scored.nats.tolist(), "document_bytes": scored.bytes.tolist()}
        report["corpora"].append({"corpus": corpus.storage.where, **figures})
        _show(args, trained, corpus.storage.where, figures)
    return report


def _context(model: ModelConfig, tokens: int | None) -> str:
    """What each token is predicted from: `tokens` at most, None for all before it in its document."""
    seen = f"context {tokens:,} tokens" if tokens else "context the whole document"
    filtered = filter_length(model)
    if filtered and (tokens is None or tokens > filtered):
        return f"{seen}, of which each filter sees the last {filtered:,} inputs"
    return seen


def _show(args: argparse.Namespace, trained: Trained, where: str, figures: dict[str, Any]) -> None:
    rows = []
    for name, key, digits in (
        ("loss, nats per token", "loss_nats_per_token", 4),
        ("perplexity per token", "perplexity_per_token", 2),
        ("perplexity per word", "perplexity_per_word", 2),
        ("bits per byte", "bits_per_byte", 4),
    ):
        error = figures[f"{key}_standard_error"]
        rows.append([name, f"{figures[key]:.{digits}f}", "" if error is None else f"{error:.{digits}f}"])
    print_table(
        Sheet(("", "estimate", "standard error over documents"), rows),
        f"{args.run} after {trained.step:,} steps: {args.split} of {where}",
        f"{figures['documents']:,} documents, {figures['tokens']:,} tokens, {figures['bytes']:,} bytes; "
        f"{_context(trained.recipe.model, args.context)}; {figures['tokens'] / figures['time_s']:,.0f} tokens/s",
    )
