"""Small imports, of what a sheet or a folder may hold: what is refused, told, emptied and remembered."""

import errno
import functools
import json
import shlex
import unicodedata
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raymed.config import UserError
from raymed.data import DataConfig, load
from raymed.data.intake import ImportConfig, SheetColumns, import_data, importer, pictures
from raymed.data.readers import read
from raymed.storage import paths


def manifest_of(report):
    return pd.read_csv(report.manifest, dtype=str, keep_default_na=False)


@pytest.fixture
def small(tmp_path):
    """small(sheet, names, **fields) -> config for images with these names (by `stem`) and this sheet."""

    def make(sheet, names, **fields):
        (tmp_path / "share").mkdir(exist_ok=True)
        for number, name in enumerate(names):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "share" / name)
        (tmp_path / "labels.csv").write_text(sheet)
        plain = {"images": tmp_path / "share", "labels": tmp_path / "labels.csv", "to": tmp_path / "imported"}
        plain |= {"key": "stem", "columns": SheetColumns(key="key"), "key_file": tmp_path / "secret" / "k.key"}
        return ImportConfig(**plain | fields)

    return make


def test_a_set_that_grows_keeps_its_pseudonyms(small):
    columns = SheetColumns(key="key", patient="pid")
    sheet = "key,label,pid\nb,sick,7\nd,well,8\n"
    before = manifest_of(import_data(small(sheet, ["b.png", "d.png"], columns=columns))).set_index("image")
    grown = small(sheet + "a,sick,8\n", ["a.png"], columns=columns)
    after = manifest_of(import_data(grown)).set_index("image")
    assert len(after) == 3 and after.loc[before.index].equals(before)
    assert set(after["patient"]) == set(before["patient"])


def test_a_set_that_grows_remembers_what_was_counted_before(small):
    def record():
        return json.loads((config.to / "import.json").read_text())

    config = small("key,label\na,sick\nb,well\n", ["a.png", "b.png"])
    import_data(config)
    first = record()
    import_data(config)
    assert record() == first and first["earlier"] == []  # the same was counted, since then
    import_data(small("key,label\na,sick\nb,well\nc,well\n", ["c.png"]))
    second = record()
    assert second["earlier"] == [{name: first[name] for name in ("time", "counts", "flow")}]
    assert second["counts"]["images"] == 3 and second["time"] > first["time"]
    import_data(small("key,label\na,sick\nb,well\n", []))
    assert [told["counts"]["images"] for told in record()["earlier"]] == [2, 3]


def test_identifiers_in_kept_columns_are_emptied(small):
    columns = SheetColumns(key="key", patient="pid", keep=("note", "grade"))
    sheet = "key,label,pid,note,grade\na,sick,00123,see 00123,2\nb,well,00124,fine,1\n"
    report = import_data(small(sheet, ["a.png", "b.png"], columns=columns))
    table = manifest_of(report)
    assert table["note"].tolist() == ["", "fine"] and table["grade"].tolist() == ["2", "1"]
    assert "column note: 1 cells named a patient and are empty" in report.notes


def test_images_that_cannot_be_read(small):
    config = small("key,label\na,sick\nb,well\nc,well\n", ["a.png", "b.png", "c.png"])
    whole = (config.images / "b.png").read_bytes()
    (config.images / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="unreadable image: row 3: an image with its key: truncated or damaged"):
        import_data(config)
    report = import_data(replace(config, on_problem="skip"))
    assert report.classes == {"sick": 1, "well": 1}
    assert ("unreadable image", 1) in report.flow


def test_without_copies_the_manifest_names_the_files(small, tmp_path):
    config = small("key,label\na,sick\nb,well\n", ["a.png", "b.png"], copy=False)
    frames = [Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)) for _ in range(3)]
    frames[0].save(config.images / "a.tif", save_all=True, append_images=frames[1:])
    (config.images / "a.png").unlink()
    report = import_data(replace(config, frames="last", blank="1 1 4 4"))
    table = manifest_of(report)
    assert table[["image", "frame", "blank_boxes"]].values.tolist() == [
        ["a.tif", "3", "1 1 4 4"],
        ["b.png", "", "1 1 4 4"],
    ]
    assert f"--data.root={config.images}" in report.command
    assert sorted(file.name for file in config.to.iterdir()) == [
        "import.json",
        "manifest.csv",
        "pictures.jsonl",
        "unlabelled.csv",
    ]


def test_what_is_blanked_is_black_for_the_network_without_copies_too(small, tmp_path):
    names = [f"{i}.png" for i in range(12)]
    sheet = "key,label\n" + "".join(f"{i},{'sick' if i % 2 else 'well'}\n" for i in range(12))
    report = import_data(small(sheet, names, copy=False, blank="2 3 7 9"))
    config = DataConfig(str(report.manifest), root=str(tmp_path / "share"), positive="sick")
    data = load(config, tmp_path / "cache")
    shown = data.batch(np.arange(12)).unit_image()[:, 0].mul(255).round().byte().numpy()
    assert not shown[:, 3:9, 2:7].any()
    originals = np.stack([read(tmp_path / "share" / name) for name in sorted(names)])
    assert originals[:, 3:9, 2:7].all(axis=0).any()
    originals[:, 3:9, 2:7] = 0
    np.testing.assert_array_equal(shown, originals)


