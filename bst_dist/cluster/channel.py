"""Messages between the launching process and its agents: one JSON object a line, over TCP."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

Message = dict[str, Any]

SEND_S = 5.0
"""How long a peer may refuse to take a message before it counts as gone."""


class Closed(Exception):
    """The other side is gone, or takes no more messages."""


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SEND_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._pending = connection, b""
        self.heard = time.monotonic()
        """When the other side was last heard of."""

    @classmethod
    def connect(cls, address: str, port: int) -> Channel:
        """A channel to a listening socket; raises OSError."""
        return cls(socket.create_connection((address, port), timeout=SEND_S))

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    @property
    def remote_address(self) -> str:
        """The other side's address."""
        return str(self._socket.getpeername()[0])

    def send(self, kind: str, **fields: Any) -> None:
        """Send one message; raises Closed."""
        try:
            self._socket.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")
        except OSError as error:
            raise Closed(str(error)) from None

    def receive(self) -> list[Message]:
        """The messages that have arrived; to be called when there is something to read. Raises Closed at the end."""
        try:
            data = self._socket.recv(1 << 16)
        except OSError as error:
            raise Closed(str(error)) from None
        if not data:
            raise Closed("connection closed")
        self.heard = time.monotonic()
        *lines, self._pending = (self._pending + data).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            raise Closed("not a message of this program") from None

    def close(self) -> None:
        """End the connection."""
        self._socket.close()
