"""A fair contest of contrastive losses: does DHN-NCE retrieve better than a tuned InfoNCE?

    python jobs/tune_dhn_nce.py                                          # captioned digital phantoms
    python jobs/tune_dhn_nce.py --data.manifest scans.csv --data.caption report --model.name local-dir:BiomedCLIP
    python jobs/tune_dhn_nce.py --compared info_nce siglip --sweep.num-trials 24
    python jobs/tune_dhn_nce.py --compute.workers 4                      # trials one after the other, each on 4 workers

Every loss has a search of its own with as many trials (temperature, learning rate, and beta1 and beta2 where it has
them). The best of each is trained again on fresh seeds, and so is DHN-NCE as it was published; all are judged against
the first. The report says which differences exceed noise, and the winner is registered. The same command continues a
contest that was stopped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raymed.registry.config import RegisterConfig
from raymed.registry.next_steps import tell_next_steps
from raymed.tasks.clip import ClipRecipe
from raymed.train.compute import Compute
from raymed.train.places.cluster import connected
from raymed.train.runs.job import RunConfig, main, open_job
from raymed.tune.config import FinalSeeds, SweepConfig
from raymed.tune.contest import check_contest, run_contest

PAPER = {"method": "dhn_nce", "losses.dhn_nce.beta1": 0.15, "losses.dhn_nce.beta2": 0.15}
PAPER |= {"losses.dhn_nce.temperature": 0.6, "learn_temperature": False}
"""Koleilat et al., "MedCLIP-SAMv2", 2024, section 4."""


@dataclass(frozen=True)
class TuneDhnNce:
    """A contest of losses over one data set."""

    recipe: Annotated[ClipRecipe, tyro.conf.arg(name="")] = ClipRecipe()
    compared: tuple[str, ...] = ("info_nce", "dcl", "hn_nce", "dhn_nce")
    """Losses, each with a search of its own; the first is what all others are judged against."""
    sweep: SweepConfig = SweepConfig(num_trials=20, metric="mean_recall", grace=5, reduction=2)
    seeds: tuple[int, ...] = (2023,)
    """Of the searches: every trial is trained with each of them, and scored by the mean."""
    finals: FinalSeeds = FinalSeeds()
    register: RegisterConfig = RegisterConfig()
    compute: Compute = Compute()
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()

    def __post_init__(self) -> None:
        check_contest(self.recipe, self.compared, self.sweep, self.seeds, self.finals)


def recipe() -> TuneDhnNce:
    """The defaults."""
    return TuneDhnNce()


def tune(config: TuneDhnNce) -> Path:
    """Searches, finals, report, model."""
    published = {"dhn_nce as published": PAPER} if "dhn_nce" in config.compared else {}
    with open_job("tune_dhn_nce", config) as job, connected():
        summary = run_contest(
            job, config.compared, config.sweep, config.seeds, config.finals, published, config.register
        )
    tell_next_steps(summary, config.register, config.run.storage, config.run.tracking)
    return summary


if __name__ == "__main__":
    main(recipe, tune)
