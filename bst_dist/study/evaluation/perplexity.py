"""The default evaluation of `bst eval`: loss, perplexity and bits per byte of a run's model on whole documents."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from bst_base.errors import UserError
from bst_base.stopping import INTERRUPTED, deferred_interrupt
from bst_base.terminal import Sheet, print_table
from bst_dist.config import Recipe
from bst_dist.model.config import ModelConfig
from bst_dist.study.evaluation.corpora import open_text, text_of
from bst_dist.study.evaluation.readers import Readers, joined, start
from bst_dist.study.evaluation.scoring import Score, bits_per_byte, filter_length, reported, score
from bst_dist.study.evaluation.trained import Trained, open_run, require_language_model
from bst_dist.study.statistics import Estimate, exponential, ratio, readable
from bst_dist.train.rundir import read_recipe
from data_pipeline.commands.progress import stages
from data_pipeline.serve.reader import Corpus


def evaluate(
    trained: Trained,
    corpus: Corpus,
    context: int | None,
    rows: int | None,
    readers: Readers,
    stopped: Callable[[], bool],
) -> tuple[Score, np.ndarray]:
    """Score a split with a progress display. Return all readers' scores, and a mask (n,) of finished documents."""
    recipe = trained.recipe
    length, share = recipe.train.sequence_length, corpus.tokens_total / readers.world
    with stages(Console(quiet=not readers.first)) as report:
        scored = score(
            trained.model,
            corpus,
            corpus.lengths,
            corpus.token_bytes(),
            begin=trained.begin(corpus),
            context=context,
            slice_length=min(length, context or length),
            precision=recipe.train.precision,
            rows=rows,
            part=readers.rank,
            parts=readers.world,
            stopped=stopped,
            progress=lambda tokens: report("evaluate", tokens, round(share)),
        )
    scored = Score(*readers.sums(scored.nats, scored.tokens, scored.bytes))
    return scored, scored.tokens == corpus.lengths


def require_sizes(recipe: Recipe, context: int | None = None, rows: int | None = None) -> None:
    """Raise UserError for a context that is not a multiple of the block, or a batch size below 1."""
    block = recipe.model.block
    if context is not None and (context < 1 or context % block):
        raise UserError(f"--context {context} is not a multiple of the model's block, {block}")
    if rows is not None and rows < 1:
        raise UserError(f"--batch-size {rows}: at least 1")


def words_of(corpus: Corpus, documents: np.ndarray) -> np.ndarray:
    """Return the number of words (n,) of each document, separated by white space as in PG-19 (arXiv 1911.05507).

    0 if the ids stand for no text.
    """
    tokenizer = corpus.tokenizer()
    if not tokenizer.has_text:
        return np.zeros(len(documents), np.int64)
    return np.array([len(tokenizer.decode(corpus.document(number)).split()) for number in documents.tolist()])


