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
        when nobody has that array any more. Raises Problem (503) for more than is free."""
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

    def case(self) -> "Case":
        """For the images of one request."""
        return Case(self)

    def _give(self, pixels: int) -> None:
        with self._lock:
            self.free += pixels


class Case:
    """What the images of one request need of a room in all, counted by the threads that decode them, each before it
    takes any: a case that never finds room is told so, instead of to come again."""

    def __init__(self, room: Room):
        self.room = room
        self._left = room.pixels
        self._lock = threading.Lock()

    def count(self, pixels: int) -> None:
        """Some images more. Raises Problem (413) where all that were counted are more than the room holds."""
        with self._lock:
            if pixels > self._left:
                detail = f"the images of a case may have {self.room.pixels} pixels (height x width) in all"
                raise Problem(413, detail, field="files")
            self._left -= pixels
