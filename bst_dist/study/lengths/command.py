"""`bst eval --lengths`: the loss at several lengths, as a table, a plot and a report."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from bst_base.terminal import Sheet, print_table
from bst_dist.study.evaluation.corpora import open_text
from bst_dist.study.evaluation.perplexity import require_sizes
from bst_dist.study.evaluation.scoring import reported
from bst_dist.study.evaluation.trained import Trained, open_run
from bst_dist.study.lengths.figure import draw
from bst_dist.study.lengths.measure import How, LengthResult, how, measure
from bst_dist.study.lengths.text import longest
from bst_dist.study.report.style import save_afterwards
from bst_dist.study.statistics import Estimate, readable
from bst_dist.train.rundir import read_recipe
from data_pipeline.commands.progress import stages
from data_pipeline.serve.reader import Corpus

HOWS: dict[How, str] = {
    "carried": "carried: a state of constant size goes from slice to slice",
    "fir": "fir: no state behind this filter; beyond its trained length it sees that many inputs",
    "cache": "cache: full attention keeps all keys and values, so memory grows with the length",
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    require_sizes(read_recipe(args.run), rows=args.batch_size)
    trained = open_run(args.run, args.checkpoint, args.precision, args.averaged)
    for length in args.lengths:
        how(trained.recipe.model, length)
    report: dict[str, Any] = {
        "run": str(args.run),
        "step": trained.step,
        "split": args.split,
        "trained_length_tokens": trained.recipe.train.sequence_length,
        "documents": trained.recipe.data.documents,
        "corpora": [],
    }
    drawn: dict[str, list[LengthResult]] = {}
    for corpus in open_text(trained, args.split, args.corpus):
        lengths = with_trained(trained, corpus, args.lengths)
        with stages(Console()) as told:
            found = measure(
                trained,
                corpus,
                lengths,
                tokens=args.tokens,
                rows=args.batch_size,
                progress=lambda *done: told("evaluate", *done),
            )
        _show(args, trained, corpus, found)
        report["corpora"].append(_report(corpus, found))
        drawn[corpus.where] = found
    if args.plot:
        save_afterwards(args, lambda: draw(drawn, trained.recipe.train.sequence_length), args.plot)
    return report


def with_trained(trained: Trained, corpus: Corpus, lengths: list[int]) -> list[int]:
    """Return the lengths in order, with the trained length for comparison if the corpus has enough text for it."""
    own = trained.recipe.train.sequence_length
    fits = own <= longest(corpus, trained.recipe.data.documents != "joined")
    return sorted({*lengths, own} if fits else {*lengths})


def _show(args: argparse.Namespace, trained: Trained, corpus: Corpus, found: list[LengthResult]) -> None:
    own, kinds = trained.recipe.train.sequence_length, {each.how for each in found}
    names = (
        "length",
        "perplexity",
        "nats per token",
        f"more than at {own:,}",
        "bits/byte",
        "docs as long",
        "memory, MiB",
    )
    rows = []
    for each in found:
        compared = each.versus_trained is not None and each.length != own
        rows.append(
            [
                f"{each.length:,}",
                readable(each.perplexity.value, 2),
                str(each.nats_per_token),
                each.versus_trained.text(4, sign=True) if compared else "",
                "" if each.bits_per_byte is None else f"{each.bits_per_byte.value:.4f}",
                f"{each.that_long:,}",
                "" if each.peak_bytes is None else f"{each.peak_bytes / 2**20:,.0f}",
                *([each.how] if kinds != {"carried"} else []),
            ]
        )
    print_table(
        Sheet((*names, *(["past"] if kinds != {"carried"} else [])), rows),
        f"{args.run} after {trained.step:,} steps, trained on sequences of {own:,}: {corpus.where}",
        _caption(trained, corpus, found),
    )


def _caption(trained: Trained, corpus: Corpus, found: list[LengthResult]) -> str:
    most, joined = max(found, key=lambda each: each.length), trained.recipe.data.documents == "joined"
    text = (
        f"the documents joined to one stream, as in training: {most.documents:,} of {len(corpus):,} documents"
        if joined
        else f"each document by itself: the {most.documents:,} of {len(corpus):,} documents that are that long"
    )
    lines = [
        f"The same {most.tokens:,} tokens at each length, in sequences of {most.length:,} and pieces of them; {text}.",
        "± standard errors over documents; those of the differences are paired.",
        *(HOWS[kind] for kind in dict.fromkeys(each.how for each in found)),
    ]
    return "\n".join(lines)


def _report(corpus: Corpus, found: list[LengthResult]) -> dict[str, Any]:
    return {
        "corpus": corpus.where,
        "documents_of_split": len(corpus),
        "documents": found[0].documents,
        "tokens": found[0].tokens,
        "bytes": int(found[0].score.bytes.sum()),
        "lengths": [_length(each) for each in found],
    }


def _length(each: LengthResult) -> dict[str, Any]:
    return {
        "length_tokens": each.length,
        "how": each.how,
        "sequences": each.sequences,
        "documents_that_long": each.that_long,
        **each.nats_per_token.report("loss_nats_per_token"),
        **each.perplexity.report("perplexity_per_token"),
        **reported(each.bits_per_byte, "bits_per_byte"),
        **_versus(each.versus_trained),
        "peak_memory_bytes": each.peak_bytes,
        "positions": [
            {
                "first": at.first,
                "last": at.last,
                "tokens": at.tokens,
                **at.nats_per_token.report("loss_nats_per_token"),
                **_versus(at.versus_trained),
            }
            for at in each.positions
        ],
    }


def _versus(difference: Estimate | None) -> dict[str, float | None]:
    return {} if difference is None else difference.report("loss_over_trained_nats_per_token")
