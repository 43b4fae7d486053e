"""Starts an agent on every host, and accepts connections only from these agents.

The launcher (pdsh, mpirun, srun) starts the agents. Each agent generates a secret and prints it. The launcher's output
channel (ssh, for example) brings it to this process only, and it is in no command line. Then the agent connects to this
process's port, and both sides prove that they know the secret without sending it.
"""

from __future__ import annotations

import os
import re
import secrets
import selectors
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import IO

import psutil

from bst_base.host import die_with_parent
from bst_dist.cluster.channel import Channel, Closed, proof, proved
from bst_dist.cluster.hosts import HostError
from bst_dist.cluster.processes import family_of, signal_session
from bst_dist.parallel.interface import route_to

ANNOUNCED = re.compile(rb"bst-agent (?P<key>\S+) (?P<secret>[0-9a-f]{64})\b")
"""The first line that an agent prints; launchers may put a label before it."""
FAILED = re.compile(r"bst-agent (?P<key>\S+) failed: (?P<reason>.*)")
"""The line that an agent prints when it cannot reach this process."""
EMPTY = re.compile(r"[-=\s\0]*")
"""A line that says nothing; Open MPI puts a line of dashes around its messages."""
CONSEQUENCE = re.compile(r"^pdsh@.* exited with |^srun: error: .* [Ee]xited with ")
"""A line that says that an agent failed, and not why."""
STRANGER_S, STRANGERS = 20.0, 64
"""Maximum seconds that an unauthenticated connection stays open, and how many are allowed besides the agents'."""
KEPT_LINES, LAST_LINES = 200, 15
"""Lines of the launcher's output that are kept, and that are printed when an agent did not start."""
END_S = 5.0
"""Maximum seconds to wait until the launcher ends after its agents."""


