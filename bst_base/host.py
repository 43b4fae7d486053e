"""Services of the host: a free port, the end of a process with its parent, and its limit of open files."""

from __future__ import annotations

import ctypes
import resource
import secrets
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

_HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_PORT = 10_000  # most services use ports below this
_TRIES = 100
_MOST_OPEN_FILES = 1 << 20  # programs that loop over all possible descriptors take seconds with a higher limit
_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def free_port() -> int:
    """Return a TCP port on which no process listens now, on any address of this host.

    On Linux, it is not an ephemeral port (one that the kernel assigns by itself). It takes seconds until a rank listens
    on the port, and any other connection on this machine could get an ephemeral port in that time.
    """
    ports = range(_LOWEST_PORT, _lowest_handed_out())
    for _ in range(_TRIES if ports else 0):
        with suppress(OSError):  # the port is in use
            return _listen(secrets.choice(ports))
    return _listen(0)


def _listen(port: int) -> int:
    """Listen on a port for a moment; return the port. 0 means any port."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=socket.has_dualstack_ipv6()) as listener:
        return int(listener.getsockname()[1])


def _lowest_handed_out() -> int:
    """Return the first ephemeral port; 0 if it is unknown."""
    try:
        return int(_HANDED_OUT.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def without_brackets(address: str) -> str:
    """Return an address without the brackets that people put around IPv6 addresses before a port."""
    return address[1:-1] if address.startswith("[") and address.endswith("]") else address


def with_port(address: str, port: int) -> str:
    """Return an address and a port in the usual notation, with brackets around IPv6 addresses."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send this process a signal when its parent has ended, for whatever reason (Linux).

    A parent that ended before the call is not noticed: compare `os.getppid()` with its earlier id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, number)


def allow_open_files() -> None:
    """Raise this process's limit of open files (`ulimit -n`), and that of its later children, to `most_open_files`.

    Shells usually set 1024, for programs that call select(2), and every process may raise it to the hard limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < most_open_files():
        with suppress(ValueError, OSError):  # a sandbox may refuse it; the limit then stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (most_open_files(), hard))


def most_open_files() -> int:
    """Return the limit of open files that a process of this user may set for itself, at most a million."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
