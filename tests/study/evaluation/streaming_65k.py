"""Check that 65,536 tokens of a corpus give the same losses when streamed in slices and when read at once.

    python tests/study/evaluation/streaming_65k.py corpora/stdlib

The unit tests check this with some thousand tokens; this script uses the real length, for every model that can stream
(docs/evaluation.md has the figures). The models are that of launch/recipes/demo.yaml with other mixers, with random
weights, in fp32.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from bst_dist.config import load_recipe
from bst_dist.model.lm import LanguageModel
from bst_dist.study.evaluation.memory import PeakMemory
from bst_dist.study.evaluation.scoring import score_slices, streams
from bst_dist.study.lengths.text import open_stretches
from data_pipeline.serve.reader import Corpus

LENGTH, SLICE = 65_536, 1024
MODELS = {
    "BST SH": [],
    "BST MH": ["model.context.variant=MH"],
    "BST MF": ["model.context.variant=MF"],
    "BST SH s4-dplr": ["model.ssm.kernel=s4-dplr"],
    "BST SH hyena": ["model.ssm.kernel=hyena", "model.ssm.length=1024"],
    "sliding": ["model.mixer=sliding"],
    "transformer-xl": ["model.mixer=transformer-xl"],
    "block-recurrent": ["model.mixer=block-recurrent", "model.block_recurrent.states=128"],
    "gss": ["model.mixer=gss"],
    "ssm": ["model.mixer=ssm"],
}


def compare(model: LanguageModel, corpus: Corpus) -> tuple[float, ...]:
    """Return (loss streamed, loss at once, largest difference of a token, MiB streaming, MiB at once)."""
    text = open_stretches(corpus, LENGTH, isolated=False, tokens=LENGTH)
    memory = PeakMemory(torch.device("cpu"))
    pieces = streams(np.array([LENGTH + 1]), LENGTH, first=1)
    streamed = np.concatenate(
        [part.nats[0] for part in score_slices(model, text, pieces, begin=None, slice_length=SLICE)]
    )
    small = memory.bytes()
    ids = torch.from_numpy(text.tokens(0, 0, LENGTH + 1).astype(np.int64))[None]
    memory = PeakMemory(torch.device("cpu"))
    with torch.no_grad():
        at_once = model(ids[:, :-1], ids[:, 1:]).per_token[0].double().numpy()
    return streamed.mean(), at_once.mean(), abs(streamed - at_once).max(), small / 2**20, memory.bytes() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)} (default: all)")
    args = parser.parse_args()
    corpus = Corpus.open(args.corpus, "validation")
    vocabulary = f"model.vocab_size={corpus.manifest.tokenizer.vocab_size}"
    print(f"{'model':<16} {'streamed':>10} {'at once':>10} {'largest':>9} {'MiB streamed':>13} {'MiB at once':>12}")
    for name in args.models or MODELS:
        torch.manual_seed(0)
        model = LanguageModel(load_recipe("launch/recipes/demo.yaml", [vocabulary, *MODELS[name]]).model).eval()
        streamed, at_once, largest, small, large = compare(model, corpus)
        print(f"{name:<16} {streamed:10.6f} {at_once:10.6f} {largest:9.1e} {small:13,.0f} {large:12,.0f}", flush=True)
        assert abs(streamed - at_once) < 1e-5 * at_once and largest < 1e-2


if __name__ == "__main__":
    main()
