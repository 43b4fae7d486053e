"""Messages between the launching process and its agents: one JSON object per line, over TCP.

Neither side blocks: data that cannot be sent yet is buffered and sent later, and an incomplete message is kept until
the rest arrives. Until the other side has proved that it knows the agent's secret, only short messages are accepted.
Afterwards messages are still validated.
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
"""Maximum seconds to connect to one address."""
FIRST_BYTES, MOST_BYTES = 1 << 12, 1 << 24
"""Maximum message length before and after the other side is authenticated."""
BACKLOG_BYTES = 1 << 20
"""Number of buffered bytes above which messages that may be dropped (the output of ranks) are dropped."""


class Closed(Exception):
    """The other side is gone, or has sent an invalid message."""


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._coming, self._going = connection, b"", bytearray()
        self.most = FIRST_BYTES
        """Maximum length of a received message."""
        self.dropped = 0
        """Number of messages that were dropped because the other side did not read for too long."""
        self.heard = time.monotonic()
        """Time of the last received data, by the monotonic clock."""

    @classmethod
    def connect(cls, address: str, port: int) -> Channel:
        """Connect to a listening socket; raises OSError."""
        return cls(socket.create_connection((address, port), timeout=CONNECT_S))

    def fileno(self) -> int:
        """Return the file descriptor, for selectors."""
        return self._socket.fileno()

    @property
    def remote_address(self) -> str:
        """The other side's address."""
        return str(self._socket.getpeername()[0]).removeprefix("::ffff:")

    @property
    def waiting(self) -> bool:
        """Whether some data has not been sent yet."""
        return bool(self._going)

    def trust(self) -> None:
        """Accept long messages from now on, because the other side is authenticated."""
        self.most = MOST_BYTES

    def send(self, kind: str, may_be_dropped: bool = False, **fields: Any) -> None:
        """Send one message now, or buffer it for the next `flush`; raises Closed."""
        if may_be_dropped and len(self._going) > BACKLOG_BYTES:
            self.dropped += 1
            return
        self._going += json.dumps({"kind": kind, **fields}).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send buffered data as far as possible without blocking; raises Closed."""
        try:
            while self._going:
                del self._going[: self._socket.send(self._going)]
        except BlockingIOError:
            return
        except OSError as error:
            raise Closed(str(error)) from None

    def drain(self, seconds: float) -> None:
        """Send buffered data, waiting at most `seconds`; raises Closed."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_WRITE)
            while self._going and time.monotonic() < deadline:
                selector.select(0.1)
                self.flush()

    def receive(self) -> list[Message]:
        """Return the complete messages that have arrived; raises Closed at the end and for an invalid message."""
        return self._whole(data) if (data := self._take()) else []

    def last_words(self) -> list[Message]:
        """Return the messages that arrived before the connection ended; `send` may notice the end before a read."""
        messages: list[Message] = []
        with suppress(Closed):
            while data := self._take():
                messages += self._whole(data)
        return messages

    def _take(self) -> bytes | None:
        """Return the next bytes; None when there are none yet; raises Closed at the end."""
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
        """Close the connection."""
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
    """Return an HMAC of these words, which proves knowledge of the secret."""
    return hmac.new(secret.encode(), "\n".join(words).encode(), hashlib.sha256).hexdigest()


def proved(found: object, secret: str, *words: str) -> bool:
    """Whether `found` is the `proof` of these words."""
    return isinstance(found, str) and hmac.compare_digest(found.encode(), proof(secret, *words).encode())
