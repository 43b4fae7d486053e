"""`manifest.json`: the files of a prepared corpus, how it was made, and the hashes that show whether it is unchanged.

The manifest is written last, so a directory with a manifest is complete. Its own SHA-256 identifies the corpus.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bst_base.errors import UserError
from bst_base.files import atomic_file
from bst_base.settings import Config, parse
from data_pipeline.format.shard_table import ShardParser, ShardTable

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


class TokenizerInfo(Config):
    """The corpus's tokenizer, and the ids that a trainer needs."""

    file: str
    """Name of the model inside the corpus directory."""
    sha256: str
    """SHA-256 of the model file."""
    vocab_size: int
    """Number of ids."""
    bos_id: int
    """The id that begins a text; not stored in shards."""
    eos_id: int
    """The id that ends every stored document."""
    pad_id: int
    """The padding id; not stored in shards."""


class ExtentsInfo(Config):
    """A file with the stream positions that each shard takes up when documents are isolated (`extents`)."""

    file: str
    """Name inside the corpus directory."""
    sha256: str
    """SHA-256 of the file."""


class Manifest(Config):
    """A prepared corpus: its tokenizer, its shards by split, and where it came from."""

    format_version: Literal[1] = FORMAT_VERSION
    """Version of the directory's layout. A reader refuses an unknown version."""
    tokenizer: TokenizerInfo
    """The tokenizer that every shard was encoded with."""
    dtype: Literal["uint16", "uint32"]
    """Type of the stored tokens, little-endian."""
    splits: dict[str, ShardTable]
    """The shards of each split, in order. `train` and `validation` always exist; an empty split has no shards."""
    extents: dict[str, ExtentsInfo] | None = None
    """Files of extents by split. Corpora of older versions have none; their indexes are read instead."""
    provenance: dict[str, Any]
    """Settings and versions the corpus was made with, and what was left out."""
    licences: dict[str, int]
    """Number of documents by licence, over all splits."""

    @property
    def token_dtype(self) -> np.dtype:
        """The numpy type of the stored tokens."""
        return np.dtype(self.dtype).newbyteorder("<")

    def shards(self, split: str) -> ShardTable:
        """Return the shards of a split; raises UserError for a split that the corpus does not have."""
        if split not in self.splits:
            raise UserError(f"the corpus has no split {split!r}, only {', '.join(self.splits)}")
        return self.splits[split]

    def documents(self, split: str) -> int:
        """Return the number of documents in a split."""
        return int(self.shards(split).column("documents").sum())

    def tokens(self, split: str) -> int:
        """Return the number of tokens in a split."""
        return int(self.shards(split).column("tokens").sum())

    def text_bytes(self, split: str) -> int:
        """Return the UTF-8 bytes of text in a split."""
        return int(self.shards(split).column("text_bytes").sum())

    @property
    def sha256(self) -> str:
        """SHA-256 of the manifest file.

        It identifies the whole corpus, since the file contains the hashes of all other files.
        """
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the canonical content of the file."""
        fields = self.model_dump(mode="json")
        if self.extents is None:
            del fields["extents"]  # so that manifests of older versions stay the same, byte for byte
        text = json.dumps(fields, indent=1, sort_keys=True, ensure_ascii=False)
        return text.encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Parse a manifest read from `where`; raises UserError, naming the problem, when it is not valid."""
        parser = ShardParser()
        try:
            raw = json.loads(data, object_hook=parser.hook)
        except ValueError as error:
            raise UserError(f"{where}: not a manifest: {error}; prepare the corpus again") from None
        if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
            found = raw.get("format_version") if isinstance(raw, dict) else None
            raise UserError(f"{where}: format version {found!r}, this program reads {FORMAT_VERSION}")
        if isinstance(raw.get("splits"), dict):
            raw["splits"] = {split: parser.table(shards) for split, shards in raw["splits"].items()}
        return parse(cls, raw, where=where)

    @classmethod
    def read(cls, corpus: str | Path) -> Manifest:
        """Read the manifest of a corpus directory; raises UserError when there is none."""
        path = Path(corpus) / MANIFEST
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{corpus}: no prepared corpus there ({MANIFEST} is missing); make one with 'bst data prepare'"
            ) from None
        return cls.from_bytes(data, str(path))

    def write(self, corpus: Path) -> None:
        """Write the file into a corpus directory atomically."""
        with atomic_file(corpus / MANIFEST) as file:
            file.write(self.to_bytes())


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
