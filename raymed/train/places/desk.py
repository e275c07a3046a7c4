"""Where the driver of a training on Ray and its workers leave notes for each other: an actor on the driver's node.

The driver asks the workers to stop; they say where they are and how far they have come. It ends with the driver, and a
worker that finds it gone is to stop too. This module is light: the actor's process imports nothing else of raymed.
"""

import asyncio
from typing import Any


class Desk:
    """The actor. Made by `open_desk`, one for each group of workers."""

    def __init__(self, size: int) -> None:
        """
        Args:
            size: of the group of workers.
        """
        self._stop = asyncio.Event()
        self._size, self._ready = size, 0
        self._all_ready = asyncio.Event()
        self._workers: list[tuple[str, Any]] = []
        self._evaluations = 0

    async def arrive(self, node: str, actor: Any) -> None:
        """A worker says on which node it is, and which actor."""
        self._workers.append((node, actor))

    async def workers(self) -> list[tuple[str, Any]]:
        """Those that have arrived, as (node id, actor)."""
        return self._workers

    async def ready(self) -> None:
        """A worker has what it needs; returns when all have."""
        self._ready += 1
        if self._ready == self._size:
            self._all_ready.set()
        await self._all_ready.wait()

    async def ask(self) -> None:
        """The workers are to stop after a checkpoint."""
        self._stop.set()

    async def asked(self) -> None:
        """Returns when they are asked to."""
        await self._stop.wait()

    async def note(self, evaluation: int) -> None:
        """The first worker has finished an evaluation, by its number."""
        self._evaluations = evaluation

    async def evaluations(self) -> int:
        """How many are finished."""
        return self._evaluations


def open_desk(size: int) -> Any:
    """A desk on this node for so many workers, which ends with this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Desk)
    return actor.options(num_cpus=0, scheduling_strategy=here, max_concurrency=1000).remote(size)
