"""How often, and how much at once, each caller may ask."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from raymed.serve.problems import Problem

asking: ContextVar[str] = ContextVar("asking", default="")
"""The name of the caller whose request is being answered; "" where nobody needs a token, and of the server itself."""


@dataclass
class _Bucket:
    level: float
    """Requests that may come now."""
    at: float
    answering: int = 0


class Rates:
    """A token bucket and a count of what is being answered, for each caller by name. In one process.

    per_minute: requests, as many of which may come at once; at_once: that are being answered.
    """

    def __init__(self, per_minute: int, at_once: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self.at_once, self.clock = per_minute, at_once, clock
        self._buckets: defaultdict[str, _Bucket] = defaultdict(lambda: _Bucket(per_minute, clock()))

    @contextmanager
    def place(self, name: str) -> Iterator[None]:
        """Held while a request of a caller is answered, who is then `asking`. Raises Problem (429), with the time after
        which to come again."""
        bucket = self._buckets[name]
        if bucket.answering >= self.at_once:
            raise Problem(429, f"{self.at_once} requests of yours are being answered already", retry_after=1)
        self._take(bucket)
        bucket.answering += 1
        before = asking.set(name)
        try:
            yield
        finally:
            asking.reset(before)
            bucket.answering -= 1

    def _take(self, bucket: _Bucket) -> None:
        now = self.clock()
        bucket.level = min(self.per_minute, bucket.level + (now - bucket.at) * self.per_minute / 60)
        bucket.at = now
        if bucket.level < 1:
            missing = (1 - bucket.level) * 60 / self.per_minute
            raise Problem(429, f"more than {self.per_minute} requests a minute", retry_after=missing + 0.5)
        bucket.level -= 1
