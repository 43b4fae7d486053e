"""One rank that opens a corpus and is served from it, in a process of its own: prints a JSON line.

python -m data_pipeline.bench.opening ADDRESS --documents joined --tokens-per-s 500000 --seconds 30

Ranks of one machine meet before the corpus is opened and before memory is measured at the end: each prints `here` and
waits for a line, so that all of them read at the same time.
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
"""How often the ranks meet."""


def private_mb() -> float:
    """Megabytes that this process alone has written; not the pages of mapped files, which the kernel drops at will."""
    gc.collect()
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Private_Dirty: +(\d+) kB", text)[1]) / 1e3


def meet() -> None:
    """Wait until all ranks are here."""
    print("here", flush=True)
    sys.stdin.readline()


def measure(config: DataConfig, tokens_per_s: float, seconds: float, rank: int, ranks: int) -> dict[str, Any]:
    """Seconds to the first batch, memory, open shards; then the share of time that a trainer of this speed waits."""
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
    """See the module."""
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
