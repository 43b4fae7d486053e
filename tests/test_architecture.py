"""Layers of the code: imports go downwards, without cycles, and heavy packages are imported only where needed."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("bst_base", "bst_dist", "data_pipeline")

# From the top down: a module may import from its own line and from lines below. A line names modules or packages. A
# module belongs to the line with the longest name that is a prefix of its own.
LAYERS = (
    "bst_dist.__main__ bst_dist.cli bst_dist.usage",
    "bst_dist.tools",
    "bst_dist.verify bst_dist.hub",
    "bst_dist.study",
    "bst_dist.study.evaluation bst_dist.study.lengths bst_dist.study.ablation bst_dist.study.comparison "
    "bst_dist.study.harness bst_dist.study.lra bst_dist.study.synthetic",
    "bst_dist.study.runs",
    "bst_dist.study.report",
    "bst_dist.study.laws",
    "bst_dist.study.statistics",
    "bst_dist.cluster bst_dist.checkpoint.commands bst_dist.plan.command bst_dist.plan.measured",
    "bst_dist.train.__main__ bst_dist.train.run bst_dist.train.building bst_dist.train.reporting",
    "bst_dist.train.start",
    "bst_dist.train",
    "bst_dist.checkpoint bst_dist.faults",
    "bst_dist.report",
    "bst_dist.plan",
    "bst_dist.plan.memory bst_dist.plan.muon bst_dist.plan.rehearse",
    "bst_dist.generation bst_dist.activation bst_dist.describe bst_dist.config",
    "bst_dist.model",
    "bst_dist.parallel bst_dist.version bst_dist.extras",
    "bst_dist.parallel.sequence bst_dist.parallel.matrices",
    "data_pipeline",
    "bst_base",
)
LEVELS = {name: level for level, line in enumerate(LAYERS) for name in line.split()}
SETTINGS = "bst_dist.config"
"""The recipe, which imports the settings of all packages. Modules of settings are exempt from the order
(`is_settings`)."""


def modules() -> dict[str, Path]:
    """Return the files of all modules of the project, by module name."""
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of the project that a file imports, also inside functions and for type checkers."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {found for name in names for found in [nearest(name, known)] if found}


def nearest(name: str, known: dict[str, Path]) -> str | None:
    """Return the module that `name` is, or is part of; None if it is not in the project."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def is_settings(module: str) -> bool:
    """Whether a module only holds a package's sections of the recipe."""
    return module.endswith(".config") and module != SETTINGS and module.startswith("bst_dist.")


def level(module: str) -> int:
    """Return the index of the line of LAYERS that a module belongs to."""
    name = module
    while name not in LEVELS:
        name = name.rpartition(".")[0]
        assert name, f"{module} is in no room: add it to LAYERS"
    return LEVELS[name]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(file, known) - {name} for name, file in known.items()}


def arrows(graph: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    return ((one, other) for one, others in graph.items() for other in others)


def test_there_are_no_circular_imports(graph):
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


def test_imports_follow_the_order_of_levels(graph):
    rooms = {name for name in graph if name not in PACKAGES}
    upward = [
        (one, other)
        for one, other in arrows(graph)
        if {one, other} <= rooms and not is_settings(other) and level(other) < level(one)
    ]
    assert not upward


def test_settings_import_only_settings(graph):
    recipe = {SETTINGS, *graph[SETTINGS]}
    sections = {name for name in recipe if is_settings(name)}
    assert len(sections) >= 8
    plain = {  # formulas, checks and a table, on plain numbers and settings
        "bst_dist.model.conflicts",
        "bst_dist.model.parametrisation",
        "bst_dist.study.lra.tasks",
        "data_pipeline.serve.order.step_values",
    }
    foreign = [
        (one, other)
        for one, other in arrows(graph)
        if one in sections and not (is_settings(other) or other in plain or other.startswith("bst_base"))
    ]
    assert not foreign


def test_the_data_pipeline_does_not_import_bst_dist(graph):
    assert not [arrow for arrow in arrows(graph) if arrow[0].startswith("data_pipeline") and "bst_dist" in arrow[1]]


def test_only_runtime_packages_import_deepspeed():
    """Only the runtime imports DeepSpeed; models, settings, reports and evaluation do not."""
    named = {
        name
        for name, file in modules().items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for path in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        if "deepspeed" in path.split(".")
    }
    assert {name.split(".")[1] for name in named} == {"parallel", "plan", "tools", "train", "verify"}


WITHOUT = """
import sys
for name in ("deepspeed", "mpi4py"):
    sys.modules[name] = None
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
heavy = {"torch", "fsspec", "scipy", "matplotlib", "transformers"} & sys.modules.keys()
print(*sorted(heavy))
"""


def imported_by(*names: str) -> set[str]:
    """Import `names` without DeepSpeed and mpi4py; return the heavy packages that this imports."""
    done = subprocess.run([sys.executable, "-c", WITHOUT, *names], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_reading_a_recipe_does_not_import_torch():
    assert imported_by("bst_dist.config", "bst_dist.cli", "bst_dist.usage") == set()


def heavy_after(*words: str) -> set[str]:
    """Run a whole command; return the heavy packages that it has imported."""
    program = (
        "import sys; from bst_dist.cli import main; status = main(sys.argv[1:])\n"
        "print(); print('imported', *{'torch', 'scipy', 'matplotlib'} & sys.modules.keys()); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_quick_commands_import_no_heavy_packages(older):
    assert heavy_after("--help") == heavy_after("ckpt") == heavy_after("ckpt", "ls", str(older)) == set()


def test_checking_a_recipe_and_comparing_runs_do_not_import_matplotlib(recipe_file, older):
    assert "matplotlib" not in heavy_after("train", str(recipe_file()), "--check")
    assert "matplotlib" not in imported_by("bst_dist.study.comparison.command")


def test_evaluation_commands_import_neither_deepspeed_nor_mpi():
    """All commands can be imported without DeepSpeed and mpi4py, except those that start ranks."""
    from bst_dist.cli import COMMANDS

    starting = ("doctor", "bench", "verify")
    imported_by(*sorted({module for name, (module, _) in COMMANDS.items() if not name.startswith(starting)}))
