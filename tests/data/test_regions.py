"""Masks and boxes: in the geometry of the network, checked when the data set is loaded, read when asked for."""

import os
import pickle

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raymed.config import UserError
from raymed.data import regions as module
from raymed.data.dataset import load
from raymed.data.manifest import DataConfig
from raymed.data.phantoms import write_hsg
from raymed.data.preprocess import Preprocess

NUM = 12
LABELS = ["sick", "well", "well"] * 4
SPLIT = ["train"] * 6 + ["val"] * 3 + ["test"] * 3


@pytest.fixture
def load_set(tmp_path):
    def make(path, **fields):
        return load(DataConfig(**{"manifest": str(path), "positive": "sick"} | fields), tmp_path / "cache")

    return make


@pytest.fixture
def masked(make_set, tmp_path):
    """masked(**columns): a set of twelve images; those of row 1 and 4 have masks, of 4 x 5 and 3 x 2 pixels."""

    def make(**columns):
        for row, (bottom, right) in {1: (7, 9), 4: (16, 16)}.items():
            mask = np.zeros((16, 16), np.uint8)
            mask[bottom - (4 if row == 1 else 3) : bottom, right - (5 if row == 1 else 2) : right] = 255
            Image.fromarray(mask).save(tmp_path / f"mask{row}.png")
        names = ["mask1.png", "", "", "mask4.png"] + [""] * 8
        return make_set(LABELS, **{"split": SPLIT, "mask": names} | columns)

    return make


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as info:
        call(*args, **kwargs)
    return str(info.value)


def extent(region):
    """(x0, y0, x1, y1) of a region that is a full rectangle."""
    y, x = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
    box = int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1
    assert region.sum() == (box[2] - box[0]) * (box[3] - box[1])
    return box


def test_masks(masked, load_set):
    data = load_set(masked())
    found = data.regions(np.arange(NUM))
    assert [i for i, region in enumerate(found) if region is not None] == [0, 3]
    assert extent(found[0]) == (4, 3, 9, 7) and extent(found[3]) == (14, 13, 16, 16)
    assert found[0].shape == (16, 16) and found[0].dtype == bool
    assert [extent(region) for region in data.regions(np.array([3, 0]))] == [(14, 13, 16, 16), (4, 3, 9, 7)]
    larger = load_set(masked(), preprocess=Preprocess(size=32)).regions(np.array([0]))
    assert extent(larger[0]) == (8, 6, 18, 14)


def test_boxes(make_set, load_set):
    boxes = ["4 3 9 7", "0.6 0 2.4 1", "-1 -0.5 2 17", "0 0 2 1; 14 15 16 16", "7.6 7.6 8.4 8.4"] + [""] * 7
    found = load_set(make_set(LABELS, split=SPLIT, box=boxes)).regions(np.arange(NUM))
    assert [extent(region) for region in found[:3]] == [(4, 3, 9, 7), (1, 0, 2, 1), (0, 0, 2, 16)]
    assert np.argwhere(found[3]).tolist() == [[0, 0], [0, 1], [15, 14], [15, 15]]
    assert found[4:] == [None] * 8  # nothing stated, or smaller than the centre of a pixel


def test_a_mask_comes_before_a_box(masked, load_set):
    data = load_set(masked(box=["0 0 2 2"] * 2 + [""] * 10))
    assert [extent(region) for region in data.regions(np.array([0, 1]))] == [(4, 3, 9, 7), (0, 0, 2, 2)]
    assert "box has no effect where there is a mask" in data.notes


@pytest.mark.parametrize(
    ("fit", "expected"),
    [("letterbox", (10, 9, 15, 12)), ("stretch", (10, 8, 15, 14)), ("crop", (10, 8, 20, 14))],
)
def test_regions_follow_the_image(tmp_path, load_set, fit, expected):
    """A white rectangle in images of 20 x 40; the region covers what is white in the network's input."""
    pixels = np.random.default_rng(0).integers(0, 60, (NUM, 20, 40), np.uint8)
    pixels[:, 8:14, 20:30] = 255
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    table = {"image": [f"{i}.png" for i in range(NUM)], "label": LABELS, "split": SPLIT, "box": ["20 8 30 14"] * NUM}
    pd.DataFrame(table).to_csv(tmp_path / "manifest.csv", index=False)
    data = load_set(tmp_path / "manifest.csv", preprocess=Preprocess(size=20, fit=fit))
    region = data.regions(np.array([5]))[0]
    assert extent(region) == expected
    image = data.batch(np.array([5])).image[0, 0].numpy()
    assert image[region].mean() > 225 and image[~region].mean() < 45


