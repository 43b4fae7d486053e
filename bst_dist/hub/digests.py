"""The digests of an export's files, in the format of `sha256sum --check`."""

from __future__ import annotations

import hashlib
from pathlib import Path

DIGESTS = "SHA256SUMS"


def write_digests(folder: Path) -> None:
    """Write the digests of all files in a folder."""
    lines = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    (folder / DIGESTS).write_text("".join(lines))


def read_digests(path: Path) -> dict[str, str]:
    """Return the digests in a file that `write_digests` wrote, by file name."""
    lines = (line.partition("  ") for line in path.read_text().splitlines())
    return {name: digest for digest, _, name in lines}
