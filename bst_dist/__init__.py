"""Distributed pretraining of Block-State Transformers; as a library, the model and its layer (docs/library.md).

`from bst_dist import BlockStateTransformer, BSTLayer` imports torch, but neither DeepSpeed nor MPI. `import bst_dist`
alone imports no other package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bst_dist.model.config import LayerConfig as LayerConfig
    from bst_dist.model.config import ModelConfig as ModelConfig
    from bst_dist.model.library import BlockStateTransformer as BlockStateTransformer
    from bst_dist.model.library import BSTLayer as BSTLayer

_PUBLIC = {
    "BlockStateTransformer": "bst_dist.model.library",
    "BSTLayer": "bst_dist.model.library",
    "LayerConfig": "bst_dist.model.config",
    "ModelConfig": "bst_dist.model.config",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first accessed, so that the program starts without torch."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