@pytest.mark.parametrize("name", ["홍길동_00123456.png", "123456-1.png", "b/00123456.png"])
def test_paths_of_pictures_that_name_patients_need_copies_too(small, name, tmp_path):
    (tmp_path / "share" / "b").mkdir(parents=True)
    columns = SheetColumns(key="key", patient="pid")
    sheet = f"key,label,pid\n{name},sick,00123456\nc.png,well,8\n"
    config = small(sheet, [name, "c.png"], key="path", columns=columns, copy=False)
    with pytest.raises(UserError, match="the paths of 1 images hold a name or number.* leave out --no-copy"):
        import_data(config)
    assert not (config.to / "manifest.csv").exists()
    assert len(manifest_of(import_data(replace(config, copy=True)))) == 2


def test_a_full_disk_is_told(small, monkeypatch):
    config = small("key,label\na,sick\nb,well\n", ["a.png", "b.png"])

    def full(path, data, mode=None):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    for module in (pictures, paths, importer):
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_atomic", full)
            with pytest.raises(UserError, match="the disk of .* is full: make room; the same command goes on"):
                import_data(config)
    assert len(manifest_of(import_data(config))) == 2


def test_places_that_are_refused(small, tmp_path):
    config = small("key,label\na,sick\nb,well\n", ["a.png", "b.png"])
    for change, told in (
        ({"to": config.images / "imported"}, "lies in the images' folder"),
        ({"key_file": config.images / "my.key"}, "must not lie in"),
        ({"key_file": config.to / "my.key"}, "must not lie in"),
        ({"images": tmp_path / "none"}, "there is no folder"),
        ({"labels": tmp_path / "none.csv"}, "there is no file"),
        ({"positive": "wel"}, "did you mean 'well'"),
    ):
        with pytest.raises(UserError, match=told):
            import_data(replace(config, **change))
    assert not (config.to / "manifest.csv").exists() and not list(config.images.rglob("*.key"))


def test_hangul_is_one_text_however_it_is_composed(small, tmp_path):
    """File names of a Mac are NFD; a sheet of Korean Windows is cp949, which has NFC only."""
    nfd = functools.partial(unicodedata.normalize, "NFD")
    columns = SheetColumns(key=nfd("파일"), label=nfd("판독"), keep=(nfd("비고"),))
    names = [nfd("조영_가.png"), "조영_나.png", nfd("촬영_다.png")]
    chosen = {"key": "name", "columns": columns, "map": (nfd("폐쇄="), "open=개통"), "files": ("조영*",)}
    config = small("", names, **chosen, positive=nfd("폐쇄"))
    sheet = "파일,판독,비고\n조영_가.png,폐쇄,1\n조영_나.png,개통,2\n촬영_다.png,개통,3\n"
    (tmp_path / "labels.csv").write_bytes(sheet.encode("cp949"))
    report = import_data(config)
    assert report.classes == {"폐쇄": 1, "open": 1} and "--data.positive=폐쇄" in shlex.split(report.command)
    assert sorted(manifest_of(report)["비고"]) == ["1", "2"]
    assert "the sheet was read as cp949: where letters look wrong, state --encoding" in report.notes


def test_columns_that_go_by_their_name(small):
    sheet = "key,Result,Patient ID,SEX,age,Site\na,sick,007,F,44,Bonn\nb,well,007,F,45,Bonn\nc,well,8,M,46,Ulm\n"
    config = small(sheet, ["a.png", "b.png", "c.png"])
    report = import_data(config)
    table = manifest_of(report)
    assert len(set(table["patient"])) == report.counts["patients"] == 2
    assert table[["sex", "age", "site"]].values.tolist() == [
        ["F", "44", "Bonn"],
        ["F", "45", "Bonn"],
        ["M", "46", "Ulm"],
    ]
    assert "patient: column 'Patient ID', by its name (--columns.patient '' leaves it unused)" in report.notes
    unused = replace(config, columns=SheetColumns(key="key", patient="", site=""), site="InstitutionName")
    table = manifest_of(import_data(unused))
    assert "patient" not in table and set(table["site"]) == {""} and set(table["sex"]) == {"F", "M"}


def test_a_case_is_nobodys_but_one_patients(small):
    """Without patients the images of a case stay together."""
    columns = SheetColumns(key="key", case="study")
    report = import_data(
        small("key,label,study\na,sick,1\nb,sick,1\nc,well,2\n", ["a.png", "b.png", "c.png"], columns=columns)
    )
    table = manifest_of(report)
    assert table.groupby("case")["patient"].nunique().tolist() == [1, 1] and report.counts["patients"] == 2


def test_what_the_user_is_told(small, tmp_path):
    (tmp_path / "mapping.csv").write_text("id,same\n7,8\n70,71\n")
    config = small("key,label,pid\na,sick,7\nb,well,8\n", ["a.png", "b.png"], patients=tmp_path / "mapping.csv")
    report = import_data(replace(config, columns=SheetColumns(key="key", patient="pid")))
    assert report.counts["patients"] == 1
    assert "--patients: 2 of its identifiers stand in no image and no row" in report.notes
    again = import_data(replace(config, patients=None))
    assert "no image has a patient: one with several cases may be in two splits (--columns.patient NAME)" in again.notes
    assert "patients" not in again.counts and "patient" not in manifest_of(again)
    assert "columns of the sheet that are not used: 'pid'" in again.notes
    record = json.loads((config.to / "import.json").read_text())
    assert record["flow"] == [["files", 2], ["in the manifest", 2]] and record["classes"] == again.classes
