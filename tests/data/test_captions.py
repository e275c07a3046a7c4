"""Images with captions: what is read, left out, counted and refused, on small sets and on a real one."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from raymed.config import UserError, from_dict, to_dict
from raymed.data import CaptionConfig, CaptionSet
from raymed.data.captions import load_captions, read_captions
from raymed.data.dataset import load
from raymed.data.manifest import read_manifest

WORDS = ("nodule", "effusion", "fracture", "calcification")
CAPTIONS = [f"Image number {i} shows a {WORDS[i % 4]} on the left side." for i in range(24)]
SPLIT = (["train"] * 3 + ["val"] * 3 + ["test"] * 3 + ["train"] * 3) * 2


@pytest.fixture
def make(tmp_path):
    """make(captions, same={}, **columns) writes a random 16 x 16 PNG each (`same`: position -> position whose pixels it
    has) and manifest.csv; returns its path."""

    def write(captions, same=None, **columns):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (len(captions), 16, 16), np.uint8)
        names = [f"{i:03d}.png" for i in range(len(captions))]
        for i, name in enumerate(names):
            Image.fromarray(pixels[(same or {}).get(i, i)]).save(tmp_path / name)
        path = tmp_path / "manifest.csv"
        pd.DataFrame({"image": names, "caption": captions} | columns).to_csv(path, index=False)
        return path

    return write


@pytest.fixture
def load_set(tmp_path):
    return lambda path, **fields: load_captions(CaptionConfig(manifest=str(path), **fields), tmp_path / "cache")


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as info:
        call(*args, **kwargs)
    return str(info.value)


def test_a_set_of_images_and_captions(make, load_set, tmp_path):
    data = load_set(make(CAPTIONS, split=SPLIT, patient=[f"p{i // 3}" for i in range(24)]))
    assert isinstance(data, CaptionSet) and data.captions == tuple((caption,) for caption in CAPTIONS)
    assert data.labels.tolist() == [0] * 24 and data.positive == "" and data.findings == ()
    assert data.has_finding.shape == (24, 0)
    batch = data.batch(data.splits["val"][[2, 0]])
    assert batch.index.tolist() == [6, 4] and batch.image.shape == (2, 1, 16, 16)
    np.testing.assert_array_equal(batch.image[0, 0], np.asarray(Image.open(tmp_path / "005.png")))
    copy = pickle.loads(pickle.dumps(data))
    assert copy.captions == data.captions and torch.equal(
        copy.batch(np.arange(24)).image, data.batch(np.arange(24)).image
    )
    assert "24 captions, 24 of them distinct" in data.summary() and data.fingerprint in data.summary()


def test_the_general_functions_know_a_caption_config(make, tmp_path):
    config = CaptionConfig(manifest=str(make(CAPTIONS, split=SPLIT)))
    assert read_manifest(config).table["captions"].tolist()[3] == (CAPTIONS[3],)
    assert isinstance(load(config, tmp_path / "cache"), CaptionSet)
    assert from_dict(CaptionConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_without_given_splits_patients_stay_whole(make, load_set):
    data = load_set(make(CAPTIONS * 4, patient=[f"p{i // 4}" for i in range(96)]))
    sides = [set(data.patients[i]) for i in data.splits.values()]
    assert sum(map(len, sides)) == 24 == len(set.union(*sides))
    assert [len(i) for i in data.splits.values()] == pytest.approx([62, 14, 20], abs=4)
    refolded = data.with_splits({"train": np.arange(80), "val": np.arange(80, 90), "test": np.arange(90, 96)})
    assert isinstance(refolded, CaptionSet) and refolded.captions == data.captions
    assert refolded.fingerprint != data.fingerprint


def test_findings_are_divided_in_proportion(make, load_set):
    named = ["Pleural_Thickening|Mass", "Mass", "No Finding", "no finding", ""] * 60
    data = load_set(make([f"{c} {i}" for i, c in enumerate(CAPTIONS[:20] * 15)], named=named), findings="named")
    assert data.findings == ("Mass", "Pleural_Thickening")
    np.testing.assert_array_equal(data.has_finding[:5], [[1, 1], [1, 0], [0, 0], [0, 0], [0, 0]])
    shares = [data.has_finding[i].mean(0) for i in data.splits.values()]
    np.testing.assert_allclose(shares, np.tile([0.4, 0.2], (3, 1)), atol=0.03)
    assert "Pleural_Thickening" in data.summary()
    text = message(load_set, make(CAPTIONS, named=["The lungs are clear. " * 9] * 24), findings="named")
    assert "24 rows of the manifest cannot be used" in text and "is no name" in text


def test_several_captions_and_sections(make, load_set):
    reports = [
        f"HISTORY: Cough.\nFINDINGS: Nodule number {i} in the lung.\nIMPRESSION: {c}" for i, c in enumerate(CAPTIONS)
    ]
    path = make(CAPTIONS, split=SPLIT, second=[*CAPTIONS[:4], "brief", *[""] * 19], report=reports)
    data = load_set(path, caption=("second", "caption"))
    assert data.captions == tuple((c,) for c in CAPTIONS)
    assert "left out beside another caption of the image, caption under 20 characters: 1" in data.notes
    data = load_set(path, caption=("report",), sections=("impression", "findings"))
    assert data.captions[7] == (CAPTIONS[7], "Nodule number 7 in the lung.")
    only = message(load_set, path, caption=("report",), sections=("technique",))
    assert "row 1: the report has none of the sections technique" in only
    assert "did you mean --data.caption caption?" in message(load_set, path, caption=("captions",))


def test_short_captions_are_left_out_and_counted(make, load_set):
    captions = ["IN PROGRESS", *CAPTIONS[1:5], "pelvis", *CAPTIONS[6:]]
    data = load_set(make(captions, split=SPLIT))
    assert len(data) == 22 and not set(data.rows) & {1, 6}
    assert "left out, caption under 20 characters: 2 rows (1, 6)" in data.notes
    assert len(load_set(make(captions, split=SPLIT), min_caption=6)) == 24


def test_rows_without_a_caption(make, load_set):
    captions = ["", *CAPTIONS[1:5], "-- ?", *CAPTIONS[6:8], "Lungenrundherd \ufffd im linken Lappen", *CAPTIONS[9:]]
    path = make(captions, split=SPLIT)
    assert message(load_set, path).splitlines() == [
        "3 rows of the manifest cannot be used:",
        "  row 1: the caption is empty",
        "  row 6: the caption '-- ?' has no letter and no digit",
        "  row 9: the caption 'Lungenrundherd \ufffd im linken Lappen' was once read in a wrong encoding (U+FFFD)",
        "Mend them, or leave them out, counted: --data.on-problem skip",
    ]  # fmt: skip
    data = load_set(path, on_problem="skip")
    assert len(data) == 21 and "left out, no caption: 2 rows (1, 6)" in data.notes
    assert "left out, damaged caption: 1 row (9)" in data.notes


def test_captions_without_an_image(make, load_set, tmp_path):
    path = make(CAPTIONS, split=SPLIT)
    (tmp_path / "004.png").unlink()
    path.write_text(path.read_text().replace("007.png", ""))
    assert "row 8: the column 'image' is empty" in message(load_set, path)
    data = load_set(path, on_problem="skip")
    assert len(data) == 22 and "left out, unreadable image: 1 row (5)" in data.notes
    path.write_text(path.read_text().replace(",Image number 7", "007.png,Image number 7", 1))
    assert "row 5: 004.png: there is no such file" in message(load_set, path)


def test_not_utf8(make, load_set):
    path = make(CAPTIONS)
    path.write_bytes(path.read_text().replace("number 6", "Nummer 6: Gefäß").encode("latin-1"))
    assert message(load_set, path) == f"{path} cannot be read as csv: line 8 is not UTF-8. Save the file as UTF-8"


def test_nothing_usable_is_left(make, load_set):
    text = message(load_set, make(["short"] * 24, split=SPLIT))
    assert text.startswith("no row of the manifest is left:") and "caption under 20 characters: 24 rows" in text
    text = message(load_set, make([""] * 24), on_problem="skip")
    assert text.startswith("no row of the manifest is left:") and "no caption: 24 rows" in text


def test_captions_that_are_all_equal(make, load_set):
    assert "there is nothing to tell the images apart by" in message(load_set, make(CAPTIONS[:1] * 24, split=SPLIT))
    captions = [CAPTIONS[0] if split == "val" else caption for split, caption in zip(SPLIT, CAPTIONS, strict=True)]
    data = load_set(make(captions, split=SPLIT))
    assert "all captions of val are equal: nothing is learned from it, and nothing measured" in data.notes
    assert "7 images have a caption that another has too: such pairs are no negatives" in data.notes


def test_exact_duplicates_of_image_and_caption_go(make, load_set):
    captions = [*CAPTIONS[:10], CAPTIONS[9], "The same picture, described in other words.", *CAPTIONS[12:]]
    data = load_set(make(captions, same={10: 9, 11: 9}, split=SPLIT))
    assert set(range(1, 25)) - set(data.rows) == {11}
    assert "left out, exact duplicate of image and caption: 1 row (11)" in data.notes
    assert "exact duplicates within train, kept: 1 row (12)" in data.notes
    afresh = load_set(make(captions, same={10: 9, 11: 9}), split="")
    together = [afresh.rows.tolist().index(row) for row in (10, 12)]
    assert any(set(together) <= set(indices) for indices in afresh.splits.values())


def test_one_image_in_several_rows(make, load_set):
    """One row a caption, as many sets are written: nothing of it is lost, and nothing crosses a split."""
    path = make(CAPTIONS * 2)
    path.write_text(path.read_text().replace("024.png", "000.png").replace("Image number 0", "Picture number 0", 1))
    data = load_set(path)
    assert len(data) == 48 and data.content[0] == data.content[24]
    assert any({0, 24} <= set(indices) for indices in data.splits.values())


def test_labels_where_they_are_wanted(make, load_set):
    path = make(CAPTIONS, split=SPLIT, finding=["sick", "well", "well"] * 8)
    data = load_set(path, label="finding", positive="sick")
    assert data.labels.tolist() == [1, 0, 0] * 8 and data.classes == ("sick", "well")
    assert "data.positive is not stated" in message(load_set, path, label="finding")
    assert "positive has no effect without a label column (--data.label)" in load_set(path, positive="sick").notes


def test_the_fingerprint_sees_captions_and_findings(make, load_set):
    path = make(CAPTIONS, split=SPLIT, named=["Mass", "Cyst"] * 12)
    first = load_set(path).fingerprint
    assert load_set(path).fingerprint == first
    others = {load_set(path, findings="named").fingerprint}
    path.write_text(path.read_text().replace("number 3 ", "number 33 "))
    others.add(load_set(path).fingerprint)
    assert len(others | {first}) == 3


def test_too_few_patients(make, load_set):
    path = make(CAPTIONS, patient=["a", "b"] * 12)
    assert "the data set has 2 patients, too few to divide into train, val, test" in message(load_set, path)
    assert "the split test has no image" in message(load_set, make(CAPTIONS, split=["train", "val"] * 12))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"layout": "medpicks"}, "data.layout must be one of 'table', 'medpix', 'roco', got 'medpicks' (did you mean"),
        ({"caption": ()}, "data.caption names no column"),
        ({"caption": ("a", "a")}, "data.caption has an empty name, or one twice: a, a"),
        ({"sections": ("Findings", "findings")}, "data.sections has an empty name, or one twice"),
        ({"min_caption": 0}, "data.min_caption must be >= 1, got 0"),
        ({"on_problem": "skipp"}, "did you mean 'skip'"),
    ],
)
def test_bad_fields_fail_at_once(fields, text):
    assert text in message(CaptionConfig, **fields)


def test_manifests_of_the_wrong_kind(tmp_path):
    def read(path, **fields):
        return message(read_captions, CaptionConfig(manifest=str(path), **fields))

    assert '"phantoms" are drawn by a recipe first' in read("phantoms")
    assert f"{tmp_path} is a folder: name the file in it (the table)" in read(tmp_path)
    assert "(Descriptions.json, captions.txt or train_captions.csv)" in read(tmp_path, layout="roco")
    (tmp_path / "Descriptions.json").write_text("[]")
    assert "needs --data.layout medpix" in read(tmp_path / "Descriptions.json")
    (tmp_path / "empty.csv").write_text("image,caption\n")
    assert "is empty: a header and one row an image are expected" in read(tmp_path / "empty.csv")
    assert "there is no file" in read(tmp_path / "absent.csv")


def test_nih_chest_xrays(load_set, data_dir):
    """1000 images of 264 patients; the given splits share 30 of them."""
    path = data_dir / "nih_cxr64" / "manifest.csv"
    fields = {"image": "file", "findings": "findings"}
    assert "141 rows of the manifest cannot be used" in message(load_set, path, **fields)
    data = load_set(path, **fields, split="")
    assert len(data) == 1000 and data.has_patients and len(set(data.patients)) == 264
    assert sum(len(set(data.patients[i])) for i in data.splits.values()) == 264
    assert [len(i) for i in data.splits.values()] == pytest.approx([650, 150, 200], abs=30)
    assert len(data.findings) == 14 and "No Finding" not in data.findings
    raw = pd.read_csv(path)
    for name in data.findings:
        assert data.has_finding[:, data.findings.index(name)].sum() == raw["findings"].str.contains(name).sum()
    frequent = data.has_finding.sum(0) >= 60
    shares = np.array([data.has_finding[i][:, frequent].sum(0) for i in data.splits.values()])
    np.testing.assert_allclose(shares / shares.sum(0), np.tile([[0.65], [0.15], [0.2]], frequent.sum()), atol=0.12)
    assert data.captions[0] == ("Chest X-ray, PA view, 56-year-old woman, no acute finding.",)
    assert any("images have a caption that another has too" in note for note in data.notes)
