"""Free ports and other properties of the machine."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys

import pytest

from bst_base import host
from bst_base.host import allow_open_files, free_port, with_port, without_brackets


@pytest.fixture
def handed_out(tmp_path, monkeypatch):
    """``handed_out(text)`` sets the content of Linux's file with the range of ephemeral ports; None: no such file."""

    def set_to(text: str | None) -> None:
        path = tmp_path / "ip_local_port_range"
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(host, "_HANDED_OUT", path)

    return set_to


def test_free_port_is_outside_the_ephemeral_range_of_the_kernel(handed_out):
    """Otherwise another connection could get the port before the rank listens on it."""
    handed_out("10100\t60999\n")
    found = {free_port() for _ in range(300)}
    assert found <= set(range(10_000, 10_100))
    assert len(found) > 50, "two that ask at the same time are to get different ones"


def test_port_in_use_is_not_returned_as_free(handed_out, monkeypatch):
    handed_out("32768\t60999\n")
    taken, other = free_port(), free_port()
    waiting = [taken, taken, other]
    monkeypatch.setattr(host.secrets, "choice", lambda ports: waiting.pop(0))
    with socket.create_server(("127.0.0.1", taken)):
        assert free_port() == other


@pytest.mark.parametrize("text", ["1024 65535\n", "", None])
def test_kernel_chooses_the_port_if_no_other_range_is_known(handed_out, monkeypatch, text):
    handed_out(text)
    monkeypatch.setattr(host.secrets, "choice", lambda ports: pytest.fail("there is none to choose from"))
    with socket.create_server(("", free_port())):
        pass


@pytest.mark.parametrize(
    ("address", "written"),
    [("node-01", "node-01:80"), ("10.0.0.1", "10.0.0.1:80"), ("fd00::1", "[fd00::1]:80"), ("::1", "[::1]:80")],
)
def test_ipv6_address_with_port_is_in_brackets(address, written):
    assert with_port(address, 80) == written
    assert without_brackets(written.rpartition(":")[0]) == address


@pytest.mark.parametrize(("soft", "hard"), [(64, 512), (64, 64)])
def test_the_limit_of_open_files_is_raised_in_a_process(soft, hard):
    """In a process of its own, which bash starts with these limits."""
    program = (
        "from bst_base.host import allow_open_files; allow_open_files(); import resource; "
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    limited = f"ulimit -Sn {soft} && ulimit -Hn {hard} && exec {sys.executable} -c '{program}'"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert done.stdout.split() == [str(hard)] * 2, done.stderr


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [
        (64, 1 << 20, 1 << 20),
        (64, 3 << 20, 1 << 20),
        (64, resource.RLIM_INFINITY, 1 << 20),
        (2 << 20, 3 << 20, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ],
)
def test_the_limit_of_open_files_is_at_most_a_million_and_never_lowered(soft, hard, raised, monkeypatch):
    """With limits that not every machine allows; `raised`: the soft limit that is asked for, None for none."""
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    allow_open_files()
    assert asked == ([] if raised is None else [(raised, hard)])
