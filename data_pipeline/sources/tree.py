"""Walking directories: every file is either found or reported.

`Path.glob` and `os.walk` silently pass over directories that cannot be read. Opening a file follows links to any place.
Without this module, a corpus could silently be smaller or larger than expected.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from bst_base.addresses import CorpusAddress
from bst_base.errors import UserError
from data_pipeline.sources.base import Endings, Listing, Part, Skipped, Source
from data_pipeline.store.base import StoreOptions

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""The split names of published data sets -> the names used here."""

_WILD = r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])"
_WILD_MEANING = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def walk(root: Path, enter: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Path] | Skipped]:
    """Yield (path below `root`, file) for every regular file, sorted within each directory, and `Skipped` for all else.

    Links to files inside `root` count as files. If `enter` refuses a directory, by its path, it is reported as one
    entry.
    """
    real_root = root.resolve()
    pending = [root]
    while pending:
        directory = pending.pop()
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            yield Skipped(f"{_below(root, directory)}/", f"directory cannot be read: {error.strerror}", bad=True)
            continue
        inner = []
        for entry in entries:
            path = Path(entry.path)
            name = _below(root, path)
            try:
                if entry.is_dir(follow_symlinks=False):
                    if enter(name):
                        inner.append(path)
                    else:
                        yield Skipped(f"{name}/", "vendored")
                elif reason := _not_taken(entry, path, real_root):
                    yield Skipped(name, reason)
                else:
                    yield name, path
            except OSError as error:
                yield Skipped(name, f"cannot be read: {error.strerror}", bad=True)
        pending += reversed(inner)


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _not_taken(entry: os.DirEntry[str], path: Path, root: Path) -> str:
    """Return why an entry of a directory is not read as a file; empty when it is read."""
    if entry.is_symlink():
        if not path.exists():
            return "broken link"
        if not path.resolve().is_relative_to(root):
            return "link that leads out of the folder"
        if path.is_dir():
            return "link to a directory"
    return "" if entry.is_file() else "not a regular file"


def glob_pattern(pattern: str) -> re.Pattern[str]:
    """Return a regular expression for whole paths from a glob.

    ``**/`` matches any directories; ``*`` and ``?`` match no slash.
    """
    return re.compile("".join(map(_translated, re.split(_WILD, pattern))), re.DOTALL)


def _translated(piece: str) -> str:
    if piece in _WILD_MEANING:
        return _WILD_MEANING[piece]
    if re.fullmatch(_WILD, piece):  # [a-z], or [!a-z]
        return f"[^{piece[2:]}" if piece[1] == "!" else piece
    return re.escape(piece)


class FileSource(Source):
    """Base of sources that consist of one file or a directory of files, each read on its own."""

    path: Annotated[CorpusAddress, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
    """A directory of files, or one file; or an address (s3://, gs://, https://), whose files are copied first."""
    storage_options: StoreOptions = Field(default_factory=dict)
    """For an address: passed to the fsspec file system (an endpoint, a profile). `$NAME` is read from the environment;
    keys and passwords must be given this way."""
    own_splits: bool = False
    """Keep the data's own splits: the name of a directory (the outermost such) is, or the file's name begins with or
    contains, train, validation (valid, val, dev) or test."""

    def wanted(self, name: str) -> bool:
        """Whether a file, given by its path below the root, is read."""
        raise NotImplementedError

    def is_companion(self, name: str) -> bool:
        """Whether a file that is not `wanted` is read together with one that is."""
        return False

    def expected(self) -> str:
        """Return a description of the expected files, for the error message when there are none."""
        raise NotImplementedError

    def fetch(self) -> None:
        """See `Source`."""
        if self._is_far:
            from data_pipeline.sources import copies  # late: fsspec is slow to import, most sources are local

            copies.copy(self.path, self._copies, self.storage_options, self.copied)

    def in_use(self) -> AbstractContextManager[None]:
        """See `Source`."""
        if not self._is_far:
            return nullcontext()
        from data_pipeline.sources import copies

        return copies.locked(self._copies, self.path)

    def directory(self) -> Path | None:
        """See `Source`."""
        return None if self._is_far or not self.place.is_dir() else self.place

    def copied(self, name: str) -> bool:
        """Whether a file at an address, given by its path below it, is copied to this machine."""
        return self.wanted(name)

    @property
    def place(self) -> Path:
        """The directory or the file on this machine."""
        if not self._is_far:
            return Path(self.path.removeprefix("file://")).expanduser()
        from data_pipeline.sources import copies

        return copies.copied(self._copies)

    @property
    def _copies(self) -> Path:
        """The folder of the copies of an address."""
        from data_pipeline.sources import copies

        return copies.folder_of(self.path, self.selection)

    @property
    def selection(self) -> str:
        """What decides which files are copied: others with the same name share the copies of an address."""
        return self.kind

    @property
    def _is_far(self) -> bool:
        return "://" in self.path and not self.path.startswith("file://")

    @property
    def root(self) -> Path:
        """The directory that parts are named from."""
        path = self.place
        return path if path.is_dir() else path.parent

    def listing(self) -> Listing:
        """See `Source`; files that are not wanted are counted by their ending."""
        path = self.place
        if not path.exists():
            raise UserError(f"{path}: no such file or directory; source.path must be {self.expected()}")
        if not path.is_dir():
            return Listing(self.parts_of(path.name, path), [])
        parts, skipped, endings = [], [], self._left_out()
        for found in walk(path):
            if isinstance(found, Skipped):
                skipped.append(found)
            elif self.wanted(found[0]):
                parts += self.parts_of(*found)
            elif not self.is_companion(found[0]):
                endings.leave_out(found[0])
        if not parts:
            seen = ", ".join(f"{s.count} {s.reason}" for s in [*skipped, *endings.skipped("")])
            why = f"left out: {seen}" if seen else "it is empty"
            raise UserError(f"{self.path}: no usable file there ({why}); source.path must be {self.expected()}")
        return Listing(sorted(parts, key=lambda part: (part.name, part.start)), skipped + endings.skipped(""))

    def _left_out(self) -> Endings:
        """Return the counts of the files that were not copied from an address."""
        if not self._is_far:
            return Endings()
        from data_pipeline.sources import copies

        return copies.left_out(self._copies)

    def parts_of(self, name: str, path: Path) -> list[Part]:
        """Return the parts of a file: one, unless the source can begin to read at several places."""
        return [Part(name, path.stat().st_size)]

    def files(self, part: Part) -> list[Path]:
        """See `Source`."""
        return [self.root / part.name]

    def split_of(self, part: Part) -> str:
        """Return the split that a part's path names; empty unless `own_splits`.

        Raises UserError when the path names no split, or several.
        """
        if not self.own_splits:
            return ""
        *directories, file = part.name.lower().split("/")
        for directory in directories:
            if directory in SPLIT_NAMES:
                return SPLIT_NAMES[directory]
        words = re.findall("[a-z]+", file)
        named = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
        if words[:1] and words[0] in SPLIT_NAMES:
            named = {SPLIT_NAMES[words[0]]}
        if len(named) != 1:
            raise UserError(
                f"{part.name}: own_splits is set, but neither a directory nor its name says train, validation or test"
            )
        return named.pop()
