"""A checkpoint that has only a manifest, for tests that do not read its files."""

from __future__ import annotations

from pathlib import Path

from bst_dist.checkpoint.directory import FORMAT, MANIFEST, directory, manifest_content


def write_checkpoint(run_dir: Path, step: int, sizes: dict[str, int]) -> None:
    """Write the manifest of a checkpoint with files of these sizes."""
    directory(run_dir, step).mkdir(parents=True)
    files = {name: {"bytes": size, "sha256": "", "rank": 0} for name, size in sizes.items()}
    content = manifest_content({"format": FORMAT, "step": step, "files": files})
    (directory(run_dir, step) / MANIFEST).write_bytes(content)
