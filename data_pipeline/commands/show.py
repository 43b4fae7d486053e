"""Print a document of a prepared corpus, decoded from its tokens.

    bst data show corpora/stdlib 000000012      # by key
    bst data show corpora/stdlib json           # by its path in the source

What is printed is the text that was prepared, to the byte, without the end-of-document token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from bst_base.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.format.shards import find_document
from data_pipeline.format.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("corpus", type=Path, help="directory of a prepared corpus")
    parser.add_argument("document", help="key of the document, or its path in the source")
    parser.add_argument("--tokens", type=int, metavar="N", help="only its first N tokens")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Find the document and print it: what it is to the error stream, its text to the output."""
    manifest = Manifest.read(args.corpus)
    tokenizer = Tokenizer.read(args.corpus / manifest.tokenizer.file)
    if tokenizer.sha256 != manifest.tokenizer.sha256:
        raise UserError(
            f"{args.corpus / manifest.tokenizer.file}: not the tokenizer of this corpus; copy the right one"
        )
    key = f"{int(args.document):09d}" if args.document.isdecimal() else None
    for split, shards in manifest.splits.items():
        for shard in shards:
            found = find_document(args.corpus / shard.file, key, args.document)
            if found is not None:
                return _show(tokenizer, args.tokens, {"split": split, "shard": shard.file, "key": found[0]}, *found[1:])
    raise UserError(f"{args.corpus}: no document with the key or the path {args.document!r}")


def _show(tokenizer: Tokenizer, limit: int | None, place: dict[str, Any], info: dict[str, Any], tokens: Any) -> dict:
    text = tokenizer.decode(tokens[:limit])
    Console(stderr=True).print({**place, **info})
    sys.stdout.write(text)
    if not text.endswith("\n"):
        sys.stdout.write("\n")
    return {**place, **info, "text": text}
