"""The sections of a recipe that describe its steps: train, evaluation, optimizer, schedule, branch, initial_weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bst_base.addresses import CorpusAddress
from bst_base.places import LocalPath
from bst_base.settings import Config


class AverageConfig(Config):
    decay: float = Field(0.999, gt=0, lt=1, allow_inf_nan=False)
    """Share of the average that stays in a step; at first less, (1 + step) / (10 + step), so that the random weights of
    the beginning are soon forgotten."""


SetName = Annotated[str, Field(pattern=r"^[\w.-]+$")]
"""What a validation set is called in metrics."""


class BatchChange(Config):
    """Another number of sequences from a step on."""

    step: int = Field(gt=0, le=2**40)
    """First step with so many."""
    sequences: int = Field(ge=1, le=2**40)
    """Sequences of a step."""


class LengthChange(Config):
    """Another length of sequences from a step on."""

    step: int = Field(gt=0, le=2**40)
    """First step with this length."""
    sequence_length: int = Field(ge=1, le=2**40)
    """Tokens of a sequence."""


class TrainConfig(Config):
    steps: int = Field(ge=1, le=2**40)
    """Steps of the whole run: the schedule ends here."""
    sequence_length: int = Field(ge=1, le=2**40)
    """Tokens L of a sequence; a multiple of the block."""
    length_changes: tuple[LengthChange, ...] = ()
    """Where the length of sequences changes, in increasing steps: `[{step: 2000, sequence_length: 4096}]`. Text alone;
    no token is read twice or left out for it, and `sequences` and learning rates stay as they are."""
    sequences: int = Field(ge=1, le=2**40)
    """Sequences of a step over all ranks (the global batch); any number of data-parallel ranks up to it will do."""
    sequence_changes: tuple[BatchChange, ...] = ()
    """Where the number of sequences changes, in increasing steps: `[{step: 1000, sequences: 512}]` warms the batch up.
    In shuffled mode alone; learning rates stay as they are."""
    micro_sequences: int = Field(1, ge=1, le=2**40)
    """Most sequences that a rank processes at once; the rest of its share follows, accumulated into one step."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: matrix products in bfloat16 under autocast; parameters, SSM dynamics and reductions in fp32."""
    gradient_clipping: float = Field(1.0, ge=0, le=1e9, allow_inf_nan=False)
    """Largest global gradient norm; 0: no clipping."""
    z_loss: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    """Weight of a second loss, the mean over tokens of log^2 Z, where Z is the sum of the exponentials of a token's
    logits: it keeps them from drifting (PaLM, arXiv 2204.02311, section 5, has 1e-4). In no loss that is reported."""
    carry: bool = False
    """Carry the past of each row to the next step (data.mode streaming); values only, no gradient goes back."""
    slice_tokens: int | None = Field(None, ge=1, le=2**40)
    """Tokens of a slice, a multiple of model.block x parallel.sp that divides the sequence: forward and backward go
    slice by slice, with the gradients of the whole sequence, in the memory of one slice. None: a sequence at once."""
    edges: Literal["device", "host", "disk"] = "device"
    """Where the state between slices is kept until the backward pass: device; host: in host memory; disk: in a file in
    the folder for temporary files (TMPDIR), so that memory does not grow with the length."""
    edges_every: int = Field(1, ge=1)
    """Keep the state before every k-th slice only, and run the slices between once more for theirs: about slices / k
    states are kept, for nearly one forward pass more. Fewest at the square root of the slices."""
    average: AverageConfig | None = None
    """Keep an exponential average of the weights, of which `train.average.decay` (0.999) stays in a step: evaluated
    beside the weights, in checkpoints, exported by `bst export --averaged`. A rank averages what it updates: 4 bytes
    per parameter, divided by the ranks under ZeRO. It changes nothing in the training, and may be set or left out when
    a run is resumed. null: none."""

    @model_validator(mode="after")
    def _changes_follow_each_other(self) -> TrainConfig:
        steps = [change.step for change in self.sequence_changes]
        if steps != sorted(set(steps)):
            raise ValueError(f"sequence_changes: their steps must increase, found {steps}")
        steps = [change.step for change in self.length_changes]
        if steps != sorted(set(steps)):
            raise ValueError(f"length_changes: their steps must increase, found {steps}")
        return self

    @property
    def batches(self) -> list[tuple[int, int]]:
        """(first step, sequences of a step from there on) pairs, from step 0 on."""
        return [(0, self.sequences), *((change.step, change.sequences) for change in self.sequence_changes)]

    def sequences_at(self, step: int) -> int:
        """Sequences of a step."""
        return [sequences for start, sequences in self.batches if start <= step][-1]

    @property
    def fewest_sequences(self) -> int:
        """Of all steps."""
        return min(sequences for _, sequences in self.batches)

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(first step, tokens of a sequence from there on) pairs, from step 0 on."""
        changes = ((change.step, change.sequence_length) for change in self.length_changes)
        return [(0, self.sequence_length), *changes]

    def length_at(self, step: int) -> int:
        """Tokens of a sequence of a step."""
        return [length for start, length in self.lengths if start <= step][-1]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(length for _, length in self.lengths)

    @property
    def tokens(self) -> int:
        """Of all steps together."""
        starts = sorted({start for start, _ in self.batches + self.lengths if start < self.steps})
        return sum((end - start) * self.sequences_at(start) * self.length_at(start)
                   for start, end in pairwise([*starts, self.steps]))  # fmt: skip

    @property
    def slices(self) -> int:
        """Slices of a sequence, of the longest."""
        return self.longest // (self.slice_tokens or self.longest)


class EvaluationConfig(Config):
    every: int = Field(500, ge=0, le=2**40)
    """Steps between two evaluations; the run's last step always has one; 0: only that one."""
    sequences: int = Field(64, ge=1, le=2**40)
    """Validation sequences, of the training length (its last, if it changes), to evaluate on: each once, the same ones
    on any number of ranks."""
    corpora: dict[SetName, CorpusAddress] = Field({})
    """Further prepared corpora, by a name of your own: as many sequences of the validation split of each are evaluated
    at the same steps, with the standard error over sequences. They need the run's tokenizer."""


