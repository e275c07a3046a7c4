"""Tables of every kind, and what is said about bad ones."""

import numpy as np
import pandas as pd
import pytest

from raymed.config import UserError, from_dict, to_dict
from raymed.data.manifest import DataConfig, read_manifest
from raymed.data.preprocess import Preprocess

GOOD = "image,label\na.png,sick\nb.png,well\nc.png,well\n"


@pytest.fixture
def read(tmp_path):
    """read(text, **fields) writes the text as manifest.csv and reads it; sick is positive unless stated."""

    def write_and_read(text, **fields):
        (tmp_path / "manifest.csv").write_text(text)
        return read_manifest(DataConfig(**{"manifest": str(tmp_path / "manifest.csv"), "positive": "sick"} | fields))

    return write_and_read


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as info:
        call(*args, **kwargs)
    return str(info.value)


def test_columns_are_mapped_and_the_rest_ignored(read, tmp_path):
    text = "path,source,finding,Patient ID,age\na.png,X,sick,007,5\nb.png,Y, well ,NA,6\n"
    manifest = read(text, image="path", label="finding", root=str(tmp_path / "images"))
    assert manifest.table["row"].tolist() == [1, 2]
    assert manifest.table["label"].tolist() == ["sick", "well"]
    assert manifest.table["patient"].tolist() == ["007", "NA"]
    assert manifest.table["source"].iloc[0].path == tmp_path / "images" / "a.png"
    assert manifest.classes == ("sick", "well") and manifest.positive == "sick"
    assert manifest.notes == ["patient: column 'Patient ID', by its name (--data.patient '' to leave it unused)"]


def test_an_optional_column_can_be_named_or_left_unused(read):
    text = "image,label,patient,who\na.png,sick,1,x\nb.png,well,2,y\n"
    assert read(text, patient="who").table["patient"].tolist() == ["x", "y"]
    assert "patient" not in read(text, patient="").table
    assert "has no column 'Who' (--data.patient)" in message(read, text, patient="Who")
    assert "did you mean --data.patient who?" in message(read, text, patient="Who")


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_identifiers_are_text_in_every_format(tmp_path, kind):
    table = pd.DataFrame({"image": ["a", "b", "c"], "label": [0, 1, 1], "patient": ["0012", "0x1F", "1e5"]})
    path = tmp_path / f"m.{kind}"
    if kind == "parquet":
        table["case"] = [17, None, 3]  # whole numbers beside an empty cell: floats in the file
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    read = read_manifest(DataConfig(manifest=str(path), positive="0")).table
    assert read["patient"].tolist() == ["0012", "0x1F", "1e5"]
    assert read["label"].tolist() == ["0", "1", "1"]
    if kind == "parquet":
        assert read["case"].tolist() == ["17", "", "3"]


def test_split_names(read):
    text = "image,label,split\na,sick,Train\nb,well,valid\nc,well,testing\nd,well,validation\n"
    assert read(text).table["split"].tolist() == ["train", "val", "test", "val"]
    assert "split" not in read(text, split="").table
    bad = message(read, text.replace("testing", "fold 3"))
    assert "row 3: the split 'fold 3' is not train, val or test (--data.split '' splits afresh)" in bad


def test_frames(read):
    text = "image,label,frame\na.dcm,sick,1\na.dcm,well,2\nb.dcm,well,\n"
    assert [source.frame for source in read(text).table["source"]] == [1, 2, None]
    assert "row 2: the frame '0' is no whole number from 1" in message(read, text.replace(",2", ",0"))


def test_masks_and_boxes(read, tmp_path):
    text = "image,label,Mask,boxes\na.png,sick,m/a.png,1 2 3 4\nb.png,well,,0 0 9.5 8; 1 1 2 2\nc.png,well,,\n"
    manifest = read(text, root=str(tmp_path / "images"))
    masks = manifest.table["mask"].tolist()
    assert masks[0].path == tmp_path / "images" / "m" / "a.png" and masks[1:] == [None, None]
    assert manifest.table["box"].tolist() == [((1, 2, 3, 4),), ((0, 0, 9.5, 8), (1, 1, 2, 2)), ()]
    assert manifest.notes == [
        "mask: column 'Mask', by its name (--data.mask '' to leave it unused)",
        "box: column 'boxes', by its name (--data.box '' to leave it unused)",
        "box has no effect where there is a mask",
    ]
    unused = read(text, mask="", box="")
    assert not {"mask", "box"} & set(unused.table) and unused.notes == []
    framed = read("image,label,frame,mask\na.nii,sick,3,m.nii\nb.nii,well,,n.nii\n").table["mask"]
    assert [mask.frame for mask in framed] == [3, None]
    assert "did you mean --data.mask Mask?" in message(read, text, mask="masks")


