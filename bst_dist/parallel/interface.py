"""The network interface that gloo uses: the one on the route to rank 0's host.

By default gloo resolves this host's name, which is 127.0.0.1 on many systems. Interface names may differ between hosts,
so each host determines its own.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress

import psutil

VARIABLE = "GLOO_SOCKET_IFNAME"


def route_to(address: str) -> str | None:
    """Return this machine's address on the route to `address`; None without a route. No packet is sent."""
    try:
        found = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, remote in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(remote)
            return str(probe.getsockname()[0])
    return None


def gloo_interface(address: str) -> dict[str, str]:
    """Return the variable that tells gloo the network interface on the route to the rendezvous address."""
    own = route_to(address)
    names = [name for name, found in psutil.net_if_addrs().items() if any(one.address == own for one in found)]
    return {VARIABLE: names[0]} if names else {}


def choose_gloo_interface() -> None:
    """Set gloo's interface in this process if its launcher has not, for groups that are created later.

    A route to rank 0 over the loopback is no hint: rank 0's host may resolve its own name so, and other hosts must not
    be told such an address.
    """
    address = os.environ.get("MASTER_ADDR")
    if VARIABLE in os.environ or address is None or (own := route_to(address)) is None:
        return
    if not ipaddress.ip_address(own).is_loopback:
        os.environ |= gloo_interface(address)
