"""The wheel, installed where there is no checkout: the whole way from text to an evaluated model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def run(*words: object, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bst` from a wheel, in an environment of its own; what it depends on is taken from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("bst_base", "bst_dist", "data_pipeline", "ds_configs", "launch"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source", cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", folder / "env/bin/python", "install", "--no-deps", wheel, cwd=folder)
    (packages,) = (folder / "env/lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env/bin/bst"


@pytest.mark.ranks
def test_an_installed_wheel_prepares_trains_resumes_and_evaluates_in_any_directory(program, tmp_path, settings):
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    for folder in (place / "texts", place / "recipes", elsewhere):
        folder.mkdir(parents=True)
    for number in range(20):
        lines = [f"for x{i % 7} in range({number}): print({i * number})\n" for i in range(60)]
        (place / "texts" / f"{number}.txt").write_text("".join(lines))
    corpus = {"source": {"kind": "folder", "path": "texts", "pattern": "*.txt"}, "output": "corpora/tiny",
              "tokenizer": {"vocab_size": 300}, "validation_fraction": 0.3}  # fmt: skip
    (place / "tiny.yaml").write_text(yaml.safe_dump(corpus))
    settings |= {"data": {"corpus": "../corpora/tiny", "prefetch": 0}, "deepspeed": "zero2", "ranks": 2}
    (place / "recipes" / "tiny.yaml").write_text(yaml.safe_dump(settings))

    run(program, "data", "prepare", "../place/tiny.yaml", "workers=1", cwd=elsewhere)
    assert (place / "corpora/tiny/manifest.json").is_file()
    run(program, "train", "../place/recipes/tiny.yaml", "--until", 2, cwd=elsewhere)
    resumed = run(program, "train", "recipes/tiny.yaml", "--resume", "--run-dir", elsewhere / "runs/small", cwd=place)
    assert "resumed from step 2" in resumed
    run(program, "eval", elsewhere / "runs/small", "--json", "eval.json", cwd=tmp_path)
    assert json.loads((tmp_path / "eval.json").read_text())["versions"]["bst_dist"]

    where = run(program.parent / "python", "-c", "import bst_base; print(bst_base.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(program.parents[1])
    assert "demo" in run(program, "plan", "demo", "model.vocab_size=4096", "--nodes", 1, cwd=elsewhere)
