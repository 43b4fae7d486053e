"""Write text with a run's model, from its carried state, one token at a time.

The prompt is read as the beginning of a document. Text appears as it is drawn, up to --tokens tokens or the end of
the document; control characters are shown as symbols. The same seed gives the same text.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bst_dist.evaluate.decoding import Decoder, SamplingConfig, TextStream, generate, printable
from bst_dist.evaluate.trained import Trained, open_run
from data_pipeline.config import parse
from data_pipeline.errors import UserError
from data_pipeline.reader import Corpus
from data_pipeline.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    fields = SamplingConfig.model_fields
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what the text begins with (default: nothing)")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="most tokens to draw (default: 200)")
    for name, symbol, kind in (("temperature", "T", float), ("top_p", "P", float), ("seed", "S", int)):
        text = fields[name].description
        described = f"{text[0].lower()}{text[1:].rstrip('.')} (default: {fields[name].default})"
        parser.add_argument("--" + name.replace("_", "-"), type=kind, metavar=symbol, help=described)
    parser.add_argument("--checkpoint", metavar="STEP", type=int, help="weights after this step (default: the newest)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: draw at least one")
    given = {name: value for name in SamplingConfig.model_fields if (value := getattr(args, name)) is not None}
    sampling = parse(SamplingConfig, given, where="options")
    trained = open_run(args.run, args.checkpoint)
    data = trained.recipe.data
    tokenizer = Corpus.open(data.urls()[0], storage=data.storage).tokenizer()
    prompt = _prompt(trained, tokenizer, args.prompt)
    written = [args.prompt]
    stream = TextStream(lambda text: (written.append(text), _show(text)))
    _show(args.prompt)
    started = time.perf_counter()
    drawn = ended = 0
    for token in islice(generate(Decoder(trained.model), prompt, sampling, _never(trained, tokenizer)), args.tokens):
        drawn += 1
        if ended := int(token == tokenizer.eos_id):
            break
        stream.add(tokenizer.bytes_of(token))
    stream.close()
    seconds = time.perf_counter() - started
    _show("\n")
    why = "the document ended" if ended else "as many as asked for"
    print(f"[{drawn} tokens, {why}; {drawn / seconds:,.0f} tokens/s]", file=sys.stderr)
    return {
        "run": str(args.run), "step": trained.step, "prompt": args.prompt, "sampling": sampling.model_dump(),
        "text": "".join(written), "tokens": drawn, "ended": bool(ended), "tokens_per_s": drawn / seconds,
    }  # fmt: skip


def _prompt(trained: Trained, tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens to begin with: a document follows the end of another one, or stands alone as it did in training."""
    isolated = trained.recipe.data.documents == "isolated"
    if isolated and not text:
        raise UserError("--prompt is empty: this model was trained on isolated documents and needs a beginning")
    return ([] if isolated else [tokenizer.eos_id]) + tokenizer.encode(text).tolist()


def _never(trained: Trained, tokenizer: Tokenizer) -> torch.Tensor:
    """Ids that stand for nothing in a document: all without text, but its end."""
    never = torch.ones(trained.model.config.vocab_size, dtype=torch.bool)
    never[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.token_bytes == 0)
    never[tokenizer.eos_id] = False
    return never


def _show(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()
