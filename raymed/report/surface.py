"""The surface that a sweep's metric makes over its hyper-parameters, as far as the trials can tell.

A Gaussian process (Matern 5/2, a length scale for each hyper-parameter, noise) is fitted to the values of the finished
trials. It is shown over two hyper-parameters, and over each of them alone with a 95 % band of the mean; the others are
held where the best trial has them. Nothing is shown where the process knows little more than before it saw a trial, and
nothing at all from fewer than MIN_FOR_SURFACE trials.

Source: Rasmussen and Williams, "Gaussian processes for machine learning", 2006, chapter 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raymed.report.axis import Axis, option_text
from raymed.report.page import Block, Picture, Text
from raymed.report.style import BLUE, ORANGE, VERMILION, figure
from raymed.report.sweep_record import Space, Trial, finished, listed, short_names
from raymed.report.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_FOR_SURFACE = 8
"""Finished trials; and at least two for each hyper-parameter."""
KNOWN = 0.75
"""Standard deviation of the mean, as a part of that before any trial, below which a place is known."""
REACH = 0.05
"""Of an axis, beyond the outermost trials: farther out is not known either."""
_SIDE = 61  # points of an axis


@dataclass(frozen=True)
class Surface:
    """A process fitted to trials; positions are those of `Axis`, from 0 to 1."""

    space: Space
    axes: dict[str, Axis]
    process: Any
    """scikit-learn's regressor on (T, hyper-parameters) positions."""
    at: np.ndarray
    """(T, hyper-parameters) positions of the trials."""
    values: np.ndarray
    """(T,)"""
    best: int
    """Which of the T trials is best."""
    best_trial: Trial

    def mean(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(P, hyper-parameters) places -> (P,) mean, its standard deviation, and where it is known."""
        mean, deviation = self.process.predict(places, return_std=True)
        kernel, scale = self.process.kernel_, float(np.std(self.values)) or 1.0
        signal, noise = kernel.k1.k1.constant_value, kernel.k2.noise_level  # in units of scale squared
        latent = np.sqrt(np.maximum((deviation / scale) ** 2 - noise, 0))
        reached = (places >= self.at.min(axis=0) - REACH) & (places <= self.at.max(axis=0) + REACH)
        return mean, latent * scale, (latent < KNOWN * np.sqrt(signal)) & reached.all(axis=1)

    def through_best(self, across: Sequence[str], positions: np.ndarray) -> np.ndarray:
        """(P, len(across)) positions of some hyper-parameters -> places, the others where the best trial has them."""
        places = np.repeat(self.at[self.best][None], len(positions), axis=0)
        places[:, [list(self.space).index(name) for name in across]] = positions
        return places


def fit_surface(trials: Sequence[Trial], space: Space, mode: str) -> Surface | None:
    """The surface of the finished trials within the space; None where they are too few, or all alike.

    mode: "max" or "min", which says what is best.
    """
    done = [t for t in finished(trials) if all(space[name].contains(t["params"].get(name)) for name in space)]
    values = np.array([number(trial["value"]) for trial in done])
    if len(done) < max(MIN_FOR_SURFACE, 2 * len(space)) or np.ptp(values) == 0:
        return None
    axes = {name: Axis(dimension, [t["params"][name] for t in done]) for name, dimension in space.items()}
    at = np.column_stack([axes[name].place([t["params"][name] for t in done]) for name in space])
    best = int(values.argmax() if mode == "max" else values.argmin())
    return Surface(space, axes, _fitted(at, values), at, values, best, done[best])


def surface_figure(path: Path, surface: Surface, across: Sequence[str], objective: str) -> None:
    """The surface over the first two of `across`, and a slice along each of them; of one, its slice alone."""
    names = short_names(list(surface.space))
    num_panels = len(across) + (len(across) == 2)
    with figure(path, max(3.6, 2.9 * num_panels), 3.3) as drawn:
        panels = drawn.subplots(1, num_panels, squeeze=False, width_ratios=[1.25, 1, 1] if num_panels == 3 else None)[0]
        panels[-1].sharey(panels[-len(across)])
        for axes, name in zip(panels[-len(across) :], across, strict=True):
            _slice(axes, surface, name)
            axes.set(title=f"Along {names[name]}", xlabel=names[name], xlim=(-0.03, 1.03))
            axes.set_xticks(*surface.axes[name].ticks())
        panels[-len(across)].set_ylabel(objective)
        if len(across) == 2:
            shown = _plane(panels[0], surface, across)
            panels[0].set(title="Over both", xlabel=names[across[0]], ylabel=names[across[1]])
            panels[0].set_xticks(*surface.axes[across[0]].ticks())
            panels[0].set_yticks(*surface.axes[across[1]].ticks())
            drawn.colorbar(shown, ax=panels[0], pad=0.02, fraction=0.05)
        entries = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        drawn.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=4)


def surface_block(
    path: Path, trials: Sequence[Trial], space: Space, across: Sequence[str], objective: str, mode: str
) -> Block:
    """The picture with its caption, or the sentence that says why there is none.

    Args:
        across: one or two hyper-parameters of the space, such as beta1 and the temperature; those not in it are left
            out.
        objective: what a trial's value is, in words. mode: "max" or "min".
    """
    across = [name for name in across if name in space]
    surface = fit_surface(trials, space, mode) if across else None
    if surface is None:
        needed = max(MIN_FOR_SURFACE, 2 * len(space))
        told = f"{len(finished(trials))} finished trials where {needed} that differ are needed"
        return Text(
            f"No surface is shown: {told}." if across else "No surface is shown: none was searched.", quiet=True
        )
    surface_figure(path, surface, across, objective)
    names = short_names(list(space))
    where = "over both as colours and along each" if len(across) == 2 else f"along {names[across[0]]}"
    others = [f"{names[n]} = {option_text(surface.best_trial['params'][n])}" for n in space if n not in across]
    held = f" with {listed(others)} as in the best trial" if others else ""
    caption = (
        f"What {len(surface.values)} finished trials say of {objective}: a Gaussian process{held}, {where} "
        "with the 95 % interval of its mean. Where the trials say little, nothing is drawn. Dots are "
        "trials" + (", which differ in the others too, so that they need not lie in a band." if others else ".")
    )
    return Picture(path, caption)


def _fitted(at: np.ndarray, values: np.ndarray) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    lengths: Any = np.full(at.shape[1], 0.5)  # one a hyper-parameter
    signal = ConstantKernel(1.0, (0.05, 20.0)) * Matern(lengths, (0.15, 3.0), nu=2.5)
    kernel = signal + WhiteKernel(0.1, (0.02, 2.0))  # few trials are not to be believed to the last digit
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=3, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound: a flat direction
        return process.fit(at, values)


def _slice(axes: Axes, surface: Surface, name: str) -> None:
    grid = np.linspace(0, 1, _SIDE)
    mean, deviation, known = surface.mean(surface.through_best([name], grid[:, None]))
    mean, deviation = np.where(known, mean, np.nan), np.where(known, deviation, np.nan)
    axes.fill_between(
        grid, mean - 1.96 * deviation, mean + 1.96 * deviation, color=ORANGE, alpha=0.25, linewidth=0, label="95 % band"
    )
    axes.plot(grid, mean, color=ORANGE, linewidth=2, label="mean")
    at = surface.at[:, list(surface.space).index(name)]
    axes.scatter(at, surface.values, s=18, color=BLUE, edgecolors="white", linewidths=0.6, label="trials", zorder=3)
    axes.scatter(at[surface.best], surface.values[surface.best], label="best trial", **_STAR)


def _plane(axes: Axes, surface: Surface, across: Sequence[str]) -> Any:
    side = np.linspace(0, 1, _SIDE)
    x, y = np.meshgrid(side, side)
    mean, _, known = surface.mean(surface.through_best(across, np.column_stack([x.ravel(), y.ravel()])))
    mean = np.ma.masked_array(mean.reshape(x.shape), ~known.reshape(x.shape))
    shown = axes.contourf(x, y, mean, levels=14, cmap="viridis")
    at = surface.at[:, [list(surface.space).index(name) for name in across]]
    axes.scatter(*at.T, s=18, color="white", edgecolors="black", linewidths=0.7, zorder=3)
    axes.scatter(*at[surface.best], **_STAR)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), facecolor="#EEEEEE")
    axes.grid(visible=False)
    return shown


_STAR: dict[str, Any] = {"marker": "*", "s": 130, "color": VERMILION, "edgecolors": "white", "zorder": 4}
