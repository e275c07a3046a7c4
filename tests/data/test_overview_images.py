"""How images look, by hand; outliers and near-duplicates that were planted."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raymed.data import DataConfig, Preprocess, load, overview_images
from raymed.data.overview_images import Look, extremes, look, near_duplicates, odd_sizes
from raymed.data.phantoms import write_hsg


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Path of a manifest of 40 patients, two images each, and its table."""
    path = write_hsg(tmp_path_factory.mktemp("phantoms"), num_patients=40, size=64)
    table = pd.read_csv(path, dtype=str, keep_default_na=False).drop(columns="box")
    return path, table.assign(image=[str(path.parent / name) for name in table["image"]])


@pytest.fixture
def with_copies(phantoms, tmp_path):
    """with_copies({new patient: (row, change of float pixels in [0, 1])}) -> a data set with a copy for each."""

    def make(copies, **config):
        table = phantoms[1]
        added = []
        for patient, (row, change) in copies.items():
            pixels = np.asarray(Image.open(table["image"].iloc[row]), np.float64) / 255
            path = tmp_path / f"{patient}.png"
            Image.fromarray(np.round(change(pixels).clip(0, 1) * 255).astype(np.uint8)).save(path)
            added.append(table.iloc[row].to_dict() | {"image": str(path), "patient": patient, "case": patient})
        pd.concat([table, pd.DataFrame(added)]).to_csv(tmp_path / "manifest.csv", index=False)
        asked = {"manifest": str(tmp_path / "manifest.csv"), "positive": "occluded", "preprocess": Preprocess(size=64)}
        return load(DataConfig(**asked | config), tmp_path / "cache")

    return make


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(np.round(pixels * 255).astype(np.uint8)).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file), np.float64) / 255


def larger(pixels):
    image = Image.fromarray((pixels * 255).astype(np.uint8)).resize((150, 150), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float64) / 255


def test_brightness_and_contrast_leave_out_the_letterbox(make_set, tmp_path):
    wide, tall = np.full((8, 16), 51, np.uint8), np.full((16, 4), 102, np.uint8)
    wide[:, ::2], tall[::2] = 153, 0  # mean and deviation 0.4 and 0.2; 0.2 and 0.2
    path = make_set(["a", "b"] * 3, {0: wide, 1: tall}, split=["train", "train", "val", "val", "test", "test"])
    data = load(DataConfig(manifest=str(path), positive="a", preprocess=Preprocess(size=16)), tmp_path / "cache")
    found = look(data)
    assert found.brightness[:2] == pytest.approx([0.4, 0.2], abs=1e-6)
    assert found.contrast[:2] == pytest.approx([0.2, 0.2], abs=1e-6)
    assert found.heights[:3].tolist() == [8, 16, 16] and found.widths[:3].tolist() == [16, 4, 16]
    pixels = data.batch(np.array([5])).unit_image().double().numpy()
    assert found.brightness[5] == pytest.approx(pixels.mean(), abs=1e-6)
    assert found.contrast[5] == pytest.approx(pixels.std(), abs=1e-6)


def a_look(brightness=None, heights=None, widths=None, num=40):
    even, size = np.linspace(0.4, 0.6, num), np.full(num, 512)
    return Look(
        brightness=even if brightness is None else brightness,
        contrast=even,
        heights=size if heights is None else heights,
        widths=size if widths is None else widths,
        hashes=np.zeros(num, np.uint64),
    )


def test_extremes_are_ordered_and_outliers_counted():
    brightness = np.linspace(0.4, 0.6, 40)
    brightness[[7, 30]], brightness[11] = [0.02, 0.05], 0.99
    found = extremes(a_look(brightness), num=3)
    assert found["darkest"].indices.tolist() == [7, 30, 0] and found["darkest"].num_outlying == 2
    assert found["darkest"].values.tolist() == [0.02, 0.05, 0.4]
    assert found["brightest"].indices.tolist() == [11, 39, 38] and found["brightest"].num_outlying == 1
    assert found["lowest contrast"].indices.tolist() == [0, 1, 2] and found["lowest contrast"].num_outlying == 0


