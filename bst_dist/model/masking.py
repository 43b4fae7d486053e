"""Which models can separate documents that begin at any token (`document_mask`) or with a block, by their settings."""

from __future__ import annotations

from bst_dist.model.config import MIXER_SECTIONS, FilterConfig, ModelConfig


def masking_problem(model: ModelConfig) -> str | None:
    """Return why this model does not support `data.documents: masked`, in one line; None if it does."""
    used = {section: mixer for mixer in model.mixers() for section in MIXER_SECTIONS[mixer]}
    if "block_recurrent" in used:
        return (
            "data.documents masked: block-recurrent updates its state once per block, so it cannot separate "
            "documents within a block; set data.documents to isolated or joined"
        )
    if "ssm" in used and isinstance(model.ssm, FilterConfig):
        return (
            f"data.documents masked: ssm.kernel {model.ssm.kernel} ({used['ssm']}) keeps its last inputs, not a state "
            "that could be reset between documents; set ssm.kernel to s4d, s4-dplr or ssd, or data.documents to joined"
        )
    if "context" in used and model.context.attend == "previous":
        return (
            "data.documents masked: with context.attend previous a token attends to all of the block before, in which "
            "its document may begin; set context.attend to current, or data.documents to isolated or joined"
        )
    return None


def isolating_problem(model: ModelConfig) -> str | None:
    """Return why this model does not support `data.documents: isolated`, in one line; None if it does."""
    used = {section: mixer for mixer in model.mixers() for section in MIXER_SECTIONS[mixer]}
    if "ssm" in used and isinstance(model.ssm, FilterConfig):
        return (
            f"data.documents isolated: ssm.kernel {model.ssm.kernel} ({used['ssm']}) keeps its last inputs, not a "
            "state that could be reset where a document begins; set ssm.kernel to s4d, s4-dplr or ssd, or "
            "data.documents to joined"
        )
    return None
