"""Ctrl-C, and what launchers send before a machine or a time limit goes: the run stops after a checkpoint."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raymed.train.loop import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C, SIGTERM or SIGUSR1 has come; the second Ctrl-C raises Interrupted.

    Outside the main thread, where Python takes no signals, it says no for ever.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise Interrupted
        asked.set()
        print("stopping after this step; the state is saved (once more to stop at once)", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