class OptimizerConfig(Config):
    kind: Literal["adamw", "muon"] = "adamw"
    """adamw; muon: the matrices inside the layers by Muon, all else by AdamW, at the same rates. An update of Muon is
    the momentum's nearest orthogonal matrix, as large in root mean square as AdamW's (arXiv 2502.16982)."""
    learning_rate: float = Field(1e-3, gt=0, le=1e3, allow_inf_nan=False)
    """Peak rate of matrices and vectors; under CompleteP that of the base shape, and wide matrices have less."""
    ssm_learning_rate: float = Field(1e-3, gt=0, le=1e-3, allow_inf_nan=False)
    """Peak rate of the SSM dynamics, which are trained at 1e-3 or less whatever the rest uses."""
    weight_decay: float = Field(0.1, ge=0, le=1e3, allow_inf_nan=False)
    """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), on matrices only."""
    beta1: float = Field(0.9, ge=0, lt=1, allow_inf_nan=False)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1, allow_inf_nan=False)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0, le=1, allow_inf_nan=False)
    """Added to the root of the second moment."""
    momentum: float = Field(0.95, ge=0, lt=1, allow_inf_nan=False)
    """Decay of Muon's momentum, which looks ahead as Nesterov's does; beta1, beta2 and eps are AdamW's."""

    @model_validator(mode="after")
    def _momentum_is_muon_s(self) -> OptimizerConfig:
        if self.kind != "muon" and self.momentum != OptimizerConfig.model_fields["momentum"].default:
            raise ValueError(f"momentum {self.momentum}: only muon has one; set optimizer.kind to muon or leave it out")
        return self


class ScheduleConfig(Config):
    kind: Literal["wsd", "cosine"] = "wsd"
    """wsd: constant after the warm-up, then a decay over the last steps, so that runs of several lengths can branch off
    one constant part; cosine: half a period from the end of the warm-up to the last step."""
    warmup_steps: int = Field(100, ge=0, le=2**40)
    """Steps over which the rate rises linearly from 0; step 0 already moves."""
    decay_fraction: float = Field(0.2, ge=0, le=1, allow_inf_nan=False)
    """Share of all steps that wsd's decay takes."""
    decay_shape: Literal["1-sqrt", "linear"] = "1-sqrt"
    """How wsd's decay falls."""
    final_fraction: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    """Rate at the last step as a fraction of the peak."""


class BranchConfig(Config):
    run: str
    """The trunk's run directory, from this run's own directory: ../trunk."""
    step: int = Field(ge=1, le=2**40)
    """The trunk's step to continue from; checkpoint.at in the trunk's recipe keeps that checkpoint."""


class InitialWeightsConfig(Config):
    run: LocalPath
    """The other run's directory; `bst import` makes one of an exported model."""
    step: int = Field(ge=1, le=2**40)
    """Its weights after this step."""
