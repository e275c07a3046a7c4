"""Waiting for something to hold."""

import time


def until(holds, seconds: float = 60.0):
    """Wait until something holds, and return it; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.01)
    return found