def test_outlying_is_a_modified_z_score_beyond_three_and_a_half():
    brightness = np.r_[np.tile([0.4, 0.5, 0.6], 13), 0.5]  # median 0.5, median deviation 0.1
    for value, num in ((0.5 - 0.1 * 3.4 / 0.6745 + 0.02, 0), (0.5 - 0.1 * 3.6 / 0.6745, 1)):
        assert extremes(a_look(np.r_[brightness[:-1], value]))["darkest"].num_outlying == num
    same = np.full(40, 0.5)
    assert extremes(a_look(same))["brightest"].num_outlying == 0
    same[3] = 0.51
    assert extremes(a_look(same))["brightest"].num_outlying == 1


def test_odd_sizes_by_proportion_and_by_side():
    heights, widths = np.full(40, 512), np.full(40, 512)
    heights[4], widths[4] = 256, 256  # exactly half a side: not odd
    heights[9], widths[9] = 250, 250
    heights[2], widths[2] = 512, 630  # 1.23
    heights[20], widths[20] = 700, 512  # 1.37
    heights[33], widths[33] = 512, 2048
    assert odd_sizes(a_look(heights=heights, widths=widths)).tolist() == [33, 20, 9]


def test_the_hash_sees_neither_brightness_nor_contrast(with_copies):
    data = with_copies({"dim": (0, lambda x: 0.5 * x + 0.1), "larger": (0, larger), "other": (9, lambda x: x)})
    hashes = look(data).hashes
    away = [int(np.bitwise_count(hashes[0] ^ hashes[i])) for i in range(80, 83)]
    assert max(away[:2]) <= 4
    unrelated = np.bitwise_count(hashes[:80:2, None] ^ hashes[None, :80:2])[np.triu_indices(40, 1)]
    assert 24 < unrelated.mean() < 36  # half of 63 bits, as of independent images


def test_planted_copies_under_other_patients_are_found_and_nothing_else(with_copies):
    copies = {
        "exact": (0, lambda x: x),
        "gamma": (3, lambda x: x**1.6),
        "dark": (6, lambda x: 0.4 * x),
        "compressed": (9, jpeg),
        "larger": (12, larger),
        "noise": (15, lambda x: x + np.random.default_rng(0).normal(0, 0.01, x.shape)),
    }
    data = with_copies(copies)
    found = near_duplicates(data, look(data))
    planted = {(row, 80 + position) for position, (row, _) in enumerate(copies.values())}
    assert {tuple(pair) for pair in found.pairs.tolist()} == planted
    assert found.pairs[0].tolist() == [0, 80] and found.similarity[0] == pytest.approx(1, abs=2e-3)
    assert (np.diff(found.similarity) <= 0).all() and found.similarity.min() >= 0.8
    assert found.num_compared == 86


def test_copies_of_one_patient_are_none_and_without_patients_every_image_counts(with_copies):
    copy = {"P0000": (0, lambda x: 0.9 * x)}
    data = with_copies(copy)
    assert data.patients[80] == data.patients[0]
    assert len(near_duplicates(data, look(data)).pairs) == 0
    alone = with_copies(copy, patient="", case="")
    assert near_duplicates(alone, look(alone)).pairs.tolist() == [[0, 80]]


def test_unlike_images_of_like_shape_are_no_copies(with_copies):
    # The hash alone is not enough: what differs only in detail has nearly the same hash.
    detail = np.random.default_rng(1).normal(0, 0.03, (64, 64))
    data = with_copies({"like": (0, lambda x: blurred(x) + detail)})
    found = look(data)
    assert np.bitwise_count(found.hashes[0] ^ found.hashes[80]) <= 10
    assert len(near_duplicates(data, found).pairs) == 0


def blurred(pixels):
    """The image without its fine detail."""
    small = Image.fromarray((pixels * 255).astype(np.uint8)).resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC), np.float64) / 255


def test_of_many_images_some_are_drawn(with_copies, monkeypatch):
    data = with_copies({"exact": (0, lambda x: x)})
    monkeypatch.setattr(overview_images, "_MOST_COMPARED", 50)
    found = near_duplicates(data, look(data))
    assert found.num_compared == 50
    assert found.pairs.tolist() in ([], [[0, 80]])
    again = near_duplicates(data, look(data))
    assert again.pairs.tolist() == found.pairs.tolist()
