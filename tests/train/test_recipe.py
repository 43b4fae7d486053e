"""The recipe as people meet it: its documentation, its file, its identity."""

from __future__ import annotations

from pathlib import Path

import pytest

from bst_base.settings import ConfigError, dump, fields, parse
from bst_dist.config import Recipe, differing, digest, load_recipe
from bst_dist.describe import markdown

ROOT = Path(__file__).parents[2]


def test_documentation_in_the_repository_is_what_the_code_says():
    assert (ROOT / "docs" / "recipes.md").read_text() == markdown(list(fields(Recipe))) + "\n", (
        "settings have changed: bst recipe --markdown > docs/recipes.md"
    )


def test_every_setting_is_documented():
    assert [name for name, _, _, meaning in fields(Recipe) if not meaning] == []


# The others of these folders are experiments with their base.yaml (tests/study/experiment/test_design.py).
FOLDERS = [ROOT / "launch/recipes" / name for name in ("ablations", "diagnostics")]
EXPERIMENTS = {path for folder in FOLDERS for path in folder.glob("*.yaml") if path.name != "base.yaml"}
RECIPES = sorted(set((ROOT / "launch/recipes").rglob("*.yaml")) - EXPERIMENTS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_in_the_repository_load_and_come_back_from_their_dump(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "resolved.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_identity_is_all_but_logging_checkpoints_and_ranks(recipe_file):
    path = recipe_file()
    recipe = load_recipe(path)
    same = load_recipe(path, ["log.every=7", "checkpoint.keep_last=5", "ranks=4"])
    other = load_recipe(path, ["optimizer.beta2=0.9", "seed=4"])
    assert digest(same) == digest(recipe) != digest(other)
    assert differing(recipe, same) == []
    assert differing(recipe, other) == ["seed: 3, 4", "optimizer.beta2: 0.95, 0.9"]


def test_masked_documents_are_refused_in_one_line_where_a_model_cannot_tell_them_apart(settings):
    settings["data"]["documents"] = "masked"
    assert parse(Recipe, settings).data.apart
    settings["model"]["ssm"] = {"kernel": "hyena", "length": 32}
    with pytest.raises(ConfigError, match=r"data.documents masked: ssm.kernel hyena \(bst\) keeps its last inputs"):
        parse(Recipe, settings)
