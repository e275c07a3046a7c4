"""A data set, a recipe and a fit that train in a second: shared by the tests of this folder and their processes."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from raymed.config import replace
from raymed.data.dataset import DataSet, load
from raymed.data.manifest import DataConfig
from raymed.tasks.classifier import ClassifierRecipe, ContrastiveStage, Stage
from raymed.tasks.task import Optim
from raymed.tracking.outbox import Outbox
from raymed.train.compute import Compute
from raymed.train.loop import Fit
from raymed.train.timing import TIME
from raymed.train.unit import Unit

OPTIM = Optim(lr=2e-3, weight_decay=0.05, schedule="one_cycle", clip=0.5)
RECIPE = ClassifierRecipe(
    method="supcon_asl",
    supcon=ContrastiveStage(steps=12, batch_size=12, accumulate=2, evaluations=3, optim=OPTIM, ema_decay=0.9),
    single=Stage(steps=12, batch_size=12, accumulate=2, evaluations=3, optim=OPTIM, ema_decay=0.9),
    head=Stage(steps=12, batch_size=12, accumulate=2, evaluations=4, optim=Optim(lr=1e-2, clip=0.05), ema_decay=0.9),
)
"""Two phases with everything switched on: averages, accumulation, one-cycle schedule, clipping."""


def write_images(folder: Path, patients: int = 48) -> Path:
    """Two 16 x 16 images a patient; those of every fourth have a bright patch. Returns the manifest's path."""
    rng = np.random.default_rng(7)
    rows = []
    for patient in range(patients):
        for view in range(2):
            pixels = rng.normal(90, 35, (16, 16))
            if patient % 4 == 0:
                top, left = rng.integers(1, 9, 2)
                pixels[top : top + 6, left : left + 6] += 50
            name = f"{patient:02d}{view}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
            rows.append({"image": name, "label": "patch" if patient % 4 == 0 else "plain", "patient": patient})
    pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)
    return folder / "manifest.csv"


def recipe(manifest: Path, **changes) -> ClassifierRecipe:
    """RECIPE on these images; changes by dotted name, with "__" for the dot."""
    data = DataConfig(manifest=str(manifest), positive="patch", deidentified=True)
    return replace(RECIPE, {"data": data} | {name.replace("__", "."): value for name, value in changes.items()})


def load_data(recipe: ClassifierRecipe) -> DataSet:
    """The data set, decoded beside its manifest."""
    return load(recipe.data, Path(recipe.data.manifest).parent / "cache")


def make_fit(recipe: ClassifierRecipe, folder: Path, compute: Compute | None = None, data=None, **more) -> Fit:
    """A fit of the recipe, with its outbox in the same folder."""
    data = data or load_data(recipe)
    return Fit(recipe.phases(data), data, folder, 3, compute or Compute(), Outbox(folder / "outbox.jsonl"), **more)


def curve(folder: Path) -> list[tuple[int, dict]]:
    """(step, values) of every metrics record that counts, but for those of the clock."""
    records = [r for r in Outbox(folder / "outbox.jsonl").records() if r["op"] == "metrics"]
    return [(r["step"], r["values"]) for r in records if not any(name.startswith(TIME) for name in r["values"])]


def make_unit(recipe: ClassifierRecipe, folder: Path, **more) -> Unit:
    """A unit of the recipe."""
    cache = Path(recipe.data.manifest).parent / "cache"
    return Unit(recipe=recipe, seed=3, folder=folder, key="run/unit", name="unit", parent="run", cache=cache, **more)


def join_group(rank: int, world: int, folder: Path) -> None:
    """This process becomes one of a gloo group, with a thread of its own, that meets in a file of this folder."""
    import deepspeed  # noqa: F401 # before there is a group, see raymed.distributed

    torch.set_num_threads(1)
    meeting = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
