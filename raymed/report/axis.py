"""Where the values of a hyper-parameter lie on an axis from 0 to 1, whatever their kind."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from raymed.space import Choice, Dimension, Int


class Axis:
    """The axis of one dimension.

    A range is linear or logarithmic; a number outside it lies at its edge, and what is no number has no place. A choice
    has a strip of equal width for each option, those of `values` that it does not list included.

    Args:
        dimension: of the search space.
        values: that are to be placed.
    """

    def __init__(self, dimension: Dimension, values: Sequence[Any]):
        self._dimension = dimension
        listed = dimension.options if isinstance(dimension, Choice) else ()
        self.options: list[Any] = list(dict.fromkeys([*listed, *values])) if listed else []

    def place(self, values: Sequence[Any], spread: float = 0.0) -> np.ndarray:
        """(N,) positions, nan without a place; those of a choice over the middle `spread` of its strip."""
        if self.options:
            jitter = spread * ((0.5 + 0.6180339887 * np.arange(len(values))) % 1 - 0.5)  # fills it evenly: golden ratio
            return (np.array([self.options.index(value) for value in values], float) + 0.5 + jitter) / len(self.options)
        return self._unit(np.array([float(v) if isinstance(v, Real) else np.nan for v in values]))

    def ticks(self) -> tuple[list[float], list[str]]:
        """Positions and labels."""
        if self.options:
            return self.place(self.options).tolist(), [option_text(option) for option in self.options]
        from matplotlib.ticker import LogLocator, MaxNLocator

        assert not isinstance(self._dimension, Choice)
        low, high = self._dimension.low, self._dimension.high
        even = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=isinstance(self._dimension, Int))
        for locator in (LogLocator(), even) if self._dimension.log else (even,):
            values = [value for value in locator.tick_values(low, high) if low <= value <= high]
            if len(values) > 1:
                break
        return self.place(values).tolist(), [f"{value:g}" for value in values]

    def _unit(self, values: np.ndarray) -> np.ndarray:
        assert not isinstance(self._dimension, Choice)
        low, high = float(self._dimension.low), float(self._dimension.high)
        values = np.clip(values, low, high)
        if self._dimension.log:
            low, high, values = np.log(low), np.log(high), np.log(values)
        return (values - low) / (high - low)


def option_text(value: Any) -> str:
    """A value of a hyper-parameter in four digits, and in the words of `raymed.space.parse`."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