@dataclass(frozen=True)
class OfCorpus:
    """Results on the documents of one corpus that were read to their end; errors are over documents."""

    corpus: str
    sha256: str
    """Of its manifest."""
    scored: Score
    words: int
    loss: Estimate
    """Nats per token."""
    perplexity: Estimate
    """Per token."""
    word_perplexity: Estimate | None
    """None without words."""
    bits_per_byte: Estimate | None
    """None if the ids stand for no text."""
    held: int
    """Number of documents in the split."""
    time_s: float

    @classmethod
    def of(cls, corpus: Corpus, scored: Score, words: np.ndarray, time_s: float) -> OfCorpus:
        """Compute the results; `words` (n,) is the number of words of each document in `scored`."""
        loss = ratio(scored.nats, scored.tokens)
        by_word = exponential(ratio(scored.nats, words)) if words.sum() else None
        bits = bits_per_byte(scored.nats, scored.bytes)
        return cls(
            corpus.storage.where,
            corpus.sha256,
            scored,
            int(words.sum()),
            loss,
            exponential(loss),
            by_word,
            bits,
            len(corpus),
            time_s,
        )

    @property
    def documents(self) -> int:
        return len(self.scored.tokens)

    @property
    def tokens(self) -> int:
        return int(self.scored.tokens.sum())

    @property
    def bytes(self) -> int:
        return int(self.scored.bytes.sum())

    def report(self) -> dict[str, Any]:
        """Return the machine-readable report. `bst compare` pairs runs by document with the last two entries."""
        return {
            "corpus": self.corpus,
            "sha256": self.sha256,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
            **self.loss.report("loss_nats_per_token"),
            **self.perplexity.report("perplexity_per_token"),
            **reported(self.word_perplexity, "perplexity_per_word"),
            **reported(self.bits_per_byte, "bits_per_byte"),
            "time_s": self.time_s,
            "documents_of_split": self.held,
            "document_nats": self.scored.nats.tolist(),
            "document_bytes": self.scored.bytes.tolist(),
        }


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Run the evaluation. Return the report; None in all processes except the first."""
    recipe = read_recipe(args.run)
    require_sizes(recipe, args.context, args.batch_size)
    if args.ranks:
        require_language_model(args.run, recipe)
        text_of(args.run, recipe, args.split, args.corpus)  # so that an error is reported once, not by every process
        if "RANK" in os.environ:
            raise UserError("--ranks starts processes of its own, and a launcher has started this one (RANK is set)")
        return start(_options(args), args.ranks)
    with joined() as readers:
        return _read(args, readers)


def _read(args: argparse.Namespace, readers: Readers) -> dict[str, Any] | None:
    trained = open_run(args.run, args.checkpoint, args.precision, args.averaged)
    found: list[OfCorpus] = []
    stopped = False
    with deferred_interrupt() as stop_requested:
        for corpus in open_text(trained, args.split, args.corpus):
            started = time.perf_counter()
            scored, whole = evaluate(trained, corpus, args.context, args.batch_size, readers, stop_requested)
            if whole.any() and readers.first:
                words = words_of(corpus, np.flatnonzero(whole))
                found.append(OfCorpus.of(corpus, scored.of(whole), words, time.perf_counter() - started))
                _show(args, trained, found[-1])
            elif readers.first:
                print(f"{corpus.storage.where}: stopped before any document was finished")
            if stopped := not whole.all():
                break
    return _report(args, trained, readers.world, found, stopped) if readers.first else None


def _report(
    args: argparse.Namespace, trained: Trained, ranks: int, found: list[OfCorpus], stopped: bool
) -> dict[str, Any]:
    return {
        "run": str(args.run),
        "step": trained.step,
        "split": args.split,
        "context_tokens": args.context,
        "averaged": args.averaged,
        "precision": trained.recipe.train.precision,
        "ranks": ranks,
        "corpora": [each.report() for each in found],
        **({"passed": False, "exit_status": INTERRUPTED} if stopped else {}),
    }


def _options(args: argparse.Namespace) -> list[str]:
    """Return the command-line arguments for the processes of --ranks."""
    names = ("corpus", "checkpoint", "context", "batch_size", "precision")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [str(args.run), "--split", args.split, *(["--averaged"] if args.averaged else []), *options]


def _context(model: ModelConfig, tokens: int | None) -> str:
    """Describe the context of each prediction: at most `tokens` tokens, or for None the whole document before it."""
    seen = f"context {tokens:,} tokens" if tokens else "context the whole document"
    filtered = filter_length(model)
    if filtered and (tokens is None or tokens > filtered):
        return f"{seen}, of which each filter sees the last {filtered:,} inputs"
    return seen


def _documents(found: OfCorpus) -> str:
    """Describe how many documents were read, and after a stop which ones."""
    read, held = found.documents, found.held
    return f"{read:,} documents" if read == held else f"stopped: only {read:,} of {held:,} documents, the longest first"


def _show(args: argparse.Namespace, trained: Trained, found: OfCorpus) -> None:
    rows = []
    for name, estimate, digits in (
        ("loss, nats per token", found.loss, 4),
        ("perplexity per token", found.perplexity, 2),
        ("perplexity per word", found.word_perplexity, 2),
        ("bits per byte", found.bits_per_byte, 4),
    ):
        if estimate is None:
            continue
        error = estimate.standard_error
        rows.append([name, readable(estimate.value, digits), "" if error is None else readable(error, digits)])
    print_table(
        Sheet(("", "estimate", "standard error over documents"), rows),
        f"{args.run} after {trained.step:,} steps{', averaged weights' if args.averaged else ''}: {args.split} of "
        f"{found.corpus}",
        f"{_documents(found)}, {found.tokens:,} tokens{f', {found.bytes:,} bytes' if found.bytes else ''}; "
        f"{_context(trained.recipe.model, args.context)}; {found.tokens / found.time_s:,.0f} tokens/s",
    )