@pytest.mark.parametrize(
    "box", ["1 2 3", "1 2 3 4 5", "a 2 3 4", "3 2 1 4", "1 4 3 4", "nan 1 2 3", "0.45 0.5 0.6 0.7", "1 2 3 4;", "1;2"]
)
def test_boxes_that_are_none(read, box):
    text = f"image,label,box\na.png,sick,{box}\nb.png,well,\n"
    assert (
        f"row 1: the box {box!r} is not 'x0 y0 x1 y1' in pixels with x0 < x1 and y0 < y1, several separated by ';'"
        in message(read, text)
    )


def test_what_the_card_repeats_is_not_stated_until_it_is():
    config = DataConfig(modality="HSG")
    assert (config.modality, config.body_part, config.licence, config.source) == ("HSG", *["not stated"] * 3)


def test_archive_with_published_names(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 6), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 28, 28), np.uint8)
        arrays[f"{split}_labels"] = np.arange(n)[:, None] % 2
    for name in ("breastmnist.npz", "breastmnist_64.npz", "mine.npz"):
        np.savez(tmp_path / name, **arrays)
    path = str(tmp_path / "breastmnist.npz")
    manifest = read_manifest(DataConfig(manifest=path, positive="malignant"))
    assert manifest.classes == ("malignant", "normal, benign")
    assert manifest.table["split"].tolist() == ["train"] * 6 + ["val"] * 2 + ["test"] * 3
    assert manifest.table["image"].iloc[8] == "test_images[0]"
    np.testing.assert_array_equal(manifest.table["source"].iloc[8].read(), arrays["test_images"][0])
    assert "--data.positive 'normal, benign'" in message(read_manifest, DataConfig(manifest=path))
    larger = DataConfig(manifest=str(tmp_path / "breastmnist_64.npz"), positive="malignant")
    assert read_manifest(larger).classes == manifest.classes
    mine = str(tmp_path / "mine.npz")
    assert read_manifest(DataConfig(manifest=mine, positive="1")).classes == ("0", "1")
    named = DataConfig(manifest=mine, positive="b", classes=("a", "b"))
    assert read_manifest(named).table["label"].tolist()[:2] == ["a", "b"]


def test_bad_archives(tmp_path):
    images, labels = np.zeros((2, 8, 8), np.uint8), np.array([[0], [1]])
    path = tmp_path / "m.npz"

    def read(**arrays):
        np.savez(path, **arrays)
        return message(read_manifest, DataConfig(manifest=str(path), positive="1"))

    assert "has no train_images and train_labels" in read(images=images)
    many = np.zeros((2, 14), int)
    assert "train_labels must be one whole number an image, got (2, 14)" in read(train_images=images, train_labels=many)
    np.savez(path, train_images=images, train_labels=np.array([[0], [2]]))
    assert "row 2: the label '2' is not one of 'a', 'b'" in message(
        read_manifest, DataConfig(manifest=str(path), positive="a", classes=("a", "b"))
    )
    np.savez(path, train_images=np.zeros((2, 8, 8, 8), np.uint8), train_labels=labels)
    volumes = read_manifest(DataConfig(manifest=str(path), positive="1"))
    assert "must be 2-D images" in message(volumes.table["source"].iloc[0].read)
    path.write_bytes(b"no archive")
    assert "is not an npz archive" in message(read_manifest, DataConfig(manifest=str(path)))


def test_missing_file(tmp_path):
    (tmp_path / "manifest.csv").write_text(GOOD)
    text = message(read_manifest, DataConfig(manifest=str(tmp_path / "manifset.csv")))
    assert (
        "there is no file" in text and "manifset.csv" in text and f"did you mean {tmp_path / 'manifest.csv'}?" in text
    )
    (tmp_path / "manifest.xlsx").touch()
    assert ".xlsx" in message(read_manifest, DataConfig(manifest=str(tmp_path / "manifest.xlsx")))


@pytest.mark.parametrize("text", ["", "image,label\n"])
def test_empty_table(read, text):
    assert "manifest.csv is empty: a header and one row an image are expected" in message(read, text)


