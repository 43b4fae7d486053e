"""The classifier: padding has no effect, pooling covers only real tokens, and two sequences can be compared."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bst_base.settings import ConfigError, parse
from bst_dist.config import Recipe
from bst_dist.model.config import ModelConfig
from bst_dist.study.lra.config import LongRangeConfig
from bst_dist.study.lra.model import Classifier
from bst_dist.study.lra.objective import Classification
from bst_dist.train.building import model_flops_per_label


def classifier(task: str = "listops", pooling: str = "mean", **changes) -> Classifier:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 257,
        "width": 16,
        "heads": 2,
        "ffn": 32,
        "block": 8,
        "depth": 2,
        "mixer": "bst",
        "ssm": {"state": 4, "chunk": 4},
    }
    model = parse(ModelConfig, sizes | changes)
    return Classifier(model, LongRangeConfig(task=task, examples="", pooling=pooling)).double()


def ids(*lengths: int, rows: int = 3, room: int = 32) -> torch.Tensor:
    """Return random sequences of these lengths, each padded to `room`, concatenated."""
    torch.manual_seed(1)
    parts = [torch.nn.functional.pad(torch.randint(1, 17, (rows, length)), (0, room - length)) for length in lengths]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("mixer", ["bst", "full", "ssm", "sliding", "gss", "block-recurrent", "transformer-xl"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_does_not_change_logits(mixer, pooling):
    extra = {"transformer_xl": {"window": 8}} if mixer == "transformer-xl" else {}
    model = classifier(pooling=pooling, mixer=mixer, **extra)
    short, long = (model(ids(13, room=room)) for room in (16, 64))
    torch.testing.assert_close(short, long, rtol=1e-9, atol=1e-12)


def test_logits_of_a_row_do_not_depend_on_the_others():
    model = classifier()
    batch = torch.cat((ids(13, rows=1), ids(30, rows=1)))
    alone = torch.cat([model(row[None]) for row in batch])
    torch.testing.assert_close(model(batch), alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooling_ignores_padding(pooling):
    model, batch = classifier(pooling=pooling), ids(13)
    positions = model.norm(model.hidden(batch))[:, :13]
    pooled = positions.mean(1) if pooling == "mean" else positions[:, 12]
    torch.testing.assert_close(model(batch), pooled @ model.head.weight.T + model.head.bias)


def test_two_sequences_are_encoded_separately_and_compared():
    model, batch = classifier("retrieval"), ids(13, 30)
    one, other = (
        model.norm(model.hidden(half))[:, :length].mean(1)
        for half, length in zip(batch.split(32, dim=1), (13, 30), strict=True)
    )
    expected = model.head(torch.cat((one, other, one * other, one - other), dim=1))
    torch.testing.assert_close(model(batch), expected)
    longer = torch.cat([torch.nn.functional.pad(half, (0, 32)) for half in batch.split(32, dim=1)], dim=1)
    torch.testing.assert_close(model(longer), model(batch))


def test_losses_equal_cross_entropy_without_masked_rows():
    model, batch = classifier(), ids(13)
    labels, mask = torch.tensor([1, 2, 3]), torch.tensor([True, False, True])
    found = model(batch, labels, mask)
    logits = model(batch)
    expected = -logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1) * mask
    torch.testing.assert_close(found.per_example, expected)
    torch.testing.assert_close(found.total, expected.sum())
    assert found.correct.tolist() == ((logits.argmax(-1) == labels) & mask).tolist()


def test_each_parameter_is_in_one_group():
    model = classifier()
    grouped = [id(parameter) for group in model.parameter_groups().values() for parameter in group]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    assert id(model.head.weight) in map(id, model.parameter_groups()["matrices"])


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"vocab_size": 20}, "model.vocab_size must be 16 for the task listops"),
        ("data", {"task": "listop"}, "data.task: input should be 'listops'"),
        ("data", {"poling": "last"}, "unknown key 'data.poling': did you mean 'data.pooling'?"),
        ("parallel", {"sp": 2}, "parallel.sp must be 1 for a task"),
    ],
)
def test_recipe_that_does_not_fit_its_task_is_refused(settings, section, change, message):
    with pytest.raises(ConfigError) as error:
        parse(Recipe, settings | {section: {**settings.get(section, {}), **change}})
    assert message in str(error.value)


def test_model_flops_of_an_example_equal_those_of_the_torch_counter(settings, monkeypatch):
    monkeypatch.setattr(
        "bst_dist.model.attention.sliding.attention_path", lambda device: "tiles"
    )  # which torch can count
    objective = Classification.of(parse(Recipe, settings))
    model = objective.model().requires_grad_(False)

    def counted(rows: int) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.ones(rows, 32, dtype=torch.long))
        return counter.get_total_flops()

    own_head = 2 * 16 * 10  # once per example
    assert model_flops_per_label(objective, 32) == pytest.approx(3 * (counted(3) - counted(2) - own_head))
