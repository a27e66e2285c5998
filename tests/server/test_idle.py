"""A server that nobody asks gives memory back, once."""

from __future__ import annotations

import asyncio

from exl.server.models import Models
from exl.server.options import ServerOptions
from exl.server.run import return_memory
from exl.server.state import Server
from tests.server.running import SECONDS


def test_freed_memory_goes_back_once_when_requests_have_ended():
    server = Server(ServerOptions(), Models("stories", lambda tell: None))
    trims = []

    async def after(expected: int) -> int:
        """How often memory was given back, when that had its time."""
        for _ in range(int(SECONDS / 0.01)):
            if len(trims) >= expected:
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # and not more often
        return len(trims)

    async def main() -> list[int]:
        task = asyncio.ensure_future(return_memory(server, 0.01, lambda: trims.append(None)))
        found = [await after(0)]  # nobody has asked
        server.num_requests, server.num_open = 2, 1
        found.append(await after(0))  # one of them runs
        server.num_open = 0
        found += [await after(1), await after(1)]
        server.num_requests = 3
        found.append(await after(2))
        task.cancel()
        return found

    assert asyncio.run(main()) == [0, 0, 1, 1, 2]
    server.close()
