"""What a process asks of the machine that it runs on: a free port, and an end with its parent."""

from __future__ import annotations

import ctypes
import secrets
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

_HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_PORT = 10_000  # below are most services' own
_TRIES = 100
_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def free_port() -> int:
    """A TCP port on which nobody listens now, on any address of this host.

    Not one of those that the kernel hands out by itself (Linux): seconds pass until a rank listens there, and in that
    time any other connection on this machine could be given it.
    """
    ports = range(_LOWEST_PORT, _lowest_handed_out())
    for _ in range(_TRIES if ports else 0):
        with suppress(OSError):  # somebody listens there
            return _listen(secrets.choice(ports))
    return _listen(0)


def _listen(port: int) -> int:
    """Listen for a moment; 0 is any port."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=socket.has_dualstack_ipv6()) as listener:
        return int(listener.getsockname()[1])


def _lowest_handed_out() -> int:
    """The first of the ports that the kernel chooses from; 0 where that is not known."""
    try:
        return int(_HANDED_OUT.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def without_brackets(address: str) -> str:
    """An address as programs take it: people put IPv6 ones in brackets where a port follows."""
    return address[1:-1] if address.startswith("[") and address.endswith("]") else address


def with_port(address: str, port: int) -> str:
    """An address and a port as people write them."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent is gone, however that came about (Linux).

    A parent that ended before the call is not noticed: compare `os.getppid()` with its id from before.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, number)
