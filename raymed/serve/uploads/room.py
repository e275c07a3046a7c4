"""How many pixels the server holds: those of all images that are being answered."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from raymed.serve.problems import Problem, busy


class Room:
    """Room for so many pixels, which threads share."""

    def __init__(self, pixels: int):
        self.pixels = pixels
        self.free = pixels
        self._lock = threading.RLock()  # pixels may be freed by the thread that is just taking some

    @contextmanager
    def taken(self, pixels: int) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
        """Room for an image, given back when the block ends, or, for an array that was given to what the block gets,
        when nobody has that array any more. Raises Problem: 413 for more than there is, 503 for more than is free."""
        if pixels > self.pixels:
            raise Problem(413, "the image is larger than all that the server holds at once")
        with self._lock:
            if pixels > self.free:
                raise busy("the server holds as many images as it can", retry_after=1)
            self.free -= pixels
        held = False

        def hold(array: np.ndarray) -> np.ndarray:
            nonlocal held
            weakref.finalize(array, self._give, pixels).atexit = False
            held = True
            return array

        try:
            yield hold
        finally:
            if not held:
                self._give(pixels)

    def _give(self, pixels: int) -> None:
        with self._lock:
            self.free += pixels
