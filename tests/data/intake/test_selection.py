"""Which image goes with which row, from hand-written headers and sheets."""

import pytest

from raymed.config import UserError
from raymed.data.intake.header import Found
from raymed.data.intake.rows import read_rows, used_columns
from raymed.data.intake.selection import select
from raymed.data.intake.settings import ImportConfig, SheetColumns
from raymed.data.intake.sheet import read_sheet


def image(path, key, patient="P1", frames=1, **tags):
    return Found(path, frames, key, patient, {"modality": "RF"} | tags)


@pytest.fixture
def run(tmp_path):
    """run(sheet, images, **config fields; columns=...) -> (selection, findings of the rows)."""

    def link(text, images, columns=None, persons=None, **fields):
        path = tmp_path / "labels.csv"
        path.write_text(text)
        columns = SheetColumns(key="key", **columns or {})
        config = ImportConfig(images=tmp_path, labels=path, columns=columns, **fields)
        sheet = read_sheet(path, keys=["key"])
        rows, findings = read_rows(sheet, used_columns(sheet, config, path), config.label_map())
        return select(images, rows, persons or {}, config), findings

    return link


def pairs(chosen):
    return [(item.image, item.frame, item.row.number) for item in chosen.items]


def stopping(findings):
    return [(finding.kind, finding.row) for finding in findings if finding.stops]


def test_every_image_has_one_fate(run):
    images = [
        image("a1", "A"),
        image("a2", "A"),
        image("b", "B"),
        image("c", "", "P3"),
        image("d", "D"),
        image("e", "E"),
    ]
    sheet = "key,label\nA,sick\nB,equivocal\nD,moved\nE,?\nF,well\n"
    chosen, findings = run(sheet, images, map=("sick=", "well="), excluded=("moved",))
    assert pairs(chosen) == [(0, None, 2), (1, None, 2), (2, None, 3)]
    assert chosen.left_out == {
        3: "no AccessionNumber in its header",
        4: "excluded: moved",
        5: "its row cannot be used: unknown label",
    }
    assert stopping(findings) == [("unknown label", 5)]
    assert [(f.kind, f.row, f.image) for f in chosen.findings] == [
        ("image without a label", None, "c"),
        ("label without an image", 6, ""),
    ]


def test_two_rows_of_one_key(run):
    images = [image("a", "A"), image("b", "B")]
    chosen, findings = run("key,label\nA,sick\nA,well\nB,sick\nB, Sick\n", images, map=("sick=", "well="))
    assert pairs(chosen) == [(1, None, 4)]
    assert chosen.left_out == {0: "its row cannot be used: duplicate key"}
    assert stopping(findings) == [("duplicate key", 2), ("duplicate key", 3)]
    assert [(f.kind, f.row) for f in findings if not f.stops] == [("repeated row", 4)]


def test_rows_that_differ_in_side(run):
    images = [image("l", "A", side="left"), image("r", "A", side="right"), image("x", "A")]
    sheet = "key,label,Seite\nA,sick,L\nA,well,우측\n"
    chosen, findings = run(sheet, images, {"side": "Seite"})
    assert pairs(chosen) == [(0, None, 2), (1, None, 3)] and findings == []
    assert stopping(chosen.findings) == [("another side", 2)]
    one, _ = run("key,label,Seite\nA,sick,left\n", images, {"side": "Seite"})
    assert pairs(one) == [(0, None, 2), (2, None, 2)] and one.left_out == {1: "another side"}


def test_frames(run):
    images = [image("run", "A", frames=4), image("single", "A")]
    sheet = "key,label\nA,sick\n"
    for which, frames in (("first", [1]), ("middle", [2]), ("last", [4]), ("all", [1, 2, 3, 4])):
        assert pairs(run(sheet, images, frames=which)[0]) == [*((0, frame, 2) for frame in frames), (1, None, 2)]
    named = run("key,label,frame\nA,sick,3\n", images, {"frame": "frame"})[0]
    assert pairs(named) == [(0, 3, 2), (1, None, 2)]
    beyond = run("key,label,frame\nA,sick,5\n", images, {"frame": "frame"})[0]
    assert pairs(beyond) == [(1, None, 2)] and stopping(beyond.findings) == [("no such frame", 2)]
    assert stopping(run("key,label,frame\nA,sick,0\n", images, {"frame": "frame"})[1]) == [("no frame number", 2)]


def test_rows_that_differ_in_frame(run):
    sheet = "key,label,frame\nA,sick,1\nA,well,4\n"
    chosen, findings = run(sheet, [image("run", "A", frames=4), image("single", "A")], {"frame": "frame"})
    assert pairs(chosen) == [(0, 1, 2), (0, 4, 3)] and findings == []
    assert chosen.left_out == {1: "frame of which object"}
    two = run(sheet, [image("run", "A", frames=4), image("other", "A", frames=4)], {"frame": "frame"})[0]
    assert pairs(two) == [] and len(two.left_out) == 2


