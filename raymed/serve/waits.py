"""How long a request waits for threads that it shares with others."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Waits:
    """Of one request. It waits while something of it is queued and nothing of it is being done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queued = self._running = 0
        self._waited_s, self._since = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Until now."""
        self._count()
        return self._waited_s

    @contextmanager
    def piece(self) -> Iterator[Callable[[], None]]:
        """Something is queued and done inside. What it gives is called once, in any thread, when that begins."""
        has_begun = False

        def begun() -> None:
            nonlocal has_begun
            has_begun = True
            self._count(queued=-1, running=1)

        self._count(queued=1)
        try:
            yield begun
        finally:
            self._count(running=-1) if has_begun else self._count(queued=-1)

    def _count(self, queued: int = 0, running: int = 0) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._queued and not self._running:
                self._waited_s += now - self._since
            self._since = now
            self._queued += queued
            self._running += running
