"""`bst eval` without another form: loss, perplexity and bits per byte of a run's model on whole documents."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console

from bst_base.errors import UserError
from bst_base.stopping import STATUS, heeding
from bst_base.terminal import Sheet, print_table
from bst_dist.config import Recipe
from bst_dist.model.config import ModelConfig
from bst_dist.study.evaluation.corpora import open_text, text_of
from bst_dist.study.evaluation.readers import Readers, joined, start
from bst_dist.study.evaluation.scoring import Score, filter_length, score
from bst_dist.study.evaluation.trained import Trained, open_run, require_language_model
from bst_dist.study.statistics import Estimate, exponential, ratio, readable
from bst_dist.train.rundir import read_recipe
from data_pipeline.commands.progress import stages
from data_pipeline.serve.reader import Corpus


def evaluate(
    trained: Trained, corpus: Corpus, context: int | None, rows: int | None, readers: Readers,
    stopped: Callable[[], bool],
) -> tuple[Score, np.ndarray]:  # fmt: skip
    """Score a split, saying how far it is; returns what all readers have found, and (n,) which documents are whole."""
    recipe = trained.recipe
    length, share = recipe.train.sequence_length, corpus.tokens_total / readers.world
    with stages(Console(quiet=not readers.first)) as report:
        scored = score(
            trained.model, corpus, corpus.lengths, corpus.token_bytes(),
            begin=trained.begin(corpus), context=context, slice_length=min(length, context or length),
            precision=recipe.train.precision, rows=rows, part=readers.rank, parts=readers.world, stopped=stopped,
            progress=lambda tokens: report("evaluate", tokens, round(share)),
        )  # fmt: skip
    scored = Score(*readers.sums(scored.nats, scored.tokens, scored.bytes))
    return scored, scored.tokens == corpus.lengths


def require_sizes(recipe: Recipe, context: int | None = None, rows: int | None = None) -> None:
    """Raise UserError for a context that is no whole blocks, or no row at all."""
    block = recipe.model.block
    if context is not None and (context < 1 or context % block):
        raise UserError(f"--context {context} is not a multiple of the model's block, {block}")
    if rows is not None and rows < 1:
        raise UserError(f"--batch-size {rows}: at least 1")


def words_of(corpus: Corpus, documents: np.ndarray) -> np.ndarray:
    """(n,) words of documents' text, as PG-19 counts them: what white space separates (arXiv 1911.05507)."""
    tokenizer = corpus.tokenizer()
    return np.array([len(tokenizer.decode(corpus.document(number)).split()) for number in documents.tolist()])


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


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Evaluate; None in all processes but the first of several."""
    recipe = read_recipe(args.run)
    require_sizes(recipe, args.context, args.batch_size)
    if args.ranks:
        require_language_model(args.run, recipe)
        text_of(args.run, recipe, args.split, args.corpus)  # so that what is wrong is said once
        if "RANK" in os.environ:
            raise UserError("--ranks starts processes of its own, and a launcher has started this one (RANK is set)")
        return start(_options(args), args.ranks)
    with joined() as readers:
        return _read(args, readers)


def _read(args: argparse.Namespace, readers: Readers) -> dict[str, Any] | None:
    trained = open_run(args.run, args.checkpoint, args.precision, args.averaged)
    report: dict[str, Any] = {
        "run": str(args.run), "step": trained.step, "split": args.split, "context_tokens": args.context,
        "averaged": args.averaged,
        "precision": trained.recipe.train.precision, "ranks": readers.world, "corpora": [],
    }  # fmt: skip
    with heeding() as told:
        for corpus in open_text(trained, args.split, args.corpus):
            started = time.perf_counter()
            scored, whole = evaluate(trained, corpus, args.context, args.batch_size, readers, told)
            if whole.any() and readers.first:
                found = scored.of(whole)
                figures = summary(found, words_of(corpus, np.flatnonzero(whole)))
                figures |= {"time_s": time.perf_counter() - started, "documents_of_split": len(corpus)}
                # For `bst compare`, which pairs runs by document.
                figures |= {"document_nats": found.nats.tolist(), "document_bytes": found.bytes.tolist()}
                report["corpora"].append({"corpus": corpus.storage.where, **figures})
                _show(args, trained, corpus.storage.where, figures)
            elif readers.first:
                print(f"{corpus.storage.where}: stopped before a document was read to its end")
            if not whole.all():
                report |= {"passed": False, "exit_status": STATUS}
                break
    return report if readers.first else None


def _options(args: argparse.Namespace) -> list[str]:
    """What the processes of --ranks are given, as on the command line."""
    names = ("corpus", "checkpoint", "context", "batch_size", "precision")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [str(args.run), "--split", args.split, *(["--averaged"] if args.averaged else []), *options]


def _context(model: ModelConfig, tokens: int | None) -> str:
    """What each token is predicted from: `tokens` at most, None for all before it in its document."""
    seen = f"context {tokens:,} tokens" if tokens else "context the whole document"
    filtered = filter_length(model)
    if filtered and (tokens is None or tokens > filtered):
        return f"{seen}, of which each filter sees the last {filtered:,} inputs"
    return seen


def _documents(figures: dict[str, Any]) -> str:
    """How many were read; when not all, which."""
    read, held = figures["documents"], figures["documents_of_split"]
    return f"{read:,} documents" if read == held else f"stopped: only {read:,} of {held:,} documents, the longest first"


def _show(args: argparse.Namespace, trained: Trained, where: str, figures: dict[str, Any]) -> None:
    rows = []
    for name, key, digits in (
        ("loss, nats per token", "loss_nats_per_token", 4),
        ("perplexity per token", "perplexity_per_token", 2),
        ("perplexity per word", "perplexity_per_word", 2),
        ("bits per byte", "bits_per_byte", 4),
    ):
        error = figures[f"{key}_standard_error"]
        rows.append([name, readable(figures[key], digits), "" if error is None else readable(error, digits)])
    print_table(
        Sheet(("", "estimate", "standard error over documents"), rows),
        f"{args.run} after {trained.step:,} steps{', averaged weights' if args.averaged else ''}: {args.split} of "
        f"{where}",
        f"{_documents(figures)}, {figures['tokens']:,} tokens, {figures['bytes']:,} bytes; "
        f"{_context(trained.recipe.model, args.context)}; {figures['tokens'] / figures['time_s']:,.0f} tokens/s",
    )
