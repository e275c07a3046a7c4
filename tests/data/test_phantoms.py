"""HSG phantoms: the same bytes again, a truth that holds in the pixels, and no short cut to the label."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raymed.config import UserError
from raymed.data.phantoms import hsg, write_hsg

SIZE = 96


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """The default set: (table, images (N, 96, 96) uint8)."""
    manifest = write_hsg(tmp_path_factory.mktemp("phantoms") / "hsg")
    table = pd.read_csv(manifest, keep_default_na=False)
    return table, np.stack([np.asarray(Image.open(manifest.parent / name)) for name in table["image"]])


def grouped_auroc(features: np.ndarray, table: pd.DataFrame, c: float) -> float:
    """AUROC of a logistic regression, out of fold; a patient's images stay in one fold."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    positive = table["label"] == "occluded"
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a weakly regularised fit has not converged after 100 steps
        scores = cross_val_predict(
            model, features, positive, cv=folds, groups=table["patient"], method="decision_function"
        )
    return roc_auc_score(positive, scores)


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """(N, 96, 96) -> (N, size * size) means of blocks."""
    step = SIZE // size
    return images.reshape(len(images), size, step, size, step).mean((2, 4)).reshape(len(images), -1)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_table(phantoms):
    table, images = phantoms
    assert images.shape == (480, SIZE, SIZE) and images.dtype == np.uint8
    assert len(set(map(bytes, images))) == 480
    patients = table.groupby("patient")
    assert len(patients) == 240
    assert (patients["view"].apply(list).map(tuple) == ("early", "late")).all()
    assert (patients[["label", "side", "case"]].nunique() == 1).all(axis=None)
    assert table["side"].value_counts().to_dict() == {"none": 360, "left": 60, "right": 60}
    assert ((table["label"] == "occluded") == (table["side"] != "none")).all()


def test_fimbrial_ends_lie_in_their_half_of_the_image(phantoms):
    table, _ = phantoms
    middle = (SIZE - 1) / 2
    assert (table["left_x"] < middle - 10).all() and (table["right_x"] > middle + 10).all()
    assert table[["left_x", "left_y", "right_x", "right_y"]].stack().between(0, SIZE - 1).all()


@pytest.mark.parametrize(
    ("num_patients", "prevalence", "left", "right"), [(10, 0.3, 2, 1), (9, 0.0, 0, 0), (4, 1, 2, 2)]
)
def test_prevalence(tmp_path, num_patients, prevalence, left, right):
    table = pd.read_csv(write_hsg(tmp_path / "set", num_patients, size=32, prevalence=prevalence))
    sides = table[table["view"] == "late"]["side"]
    assert ((sides == "left").sum(), (sides == "right").sum()) == (left, right)
    assert len(sides) == num_patients


def test_brightness_does_not_tell_the_label(phantoms):
    table, images = phantoms
    brightness = np.stack([images.mean((1, 2)), images.std((1, 2)), np.percentile(images, 95, axis=(1, 2))], 1)
    assert all(grouped_auroc(column[:, None], table, 1.0) < 0.65 for column in brightness.T)
    assert grouped_auroc(brightness, table, 1.0) < 0.7
    label = (table["label"] == "occluded").to_numpy(float)
    assert grouped_auroc((label + 0.5 * brightness[:, 0] / 255)[:, None], table, 1.0) > 0.95  # what would be found


@pytest.mark.parametrize(("size", "c"), [(24, 1e-4), (24, 1e-2), (24, 1.0), (48, 1e-3), (48, 1e-1)])
def test_linear_model_on_pixels_does_not_solve_it(phantoms, size, c):
    table, images = phantoms
    assert grouped_auroc(shrink(images, size), table, c) < 0.75


