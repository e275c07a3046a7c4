"""A set of images in a bucket is the same set as on a disk."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raymed.config import UserError
from raymed.data import cache
from raymed.data.dataset import load
from raymed.data.locations import fetch
from raymed.data.manifest import DataConfig
from raymed.storage import working_copy

LABELS = ["sick", "well", "well"] * 8
SPLIT = (["train"] * 3 + ["val"] * 3 + ["test"] * 3 + ["train"] * 3) * 2


@pytest.fixture
def upload(s3):
    """upload(folder, prefix): every file of a folder to the bucket, without raymed."""

    def up(folder, prefix="set"):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                s3.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())

    return up


@pytest.fixture
def load_set(tmp_path_factory):
    """load_set(manifest, **fields): a data set; decoded images of one test are kept together."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda path, **fields: load(DataConfig(**{"manifest": str(path), "positive": "sick"} | fields), cache)


def fetched(s3) -> list[str]:
    """Names of the files in the read cache."""
    return sorted(path.name for path in (s3.local / "read").rglob("*") if path.is_file())


def same(one, other):
    assert one.fingerprint == other.fingerprint and one.preprocess == other.preprocess and one.notes == other.notes
    np.testing.assert_array_equal(one.content, other.content)
    every = np.arange(len(one))
    assert one.batch(every).image.equal(other.batch(every).image)


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_a_set_in_a_bucket_is_that_on_the_disk(make_set, load_set, upload, s3, tmp_path, kind):
    path = make_set(LABELS, split=SPLIT, patient=[f"{i:03d}" for i in range(24)])
    table = pd.read_csv(path, dtype=str)
    path = path.with_suffix(f".{kind}")
    table.to_parquet(path) if kind == "parquet" else table.to_csv(path, index=False, sep=",\t"[kind == "tsv"])
    upload(tmp_path)
    here, there = load_set(path), load_set(f"{s3.url}/set/manifest.{kind}")
    same(here, there)
    assert len(fetched(s3)) == 25 and here.pixels_path != there.pixels_path

    shutil.rmtree(s3.local / "read")
    again = load_set(f"{s3.url}/set/manifest.{kind}")
    assert fetched(s3) == [f"manifest.{kind}"], "what is decoded is not fetched again"
    same(again, there)

    Image.fromarray(np.eye(16, dtype=np.uint8)).save(tmp_path / "003.png")
    s3.put("set/003.png", (tmp_path / "003.png").read_bytes())
    changed = load_set(f"{s3.url}/set/manifest.{kind}")
    assert changed.batch(np.array([3])).image[0, 0].equal(load_set(path).batch(np.array([3])).image[0, 0])
    assert changed.fingerprint != there.fingerprint


def test_root_and_addresses(make_set, load_set, upload, s3, tmp_path):
    """Images below another folder, named with their address, or here while the manifest is there."""
    path = make_set(LABELS, split=SPLIT)
    here = load_set(path)
    upload(tmp_path, "images")
    table = path.read_text()
    s3.put("tables/m.csv", table.encode())
    same(here, load_set(f"{s3.url}/tables/m.csv", root=f"{s3.url}/images/"))
    same(here, load_set(path, root=f"{s3.url}/images"))
    same(here, load_set(f"{s3.url}/tables/m.csv", root=str(tmp_path)))
    mixed = table.replace("003.png", f"{s3.url}/images/003.png").replace("004.png", str(tmp_path / "004.png"))
    s3.put("images/mixed.csv", mixed.encode())
    same(here, load_set(f"{s3.url}/images/mixed.csv"))


def test_masks(make_set, load_set, upload, s3, tmp_path):
    lesion = np.zeros((16, 16), np.uint8)
    lesion[4:9, 2:5] = 255
    Image.fromarray(lesion).save(tmp_path / "mask.png")
    masks = ["mask.png", f"{s3.url}/set/mask.png"] + [""] * 22
    path = make_set(LABELS, split=SPLIT, mask=masks)
    upload(tmp_path)
    data = load_set(f"{s3.url}/set/manifest.csv")
    regions = data.regions(np.arange(3))
    np.testing.assert_array_equal(regions[0], lesion > 0)
    np.testing.assert_array_equal(regions[1], lesion > 0)
    assert regions[2] is None and data.fingerprint == load_set(path).fingerprint

    missing = path.read_text().replace("set/mask.png", "set/none.png")
    s3.put("set/wrong.csv", missing.encode())
    with pytest.raises(UserError, match=rf"row 2: the mask {s3.url}/set/none.png: no image at {s3.url}/set/none.png"):
        load_set(f"{s3.url}/set/wrong.csv")