def test_one_key_for_two_patients_joins_nothing(run):
    images = [image("a", "A", "P1"), image("b", "A", "P2"), image("c", "C", "P1")]
    chosen, _ = run("key,label\nA,sick\nC,well\n", images)
    assert pairs(chosen) == [(2, None, 3)]
    assert stopping(chosen.findings) == [("several patients with one key", 2)]
    together, _ = run("key,label\nA,sick\nC,well\n", images, persons={"P1": "P2", "P2": "P2"})
    assert pairs(together) == [(0, None, 2), (1, None, 2), (2, None, 3)]
    assert {item.patient for item in together.items} == {"P2"}


def test_the_sheets_patient_is_compared_with_the_images(run):
    sheet = "key,label,pid\nA,sick,017\nB,well,18\nC,well,19\n"
    images = [image("a", "A", "017"), image("b", "B", "018"), image("c", "C", "")]
    chosen, _ = run(sheet, images, {"patient": "pid"})
    assert [(item.image, item.patient) for item in chosen.items] == [(0, "017"), (2, "19")]
    (finding,) = (finding for finding in chosen.findings if finding.stops)
    assert (
        finding.text
        == "row 3: 1 image with its key and the column 'pid' name 2 patients, which differ only in leading zeros"
    )


def test_modalities_are_stated_where_there_are_several(run):
    images = [image("a", "A"), image("b", "B"), image("ct", "B", modality="CT"), image("mr", "Z", modality="MR")]
    sheet = "key,label\nA,sick\nB,well\n"
    with pytest.raises(UserError, match=r"several modalities: RF \(2\), CT \(1\). State yours: --modalities RF"):
        run(sheet, images)
    chosen, _ = run(sheet, images, modalities=("RF",))
    assert pairs(chosen) == [(0, None, 2), (1, None, 3)]
    assert chosen.left_out == {2: "modality CT", 3: "no row in the sheet"}
    assert run(sheet, images, modalities=("RF", "XA"))[0].left_out == chosen.left_out
    with pytest.raises(UserError, match=r"modality rf or XA \(--modalities\); there are RF \(2\), CT \(1\)"):
        run(sheet, images, modalities=("rf", "XA"))


def test_nothing_matches(run):
    with pytest.raises(UserError, match=r"\(1 images, 2 rows\). 1 pairs differ only in leading zeros"):
        run("key,label\n7,sick\n8,well\n", [image("a", "007")])


def test_paths_that_begin_elsewhere(run):
    with pytest.raises(UserError, match="1 rows end in the name of an image: --images must be where"):
        run("key,label\ntest/a.png,sick\nb.png,well\n", [image("a.png", "a.png")], key="path")


def test_what_rows_state_in_the_manifests_words(run):
    columns = {"age": "Alter", "sex": "성별", "date": "Datum", "site": "Ort", "readers": ("r1", "r2")}
    sheet = (
        "key,Result,Alter,성별,Datum,Ort,r1,r2\nA,sick,034 Y,여,2021-03-04,Bonn,SICK,?\nB,well,93,M,20240105,,well,\n"
    )
    sheet += "C,well,adult,x,4.3.21,,well,\n"
    images = [image("a", "A"), image("b", "B"), image("c", "C")]
    chosen, findings = run(sheet, images, columns, map=("sick=", "well="), unlabelled=("?",))
    stated = [item.row.stated for item in chosen.items]
    assert stated[0] == {"site": "Bonn", "age": "34", "sex": "F", "year": "2021"} | {
        "label_reader1": "sick",
        "label_reader2": "",
    }
    assert [(row["age"], row["sex"], row["year"]) for row in stated[1:]] == [("90", "M", "2024"), ("", "", "")]
    assert [(f.kind, f.row, f.stops) for f in findings] == [("not understood, left empty", 4, False)] * 3


def test_columns_that_are_not_there(run):
    images = [image("a", "A")]
    with pytest.raises(UserError, match=r"which column holds the label .* 'key', 'Befund'"):
        run("key,Befund\nA,x\n", images)
    with pytest.raises(
        UserError, match=r"no column 'pid' \(--columns.patient\); its columns are 'key', 'label', 'PID'"
    ):
        run("key,label,PID\nA,x,1\n", images, {"patient": "pid"})
    with pytest.raises(UserError, match=r"Did you mean --columns.patient PID\?"):
        run("key,label,PID\nA,x,1\n", images, {"patient": "pid"})
    with pytest.raises(UserError, match="no column 'key'.* 'file'.*: --key path --columns.key file$"):
        run("file,label\na/b.png,x\n", images)
    for data in ("A1,홍길동,patent\nA2,김영희,patent\n", "홍길동,x,00012345\n"):
        with pytest.raises(UserError, match="the names of its 3 columns, and looks like data") as info:
            run(data, images)
        assert not any(told in str(info.value) for told in ("홍길동", "A1", "12345"))
    with pytest.raises(UserError, match="the manifest has a column of that name"):
        run("key,label,series\nA,x,y\n", images, {"keep": ("series",)})


def test_very_many_classes_are_no_classes(run):
    sheet = "key,label\n" + "".join(f"{i},name {i}\n" for i in range(21))
    with pytest.raises(UserError, match="holds 21 different texts") as info:
        run(sheet, [image("a", "1")])
    assert "name 1" not in str(info.value)
