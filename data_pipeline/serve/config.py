"""The settings of the loader: which corpora, in which order, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bst_base.addresses import CorpusAddress, no_secret
from bst_base.places import Address
from bst_base.settings import Config
from data_pipeline.serve.order.step_values import require_increasing
from data_pipeline.store.base import StorageConfig


class MixedCorpus(Config):
    """One corpus of a mixture."""

    corpus: CorpusAddress
    """Directory or address of a prepared corpus."""
    weight: float = Field(1.0, ge=0, allow_inf_nan=False, le=1e9)
    """Its share of the sequences, relative to the other weights; 0 leaves it out until the weights change."""


class WeightChange(Config):
    """New weights from a step on."""

    step: int = Field(gt=0, le=2**40)
    """First step with these weights, counted from 0: the number of steps taken before it."""
    weights: tuple[float, ...]
    """One weight per corpus, in the same order."""


def _checked(corpus: Any) -> Any:
    return no_secret(corpus) if isinstance(corpus, str) else corpus


class DataConfig(Config):
    """What is served, and how."""

    # Checked before the union: its error message shows the given value, which may hold a secret.
    corpus: Annotated[Address | tuple[MixedCorpus, ...], BeforeValidator(_checked)]
    """Directory or address of a prepared corpus; or a list of corpora with weights."""
    weight_changes: tuple[WeightChange, ...] = ()
    """Steps at which the mixture's weights change, in increasing order."""
    mode: Literal["shuffled", "streaming"] = "shuffled"
    """`shuffled`: sequences in random order; `streaming`: each row continues where it stopped in the step before."""
    documents: Literal["joined", "isolated", "masked"] = "joined"
    """`joined`: documents form one stream, as in the paper; `masked`: the same stream, without padding, but no token
    sees another document's (intra-document masking, exact); `isolated`: the same masking, with each document padded to
    the block."""
    packing: Literal["stream", "best_fit"] = "stream"
    """`stream`: the stream of documents is cut into sequences wherever their ends fall; `best_fit`: documents are
    reordered so that few are cut that would fit into one sequence. Neither adds padding."""
    prefetch: int | None = Field(None, ge=0, le=2**16)
    """Steps to read ahead; 0: read in the caller's thread. null: 2, or 8 when a corpus is read over a network, four of
    them in parallel."""
    max_passes: float | None = Field(None, gt=0, le=1e9, allow_inf_nan=False)
    """Maximum number of passes (epochs) over any corpus in the whole run; a run that would exceed it does not start."""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """When tokens are damaged or missing: `stop`: raise an error; `skip`: leave them out of the loss and record
    them."""

    storage: StorageConfig = StorageConfig()
    """How to read corpora that are not on this machine's disk."""

    @model_validator(mode="after")
    def _weights_fit(self) -> DataConfig:
        count = 1 if isinstance(self.corpus, str) else len(self.corpus)
        if not count:
            raise ValueError("corpus: a mixture needs at least one corpus")
        require_increasing("weight_changes", self.weight_changes)
        for step, weights in self.segments():
            if len(weights) != count:
                raise ValueError(f"weight_changes: {len(weights)} weights at step {step} for {count} corpora")
            if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
                raise ValueError(f"weights {list(weights)}: they must be finite, none negative, and one positive")
        return self

    @property
    def separates_documents(self) -> bool:
        """Whether documents are separate: no token sees another document, nor predicts the first token of another."""
        return self.documents != "joined"

    def urls(self) -> list[str]:
        """Return the addresses of the corpora, in the order of their weights."""
        return [self.corpus] if isinstance(self.corpus, str) else [each.corpus for each in self.corpus]

    def only(self, kept: Sequence[bool]) -> DataConfig:
        """Return settings with the kept corpora only, with their first weights.

        If these are all 0, the weights become equal.
        """
        if isinstance(self.corpus, str) or all(kept):
            return self
        mixed = tuple(each for each, keep in zip(self.corpus, kept, strict=True) if keep)
        if not any(each.weight for each in mixed):
            mixed = tuple(each.model_copy(update={"weight": 1.0}) for each in mixed)
        return self.model_copy(update={"corpus": mixed, "weight_changes": ()})

    def segments(self) -> list[tuple[int, tuple[float, ...]]]:
        """Return (first step, weights) pairs, from step 0 on."""
        first = (1.0,) if isinstance(self.corpus, str) else tuple(each.weight for each in self.corpus)
        return [(0, first), *((change.step, change.weights) for change in self.weight_changes)]
