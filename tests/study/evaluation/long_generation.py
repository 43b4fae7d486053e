"""Measure memory and time per token while a run's model generates a very long text; not collected by pytest.

    python tests/study/evaluation/long_generation.py runs/demo --tokens 100000

Prints one JSON line every `--every` tokens: the process's resident memory, the bytes of the carried state, and the time
per token since the previous line, as wall-clock and CPU time. Generation does not stop at the end of a document.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import psutil

from bst_dist.generation.decoding import Generation
from bst_dist.generation.sampling import SamplingConfig, without_text
from bst_dist.study.evaluation.prompts import Prompt, encode
from bst_dist.study.evaluation.trained import open_run, tokenizer_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=5_000)
    args = parser.parse_args()
    trained = open_run(args.run)
    tokenizer = tokenizer_of(args.run, trained.recipe)
    prompt = encode(trained.recipe, tokenizer, Prompt("class Cache:", "the prompt"))
    never = without_text(trained.model.config.vocab_size, tokenizer)
    generation = Generation(trained.model, {0: prompt}, [(0, 0)], SamplingConfig(), never)
    process, drawn = psutil.Process(), 0
    while drawn < args.tokens:
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(args.every):
            generation.step()
        drawn += args.every
        line = {
            "tokens": drawn,
            "rss_bytes": process.memory_info().rss,
            "state_bytes": generation.state_bytes,
            "ms_per_token": 1e3 * (time.perf_counter() - clock) / args.every,
            "processor_ms_per_token": 1e3 * (time.process_time() - processor) / args.every,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
