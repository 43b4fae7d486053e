"""Every number in the model's settings has bounds: impossible values are refused when the recipe is read."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bst_base.settings import ConfigError, fields, overridden, parse
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.model.config import ModelConfig

MODEL = {"width": 32, "heads": 2, "ffn": 64, "block": 16, "depth": 3, "mixer": "bst", "vocab_size": 50}
KINDS = {"s4d": {}, "s4-dplr": {}, "ssd": {}, "explicit": {"length": 64}, "hyena": {"length": 64}}
IMPOSSIBLE = (0, -1, 10**40, math.nan, math.inf)


def numbers() -> list[tuple[str, dict[str, Any]]]:
    """Return each numeric field of the model, with the settings under which it is read."""
    found = []
    for name, annotation, _, text in fields(ModelConfig):
        if "int" not in annotation and "float" not in annotation:
            continue
        around = dict(MODEL)
        kind = text[1:].partition(")")[0] if text.startswith("(") else ""
        if name.startswith("ssm."):
            around["ssm"] = {"kernel": kind} | KINDS[kind]
        if name.startswith("parametrisation."):
            around["parametrisation"] = {"kind": kind, "base_width": 32, "base_depth": 3}
        found.append((name, around))
    return found


def test_models_have_more_than_25_numeric_settings():
    assert len(numbers()) > 25


@pytest.mark.parametrize(("name", "around"), numbers(), ids=lambda x: x if isinstance(x, str) else "")
def test_impossible_numbers_are_refused_in_one_line(name, around):
    for value in IMPOSSIBLE:
        data = overridden({key: dict(x) if isinstance(x, dict) else x for key, x in around.items()}, [])
        *sections, leaf = name.split(".")
        node = data
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = [value] if name == "placement" else value
        if name == "placement" and value == 0:
            continue  # the first layer
        with pytest.raises(ConfigError) as refused:
            parse(ModelConfig, data)
        assert name.partition(".")[0] in str(refused.value)
        assert "\n" not in str(refused.value) or name == "placement"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ssm": {"state": 5}}, "ssm.state"),
        ({"heads": 4, "attention": {"kv_heads": 3}}, "must divide heads .4."),
        ({"context": {"ssm_width": 0}}, "context.ssm_width"),
        ({"attention": {"buckets": 32, "max_distance": 16}}, "max_distance"),
        ({"placement": [1, 1]}, "twice"),
        ({"placement": [3]}, "placement"),
        ({"ssm": {"dt_min": 0.2, "dt_max": 0.1}}, r"dt_min \(0.2\) must be at most dt_max \(0.1\)"),
        ({"ssm": {"kernel": "s4-dplr", "dt_min": 0.2, "dt_max": 0.1}}, "dt_min"),
        ({"ssm": {"kernel": "ssd", "dt_min": 0.2, "dt_max": 0.1}}, "dt_min"),
        ({"mamba2": {"dt_min": 0.2, "dt_max": 0.1}}, "dt_min"),
        ({"gated_deltanet": {"dt_min": 0.2, "dt_max": 0.1}}, "dt_min"),
    ],
)
def test_inconsistent_settings_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        parse(ModelConfig, MODEL | change)


def test_every_kth_layer_checkpointing_refuses_impossible_numbers():
    for value in (0, -1, 1, 10**40, math.nan):
        with pytest.raises(ConfigError, match="every"):
            parse(ActivationCheckpointingConfig, {"policy": "every-kth-layer", "every": value})
