"""A captioned data set and a recipe that train in seconds: shared by the tests of CLIP and their processes."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from raymed.config import replace
from raymed.data.augment import Augment
from raymed.data.captions import CaptionConfig, CaptionSet
from raymed.data.preprocess import Preprocess
from raymed.tasks.clip import ClipRecipe, ClipStage
from raymed.tasks.task import Optim

PLACES = ("upper left", "upper right", "lower left", "lower right")


def write_captioned_images(folder: Path, patients: int = 40) -> Path:
    """Two 16 x 16 images a patient with a bright or dark square in one quarter. Returns the manifest's path.

    Some captions are long, and every seventh image has but one.
    """
    rng = np.random.default_rng(5)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(2 * patients):
        place, tone = int(rng.integers(4)), ("bright", "dark")[int(rng.integers(2))]
        pixels = rng.normal(110, 15, (16, 16))
        top, left = 8 * (place // 2), 8 * (place % 2)
        pixels[top : top + 8, left : left + 8] += 90 if tone == "bright" else -90
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.png")
        caption = f"Image number {number} with a {tone} square in the {PLACES[place]} corner."
        second = f"In the {PLACES[place]} corner there is a square that is {tone}. " + "Nothing else is seen. " * (
            number % 5
        )
        rows.append({
            "image": f"{number:03d}.png", "patient": number // 2, "case": number // 2, "caption": caption,
            "caption_2": "" if number % 7 == 0 else second, "findings": tone,
            "split": ("train", "train", "train", "val", "test")[(number // 2) % 5],
        })  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)
    return folder / "manifest.csv"


def clip_recipe(manifest: Path, **changes) -> ClipRecipe:
    """The small model on these images; changes by dotted name, with "__" for the dot."""
    optim = Optim("sgd", lr=0.05, momentum=0.8, weight_decay=0.02, schedule="constant", warmup=0.0, clip=0.5)
    recipe = ClipRecipe(
        data=CaptionConfig(
            manifest=str(manifest),
            caption=("caption", "caption_2"),
            findings="findings",
            deidentified=True,
            preprocess=Preprocess(size=32),
        ),
        augment=Augment(flip=0.0),
        stage=ClipStage(steps=4, batch_size=12, evaluations=2, optim=optim),
    )
    return replace(recipe, {name.replace("__", "."): value for name, value in changes.items()})


def load_captioned(recipe: ClipRecipe) -> CaptionSet:
    """The data set, decoded beside its manifest."""
    return recipe.read(recipe.resolved_data, Path(recipe.data.manifest).parent / "cache")
