"""One rank that opens a corpus and is served from it, in a process of its own: prints a JSON line.

python -m data_pipeline.bench.opening ADDRESS --documents joined --tokens-per-s 500000 --seconds 30
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from pathlib import Path
from typing import Any

from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import Loader, open_corpora
from data_pipeline.serve.share import Share
from data_pipeline.store.base import StorageConfig

LENGTH, ROWS, BLOCK = 4096, 8, 512


def private_mb() -> float:
    """Megabytes that this process alone has written; not the pages of mapped files, which the kernel drops at will."""
    gc.collect()
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Private_Dirty: +(\d+) kB", text)[1]) / 1e3


def measure(config: DataConfig, tokens_per_s: float, seconds: float) -> dict[str, Any]:
    """Seconds to the first batch, memory, open shards; then the share of time that a trainer of this speed waits."""
    before, begin = private_mb(), time.perf_counter()
    (corpus,) = open_corpora(config)
    opened_s = time.perf_counter() - begin
    loader = Loader(config, [corpus], Share(length=LENGTH, rows=ROWS, micro_rows=ROWS), block=BLOCK, seed=0)
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
        found |= {"waited": waited_s / elapsed, "private_mb_at_end": private_mb() - before}
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
    args = parser.parse_args()
    storage = StorageConfig(cache_dir=args.cache)
    config = DataConfig(corpus=args.address, documents=args.documents, storage=storage)
    print(json.dumps(measure(config, args.tokens_per_s, args.seconds)), flush=True)


if __name__ == "__main__":
    main()
