"""What a process asks of the machine that it runs on: a free port, and an end with its parent."""

from __future__ import annotations

import ctypes
import signal
import socket
import sys

_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def free_port() -> int:
    """A TCP port on which nobody listens now, on any address of this host."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=socket.has_dualstack_ipv6()) as listener:
        return int(listener.getsockname()[1])


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent is gone, however that came about (Linux).

    A parent that ended before the call is not noticed: compare `os.getppid()` with its id from before.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, number)
