"""The model card of an export, filled from the files of the run."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from bst_base.json_lines import read_lines
from bst_base.settings import dump
from bst_dist.checkpoint.retention import CheckpointEntry
from bst_dist.config import Recipe
from bst_dist.hub.fast_tokenizer import is_bpe
from bst_dist.report.metrics import FILE, OF_AVERAGE
from bst_dist.study.comparison.run_summary import eval_report
from bst_dist.study.evaluation.prompts import begin_token
from data_pipeline.format.tokenizer import Tokenizer

_TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags: [block-state-transformer, long-context, pretrained]
---

# {name}

{summary}

```python
{code}```

{carried} {begin}

## Training

{training}

## Evaluation

{evaluation}

## Made with

{versions}

<details><summary>The recipe</summary>

```yaml
{recipe}```

</details>
"""

_CODE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({place}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({place}, trust_remote_code=True)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
"""
_REGISTERED = "import bst_dist.hub  # it has the tokenizer: pip install 'bst-dist[hub]'\n"
_CODE_OF_IDS = """import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({place}, trust_remote_code=True)
ids = torch.tensor([[{first}]])  # of the corpus; they stand for no text here
print(model.generate(ids, max_new_tokens=50)[0].tolist())
"""
_CARRIED = {
    False: "What a generated token costs does not depend on how many came before: each layer carries a window of keys "
    "and values, or a state, and no more.",
    True: "Layers of full attention carry the keys and values of all tokens before.",
}
_FIGURES = ("loss_nats_per_token", "bits_per_byte")
_BEGIN = {
    "joined": "Documents were joined in training, so a text begins after the end of another one: {who} that token in "
    "front.",
    "masked": "Documents did not see each other in training: a text begins with its own first token, and nothing "
    "stands in front of it.",
    "isolated": "Documents were isolated in training: a text begins with its own first token, and nothing stands in "
    "front of it.",
}


def model_card(
    run_dir: Path,
    one: CheckpointEntry,
    recipe: Recipe,
    tokenizer: Tokenizer,
    shapes: dict[str, tuple[int, ...]],
    averaged: bool = False,
    repository: str | None = None,
) -> str:
    """Return the card of a checkpoint with tensors of these shapes, as Markdown. `averaged`: it is for the averaged
    weights. `repository`: the repository on the hub where it will be uploaded."""
    who = "the tokenizer puts" if tokenizer.has_text else "put"
    versions = one.manifest.get("versions", {})
    return _TEMPLATE.format(
        name=recipe.name,
        code=_code(recipe, tokenizer, f'"{repository}"' if repository else "DIRECTORY"),
        summary=_summary(recipe, shapes),
        carried=_CARRIED["full" in recipe.model.mixers()],
        begin=_BEGIN[recipe.data.documents].format(who=who),
        training=_training(one, recipe, averaged),
        evaluation=_table(_evaluations(run_dir, one.step, averaged)),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()) or "Not recorded.",
        recipe=dump(without_place(recipe)),
    )


def _code(recipe: Recipe, tokenizer: Tokenizer, place: str) -> str:
    """Return Python code that loads the export from `place` and generates from it."""
    if not tokenizer.has_text:
        first = (begin_token(recipe, tokenizer) or [0])[0]
        return _CODE_OF_IDS.format(place=place, first=first)
    return ("" if is_bpe(tokenizer) else _REGISTERED) + _CODE.format(place=place)


def without_place(recipe: Recipe) -> Recipe:
    """Return the recipe without `paths_from`, the folder on this machine to which its paths are relative."""
    return recipe.model_copy(update={"paths_from": None})


def _summary(recipe: Recipe, shapes: dict[str, tuple[int, ...]]) -> str:
    model, parameters = recipe.model, sum(map(math.prod, shapes.values()))
    layers = ", ".join(f"{count} {mixer}" for mixer, count in Counter(model.mixers()).items())
    kind = f" Context states: {model.context.variant}." if any(m.startswith("bst") for m in model.mixers()) else ""
    return (
        f"A language model of {parameters / 1e6:,.1f} M parameters: {layers} layers of width {model.width}, blocks of "
        f"{model.block} tokens.{kind} Vocabulary: {model.vocab_size:,}."
    )


def _training(one: CheckpointEntry, recipe: Recipe, averaged: bool) -> str:
    train, tokens = recipe.train, one.manifest.get("tokens")
    read = "" if tokens is None else f" on {tokens:,} tokens"
    names = ", ".join(Path(url).name for url in recipe.data.urls())
    batch = ", then ".join(str(sequences) for sequences in train.batches.values)
    lengths = ", then ".join(f"{length:,}" for length in train.lengths.values)
    return (
        f"{one.step:,} of {train.steps:,} steps{read} of {names}, {batch} sequences of "
        f"{lengths} tokens per step, {recipe.data.documents} documents, {train.precision}."
        + (f" The weights are an exponential average with decay {train.average.decay}." if averaged else "")
    )


def _evaluations(run_dir: Path, step: int, averaged: bool) -> dict[str, dict[str, Any]]:
    """Return the results of `bst eval` on whole documents; else the run's own evaluation on a part of them."""
    if report := eval_report(run_dir, step, averaged):
        split = report["split"]
        return {f"{split} of {Path(of['corpus']).name}, {of['documents']:,} documents": of for of in report["corpora"]}
    figures = {}
    for line in read_lines(run_dir / FILE):
        if line["kind"] == (OF_AVERAGE if averaged else "eval") and line["step"] == step:
            on = f"{line['split']}, {line['tokens']:,} tokens in sequences as in training"
            figures[on] = {"loss_nats_per_token": line["loss_nats"], "bits_per_byte": line["bits_per_byte"]}
    return figures


def _table(evaluations: dict[str, dict[str, Any]]) -> str:
    if not evaluations:
        return "None at this step."
    lines = ["| on | loss, nats per token | bits per byte |", "| --- | --- | --- |"]
    for on, figures in evaluations.items():
        cells = [_figure(figures, key) for key in _FIGURES]
        lines.append(f"| {on} | {' | '.join(cells)} |")
    known = any(f"{key}_standard_error" in figures for figures in evaluations.values() for key in _FIGURES)
    return "\n".join([*lines, *(["", "± one standard error over documents."] if known else [])])


def _figure(figures: dict[str, Any], key: str) -> str:
    """Return a figure with its error; nothing for the bits per byte of ids without text, which are null or NaN."""
    if figures[key] is None or math.isnan(figures[key]):
        return ""
    error = figures.get(f"{key}_standard_error")
    return f"{figures[key]:.4f}" + (f" ± {error:.4f}" if error is not None else "")
