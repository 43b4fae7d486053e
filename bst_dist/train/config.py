"""The sections of a recipe that describe its steps: train, evaluation, optimizer, schedule, branch, initial_weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bst_base.addresses import CorpusAddress
from bst_base.places import LocalPath
from bst_base.settings import Config
from data_pipeline.serve.order.step_values import StepValues, require_increasing


class AverageConfig(Config):
    decay: float = Field(0.999, gt=0, lt=1, allow_inf_nan=False)
    """Decay of the average per step: the share of the old average that is kept. Early steps use less, (1 + step) / (10
    + step), so that the random initial weights are soon forgotten."""


SetName = Annotated[str, Field(pattern=r"^[\w.-]+$")]
"""The name of a validation set in the metrics."""


class BatchChange(Config):
    """A change of the number of sequences per step, from a step on."""

    step: int = Field(gt=0, le=2**40)
    """First step with this batch size, counted from 0: the number of steps taken before it."""
    sequences: int = Field(ge=1, le=2**40)
    """Sequences per step."""


class LengthChange(Config):
    """A change of the sequence length, from a step on."""

    step: int = Field(gt=0, le=2**40)
    """First step with this length, counted from 0: the number of steps taken before it."""
    sequence_length: int = Field(ge=1, le=2**40)
    """Tokens per sequence."""


class TrainConfig(Config):
    steps: int = Field(ge=1, le=2**40)
    """Steps of the whole run; the schedule ends here."""
    sequence_length: int = Field(ge=1, le=2**40)
    """Context length L in tokens; a multiple of the block."""
    length_changes: tuple[LengthChange, ...] = ()
    """Steps at which the sequence length changes, in increasing order: `[{step: 2000, sequence_length: 4096}]` has
    2000 steps before the change. For text only. No token is read twice or skipped; `sequences` and learning rates stay
    the same."""
    sequences: int = Field(ge=1, le=2**40)
    """Global batch: sequences per step over all ranks. It works with any number of data-parallel ranks up to this
    number."""
    sequence_changes: tuple[BatchChange, ...] = ()
    """Steps at which the global batch changes, in increasing order: `[{step: 1000, sequences: 512}]`, a batch
    warm-up, has 1000 steps before the change. For shuffled mode only. Learning rates stay the same."""
    micro_sequences: int = Field(1, ge=1, le=2**40)
    """Micro-batch: the most sequences that a rank processes at once. It gets through its share of the batch by gradient
    accumulation."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: matrix products in bfloat16 under autocast, and parameters, SSM dynamics and reductions in fp32; fp32: all
    in fp32."""
    gradient_clipping: float = Field(1.0, ge=0, le=1e9, allow_inf_nan=False)
    """Maximum global gradient norm; 0: no clipping."""
    z_loss: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    """Weight of the z-loss: the mean of log^2 Z over tokens, where Z is the sum of the exponentials of a token's
    logits. It keeps the logits from drifting (PaLM uses 1e-4: arXiv 2204.02311, section 5). Reported losses do not
    include it."""
    carry: bool = False
    """Carry each row's state over to the next step (data.mode streaming). No gradient flows back across steps."""
    slice_tokens: int | None = Field(None, ge=1, le=2**40)
    """Process each sequence slice by slice, forward and backward, in the memory of one slice; gradients are those of
    the whole sequence. Tokens per slice: a multiple of model.block x parallel.sp that divides the sequence. null: no
    slices."""
    edges: Literal["device", "host", "disk"] = "device"
    """Where the states between slices wait for the backward pass: device: on the device; host: in host memory; disk: in
    a temporary file (in TMPDIR), so that memory does not grow with the length."""
    edges_every: int = Field(1, ge=1)
    """Keep only the state before every k-th slice, and recompute the others in the backward pass: about slices / k
    states are kept, for nearly one more forward pass. Memory is lowest with k at the square root of the number of
    slices."""
    average: AverageConfig | None = None
    """Keep an exponential moving average of the weights, with decay `train.average.decay` (0.999). It is evaluated next
    to the weights, saved in checkpoints and exported by `bst export --averaged`. Each rank averages what it updates: 4
    bytes per parameter, divided by the ranks under ZeRO. Training itself does not change, so you may add or remove it
    when you resume. null: no average."""

    @model_validator(mode="after")
    def _changes_follow_each_other(self) -> TrainConfig:
        require_increasing("sequence_changes", self.sequence_changes)
        require_increasing("length_changes", self.length_changes)
        for (_, before), (step, length) in pairwise(self.lengths.changes):
            if before == length:
                raise ValueError(
                    f"length_changes: step {step}: sequence_length is {length} before it too; remove this change, in "
                    "the recipe.yaml of a run directory too: the run then continues from its checkpoint as before"
                )
        return self

    @property
    def batches(self) -> StepValues:
        """Sequences per step."""
        changes = ((change.step, change.sequences) for change in self.sequence_changes)
        return StepValues(((0, self.sequences), *changes))

    @property
    def lengths(self) -> StepValues:
        """Tokens per sequence."""
        changes = ((change.step, change.sequence_length) for change in self.length_changes)
        return StepValues(((0, self.sequence_length), *changes))

    @property
    def batch_phases(self) -> list[tuple[int, int, int]]:
        """Triples (first step, number of steps, sequences per step): the parts of the run with one batch each."""
        taken = self.batches.until(self.steps - 1).changes
        ends = [*(start for start, _ in taken[1:]), self.steps]
        return [(start, end - start, sequences) for (start, sequences), end in zip(taken, ends, strict=True)]

    @property
    def fewest_sequences(self) -> int:
        """The smallest number of sequences per step in the run."""
        return min(self.batches.values)

    @property
    def most_sequences(self) -> int:
        """The largest number of sequences per step that the run takes."""
        return max(sequences for _, _, sequences in self.batch_phases)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence in the run."""
        return max(self.lengths.values)

    @property
    def tokens(self) -> int:
        """Tokens of all steps together."""
        return self.tokens_after(0)

    def tokens_after(self, step: int) -> int:
        """Return the tokens of all steps that follow the first `step` steps."""
        batches, lengths = self.batches, self.lengths
        changes = {start for start, _ in batches.changes + lengths.changes if step < start < self.steps}
        starts = [step, *sorted(changes), max(step, self.steps)]
        return sum((end - start) * batches.at(start) * lengths.at(start) for start, end in pairwise(starts))

    @property
    def slices(self) -> int:
        """Number of slices of the longest sequence."""
        return self.longest // (self.slice_tokens or self.longest)


class EvaluationConfig(Config):
    every: int = Field(500, ge=0, le=2**40)
    """Steps between evaluations; the last step always has one. 0: evaluate only at the last step."""
    sequences: int = Field(64, ge=1, le=2**40)
    """Number of validation sequences, each evaluated once; the same ones on any number of ranks. They have the training
    length (the last one, if it changes)."""
    corpora: dict[SetName, CorpusAddress] = Field({})
    """More prepared corpora to evaluate, under names of your own: `sequences` sequences of each one's validation split,
    at the same steps, with the standard error over sequences. They need the run's tokenizer."""


