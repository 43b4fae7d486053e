"""The section `log` of a recipe."""

from __future__ import annotations

from pydantic import Field, field_validator

from bst_base.settings import Config


class LogConfig(Config):
    every: int = Field(10, ge=1, le=2**40)
    """Steps between lines on the console; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard events to tensorboard/ in the run directory."""
    writers: list[str] = Field(default=[], max_length=16)
    """Other places to send curves to: wandb, mlflow (install the extra of that name), or `module:Class` for a writer of
    your own (`report/writers.py`). A writer that fails or is slow does not hold up the run."""
    probes: bool = True
    """At evaluations, send TensorBoard and other writers how each layer uses its context states, and the time scales of
    the SSMs."""
    sample_tokens: int = Field(64, ge=0, le=2**20)
    """At evaluations, generate this many tokens after the beginning of the validation text, for TensorBoard; 0: no
    sample. All ranks wait for it, so with many ranks only some evaluations have one, always the first and the last
    (`report/probes.py`). Not under ZeRO-3."""
    straggler: float = Field(1.2, gt=1, le=1e9, allow_inf_nan=False)
    """Warn when the slowest rank's own work in a step takes this many times as long as the median rank's."""
    memory_history: bool = False
    """On CUDA, record which line allocates what, for the snapshot that is written when memory runs out."""
    profile: tuple[int, int] | None = None
    """First and last step, counted from 1, to trace with torch's profiler; the trace goes to profile/ in the run
    directory."""

    @field_validator("profile")
    @classmethod
    def _window_is_one(cls, window: tuple[int, int] | None) -> tuple[int, int] | None:
        if window and not 1 <= window[0] <= window[1]:
            raise ValueError("the first step of the window must be at least 1, and the last not before it")
        return window
