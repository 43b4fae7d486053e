"""The settings of a preparation. One YAML file of them describes one corpus."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bst_base import places
from bst_base.settings import Config
from data_pipeline.format.tokenizer import TokenizerConfig
from data_pipeline.prepare.dedup import DedupConfig
from data_pipeline.prepare.text import TextConfig
from data_pipeline.sources import AnySource
from data_pipeline.sources.base import LocalPath


def _made_here(value: Any) -> Any:
    if isinstance(value, str) and "://" in value:
        raise ValueError(
            "must be a path on this machine's file systems; prepare the corpus there, then send it with "
            f"'bst data push DIRECTORY {value}'"
        )
    return value


class PrepareConfig(Config):
    """One corpus: its source, and how it is made. One YAML file holds one of these."""

    source: AnySource
    """Where the text comes from: `kind`, and the settings of that kind (see `bst data sources`)."""
    output: Annotated[places.LocalPath, BeforeValidator(_made_here)]
    """Directory of the prepared corpus."""
    continues: LocalPath | None = None
    """A corpus made with the same settings when the source had fewer documents. Its shards and its tokenizer are kept,
    and what is new in the source is added in further shards. That corpus itself does not change."""
    text: TextConfig = TextConfig()
    """What to do to the text first."""
    deduplicate: DedupConfig = DedupConfig()
    """What counts as a duplicate."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How the tokenizer is made."""
    validation_fraction: float = Field(0.05, ge=0.0, lt=1.0)
    """Share of the document clusters that go to validation, unless the source decides."""
    shard_bytes: int = Field(64 << 20, ge=1)
    """Bytes of text per shard: the unit of parallel work, and of what is repeated after an interruption."""
    seed: int = 0
    """Decides which clusters go to validation."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """When a record, file or directory cannot be read or is malformed: `stop` at the first; `skip` it and list it in
    skipped.jsonl."""
    bad_record_limit: int = Field(1000, ge=0)
    """Maximum number of skipped records; one more stops the preparation."""
    workers: int | None = Field(None, ge=1)
    """Number of processes; by default one per CPU. Under `mpirun -n N`, N - 1 ranks work, whatever this says."""

    @model_validator(mode="after")
    def _tokens_have_a_vocabulary(self) -> PrepareConfig:
        if not self.source.tokenized:
            return self
        if self.text != TextConfig():
            raise ValueError(
                f"text: the source {self.source.kind} holds tokens, so these settings have no effect; leave them out"
            )
        if self.tokenizer.reuse is None and None in (self.source.vocab_size, self.source.eos_id):
            raise ValueError(
                f"the source {self.source.kind} holds token ids: give their tokenizer (tokenizer.reuse), or else "
                "source.vocab_size and source.eos_id"
            )
        if self.tokenizer.added and self.tokenizer.reuse is None:
            raise ValueError(
                f"tokenizer.special_tokens, text_tokens: the source {self.source.kind} holds token ids, and "
                "source.vocab_size gives their number: raise that instead"
            )
        if self.tokenizer.text_tokens:
            raise ValueError(
                f"tokenizer.text_tokens: the source {self.source.kind} holds token ids, so no text is encoded; use "
                "special_tokens instead"
            )
        if self.tokenizer.reuse is not None and self.source.vocab_size is not None:
            raise ValueError("source.vocab_size: tokenizer.reuse already sets it; leave it out")
        return self