class OptimizerConfig(Config):
    kind: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon: Muon for the matrices inside the layers and AdamW for all else, at the same learning rates.
    Muon's update is the orthogonal matrix nearest to the momentum, scaled to AdamW's root mean square (arXiv
    2502.16982)."""
    learning_rate: float = Field(1e-3, gt=0, le=1e3, allow_inf_nan=False)
    """Peak learning rate of matrices and vectors. Under CompleteP it is that of the base shape; wider matrices get
    less."""
    ssm_learning_rate: float = Field(1e-3, gt=0, le=1e-3, allow_inf_nan=False)
    """Peak learning rate of the SSM dynamics; at most 1e-3, whatever the other rate is."""
    weight_decay: float = Field(0.1, ge=0, le=1e3, allow_inf_nan=False)
    """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), on matrices only."""
    beta1: float = Field(0.9, ge=0, lt=1, allow_inf_nan=False)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1, allow_inf_nan=False)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0, le=1, allow_inf_nan=False)
    """Added to the root of the second moment."""
    momentum: float = Field(0.95, ge=0, lt=1, allow_inf_nan=False)
    """Decay of Muon's Nesterov momentum; beta1, beta2 and eps are AdamW's."""

    @model_validator(mode="after")
    def _momentum_is_muon_s(self) -> OptimizerConfig:
        if self.kind != "muon" and self.momentum != OptimizerConfig.model_fields["momentum"].default:
            raise ValueError(f"momentum {self.momentum}: only muon has one; set optimizer.kind to muon or leave it out")
        return self


class ScheduleConfig(Config):
    kind: Literal["wsd", "cosine"] = "wsd"
    """wsd: constant after warm-up, then a decay over the last steps, so that runs of several lengths can branch off the
    constant part; cosine: half a cosine period from the end of warm-up to the last step."""
    warmup_steps: int = Field(100, ge=0, le=2**40)
    """Steps of linear warm-up. The rate rises from 0, and is above 0 already in step 0."""
    decay_fraction: float = Field(0.2, ge=0, le=1, allow_inf_nan=False)
    """Fraction of all steps that wsd's decay takes."""
    decay_shape: Literal["1-sqrt", "linear"] = "1-sqrt"
    """Shape of wsd's decay."""
    final_fraction: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    """Fraction of the peak that the decay leads to; it would be reached in the step after the last."""

    def unread(self) -> list[str]:
        """Return the fields that differ from their defaults, but are of the other `kind`."""
        return self.changed("decay_fraction", "decay_shape") if self.kind == "cosine" else []


class BranchConfig(Config):
    run: str
    """Directory of the trunk (the run to branch from), relative to the directory of this run: ../trunk."""
    step: int = Field(ge=1, le=2**40)
    """Step of the trunk to continue from; checkpoint.at in the trunk's recipe keeps that checkpoint."""


class InitialWeightsConfig(Config):
    run: LocalPath
    """The other run's directory; `bst import` makes one of an exported model."""
    step: int = Field(ge=1, le=2**40)
    """Use its weights after this step."""
