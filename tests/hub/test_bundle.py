"""The code in an export: every import of a module of this project becomes an import of a file next to it."""

from __future__ import annotations

import ast

import pytest

from bst_dist.hub import bundle

SOURCE = """
from __future__ import annotations
import torch
from bst_base.settings import Config, parse as read
from bst_dist.model import roles
from bst_dist.model.lm import (
    LanguageModel,
    Losses as Parts,
)
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from bst_dist.train.step import Trainer
"""


def imports(source: str) -> dict[str, tuple[str, int]]:
    """Return the origin of each imported name in a source, and the level of the relative import."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: (alias.name, 0) for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {
                alias.asname or alias.name: (f"{node.module or ''}:{alias.name}", node.level) for alias in node.names
            }
    return found


def test_bundled_imports_keep_their_names_and_use_neighbour_files():
    text, imported = bundle._standing_alone(SOURCE, "bst_dist.hub.modeling")
    assert imports(text) == {
        "annotations": ("__future__:annotations", 0),
        "torch": ("torch", 0),
        "TYPE_CHECKING": ("typing:TYPE_CHECKING", 0),
        "_": ("model_roles:__name__", 1),
        "Config": ("bst_base_settings:Config", 1),
        "read": ("bst_base_settings:parse", 1),
        "roles": (":model_roles", 1),
        "LanguageModel": ("model_lm:LanguageModel", 1),
        "Parts": ("model_lm:Losses", 1),
    }
    assert set(imported) == {"bst_base.settings", "bst_dist.model.roles", "bst_dist.model.lm"}


def test_imports_that_cannot_be_bundled_are_refused():
    with pytest.raises(AssertionError, match=r"bst_dist\.x: 'import bst_dist\.model' cannot stand alone"):
        bundle._standing_alone("import bst_dist.model\n", "bst_dist.x")


def test_exported_files_import_only_each_other_from_this_project(tmp_path):
    classes = bundle.write_code(tmp_path)
    files = {path.stem: path.read_text() for path in tmp_path.glob("*.py")}
    assert set(classes.values()) == {f"hub_modeling.{name}" for name in bundle.CLASSES.values()}
    for name, source in files.items():
        for place, level in imports(source).values():
            module, _, imported = place.partition(":")
            assert module.partition(".")[0] not in ("bst_base", "bst_dist", "data_pipeline"), name
            if level:
                assert (module or imported) in files, f"{name} imports {place}"
