"""Train a CLIP on images and their captions, over one or several seeds.

    python jobs/train_clip.py                                                          # captioned digital phantoms
    python jobs/train_clip.py --data.manifest scans.csv --data.caption report --data.findings findings
    python jobs/train_clip.py --model.name local-dir:BiomedCLIP --compute.workers 4 --stage.accumulate 8
    python jobs/train_clip.py --control                                                # beside shuffled captions

The report says how well images find their captions and captions their images, what is told without a classifier
(zero-shot) and with a linear one, and how far a cosine can be trusted. With --control every seed is trained a second
time on captions that belong to other images: what that model reaches is chance.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raymed.config import replace
from raymed.registry.config import RegisterConfig
from raymed.registry.next_steps import tell_next_steps
from raymed.results.clip import report_trained
from raymed.tasks.clip import ClipRecipe
from raymed.tasks.prompts import Prompts
from raymed.train.compute import Compute
from raymed.train.places.launch import flat, run_one_by_one
from raymed.train.runs.job import RunConfig, main, open_job


@dataclass(frozen=True)
class TrainClip:
    """One recipe, one or several seeds."""

    recipe: Annotated[ClipRecipe, tyro.conf.arg(name="")] = ClipRecipe()
    seeds: tuple[int, ...] = (2023,)
    """Trainings that differ in their randomness only."""
    control: bool = False
    """Train every seed on shuffled captions too."""
    prompts: Prompts = Prompts()
    register: RegisterConfig = RegisterConfig()
    compute: Compute = Compute()
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()


def recipe() -> TrainClip:
    """The defaults."""
    return TrainClip()


def train(config: TrainClip) -> Path:
    """Train each seed, and its control, and report."""
    with open_job("train_clip", config) as job:
        method = config.recipe.method
        units = {method: [job.unit(f"seed-{seed}", seed) for seed in config.seeds]}
        if config.control:
            shuffled = replace(job.recipe, {"shuffled_captions": True})
            units["shuffled captions"] = [job.unit(f"control/seed-{s}", s, shuffled) for s in config.seeds]
        run_one_by_one(job, flat(units))
        summary = report_trained(job, units, config.prompts, config.register)
    tell_next_steps(summary, config.register, config.run.storage, config.run.tracking)
    return summary


if __name__ == "__main__":
    main(recipe, train)
