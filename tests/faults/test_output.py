"""A run continues, or ends with a checkpoint, if its output or terminal is closed."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bst_dist.faults.output import IgnoreWriteErrors
from bst_dist.faults.status import RESUBMIT
from bst_dist.train.rundir import read_outcome


def test_writing_to_a_closed_pipe_is_ignored():
    reading, writing = os.pipe()
    stream = IgnoreWriteErrors(os.fdopen(writing, "w"))
    print("heard", file=stream, flush=True)
    assert os.read(reading, 100) == b"heard\n"
    os.close(reading)
    print("not heard", file=stream, flush=True)
    assert (stream.isatty(), stream.encoding.lower()) == (False, "utf-8")


def test_characters_that_the_encoding_lacks_are_written_as_escapes():
    written = io.BytesIO()
    stream = IgnoreWriteErrors(io.TextIOWrapper(written, encoding="ascii"))
    print("2.30 ± 0.08", "caf\udce9", file=stream, flush=True)
    assert written.getvalue() == b"2.30 \\xb1 0.08 caf\\udce9\n"


@pytest.mark.ranks
def test_a_closed_terminal_leaves_a_checkpoint(recipe_file, tmp_path):
    """`bst train` runs in its own terminal, which is closed during training."""
    recipe, run_dir, status = recipe_file(train={"steps": 10_000}), tmp_path / "run", tmp_path / "status"
    bst = Path(sys.executable).with_name("bst")
    script = f"{bst} train {recipe} log.every=1 --run-dir {run_dir} --ranks 2; echo $? > {status}"
    # The shell owns the terminal, and ignores the hang-up so that it can write the exit status.
    command = [
        sys.executable,
        "-c",
        "import fcntl, subprocess, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "subprocess.run(['bash', '-c', 'trap : HUP; ' + sys.argv[1]])",
        script,
    ]
    master, slave = pty.openpty()
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    said = b""
    while b"\n     3/" not in said.replace(b"\r", b""):
        said += os.read(master, 4096)
    os.close(master)
    deadline = time.monotonic() + 300
    while not (status.exists() and status.read_text()):
        assert time.monotonic() < deadline, said.decode()
        time.sleep(0.1)
    process.wait()
    assert int(status.read_text()) == RESUBMIT
    outcome = read_outcome(run_dir)
    assert outcome["stopped"] == "SIGHUP"
    assert (run_dir / "checkpoints" / f"step-{outcome['step']:08d}").is_dir()
