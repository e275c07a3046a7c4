"""What a sweep is: how many configurations, over which space, and how the best are tested afterwards.

The recipe brings its search space, which is its loss's; the user adds to it or narrows it.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raymed.config import UserError, check_choice, check_range, flatten, replace
from raymed.space import Choice, Space, parse
from raymed.tasks.recipe import Recipe


@dataclass(frozen=True)
class SweepConfig:
    """How many configurations are tried, and how they are chosen."""

    num_trials: int = 96
    """The first is the recipe as it stands."""
    generation: int = 32
    """Heads that are asked for, trained and cut together, as one program."""
    batched: bool = True
    """Train the heads of two-stage methods so; False, and with one-stage methods: Ray Tune trials, one by one."""
    metric: str = "auprc"
    """Validation metric to optimise: auroc, auprc, accuracy_at_0.5, brier or ece of a classifier, mean_recall,
    i2t_recall_1, ... of a CLIP."""
    space: tuple[str, ...] = ()
    """Further dimensions, or others for the loss's own: "head.optim.lr=1e-3..1e-1:log", "losses.asl.clip=0|0.05"."""
    grace: int = 2
    """Evaluations before a trial may be stopped early."""
    reduction: int = 3
    """ASHA keeps one in so many at each rung."""
    at_once: int | None = None
    """Ray Tune trials side by side; None = as many as the cluster has room for."""
    seed: int = 0
    """Of the suggestions."""

    def __post_init__(self) -> None:
        check_range("sweep.num_trials", self.num_trials, 1)
        if self.at_once is not None:
            check_range("sweep.at_once", self.at_once, 1)
        check_range("sweep.generation", self.generation, 1)
        check_range("sweep.grace", self.grace, 1)
        check_range("sweep.reduction", self.reduction, 2)
        for entry in self.space:
            if "=" not in entry:
                raise UserError(f"sweep.space must be NAME=RANGE such as head.optim.lr=1e-3..1e-1:log, got {entry!r}")


@dataclass(frozen=True)
class FinalSeeds:
    """What the best configurations are trained on again: seeds that chose nothing."""

    seeds: tuple[int, ...] = (3001, 3002, 3003, 3004, 3005)
    """None of the search; with fewer than five the verdict is "cannot tell". Five find a gain of two standard
    deviations over seeds where heads share their seed's encoder; one-stage methods, which share nothing, want ten."""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < max(1, len(self.seeds)):
            raise UserError(f"finals.seeds must be different seeds, at least one, got {self.seeds}")


@dataclass(frozen=True)
class Finals(FinalSeeds):
    """The best configurations of a sweep, and the recipe as it stands, trained again on seeds that chose nothing."""

    finalists: int = 3
    """Configurations beside the default, by validation; the significance level is shared among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("finals.finalists", self.finalists, 1)


def search_space(recipe: Recipe, sweep: SweepConfig) -> Space:
    """Field of the recipe -> dimension: the recipe's own space, and what the user adds.

    Raises UserError for a field that does not exist or changes nothing, and for values that the field cannot have.
    """
    space = dict(recipe.space)
    for entry in sweep.space:
        name, _, text = entry.partition("=")
        _check_has_effect(recipe, name)
        space[name] = dimension = parse(text)
        for value in dimension.options if isinstance(dimension, Choice) else (dimension.low, dimension.high):
            replace(recipe, {name: value})
    if not space:
        raise UserError(f"the loss of {recipe.label} has nothing to sweep: add --sweep.space NAME=RANGE")
    return space


def _check_has_effect(recipe: Recipe, name: str) -> None:
    _field(recipe, name)
    if not name.startswith(recipe.swept):
        useful = " or ".join(recipe.swept)
        raise UserError(f"sweep.space: {name} changes nothing in a trial of {recipe.label}: sweep fields of {useful}")


def _field(recipe: Any, name: str) -> Any:
    fields = flatten(recipe)
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"sweep.space: the recipe has no field {name!r}{hint}")
    return fields[name]


def default_params(recipe: Recipe, space: Space) -> dict[str, Any]:
    """What the recipe as it stands has in place of a suggestion."""
    return {name: _field(recipe, name) for name in space}


def check_sweep(recipe: Recipe, sweep: SweepConfig, seeds: Sequence[int], finals: FinalSeeds) -> None:
    """Raise UserError for a sweep that cannot be, before anything starts."""
    check_choice("sweep.metric", sweep.metric, recipe.metrics)
    space = search_space(recipe, sweep)
    asked = space.get("head.optim.name", Choice((recipe.stage.optim.name,)))
    if sweep.batched and recipe.two_stage and asked.contains("sgd"):
        raise UserError("heads are trained together by adamw only, and head.optim.name is sgd: add --sweep.no-batched")
    check_range("sweep.grace", sweep.grace, 1, recipe.stage.evaluations)
    if len(set(seeds)) < max(1, len(seeds)):
        raise UserError(f"seeds must be different, at least one, got {seeds}")
    if used := set(seeds) & set(finals.seeds):
        raise UserError(f"finals.seeds must not be seeds of the search, got {sorted(used)} in both")
