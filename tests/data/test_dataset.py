"""From a manifest to batches, on small sets and on real ones."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from raymed.config import UserError
from raymed.data.dataset import Batch, load
from raymed.data.manifest import DataConfig
from raymed.data.phantoms import write_hsg
from raymed.data.preprocess import Preprocess

LABELS = ["sick", "well", "well"] * 8
SPLIT = (["train"] * 3 + ["val"] * 3 + ["test"] * 3 + ["train"] * 3) * 2


@pytest.fixture
def load_set(tmp_path):
    """load_set(path, **fields): a data set with sick as the positive class unless stated."""

    def make(path, **fields):
        return load(DataConfig(**{"manifest": str(path), "positive": "sick"} | fields), tmp_path / "cache")

    return make


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as info:
        call(*args, **kwargs)
    return str(info.value)


def test_batch_of_a_split(make_set, load_set, tmp_path):
    data = load_set(make_set(LABELS, split=SPLIT, side=["L", "R"] * 12))
    assert len(data) == 24 and data.labels.tolist() == [1, 0, 0] * 8
    assert data.splits["val"].tolist() == [3, 4, 5, 15, 16, 17]
    assert data.sides[:2].tolist() == ["L", "R"] and data.views is None and data.cases is None
    indices = data.splits["val"][[2, 0]]
    batch = data.batch(indices)
    assert batch.image.shape == (2, 1, 16, 16) and batch.image.dtype == torch.uint8
    assert batch.index.tolist() == [6, 4] and batch.label.tolist() == data.labels[indices].tolist()
    assert batch.label.dtype == batch.index.dtype == torch.int64
    np.testing.assert_array_equal(batch.image[0, 0], np.asarray(Image.open(tmp_path / "005.png")))
    assert data.preprocess.size == 16 and data.preprocess.normalisation == "dataset"
    train = data.batch(data.splits["train"]).unit_image()
    assert data.preprocess.mean == pytest.approx((train.mean().item(),))


def test_batch_slices_and_moves():
    image = torch.arange(4 * 3, dtype=torch.uint8).reshape(4, 3, 1, 1)
    batch = Batch(image, torch.tensor([0, 1, 0, 1]), torch.arange(4), {"encoder": torch.arange(8.0).reshape(4, 2)})
    part = batch.slice(1, 3)
    assert len(batch) == 4 and len(part) == 2 and part.index.tolist() == [1, 2]
    assert torch.equal(part.image, image[1:3]) and part.cached["encoder"].tolist() == [[2, 3], [4, 5]]
    moved = Batch(None, batch.label, batch.index, batch.cached).to("meta")
    assert moved.image is None and moved.label.device.type == moved.cached["encoder"].device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_unit_image(dtype):
    top = torch.iinfo(dtype).max
    batch = Batch(torch.tensor([0, top // 5, top]).to(dtype).reshape(1, 3, 1, 1), torch.zeros(1), torch.zeros(1))
    torch.testing.assert_close(batch.unit_image().flatten(), torch.tensor([0, 0.2, 1]))


def test_patients_are_codes_and_stay_on_one_side(make_set, load_set):
    names = [f"Doe^{i // 2}" for i in range(24)]
    data = load_set(make_set(["sick", "sick", "well", "well", "well", "well"] * 4, patient=names, case=names))
    assert data.has_patients and data.patients.tolist() == [i // 2 for i in range(24)]
    assert data.cases.tolist() == data.patients.tolist()
    sides = [set(data.patients[i]) for i in data.splits.values()]
    assert sum(map(len, sides)) == 12 and set.union(*sides) == set(range(12))
    assert all(set(data.labels[i]) == {0, 1} for i in data.splits.values())
    assert "Doe" not in data.summary() and b"Doe" not in pickle.dumps(data)


def test_images_without_a_patient_count_as_patients_of_their_own(make_set, load_set):
    data = load_set(make_set(LABELS, patient=["p", "p", "", ""] * 6))
    assert data.patients.tolist()[:4] == [0, 0, 1, 2] and len(set(data.patients)) == 13
    assert any(
        note.startswith("no patient is stated, each counts as one of its own: 12 rows (3, 4, 7") for note in data.notes
    )


def test_without_patients_the_split_is_by_image_and_says_so(make_set, load_set):
    data = load_set(make_set(LABELS))
    assert not data.has_patients and len(set(data.patients)) == 24
    assert "no patient column: the split is by image, and figures may be too good (--data.patient COLUMN)" in data.notes


OF_CASES = [("sick", "well")[i // 2 % 2] for i in range(80)]


def test_without_patients_the_images_of_a_case_stay_together(make_set, load_set):
    """40 cases of two images: were they divided by image, a third of the cases would be in two splits."""
    data = load_set(make_set(OF_CASES, case=[f"C{i // 2}" for i in range(80)]))
    assert data.grouped_by == "case" and data.patients.tolist() == [i // 2 for i in range(80)]
    train, val, test = (set(data.cases[indices]) for indices in data.splits.values())
    assert not (train & val or train & test or val & test) and len(train | val | test) == 40
    assert any("no patient column: each case counts as a patient of its own" in note for note in data.notes)
    assert not data.patient_keys.any()


def test_an_empty_patient_is_the_case_and_pseudonyms_have_keys(make_set, load_set):
    names = ["" if i < 8 else f"P-ABCDEF{'234567ABCDEFGHIJKL'[(i - 8) // 4]}2" for i in range(80)]
    data = load_set(make_set(OF_CASES, patient=names, case=[f"C{i // 2}" for i in range(80)]))
    assert data.patients.tolist() == [i // 2 if i < 8 else 4 + (i - 8) // 4 for i in range(80)]
    assert not data.patient_keys[:8].any() and len(np.unique(data.patient_keys[8:])) == 18
    assert any(note.startswith("8 rows (1, 2, 3") and "each case counts" in note for note in data.notes)


def test_unreadable_images_are_all_reported(make_set, load_set, tmp_path):
    path = make_set(LABELS, images={4: np.full((16, 16), 9, np.uint8)})
    (tmp_path / "002.png").write_bytes((tmp_path / "002.png").read_bytes()[:100])
    (tmp_path / "010.png").write_bytes(b"")
    (tmp_path / "011.png").unlink()
    lines = message(load_set, path).splitlines()
    assert lines[0] == "4 rows of the manifest cannot be used:"
    assert lines[1].startswith("  row 3: 002.png: truncated or damaged")
    assert lines[2:5] == [
        "  row 5: 004.png: all pixels have one value (9)",
        "  row 11: 010.png: the file is empty (0 bytes)",
        "  row 12: 011.png: there is no such file",
    ]
    data = load_set(path, on_problem="skip")
    assert len(data) == 20 and not set(data.rows) & {3, 5, 11, 12}
    assert "left out, unreadable image: 4 rows (3, 5, 11, 12)" in data.notes
    np.testing.assert_array_equal(data.batch(np.array([2])).image[0, 0], np.asarray(Image.open(tmp_path / "003.png")))


def test_a_patient_on_two_sides_of_given_splits(make_set, load_set):
    split = ["train"] * 12 + ["val"] * 6 + ["test"] * 6
    patient = [f"secret{i}" for i in range(24)]
    patient[20] = patient[14] = patient[0]
    path = make_set(LABELS, split=split, patient=patient)
    text = message(load_set, path)
    assert (
        "  row 1: (train) the same patient as row 21 (test)\n  row 15: (val) the same patient as row 21 (test)" in text
    )
    assert "split afresh by patient (--data.split '')" in text and "secret" not in text
    data = load_set(path, on_problem="skip")
    assert set(range(1, 25)) - set(data.rows) == {1, 15}
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [11, 5, 6]


def test_a_duplicate_across_given_splits_is_left_out_of_training(make_set, load_set, tmp_path):
    path = make_set(LABELS, split=["train"] * 12 + ["val"] * 6 + ["test"] * 6)
    for copy, original in (("001", "013"), ("002", "020"), ("014", "020"), ("004", "003")):
        (tmp_path / f"{copy}.png").write_bytes((tmp_path / f"{original}.png").read_bytes())
    data = load_set(path)
    assert set(range(1, 25)) - set(data.rows) == {2, 3, 15} and len(data.splits["test"]) == 6
    assert "left out, exact duplicate of an image in a later split: 3 rows (2, 3, 15)" in data.notes
    assert "exact duplicates within train, kept: 1 row (5)" in data.notes
    assert "the same image under two labels, kept: 2 rows (4, 5)" in data.notes


def test_a_new_split_keeps_duplicates_together(make_set, load_set, tmp_path):
    path = make_set(LABELS)
    for i in range(3, 9):
        (tmp_path / f"{i:03d}.png").write_bytes((tmp_path / "000.png").read_bytes())
    data = load_set(path)
    same = [0, *range(3, 9)]
    assert sum(bool(set(same) & set(indices)) for indices in data.splits.values()) == 1


def test_train_gives_a_val_split_where_none_is_given(make_set, load_set):
    data = load_set(make_set(LABELS * 2, split=(["train"] * 18 + ["test"] * 6) * 2))
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [30, 6, 12]
    assert data.splits["test"].tolist() == [*range(18, 24), *range(42, 48)]
    assert "no val split is given: 15% of train is used" in data.notes


def test_splits_that_lack_something(make_set, load_set):
    path = make_set(LABELS, split=["train"] * 18 + ["val"] * 6)
    assert "the split test has no image" in message(load_set, path)
    assert "the split train has no image" in message(load_set, make_set(LABELS, split=["test"] * 24))


def test_too_few_patients(make_set, load_set):
    path = make_set(LABELS, patient=["a" if label == "sick" else f"b{i}" for i, label in enumerate(LABELS)])
    assert "the positive class 'sick' has 1 patient, too few" in message(load_set, path)


def test_fingerprint_sees_content_and_not_names(make_set, load_set, tmp_path):
    path = make_set(LABELS, split=SPLIT)
    first = load_set(path).fingerprint
    for file in tmp_path.glob("*.png"):
        file.rename(file.with_suffix(".tif"))
    path.write_text(path.read_text().replace(".png", ".tif"))
    assert load_set(path).fingerprint == first
    assert load_set(path, preprocess=Preprocess(size=24)).fingerprint == first
    others = {load_set(path, split="").fingerprint}
    path.write_text(path.read_text().replace("000.tif,sick", "000.tif,well"))
    others.add(load_set(path).fingerprint)
    pixels = np.asarray(Image.open(tmp_path / "000.tif")).copy()
    pixels[3, 3] ^= 1
    Image.fromarray(pixels).save(tmp_path / "000.tif", format="png")
    others.add(load_set(path).fingerprint)
    assert len(others | {first}) == 4


def test_dataset_normalisation_is_measured_on_train(make_set, load_set):
    path = make_set(LABELS, split=["train"] * 12 + ["val"] * 6 + ["test"] * 6)
    data = load_set(path, preprocess=Preprocess(normalisation="dataset"))
    train = np.stack([np.asarray(Image.open(path.parent / f"{i:03d}.png")) for i in range(12)]) / 255
    assert data.preprocess.mean == pytest.approx((train.mean(),)) and data.preprocess.std == pytest.approx(
        (train.std(),)
    )
    out = data.preprocess.normalise(data.batch(data.splits["train"]).unit_image())
    assert out.mean().abs() < 1e-5 and out.std() == pytest.approx(1, abs=1e-3)
    stated = Preprocess(normalisation="dataset", mean=(0.5,), std=(0.25,))
    assert load_set(path, preprocess=stated).preprocess.mean == (0.5,)


def test_pickle_takes_the_path_and_not_the_pixels(make_set, load_set):
    data = load_set(make_set(LABELS, images={0: np.random.default_rng(1).integers(0, 256, (16, 16), np.uint8)}))
    packed = pickle.dumps(data)
    assert len(packed) < data.batch(np.arange(24)).image.numel()
    copy = pickle.loads(packed)
    assert torch.equal(copy.batch(np.arange(24)).image, data.batch(np.arange(24)).image)


def test_phantoms(load_set, tmp_path):
    data = load_set(write_hsg(tmp_path / "hsg", num_patients=24, size=32), positive="occluded")
    assert data.classes == ("occluded", "patent") and data.labels.mean() == 0.25
    assert data.has_patients and set(data.sides) == {"left", "right", "none"} and set(data.views) == {"early", "late"}
    assert (data.labels == (data.sides != "none")).all()


def test_pneumoniamnist(load_set, data_dir):
    """8 images of val are in train too, two of them twice; 18 + 3 duplicates within train and test."""
    path = data_dir / "pneumoniamnist" / "pneumoniamnist.npz"
    data = load_set(path, positive="normal")
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [4698, 524, 624]
    assert [int(data.labels[i].sum()) for i in data.splits.values()] == [1214, 135, 234]
    assert data.classes == ("normal", "pneumonia") and not data.has_patients
    assert any(
        note.startswith("left out, exact duplicate of an image in a later split: 10 rows") for note in data.notes
    )
    assert any(note.startswith("exact duplicates within train, kept: 16 rows") for note in data.notes)
    with np.load(path) as npz:
        batch = data.batch(data.splits["test"])
        np.testing.assert_array_equal(batch.image[:, 0], npz["test_images"])
        np.testing.assert_array_equal(batch.label, npz["test_labels"][:, 0] == 0)
    assert data.summary().splitlines()[1].split() == ["train", "1214", "3484", "4698", "unknown"]
    assert "It is usually the rarest, here 'normal': --data.positive normal" in message(load_set, path, positive=None)


def test_nih_chest_xrays(load_set, data_dir):
    """30 patients sit in several of the given splits."""
    fields = {"path": data_dir / "nih_cxr64" / "manifest.csv", "image": "file", "positive": "abnormal"}
    assert "141 rows of the manifest cannot be used" in message(load_set, **fields)
    skipped = load_set(**fields, on_problem="skip")
    assert [len(i) for i in skipped.splits.values()] == [501, 158, 200]
    afresh = load_set(**fields, split="")
    assert len(set(afresh.patients)) == 264
    assert [len(i) for i in afresh.splits.values()] == pytest.approx([650, 150, 200], abs=5)
    assert sum(len(set(afresh.patients[i])) for i in afresh.splits.values()) == 264


def test_brain_tumours_one_class_against_the_rest(load_set, data_dir):
    data = load_set(data_dir / "brain_tumor_figshare" / "manifest.csv", image="file", positive="glioma")
    assert data.classes == ("glioma", "meningioma", "pituitary") and data.labels.sum() == 110
    assert [len(i) for i in data.splits.values()] == [231, 48, 51]
    np.testing.assert_array_equal(data.labels, data.class_codes == 0)
    assert data.preprocess.size == 256


def test_the_side_in_the_picture_follows_the_edge_of_the_patients_right(tmp_path):
    """A radiograph seen from the front has the patient's right at its left edge."""
    rng, rows = np.random.default_rng(0), []
    for number, (side, right) in enumerate(
        [("right", "left"), ("Left", "left"), ("right", "right"), ("left", "right"), ("left", ""), ("both", "left")] * 2
    ):
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(tmp_path / f"{number}.png")
        rows.append(
            {"image": f"{number}.png", "label": "ab"[number % 2], "patient": number, "side": side, "right": right}
        )
    pd.DataFrame(rows).to_csv(tmp_path / "manifest.csv", index=False)
    data = load(DataConfig(str(tmp_path / "manifest.csv"), positive="a"), tmp_path / "cache")
    assert data.seen_sides[:6].tolist() == ["left", "right", "right", "left", "", ""]
    assert data.sides[:2].tolist() == ["right", "Left"]
