"""An HTTP server of an endless corpus on the loopback, which delays every answer.

  python -m data_pipeline.bench.server DIRECTORY --latency-ms 40

It prints its port, and ends when its standard input ends. `/requests` returns the number of answered requests by kind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections import Counter
from pathlib import Path

from aiohttp import web

_SHARD = re.compile(r"train-\d+(\.tar|\.idx)")


class Server:
    """The files of a directory. All shard numbers share the files of the first shard."""

    def __init__(self, directory: Path, latency_s: float) -> None:
        self._directory, self._latency_s = directory, latency_s
        self._files: dict[str, bytes] = {}
        self._answered: Counter[str] = Counter()

    async def answer(self, request: web.Request) -> web.Response:
        """Answer one request for a whole file or a range."""
        name = request.match_info["name"]
        if name == "requests":
            return web.Response(text=json.dumps(self._answered))
        shard = _SHARD.fullmatch(name)
        stored = f"train-000000{shard[1]}" if shard else name
        self._answered[shard[1] if shard else name] += 1
        await asyncio.sleep(self._latency_s)
        if stored not in self._files:
            if not (self._directory / stored).exists():
                return web.Response(status=404)
            self._files[stored] = (self._directory / stored).read_bytes()
        data, span = self._files[stored], request.http_range
        if span.start is None:
            return web.Response(body=data)
        return web.Response(status=206, body=data[span])


async def serve(directory: Path, latency_s: float) -> None:
    """Serve until the standard input ends."""
    app = web.Application()
    app.router.add_get("/{name}", Server(directory, latency_s).answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


def main() -> None:
    """Run the server; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--latency-ms", type=float, required=True)
    args = parser.parse_args()
    asyncio.run(serve(args.directory, args.latency_ms / 1e3))


if __name__ == "__main__":
    main()
