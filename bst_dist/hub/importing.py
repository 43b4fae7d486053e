"""Make a run directory from an exported model: to evaluate it, generate with it, or start other runs from its weights.

    bst import demo-model runs/imported
    bst import demo-model runs/imported data.corpus=/data/stdlib
    bst import me/demo-model runs/imported                   # from the Hugging Face hub

It also reads what transformers' save_pretrained wrote after fine-tuning there. The recipe is the exported one, with the
overrides. Optimizer states are not exported, so the run cannot be resumed: start another one from its weights with
`initial_weights`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bst_base.clock import utc_now
from bst_base.errors import UserError
from bst_base.files import atomic_directory
from bst_base.settings import dump, overridden, parse
from bst_dist.checkpoint.directory import FORMAT, MANIFEST, WEIGHTS, directory, manifest_content, shard_file
from bst_dist.checkpoint.directory import INDEX as PLACES
from bst_dist.checkpoint.durable import Files
from bst_dist.checkpoint.exporting import INDEX, SINGLE
from bst_dist.checkpoint.shards import Piece, write_header, write_values
from bst_dist.config import Recipe, digest
from bst_dist.hub.digests import DIGESTS, read_digests
from bst_dist.hub.modeling import BSTConfig, BSTForCausalLM
from bst_dist.hub.repository import fetched
from bst_dist.hub.tokenization import CORPUS_FILE, FILE
from bst_dist.model.lm import LanguageModel
from bst_dist.model.meta_device import weightless
from bst_dist.train.rundir import RECIPE
from bst_dist.version import versions
from data_pipeline.format.tokenizer import IdsOnly, Tokenizer, read_tokenizer

CONFIG = "config.json"


class ExportError(UserError):
    """The input is damaged, or is not an exported model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an exported model: its directory, or OWNER/NAME on the hub")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory to write; must not exist")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change in its recipe")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of the repository")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.run.exists():
        raise UserError(f"{args.run}: already exists; choose another directory")
    model = fetched(args.model, args.revision)
    _require_digests(model)
    recipe, about = _configuration(model, args.overrides)
    tokenizer = _tokenizer(model)
    tensors = _Tensors(model, recipe)
    step = int(about.get("step") or recipe.train.steps)
    with atomic_directory(args.run) as folder:
        (folder / RECIPE).write_text(dump(recipe), encoding="utf-8")
        (folder / tokenizer.file).write_bytes(tokenizer.model)
        _write_checkpoint(directory(folder, step), tensors, about | {"step": step, "recipe": digest(recipe)})
    print(
        f"{args.run}: the weights of step {step:,} of {recipe.name}, {len(tensors.shapes)} tensors\n"
        f"start another run from them with initial_weights.run={args.run} initial_weights.step={step}"
    )
    return {"run": str(args.run), "step": step, "tensors": len(tensors.shapes)}


def _tokenizer(model: Path) -> Tokenizer:
    """Return the corpus's tokenizer, byte for byte."""
    own = (model / name for name in (CORPUS_FILE, FILE, IdsOnly.file))
    return read_tokenizer(next((path for path in own if path.is_file()), model / FILE))


def _require_digests(model: Path) -> None:
    """Raise ExportError unless all files are as exported. Models saved by transformers have no digests to check."""
    if not (model / DIGESTS).is_file():
        return
    for name, expected in read_digests(model / DIGESTS).items():
        if not (model / name).is_file():
            raise ExportError(f"{model}: {name} is missing: copy the model again")
        with (model / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise ExportError(
                    f"{model / name}: changed since the export: copy the model again, or, if the change is intended, "
                    f"remove {DIGESTS}"
                )


def _configuration(model: Path, overrides: list[str]) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe with its overrides, and the manifest of the exported checkpoint."""
    path = model / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read: {error}") from None
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind != BSTConfig.model_type or not isinstance(found.get("recipe"), dict):
        raise ExportError(f"{path}: not of a model that `bst export` wrote (model_type {kind!r})")
    if unknown := sorted(found.keys() - BSTConfig().to_dict().keys() - {"auto_map"}):
        raise ExportError(f"{path}: unknown key {unknown[0]!r}")
    return parse(
        Recipe, overridden(found["recipe"] | {"paths_from": str(Path.cwd())}, overrides), where=f"{path}: recipe"
    ), found.get("checkpoint") or {}


class _Tensors:
    """The weights in an export, checked against the recipe's model. They are read one at a time."""

    def __init__(self, model: Path, recipe: Recipe) -> None:
        with weightless():
            wanted = {name: tuple(p.shape) for name, p in LanguageModel(recipe.model).named_parameters()}
        self._files = {}
        self.shapes = wanted
        for path in _weight_files(model):
            try:
                file = safe_open(path, framework="pt")
                self._files |= dict.fromkeys(file.keys(), file)
            except (OSError, SafetensorError) as error:
                raise ExportError(f"{path}: damaged: {error}: copy the model again") from None
        self._prefix = f"{BSTForCausalLM.base_model_prefix}."
        there = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}
        self._require(model, {self._prefix + name: shape for name, shape in wanted.items()}, there)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in single precision."""
        return self._files[self._prefix + name].get_tensor(self._prefix + name).float()

    @staticmethod
    def _require(model: Path, wanted: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]) -> None:
        for name in sorted(wanted.keys() | there.keys()):
            if wanted.get(name) != there.get(name):
                raise ExportError(
                    f"{model}: {name} is {there.get(name, 'missing')}, the model of its config.json wants "
                    f"{wanted.get(name, 'no such tensor')}: export the run again"
                )


def _weight_files(model: Path) -> list[Path]:
    if not (model / INDEX).is_file():
        return [model / SINGLE]
    try:
        names = json.loads((model / INDEX).read_text())["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise ExportError(f"{model / INDEX}: cannot be read: {error}") from None
    return [model / name for name in sorted(set(names))]


def _write_checkpoint(path: Path, tensors: _Tensors, about: dict[str, Any]) -> None:
    """Write a checkpoint of the weights only, as a run with one rank does."""
    path.mkdir(parents=True)
    files = Files(path)
    pieces = [Piece(name, shape, 0, torch.Size(shape).numel()) for name, shape in tensors.shapes.items()]
    with files.open(shard_file(WEIGHTS, 0)) as file:
        write_header(file, pieces, [torch.float32] * len(pieces), {"format": "pt"})
        for piece in pieces:
            write_values(file, tensors.read(piece.name))
    unknown = {
        "tokens": 0,
        "validation_loss_nats": None,
        "data": {},
        "skipped": 0,
        "updates": 0,
        "groups": {},
        "layout": {"ranks": 1, "sp": 1, "zero_stage": 0},
        "versions": versions(),
        "time": utc_now(),
    }
    records = {name: {**record, "rank": 0} for name, record in files.records.items()}
    about = {key: value for key, value in about.items() if key != PLACES}  # it describes other files
    (path / MANIFEST).write_bytes(manifest_content({**unknown, **about, "format": FORMAT, "files": records}))
