"""Several hosts on one machine: network namespaces on one bridge, each with its own sshd, and a launching machine.

The hosts share the file system and the CPUs. Each has its own network and sshd and, if a test asks for it, its own
clock. All names contain this process's id, and everything is removed at the end.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from bst_base.settings import dump, parse
from bst_dist.config import Recipe
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare
from data_pipeline.prepare.parallel import open_workers

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "pdsh": "pdsh",
    "/usr/sbin/sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "ip": "iproute2",
    "mpiexec.hydra": "mpich",
    "/usr/lib/*/faketime/libfaketime.so.1": "libfaketime",
}
HOSTS = 3
SSHD = """
Port 22
ListenAddress {address}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
MaxStartups 100
PidFile none
"""
CLIENT = """
Host *
  IdentityFile {directory}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


class Network:
    """The network of hosts. A host is identified by its address."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.prefix = directory, f"b{os.getpid()}"
        self.subnet = _free_subnet()
        self.hosts = [f"{self.subnet}.{number}" for number in range(1, HOSTS + 1)]
        self._sshd: dict[str, subprocess.Popen[bytes]] = {}

    def make(self) -> None:
        """Create bridge, namespaces and keys, and start an sshd on every host."""
        _remove_leftovers()
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("key", "host_key"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.directory / name))
        (self.directory / "ssh_config").write_text(CLIENT.format(directory=self.directory))
        wrapper = self.directory / "bin" / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.directory}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        _do("ip", "link", "add", self.bridge, "type", "bridge")
        _do("ip", "address", "add", f"{self.subnet}.254/24", "dev", self.bridge)
        _do("ip", "link", "set", self.bridge, "up")
        for host in self.hosts:
            self._make_host(host)

    @property
    def bridge(self) -> str:
        """Name of the bridge, which is also the launching machine's interface."""
        return f"{self.prefix}br"

    def _make_host(self, host: str) -> None:
        space, cable = self.space(host), self.cable(host)
        _do("ip", "netns", "add", space)
        _do("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        _do("ip", "link", "set", cable, "master", self.bridge, "up")
        for words in (
            ["address", "add", f"{host}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
        ):
            _do("ip", "-n", space, *words)
        self.boot(host)

    def space(self, host: str) -> str:
        """Return the name of the host's network namespace."""
        return f"{self.prefix}n{host.rpartition('.')[2]}"

    def cable(self, host: str) -> str:
        """Return the name of the host's network interface at the bridge."""
        return f"{self.prefix}c{host.rpartition('.')[2]}"

    def boot(self, host: str, clock_ahead_s: int | None = None, private: Path | None = None, name: str = "") -> None:
        """Start the host's sshd, with settings that apply to all its ssh sessions.

        Args:
            clock_ahead_s: give the host its own clock, ahead by this many seconds (see `set_clock`).
            private: a directory that the host does not share with the others.
            name: host name, if different from this machine's.
        """
        config = self.directory / f"sshd-{host}"
        text = SSHD.format(address=host, directory=self.directory)
        if clock_ahead_s is not None:
            (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
            self.set_clock(host, clock_ahead_s)
            text += (
                f"SetEnv LD_PRELOAD={library} FAKETIME_TIMESTAMP_FILE={self.clock(host)} FAKETIME_NO_CACHE=1 "
                "FAKETIME_DONT_FAKE_MONOTONIC=1 NO_FAKE_STAT=1\n"
            )
        config.write_text(text)
        daemon = f"exec /usr/sbin/sshd -D -e -f {config}"
        own = (f"mount -t tmpfs none {private} && " if private else "") + (f"hostname {name} && " if name else "")
        with (self.directory / f"sshd-{host}.log").open("ab") as log:
            self._sshd[host] = subprocess.Popen(
                [*self.inside(host), "unshare", "-m", "-u", "sh", "-c", own + daemon], stdout=log, stderr=log
            )
        _until(lambda: subprocess.run([str(self.directory / "bin/ssh"), host, "true"]).returncode == 0, 10)

    def clock(self, host: str) -> Path:
        """Return the file that holds the offset of the host's clock."""
        return self.directory / f"clock-{host}"

    def set_clock(self, host: str, ahead_s: int) -> None:
        """Set the offset of a host's own clock."""
        partial = self.clock(host).with_suffix(".partial")
        partial.write_text(f"{ahead_s:+d}\n")
        partial.replace(self.clock(host))

    def seconds_ahead(self, host: str) -> float:
        """Return the offset of the clock that a program on the host sees."""
        return float(_do(str(self.directory / "bin/ssh"), host, "date", "+%s")) - time.time()

    def inside(self, host: str) -> list[str]:
        """Return a command prefix that runs a command on the host."""
        return ["nsenter", f"--net=/run/netns/{self.space(host)}"]

    def processes(self, host: str) -> list[psutil.Process]:
        """Return the processes on the host."""
        found = subprocess.run(["ip", "netns", "pids", self.space(host)], capture_output=True, text=True)
        return [psutil.Process(int(pid)) for pid in found.stdout.split() if psutil.pid_exists(int(pid))]

    def ranks(self, host: str) -> list[psutil.Process]:
        """Return the training processes on the host."""
        return [process for process in self.processes(host) if "bst_dist.train" in _command(process)]

    def cut(self, host: str) -> None:
        """Disconnect the host from the network."""
        _do("ip", "link", "set", self.cable(host), "down")

    def mend(self, host: str) -> None:
        """Connect the host to the network again."""
        _do("ip", "link", "set", self.cable(host), "up")

    def power_off(self, host: str) -> None:
        """Disconnect the host and kill all its processes, so that no other host is notified."""
        self.cut(host)
        self.kill(self.processes(host))
        self._sshd[host].wait()

    def power_on(self, host: str, **own: Any) -> None:
        """Connect and boot a host again; `own`: arguments of `boot`."""
        self.mend(host)
        self.boot(host, **own)

    def kill(self, processes: Sequence[psutil.Process]) -> None:
        """Send SIGKILL to processes."""
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    @staticmethod
    def require(packages: dict[str, str]) -> None:
        """Install the Debian packages of missing programs."""
        missing = sorted({package for program, package in packages.items() if not _there(program)})
        if not missing:
            return
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
        ):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"cannot install {' '.join(missing)}: {done.stderr[-2000:]}"

    def remove(self) -> None:
        """End all processes of the hosts, and remove namespaces and bridge."""
        for host in self.hosts:
            self.kill(self.processes(host))
            subprocess.run(["ip", "netns", "delete", self.space(host)], stderr=subprocess.DEVNULL)
        for process in self._sshd.values():
            process.wait()
        subprocess.run(["ip", "link", "delete", self.bridge], stderr=subprocess.DEVNULL)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _do(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _until(true: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"did not come to pass within {timeout_s} s"
        time.sleep(0.1)


def _remove_leftovers() -> None:
    """Remove namespaces and bridges of test runs that were killed."""
    for kind, words in (("netns", ["netns", "list"]), ("link", ["-br", "link", "show", "type", "bridge"])):
        for line in _do("ip", *words).splitlines():
            found = re.match(r"(b(\d+)(?:n\d+|br))\b", line)
            if found and not psutil.pid_exists(int(found[2])):
                for pid in _do("ip", "netns", "pids", found[1]).split() if kind == "netns" else ():
                    os.kill(int(pid), signal.SIGKILL)
                _do("ip", kind, "delete", found[1])


def _free_subnet() -> str:
    """Return the first three numbers of a subnet that this machine has no route to."""
    taken = _do("ip", "-o", "route")
    while True:
        subnet = f"10.{random.randrange(64, 250)}.{random.randrange(1, 250)}"
        if f"{subnet}." not in taken:
            return subnet


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """A network of three hosts."""
    if os.geteuid() != 0:
        pytest.skip("needs root: hosts are network namespaces")
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("needs network namespaces, which this system refuses")
    Network.require(PACKAGES)
    made = Network(tmp_path_factory.mktemp("network"))
    try:
        made.make()
        yield made
    finally:
        made.remove()


def as_a_user_has_it() -> dict[str, str]:
    """Return this process's environment without the variable that tests set and users do not."""
    return {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}


def _there(program: str) -> bool:
    return bool(list(Path("/").glob(program[1:])) if program.startswith("/") else shutil.which(program))


class Launched:
    """A running command."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, output: int | None = None) -> None:
        """Start the command; its output goes to `log`, or to the file descriptor `output`."""
        self.log = log
        with log.open("wb") as file:
            to = file if output is None else output
            self.process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=to, stderr=to)

    @property
    def said(self) -> str:
        """All output so far."""
        return self.log.read_text(errors="replace")

    def until(self, text: str, timeout_s: float = 120) -> None:
        """Wait until the output contains `text`."""
        _until(lambda: text in self.said or self.process.poll() is not None, timeout_s)
        assert text in self.said, self.said

    def status(self, timeout_s: float = 180) -> int:
        """Wait for the command to end; return its exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running:\n{self.said}") from None


@pytest.fixture
def launch(network: Network, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """``launch(*arguments)`` starts `bst launch` on the launching machine, for all hosts.

    `command`: a command to start instead; each HOSTFILE in it is replaced by the path of the hostfile. Commands that
    still run at the end of the test are killed.
    """
    started: list[Launched] = []
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in network.hosts))

    def start(
        *arguments: str, command: Sequence[str] = ("bst", "launch", "--hostfile", "HOSTFILE"), output: int | None = None
    ) -> Launched:
        words = [str(hostfile) if word == "HOSTFILE" else word for word in (*command, *arguments)]
        path = f"{network.directory}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {
            "PATH": path,
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "BST_BIN": str(Path(sys.executable).parent),
        }
        environment = as_a_user_has_it() | own
        started.append(Launched(words, environment, tmp_path / f"launch-{len(started)}.log", output))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGKILL)
            one.process.wait()
    _until(lambda: not any(network.ranks(host) for host in network.hosts), 60)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of 20 documents of random words."""
    folder, output = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("prepared") / "corpus"
    numbers = np.random.default_rng(0)
    words = ["for", "x", "=", "(", ")", "\n", "    ", "return", "naïve", "12", "+", "y", ":", "if", "else"]
    for number in range(20):
        (folder / f"{number:02}.txt").write_text(" ".join(numbers.choice(words, 600)))
    settings = {
        "source": {"kind": "folder", "path": str(folder), "pattern": "*.txt"},
        "output": str(output),
        "tokenizer": {"vocab_size": 300},
        "validation_fraction": 0.2,
    }
    with open_workers(1) as workers:
        prepare(parse(PrepareConfig, settings), workers, lambda *_: None)
    return output


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Callable[..., Path]:
    """``recipe(steps)`` writes a recipe with small steps; 1, 2, 3 and 6 ranks divide its batch."""

    def write(steps: int, **sections: Any) -> Path:
        settings = {
            "name": "small",
            "seed": 3,
            "model": {
                "width": 16,
                "heads": 2,
                "ffn": 16,
                "block": 8,
                "depth": 2,
                "mixer": "bst",
                "placement": [1],
                "ssm": {"state": 4, "chunk": 4},
            },
            "data": {"corpus": str(corpus), "prefetch": 0},
            "train": {"steps": steps, "sequence_length": 32, "sequences": 6, "precision": "fp32"},
            "evaluation": {"every": 0, "sequences": 6},
            "schedule": {"warmup_steps": 2},
            "checkpoint": {"every": 10},
            "log": {"every": 10, "tensorboard": False},
            "deepspeed": "ds_configs/zero1.json",
            **sections,
        }
        path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        path.write_text(dump(parse(Recipe, settings)))
        return path

    return write
