"""The section `log` of a recipe."""

from __future__ import annotations

from pydantic import Field, field_validator

from bst_base.settings import Config


class LogConfig(Config):
    every: int = Field(10, ge=1, le=2**40)
    """Steps between two lines on the console; every step goes to metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events into the run directory's tensorboard/."""
    writers: list[str] = Field(default=[], max_length=16)
    """Where else curves go: wandb, mlflow (extras of those names), or the `module:Class` of a writer of your own
    (`report/writers.py`). One that fails or is slow does not hold up the run."""
    probes: bool = True
    """For TensorBoard and other writers, at evaluations: how each layer uses its context states, and the time scales of
    the SSMs."""
    sample_tokens: int = Field(64, ge=0, le=2**20)
    """For TensorBoard, at evaluations: tokens to generate after the beginning of the validation text; 0: no
    sample. All ranks wait for it, so with many ranks not every evaluation has one (`report/probes.py`); the first and
    the last do. Not under ZeRO-3."""
    straggler: float = Field(1.2, gt=1, le=1e9, allow_inf_nan=False)
    """Warn when the slowest rank's own work in a step takes this many times the median rank's."""
    memory_history: bool = False
    """On CUDA, remember which line has allocated what, for the snapshot that is written when memory runs out."""
    profile: tuple[int, int] | None = None
    """First and last step, counted from 1, to trace with torch's profiler into the run directory's profile/."""

    @field_validator("profile")
    @classmethod
    def _window_is_one(cls, window: tuple[int, int] | None) -> tuple[int, int] | None:
        if window and not 1 <= window[0] <= window[1]:
            raise ValueError("the first step of the window must be at least 1, and the last not before it")
        return window
