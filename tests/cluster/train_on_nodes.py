"""A driver: trains a small unit on the cluster of $RAY_ADDRESS, as a job does. Started by the tests of this folder.

    python train_on_nodes.py FOLDER '{"steps": 100, "workers": 2, ...}'

The images are in FOLDER/images and the unit in FOLDER/unit; at its end it says "finished" or "budget used up".
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

from small import make_unit, recipe, write_images  # noqa: E402

from raymed.tasks.classifier import Stage  # noqa: E402
from raymed.tasks.task import Optim  # noqa: E402
from raymed.train.compute import Compute  # noqa: E402
from raymed.train.places.cluster import connected  # noqa: E402
from raymed.train.places.ray_train import train_with_workers  # noqa: E402
from raymed.train.places.signals import stop_asked  # noqa: E402
from raymed.train.runs.budget import Budget  # noqa: E402
from raymed.train.unit import Unit, train_unit  # noqa: E402


def unit_in(folder: Path, steps: int, evaluations: int = 3, **compute) -> Unit:
    """One phase of so many steps with group normalisation, whose curve does not hang on the number of workers."""
    images = folder / "images"
    if not images.exists():
        images.mkdir(parents=True)
        write_images(images, patients=24)
    optim = Optim("sgd", lr=1e-2, clip=0.02)  # gentle: with more, the last bit of a sum grows a hundredfold
    stage = Stage(steps=steps, batch_size=16, accumulate=2, evaluations=evaluations, optim=optim)
    settled = recipe(images / "manifest.csv", method="asl", model__norm="group", single=stage)
    return make_unit(settled, folder / "unit", compute=Compute(threads=1, **compute))


def main(folder: Path, arguments: dict) -> None:
    unit = unit_in(folder, **arguments)
    if unit.compute.workers == 1:
        train_unit(unit)
        print("finished", flush=True)
        return
    with connected(), stop_asked() as interrupted:
        done = train_with_workers(unit, Budget.from_config(None, None, folder), interrupted)
    print("finished" if done else "budget used up", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
