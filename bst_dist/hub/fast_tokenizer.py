"""The corpus's BPE tokenizer for the `tokenizers` library: the same ids for every text, without this project installed.

SentencePiece, and published models made from its own, write a space as U+2581. Here pieces contain the space itself, so
a U+2581 in the text stays U+2581 and is encoded as its three bytes, as in the corpus. Published models that also cut a
text elsewhere keep their form (`_is_plain`), in which a U+2581 becomes a space.

The merges of a SentencePiece model are all splits of a piece into two pieces, in the order of the pieces' scores.
SentencePiece applies them in this order.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from data_pipeline.format.tokenizer import MAX_LINE, HuggingFaceTokenizer, Tokenizer

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
BPE = 2
"""SentencePiece's numbers of the BPE algorithm and, above, of the kinds of pieces."""
SPACE = "\u2581"
"""How a space is written in pieces."""


def is_bpe(tokenizer: Tokenizer) -> bool:
    """Whether `fast_tokenizer` gives the corpus's ids. A unigram model would break ties differently."""
    published = isinstance(tokenizer, HuggingFaceTokenizer)
    return published or proto.ModelProto.FromString(tokenizer.model).trainer_spec.model_type == BPE


def fast_tokenizer(tokenizer: Tokenizer, begin: int | None) -> PreTrainedTokenizerFast:
    """Return the tokenizer as transformers loads it. `begin`: an id added in front of every text; None: none."""
    backend = _published(tokenizer) if isinstance(tokenizer, HuggingFaceTokenizer) else _sentencepiece(tokenizer)
    named = {"eos_token": tokenizer.piece(tokenizer.eos_id), "pad_token": tokenizer.piece(tokenizer.pad_id)}
    if begin is not None:
        named["bos_token"] = tokenizer.piece(begin)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{named['bos_token']} $A",
            pair=f"{named['bos_token']} $A $B",
            special_tokens=[(named["bos_token"], begin)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        split_special_tokens=True,  # text is never parsed as a special token
        clean_up_tokenization_spaces=False,
        **named,
    )


def _published(tokenizer: HuggingFaceTokenizer) -> Backend:
    """Return the tokenizer.json without the parts that only the corpus needs: the end of a document, and padding."""
    model = json.loads(tokenizer.model)
    backend = Backend.from_str(json.dumps(_with_spaces(model) if _is_plain(model) else model))
    backend.no_padding()
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return backend


def _is_plain(model: dict[str, Any]) -> bool:
    """Whether a tokenizer.json writes spaces as U+2581, has byte pieces, and cuts a text at no other characters."""
    normalizer, cut = model["normalizer"], model["pre_tokenizer"]
    replaces = bool(normalizer) and normalizer["type"] == "Replace" and normalizer["pattern"] == {"String": " "}
    metaspace = bool(cut) and cut["type"] == "Metaspace" and cut["replacement"] == SPACE
    pieces = model["model"].get("vocab", ())
    return (
        (replaces or metaspace)
        and (replaces or not normalizer)
        and (metaspace or not cut)
        and model["model"]["type"] == "BPE"
        and all(f"<0x{byte:02X}>" in pieces for byte in SPACE.encode())
        and not any(" " in piece for piece in pieces)
        and not any(SPACE in token["content"] for token in model["added_tokens"])
    )


def _with_spaces(model: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json whose pieces contain the space itself."""
    bpe, words = model["model"], [pre_tokenizers.Split(SPACE, "isolated")]
    if (model["pre_tokenizer"] or {}).get("split"):
        words.append(pre_tokenizers.Split(" ", "merged_with_next"))
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in bpe["merges"]]
    pieces = {
        "vocab": {piece.replace(SPACE, " "): token for piece, token in bpe["vocab"].items()},
        "merges": [[part.replace(SPACE, " ") for part in pair] for pair in merges],
    }
    backend = Backend.from_str(json.dumps(model | {"model": bpe | pieces, "normalizer": None}))
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return json.loads(backend.to_str())


def _sentencepiece(tokenizer: Tokenizer) -> Backend:
    model = proto.ModelProto.FromString(tokenizer.model)
    backend = Backend(_bpe(model))
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in _named(model, CONTROL)])
    backend.add_tokens([AddedToken(name, normalized=False) for name in _named(model, USER_DEFINED)])
    lines = pre_tokenizers.Split(Regex(rf"\n|[^\n]{{1,{MAX_LINE}}}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Split(SPACE, "isolated")])
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _named(model: proto.ModelProto, kind: int) -> list[str]:
    """Return the symbols of a kind that have several characters and no space.

    The others are not added to the tokenizer; they are matched within each line.
    """
    return [
        p.piece for p in model.pieces if p.type == kind and len(p.piece) > 1 and not re.search(r"\s|\u2581", p.piece)
    ]


def _bpe(model: proto.ModelProto) -> models.BPE:
    """Return the BPE model: the pieces with their ids, and the merges that make a piece from two others."""
    text = {id_ for id_, piece in enumerate(model.pieces) if piece.type == NORMAL}
    names = [p.piece.replace(SPACE, " ") if i in text else p.piece for i, p in enumerate(model.pieces)]
    parts = {names[id_] for id_ in text}
    merges = [
        (name[:cut], name[cut:])
        for name in (names[id_] for id_ in sorted(text, key=lambda id_: -model.pieces[id_].score))
        for cut in range(1, len(name))
        if name[:cut] in parts and name[cut:] in parts
    ]
    vocabulary = {name: id_ for id_, name in enumerate(names)}
    return models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token=names[model.trainer_spec.unk_id])
