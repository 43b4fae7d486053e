"""The recipe: its documentation, its files, its digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from bst_base.settings import ConfigError, dump, fields, parse
from bst_dist.config import Recipe, differing, digest, load_recipe
from bst_dist.describe import markdown

ROOT = Path(__file__).parents[2]


def test_the_recipe_documentation_matches_the_code():
    assert (ROOT / "docs" / "recipes.md").read_text() == markdown(list(fields(Recipe))) + "\n", (
        "settings have changed: bst recipe --markdown > docs/recipes.md"
    )


def test_every_setting_is_documented():
    assert [name for name, _, _, meaning in fields(Recipe) if not meaning] == []


# The other files in these folders are experiments on their base.yaml (tests/study/experiment/test_design.py).
FOLDERS = [ROOT / "launch/recipes" / name for name in ("ablations", "diagnostics")]
EXPERIMENTS = {path for folder in FOLDERS for path in folder.glob("*.yaml") if path.name != "base.yaml"}
RECIPES = sorted(set((ROOT / "launch/recipes").rglob("*.yaml")) - EXPERIMENTS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_in_the_repository_survive_dump_and_load(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "resolved.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_the_recipe_digest_ignores_logging_checkpoints_and_ranks(recipe_file):
    path = recipe_file()
    recipe = load_recipe(path)
    same = load_recipe(path, ["log.every=7", "checkpoint.keep_last=5", "ranks=4"])
    other = load_recipe(path, ["optimizer.beta2=0.9", "seed=4"])
    assert digest(same) == digest(recipe) != digest(other)
    assert differing(recipe, same) == []
    assert differing(recipe, other) == ["seed: 3, 4", "optimizer.beta2: 0.95, 0.9"]


def test_masked_documents_are_refused_for_models_that_cannot_separate_them(settings):
    settings["data"]["documents"] = "masked"
    assert parse(Recipe, settings).data.separates_documents
    settings["model"]["ssm"] = {"kernel": "hyena", "length": 32}
    with pytest.raises(ConfigError, match=r"data.documents masked: ssm.kernel hyena \(bst\) keeps its last inputs"):
        parse(Recipe, settings)


@pytest.mark.parametrize("kernel", ["explicit", "hyena"])
def test_isolated_documents_are_refused_for_filters_that_a_layer_uses(settings, kernel):
    settings["data"]["documents"] = "isolated"
    settings["model"]["ssm"] = {"kernel": kernel, "length": 32}
    with pytest.raises(ConfigError, match=rf"data.documents isolated: ssm.kernel {kernel} \(bst\) keeps its last"):
        parse(Recipe, settings)
    settings["model"]["mixer"] = "sliding"
    parse(Recipe, settings)


def test_sequences_longer_than_full_attention_allows_are_refused(settings):
    length = settings["train"]["sequence_length"]
    settings["model"] |= {"filler": "full", "placement": [0], "full": {"longest": length - 1}}
    with pytest.raises(ConfigError, match=rf"train.sequence_length {length} is more .* raise model.full.longest"):
        parse(Recipe, settings)
    settings["model"]["full"]["longest"] = length
    parse(Recipe, settings)


@pytest.mark.parametrize("field", ["non_finite", "spike"])
def test_a_guard_that_could_never_roll_back_is_refused(settings, field):
    settings |= {"guard": {field: "roll-back"}, "checkpoint": {"every": 0}}
    with pytest.raises(ConfigError, match=rf"guard.{field} roll-back: .* set checkpoint.every"):
        parse(Recipe, settings)
    settings["checkpoint"]["at"] = [2]
    parse(Recipe, settings)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.placement=1", "model.placement: input should be a list, or input should be 'all' (got 1)"),
        (
            "model.placement=[a]",
            "model.placement.0: input should be a valid integer, unable to parse string as an integer (got 'a')",
        ),
        (
            "data.corpus=[{corpus: x, wieght: 2}]",
            "unknown key 'data.corpus.0.wieght': did you mean 'data.corpus.0.weight'?",
        ),
        (
            "data={synthetic: {task: lag}}",
            "data.synthetic: task must be one of latent-unigram, copy, selective-copy, "
            "induction, associative-recall, needle, in-context-recall, memorisation, not 'lag'",
        ),
        ("model.ssm.kernel=s5", "model.ssm: kernel must be one of s4d, s4-dplr, explicit, hyena, ssd, none, not 's5'"),
        ("train=3", "train: input should be a section, with fields of its own (got 3)"),
        ("log.profile=3", "log.profile: input should be a list (got 3)"),
    ],
)
def test_recipe_errors_are_one_line_without_pydantic_terms(override, said):
    """Each error is one line, without pydantic's names of types, tags and functions."""
    path = ROOT / "launch/recipes/demo.yaml"
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, [override])
    assert str(caught.value) == f"{path}: {said}"
