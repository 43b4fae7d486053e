"""The files that come with the program: DeepSpeed strategies, recipes, corpora, sweeps. Found by name or by path.

In a checkout they are in ds_configs/ and launch/ at its root, in an installed wheel in bst_base/shipped/.
"""

from __future__ import annotations

from pathlib import Path

from bst_base.errors import UserError, nearest

STRATEGIES, RECIPES, CORPORA, SWEEPS = "ds_configs", "launch/recipes", "launch/data", "launch/sweeps"
_KINDS = {
    STRATEGIES: ("DeepSpeed strategy", ".json"),
    RECIPES: ("recipe", ".yaml"),
    CORPORA: ("corpus recipe", ".yaml"),
    SWEEPS: ("sweep", ".yaml"),
}

_SHOWN = 8  # maximum names listed in an error message


class NoSuchFileError(UserError):
    """A file exists neither at the given path nor among the files that come with the program."""


def root() -> Path:
    """Return the folder that holds ds_configs/ and launch/."""
    here = Path(__file__).resolve().parent
    return here / "shipped" if (here / "shipped").is_dir() else here.parent


def find(given: str | Path, folder: str) -> Path:
    """Return the file for a path, or for the name of a shipped file in `folder`, with or without its suffix.

    If a file exists at the given path, it is that one. ``launch/recipes/demo.yaml`` finds the shipped file from any
    working directory. Raises NoSuchFileError, which lists the searched places and the nearest name.
    """
    what, suffix = _KINDS[folder]
    path = Path(given)
    shipped = root() / folder
    candidates = [path, shipped / path, shipped / f"{given}{suffix}", root() / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = names(folder)
    near = nearest(path.name.removesuffix(suffix), known)
    more = ", ..." if len(known) > _SHOWN else ""
    hint = f"did you mean {near!r}?" if near else f"there are {', '.join(known[:_SHOWN])}{more}"
    raise NoSuchFileError(
        f"{given}: no such file, and no {what} of that name comes with bst ({hint}); looked at {path.absolute()} and "
        f"in {shipped}"
    )


def names(folder: str) -> list[str]:
    """Return the names of a folder's shipped files, as `find` accepts them."""
    suffix = _KINDS[folder][1]
    files = (root() / folder).rglob(f"*{suffix}")
    return sorted(str(file.relative_to(root() / folder).with_suffix("")) for file in files)


def base_of(path: Path) -> Path:
    """Return the folder from which relative paths in a settings file count, whatever the working directory.

    It is the folder of the file. For a file in launch/recipes/, launch/data/ or launch/sweeps/, it is the folder that
    holds launch/. For a file of an installed program, which is only a template, it is the working directory.
    """
    path = path.absolute()
    if path.is_relative_to(Path(__file__).resolve().parent):
        return Path.cwd()
    for folder in path.parents:
        if folder.parent.name == "launch" and folder.name in ("recipes", "data", "sweeps"):
            return folder.parent.parent
    return path.parent
