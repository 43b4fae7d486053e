"""HTTP server that serves the files of a directory with faults."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Listening(ThreadingHTTPServer):
    """HTTP server with a listen queue as long as the number of connections that a reader opens."""

    request_queue_size = 128  # with the default 5, the kernel drops further connections, and clients time out


class FaultyServer:
    """HTTP server on the loopback that serves a directory, with ranges, and produces faults on request.

    ``faults[path]`` is a list of the faults of the next requests for a path: "503", "stall" (half of the body, then
    nothing), "drop" (half of the body, then the connection is closed), "flip" (one bit changed), "whole" (the range is
    ignored).
    """

    def __init__(self, directory: Path) -> None:
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str | None]] = []  # (file name, its Range header)
        self.signed: list[tuple[str, str | None]] = []  # (query, Authorization header)
        self._release = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.serve(self, directory)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Listening(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self, request: BaseHTTPRequestHandler, directory: Path) -> None:
        """Answer one request."""
        name, _, query = request.path.lstrip("/").partition("?")
        span = request.headers.get("Range")
        self.requests.append((name, span))
        self.signed.append((query, request.headers.get("Authorization")))
        fault = self.faults[name].pop(0) if self.faults.get(name) else ""
        if fault == "503" or not (directory / name).exists():
            request.send_error(503 if fault == "503" else 404)
            return
        body = bytearray((directory / name).read_bytes())
        if span and fault != "whole":
            first, last = (int(part) for part in span.removeprefix("bytes=").split("-"))
            body = body[first : last + 1]
        if fault == "flip":
            body[len(body) // 2] ^= 0x10
        request.send_response(206 if span and fault != "whole" else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if fault in ("drop", "stall"):
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
            if fault == "stall":
                self._release.wait(600)
            return
        request.wfile.write(body)

    def close(self) -> None:
        """Stop serving."""
        self._release.set()
        self._server.shutdown()
        self._server.server_close()