@pytest.mark.parametrize("view", ["early", "late"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_occlusion_takes_the_plume_away_on_its_side(view, side):
    """The same patient, pose and noise with and without the occlusion: what is missing lies at the stated end."""
    y, x = np.mgrid[:SIZE, :SIZE]
    other = {"left": "right", "right": "left"}[side]
    missing, missing_on_other, gained_on_other = [], [], []
    for patient in range(30):
        patent, ends, _ = hsg(patient, view, "none")
        occluded, same_ends, _ = hsg(patient, view, side)
        assert ends == same_ends
        lost = patent.astype(int) - occluded
        here, there = (np.hypot(x - ends[s][0], y - ends[s][1]) < 0.2 * SIZE for s in (side, other))
        missing.append((lost[here] > 12).sum())
        missing_on_other.append((lost[there] > 12).sum())
        gained_on_other.append(-lost[there].mean())
    assert np.mean(np.array(missing) >= 10) >= 0.9 and np.median(missing) > 60  # pixels of 1134
    assert np.median(missing_on_other) < 0.3 * np.median(missing)
    assert np.mean(gained_on_other) > 0  # what cannot leave here leaves there


@pytest.mark.parametrize("view", ["early", "late"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_box_holds_what_the_occlusion_changes_on_its_side(view, side):
    """Most of what differs from the same patient with patent tubes, in a small part of the image."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    half = x < SIZE / 2 if side == "left" else x > SIZE / 2
    shares, areas = [], []
    for patient in range(30):
        patent, _, none = hsg(patient, view, "none")
        occluded, ends, (x0, y0, x1, y1) = hsg(patient, view, side)
        assert none is None and 0 <= x0 < ends[side][0] < x1 <= SIZE and 0 <= y0 < ends[side][1] < y1 <= SIZE
        changed = (np.abs(patent.astype(int) - occluded) > 12) & half
        inside = (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
        shares.append(changed[inside].sum() / max(changed.sum(), 1))
        areas.append(inside.mean())
    assert np.median(shares) > 0.6 and max(areas) < 0.15 and np.median(areas) < 0.08


def test_boxes_stand_in_the_table(phantoms):
    table, _ = phantoms
    assert ((table["box"] == "") == (table["side"] == "none")).all()
    boxes = table.loc[table["side"] != "none", "box"].str.split(" ", expand=True).astype(float)
    assert boxes.shape == (120, 4) and boxes.stack().between(0, SIZE).all()
    middle = (boxes[0] + boxes[2]) / 2
    assert ((middle < SIZE / 2) == (table.loc[middle.index, "side"] == "left")).all()


def test_patent_tubes_show_contrast_at_their_end(phantoms):
    """Mean of a disc at the fimbrial end above the median of a ring around it, in grey levels."""
    table, images = phantoms
    y, x = np.mgrid[:SIZE, :SIZE]

    def contrast(side, row, image):
        distance = np.hypot(x - row[f"{side}_x"], y - row[f"{side}_y"])
        return image[distance <= 5].mean() - np.median(image[(distance > 18) & (distance < 26)])

    rows = [(row, images[i]) for i, row in table.iterrows()]
    patent = np.array([contrast(s, row, im) for row, im in rows for s in ("left", "right") if row["side"] != s])
    assert patent.mean() > 18 and np.mean(patent > 5) > 0.85


def test_late_view_is_another_picture_of_the_same_patient():
    early, late = (hsg(3, view)[0].astype(float) for view in ("early", "late"))
    assert np.abs(early - late).mean() > 5
    same, other = hsg(3, "early")[0], hsg(3, "early", seed=1)[0]
    assert (same == early).all() and (other != early).any()


@pytest.mark.parametrize("size", [32, 64, 128])
def test_size_scales_the_same_scene(size):
    large, ends, box = hsg(5, "late", "left", size=256)
    small, small_ends, small_box = hsg(5, "late", "left", size=size)
    assert small.shape == (size, size)
    scale = size / 256
    for side in ends:
        assert np.allclose((np.array(ends[side]) + 0.5) * scale - 0.5, small_ends[side])
    assert np.allclose(np.array(box) * scale, small_box, atol=0.11)
    blocks = large.reshape(size, 256 // size, size, 256 // size).mean((1, 3))
    assert np.corrcoef(blocks.ravel(), small.ravel())[0, 1] > 0.8


def test_same_arguments_give_the_same_bytes(tmp_path):
    write_hsg(tmp_path / "a", 6, seed=2, size=32)
    write_hsg(tmp_path / "b", 6, seed=2, size=32)
    write_hsg(tmp_path / "c", 6, seed=3, size=32)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_complete_folder_is_kept(tmp_path):
    manifest = write_hsg(tmp_path / "set", 6, size=32)
    before = {path: path.stat().st_mtime_ns for path in manifest.parent.rglob("*")}
    assert write_hsg(tmp_path / "set", 6, size=32) == manifest
    assert {path: path.stat().st_mtime_ns for path in manifest.parent.rglob("*")} == before


@pytest.mark.parametrize("damage", ["image", "empty image", "manifest", "record", "all"])
def test_half_written_folder_is_written_again(tmp_path, damage):
    folder = tmp_path / "set"
    write_hsg(folder, 6, size=32)
    whole = files(folder)
    image = folder / "images" / "P0003_late.png"
    if damage == "empty image":
        image.write_bytes(b"")
    named = {"image": [image], "manifest": [folder / "manifest.csv"], "record": [folder / "phantoms.json"]}
    for path in named.get(damage, [folder / name for name in whole] if damage == "all" else []):
        path.unlink()
    write_hsg(folder, 6, size=32)
    assert files(folder) == whole


def test_a_set_of_an_older_version_is_written_again(tmp_path):
    folder = tmp_path / "set"
    write_hsg(folder, 6, size=32)
    whole = files(folder)
    record = json.loads((folder / "phantoms.json").read_text())
    (folder / "phantoms.json").write_text(json.dumps(record | {"version": 1}))
    (folder / "manifest.csv").write_text("as of then")
    write_hsg(folder, 6, size=32)
    assert files(folder) == whole


def test_killed_writer_leaves_no_folder(tmp_path, monkeypatch):
    def full_disk(self, *args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_hsg(tmp_path / "set", 2, size=32)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_is_never_replaced(tmp_path):
    write_hsg(tmp_path / "set", 4, size=32)
    with pytest.raises(UserError, match="phantoms of other parameters"):
        write_hsg(tmp_path / "set", 5, size=32)
    assert json.loads((tmp_path / "set" / "phantoms.json").read_text())["num_patients"] == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds other files"):
        write_hsg(tmp_path / "mine", 4, size=32)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_patients": 0}, "num_patients must be >= 1, got 0"),
        ({"prevalence": 1.2}, "prevalence must be >= 0 and <= 1, got 1.2"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"size": 16}, "size must be >= 32, got 16"),
    ],
)
def test_arguments_are_checked(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        write_hsg(tmp_path / "set", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_unknown_side_and_view():
    with pytest.raises(UserError, match="did you mean 'left'"):
        hsg(0, side="lefft")
    with pytest.raises(UserError, match="view must be one of 'early', 'late'"):
        hsg(0, view="middle")
