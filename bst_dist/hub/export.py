"""Write a run as a Hugging Face model: weights, configuration, tokenizer, model card.

    bst eval runs/demo
    bst export runs/demo demo-model
    bst export runs/demo demo-model --push me/demo-model     # and upload it

transformers loads the directory with trust_remote_code=True, whether or not bst_dist is installed. If a report of `bst
eval` is in the run directory, the model card shows its results with their standard errors. `bst import` turns the
export into a run directory again. SHA256SUMS lists the digests of all files. data.storage is left out, because it may
hold keys.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from bst_base.errors import UserError
from bst_base.files import atomic_directory
from bst_base.sizes import readable_size
from bst_dist.checkpoint.commands.common import add_run, select
from bst_dist.checkpoint.commands.convert import add_export
from bst_dist.checkpoint.directory import AVERAGED, WEIGHTS, open_shards, require_intact
from bst_dist.checkpoint.exporting import DTYPES, stored_dtypes, write_weights
from bst_dist.checkpoint.retention import CheckpointEntry
from bst_dist.config import Recipe
from bst_dist.generation.sampling import without_text
from bst_dist.hub.card import model_card, without_place
from bst_dist.hub.digests import write_digests
from bst_dist.hub.fast_tokenizer import fast_tokenizer, is_bpe
from bst_dist.hub.modeling import BSTConfig, BSTForCausalLM
from bst_dist.hub.repository import push, require_id
from bst_dist.hub.tokenization import CORPUS_FILE, FILE, BSTTokenizer
from bst_dist.study.evaluation.prompts import begin_token
from bst_dist.study.evaluation.trained import require_language_model, tokenizer_of
from bst_dist.train.rundir import read_recipe
from data_pipeline.format.tokenizer import HuggingFaceTokenizer, Tokenizer
from data_pipeline.store.base import StorageConfig

CARD = "README.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_export(parser)
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="also upload the directory to this repository on the Hugging Face hub"
    )
    parser.add_argument("--private", action="store_true", help="with --push: into a private repository")
    parser.add_argument("--averaged", action="store_true", help="export the averaged weights (train.average)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.push is not None:
        require_id(args.push)
    one, recipe = _source(args)
    tokenizer = tokenizer_of(args.run, recipe)
    data = recipe.data.model_copy(update={"storage": StorageConfig()})  # may hold secrets; for this machine only
    recipe = recipe.model_copy(update={"data": data})
    weights = open_shards(one.path, _kind(args))
    dtypes = stored_dtypes(weights, recipe.model, DTYPES[args.dtype])
    with atomic_directory(args.output) as folder:
        prefix = f"{BSTForCausalLM.base_model_prefix}."
        write_weights(folder, weights, dtypes, args.file_size, {"step": str(one.step)}, prefix)
        _write_configuration(folder, one, recipe, tokenizer)
        card = model_card(args.run, one, recipe, tokenizer, weights.shapes, args.averaged, args.push)
        (folder / CARD).write_text(card, encoding="utf-8")
        write_digests(folder)
    files = {path.name: path.stat().st_size for path in sorted(args.output.iterdir())}
    size = readable_size(sum(files.values()))
    which = "averaged weights, " if args.averaged else ""
    print(f"{args.output}: step {one.step:,} of {args.run}, {which}{len(dtypes)} tensors, {size}, {args.dtype}")
    if args.push is not None:
        print(f"uploaded to {push(args.output, args.push, args.private)}")
    about = {"step": one.step, "averaged": args.averaged, "dtype": args.dtype}
    return {"output": str(args.output), **about, "bytes": files}


def _source(args: argparse.Namespace) -> tuple[CheckpointEntry, Recipe]:
    """Return the checkpoint to export, checked for damage, and its recipe."""
    if args.output.exists():
        raise UserError(f"{args.output}: already exists; choose another directory")
    recipe, one = read_recipe(args.run), select(args.run, args.step)
    require_language_model(args.run, recipe)
    require_intact(one.path, _kind(args))
    return one, recipe


def _kind(args: argparse.Namespace) -> str:
    return AVERAGED if args.averaged else WEIGHTS


def _write_configuration(folder: Path, one: CheckpointEntry, recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Write config.json, generation_config.json and the tokenizer's files."""
    begin = begin_token(recipe, tokenizer)
    named = {
        "bos_token_id": begin[0] if begin else None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    config = BSTConfig(
        recipe=without_place(recipe).model_dump(mode="json"),
        checkpoint={key: value for key, value in one.manifest.items() if key != "files"},
        architectures=[BSTForCausalLM.__name__],
        dtype=torch.float32,
        tie_word_embeddings=recipe.model.tied,
        **named,
    )
    config.save_pretrained(folder)
    never = without_text(recipe.model.vocab_size, tokenizer).nonzero().flatten().tolist()
    GenerationConfig(suppress_tokens=never, **named).save_pretrained(folder)
    if not tokenizer.has_text:  # a corpus of ids: there is no tokenizer to publish
        (folder / tokenizer.file).write_bytes(tokenizer.model)
        return
    own = CORPUS_FILE if isinstance(tokenizer, HuggingFaceTokenizer) else FILE
    (folder / own).write_bytes(tokenizer.model)
    if is_bpe(tokenizer):
        fast_tokenizer(tokenizer, begin[0] if begin else None).save_pretrained(folder)
    else:
        begins = {"bos_token": tokenizer.piece(begin[0])} if begin else {}
        BSTTokenizer(str(folder / FILE), **begins).save_pretrained(folder)
