"""A CLIP that is to replace another: on images and captions that follow one of two models that were never trained."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from clip_bundles import PREPROCESS, clip_bundle
from PIL import Image
from scipy.optimize import linear_sum_assignment

from raymed.bundle import Bundle
from raymed.data.captions import CaptionConfig
from raymed.registry.audit import Audit
from raymed.registry.card import write_card
from raymed.registry.register import add
from raymed.tasks.embedder import Embedder
from raymed.tasks.external import load_pairs

NUM = 40
FINDINGS = ("a nodule", "two large masses", "calcification", "no finding at all", "a fracture")
PLACES = ("in the left lung", "of the brain", "on the right side", "behind the heart")


def picture(i: int) -> np.ndarray:
    """Waves, bright in one corner or another."""
    random = np.random.default_rng(i)
    waves = np.add.outer(*(np.sin(np.linspace(0, random.uniform(2, 20), 32) + random.uniform(0, 6)) for _ in range(2)))
    return (128 + 60 * waves * random.uniform(0.2, 1)).clip(0, 255).astype(np.uint8)


def small_clip(seed: int) -> Bundle:
    """Weights drawn from a seed; it says that it has seen nobody."""
    bundle = clip_bundle()
    random = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(w.shape, generator=random) * w.std() + w.mean() if w.ndim > 1 else w
        for name, w in bundle.weights.items()
    }
    made = {"run_key": "tune-1/final", "seed": seed, "data": "d" * 64}
    return replace(bundle, weights=weights, provenance=made, extras={"trained_on": torch.zeros(0, dtype=torch.int64)})


@pytest.fixture(scope="module")
def good() -> Bundle:
    return small_clip(1)


@pytest.fixture(scope="module")
def manifest(good, tmp_path_factory) -> Path:
    """Each image has the caption that the good model finds for it, each caption once."""
    folder, images = tmp_path_factory.mktemp("pairs"), [picture(i) for i in range(NUM)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    texts = [f"{finding} {place}, seen {how}" for finding in FINDINGS for place in PLACES for how in ("once", "twice")]
    embedder = Embedder.from_bundle(good)
    cosines = embedder.embed_images(images) @ embedder.embed_texts(texts).T
    _, chosen = linear_sum_assignment(-(cosines - cosines.mean(0)) / cosines.std(0))
    table = {"image": [f"{i}.png" for i in range(NUM)], "report": [texts[k] for k in chosen]}
    pd.DataFrame(table | {"patient": [f"P{i}" for i in range(NUM)]}).to_csv(folder / "pairs.csv", index=False)
    return folder / "pairs.csv"


@pytest.fixture
def registered(client, tmp_path):
    """register(a bundle) -> number of the version of m."""

    def register(bundle: Bundle) -> int:
        folder = bundle.save(tmp_path / f"bundle{bundle.provenance['seed']}")
        write_card(folder, "m")
        return add(client, folder, "m").version

    return register


def test_only_a_clip_that_finds_as_many_becomes_champion(registered, client, command, good, manifest, place):
    def promoted(*flags):
        return command(["--model", "m", "--intended-use", "search", "--gate.slower", "50", *flags])

    on_pairs = ("--gate.manifest", str(manifest), "--gate.caption", "report")
    registered(small_clip(7))
    assert promoted(*on_pairs)[0] == 0
    registered(good)
    code, _, error = promoted()
    assert code == 2 and "latency: passed" in error and "not compared" in error
    code, out, error = promoted(*on_pairs)
    assert code == 0 and "mean recall: passed" in out, error
    registered(small_clip(8))
    code, _, error = promoted(*on_pairs)
    assert code == 2 and "mean recall: not passed" in error
    assert client.get_registered_model("m").aliases == {"candidate": 3, "champion": 2, "rollback": 1}
    gate = Audit(place["storage"]).entries("m")[-1]["gates"][-1]
    assert gate["figures"]["ci_high"] < 0 and gate["name"] == "mean recall"
    (summary, *_) = place["storage"].glob("runs/compare_clips-*/summary.json")
    told = json.loads(summary.read_text())
    assert told["test_openings"] in (1, 2) and told["differences"]["mean_recall"]["num_patients"] == NUM


def test_what_no_images_can_tell_is_not_passed(registered, client, command, good, manifest):
    flags = ["--model", "m", "--intended-use", "search", "--gate.slower", "50", "--gate.manifest", str(manifest)]
    registered(good)
    assert command(flags)[0] == 0
    registered(replace(small_clip(7), extras={}))
    code, _, error = command(flags)
    assert code == 2 and "comparison: not passed" in error and "column" in error
    code, _, error = command([*flags, "--gate.caption", "report"])
    assert code == 2 and "the first model does not say what it was trained on" in error
    assert client.get_registered_model("m").aliases["champion"] == 1


def test_every_pair_is_one_to_test_on(manifest, tmp_path):
    table = pd.read_csv(manifest).assign(split=["train", "test"] * (NUM // 2))
    table.to_csv(manifest.with_name("split.csv"), index=False)
    config = CaptionConfig(str(manifest.with_name("split.csv")), caption=("report",), preprocess=PREPROCESS)
    data = load_pairs(config, tmp_path)
    assert data.splits.keys() == {"test"} and len(data.splits["test"]) == NUM
