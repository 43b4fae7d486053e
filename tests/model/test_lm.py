"""The language model: causality, slices, generation, document resets, parameter groups, bad sizes."""

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel

BLOCK, LENGTH, VOCABULARY = 16, 64, 40
MODELS = [("sliding", "SH"), ("bst", "SH"), ("bst", "MH"), ("bst", "MF")]
every_model = pytest.mark.parametrize(("mixer", "variant"), MODELS)


def config(mixer="bst", variant="SH", **changes) -> ModelConfig:
    settings = {
        "width": 16,
        "heads": 2,
        "ffn": 32,
        "block": BLOCK,
        "depth": 2,
        "vocab_size": VOCABULARY,
        "mixer": mixer,
        "placement": [1],
    }
    if mixer == "bst":
        settings |= {"context": {"variant": variant, "states": 3}, "ssm": {"state": 4, "chunk": 8}}
    return ModelConfig(**(settings | changes))


def make(mixer="bst", variant="SH") -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config(mixer, variant)).double()


def tokens(rows=2, length=LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    drawn = torch.randint(0, VOCABULARY, (rows, length + 1))
    return drawn[:, :-1], drawn[:, 1:]


@every_model
def test_a_later_token_changes_no_earlier_loss_bitwise(mixer, variant):
    model = make(mixer, variant).float()
    ids, labels = tokens()
    losses = model(ids, labels).per_token
    for t in (1, 15, 16, 40):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1) % VOCABULARY
        assert torch.equal(model(changed, labels).per_token[:, :t], losses[:, :t])
        assert not torch.equal(model(changed, labels).per_token[:, t:], losses[:, t:])


@every_model
@pytest.mark.parametrize("slices", [[32, 32], [16, 16, 16, 16], [48, 8, 8], [64 - 16, 8, 1, 1, 6]])
def test_slices_with_a_carried_past_equal_one_sequence(mixer, variant, slices):
    require_equal_in_slices(make(mixer, variant), slices)


@every_model
def test_slices_within_a_block_need_not_be_whole_chunks(mixer, variant):
    torch.manual_seed(0)
    model = LanguageModel(config(mixer, variant, ssm={"state": 4, "chunk": 4})).double()
    require_equal_in_slices(model, [6, 10, 16, 7, 1, 8, 16])


def require_equal_in_slices(model, slices):
    ids, labels = tokens()
    whole = model(ids, labels).per_token
    state, position, found = None, 0, []
    for part_ids, part_labels in zip(ids.split(slices, 1), labels.split(slices, 1), strict=True):
        past = model.carry(state, position)
        found.append(model(part_ids, part_labels, past=past).per_token)
        state, position = past.after, position + part_ids.shape[1]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-11, atol=1e-12)


@every_model
def test_a_token_at_a_time_equals_the_parallel_forward(mixer, variant):
    model = make(mixer, variant)
    ids, _ = tokens(rows=1)
    state = None
    for t in range(LENGTH):
        past = model.carry(state, t)
        one = model(ids[:, t : t + 1], past=past)
        state = past.after
        padded = torch.zeros(1, LENGTH, dtype=torch.long)
        padded[:, : t + 1] = ids[:, : t + 1]
        log_p = model(padded, torch.arange(VOCABULARY)[one.argmax()].expand(1, LENGTH)).per_token[0, t]
        torch.testing.assert_close(-torch.log_softmax(one, -1).max(), log_p, rtol=1e-11, atol=1e-12)


@every_model
def test_a_document_start_equals_a_separate_document(mixer, variant):
    model = make(mixer, variant)
    ids, labels = tokens()
    starts = torch.tensor([[True, False, True, False], [False, True, True, False]])
    losses = model(ids, labels, starts=starts).per_token
    for row, begins in ((0, [0, 32, 64]), (1, [0, 16, 32, 64])):
        for begin, end in pairwise(begins):
            alone = model(ids[row : row + 1, begin:end], labels[row : row + 1, begin:end]).per_token
            torch.testing.assert_close(losses[row : row + 1, begin:end], alone, rtol=1e-11, atol=1e-12)


