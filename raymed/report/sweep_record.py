"""What a sweep did and found, as plain data, and the words for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from raymed.report.tables import label, number
from raymed.space import Dimension


class Trial(TypedDict):
    """One configuration of a sweep."""

    number: int
    params: dict[str, Any]  # dotted name -> value, of the whole space
    value: float | None  # mean over seeds at the last evaluation it reached
    status: Literal["finished", "stopped", "failed", "running"]
    rungs: dict[int, float]  # evaluation -> mean over seeds
    per_seed: list[float]  # in the order of the search seeds


Space = Mapping[str, Dimension]


@dataclass(frozen=True)
class SearchRecord:
    """What a search did and found."""

    metric: str
    mode: str  # "max" or "min"
    baseline: str
    chosen: str
    trial_of: Mapping[str, int]  # method -> number of its trial
    trials: Sequence[Trial]
    space: Space
    num_configurations: int
    num_generations: int
    generation_size: int | None  # None: suggested one by one
    search_seeds: Sequence[int]

    @property
    def objective(self) -> str:
        """What the search looked at, in words."""
        return f"validation {label(self.metric)}"


@dataclass(frozen=True)
class SweepRecord(SearchRecord):
    """What a sweep did and found. Methods are the baseline and the finalists, in the order in which they are shown."""

    title: str
    command: str  # repeats the sweep
    figures: Mapping[str, Mapping[str, Mapping[str, Any]]]  # method -> "val" or "test" -> metric -> Figure
    predictions: Mapping[str, Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]]  # -> (scores, targets) per seed
    thresholds: Mapping[str, Sequence[float]]  # method -> one a seed
    verdicts: Mapping[str, Mapping[str, Mapping[str, Any]]]  # "val" or "test" -> finalist -> Verdict
    sentence: str  # whether the sweep gained anything above seed noise
    num_test_openings: int  # this one included
    final_seeds: Sequence[int]
    data: str  # summary of the data set, in words
    positive: str
    negative: str = "other"
    config: Any = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    inside: Mapping[str, Mapping[str, Any]] | None = None  # method -> "box_alignment", "concept_count" -> Figure
    heat_maps: Sequence[tuple[Path, str]] = ()  # PNG, caption
    pictures: Sequence[tuple[Path, str]] = ()  # others, such as training curves
    notes: Sequence[str] = ()

    @property
    def finalists(self) -> list[str]:
        """Methods other than the baseline."""
        return [method for method in self.figures if method != self.baseline]


def finished(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that reached the last evaluation with a finite value."""
    return [trial for trial in trials if trial["status"] == "finished" and math.isfinite(number(trial["value"]))]


def stopped(trials: Sequence[Trial]) -> list[Trial]:
    """Trials cut at a rung, with a finite value."""
    return [trial for trial in trials if trial["status"] == "stopped" and math.isfinite(number(trial["value"]))]


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Dotted name -> the shortest end of it that no other name shares."""

    def ends(name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[start:]) for start in reversed(range(len(parts)))]

    return {name: next(e for e in ends(name) if sum(e in ends(other) for other in names) == 1) for name in names}


def per_seed(trials: Sequence[Trial], num_seeds: int) -> np.ndarray:
    """(T, S) values of T trials; a trial without them counts with its mean."""
    rows = [trial["per_seed"] or [trial["value"]] * num_seeds for trial in trials]
    return np.array([[number(value) for value in row] for row in rows], float).reshape(len(trials), num_seeds)


def count(count: int, noun: str) -> str:
    """1 seed, 2 seeds."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def were(count: int) -> str:
    """Its verb."""
    return "was" if count == 1 else "were"


def listed(items: Sequence[Any]) -> str:
    """1, 2, 3."""
    return ", ".join(map(str, items))
