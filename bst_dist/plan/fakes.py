"""Models without storage, for what follows from shapes alone."""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensorMode

from bst_dist.model.lm import LanguageModel, ModelConfig
from bst_dist.plan.zero import Sizes


def sizes_of(config: ModelConfig) -> Sizes:
    """The parameters of a model that is not made."""
    with FakeTensorMode():
        return Sizes.of(LanguageModel(config))
