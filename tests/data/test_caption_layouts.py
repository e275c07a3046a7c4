"""Small trees written as MedPix 2.0, ROCO and ROCOv2 are published."""

import json

import numpy as np
import pytest
from PIL import Image

from raymed.config import UserError
from raymed.data.captions import CaptionConfig, load_captions, read_captions

CASES = {"train": 8, "dev": 3, "test": 3}


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as info:
        call(*args, **kwargs)
    return str(info.value)


@pytest.fixture
def draw():
    """draw(path): a random picture, of the kind that the name tells."""
    rng = np.random.default_rng(0)

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 32), np.uint8)).save(path)

    return write


@pytest.fixture
def load_layout(tmp_path):
    from raymed.data.preprocess import Preprocess

    def run(path, layout, **fields):
        config = CaptionConfig(manifest=str(path), layout=layout, preprocess=Preprocess(size=16), **fields)
        return load_captions(config, tmp_path / "cache")

    return run


def description(case, number, caption):
    return {
        "Type": "CT",
        "U_id": case,
        "image": f"{case}_synpic{number}",
        "Description": {
            "ACR Codes": "8.-1",
            "Age": "73",
            "Caption": caption,
            "Figure Part": None,
            "Modality": "CT - noncontrast",
            "Plane": "Axial",
            "Sex": "male",
        },
        "Location": "Chest, Pulmonary",
        "Location Category": "Thorax",
    }


