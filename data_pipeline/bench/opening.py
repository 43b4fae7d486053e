"""One rank that opens a corpus and reads batches from it, in its own process: prints one line of JSON.

python -m data_pipeline.bench.opening ADDRESS --documents joined --tokens-per-s 500000 --seconds 30

The ranks of a machine wait for each other before the corpus is opened, and before memory is measured at the end: each
prints `here` and waits for a line of input. So all of them read at the same time.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import Loader, open_corpora
from data_pipeline.serve.share import Share
from data_pipeline.store.base import StorageConfig

LENGTH, ROWS, BLOCK = 4096, 8, 512
MEETINGS = 2
"""How often the ranks wait for each other."""


def private_mb() -> float:
    """Return the megabytes that only this process has written.

    Pages of mapped files do not count: the kernel can drop them.
    """
    gc.collect()
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Private_Dirty: +(\d+) kB", text)[1]) / 1e3


def meet() -> None:
    """Wait until all ranks are here."""
    print("here", flush=True)
    sys.stdin.readline()


def measure(config: DataConfig, tokens_per_s: float, seconds: float, rank: int, ranks: int) -> dict[str, Any]:
    """Measure the time to the first batch, memory and open shards, then how much a trainer waits for data.

    `waited` is the fraction of the time that a trainer of this speed waits.
    """
    meet()
    before = private_mb()
    begin = time.perf_counter()
    (corpus,) = open_corpora(config)
    opened_s = time.perf_counter() - begin
    share = Share(length=LENGTH, rows=ROWS * ranks, micro_rows=ROWS, dp_rank=rank, dp=ranks)
    loader = Loader(config, [corpus], share, block=BLOCK, seed=0)
    steps = iter(loader)
    next(steps)
    found: dict[str, Any] = {
        "open_s": opened_s,
        "first_batch_s": time.perf_counter() - begin,
        "private_mb": private_mb() - before,
        "open_shards": corpus.open_shards,
        "shards": len(corpus.manifest.shards("train")),
        "documents": len(corpus),
        "tokens": corpus.tokens_total,
    }
    step_s, waited_s, served, begin = LENGTH * ROWS / tokens_per_s, 0.0, 0, time.perf_counter()
    while (now := time.perf_counter()) - begin < seconds:
        next(steps)
        waited_s += time.perf_counter() - now
        served += 1
        time.sleep(step_s)
    if served:
        elapsed = time.perf_counter() - begin
        found |= {"steps": served, "tokens_per_s": served * LENGTH * ROWS / elapsed}
        found |= {"waited": waited_s / elapsed}
    meet()
    found |= {"private_mb_at_end": private_mb() - before}
    loader.close()
    return found


def main() -> None:
    """Run one rank; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--documents", choices=["joined", "isolated"], required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--tokens-per-s", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    storage = StorageConfig(cache_dir=args.cache)
    config = DataConfig(corpus=args.address, documents=args.documents, storage=storage)
    print(json.dumps(measure(config, args.tokens_per_s, args.seconds, args.rank, args.ranks)), flush=True)


if __name__ == "__main__":
    main()
