"""The interface that gloo is told to use."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys

import psutil
import pytest

from bst_base.host import free_port
from bst_dist.parallel.interface import choose_gloo_interface, gloo_interface

FOUND = [
    (name, one.address)
    for name, found in psutil.net_if_addrs().items()
    for one in found
    if one.family.name == "AF_INET"
    and not ipaddress.ip_address(one.address).is_loopback
    and psutil.net_if_stats()[name].isup
]
needs_network = pytest.mark.skipif(not FOUND, reason="this machine has the loopback alone")


@needs_network
def test_the_interface_is_the_one_with_the_address_of_the_route() -> None:
    name, address = FOUND[0]
    assert gloo_interface(address) == {"GLOO_SOCKET_IFNAME": name}


@pytest.mark.parametrize("address", [None, "127.0.0.1", "127.0.1.1", "localhost", "no-such-host.invalid"])
def test_without_a_route_over_a_network_gloo_chooses_itself(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    if address:
        monkeypatch.setenv("MASTER_ADDR", address)
    choose_gloo_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@needs_network
@pytest.mark.parametrize("given", [None, "lo"])
@pytest.mark.parametrize(
    "program",
    [
        "from bst_dist.parallel.ranks import Ranks; Ranks()",
        "from bst_dist.study.evaluation.readers import joined; joined().__enter__()",
    ],
    ids=["train", "eval"],
)
def test_ranks_of_any_launcher_have_gloo_on_the_route_to_rank_0(program: str, given: str | None) -> None:
    name, address = FOUND[0]
    launched = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(free_port()),
    }
    environment = {**{k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"}, **launched}
    if given:
        environment["GLOO_SOCKET_IFNAME"] = given
    show = "; import os; print('interface', os.environ.get('GLOO_SOCKET_IFNAME'), flush=True); os._exit(0)"
    done = subprocess.run(
        [sys.executable, "-c", program + show],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert f"interface {given or name}" in done.stdout, done.stderr