@every_model
def test_a_start_in_the_first_block_hides_the_carried_past(mixer, variant):
    model = make(mixer, variant)
    ids, labels = tokens()
    past = model.carry()
    model(ids, labels, past=past)
    starts = torch.tensor([[True, False, False, False], [False, False, False, False]])
    after = model.carry(past.after, LENGTH)
    losses = model(ids, labels, starts=starts, past=after).per_token
    fresh = model(ids, labels).per_token
    torch.testing.assert_close(losses[0], fresh[0], rtol=1e-11, atol=1e-12)
    assert (losses[1] - fresh[1]).abs().max() > 1e-6


@every_model
def test_masked_labels_have_zero_loss(mixer, variant):
    model = make(mixer, variant)
    ids, labels = tokens()
    mask = torch.rand(labels.shape) < 0.5
    whole, masked = model(ids, labels), model(ids, labels, mask)
    torch.testing.assert_close(masked.per_token, whole.per_token * mask)
    torch.testing.assert_close(masked.total, masked.per_token.sum())


def test_every_parameter_is_in_one_group_and_gets_a_gradient():
    for mixer, variant in MODELS:
        model = make(mixer, variant)
        groups = model.parameter_groups()
        grouped = [id(p) for group in groups.values() for p in group]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())
        model(*tokens()).total.backward()
        assert all(p.grad is not None and p.grad.count_nonzero() for p in model.parameters())
        assert all(p.dim() > 1 for p in groups["matrices"])
        undecayed = {id(p) for p in groups["vectors"]}
        for name, p in model.named_parameters():
            if any(part in name for part in ("embedding", "norm", "scale", "bias", "read_out", "skip", "initial")):
                assert id(p) in undecayed, name
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if id(p) in map(id, groups["ssm"])}
    assert names == {"log_dt", "log_decay", "frequency"}


def test_logits_and_gradients_of_an_untied_head_equal_the_formula():
    torch.manual_seed(0)
    model = LanguageModel(config(tied=False)).double()
    ids, labels = tokens()
    stream = model.norm(model.hidden(ids))
    logits = stream @ model.output.weight.T / 4  # the root of the width
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(ids, labels).total, expected)
    torch.testing.assert_close(model(ids), logits[:, -1])
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    model(ids, labels).total.backward()
    for found, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(found.grad, gradient)


def test_tied_and_untied_models_share_all_other_initial_weights():
    models = []
    for tied in (True, False):
        torch.manual_seed(0)
        models.append(LanguageModel(config(tied=tied)))
    one, other = (dict(model.named_parameters()) for model in models)
    assert other.keys() - one.keys() == {"output.weight"}
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_activation_checkpointing_changes_no_gradient():
    ids, labels = tokens()
    gradients = []
    for checkpoint in (None, lambda layer, *x: torch.utils.checkpoint.checkpoint(layer, *x, use_reentrant=False)):
        model = make()
        model.checkpoint = checkpoint
        past = model.carry()
        model(ids, labels, past=past).total.backward()
        again = model.carry(past.after, LENGTH)
        model(ids, labels, past=again).total.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads .3. must divide width .16."),
        ({"placement": [2]}, "placement .2. is outside the 2 layers"),
        ({"ssm": {"chunk": 12}}, "chunk .12. must divide block .16."),
        ({"mixer": "blst"}, "bst"),
        ({"mixer": "gss", "gss": {"reduce": 5}}, r"gss.reduce \(5\) must divide width \(16\)"),
        ({"mixer": "bst", "filler": "gss", "gss": {"reduce": 32}}, r"gss.reduce \(32\) must divide width \(16\)"),
    ],
)
def test_incompatible_sizes_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_the_width_of_gss_does_not_matter_where_no_layer_uses_it():
    assert config(width=18).width % config().gss.reduce


def test_a_slice_of_one_and_a_half_blocks_is_refused():
    model = make()
    ids, labels = tokens(length=24)
    with pytest.raises(ValueError, match="neither whole blocks of 16 nor within one"):
        model(ids, labels)
