"""Evaluate a run's model: on whole documents, at several lengths, or on tasks of the lm-evaluation-harness.

Without options, every document of the split is read from its beginning through the carried state, so each token is
predicted from all that came before it in its document, however long (--context L makes the model forget after every L
tokens). The end of a document is predicted too, and its cost counted. Errors are standard errors over documents, by
the delta method for a ratio of sums. Perplexity depends on the tokenizer; bits per byte of text does not.

--lengths L,L measures the same text in sequences of each length, beside the trained one: joined as in training, or the
documents that are that long where the model was trained on isolated ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bst_dist.evaluate import perplexity
from data_pipeline.errors import UserError

FORMS = {"lengths": ("tokens", "plot")}
"""The option that asks for a form of evaluation other than whole documents, and those that belong to it alone."""
WHOLE_DOCUMENTS = ("context",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run")
    parser.add_argument("--split", default="validation", help="the documents to read (default: %(default)s)")
    parser.add_argument("--corpus", metavar="CORPUS",
                        help="another prepared corpus of the same tokenizer (default: its recipe's)")  # fmt: skip
    parser.add_argument("--checkpoint", metavar="STEP", type=int, help="weights after this step (default: the newest)")
    parser.add_argument("--context", metavar="L", type=int,
                        help="tokens after which the model forgets (default: whole documents)")  # fmt: skip
    lengths = parser.add_argument_group("length generalisation")
    lengths.add_argument("--lengths", metavar="L,L", type=_lengths, help="lengths in tokens, multiples of the block")
    lengths.add_argument("--tokens", metavar="N", type=int, help="read at most N tokens (default: the whole split)")
    lengths.add_argument("--plot", metavar="PATH", type=Path,
                         help="draw the loss by position and by length: png, pdf or svg")  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    form = _form(args)
    if form == "lengths":
        from bst_dist.evaluate import lengths_report  # brings matplotlib

        return lengths_report.run(args)
    return perplexity.run(args)


def _form(args: argparse.Namespace) -> str | None:
    """What is asked for; raises UserError for two things at once, or an option of something else."""
    asked = [form for form in FORMS if getattr(args, form) is not None]
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)} are two evaluations: ask for one at a time")
    own = FORMS[asked[0]] if asked else WHOLE_DOCUMENTS
    for form, options in (*FORMS.items(), ("whole documents", WHOLE_DOCUMENTS)):
        for option in options:
            if option not in own and getattr(args, option) is not None:
                needs = f"needs --{form}" if form in FORMS else f"does not go with --{asked[0]}"
                raise UserError(f"--{option.replace('_', '-')} {needs}")
    return asked[0] if asked else None


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of lengths like 512,4096") from None
