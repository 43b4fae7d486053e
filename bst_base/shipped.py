"""The files that come with the program: DeepSpeed strategies, recipes, corpora, sweeps. Found by name or by path.

In a checkout they are ds_configs/ and launch/ at its root, in an installed wheel bst_base/shipped/.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from bst_base.errors import UserError

STRATEGIES, RECIPES, CORPORA, SWEEPS = "ds_configs", "launch/recipes", "launch/data", "launch/sweeps"
_KINDS = {
    STRATEGIES: ("DeepSpeed strategy", ".json"),
    RECIPES: ("recipe", ".yaml"),
    CORPORA: ("corpus recipe", ".yaml"),
    SWEEPS: ("sweep", ".yaml"),
}

_SHOWN = 8  # names in an error


class NoSuchFileError(UserError):
    """A file that is neither where the user said nor among those that come with the program."""


def root() -> Path:
    """The folder that holds ds_configs/ and launch/."""
    here = Path(__file__).resolve().parent
    return here / "shipped" if (here / "shipped").is_dir() else here.parent


def find(given: str | Path, folder: str) -> Path:
    """The file that is meant: a path, or the name of a shipped file of `folder` with or without its suffix.

    A file that exists under the given path is that file; ``launch/recipes/demo.yaml`` names the shipped one from
    anywhere. Raises NoSuchFileError, which says where it looked and names the nearest.
    """
    what, suffix = _KINDS[folder]
    path, shipped = Path(given), root() / folder
    candidates = [path, shipped / path, shipped / f"{given}{suffix}", root() / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = names(folder)
    near = difflib.get_close_matches(path.name.removesuffix(suffix), known, n=1)
    more = ", ..." if len(known) > _SHOWN else ""
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known[:_SHOWN])}{more}"
    raise NoSuchFileError(
        f"{given}: no such file, and no {what} of that name comes with bst ({hint}); looked at {path.absolute()} and "
        f"in {shipped}"
    )


def names(folder: str) -> list[str]:
    """The shipped files of a folder, by the names that `find` knows them under."""
    suffix = _KINDS[folder][1]
    files = (root() / folder).rglob(f"*{suffix}")
    return sorted(str(file.relative_to(root() / folder).with_suffix("")) for file in files)


def base_of(path: Path) -> Path:
    """The folder that relative paths in a settings file are meant from, wherever the program is started.

    That of the file itself; for one in launch/recipes/, launch/data/ or launch/sweeps/, the folder that holds launch/;
    for one that comes with an installed program, which is a template with no place of its own, the working directory.
    """
    path = path.absolute()
    if path.is_relative_to(Path(__file__).resolve().parent):
        return Path.cwd()
    for folder in path.parents:
        if folder.parent.name == "launch" and folder.name in ("recipes", "data", "sweeps"):
            return folder.parent.parent
    return path.parent
