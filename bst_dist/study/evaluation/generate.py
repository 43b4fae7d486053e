"""Generate text with a run's model, one token at a time, with carried state.

    bst generate runs/demo --prompt "class Cache:"
    bst generate runs/demo --prompts prompts.jsonl --samples 4 > written.jsonl
    echo "import os" | bst generate runs/demo --prompts -
    bst generate runs/demo --interactive

A prompt is read as the beginning of a document. A single sample is printed while it is generated, with control
characters as symbols. Several are generated in batches and printed as JSON lines, in order. A text ends after --tokens
tokens, at the end of the document, or before a --stop. The same seed gives the same text. --interactive loads the model
once and continues every line that you type; an empty line or Ctrl-D ends it. If the run's corpus is token ids without a
tokenizer, prompts and texts are ids, separated by spaces.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bst_base.documented import documentation
from bst_base.errors import UserError
from bst_base.settings import parse
from bst_dist.faults.output import exit_unless_written
from bst_dist.generation.decoding import Generation
from bst_dist.generation.sampling import SamplingConfig, without_text
from bst_dist.generation.text_stream import TextStream, printable
from bst_dist.study.evaluation.prompts import Prompt, encode, read_prompts
from bst_dist.study.evaluation.trained import Trained, open_run, tokenizer_of
from data_pipeline.format.tokenizer import Tokenizer

_OPTIONS = {
    "temperature": ("T", float),
    "top_k": ("K", int),
    "top_p": ("P", float),
    "min_p": ("P", float),
    "repetition_penalty": ("R", float),
    "seed": ("S", int),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", default="", metavar="TEXT", help="what the text begins with (default: nothing)")
    given.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="many prompts, one per line (-: from standard input); in .jsonl a JSON string or an object "
        'with a "prompt" per line',
    )
    given.add_argument("--interactive", action="store_true", help="load the model once, and continue each line typed")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="continuations of each prompt (default: 1)")
    parser.add_argument(
        "--batch", type=int, default=32, metavar="ROWS", help="generate at most ROWS samples at a time (default: 32)"
    )
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="generate at most N tokens (default: 200)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument(
        "--stop-token",
        action="append",
        default=[],
        type=int,
        metavar="ID",
        help="end at this token, as at the end of the document",
    )
    texts = documentation(SamplingConfig)
    for name, (symbol, kind) in _OPTIONS.items():
        text, default = texts[name].rstrip("."), SamplingConfig.model_fields[name].default
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            metavar=symbol,
            help=f"{text[0].lower()}{text[1:]} (default: {default})",
        )
    parser.add_argument(
        "--checkpoint",
        metavar="STEP",
        type=int,
        help="weights after this step (default: those of the newest valid checkpoint)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    sampling = _sampling(args)
    prompts = read_prompts(args.prompts) if args.prompts else [Prompt(args.prompt, "--prompt")]
    trained = open_run(args.run, args.checkpoint)
    tokenizer = tokenizer_of(args.run, trained.recipe)
    batches = ([prompt] for prompt in _typed()) if args.interactive else [prompts]
    texts, seconds = [], 0.0
    for batch in batches:
        ids = [encode(trained.recipe, tokenizer, prompt) for prompt in batch]
        writer = _Writer(trained, tokenizer, sampling, batch, ids, args)
        started = time.perf_counter()
        written = _stream(writer) if args.prompts is None and args.samples == 1 else _lines(writer)
        took = time.perf_counter() - started
        _say_how(written, took)
        texts, seconds = texts + written, seconds + took
    drawn = sum(text.tokens for text in texts)
    return {
        "run": str(args.run),
        "step": trained.step,
        "sampling": sampling.model_dump(),
        "tokens": drawn,
        "tokens_per_s": drawn / seconds if seconds else None,
        "texts": [text.report() for text in texts],
    }


def _typed() -> Iterator[Prompt]:
    """Yield the lines typed, until an empty line or the end of the input."""
    while True:
        try:
            line = input("prompt> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line:
            return
        yield Prompt(line, "the line typed")


def _say_how(texts: Sequence[_Text], seconds: float) -> None:
    """Print the number of tokens, what ended the text, and the speed, on stderr so that stdout has only the texts."""
    drawn = sum(text.tokens for text in texts)
    how = f"ended by: {texts[0].ended_by}" if len(texts) == 1 else f"{len(texts)} texts"
    print(f"[{drawn} tokens; {how}; {drawn / seconds:,.0f} tokens/s]", file=sys.stderr)


@dataclass
class _Text:
    """One continuation of a prompt."""

    prompt: str
    sample: int
    stream: TextStream
    pieces: list[str]
    tokens: int = 0
    ended_by: str | None = None

    def report(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "sample": self.sample,
            "continuation": "".join(self.pieces),
            "tokens": self.tokens,
            "ended_by": self.ended_by,
        }


@dataclass(frozen=True)
class _Writer:
    """Continues prompts until each text ends."""

    trained: Trained
    tokenizer: Tokenizer
    sampling: SamplingConfig
    prompts: Sequence[Prompt]
    ids: Sequence[list[int]]
    args: argparse.Namespace

    def write(self, samples: Sequence[tuple[int, int]], show: Callable[[str], object] | None = None) -> list[_Text]:
        """Generate the `samples` (prompt index, sample index) in one batch; `show` gets each piece of text at once."""
        texts = {(prompt, sample): self._begun(prompt, sample, show) for prompt, sample in samples}
        prompts = {prompt: self.ids[prompt] for prompt, _ in samples}
        never = without_text(self.trained.model.config.vocab_size, self.tokenizer)
        generation = Generation(self.trained.model, prompts, samples, self.sampling, never)
        while generation.running:
            for prompt, sample, token in generation.step():
                self._take(texts[prompt, sample], token)
                if texts[prompt, sample].ended_by:
                    generation.end(prompt, sample)
        return list(texts.values())

    def _begun(self, prompt: int, sample: int, show: Callable[[str], object] | None) -> _Text:
        pieces: list[str] = []

        def write(text: str) -> None:
            pieces.append(text)
            if show:
                show(text)

        return _Text(self.prompts[prompt].text, sample, TextStream(write, self.args.stop), pieces)

    def _take(self, text: _Text, token: int) -> None:
        """Add a token to a text, and set `ended_by` if it ends the text."""
        text.tokens += 1
        if token == self.tokenizer.eos_id:
            text.ended_by = "end of the document"
        elif token in self.args.stop_token:
            text.ended_by = f"stop token {token}"
        else:
            text.stream.add(self._bytes(token))
            if text.tokens == self.args.tokens:
                text.ended_by = "number of tokens"
        if text.ended_by:
            text.stream.close()
        if text.stream.stopped:
            text.ended_by = "stop text"

    def _bytes(self, token: int) -> bytes:
        """Return the bytes to write for a token: of its text, or of the id itself if ids stand for no text."""
        return self.tokenizer.bytes_of(token) if self.tokenizer.has_text else f" {token}".encode()


def _stream(writer: _Writer) -> list[_Text]:
    """Generate one continuation and print it while it is generated."""
    _show(writer.prompts[0].text)
    texts = writer.write([(0, 0)], _show)
    _show("\n")
    return texts


def _lines(writer: _Writer) -> list[_Text]:
    """Generate all continuations of all prompts and print them as JSON lines, in the order of the prompts."""
    args, texts = writer.args, []
    samples = [(prompt, sample) for prompt in range(len(writer.prompts)) for sample in range(args.samples)]
    for first in range(0, len(samples), args.batch):
        for text in writer.write(samples[first : first + args.batch]):
            print(json.dumps(text.report()), flush=True)
            exit_unless_written(sys.stdout)
            texts.append(text)
    return texts


def _sampling(args: argparse.Namespace) -> SamplingConfig:
    for name in ("tokens", "samples", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least one")
    if "" in args.stop:
        raise UserError("--stop is empty: every text would end at once")
    given = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
    return parse(SamplingConfig, given, where="options")


def _show(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()
    exit_unless_written(sys.stdout)
