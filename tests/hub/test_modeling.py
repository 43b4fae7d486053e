from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bst_dist.hub  # noqa: F401 (registers the model with transformers)
from bst_dist.cli import main
from bst_dist.hub import BSTCache
from bst_dist.study.evaluation.trained import open_run, tokenizer_of
from bst_dist.train.rundir import read_recipe

KINDS = [
    {},
    {"context": {"variant": "MH"}},
    {"context": {"variant": "MF", "states": 3}},
    {"context": {"attend": "previous"}},
    {"attention": {"position": "rope", "include_self": False}},
    {"ssm": {"kernel": "explicit", "length": 20}},
    {"ssm": {"kernel": "hyena", "length": 20}, "context": {"variant": "MF", "states": 3}},
    {"ssm": {"kernel": "s4-dplr", "chunk": 4}},
    {"ssm": {"chunk": 4, "init": "legs"}, "mixer": "gss"},
    {"parametrisation": {"kind": "completep", "base_width": 8, "base_depth": 2}},
    {"documents": "isolated"},
    *({"mixer": mixer} for mixer in ("sliding", "block-recurrent", "ssm", "full")),
    {"mixer": "transformer-xl", "transformer_xl": {"window": 16}},
]
MIXED = [{}, {"context": {"variant": "MF", "states": 3}}, {"mixer": "block-recurrent"}]
PROMPTS = ["x", "for x = 12\nreturn naïve 😀 " * 3, "class café"]


def padded(tokenizer, side="left"):
    return tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side)


def reference(model, ids):
    """Return our model's logits of every token, computed in one parallel pass."""
    block = model.config.block
    return model.logits(model.hidden(torch.tensor([[*ids, *[0] * (-len(ids) % block)]])))[0, : len(ids)]


@pytest.fixture
def loaded(exported):
    def load(**changes):
        run_dir, folder = exported(**changes)
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), run_dir

    return load


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_logits_and_generated_tokens_equal_ours(loaded, kind, tmp_path):
    model, tokenizer, run_dir = loaded(**kind)
    ours = open_run(run_dir).model
    for prompt in PROMPTS[:2]:
        inputs = tokenizer(prompt, return_tensors="pt")
        expected = reference(ours, inputs.input_ids[0].tolist())
        for use_cache in (True, False):
            got = model(**inputs, use_cache=use_cache).logits[0]
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
        written = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs.input_ids.shape[1] :]
        options = ["--prompt", prompt, "--temperature", "0", "--tokens", "20", "--json", str(tmp_path / "r.json")]
        assert main(["generate", str(run_dir), *options]) == 0
        (text,) = json.loads((tmp_path / "r.json").read_text())["texts"]
        # Use our tokenizer, because transformers' loses the bytes of an incomplete character at the end.
        assert tokenizer_of(run_dir, read_recipe(run_dir)).decode(written.tolist()) == text["continuation"]
        assert len(written) == text["tokens"]


@pytest.mark.parametrize(
    "kind", [{}, {"context": {"variant": "MF", "states": 3}}, {"mixer": "block-recurrent"}], ids=str
)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_prompts_equal_single_prompts(loaded, kind, side):
    model, tokenizer, _ = loaded(**kind)
    together = padded(tokenizer, side)
    written = model.generate(**together, max_new_tokens=12, do_sample=False)[:, together.input_ids.shape[1] :]
    for use_cache in (True, False):
        logits = model(**together, use_cache=use_cache).logits
        for row, prompt in enumerate(PROMPTS):
            alone = tokenizer(prompt, return_tensors="pt")
            own = logits[row][together.attention_mask[row].bool()]
            torch.testing.assert_close(own, model(**alone).logits[0], rtol=2e-5, atol=2e-5)
            drawn = model.generate(**alone, max_new_tokens=12, do_sample=False)[0, alone.input_ids.shape[1] :]
            assert drawn.tolist() == written[row, : len(drawn)].tolist()


@torch.no_grad()
def test_beam_search_with_a_cache_equals_that_without(loaded):
    model, tokenizer, _ = loaded()
    options = {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2}
    carried, again = (model.generate(**padded(tokenizer), **options, use_cache=cache) for cache in (True, False))
    assert torch.equal(carried, again)


