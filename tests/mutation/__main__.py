"""Mutation testing: change one line of the program at a time, and check whether its unit tests fail.

    python tests/mutation [--sample N] [--seed N] [FILE ...]

targets.yaml in this folder lists the files and their tests. Everything happens in a copy of the tree. The same seed
draws the same mutants from the same file.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from mutants import Mutant, mutants

HERE = Path(__file__).parent
TREE = HERE.parent.parent
# Imported once, before forking: modules that take seconds to import and are not under test.
HEAVY = ("numpy", "scipy.stats", "torch", "pydantic", "hypothesis", "pytest")
PROFILE = "mutation"
LEFT_OUT = "not ranks and not cluster and not gpu"
SLOWEST = 10  # a mutant that takes this many times as long as the unchanged program counts as hanging
LEAST_S = 60


@dataclass
class Target:
    """A file, the tests that should fail for its mutants, and equivalent mutants that no test can notice.

    Each entry of `explained` is the mutant `change` on a line with the text `code`, with the reason `why`.
    """

    path: str
    tests: list[str]
    explained: list[dict[str, str]] = field(default_factory=list)

    def explains(self, mutant: Mutant, line: str) -> bool:
        return any(one["code"] in line and one["change"] == str(mutant) for one in self.explained)


@dataclass
class Outcome:
    target: Target
    possible: int
    killed: list[Mutant] = field(default_factory=list)
    explained: list[Mutant] = field(default_factory=list)
    survived: list[Mutant] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return len(self.killed) + len(self.explained) + len(self.survived)


def main() -> int:
    arguments = _arguments()
    targets = [Target(path, **given) for path, given in yaml.safe_load((HERE / "targets.yaml").read_text()).items()]
    unknown = set(arguments.files) - {target.path for target in targets}
    if unknown:
        print(f"not in {HERE.name}/targets.yaml: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        copy = Path(scratch) / "tree"
        _copy_tree(copy)
        _prepare_process(copy)
        outcomes = [
            _try_file(target, copy, arguments.sample, arguments.seed)
            for target in targets
            if target.path in arguments.files or not arguments.files
        ]
    print()
    print("\n".join(_table(outcomes)))
    return 1 if any(outcome.survived for outcome in outcomes) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/mutation", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="only these files of targets.yaml (default: all)")
    parser.add_argument("--sample", type=int, default=15, help="mutants per file, drawn at random (default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    return parser.parse_args()


def _copy_tree(copy: Path) -> None:
    """Copy the working tree's tracked and untracked files, without those that git ignores."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, cwd=TREE, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (TREE / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TREE / name, copy / name)


def _prepare_process(copy: Path) -> None:
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True  # two changes within a second have the same key in the bytecode cache
    sys.path.insert(0, str(copy))
    for name in HEAVY:
        importlib.import_module(name)
    from hypothesis import HealthCheck, Phase, settings

    # The first failing example is enough; shrinking it would take most of the time.
    settings.register_profile(
        PROFILE,
        phases=[Phase.explicit, Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


def _try_file(target: Target, copy: Path, sample: int, seed: int) -> Outcome:
    path = copy / target.path
    source = path.read_bytes()
    began = time.monotonic()
    if not _passes(target.tests, None):
        raise SystemExit(f"{target.path}: its unit tests fail without any change, or there are none")
    once_s = time.monotonic() - began
    print(f"{target.path}: its tests take {once_s:.0f} s", flush=True)
    limit_s = max(LEAST_S, SLOWEST * once_s)
    all_of_them = mutants(source)
    drawn = random.Random(f"{seed} {target.path}").sample(all_of_them, min(sample, len(all_of_them)))
    outcome = Outcome(target, len(all_of_them))
    for mutant in sorted(drawn, key=lambda one: (one.line, one.start)):
        path.write_bytes(mutant.apply(source))
        try:
            passed = _passes(target.tests, limit_s)
        finally:
            path.write_bytes(source)
        line = source.decode().splitlines()[mutant.line - 1]
        fate = "killed" if not passed else "explained" if target.explains(mutant, line) else "survived"
        getattr(outcome, fate).append(mutant)
        print(f"{target.path}:{mutant.line}: {fate}: {mutant}", flush=True)
    return outcome


def _passes(tests: list[str], limit_s: float | None) -> bool:
    """Whether the tests pass in a fork of this process within ``limit_s`` seconds."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        _run_tests(tests)
    deadline = time.monotonic() + limit_s if limit_s else None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        late = deadline is not None and time.monotonic() > deadline
        if ended or late:
            _end_group(child)
            if not ended:
                os.waitpid(child, 0)
            return bool(ended) and status == 0
        time.sleep(0.05)


def _end_group(leader: int) -> None:
    """Kill the tests and all processes that they left running."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _run_tests(tests: list[str]) -> None:
    """Run the tests and exit with their status; never returns."""
    import pytest

    with tempfile.TemporaryDirectory(prefix="mutation-tests-") as base, Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        try:
            options = ["-x", "-m", LEFT_OUT, "-p", "no:cacheprovider", "--basetemp", f"{base}/t"]
            status = pytest.main([*options, "--hypothesis-profile", PROFILE, *tests])
        except BaseException:
            status = 1
    os._exit(int(status))


def _table(outcomes: list[Outcome]) -> list[str]:
    rows = ["| file | possible | tried | killed | explained | survived |", "| --- | --- | --- | --- | --- | --- |"]
    for one in outcomes:
        counts = (one.possible, one.tried, len(one.killed), len(one.explained), len(one.survived))
        rows.append(f"| `{one.target.path}` | " + " | ".join(map(str, counts)) + " |")
    tried = sum(one.tried for one in outcomes)
    noticed = tried - sum(len(one.survived) for one in outcomes)
    rows += ["", f"{noticed} of {tried} killed or explained: {100 * noticed / max(tried, 1):.1f} %"]
    return rows


if __name__ == "__main__":
    sys.exit(main())
