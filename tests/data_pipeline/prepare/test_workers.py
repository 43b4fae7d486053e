"""The bytes of a corpus do not depend on the kind of workers: this process, a pool, or the ranks of mpirun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bst_base.errors import UserError
from data_pipeline.prepare.parallel import open_workers

MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def square(x: int) -> int:
    return x * x


def fail_at_three(x: int) -> int:
    if x == 3:
        raise UserError("three is wrong")
    return x


def die(x: int) -> None:
    os._exit(9)


def bst(arguments: list[str], *launcher: str) -> subprocess.CompletedProcess[str]:
    command = [
        *launcher,
        sys.executable,
        "-c",
        "import sys; from bst_dist.cli import main; sys.exit(main())",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.ranks
def test_corpus_bytes_do_not_depend_on_the_number_of_workers(settings_of, files_of, tmp_path: Path) -> None:
    for workers in (1, 3):
        config = tmp_path / f"{workers}.yaml"
        config.write_text(yaml.safe_dump({**settings_of(f"with{workers}"), "workers": workers}))
        done = bst(["data", "prepare", str(config)])
        assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "with1") == files_of(tmp_path / "with3")


@pytest.mark.ranks
@pytest.mark.skipif(MPIRUN is None, reason="no mpirun on this machine")
def test_mpi_ranks_give_the_same_bytes_and_one_report(run, settings_of, files_of, tmp_path: Path) -> None:
    run("alone")
    config = tmp_path / "mpi.yaml"
    config.write_text(yaml.safe_dump(settings_of("mpi")))
    launcher = [MPIRUN, "-n", "3", "--oversubscribe", *(["--allow-run-as-root"] if os.getuid() == 0 else [])]
    done = bst(["data", "prepare", str(config), "--json", str(tmp_path / "report.json")], *launcher)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "mpi") == files_of(tmp_path / "alone")
    assert done.stdout.count("prepared in") == 1
    assert "encode           100 %" in done.stdout


@pytest.mark.ranks
def test_a_pool_runs_every_task_and_passes_on_the_first_error() -> None:
    with open_workers(2) as workers:
        assert sorted(workers.run(square, range(20))) == [x * x for x in range(20)]
        with pytest.raises(UserError, match="three is wrong"):
            list(workers.run(fail_at_three, range(20)))


def say_and_sleep(path: str) -> None:
    Path(path, str(os.getpid())).touch()
    time.sleep(60)


ORPHANS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("test_workers", sys.argv[1])
module = sys.modules["test_workers"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.open_workers(2) as workers:
    list(workers.run(module.say_and_sleep, [sys.argv[2]] * 2))
"""


@pytest.mark.ranks
def test_workers_exit_when_their_parent_is_killed(tmp_path: Path) -> None:
    """Otherwise they would continue to write while the restarted work runs."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS, __file__, str(tmp_path)], env=env)
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    for child in tmp_path.iterdir():
        while Path("/proc", child.name).exists():  # the time limit is that of the test run
            time.sleep(0.1)


@pytest.mark.ranks
def test_killed_worker_is_reported() -> None:
    with open_workers(2) as workers, pytest.raises(UserError, match="a worker process was killed"):
        list(workers.run(die, range(3)))
