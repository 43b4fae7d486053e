from __future__ import annotations

import json
from pathlib import Path

import pytest

from bst_dist.parallel.ranks import choose_accelerator

choose_accelerator()  # before DeepSpeed is imported
from deepspeed.runtime.config import DeepSpeedConfig  # noqa: E402

from bst_dist.train.deepspeed_json import DeepSpeedConfigError, Intent, complete, differences, read  # noqa: E402

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
INTENT = Intent(world=1, micro_sequences=2, accumulation=3, gradient_clipping=0.5, precision="bf16")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_parses_every_completed_strategy_unchanged(path):
    completed = complete(read(path), INTENT, str(path))
    assert differences(completed, DeepSpeedConfig(completed)) == []
    assert completed["gradient_clipping"] == 0.5
    assert completed["train_batch_size"] == 6
    assert not completed["bf16"]["enabled"]
    assert completed["torch_autocast"] == {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    assert "reduce_bucket_size" in completed["zero_optimization"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"zero_optimisation": {}}', "did you mean 'zero_optimization'"),
        ('{"zero_optimization": {"reduce_bucket": 1}}', "did you mean 'zero_optimization.reduce_bucket_size'"),
        ('{"zero_optimization": {"offload_param": {"devise": 1}}}', "offload_param.device"),
        ('{"gradient_cliping": 1.0}', "did you mean 'gradient_clipping'"),
        ('{"gradient_clipping": 1.0}', "set by the recipe, in train.gradient_clipping"),
        ('{"train_batch_size": 7}', "set by the recipe, in train.sequences"),
        ('{"communication_data_type": "bf16"}', "can only be 'fp32': gradients are reduced in fp32"),
        ('{"timers": {"throughput": {"enabled": true}}}', "wait for the device twice in each micro-batch; remove it"),
        ('{"fp16": {"enabled": true}}', "fp16 is not supported"),
        ('{"bf16": {"enabled": true}}', "casts every parameter"),
        ('{"optimizer": {"type": "Adam"}}', "the section optimizer"),
        ('{"zero_optimization": {"stage": 1, "compute_grad_norm": false}}', "compute_grad_norm can only be true"),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}',
            "zero_optimization.offload_optimizer.ratio can only be 1",
        ),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "key 'stage' is given twice"),
        ("[]", "expected an object"),
        ("{", "not readable as JSON"),
    ],
)
def test_keys_ignored_by_deepspeed_or_set_by_the_recipe_are_refused(tmp_path, text, said):
    path = tmp_path / "strategy.json"
    path.write_text(text)
    with pytest.raises(DeepSpeedConfigError, match=said.replace(".", r"\.")) as error:
        complete(read(path), INTENT, str(path))
    assert str(path) in str(error.value)


def test_a_key_that_agrees_with_the_recipe_is_accepted(tmp_path):
    path = tmp_path / "strategy.json"
    path.write_text(json.dumps({"gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 2}))
    assert complete(read(path), INTENT, str(path))["gradient_clipping"] == 0.5


def test_differences_name_the_key_and_both_values():
    completed = complete(read(FILES[2]), INTENT, "here")
    parsed = DeepSpeedConfig(completed)
    parsed.gradient_clipping = 1.0
    parsed.zero_config = type(parsed.zero_config)(stage=1)
    parsed.timers_config = type(parsed.timers_config)()
    found = differences(completed, parsed)
    assert "gradient_clipping: asked for 0.5, its engine has 1.0" in found
    assert "zero_optimization.stage: asked for 2, its engine has 1" in found
    assert "timers.throughput.enabled: asked for False, its engine has True" in found
