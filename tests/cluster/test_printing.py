"""Output that nobody reads must not block the process that prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time

# Prints more than any pipe and the program's own limit can hold, and creates a file when it is done.
PROGRAM = """
import sys
from bst_dist.cluster import printing
printing.KEPT_BYTES, printing.LAST_S = 100_000, {last_s}
@printing.unhurried_output()
def main():
    for number in range(20_000):
        print(number, "x" * 50, flush=True)
    print("error", file=sys.stderr)
    open({done!r}, "w").close()
    {then}
main()
"""


def start(tmp_path, last_s: float, then: str = "") -> tuple[subprocess.Popen, int]:
    read, write = os.pipe()
    program = PROGRAM.format(last_s=last_s, done=str(tmp_path / "done"), then=then)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=write, stderr=write)
    os.close(write)
    return process, read


def test_an_unread_output_pipe_does_not_block_the_program(tmp_path):
    process, read = start(tmp_path, last_s=0.2)
    assert process.wait(120) == 0  # the end of the program does not wait forever either
    assert (tmp_path / "done").exists()
    os.close(read)


def test_omitted_lines_are_counted_when_the_output_is_read_again(tmp_path):
    process, read = start(tmp_path, last_s=120, then="import time; time.sleep(1)")
    deadline = time.monotonic() + 120
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    said: list[bytes] = []
    reader = threading.Thread(target=lambda: said.extend(iter(lambda: os.read(read, 1 << 16), b"")))
    reader.start()
    assert process.wait(120) == 0
    reader.join(60)
    expected = 0
    for line in b"".join(said).decode().splitlines():
        if found := re.fullmatch(r"\[(\d+) lines left out: the output was not read\]", line):
            expected += int(found[1])
        else:
            assert line == (f"{expected} {'x' * 50}" if expected < 20_000 else "error")
            expected += 1
    assert expected == 20_001


def test_output_that_is_read_is_complete_and_in_order(tmp_path):
    program = "from bst_dist.cluster.printing import unhurried_output\n@unhurried_output()\ndef main():\n"
    program += "    for n in range(3000): print(n)\nmain(); print('after')\n"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [*map(str, range(3000)), "after"]
