"""Prepare a task: generate its examples or read the published files, and write them for training.

Generated examples are a pure function of (settings, split, index, attempt), so workers generate them in any order. No
sequence occurs twice: an example that occurred before, in any split, is generated again with another attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from bst_base.errors import UserError
from bst_dist.study.lra import files, listops, pathfinder, released
from bst_dist.study.lra.examples import write
from bst_dist.study.lra.files import Example, ImageConfig, RetrievalConfig, TextConfig
from bst_dist.study.lra.listops import ListOpsConfig
from bst_dist.study.lra.pathfinder import PathfinderConfig
from bst_dist.study.lra.released import ReleasedListOpsConfig, ReleasedPathfinderConfig
from bst_dist.study.lra.tasks import SPLITS, TASKS
from data_pipeline.prepare.parallel import Workers

Drawn: TypeAlias = ListOpsConfig | PathfinderConfig
TaskConfig: TypeAlias = (
    Drawn | TextConfig | RetrievalConfig | ImageConfig | ReleasedListOpsConfig | ReleasedPathfinderConfig
)

SETTINGS: dict[str, tuple[type[TaskConfig], ...]] = {
    "listops": (ListOpsConfig, ReleasedListOpsConfig),
    "text": (TextConfig,),
    "retrieval": (RetrievalConfig,),
    "image": (ImageConfig,),
    "pathfinder": (PathfinderConfig, ReleasedPathfinderConfig),
}
"""Task -> its settings classes. The last one applies if the setting `source` is given."""

GENERATORS: dict[str, Callable[..., Example]] = {"listops": listops.example, "pathfinder": pathfinder.example}
READERS: dict[type[TaskConfig], Callable[[Any, str], Iterable[Example]]] = {
    TextConfig: files.text,
    RetrievalConfig: files.retrieval,
    ImageConfig: files.image,
    ReleasedListOpsConfig: released.listops,
    ReleasedPathfinderConfig: released.pathfinder,
}
RUN = 64
"""Number of examples that a worker generates at a time."""
ATTEMPTS = 200
"""Maximum number of new attempts for an example that is a duplicate each time."""


class Run(NamedTuple):
    """Consecutive examples for a worker to generate."""

    config: Drawn
    split: str
    first: int
    stop: int


def prepare(
    config: TaskConfig, directory: Path, workers: Workers, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Write all splits of a task into `directory`; return the manifest.

    `progress` gets the split, the examples done and the total (0 if not known in advance). Raises UserError if files
    are missing or damaged, if the settings allow too few different examples, or if the directory exists.
    """
    if isinstance(config, Drawn):
        seen: set[bytes] = set()
        splits = {split: _unique(config, split, workers, seen) for split in SPLITS}
        totals = {split: getattr(config, split) for split in SPLITS}
    else:
        splits = {split: iter(READERS[type(config)](config, split)) for split in SPLITS}
        totals = dict.fromkeys(SPLITS, 0)
    told = {split: _telling(splits[split], partial(progress, split), totals[split]) for split in SPLITS}
    return write(directory, TASKS[config.task], config.model_dump(mode="json"), told)


def _unique(config: Drawn, split: str, workers: Workers, seen: set[bytes]) -> Iterator[Example]:
    """Yield the split's examples by index, without duplicates of those in `seen`, and add them to `seen`."""
    for index, (sequences, label) in enumerate(_in_order(config, split, workers)):
        attempt = 0
        while (digest := blake2b(sequences[0].tobytes(), digest_size=16).digest()) in seen:
            attempt += 1
            if attempt > ATTEMPTS:
                raise UserError(
                    f"{config.task}: after {len(seen):,} examples, {ATTEMPTS} in a row were duplicates: ask for "
                    "fewer, or for longer ones"
                )
            sequences, label = GENERATORS[config.task](config, split, index, attempt)
        seen.add(digest)
        yield sequences, label


def _in_order(config: Drawn, split: str, workers: Workers) -> Iterator[Example]:
    """Yield the split's examples by index, in whatever order the workers finish."""
    total = getattr(config, split)
    runs = (Run(config, split, first, min(first + RUN, total)) for first in range(0, total, RUN))
    waiting: dict[int, list[Example]] = {}
    following = 0
    for first, examples in workers.run(_draw, runs):
        waiting[first] = examples
        while following in waiting:
            examples = waiting.pop(following)
            following += len(examples)
            yield from examples


def _draw(run: Run) -> tuple[int, list[Example]]:
    generate = GENERATORS[run.config.task]
    return run.first, [generate(run.config, run.split, index) for index in range(run.first, run.stop)]


def _telling(examples: Iterator[Example], told: Callable[[int, int], None], total: int) -> Iterator[Example]:
    for done, example in enumerate(examples, 1):
        yield example
        if done % 1000 == 0 or done == total:
            told(done, total)