@pytest.fixture
def medpix(tmp_path, draw):
    """A folder with two images a case; the captions of case 3 are placeholders."""
    folder = tmp_path / "MedPix-2-0"
    (folder / "splitted_dataset").mkdir(parents=True)
    split = [name for name, num in CASES.items() for _ in range(num)]
    cases = [f"MPX{1000 + i}" for i in range(len(split))]
    records = []
    for i, case in enumerate(cases):
        for number in (1, 2):
            text = "IN PROGRESS" if i == 3 else f"Axial CT {number} of case {i}.\n\nNo \u201cfree\u201d fluid is seen."
            records.append(description(case, number, text))
            draw(folder / "images" / f"{case}_synpic{number}.png")
    about = [
        {
            "U_id": case,
            "TAC": [f"{case}_synpic1", f"{case}_synpic2"],
            "MRI": [],
            "Case": {"Title": f"Diagnosis {case}", "Exam": "N/A", "Findings": f"Findings of the case {case}."},
            "Topic": {"Title": "Mass", "Category": "Neoplasm"},
        }
        for case in cases
    ]
    listed = {name: [c for c, s in zip(cases, split, strict=True) if s == name] for name in CASES}
    halves = {"train_1": listed["train"][::2], "train_2": listed["train"][1::2]}
    (folder / "Descriptions.json").write_text(json.dumps(records))
    (folder / "Case_topic.json").write_text(json.dumps(about, indent=4))
    (folder / "splitted_dataset" / "uid_list.json").write_text(json.dumps(listed | halves))
    for name in CASES:
        lines = [json.dumps(record) for record in records if record["U_id"] in listed[name]]
        (folder / "splitted_dataset" / f"descriptions_{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_medpix(medpix, load_layout):
    data = load_layout(medpix / "Descriptions.json", "medpix", findings="category")
    assert len(data) == 26 and data.has_patients
    assert [len(set(data.patients[i])) for i in data.splits.values()] == [7, 3, 3]
    assert data.captions[0] == ("Axial CT 1 of case 0. No \u201cfree\u201d fluid is seen.",)
    assert data.cases.tolist() == data.patients.tolist()
    assert "left out, caption under 20 characters: 2 rows (7, 8)" in data.notes
    assert data.findings == ("Neoplasm",) and data.has_finding.all()
    longer = load_layout(medpix / "Descriptions.json", "medpix", caption=("caption", "case_findings"))
    assert longer.captions[2][1] == "Findings of the case MPX1001." and len(longer) == 28


def test_medpix_by_its_parts(medpix, load_layout):
    whole = load_layout(medpix / "Descriptions.json", "medpix")
    parts = load_layout(medpix / "splitted_dataset" / "descriptions_train.jsonl", "medpix")
    assert parts.captions == whole.captions and parts.fingerprint == whole.fingerprint
    table = read_captions(CaptionConfig(manifest=str(medpix / "Descriptions.json"), layout="medpix")).table
    assert set(table["split"]) == {"train", "val", "test"}


def test_medpix_without_splits_is_split_by_case(medpix, load_layout):
    (medpix / "splitted_dataset" / "uid_list.json").unlink()
    (medpix / "Case_topic.json").unlink()
    data = load_layout(medpix / "Descriptions.json", "medpix")
    sides = [set(data.patients[i]) for i in data.splits.values()]
    assert sum(map(len, sides)) == 13 and all(sides)


def test_medpix_with_something_missing(medpix, load_layout, draw):
    draw(medpix / "images" / "MPX9_synpic1.png")
    (medpix / "images" / "MPX1000_synpic2.png").unlink()
    assert "row 2: images/MPX1000_synpic2.png: there is no such file" in message(
        load_layout, medpix / "Descriptions.json", "medpix"
    )
    data = load_layout(medpix / "Descriptions.json", "medpix", on_problem="skip")
    assert "images without a caption, not used: 1, for example MPX9_synpic1.png" in data.notes
    records = json.loads((medpix / "Descriptions.json").read_text())
    del records[2]["Description"]["Caption"]
    (medpix / "Descriptions.json").write_text(json.dumps(records))
    assert "record 3 has no 'Caption'" in message(load_layout, medpix / "Descriptions.json", "medpix")
    (medpix / "Descriptions.json").write_text("{broken")
    assert "is not JSON" in message(load_layout, medpix / "Descriptions.json", "medpix")
    (medpix / "Descriptions.json").write_bytes('[{"Caption": "Gefäß"}]'.encode("latin-1"))
    assert "line 1 is not UTF-8" in message(load_layout, medpix / "Descriptions.json", "medpix")


@pytest.fixture
def roco(tmp_path, draw):
    """ROCO: 8, 4 and 4 images; the first article is in train and in test."""
    number = 0
    for split, num in (("train", 8), ("validation", 4), ("test", 4)):
        folder = tmp_path / "data" / split / "radiology"
        captions, links, licences = [], [], ["ROCO_ID,PMC_ID,CC"]
        for i in range(num):
            one, article, figure = f"ROCO_{number:05d}", f"PMC{100 + number * (i > 0)}", f"fig-{number}.jpg"
            captions.append(f'{one}\t Axial computed tomography \u2013 number {number}, "arrow".')
            links.append(f"{one}\twget -r ftp://host/1e/ed/{article}.tar.gz -P /path/to/Dir\t{figure}")
            licences.append(f"{one},{article}_{figure},CC BY-NC")
            draw(folder / "images" / f"{article}_{figure}")
            number += 1
        for name, lines in (("captions", captions), ("dlinks", links), ("licences", licences)):
            (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def test_roco(roco, load_layout):
    path = roco / "train" / "radiology" / "captions.txt"
    data = load_layout(path, "roco")
    assert [len(i) for i in data.splits.values()] == [8, 4, 4] and not data.has_patients
    assert data.captions[9] == ('Axial computed tomography \u2013 number 9, "arrow".',)
    assert "rows to 12: validation/radiology/captions.txt" in data.notes
    assert any(note.startswith("of 4 test images, 1 are from an article that train has too") for note in data.notes)
    by_article = load_layout(path, "roco", patient="article", split="")
    assert by_article.has_patients and len(set(by_article.patients)) == 14
    (path.parent / "licences.txt").unlink()
    again = load_layout(roco / "test" / "radiology" / "captions.txt", "roco")
    assert again.captions == data.captions and again.fingerprint == data.fingerprint


def test_roco_with_images_named_by_their_numbers(roco, load_layout):
    """As its script names them today; once they bore the names that licences.txt states."""
    path = roco / "train" / "radiology" / "captions.txt"
    before = load_layout(path, "roco")
    for number, image in enumerate(before_images(path)):
        image.rename(image.with_name(f"ROCO_{number:05d}.jpg"))
    after = load_layout(path, "roco")
    assert after.captions == before.captions and after.fingerprint == before.fingerprint
    assert any("1 are from an article that train has too" in note for note in after.notes)


def before_images(path):
    """The images in the order of their rows."""
    table = read_captions(CaptionConfig(manifest=str(path), layout="roco")).table
    return [source.path for source in table["source"]]


def test_roco_with_something_missing(roco, load_layout):
    path = roco / "train" / "radiology" / "captions.txt"
    (path.parent / "images" / "PMC101_fig-1.jpg").unlink()
    text = path.read_text() + "ROCO_99999\tA caption of an image that nobody names.\nno tab in this line at all\n"
    path.write_text(text)
    lines = message(load_layout, path, "roco").splitlines()
    assert lines[0] == "2 rows of the manifest cannot be used:" and "row 9: the column 'image' is empty" in lines[1]
    data = load_layout(path, "roco", on_problem="skip")
    assert len(data) == 15 and "left out, unreadable image: 1 row (2)" in data.notes
    for name in ("licences.txt", "dlinks.txt"):
        (path.parent / name).unlink()
    assert "has neither licences.txt nor dlinks.txt" in message(load_layout, path, "roco")
    (path.parent / "other.txt").touch()
    assert "expects captions.txt (ROCO) or train_captions.csv" in message(
        load_layout, path.parent / "other.txt", "roco"
    )
    stray = roco / "captions.txt"
    stray.write_text("ROCO_1\tA caption.")
    assert "ROCO is expected as train/radiology/captions.txt" in message(load_layout, stray, "roco")


@pytest.mark.parametrize("place", ["{split}", "{split}_images/{split}", "images"])
def test_roco_2(tmp_path, draw, load_layout, place):
    concepts = {"C0040405": "X-Ray Computed Tomography", "C0817096": "Chest"}
    for split, num in (("train", 6), ("valid", 3), ("test", 3)):
        ids = [f"ROCOv2_2023_{split}_{i:06d}" for i in range(1, num + 1)]
        rows = [f'{one},"Head CT, slice {one[-2:]} of {split}, shows a mass (Figure 2)."' for one in ids]
        (tmp_path / f"{split}_captions.csv").write_text("\n".join(["ID,Caption", *rows]) + "\n")
        rows = [f"{one},C0040405;C0817096" for one in ids[1:]]
        (tmp_path / f"{split}_concepts.csv").write_text("\n".join(["ID,CUIs", *rows]) + "\n")
        for one in ids:
            draw(tmp_path / place.format(split=split) / f"{one}.jpg")
    rows = [f"{code},{name}" for code, name in concepts.items()]
    (tmp_path / "cui_mapping.csv").write_text("\n".join(["CUI,Canonical name", *rows]) + "\n")
    data = load_layout(tmp_path / "train_captions.csv", "roco", findings="concepts")
    assert [len(i) for i in data.splits.values()] == [6, 3, 3]
    assert data.captions[7] == ("Head CT, slice 02 of valid, shows a mass.",)
    assert data.findings == ("Chest", "X-Ray Computed Tomography")
    assert data.has_finding.sum() == 2 * 9 and not data.has_finding[0].any()
    (tmp_path / "train_captions.csv").write_text("image,text\na,b\n")
    assert "rows with ID and Caption are expected, got image, text" in message(
        load_layout, tmp_path / "train_captions.csv", "roco"
    )


@pytest.mark.parametrize("layout", ["medpix", "roco"])
def test_a_layout_in_a_bucket_is_that_on_the_disk(medpix, roco, s3, load_layout, layout):
    folder, name = (medpix, "Descriptions.json") if layout == "medpix" else (roco, "train/radiology/captions.txt")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            s3.put(f"set/{path.relative_to(folder)}", path.read_bytes())
    here, there = load_layout(folder / name, layout), load_layout(f"{s3.url}/set/{name}", layout)
    assert there.captions == here.captions and there.fingerprint == here.fingerprint and there.notes == here.notes
