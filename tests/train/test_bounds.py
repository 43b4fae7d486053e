"""Every number of a recipe has bounds. For the model's settings see tests/model/test_settings.py."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from bst_base.settings import ConfigError, fields, parse
from bst_dist.config import Recipe

RECIPE = {
    "name": "bounds",
    "model": {"width": 32, "heads": 2, "ffn": 64, "block": 16, "depth": 1, "mixer": "sliding"},
    "data": {"corpus": "nowhere"},
    "train": {"steps": 10, "sequence_length": 64, "sequences": 4},
}
NEEDED = {"branch": {"run": "../trunk", "step": 1}, "initial_weights": {"run": "other", "step": 1}}
ENTRIES: dict[str, dict[str, Any]] = {
    "corpus[]": {"corpus": "nowhere"},
    "weight_changes[]": {"step": 5, "weights": [1.0]},
    "length_changes[]": {"step": 5, "sequence_length": 128},
    "sequence_changes[]": {"step": 5, "sequences": 8},
}
"""List -> an entry of it that is valid."""
TASKS: dict[str, dict[str, Any]] = {"copy": {"lag": 2}}
IMPOSSIBLE = (-1, 10**40, math.nan, math.inf)


def numbers() -> list[tuple[str, dict[str, Any], str]]:
    """Return each numeric field, a recipe that uses it, and its description."""
    found = []
    for name, annotation, _, text in fields(Recipe):
        section = name.partition(".")[0]
        if section == "model" or annotation.replace(" | None", "") not in ("int", "float"):
            continue
        recipe = copy.deepcopy(RECIPE)
        if section in NEEDED:
            recipe[section] = dict(NEEDED[section])
        if text.startswith("(synthetic)"):
            task = text.split("(")[2].partition(")")[0] if text.count("(") > 1 and text[12:13] == "(" else "copy"
            recipe["data"] = {"synthetic": {"task": task, **TASKS.get(task, {})}}
        found.append((name, recipe, text))
    return found


def test_recipes_have_more_than_45_numeric_settings() -> None:
    assert len(numbers()) > 45


@pytest.mark.parametrize(
    ("name", "recipe", "text"),
    numbers(),
    ids=lambda x: x if isinstance(x, str) and "(" not in x and " " not in x else "",
)
def test_impossible_values_are_refused_with_the_field_name(name, recipe, text) -> None:
    *sections, leaf = name.split(".")
    for value in (0, *IMPOSSIBLE):
        data = copy.deepcopy(recipe)
        node = data
        for section in sections:
            if section in ENTRIES:
                node[section.removesuffix("[]")] = [dict(ENTRIES[section])]
                node = node[section.removesuffix("[]")][0]
            else:
                node = node.setdefault(section, {})
        node[leaf] = value
        try:
            parse(Recipe, data)
        except ConfigError as refused:
            assert leaf in str(refused)
            assert "\n" not in str(refused)
        else:
            assert value == 0, f"{name}: {value} is taken"
