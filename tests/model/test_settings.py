"""Every number in the model's settings has bounds: impossible values are refused when the recipe is read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bst_base.settings import ConfigError, fields, overridden, parse
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.model.config import MIXER_SECTIONS, ModelConfig
from bst_dist.model.lm import LanguageModel

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
        ({"width": 3, "heads": 1}, "context.ssm_width: its default .* width 3 .* raise width"),
        ({"width": 7, "heads": 1, "context": {"variant": "MF"}}, "context.ssm_width"),
        ({"mixer": "sliding", "filler": "gss", "placement": [0], "gss": {"reduce": 5}}, "gss.reduce .* set it to 1"),
        ({"block": 96}, r"ssm.chunk \(64\) must divide block \(96\): set it to 32"),
        ({"block": 96, "mixer": "mamba2", "placement": [0]}, r"mamba2.chunk \(64\)"),
        ({"block": 96, "mixer": "gated-deltanet"}, r"gated_deltanet.chunk \(64\)"),
    ],
)
def test_inconsistent_settings_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        parse(ModelConfig, MODEL | change)


@pytest.mark.parametrize(
    "settings",
    [
        {"mixer": "sliding", "block": 96},
        {"mixer": "mamba2", "block": 96, "mamba2": {"chunk": 32}},
        {"mixer": "sliding", "width": 3, "heads": 1, "ssm": {"kernel": "ssd", "head": 5}},
        {"mixer": "bst", "transformer_xl": {"window": 20}, "gss": {"reduce": 5}, "mamba2": {"convolution": 100}},
    ],
)
def test_sections_that_no_layer_reads_may_have_any_values(settings):
    config = parse(ModelConfig, MODEL | settings)
    LanguageModel(config)


CHANGES: dict[str, list[Any]] = {
    "width": [1, 3, 8, 30],
    "heads": [1, 4, 32],
    "head_width": [1, 3, 33],
    "block": [1, 5, 96],
    "placement": [[], [0]],
    "parametrisation": [{"kind": "completep", "base_width": 8, "base_depth": 2}],
    "attention": [{"kv_heads": 1}, {"position": "rope"}, {"include_self": False}, {"buckets": 2, "max_distance": 2}],
    "context": [{"variant": "MH"}, {"variant": "MF", "states": 1}, {"attend": "previous"}, {"ssm_width": 5}],
    "ssm": [
        {"kernel": kind, **given, **more}
        for kind, given in (KINDS | {"none": {}}).items()
        for more in [{}, {"chunk": 3}, {"chunk": 65536}, {"state": 2}, {"head": 3}, {"head": 1}, {"length": 1}]
    ],
    "transformer_xl": [{"window": 1}, {"window": 16}, {"window": 24}],
    "block_recurrent": [{"states": 1}],
    "gss": [{"gate": 1}, {"reduce": 3}, {"reduce": 64}, {"reduce": 32}],
    "mamba2": [{"head": 3}, {"head": 1}, {"expand": 1}, {"convolution": 17}, {"convolution": 18}, {"chunk": 3}],
    "gated_deltanet": [{"expand": 1}, {"convolution": 17}, {"convolution": 18}, {"chunk": 3}, {"chunk": 16}],
    "full": [{"longest": 1}],
}
"""Values that fit some mixers, and values that fit none."""


@pytest.mark.parametrize("mixer", MIXER_SECTIONS)
@pytest.mark.parametrize("name", CHANGES)
def test_what_the_settings_accept_can_be_built(mixer, name):
    """So no error of a layer's constructor reaches a user, who would see a traceback."""
    for value in CHANGES[name]:
        for variant in ("SH", "MF") if name in ("ssm", "width") else ("",):
            given = MODEL | {"mixer": mixer, "depth": 1, "ssm": {"chunk": 16}, name: value}
            given |= {"context": {"variant": variant}} if variant else {}
            try:
                config = parse(ModelConfig, given)
            except ConfigError as error:
                assert "\n" not in str(error)
                continue
            with torch.device("meta"):
                LanguageModel(config)


def test_every_kth_layer_checkpointing_refuses_impossible_numbers():
    for value in (0, -1, 1, 10**40, math.nan):
        with pytest.raises(ConfigError, match="every"):
            parse(ActivationCheckpointingConfig, {"policy": "every-kth-layer", "every": value})
