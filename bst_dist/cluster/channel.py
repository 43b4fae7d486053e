"""Messages between the launching process and its agents: one JSON object a line, over TCP.

Nobody waits for the other side: what cannot be sent at once is kept and sent later, and what has not come whole is
taken up with the rest. What comes in is trusted for nothing before the other side has proved that it knows the secret
of its agent, and afterwards still parsed with care.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import selectors
import socket
import time
from contextlib import suppress
from typing import Any

Message = dict[str, Any]

CONNECT_S = 5.0
"""How long one address may take to answer."""
FIRST_BYTES, MOST_BYTES = 1 << 12, 1 << 24
"""The longest message taken from somebody unknown, and from an agent or its launching process."""
BACKLOG_BYTES = 1 << 20
"""So much may wait to be sent before messages that may be lost, as what ranks print, are dropped."""


class Closed(Exception):
    """The other side is gone, or says what no program of this project says."""


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._coming, self._going = connection, b"", bytearray()
        self.most = FIRST_BYTES
        """The longest message to be taken."""
        self.dropped = 0
        """Messages that were not sent because the other side took none for too long."""
        self.heard = time.monotonic()
        """When the other side was last heard of."""

    @classmethod
    def connect(cls, address: str, port: int) -> Channel:
        """A channel to a listening socket; raises OSError."""
        return cls(socket.create_connection((address, port), timeout=CONNECT_S))

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    @property
    def remote_address(self) -> str:
        """The other side's address."""
        return str(self._socket.getpeername()[0]).removeprefix("::ffff:")

    @property
    def waiting(self) -> bool:
        """Whether the other side has not taken everything yet."""
        return bool(self._going)

    def trust(self) -> None:
        """The other side has proved who it is."""
        self.most = MOST_BYTES

    def send(self, kind: str, may_be_dropped: bool = False, **fields: Any) -> None:
        """Send one message, now or with the next `flush`; raises Closed."""
        if may_be_dropped and len(self._going) > BACKLOG_BYTES:
            self.dropped += 1
            return
        self._going += json.dumps({"kind": kind, **fields}).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what has waited, as far as the other side takes it; raises Closed."""
        try:
            while self._going:
                del self._going[: self._socket.send(self._going)]
        except BlockingIOError:
            return
        except OSError as error:
            raise Closed(str(error)) from None

    def drain(self, seconds: float) -> None:
        """Give the other side so long to take what still waits; raises Closed."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_WRITE)
            while self._going and time.monotonic() < deadline:
                selector.select(0.1)
                self.flush()

    def receive(self) -> list[Message]:
        """The whole messages that have arrived. Raises Closed at the end, and for what is no message."""
        return self._whole(data) if (data := self._take()) else []

    def last_words(self) -> list[Message]:
        """What had arrived before the connection ended, which sending may notice before it is read."""
        messages: list[Message] = []
        with suppress(Closed):
            while data := self._take():
                messages += self._whole(data)
        return messages

    def _take(self) -> bytes | None:
        """The next bytes; None when there are none yet. Raises Closed at the end."""
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return None
        except OSError as error:
            raise Closed(str(error)) from None
        if not data:
            raise Closed("connection closed")
        self.heard = time.monotonic()
        return data

    def _whole(self, data: bytes) -> list[Message]:
        *lines, self._coming = (self._coming + data).split(b"\n")
        if max(map(len, [*lines, self._coming])) > self.most:
            raise Closed("a message longer than any of this program")
        return [_message(line) for line in lines]

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


def _message(line: bytes) -> Message:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        raise Closed("not a message of this program")
    return found


def proof(secret: str, *words: str) -> str:
    """What only somebody who knows the secret can say about these words."""
    return hmac.new(secret.encode(), "\n".join(words).encode(), hashlib.sha256).hexdigest()


def proved(found: object, secret: str, *words: str) -> bool:
    """Whether `found` is that."""
    return isinstance(found, str) and hmac.compare_digest(found.encode(), proof(secret, *words).encode())
