"""A client that puts load on an HTTP server, in a process of its own.

    python http_load.py        # a JSON line in is a task; an empty line out says that its result is there

Task: out (file for the result, JSON), url, headers, bodies (files, sent in turns), warm_up and seconds, and either
at_once (closed loop: so many clients, each of which sends when it has its answer) or rate and seed (open loop: Poisson
arrivals a second, whatever comes back, but that with `most` the next waits while so many are under way). Result:
seconds; asked, requests with those of the warm-up; ended: of every request that ended within them (in a closed loop) or
was due within them (in an open one) its status, 0 for none, and its seconds, from when it was due. Imports nothing else
of this project.
"""

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

TIMEOUT_S = 60.0


class Client:
    """One task."""

    def __init__(self, session: aiohttp.ClientSession, task: dict[str, Any]):
        self.session, self.url, self.headers = session, task["url"], task["headers"]
        self.bodies: Iterator[bytes] = itertools.cycle([Path(path).read_bytes() for path in task["bodies"]])
        self.clock = time.perf_counter  # that of uvloop counts milliseconds
        self.begin = self.clock() + task["warm_up"]
        self.end = self.begin + task["seconds"]
        self.ended: list[tuple[float, float, int]] = []
        """When it was due, when it ended, and its status."""

    async def ask(self, due: float) -> None:
        """One request."""
        try:
            async with self.session.post(self.url, data=next(self.bodies), headers=self.headers) as answer:
                await answer.read()
                status = answer.status
        except (aiohttp.ClientError, TimeoutError):
            status = 0
        self.ended.append((due, self.clock(), status))

    async def closed(self, at_once: int) -> list[tuple[int, float]]:
        """So many clients, until the time is over."""

        async def client() -> None:
            while self.clock() < self.end:
                await self.ask(self.clock())

        await asyncio.gather(*(client() for _ in range(at_once)))
        return [(status, end - due) for due, end, status in self.ended if self.begin <= end < self.end]

    async def open(self, rate: float, seed: int, most: int) -> list[tuple[int, float]]:
        """Requests at random times, until the time is over; waits for all of them."""
        due, asked = self.clock(), set()
        random = np.random.default_rng(seed)
        while (due := due + random.exponential(1 / rate)) < self.end:
            await asyncio.sleep(max(0.0, due - self.clock()))
            asked.add(asyncio.create_task(self.ask(due)))
            if len(asked) >= most:
                _, asked = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*asked)
        return [(status, end - due) for due, end, status in self.ended if due >= self.begin]


async def run(task: dict[str, Any]) -> dict[str, Any]:
    """The result of a task."""
    patience = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=patience) as session:
        client = Client(session, task)
        if "at_once" in task:
            ended = await client.closed(task["at_once"])
        else:
            ended = await client.open(task["rate"], task["seed"], task.get("most", sys.maxsize))
    return {"seconds": task["seconds"], "asked": len(client.ended), "ended": ended}


def main() -> None:
    """Tasks until the input ends."""
    import uvloop

    for line in sys.stdin:
        task = json.loads(line)
        Path(task["out"]).write_text(json.dumps(uvloop.run(run(task))))
        print(flush=True)


if __name__ == "__main__":
    main()
