"""The data sheet: its numbers against the manifest, which images it shows, and that nothing else is left behind."""

import base64
import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_page import Page

from raymed.data import Augment, DataConfig, Preprocess, load
from raymed.data.phantoms import write_hsg
from raymed.report.data_sheet import data_sheet
from raymed.report.data_sheet_figures import tiles
from raymed.report.data_sheet_images import drawn_for, grey_scale, network_input

FLOW = [("images found", 90), ("no row in the sheet", 6), ("equivocal $x$ <b>", 4), ("in the manifest", 80)]


@pytest.fixture(autouse=True, scope="module")
def small_figures():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("raymed.report.style.DPI", 60)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 patients, 10 of them occluded, two images each."""
    folder = tmp_path_factory.mktemp("phantoms")
    path = write_hsg(folder / "set", num_patients=40, size=48)
    return load(DataConfig(manifest=str(path), positive="occluded"), folder / "cache")


@pytest.fixture(scope="module")
def attributes(data):
    site = np.where(data.labels == 1, "서울", np.where(data.cases % 2, "서울", "B"))
    return pd.DataFrame({"site": site, "year": 2020 + data.cases % 2, "sex": "F", "patient_name": "Kim Minji"})


@pytest.fixture(scope="module")
def written(data, attributes, tmp_path_factory):
    return data_sheet(data, Augment(), attributes, FLOW, tmp_path_factory.mktemp("sheet") / "data_sheet.html")


@pytest.fixture(scope="module")
def page(written):
    return Page(written.read_text())


def text_of(page):
    return " ".join(" ".join(page.texts).split())


def row(page, name, num_cells):
    return next(cells for cells in page.rows if cells[0] == name and len(cells) == num_cells)


def test_the_page_is_one_file_with_every_section(written, page):
    assert [path.name for path in written.parent.iterdir()] == ["data_sheet.html"]
    sections = [value for tag, name, value in page.attributes if (tag, name) == ("h2", "id")]
    assert sections == [
        "warnings", "where-the-images-come-from", "counts", "what-can-be-measured", "as-the-network-receives-them",
        "with-augmentation", "outliers", "nearly-the-same-images", "notes",
    ]  # fmt: skip
    # flow, composition, two galleries of two classes, three kinds of outliers
    assert page.tags.count("img") == 2 + 2 * 2 + 3
    assert "Kim Minji" not in written.read_text()


def test_counts_are_those_of_the_manifest(data, page):
    for split in ("train", "val", "test"):
        indices = data.splits[split]
        sick, cases = (len(np.unique(data.cases[i])) for i in (indices[data.labels[indices] == 1], indices))
        expected = [sick, cases - sick, cases]
        cells = [f"{num} {2 * num} images" for num in expected]
        assert row(page, split, 5) == [split, *cells, str(cases)]
    assert row(page, "all", 5) == ["all", "10 20 images", "30 60 images", "40 80 images", "40"]
    seoul = row(page, "서울", 7)
    num_other = len(np.unique(data.cases[(data.labels == 0) & (data.cases % 2 == 1)]))
    num = 10 + num_other
    assert seoul[:4] == ["서울", str(num), str(2 * num), f"10 ({10 / num:.0%})"]
    assert sum(map(int, seoul[4:])) == num
    assert "The same in all images: sex F." in text_of(page)
    assert "40 cases: 80 images of 40 patients; 10 cases positive (occluded), 25%." in text_of(page)


def test_intervals_to_expect(page):
    # Wilson's for 0.9 of 10, by hand: (0.9 + 0.192073) / 1.384146 = 0.788987 and a half width of 0.193266.
    cells = row(page, "all, by cross-validation", 6)
    assert cells[1:4] == ["10", "30", "0.60 – 0.98 ± 0.19"]


def test_warnings_are_shown_and_counted(data, page):
    text = text_of(page)
    assert "All 10 cases of the class 'occluded' have the site '서울': a network can tell" in text
    for split in ("val", "test"):
        num = len(np.unique(data.cases[data.splits[split]][data.labels[data.splits[split]] == 1]))
        assert f"The {split} split has {num} positive case" in text
    assert "warnings 3" in text


def test_the_flow_ends_with_what_is_there(data, page, tmp_path):
    told = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")][0]
    said = "images found (n = 90); no row in the sheet (n = 6); equivocal $x$ <b> (n = 4); in the manifest (n = 80)"
    assert told == said
    steps = [("files", 90), ("no row", 6), ("in the manifest", 84)]
    unread = data_sheet(data, Augment(), None, steps, tmp_path / "unread.html").read_text()
    assert "no row (n = 6); left out when images were read, see the notes (n = 4); used (n = 80)" in unread
    steps = [("files", 46), ("no row", 6), ("in the manifest", 40)]  # of two frames each
    text = data_sheet(data, Augment(), None, steps, tmp_path / "frames.html").read_text()
    assert "no row (n = 6); in the manifest (n = 40)" in text and "One file may be several images." in text


def test_without_labels_or_patients_there_is_a_page(data, tmp_path):
    num = len(data)
    bare = replace(
        data, classes=("image",), positive="", labels=np.zeros(num, np.int64), class_codes=np.zeros(num, np.int64),
        patients=np.arange(num), has_patients=False, cases=None, views=None, sides=None,
    )  # fmt: skip
    text = text_of(Page(data_sheet(bare, Augment.none(), None, None, tmp_path / "bare.html").read_text()))
    assert "80 images." in text and "positive" not in text and "What can be measured" not in text


def test_captions_say_whether_all_are_shown(data, page):
    text, train = text_of(page), data.labels[data.splits["train"]]
    num = int((train == 1).sum())
    assert num <= 24 < len(train) - num
    assert f"occluded: {num} images, all of the training split." in text
    assert f"patent: 24 images, drawn at random from the {len(train) - num} of the training split." in text


def test_shown_are_training_images_of_different_patients(data):
    for label in data.classes:
        indices = drawn_for(data, label, 24)
        assert set(indices) <= set(data.splits["train"])
        assert {data.classes[k] for k in data.class_codes[indices]} == {label}
        train = data.splits["train"]
        patients = len(np.unique(data.patients[train[data.class_codes[train] == data.classes.index(label)]]))
        assert len(np.unique(data.patients[indices])) == min(len(indices), patients)
        assert (np.diff(indices) > 0).all() and (drawn_for(data, label, 24) == indices).all()


def test_images_are_what_the_network_receives(data):
    indices = np.array([3, 60, 11])
    batch = data.batch(indices)
    assert np.array_equal(network_input(data, indices), batch.unit_image().numpy()[:, 0])
    changed = Augment()(batch.unit_image(), batch.index, 0, 0)
    assert np.array_equal(network_input(data, indices, Augment()), changed.numpy()[:, 0])
    own = replace(data, preprocess=replace(data.preprocess, normalisation="image"))
    normalised = network_input(own, indices)
    assert normalised.mean((1, 2)) == pytest.approx(0, abs=1e-5) and normalised.std((1, 2)) == pytest.approx(
        1, abs=1e-3
    )
    low, high = grey_scale(data)
    train = network_input(data, data.splits["train"])
    assert (train < low).mean() < 0.02 and (train > high).mean() < 0.02 and low < high


def test_tiles_lie_in_reading_order_in_one_scale(tmp_path):
    grey = np.linspace(0, 1, 10)
    tiles(tmp_path / "tiles.png", [np.full((4, 4), value) for value in grey], ["t"] * 10)
    picture = np.asarray(Image.open(tmp_path / "tiles.png").convert("L"), float) / 255
    width, height = picture.shape[1] / (8 + 7 * 0.05), picture.shape[0] / 2
    seen = [picture[int((i // 8 + 0.4) * height), int((i % 8 * 1.05 + 0.5) * width)] for i in range(10)]
    assert seen == pytest.approx(grey, abs=0.01)


def test_colour_and_a_copy_under_another_patient(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (12, 16, 16, 3), np.uint8)
    images[5] = images[0] // 2 + 40
    rows = []
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        split = ("train", "val", "test")[i // 2 % 3]
        rows.append({"image": f"{i}.png", "label": "ab"[i % 2], "split": split, "patient": str(i)})
    pd.DataFrame(rows).to_csv(tmp_path / "manifest.csv", index=False)
    config = DataConfig(manifest=str(tmp_path / "manifest.csv"), positive="a", preprocess=Preprocess(channels=3))
    coloured = load(config, tmp_path / "cache")
    assert np.array_equal(network_input(coloured, np.arange(12)), images.astype(np.float32) / 255)
    page = Page(data_sheet(coloured, Augment(), None, None, tmp_path / "sheet.html").read_text())
    assert row(page, "1 and 6", 4)[1:3] == ["train / test", "a / b"]
    assert (
        "1 pair of images of different patients look nearly the same; in two splits: 1, with two labels: 1."
        in text_of(page)
    )
    first = next(value for tag, name, value in page.attributes if (tag, name) == ("img", "src"))
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(first.split(",")[1]))).convert("RGB"), int)
    assert np.ptp(picture, axis=2).max() > 100