@torch.no_grad()
def test_generation_reads_each_token_once_with_constant_state_size(loaded):
    model, tokenizer, _ = loaded()
    read, inputs = [], tokenizer(PROMPTS[1], return_tensors="pt")
    model.model.layers[0].register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1]))
    model.generate(**inputs, min_new_tokens=20, max_new_tokens=20)
    assert sum(read) == inputs.input_ids.shape[1] + 19
    cache, sizes = BSTCache(1), []
    for _ in range(6):
        model(torch.ones(1, 8, dtype=torch.long), past_key_values=cache)
        sizes.append(cache.rows.state_bytes)
    assert len(set(sizes)) == 1
    assert cache.get_seq_length() == 48


@torch.no_grad()
def test_reading_continues_from_a_cache(loaded):
    model, tokenizer, _ = loaded()
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    first = model(ids[:, :11])
    rest = model(ids[:, 11:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat((first.logits, rest), 1), model(ids).logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_equal_ours(loaded, side):
    model, tokenizer, run_dir = loaded()
    ours, given, inputs = open_run(run_dir).model, padded(tokenizer, side), padded(tokenizer, "right")
    model.train()
    labels = given.input_ids.masked_fill(given.attention_mask == 0, -100)
    loss = model(**given, labels=labels).loss
    loss.backward()
    ids = torch.nn.functional.pad(inputs.input_ids, (0, -inputs.input_ids.shape[1] % 8))
    mask = torch.nn.functional.pad(inputs.attention_mask, (0, ids.shape[1] - inputs.attention_mask.shape[1])).bool()
    mask = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    total = ours(ids, torch.nn.functional.pad(ids[:, 1:], (0, 1)), mask).total / mask.sum()
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    for (name, got), expected in zip(model.model.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_half_precision_equals_that_of_training(exported):
    run_dir, folder = exported()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = list(range(4, 20))
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference(open_run(run_dir).model, ids)
    assert torch.equal(model(torch.tensor([ids]), use_cache=False).logits[0], expected)


@pytest.mark.parametrize("mask", [[[1, 0, 1, 1]], [[0, 0, 0, 0]]])
def test_a_mask_other_than_padding_is_refused(loaded, mask):
    with pytest.raises(ValueError, match="attention_mask hides"):
        loaded()[0](torch.ones(1, 4, dtype=torch.long), attention_mask=torch.tensor(mask))


@pytest.mark.parametrize("kept", [1, 4, torch.tensor([0, 2])], ids=["last", "some", "columns"])
def test_labels_with_the_logits_of_some_columns_are_refused(loaded, kept):
    model, tokenizer, _ = loaded()
    given = tokenizer("for x = 12 return", return_tensors="pt")
    with pytest.raises(ValueError, match=r"labels: .* leave logits_to_keep out"):
        model(**given, labels=given.input_ids, logits_to_keep=kept)
    assert model(**given, labels=given.input_ids, logits_to_keep=0).loss > 0


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("said_by", ["call", "config"])
def test_outputs_that_the_model_does_not_have_are_refused(loaded, name, said_by):
    model, ids = loaded()[0], torch.ones(1, 4, dtype=torch.long)
    if said_by == "config":
        setattr(model.config, name, True)
    with pytest.raises(ValueError, match=f"{name}: this model returns logits"):
        model(ids, **({name: True} if said_by == "call" else {}))
    assert model(ids, **{name: False}).logits.shape == (1, 4, 330)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dynamics_cast_to_16_bits_are_refused(loaded, dtype):
    model, ids = loaded()[0], torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"log_dt is {dtype}, .*from_pretrained\(…, dtype={dtype}\)"):
        model.to(dtype)(ids)
    model.to(torch.float64)(ids)


def test_the_exported_directory_works_with_trust_remote_code(exported, tmp_path):
    _, folder = exported()
    code = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)
print(model.generate(**tokenizer("for x", return_tensors="pt"), max_new_tokens=3).shape[1])
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 3
