"""The wheel, installed without a checkout: everything from text to an evaluated model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def run(*words: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of `bst`, installed from a wheel in a separate environment that uses this environment's dependencies."""
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


@pytest.fixture(scope="module")
def without_extras(
    program: Path, tmp_path_factory: pytest.TempPathFactory, link_packages: Callable[[Path, Sequence[str]], set[str]]
) -> Path:
    """The same without any extra: only packages that `pip install bst-dist` installs can be imported."""
    folder, packages = tmp_path_factory.mktemp("core"), tmp_path_factory.mktemp("packages")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    (site,) = (folder / "env/lib").glob("python*/site-packages")
    (own,) = (program.parents[1] / "lib").glob("python*/site-packages")
    for entry in own.iterdir():
        if entry.suffix != ".pth" and entry.name != "__pycache__":
            (site / entry.name).symlink_to(entry)
    lines = next(own.glob("bst_dist-*/METADATA")).read_text().splitlines()
    needed = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]
    done = link_packages(packages, needed)
    assert not done & {"deepspeed", "mpi4py", "tensorboard", "webdataset", "transformers"}
    (site / "dependencies.pth").write_text(f"{packages}\n")
    (folder / "env/bin/bst").write_text((program.read_text()).replace(str(program.parent), str(folder / "env/bin")))
    (folder / "env/bin/bst").chmod(0o755)
    return folder / "env/bin/bst"


@pytest.mark.ranks
def test_without_extras_evaluation_works_and_training_names_the_extra(without_extras, make_run, corpus, tmp_path):
    run_dir = make_run()
    run(without_extras.parent / "python", "-c", "import bst_dist; bst_dist.BlockStateTransformer", cwd=tmp_path)
    assert "bits" in run(without_extras, "eval", run_dir, cwd=tmp_path)
    run(without_extras, "generate", run_dir, "--tokens", 3, cwd=tmp_path)
    for command, extra in (("train", "train"), ("export", "hub")):
        words = [without_extras, command, run_dir / "recipe.yaml" if command == "train" else run_dir]
        words += [tmp_path / "out"] if command == "export" else []
        words += ["--run-dir", tmp_path / "new"] if command == "train" else []
        done = subprocess.run(list(map(str, words)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2, done.stderr
        assert f"is not installed: pip install 'bst-dist[{extra}]'" in done.stderr


@pytest.mark.ranks
def test_an_installed_wheel_prepares_trains_resumes_and_evaluates_in_any_directory(program, tmp_path, settings):
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    for folder in (place / "texts", place / "recipes", elsewhere):
        folder.mkdir(parents=True)
    for number in range(20):
        lines = [f"for x{i % 7} in range({number}): print({i * number})\n" for i in range(60)]
        (place / "texts" / f"{number}.txt").write_text("".join(lines))
    corpus = {
        "source": {"kind": "folder", "path": "texts", "pattern": "*.txt"},
        "output": "corpora/tiny",
        "tokenizer": {"vocab_size": 300},
        "validation_fraction": 0.3,
    }
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