def test_what_is_missing_is_a_problem_of_its_row(make_set, load_set, upload, s3, tmp_path):
    make_set(LABELS, split=SPLIT)
    (tmp_path / "016.png").unlink()
    (tmp_path / "005.png").write_text("no image")
    upload(tmp_path)
    manifest = f"{s3.url}/set/manifest.csv"
    with pytest.raises(UserError) as info:
        load_set(manifest)
    said = str(info.value)
    assert f"row 17: 016.png: no image at {s3.url}/set/016.png" in said and "row 6: 005.png: not an image" in said
    skipped = load_set(manifest, on_problem="skip")
    assert len(skipped) == 22 and "left out, unreadable image: 2 rows (6, 17)" in skipped.notes
    Image.fromarray(np.eye(16, dtype=np.uint8)).save(tmp_path / "016.png")
    s3.put("set/016.png", (tmp_path / "016.png").read_bytes())
    assert len(load_set(manifest, on_problem="skip")) == 23, "it is looked for again"


def test_no_manifest_and_no_images(load_set, upload, s3, make_set, tmp_path):
    with pytest.raises(UserError, match=f"data.manifest: there is no object {s3.url}/set/manifest.csv"):
        load_set(f"{s3.url}/set/manifest.csv")
    s3.put("set/manifest.csv", make_set(LABELS, split=SPLIT).read_bytes())
    with pytest.raises(UserError, match=rf"not one of 24 images can be read; the first: no image at {s3.url}/set/000"):
        load_set(f"{s3.url}/set/manifest.csv")


def test_a_bucket_that_cannot_be_read_is_no_problem_of_a_row(make_set, load_set, upload, s3, tmp_path, monkeypatch):
    """Nothing is noted as missing that is only out of reach."""
    make_set(LABELS, split=SPLIT)
    upload(tmp_path)
    monkeypatch.setenv("RAYMED_S3_PATIENCE", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(UserError) as info:
        load_set(f"{s3.url}/set/manifest.csv", on_problem="skip")
    assert "row" not in str(info.value) and "127.0.0.1:1" in str(info.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert len(load_set(f"{s3.url}/set/manifest.csv")) == 24


def test_what_another_process_evicts_meanwhile_is_fetched_again(make_set, load_set, upload, s3, tmp_path, monkeypatch):
    """The read cache is smaller than the set: a copy is gone before it is read."""
    path = make_set(LABELS, split=SPLIT)
    upload(tmp_path)

    def evicted(locations):
        copies = fetch(locations)
        for copy in list(copies.values())[::2] if len(copies) > 1 else []:
            shutil.rmtree(copy.parent)
        return copies

    monkeypatch.setattr(cache, "fetch", evicted)
    same(load_set(path), load_set(f"{s3.url}/set/manifest.csv"))


def test_an_archive_in_a_bucket(load_set, s3, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, num in (("train", 12), ("val", 6), ("test", 6)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (num, 28, 28), np.uint8)
        arrays[f"{split}_labels"] = np.arange(num)[:, None] % 2
    np.savez(tmp_path / "breastmnist.npz", **arrays)
    s3.put("set/breastmnist.npz", (tmp_path / "breastmnist.npz").read_bytes())
    here = load_set(tmp_path / "breastmnist.npz", positive="malignant")
    there = load_set(f"{s3.url}/set/breastmnist.npz", positive="malignant")
    same(here, there)
    assert there.classes == ("malignant", "normal, benign")


def test_a_set_in_a_working_copy_comes_from_its_bucket(make_set, load_set, upload, s3, tmp_path):
    """Another node wrote it; here is nothing."""
    path = make_set(LABELS, split=SPLIT)
    upload(tmp_path, "storage/phantoms")
    manifest = working_copy(f"{s3.url}/storage") / "phantoms" / "manifest.csv"
    assert not Path(manifest).exists()
    same(load_set(path), load_set(manifest))
    assert (manifest.parent / "023.png").read_bytes() == (tmp_path / "023.png").read_bytes()