def test_a_region_that_is_cropped_away_is_none(tmp_path, load_set):
    rng = np.random.default_rng(0)
    for i in range(NUM):
        Image.fromarray(rng.integers(0, 255, (20, 40), np.uint8)).save(tmp_path / f"{i}.png")
    table = {"image": [f"{i}.png" for i in range(NUM)], "label": LABELS, "split": SPLIT, "box": ["0 0 9 20"] * NUM}
    pd.DataFrame(table).to_csv(tmp_path / "manifest.csv", index=False)
    data = load_set(tmp_path / "manifest.csv", preprocess=Preprocess(size=20, fit="crop"))
    assert data.regions(np.arange(3)) == [None] * 3


def test_what_cannot_be_used_is_reported_by_row(masked, load_set, tmp_path):
    path = masked(box=[""] * 6 + ["0 0 16 18"] + [""] * 5)
    Image.fromarray(np.zeros((16, 8), np.uint8)).save(tmp_path / "mask1.png")
    (tmp_path / "mask4.png").unlink()
    (tmp_path / "008.png").write_bytes(b"")
    lines = message(load_set, path).splitlines()
    assert lines == [
        "4 rows of the manifest cannot be used:",
        f"  row 1: the mask {tmp_path}/mask1.png has another size than its image: 16 x 8, its image 16 x 16 "
        "(height x width)",
        f"  row 4: the mask {tmp_path}/mask4.png: there is no such file",
        "  row 7: the box 0 0 16 18 leaves its image, which is 16 wide and 16 high",
        "  row 9: 008.png: the file is empty (0 bytes)",
        "Mend them, leave the column unused (--data.mask '' or --data.box ''), or leave them out, counted: "
        "--data.on-problem skip",
    ]


def test_rows_left_out_do_not_shift_the_others(make_set, load_set, tmp_path):
    labels, split = LABELS * 2, (["train"] * 12 + ["val"] * 6 + ["test"] * 6)
    boxes = [f"0 0 {1 + i % 15} 2" for i in range(24)]
    path = make_set(labels, split=split, box=boxes[:2] + ["0 0 99 99"] + boxes[3:])
    (tmp_path / "005.png").write_bytes(b"")
    data = load_set(path, on_problem="skip")
    assert "left out, unusable mask or box: 1 row (3)" in data.notes and len(data) == 22
    widths = [extent(region)[2] for region in data.regions(np.arange(22))]
    assert widths == [1 + (row - 1) % 15 for row in data.rows]
    again = data.with_splits({"train": np.arange(10), "val": np.arange(10, 16), "test": np.arange(16, 22)})
    assert [extent(region)[2] for region in again.regions(np.arange(22))] == widths


def test_without_regions(make_set, load_set, tmp_path):
    data = load_set(make_set(LABELS, split=SPLIT))
    assert data.regions_path is None and data.regions(np.arange(3)) == [None] * 3
    assert not list((tmp_path / "cache").glob("regions-*"))
    rng = np.random.default_rng(0)
    arrays = {f"{s}_images": rng.integers(0, 256, (4, 28, 28), np.uint8) for s in ("train", "val", "test")}
    arrays |= {f"{s}_labels": np.array([[0], [1]] * 2) for s in ("train", "val", "test")}
    np.savez(tmp_path / "mine.npz", **arrays)
    assert load_set(tmp_path / "mine.npz", positive="1").regions(np.arange(2)) == [None] * 2
    assert "has no column 'mask' (--data.mask)" in message(load_set, tmp_path / "mine.npz", positive="1", mask="mask")


def test_fingerprint_and_pickle_do_not_know_of_masks(masked, load_set):
    path = masked(patient=[f"Doe^{i}" for i in range(NUM)])
    with_masks, without = load_set(path), load_set(path, mask="")
    assert with_masks.fingerprint == without.fingerprint and with_masks.pixels_path == without.pixels_path
    packed = pickle.dumps(with_masks)
    assert len(packed) < len(pickle.dumps(without)) + 300 and b"mask1" not in packed and b"Doe" not in packed
    np.testing.assert_array_equal(pickle.loads(packed).regions(np.array([0]))[0], with_masks.regions(np.array([0]))[0])


