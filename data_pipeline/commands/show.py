"""List the documents of a prepared corpus, find some, or print one, decoded from its tokens.

    bst data show corpora/stdlib                         # the first documents of each split
    bst data show corpora/stdlib --find json --limit 50  # those whose path or title holds a text
    bst data show corpora/stdlib 000000012               # one document, by key
    bst data show corpora/stdlib json                    # or by its path in the source

A document is printed exactly as it was prepared, to the byte, without the end-of-document token. Only a terminal gets a
newline after a text without one. A number is a key first; if no document has that key, it is a path.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from bst_base.arguments import at_least
from bst_base.errors import UserError
from bst_base.terminal import Sheet, print_table
from data_pipeline.commands.directory import corpus_directory
from data_pipeline.format.manifest import Manifest
from data_pipeline.format.shards import find_document, list_documents
from data_pipeline.format.tokenizer import Tokenizer, read_tokenizer

_LISTED = 20  # documents listed for each split, unless --limit is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", type=corpus_directory, help="directory of a prepared corpus")
    parser.add_argument("document", nargs="?", help="key of a document, or its path in the source; without it, a list")
    parser.add_argument(
        "--find",
        metavar="TEXT",
        help="list the documents whose path or title contains TEXT; upper and lower case are the same",
    )
    parser.add_argument(
        "--limit", metavar="N", type=at_least(1), help=f"list at most N documents of each split (default: {_LISTED})"
    )
    parser.add_argument("--tokens", type=at_least(1), metavar="N", help="print only the document's first N tokens")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """List documents, or find and print one: its metadata to the error stream, its text to the output."""
    manifest = Manifest.read(args.corpus)
    if args.document is None:
        if args.tokens is not None:
            raise UserError("--tokens is for one document: name it by key or path")
        return _list(args.corpus, manifest, args.find, args.limit or _LISTED)
    if args.find is not None or args.limit is not None:
        raise UserError("--find and --limit are for lists: leave out the document")
    tokenizer = read_tokenizer(args.corpus / manifest.tokenizer.file, manifest.tokenizer.sha256)
    keys = [f"{int(args.document):09d}"] if args.document.isdecimal() else []
    shards = [(split, shard.file) for split, infos in manifest.splits.items() for shard in infos]
    for key, (split, file) in product([*keys, None], shards):
        found = find_document(args.corpus / file, key, args.document)
        if found is not None:
            return _show(tokenizer, args.tokens, {"split": split, "shard": file, "key": found[0]}, *found[1:])
    raise UserError(
        f"{args.corpus}: no document with the key or the path {args.document!r}; "
        f"'bst data show {args.corpus} --find TEXT' lists those whose path or title holds a text"
    )


def _list(corpus: Path, manifest: Manifest, wanted: str | None, limit: int) -> dict[str, Any]:
    rows: list[list[str]] = []
    listed: list[dict[str, Any]] = []
    for split in manifest.splits:
        for number, (key, info) in enumerate(_matching(corpus, manifest, split, wanted)):
            if number == limit:
                rows.append([split, "…", "", "", "there are more: --limit N lists N of each split"])
                break
            name = f"{info['path']}  ({info['title']})" if info.get("title") else info["path"]
            rows.append([split, key, f"{info['n_tokens']:,}", f"{info.get('n_bytes', 0):,}", name])
            listed.append({"split": split, "key": key, **info})
    if not listed:
        raise UserError(f"{corpus}: no document whose path or title holds {wanted!r}")
    print_table(Sheet(("split", "key", "tokens", "bytes", "path"), rows))
    return {"corpus": str(corpus), "documents": listed}


def _matching(corpus: Path, manifest: Manifest, split: str, wanted: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, JSON) of the documents of a split whose path or title contains `wanted`; all if that is None."""
    for shard in manifest.splits[split]:
        for key, info in list_documents(corpus / shard.file):
            if wanted is None or wanted.lower() in f"{info['path']}\n{info.get('title', '')}".lower():
                yield key, info


def _show(tokenizer: Tokenizer, limit: int | None, place: dict[str, Any], info: dict[str, Any], tokens: Any) -> dict:
    text = tokenizer.decode(tokens[:limit])
    Console(stderr=True).print({**place, **info})
    sys.stdout.write(text)
    if sys.stdout.isatty() and not text.endswith("\n"):
        sys.stdout.write("\n")
    return {**place, **info, "text": text}
