"""The identity of a corpus, on which its bytes depend: settings, content of the source, versions of the tools.

Finished corpora and unfinished work are reused only if all of this is the same. Names and sizes are not enough: a file
may be edited without a change of its size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from bst_base.errors import UserError
from data_pipeline.format.manifest import MANIFEST, Manifest, sha256_file
from data_pipeline.format.tokenizer import (
    IdsOnly,
    Tokenizer,
    adopt_tokenizer,
    extended,
    read_tokenizer,
    require_own_roles,
)
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.filters import identity as filter_identity
from data_pipeline.prepare.parallel import Workers
from data_pipeline.sources import Part, Source

# Settings that do not change a corpus's bytes.
_MACHINE = {
    "output": True,
    "continues": True,
    "workers": True,
    "bad_record_limit": True,
    "source": {"path", "storage_options"},
}


class HashTask(NamedTuple):
    """The data that a worker needs to hash some of a source's files."""

    source: Source
    parts: tuple[Part, ...]


def identity(
    config: PrepareConfig, groups: list[tuple[Part, ...]], workers: Workers, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Return the identity of the corpus, without anything that names a machine or its directories.

    Reads the whole source.
    """
    settings = config.model_dump(mode="json", exclude=_MACHINE)
    if config.tokenizer.reuse is not None:
        settings["tokenizer"] = {"reuse": given_tokenizer(config).sha256}
    for name in ("tiktoken", "special_tokens", "text_tokens"):  # left out if not used, as older versions did
        if not settings["tokenizer"].get(name, True):
            del settings["tokenizer"][name]
    del settings["text"]["filters"]  # left out if there are none, as older versions did
    if config.text.filters:
        settings["text"]["filters"] = [filter_identity(name) for name in config.text.filters]
    done, total = 0, sum(part.size for group in groups for part in group)
    progress("hash source", 0, total)
    hashes: dict[str, str] = {}
    names: dict[str, str] = {}
    for found in workers.run(_hash_parts, (HashTask(config.source, group) for group in groups)):
        hashes |= found.hashes
        names |= found.names
        done += found.size
        progress("hash source", done, total)
    source = {**config.source.provenance(), "parts": sum(map(len, groups)), "content_sha256": _joined(hashes)}
    if names:
        source["names_sha256"] = _joined(names)
    tools = ["sentencepiece", *(["rensa"] if config.deduplicate.method == "minhash" else [])]
    return {"settings": settings, "source": source, **{tool: version(tool) for tool in tools}}


class _Hashed(NamedTuple):
    hashes: dict[str, str]  # of the content, by part
    names: dict[str, str]  # of the files' names, by part, where the text holds them
    size: int


def _joined(hashes: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{part}\0{hashes[part]}\n" for part in sorted(hashes)).encode()).hexdigest()


def _hash_parts(task: HashTask) -> _Hashed:
    """Hash the files of each part. A file that is cut into several parts is hashed with the first one."""
    hashes, names = {}, {}
    for part in task.parts:
        if part.start <= 0:
            files, key = list(task.source.files(part)), part.name.encode("utf-8", "surrogateescape").hex()
            hashes[key] = hashlib.sha256("".join(map(_hash, files)).encode()).hexdigest()
            if (root := task.source.names_from(part)) is not None:
                below = "\0".join(path.relative_to(root).as_posix() for path in files)
                names[key] = hashlib.sha256(below.encode("utf-8", "surrogateescape")).hexdigest()
    return _Hashed(hashes, names, sum(part.size for part in task.parts))


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:  # extraction meets the same error, and handles it by the policy for bad records
        return f"unreadable {error.errno}"


def given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    """Return the tokenizer if it is not trained here, with the tokens that the settings add; None if it is trained.

    It is the tokenizer of a prepared corpus, an adopted one from elsewhere, or one that knows only ids. Raises
    UserError when it cannot encode the text of the source.
    """
    if config.tokenizer.reuse is None:
        return IdsOnly.of(config.source.vocab_size, config.source.eos_id) if config.source.tokenized else None
    path = config.tokenizer.reuse.expanduser()
    if (path / MANIFEST).is_file():
        require_own_roles(config.tokenizer, path)
        info = Manifest.read(path).tokenizer
        tokenizer = read_tokenizer(path / info.file, info.sha256)
    else:
        tokenizer = adopt_tokenizer(path, config.tokenizer)
    if not (tokenizer.has_text or config.source.tokenized):
        raise UserError(f"{path}: token ids without a tokenizer cannot encode text (tokenizer.reuse)")
    return extended(tokenizer, config.tokenizer, str(path))


def name_of(identity: dict[str, Any]) -> str:
    """Return a short name for unfinished work. Other settings or another source give another name."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def check_same(found: dict[str, Any], wanted: dict[str, Any], output: Path) -> None:
    """Raise UserError, naming the differences, unless a finished corpus is the wanted one."""
    told = [_told(*difference) for difference in differences(found, wanted)]
    if told:
        raise UserError(f"{output} holds another corpus ({'; '.join(told)}): choose another output, or delete it first")


def check_there(manifest: Manifest, corpus: Path) -> None:
    """Raise UserError when a file of a finished corpus is missing or cut short.

    Only `verify` checks the hashes of shards.
    """
    info = manifest.tokenizer
    read_tokenizer(corpus / info.file, info.sha256)
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        tar, index = corpus / shard.file, corpus / shard.index
        lost = [path.name for path in (tar, index) if not path.is_file()]
        if not lost and tar.stat().st_size != shard.bytes:
            lost = [tar.name]
        if lost:
            raise UserError(
                f"{corpus} is incomplete ({lost[0]} is missing or cut short): copy the file there again; or, to "
                f"prepare all of it again, delete {MANIFEST} there and restart"
            )


def _told(name: str, old: Any, new: Any) -> str:
    if name == "continues":
        return "it continues another corpus than this" if old else "it continues no other"
    if name == "source.content_sha256":
        return (
            "the source's files are not those it was made from"
            if old
            else "its source was not hashed, by an old version"
        )
    if name == "source.names_sha256":
        return "the source's files have other names than those it was made from"
    return f"{name.removeprefix('settings.')}: {old!r} there, {new!r} now"


def differences(found: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, found value, wanted value) of each difference between two identities.

    Corpora of older versions have no hash of the names of files, and some have one of a listing: both are ignored.
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            old = key == "listing_sha256" or (key == "names_sha256" and key not in found)
            if not (name == "source" and old):
                yield from differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield name, found, wanted