def test_masks_are_read_once_to_be_checked_and_then_when_asked_for(masked, load_set, tmp_path, monkeypatch):
    reads = []
    original = module.read_mask
    monkeypatch.setattr(module, "read_mask", lambda path, frame: reads.append(path.name) or original(path, frame))
    path = masked()
    data = load_set(path)
    assert sorted(reads) == ["mask1.png", "mask4.png"]
    load_set(path)
    assert len(reads) == 2
    data.regions(np.array([3, 5]))
    assert reads[2:] == ["mask4.png"]
    os.utime(tmp_path / "mask4.png", ns=(1, 1))
    load_set(path)
    assert len(reads) == 5


def test_a_mask_that_is_gone_when_it_is_asked_for(masked, load_set, tmp_path):
    data = load_set(masked())
    (tmp_path / "mask4.png").unlink()
    assert data.regions(np.array([0]))[0] is not None
    text = message(data.regions, np.array([3]))
    assert text == f"row 4 of the manifest: the mask {tmp_path}/mask4.png: there is no such file"


def test_phantoms_have_boxes(load_set, tmp_path):
    data = load_set(write_hsg(tmp_path / "hsg", num_patients=24, size=64), positive="occluded")
    found = data.regions(np.arange(len(data)))
    assert [region is not None for region in found] == (data.labels == 1).tolist()
    for i in np.flatnonzero(data.labels):
        x0, _, x1, _ = extent(found[i])
        assert ((x0 + x1) / 2 < 32) == (data.sides[i] == "left")


def test_breast_ultrasound_masks(load_set, data_dir):
    """A third of the images are normal: their masks are empty."""
    path = data_dir / "busi_seg" / "manifest.csv"
    table = pd.read_csv(path)
    data = load_set(path, image="file", positive="malignant", preprocess=Preprocess(size=128))
    found = data.regions(np.arange(len(data)))
    stated = table["mask_frac"].to_numpy()
    assert [region is None for region in found] == (stated == 0).tolist() and sum(stated == 0) > 40
    square = (table["width"] == table["height"]) & (stated > 0)
    areas = np.array([region.mean() if region is not None else 0 for region in found])
    assert square.sum() > 10 and np.abs(areas - stated)[square].max() < 0.004
    longer = table[["width", "height"]].max(axis=1)
    assert areas == pytest.approx(stated * table["width"] * table["height"] / longer**2, abs=0.004)


def test_chest_x_ray_masks_and_boxes(load_set, data_dir):
    """Lungs lie within the lung boxes; a patient's right lung on the image's left."""
    path = data_dir / "cxr_covid_ccby" / "manifest.csv"
    fields = {"image": "file", "label": "finding", "positive": "COVID-19", "preprocess": Preprocess(size=96)}
    by_mask = load_set(path, mask="lung_mask", **fields)
    right = load_set(path, box="right_lung_box_xyxy", **fields)
    left = load_set(path, box="left_lung_box_xyxy", **fields)
    masks, rights, lefts = (data.regions(np.arange(len(data))) for data in (by_mask, right, left))
    assert sum(mask is not None for mask in masks) == 83
    both = [i for i in range(len(masks)) if masks[i] is not None and rights[i] is not None and lefts[i] is not None]
    inside = [(masks[i] & (rights[i] | lefts[i])).sum() / masks[i].sum() for i in both]
    assert len(both) > 60 and np.median(inside) > 0.9
    columns = [[np.argwhere(region)[:, 1].mean() for region in (rights[i], lefts[i])] for i in both]
    assert np.mean([r < le for r, le in columns]) > 0.95
    assert len(by_mask) == len(right) and by_mask.fingerprint == right.fingerprint


def test_normalised_boxes_are_refused_and_not_guessed(load_set, data_dir):
    path = data_dir / "brain_tumor_figshare" / "manifest.csv"
    text = message(load_set, path, image="file", positive="glioma", box="boxes_xywh_norm_center")
    assert text.startswith("330 rows of the manifest cannot be used:\n  row 1: the box '0.45 0.51 0.09 0.05' is not")
    assert "'x0 y0 x1 y1' in pixels" in text
