"""How much each hyper-parameter of a sweep matters, judged on finished trials, once a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from raymed.report.style import BLUE, figure
from raymed.report.sweep_record import Space, Trial, finished, per_seed, short_names

MIN_FOR_IMPORTANCE = 10  # finished trials; a forest on fewer tells the trials' noise


def importance(trials: Sequence[Trial], space: Space, num_seeds: int) -> dict[str, list[float]] | None:
    """{hyper-parameter: [share of each seed]}: fANOVA's share of the variance over finished trials, seed by seed.

    None where it would say nothing: fewer than 10 finished trials within the space, fewer than two hyper-parameters,
    or equal values.
    Source: Hutter et al., "An Efficient Approach for Assessing Hyperparameter Importance", ICML 2014.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    done = [t for t in finished(trials) if all(space[name].contains(t["params"][name]) for name in space)]
    table = per_seed(done, num_seeds)
    if len(done) < MIN_FOR_IMPORTANCE or len(space) < 2 or not (np.ptp(table, axis=0) > 0).all():  # nan is not > 0
        return None
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: dimension.distribution() for name, dimension in space.items()
    }
    shares: dict[str, list[float]] = {name: [] for name in space}
    for values in table.T:
        study = optuna.study.create_study(direction="maximize")
        study.add_trials(
            optuna.trial.create_trial(params=trial["params"], distributions=distributions, value=float(value))
            for trial, value in zip(done, values, strict=True)
        )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        for name, share in optuna.importance.get_param_importances(study, evaluator=evaluator).items():
            shares[name].append(float(share))
    return shares


def importance_figure(path: Path, shares: Mapping[str, Sequence[float]]) -> None:
    """Bars of `importance`, mean over seeds, with every seed as a dot."""
    names = short_names(list(shares))
    order = sorted(shares, key=lambda name: float(np.mean(shares[name])))
    with figure(path, 5.6, 0.75 + 0.38 * len(order)) as drawn:
        axes = drawn.subplots()
        means = [float(np.mean(shares[name])) for name in order]
        axes.barh(range(len(order)), means, 0.62, color=BLUE, alpha=0.35)
        for position, name in enumerate(order):
            seeds = list(shares[name])
            axes.scatter(seeds, [position] * len(seeds), s=14, color=BLUE, zorder=3)
            at = max(*seeds, means[position]), position
            axes.annotate(f"{means[position]:.2f}", at, (6, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set(xlabel="Share of the variance over finished trials (fANOVA)")
        axes.set_xlim(0, 1.12 * max(map(max, shares.values())) + 0.02)
        axes.set_yticks(range(len(order)), [names[name] for name in order], fontsize=9)
        axes.grid(axis="y", visible=False)
