"""An export loads with only transformers: neither this project nor its other dependencies can be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from bst_dist.hub.fast_tokenizer import fast_tokenizer, is_bpe
from bst_dist.model.layers import MIXERS
from data_pipeline.format.tokenizer import TokenizerConfig, parse_tokenizer, train_tokenizer
from tests.hub.tokenizing import require_same_ids

ALONE = """
import sys
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = tokenizer(["for x", "naïve café </s> return"], padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[:, -1]
written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
model.save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
with torch.no_grad():
    torch.testing.assert_close(again(**inputs).logits[:, -1], logits)
print(json.dumps([inputs.input_ids.tolist(), logits.tolist(), written.tolist()]))
"""


@pytest.fixture(scope="module")
def only_transformers(tmp_path_factory, link_packages):
    """A directory of packages with only transformers, torch and their dependencies."""
    folder = tmp_path_factory.mktemp("packages")
    done = link_packages(folder, ["transformers", "torch"])
    assert not done & {"sentencepiece", "deepspeed", "mpi4py", "bst-dist"}
    return folder


def alone(folder, tmp_path, packages):
    """Return what a process without this project computes from an export."""
    base = Path(sys.base_prefix) / "bin" / Path(sys.executable).name  # not that of the virtual environment
    command = [str(base), "-s", "-c", ALONE, str(folder), str(tmp_path / "saved-again")]
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(packages),
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def same_as_ours(folder, tmp_path, packages):
    ids, logits, written = alone(folder, tmp_path, packages)
    inputs = torch.tensor(ids)
    ours = AutoModelForCausalLM.from_pretrained(folder).eval()
    mask = (inputs != 0).long()
    with torch.no_grad():
        expected = ours(input_ids=inputs, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(torch.tensor(logits), expected)
    text = ours.generate(input_ids=inputs, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert text.tolist() == written


def test_an_export_works_without_this_package_and_can_be_saved_again(exported, tmp_path, only_transformers):
    _, folder = exported()
    same_as_ours(folder, tmp_path, only_transformers)


@pytest.mark.ranks  # seconds each: a process that imports torch and transformers
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_mixer_works_without_this_package(exported, tmp_path, only_transformers, mixer):
    _, folder = exported(
        mixer=mixer, width=64, head_width=24, activation="swiglu", tied=False, attention={"kv_heads": 1}
    )
    same_as_ours(folder, tmp_path, only_transformers)


@pytest.fixture(scope="module")
def both(sentencepiece_model):
    ours = parse_tokenizer(sentencepiece_model)
    return fast_tokenizer(ours, ours.eos_id), ours


TEXT = st.lists(
    st.one_of(
        st.text(), st.sampled_from(["</s>", "<pad>", "<unk>", "<0x41>", " ", "  ", "\n", "\x00", "▁", "for", "\r\n"])
    ),
    max_size=8,
).map("".join)


@settings(deadline=None)
@given(text=TEXT)
def test_every_text_has_our_ids_and_is_decoded_back(both, text):
    require_same_ids(*both, text)


def test_long_lines_are_tokenized_like_ours(both):
    theirs, ours = both
    for text in ("café for x " * 4000, "a" * 40_000 + "▁" + "for" * 9000):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text).tolist()


def test_offsets_select_the_text(both):
    theirs, _ = both
    found = theirs("naïve for x", return_offsets_mapping=True, add_special_tokens=False).offset_mapping
    assert "".join("naïve for x"[a:b] for a, b in found) == "naïve for x"


def test_unigram_models_are_distinguished_from_bpe(sentencepiece_model):
    texts = [f"a few words of text {i * 7919}, and a few more words: naïve, café, return" for i in range(400)]
    unigram = train_tokenizer(texts, TokenizerConfig(vocab_size=300, model_type="unigram"))
    assert is_bpe(parse_tokenizer(sentencepiece_model))
    assert not is_bpe(parse_tokenizer(unigram))
