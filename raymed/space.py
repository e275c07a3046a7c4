"""Search spaces: what one hyper-parameter may be in a sweep.

A space is a dictionary from hyper-parameter to dimension, `{"gamma_neg": Float(0, 5), "alpha": Choice((None, 0.25))}`.
A loss carries its own (`raymed.losses`). `distribution()` and `suggest()` hand a dimension to Optuna; `parse()` reads
one from the command line.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from raymed.config import UserError

if TYPE_CHECKING:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import BaseTrial

Option = float | int | str | bool | None


@dataclass(frozen=True)
class Float:
    """A real number in [low, high]; with log=True sampled evenly in its logarithm (low > 0)."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, self.log)

    def contains(self, value: Any) -> bool:
        """Whether value is a number within the bounds, both included."""
        return _is_number(value) and self.low <= value <= self.high

    def distribution(self) -> "FloatDistribution":
        """The same range for `optuna.Study.ask`."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log)

    def suggest(self, trial: "BaseTrial", name: str) -> float:
        """The trial's value of this dimension."""
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Int:
    """A whole number in [low, high]; with log=True sampled evenly in its logarithm (low > 0)."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, self.log)
        if not (isinstance(self.low, int) and isinstance(self.high, int)):
            raise UserError(f"bounds of an integer range must be whole numbers, got {self.low} and {self.high}")

    def contains(self, value: Any) -> bool:
        """Whether value is a whole number within the bounds, both included."""
        return _is_number(value) and isinstance(value, Integral) and self.low <= int(value) <= self.high

    def distribution(self) -> "IntDistribution":
        """The same range for `optuna.Study.ask`."""
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high, log=self.log)

    def suggest(self, trial: "BaseTrial", name: str) -> int:
        """The trial's value of this dimension."""
        return trial.suggest_int(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Choice:
    """One of a few options, without order: numbers, strings, booleans or None."""

    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if not (isinstance(self.options, tuple) and self.options):
            raise UserError(f"the options of a choice must be a tuple of at least one, got {self.options!r}")
        if len(set(self.options)) < len(self.options):
            raise UserError(f"the options of a choice must differ, got {self.options}")

    def contains(self, value: Any) -> bool:
        """Whether value is one of the options."""
        return value in self.options

    def distribution(self) -> "CategoricalDistribution":
        """The same options for `optuna.Study.ask`."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.options)

    def suggest(self, trial: "BaseTrial", name: str) -> Option:
        """The trial's value of this dimension."""
        return trial.suggest_categorical(name, self.options)


Dimension = Float | Int | Choice
Space = dict[str, Dimension]

_FORMS = "0..8 (real), 1e-4..1e-1:log (real, logarithmic), 1..5:int (whole) or none|0.25|0.5 (one of these)"
_WORDS: dict[str, Option] = {"none": None, "true": True, "false": False}


def parse(text: str) -> Dimension:
    """A dimension from the command line.

    "0..8" and "1e-4..1e-1:log" are `Float`; "1..5:int", "int 1..5" and "1..64:int:log" are `Int`; "a|b|c" is `Choice`,
    in which numbers, none, true and false are read as such. Raises UserError with the text and the forms expected.
    """
    try:
        return _parse_choice(text) if "|" in text else _parse_range(text)
    except UserError as error:
        raise UserError(f"search range {text!r}: {error}") from None
    except ValueError:
        raise UserError(f"cannot read the search range {text!r}: expected {_FORMS}") from None


def _parse_choice(text: str) -> Choice:
    return Choice(tuple(_parse_option(item.strip()) for item in text.split("|")))


def _parse_option(text: str) -> Option:
    if not text:
        raise ValueError("an option is empty")
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _parse_range(text: str) -> Float | Int:
    bounds, *kinds = text.split(":")
    bounds = bounds.strip()
    if bounds.startswith("int "):
        bounds, kinds = bounds.removeprefix("int "), [*kinds, "int"]
    if not {"int", "log"} >= set(kinds):
        raise ValueError(f"{kinds} must be int or log")
    low, high = bounds.split("..", 1)
    if "int" in kinds:
        return Int(int(low), int(high), log="log" in kinds)
    return Float(float(low), float(high), log="log" in kinds)


def _check_bounds(low: float, high: float, log: bool) -> None:
    if not (_is_number(low) and _is_number(high) and low < high and math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"low must be below high, both finite numbers, got {low} and {high}")
    if log and low <= 0:
        raise UserError(f"a logarithmic range needs low > 0, got {low}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
