"""One measurement of one reader, in its own process: prints one line of JSON.

  python -m data_pipeline.bench.readers READER JOB DIRECTORY --sequences N [--mean-document N] [--cold] [--state FILE]

Jobs: `make` writes the reader's own copy of the sequences. `speed` reads one pass. `resume` continues from the middle
of a pass. `half` reads half a pass and keeps the state. `rest` is one of several ranks that continue from it. The other
packages are imported only here, in the process that measures them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import time
import types
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 4096  # L; a sequence has one more token, the last label
ROWS = 8  # sequences in a batch over all ranks
SEED = 0

Rows = Any  # (b, L + 1) tokens: an array or a tensor


class Ours:
    """This project's loader: ids, labels, masks and document boundaries, as a trainer gets them."""

    def __init__(self, directory: Path, sequences: int, rank: int, world: int, state: dict[str, Any] | None) -> None:
        from data_pipeline.serve.config import DataConfig
        from data_pipeline.serve.loader import Loader, open_corpora
        from data_pipeline.serve.share import Share

        config = DataConfig(corpus=str(directory / "ours"), prefetch=0)
        share = Share(length=LENGTH, rows=ROWS, micro_rows=ROWS // world, dp_rank=rank, dp=world)
        self._loader = Loader(
            config, open_corpora(config), share, block=512, seed=SEED, start_step=state["step"] if state else 0
        )
        if state:
            self._loader.load_state_dict(state)
        self._step = state["step"] if state else 0
        self._sequences = sequences

    def __iter__(self) -> Iterator[Rows]:
        for step, batches in islice(self._loader, self._sequences // ROWS - self._step):
            self._step = step + 1
            yield batches[0].input_ids

    def state(self) -> dict[str, Any]:
        return self._loader.state_dict(self._step)


class OursAsStored(Ours):
    """The same loader without the trainer's layout: rows of stored tokens, like those of the other packages."""

    def __iter__(self) -> Iterator[Rows]:
        for step in range(self._step, self._sequences // ROWS):
            self._step = step + 1
            yield self._loader.tokens(step)[0]


class WebDataset:
    """Stock webdataset with shuffled shards and samples.

    To resume, it reads all earlier samples again and drops them.
    """

    def __init__(self, directory: Path, sequences: int, rank: int, world: int, state: dict[str, Any] | None) -> None:
        import webdataset as wds

        tars = sorted(str(path) for path in (directory / "webdataset").glob("*.tar"))
        dataset = wds.WebDataset(
            tars, shardshuffle=100, detshuffle=True, seed=SEED, nodesplitter=wds.split_by_node, empty_check=False
        )
        samples = dataset.shuffle(100, rng=random.Random(SEED)).decode().to_tuple("tok.npy")
        self._batches = samples.batched(ROWS // world)
        self._done = state["batches"] if state else 0

    def __iter__(self) -> Iterator[Rows]:
        for (rows,) in islice(self._batches, self._done, None):
            self._done += 1
            yield rows

    def state(self) -> dict[str, Any]:
        return {"batches": self._done}


class LitData:
    """litdata's streaming data set of fixed blocks of tokens, with its own loader."""

    def __init__(self, directory: Path, sequences: int, rank: int, world: int, state: dict[str, Any] | None) -> None:
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming import TokensLoader

        loader = TokensLoader(block_size=LENGTH + 1)
        dataset = StreamingDataset(
            str(directory / "litdata"), item_loader=loader, shuffle=True, seed=SEED, drop_last=False
        )
        self._loader = StreamingDataLoader(dataset, batch_size=ROWS // world, num_workers=0)
        if state:
            self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Rows]:
        yield from self._loader

    def state(self) -> dict[str, Any]:
        return self._loader.state_dict()


class MosaicML:
    """mosaicml-streaming, with its own loader."""

    def __init__(self, directory: Path, sequences: int, rank: int, world: int, state: dict[str, Any] | None) -> None:
        without_vision()
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()  # left by processes that were killed; every rank must call it
        dataset = StreamingDataset(
            local=str(directory / "mosaicml"),
            shuffle=True,
            shuffle_seed=SEED,
            batch_size=ROWS // world,
            num_canonical_nodes=2,
        )
        self._loader = StreamingDataLoader(dataset, batch_size=ROWS // world, num_workers=0)
        if state:
            self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Rows]:
        for batch in self._loader:
            yield batch["tokens"]

    def state(self) -> dict[str, Any]:
        return self._loader.state_dict()


READERS = {
    "ours": Ours,
    "ours-as-stored": OursAsStored,
    "webdataset": WebDataset,
    "litdata": LitData,
    "mosaicml": MosaicML,
}


def without_vision() -> None:
    """Skip mosaicml's image data sets: they need torchvision, which does not load with a CPU build of torch."""
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))


def names(rows: Rows) -> list[int]:
    """Return a number that identifies each sequence: the CRC-32 of its first 64 tokens."""
    first = np.ascontiguousarray(np.asarray(rows)[:, :64].astype("<u2"))
    return [zlib.crc32(row.tobytes()) for row in first]


def speed(reader: type, directory: Path, sequences: int) -> dict[str, Any]:
    """Return tokens, seconds and CPU seconds of one pass from the second batch on, and all bytes read from the disk.

    The first batch is left out, since `resume` measures a reader's start.
    """
    before = disk_bytes()
    batches = iter(reader(directory, sequences, 0, 1, None))
    next(batches)
    start, cpu, sequences = time.perf_counter(), time.process_time(), 0
    for rows in batches:
        sequences += len(rows)
    return {
        "tokens": sequences * LENGTH,
        "time_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
        "disk_bytes": disk_bytes() - before,
    }


def disk_bytes() -> int:
    """Return the bytes that this process has read from a disk. Bytes from the page cache do not count."""
    return int(re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)[1])


def leave_page_cache(directory: Path) -> None:
    """Drop the pages of all files below a directory from the page cache, so that the next pass reads from the disk."""
    for path in (each for each in directory.rglob("*") if each.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the kernel keeps pages that are not on the disk yet
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def enter_page_cache(directory: Path) -> None:
    """Read the files below a directory once, so that a pass finds all of them in memory."""
    for path in (each for each in directory.rglob("*") if each.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


def resume(reader: type, directory: Path, sequences: int) -> dict[str, Any]:
    """Return the seconds from a state in the middle of a pass to the first batch, and whether that batch is right."""
    whole = reader(directory, sequences, 0, 1, None)
    iterator = iter(whole)
    for _ in islice(iterator, sequences // ROWS // 2):
        pass
    state = json.loads(json.dumps(whole.state()))
    expected = names(next(iterator))
    del iterator, whole
    start = time.perf_counter()
    first = next(iter(reader(directory, sequences, 0, 1, state)))
    return {"time_s": time.perf_counter() - start, "exact": names(first) == expected}


def half(reader: type, directory: Path, sequences: int, state_file: Path) -> dict[str, Any]:
    """Read half a pass on one rank and save the state."""
    one = reader(directory, sequences, 0, 1, None)
    read = [name for rows in islice(iter(one), sequences // ROWS // 2) for name in names(rows)]
    state_file.write_text(json.dumps(one.state()))
    return {"names": read}


def rest(reader: type, directory: Path, sequences: int, state_file: Path) -> dict[str, Any]:
    """Continue from the state to the end of the pass, as one of WORLD_SIZE ranks."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    one = reader(directory, sequences, rank, world, json.loads(state_file.read_text()))
    read = [name for rows in islice(iter(one), sequences) for name in names(rows)]
    dist.barrier()
    dist.destroy_process_group()
    return {"names": read}


def main() -> None:
    """Run one job and print its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("job", choices=["make", "speed", "resume", "half", "rest"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--mean-document", type=int, default=None)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--state", type=Path)
    args = parser.parse_args()
    reader = READERS[args.reader]
    try:
        if args.job == "make":
            found: dict[str, Any] = make(args.reader, args.directory, args.sequences, args.mean_document)
        elif args.job == "speed":
            prepare = leave_page_cache if args.cold else enter_page_cache
            prepare(_copy_of(args.reader, args.directory))
            found = speed(reader, args.directory, args.sequences)
        elif args.job == "resume":
            found = resume(reader, args.directory, args.sequences)
        else:
            found = (half if args.job == "half" else rest)(reader, args.directory, args.sequences, args.state)
    except Exception as error:
        if args.job in ("make", "speed"):
            raise
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), flush=True)
    os._exit(0)  # some packages leave threads or shared memory that would keep the process alive


def _copy_of(reader: str, directory: Path) -> Path:
    return directory / ("ours" if reader.startswith("ours") else reader)


def make(reader: str, directory: Path, sequences: int, mean_document: int | None = None) -> dict[str, Any]:
    """Write one reader's copy of the sequences, unless it exists."""
    from data_pipeline.bench import material

    target = _copy_of(reader, directory)
    if not (target / "made").exists():
        if reader == "mosaicml":
            without_vision()
        if reader.startswith("ours"):
            material.make_ours(target, sequences, LENGTH, mean_document or material.MEAN_DOCUMENT)
        else:
            getattr(material, f"make_{reader}")(directory / "ours", target, LENGTH)
        (target / "made").touch()
    return {"bytes": sum(path.stat().st_size for path in target.iterdir())}


if __name__ == "__main__":
    main()