class AgentGateway:
    """One launcher, the agents that it starts, and the port that they connect to."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        keys: Mapping[str, str],
        welcome: Callable[[str, Channel], None],
        port: int = 0,
    ) -> None:
        """`keys`: key of an agent -> name of its host. `welcome`: called once for each host with its channel."""
        self.job = secrets.token_hex(8)
        """A name for this launch; it is not secret."""
        self.refused: dict[str, str] = {}
        """Hosts whose agent has reported that it cannot reach this process -> the reason."""
        self._selector, self._keys, self._welcome = selector, dict(keys), welcome
        self._secrets: dict[str, str] = {}
        self._strangers: dict[Channel, float] = {}
        self._hellos: list[tuple[Channel, str, str, str]] = []
        self._said: deque[str] = deque(maxlen=KEPT_LINES)
        self._launcher: subprocess.Popen[bytes] | None = None
        self._listener = _listener(port, len(keys) + STRANGERS)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def port(self) -> int:
        """The port that agents connect to."""
        return int(self._listener.getsockname()[1])

    @property
    def launcher_ended(self) -> bool:
        """Whether the launcher, and with it every agent, has ended."""
        return self._launcher is not None and self._launcher.poll() is not None

    def start(self, command: Sequence[str], environment: Mapping[str, str], death_signal: int) -> None:
        """Start the launcher. `death_signal`: it gets this signal from the kernel when this process is killed."""
        pipe = subprocess.PIPE
        self._launcher = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, death_signal),
        )
        for stream in (self._launcher.stdout, self._launcher.stderr):
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, partial(self._hear_launcher, stream, [b""]))

    def dismiss_strangers(self) -> None:
        """Close connections that have been unauthenticated for too long."""
        for channel, since in list(self._strangers.items()):
            if time.monotonic() - since > STRANGER_S:
                self._send_away(channel)

    def said(self, host: str) -> str:
        """Return the last line that the launcher printed about a host, else its last line, else an empty string.

        Lines that give a reason are preferred.
        """
        if host in self.refused:
            return self.refused[host]
        names = {host, host.rpartition("@")[2], host.rpartition("@")[2].partition(".")[0]}
        named = re.compile(rf"(?<![\w.-])(?:{'|'.join(map(re.escape, names))})(?![\w-])")
        about = [line for line in self._said if named.search(line)] or list(self._said)
        reasons = [line for line in about if not CONSEQUENCE.search(line)]
        return (reasons or about or [""])[-1]

    @property
    def last_lines(self) -> list[str]:
        """The last lines that the launcher printed, besides the agents' secrets."""
        return list(self._said)[-LAST_LINES:]

    def close(self) -> None:
        """Close the port and all unauthenticated connections, and end the launcher.

        The agents have ended by themselves or cannot be reached, so there is no reason to wait for pdsh's ssh.
        """
        for channel in list(self._strangers):
            self._send_away(channel)
        self._selector.unregister(self._listener)
        self._listener.close()
        if self._launcher is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._launcher.wait(timeout=END_S)
                break
            except subprocess.TimeoutExpired:
                signal_session(self._launcher, number)
        self._launcher.wait()
        for stream in (self._launcher.stdout, self._launcher.stderr):
            if stream in self._selector.get_map():
                self._selector.unregister(stream)
            stream.close()
        signal_session(self._launcher, signal.SIGKILL)

    def _hear_launcher(self, stream: IO[bytes], pending: list[bytes]) -> None:
        """Read the agents' secrets from the launcher's output, and keep the other lines for error messages."""
        try:
            data = os.read(stream.fileno(), 1 << 16)
        except BlockingIOError:
            return
        *lines, pending[0] = (pending[0] + data).split(b"\n")
        if not data:
            self._selector.unregister(stream)
            lines = [*lines, pending[0]]
        for line in lines:
            if found := ANNOUNCED.search(line):
                self._secrets.setdefault(found["key"].decode(errors="replace"), found["secret"].decode())
            elif not EMPTY.fullmatch(text := line.decode(errors="replace").strip()):
                self._take_failure(text)
        self._let_in()

    def _take_failure(self, text: str) -> None:
        self._said.append(text)
        if (found := FAILED.search(text)) and found["key"] in self._keys:
            self.refused[self._keys[found["key"]]] = found["reason"]

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # the client has gone, or too many files are open: it may try again
        channel = Channel(connection)
        if len(self._strangers) >= STRANGERS + len(self._keys):
            channel.close()
            return
        self._strangers[channel] = time.monotonic()
        self._selector.register(channel, selectors.EVENT_READ, partial(self._greet, channel))

    def _greet(self, channel: Channel) -> None:
        """Read an agent's first message, which may arrive in parts; close the connection if it is anything else."""
        try:
            messages = channel.receive()
        except Closed:
            self._send_away(channel)
            return
        if not messages:
            return
        words = [messages[0].get(name) for name in ("key", "salt", "proof")]
        if len(messages) > 1 or not all(isinstance(word, str) for word in words) or words[0] not in self._keys:
            self._send_away(channel)
            return
        self._hellos.append((channel, *words))
        self._let_in()

    def _let_in(self) -> None:
        """Admit connections that prove to know their agent's secret; the secret may arrive after the connection."""
        for hello in list(self._hellos):
            channel, key, salt, found = hello
            if channel not in self._strangers:
                self._hellos.remove(hello)
            elif key in self._secrets:
                self._hellos.remove(hello)
                if proved(found, self._secrets[key], "hello", key, salt):
                    self._admit(channel, key, salt)
                else:
                    self._send_away(channel)

    def _admit(self, channel: Channel, key: str, salt: str) -> None:
        host, secret = self._keys.pop(key), self._secrets[key]  # removed: an overheard hello cannot be used again
        del self._strangers[channel]
        self._selector.unregister(channel)
        channel.trust()
        with suppress(Closed):
            channel.send("welcome", proof=proof(secret, "welcome", key, salt))
        self._welcome(host, channel)

    def _send_away(self, channel: Channel) -> None:
        del self._strangers[channel]
        self._selector.unregister(channel)
        channel.close()


def _listener(port: int, backlog: int) -> socket.socket:
    """Listen on a port of all addresses, IPv4 and IPv6 if both exist; raises HostError when the port is in use."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=both)
    except OSError as error:
        raise HostError(f"--port {port}: cannot listen on it: {error.strerror}") from None


def own_addresses(addresses: Sequence[str]) -> list[str]:
    """Return this machine's addresses, first those on the routes to the hosts.

    Loopback addresses are left out unless there is no other: a host name of this machine may resolve to one. Link-local
    addresses (fe80::) are left out, because they are valid on one link only.
    """
    found = dict.fromkeys(own for address in addresses if (own := route_to(address)))
    for known in psutil.net_if_addrs().values():
        found |= dict.fromkeys(one.address for one in known if family_of(one.address) is not None)
    usable = [one for one in found if not one.startswith(("127.", "fe80:")) and one != "::1" and "%" not in one]
    return usable or ["127.0.0.1"]