def test_not_a_table(read, tmp_path):
    assert "cannot be read as csv" in message(read, GOOD + 'd.png,"well\n')
    (tmp_path / "m.parquet").write_text(GOOD)
    assert "cannot be read as parquet" in message(read_manifest, DataConfig(manifest=str(tmp_path / "m.parquet")))
    (tmp_path / "m.csv").write_bytes(GOOD.encode() + "d.png,häßlich\n".encode("latin-1"))
    assert "cannot be read as csv" in message(read_manifest, DataConfig(manifest=str(tmp_path / "m.csv")))


def test_missing_column(read):
    text = message(read, GOOD.replace("label", "Lable"))
    assert (
        "has no column 'label' (--data.label); its columns are image, Lable; did you mean --data.label Lable?" in text
    )
    # The column that holds the pictures is found by what stands in it.
    assert "did you mean --data.image file?" in message(read, GOOD.replace("image", "file"))


def test_duplicate_rows(read):
    text = GOOD + "./b.png,well\n"
    assert "row 4: the same image as row 2" in message(read, text)
    kept = read(text, on_problem="skip")
    assert kept.table["row"].tolist() == [1, 2, 3]
    assert kept.notes == ["left out, duplicate row: 1 row (4)"]


def test_duplicate_rows_that_contradict_each_other_are_both_left_out(read):
    text = GOOD + "b.png,sick\n"
    assert "row 2: the same image as row 4, with another label" in message(read, text)
    assert read(text, on_problem="skip").table["row"].tolist() == [1, 3]


def test_of_duplicate_rows_in_two_splits_the_test_row_stays(read):
    text = "image,label,split\na,sick,train\nb,well,train\na,sick,test\nc,well,val\n"
    assert read(text, on_problem="skip").table["row"].tolist() == [2, 3, 4]


def test_labels_outside_the_set(read):
    text = GOOD + "d.png,unsure\ne.png,\n,well\n"
    out = message(read, text, classes=("sick", "well"))
    assert out.splitlines() == [
        "3 rows of the manifest cannot be used:",
        "  row 4: the label 'unsure' is not one of 'sick', 'well'",
        "  row 5: the column 'label' is empty",
        "  row 6: the column 'image' is empty",
        "Mend them, or leave them out, counted: --data.on-problem skip",
    ]
    kept = read(text, classes=("sick", "well"), on_problem="skip")
    assert kept.table["row"].tolist() == [1, 2, 3]
    assert "left out, unknown label: 1 row (4)" in kept.notes and len(kept.notes) == 3


def test_only_the_first_problems_are_listed(read):
    text = GOOD + "".join(f"x{i}.png,\n" for i in range(30))
    lines = message(read, text).splitlines()
    assert (
        lines[0] == "30 rows of the manifest cannot be used:" and lines[-2] == "  ... and 10 more" and len(lines) == 23
    )


def test_nothing_left(read):
    assert "no row of the manifest is left" in message(
        read, "image,label\na,x\nb,y\n", classes=("u", "v"), on_problem="skip"
    )


def test_one_class_only(read):
    assert (
        message(read, GOOD.replace("sick", "well"))
        == "every image has the label 'well': a classifier needs two classes"
    )


def test_a_stated_class_without_images(read):
    classes = ("sick", "well", "unsure")
    assert "no image has the label 'unsure'" in message(read, GOOD, classes=classes)
    assert read(GOOD, classes=classes, on_problem="skip").notes == ["classes without an image: 'unsure'"]


def test_positive_class_is_never_guessed(read):
    text = message(read, GOOD, positive=None)
    assert "The classes are sick 1 (33.3%), well 2 (66.7%)" in text
    assert text.endswith("It is usually the rarest, here 'sick': --data.positive sick")
    balanced = message(read, GOOD + "d.png,sick\n", positive=None)
    assert balanced.endswith("so only you can tell: --data.positive sick or --data.positive well")
    assert message(read, GOOD, positive="sikc") == (
        "data.positive must be one of 'sick', 'well', got 'sikc' (did you mean 'sick'?)"
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"val_fraction": 0.0}, "data.val_fraction must be > 0 and < 1, got 0"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "data.val_fraction + data.test_fraction must be < 1, got 1.1"),
        ({"on_problem": "skipp"}, "did you mean 'skip'"),
        ({"classes": ("a", "b", "a")}, "data.classes names a class twice"),
    ],
)
def test_bad_fields_fail_at_once(fields, text):
    assert text in message(DataConfig, **fields)


def test_config_as_json():
    config = DataConfig(classes=("a", "b"), preprocess=Preprocess(size=64, window=(1.0, 2.0)))
    assert from_dict(DataConfig, to_dict(config)) == config
