"""A contrastive loss over the global batch, on two and three gloo processes under every engine, against one process:
weights after some steps of SGD (Adam would hide a wrong scale) with micro-batches, clipping, augmentation, captions
drawn anew every step and a learned temperature. Workers have other images, hence unequal data."""

from pathlib import Path

import pytest
import torch
from captioned_images import clip_recipe, load_captioned, write_captioned_images
from small import join_group
from tiny_clip import write_tiny_clip

from raymed.config import replace
from raymed.distributed import leave_group
from raymed.tasks import texts
from raymed.train.checkpoints.checkpoint import load_weights
from raymed.train.compute import Compute
from raymed.train.loop import Fit

COMPUTES = {"torch": Compute(engine="torch")} | {
    f"zero{stage}": Compute(engine="deepspeed", zero_stage=stage) for stage in range(4)
}
OTHERS = ("info_nce", "siglip", "dcl", "hn_nce")
RUNS = {
    2: [*(f"{engine}-dhn_nce" for engine in COMPUTES), *(f"torch-{m}" for m in OTHERS)],
    3: ["torch-dhn_nce", "zero2-info_nce", "zero3-siglip"],
}


def train(manifest: Path, folder: Path, run: str) -> None:
    """A run ENGINE-METHOD in a folder."""
    engine, method = run.split("-")
    changes = {"method": method, "learn_temperature": True, "stage.accumulate": 2, "stage.evaluations": 1}
    recipe = replace(clip_recipe(manifest), changes | {"model.name": f"local-dir:{manifest.parent / 'tiny'}"})
    data = load_captioned(recipe)
    list(Fit(recipe.phases(data), data, folder / run, 3, COMPUTES[engine]).run())


def worker(rank: int, world: int, manifest: str, folder: str) -> None:
    """One of several processes: all runs, one after the other. Texts go in as many parts as a micro-batch has."""
    texts._FEWEST = 1
    join_group(rank, world, Path(folder))
    for run in RUNS[world]:
        train(Path(manifest), Path(folder), run)
    leave_group()


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    (last,) = (folder / run / "checkpoints" / "clip").glob("step-*")
    return load_weights(last)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    manifest = write_captioned_images(tmp_path_factory.mktemp("captioned"))
    write_tiny_clip(manifest.parent / "tiny")
    load_captioned(clip_recipe(manifest))  # decoded once, not by two workers at a time
    return manifest


@pytest.fixture(scope="module")
def alone(manifest, tmp_path_factory):
    """One process in plain torch, every loss."""
    folder = tmp_path_factory.mktemp("alone")
    for method in ("info_nce", "siglip", "dcl", "hn_nce", "dhn_nce"):
        train(manifest, folder, f"torch-{method}")
    return folder


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=lambda world: f"{world} workers"
)
def together(request, manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"workers{request.param}")
    torch.multiprocessing.spawn(worker, args=(request.param, str(manifest), str(folder)), nprocs=request.param)
    return request.param, folder


def test_weights_are_those_of_one_process(alone, together):
    world, folder = together
    start = {name: None for name in weights(alone, "torch-dhn_nce")}
    assert {"clip.log_scale", "clip.bias"} <= start.keys()
    for run in RUNS[world]:
        expected, found = weights(alone, f"torch-{run.split('-')[1]}"), weights(folder, run)
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=2e-6, msg=lambda found, at=f"{run}: {name}": f"{at}: {found}"
            )
